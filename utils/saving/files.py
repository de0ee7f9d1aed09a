"""The one place that writes files: a reader sees the old file or the new one, never half of one."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
PARTIAL = ".partial"  # how the names of unfinished files end


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it to `path`.

    Raises:
        StorageError: the file system refused; `path` is then what it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.unlink(missing_ok=True)  # were it a link, writing would follow it
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):  # room is free again before the message counts it
            partial.unlink(missing_ok=True)
        raise StorageError(_reason(path, error), error.errno) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For files that grow bit by bit: an OSError inside becomes a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(_reason(path, error), error.errno) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove_partials(folder: Path) -> None:
    """Remove what killed runs left unfinished in a folder that nobody else writes to."""
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def size_text(size: float) -> str:
    """Bytes for people: 1.8 GB, 340 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below `folder`; 0 where that cannot be told."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


def _reason(path: Path, error: OSError) -> str:
    """The line for a file that cannot be written."""
    folder = path.parent
    if error.errno in FULL:
        return f"{path.name} cannot be written: the disk of {folder} is full ({size_text(free_bytes(folder))} free)"
    if error.errno == errno.ENOENT and not folder.is_dir():
        return f"{path.name} cannot be written: the folder {folder} has vanished; bring it back"
    return f"{path.name} cannot be written in {folder} ({error.strerror})"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows does not open folders; its rename is journalled
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is safe by then.
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(handle)
