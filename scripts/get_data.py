"""The ETT and M4 data sets: from this folder, from $TIMELLM_DATA, else from their public repositories; made-up series.

Without a network a synthetic series in the same format is written instead,
under a name of its own. The names rates and drift are always made up: daily
rates like those of currencies, and a series that changes its ways where the
test begins. So are ECL and Traffic: files of the shapes of electricity.csv
(321 columns) and traffic.csv (862 columns; over 100 MB). The name m4 stands for the
twelve files of the M4 competition, PATH is their folder. The last lines printed are
`data: PATH`, one for each name asked for.
"""

import argparse
import hashlib
import http.client
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_provider.splits import M4, PATTERNS, m4_file  # noqa: E402 (needs the line above)
from data_provider.synthetic import MADE_UP, WIDE, write_synthetic, write_synthetic_m4  # noqa: E402 (needs the line above)

SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTm2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
M4_SHA256 = {
    "Hourly-train.csv": "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
    "Hourly-test.csv": "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
    "Weekly-train.csv": "d478d3f6ed673e6ed3c2cb0fbed5425f72eedd51318ebebeb0b5ecfcefc37714",
    "Weekly-test.csv": "3b2bc4be8e636e802260dcd843ca3c5da40536a1fbe1ecb3229a97dae4f44688",
    "Daily-train.csv": "78e94591c60c06309f1e544fd7b2ccba28f3616b01913dd336a1d1d98483a1ec",
    "Daily-test.csv": "633b0815626ae266d36872c4d53e95eb93ee8d43e79587fceec519eba3e6b05e",
    "Yearly-train.csv": "6aa668d4f04654c0bf5f07b266a51c556f0df2faf4709f852653755396a249e4",
    "Yearly-test.csv": "6dc2dd45b3af320389e2d3735cb4b3cdf320b63cbcda15d1a17193ab99702306",
    "Quarterly-train.csv": "4450678cd493aa965c14bde984a5b62a66d8c3b2f7af1e53779bc91ff008ccdc",
    "Quarterly-test.csv": "bf1cab3b969a744c220cdc148e3829803eaa5da2754270fc4f376e775cd7d0ae",
    "Monthly-train.csv": "63aaa56198b4a22279a2fec541f56921f3bed6d8e0f84e550206df9276f2e9b9",
    "Monthly-test.csv": "5e3538bf23b4a09f4078180c3e2b34859f0382e1c4f22564affc1797e8f3f48f",
}
M4_URL = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset/{folder}/{name}"
URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"
CONNECT_SECONDS = 5
DOWNLOAD_SECONDS = 60
LARGE_SECONDS = 300  # for files of up to 90 MB, once a small one has come


class Unreachable(Exception):
    """The repository cannot be used now; the message says why."""


def get(name: str, out: Path, offline: bool) -> Path:
    """Put one data set under `out` and return the file to use."""
    if name == M4:
        return get_m4(out, offline)
    if name in MADE_UP or name in WIDE:
        path = write_synthetic(name, out / "synthetic")
        print(f"{name}: written to {path}; it is synthetic (made up, not measured)")
        return path
    path = out / "ETT-small" / f"{name}.csv"
    if path.is_file():
        if _checksum(path.read_bytes()) == SHA256[name]:
            print(f"{name}: {path} is there, SHA-256 right")
        else:
            print(f"{name}: WARNING {path} is there with another SHA-256 than the public file's; kept as it is")
        return path
    content = _from_folder(name)
    if content is None and not offline:
        content = _from_network(name)
    if content is not None:
        _write(path, content)
        print(f"{name}: written to {path}, SHA-256 right")
        return path
    path = write_synthetic(name, out / "synthetic")
    print(f"{name}: !!! {path} IS SYNTHETIC (made up, not measured): results on it say NOTHING about {name} !!!")
    return path


def get_m4(out: Path, offline: bool) -> Path:
    """Put the competition's files under `out`, as far as they can be had; return the folder to use."""
    folder = out / M4
    for pattern in reversed(PATTERNS):  # the small ones first: where none comes, nobody waits for the large ones
        for part in ("test", "train"):
            name = m4_file(pattern, part)
            path = folder / name
            if path.is_file():
                right = _checksum(path.read_bytes()) == M4_SHA256[name]
                said = "SHA-256 right" if right else "WARNING: another SHA-256 than the public file's; kept as it is"
                print(f"{M4}: {path} is there, {said}")
                continue
            content = _m4_from_folder(name)
            if content is None and not offline:
                content = _m4_from_network(name, LARGE_SECONDS if any(folder.glob("*.csv")) else DOWNLOAD_SECONDS)
                offline = content is None
            if content is not None:
                _write(path, content)
                print(f"{M4}: written to {path}, SHA-256 right")
    there = [
        pattern for pattern in PATTERNS if all((folder / m4_file(pattern, part)).is_file() for part in ("train", "test"))
    ]
    if there:
        missing = [pattern for pattern in PATTERNS if pattern not in there]
        print(f"{M4}: {', '.join(there)}" + (f"; WARNING {', '.join(missing)} could not be had" if missing else ""))
        return folder
    folder = write_synthetic_m4(out / "synthetic" / M4)
    print(f"{M4}: !!! {folder} IS SYNTHETIC (made up, not measured): results on it say NOTHING about M4 !!!")
    return folder


def _m4_from_folder(name: str) -> bytes | None:
    """A file's content from $TIMELLM_DATA or its folder m4, where its checksum is right."""
    root = os.environ.get("TIMELLM_DATA")
    for path in [Path(root) / name, Path(root) / M4 / name] if root else []:
        if path.is_file() and _checksum(content := path.read_bytes()) == M4_SHA256[name]:
            return content
    return None


def _m4_from_network(name: str, seconds: float) -> bytes | None:
    url = M4_URL.format(folder="Train" if "train" in name else "Test", name=name)
    return _checked(name, url, M4_SHA256[name], seconds)


def _from_folder(name: str) -> bytes | None:
    """The file's content from $TIMELLM_DATA, where its checksum is right."""
    folder = os.environ.get("TIMELLM_DATA")
    if not folder:
        return None
    for path in (Path(folder) / f"{name}.csv", Path(folder) / "ETT-small" / f"{name}.csv"):
        if path.is_file():
            content = path.read_bytes()
            if _checksum(content) == SHA256[name]:
                return content
            print(f"{name}: WARNING {path} has another SHA-256 than the public file's; not used")
    return None


def _from_network(name: str) -> bytes | None:
    return _checked(name, URL.format(name=name), SHA256[name], DOWNLOAD_SECONDS)


def _checked(name: str, url: str, sha256: str, seconds: float) -> bytes | None:
    """What a download holds, where it comes in time and its checksum is right."""
    try:
        content = fetch(url, seconds)
    except Unreachable as error:
        print(f"{name}: no download ({error})")
        return None
    if _checksum(content) != sha256:
        print(f"{name}: WARNING the download: got SHA-256 {_checksum(content)}, expected {sha256}; not used")
        return None
    return content


def fetch(url: str, seconds: float) -> bytes:
    """Download within `seconds`, all told.

    The work is done in a daemon thread: a name look-up has no time limit of
    its own, and a thread can be left behind.

    Raises:
        Unreachable: refused, not found, cut off or too slow.
    """
    answer: list[bytes | Exception] = []
    thread = threading.Thread(target=_read, args=(url, time.monotonic() + seconds, answer), daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise Unreachable(f"nothing within {seconds:g} s")
    if isinstance(answer[0], Exception):
        raise Unreachable(str(answer[0])) from answer[0]
    return answer[0]


def _read(url: str, deadline: float, answer: list[bytes | Exception]) -> None:
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
            parts = []
            while part := response.read(1 << 16):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError("too slow")
        answer.append(b"".join(parts))
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        answer.append(error)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, usual = [*SHA256, *MADE_UP, *WIDE, M4], list(SHA256)
    parser.add_argument("--name", nargs="+", choices=names, default=usual, help="data sets (default: the four of ETT)")
    parser.add_argument("--out", type=Path, default=ROOT / "dataset", help="folder (default: dataset/ of this project)")
    parser.add_argument("--offline", action="store_true", help="do not try to download")
    options = parser.parse_args(arguments)
    for path in [get(name, options.out, options.offline) for name in options.name]:
        print(f"data: {path}")


if __name__ == "__main__":
    main()
