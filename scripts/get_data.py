"""The ETT data sets: from this folder, from $TIMELLM_DATA, else from their public repository; and made-up series.

Without a network a synthetic series in the same format is written instead,
under a name of its own. The names rates and drift are always made up: daily
rates like those of currencies, and a series that changes its ways where the
test begins. So are ECL and Traffic: files of the shapes of electricity.csv
(321 columns) and traffic.csv (862 columns; over 100 MB). The last lines printed
are `data: PATH`, one for each name asked for.
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

from data_provider.synthetic import MADE_UP, WIDE, write_synthetic  # noqa: E402 (needs the line above)

SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTm2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"
CONNECT_SECONDS = 5
DOWNLOAD_SECONDS = 60


class Unreachable(Exception):
    """The repository cannot be used now; the message says why."""


def get(name: str, out: Path, offline: bool) -> Path:
    """Put one data set under `out` and return the file to use."""
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
    try:
        content = fetch(URL.format(name=name), DOWNLOAD_SECONDS)
    except Unreachable as error:
        print(f"{name}: no download ({error})")
        return None
    if _checksum(content) != SHA256[name]:
        print(f"{name}: WARNING the download: got SHA-256 {_checksum(content)}, expected {SHA256[name]}; not used")
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
    names, usual = [*SHA256, *MADE_UP, *WIDE], list(SHA256)
    parser.add_argument("--name", nargs="+", choices=names, default=usual, help="data sets (default: the four of ETT)")
    parser.add_argument("--out", type=Path, default=ROOT / "dataset", help="folder (default: dataset/ of this project)")
    parser.add_argument("--offline", action="store_true", help="do not try to download")
    options = parser.parse_args(arguments)
    for path in [get(name, options.out, options.offline) for name in options.name]:
        print(f"data: {path}")


if __name__ == "__main__":
    main()
