"""The ETT and M4 data sets: from this folder, from $TIMELLM_DATA, else from their public repositories; made-up series.

Without a network a synthetic series in the same format is written instead,
under a name of its own. The names rates and drift are always made up: daily
rates like those of currencies, and a series that changes its ways where the
test begins. So are ECL and Traffic: files of the shapes of electricity.csv
(321 columns) and traffic.csv (862 columns; over 100 MB). The name m4 stands for the
twelve files of the M4 competition, PATH is their folder. The last lines printed are
`data: PATH`, one for each name asked for.
"""

import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
from data_provider.synthetic import NEVER_FETCHED, write_synthetic  # noqa: E402
from utils.saving.files import write_atomic  # noqa: E402

# Name -> its files with their SHA-256, small ones first: where none comes, nobody waits for the large ones.
FILES = {
    "ETTh1": {"ETTh1.csv": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"},
    "ETTh2": {"ETTh2.csv": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"},
    "ETTm1": {"ETTm1.csv": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e"},
    "ETTm2": {"ETTm2.csv": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd"},
    "m4": {
        "Hourly-test.csv": "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
        "Hourly-train.csv": "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
        "Weekly-test.csv": "3b2bc4be8e636e802260dcd843ca3c5da40536a1fbe1ecb3229a97dae4f44688",
        "Weekly-train.csv": "d478d3f6ed673e6ed3c2cb0fbed5425f72eedd51318ebebeb0b5ecfcefc37714",
        "Daily-test.csv": "633b0815626ae266d36872c4d53e95eb93ee8d43e79587fceec519eba3e6b05e",
        "Daily-train.csv": "78e94591c60c06309f1e544fd7b2ccba28f3616b01913dd336a1d1d98483a1ec",
        "Yearly-test.csv": "6dc2dd45b3af320389e2d3735cb4b3cdf320b63cbcda15d1a17193ab99702306",
        "Yearly-train.csv": "6aa668d4f04654c0bf5f07b266a51c556f0df2faf4709f852653755396a249e4",
        "Quarterly-test.csv": "bf1cab3b969a744c220cdc148e3829803eaa5da2754270fc4f376e775cd7d0ae",
        "Quarterly-train.csv": "4450678cd493aa965c14bde984a5b62a66d8c3b2f7af1e53779bc91ff008ccdc",
        "Monthly-test.csv": "5e3538bf23b4a09f4078180c3e2b34859f0382e1c4f22564affc1797e8f3f48f",
        "Monthly-train.csv": "63aaa56198b4a22279a2fec541f56921f3bed6d8e0f84e550206df9276f2e9b9",
    },
}
ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{file}"
M4_URL = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset/{part}/{file}"
TIMEOUT = 10  # seconds without an answer, or without a further byte
ARGUMENTS = {
    "--name": dict(nargs="+", choices=[*FILES, *NEVER_FETCHED], default=[name for name in FILES if name != "m4"],
                   help="data sets (default: the four of ETT)"),
    "--out": dict(type=Path, default=ROOT / "dataset", help="folder (default: dataset/ of this project)"),
    "--offline": dict(action="store_true", help="do not try to download"),
}  # fmt: skip


def get(name: str, out: Path, offline: bool) -> Path:
    """Put one data set under `out` and return the file to use; of M4 the folder."""
    folder, files = out / ("m4" if name == "m4" else "ETT-small"), FILES.get(name, {})
    for file, sha256 in files.items():
        path = folder / file
        if path.is_file():
            right = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
            found = "SHA-256 right" if right else "WARNING: another SHA-256 than the public file's; kept as it is"
            print(f"{name}: {path} is there, {found}")
        elif content := fetch(name, file, folder.name, sha256, offline):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda partial, content=content: partial.write_bytes(content))
            print(f"{name}: written to {path}, SHA-256 right")
        else:
            offline = True  # the next one would not come either
    parts = dict.fromkeys(file.partition("-")[0] for file in files)  # of M4 its patterns, two files each
    missing = [part for part in parts if not all((folder / file).is_file() for file in files if file.startswith(part))]
    if len(missing) < len(parts):
        if missing:
            print(f"{name}: WARNING {', '.join(missing)} could not be had")
        return folder if name == "m4" else path
    path = write_synthetic(name, out / "synthetic")
    warning = f": results on it say NOTHING about {name.replace('m4', 'M4')} !!!" if files else ""
    print(f"{name}: !!! {path} IS SYNTHETIC (made up, not measured){warning}")
    return path


def fetch(name: str, file: str, below: str, sha256: str, offline: bool) -> bytes | None:
    # A file with this checksum: from $TIMELLM_DATA, from the folder `below` it, or from the public repository.
    url = (M4_URL if name == "m4" else ETT_URL).format(file=file, part="Train" if "train" in file else "Test")
    root = os.environ.get("TIMELLM_DATA")
    places = [Path(root).resolve() / part for part in (file, f"{below}/{file}")] if root else []
    for source in [*(place.as_uri() for place in places if place.is_file()), *([] if offline else [url])]:
        try:
            with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            print(f"{name}: no download ({error})")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found == sha256:
            return content
        print(f"{name}: WARNING {source} has SHA-256 {found}, the public file has {sha256}; not used")
    return None


def main(argv: list[str] | None = None) -> int:
    args = script_parser("get_data.py", __doc__, ARGUMENTS).parse_args(argv)

    def work() -> None:
        for path in [get(name, args.out, args.offline) for name in args.name]:
            print(f"data: {path}")

    return exit_code("get_data.py", work)


if __name__ == "__main__":
    sys.exit(main())
