"""The one place that writes files, whole or not at all; and what a checkpoint's file says of itself, told without torch."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layers.errors import StorageError, input_error

TENSORS, LEGACY, RECORD = "checkpoint.safetensors", "checkpoint", "checkpoint.json"
OFFSETS, NEWEST = "intervals.offsets", "intervals.newest"  # the tensors of the prediction intervals in TENSORS
FULL = (errno.ENOSPC, errno.EDQUOT)
PARTIAL = ".partial"  # how the names of unfinished files end


def find_checkpoint(path: Path) -> Path:
    """The file of a checkpoint: `path`, or the one in that folder.

    Raises:
        InputError: there is none.
    """
    for file in (path, path / TENSORS, path / LEGACY):
        if file.is_file():
            return file
    hint = "train first with --is_training 1 and the same flags, or name a folder with --checkpoint"
    if "_mean-" in path.name:
        hint = "the mean of repeats has none: name one repeat's folder, or give the training's command with --is_training 0"
    raise input_error(f"--checkpoint {path}", "no checkpoint", f"{TENSORS} (or older {LEGACY}) in it", hint)


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The record of the training in a safetensors file (empty in one of other programs), and name -> shape of its trained
    tensors.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, it is cut short, or its record is none.
    """
    from safetensors import SafetensorError, safe_open  # only now: a wrong flag answers without a library

    try:
        with safe_open(file, framework="np") as held:
            metadata = held.metadata() or {}
            shapes = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys() if name not in (OFFSETS, NEWEST)}
    except SafetensorError as error:
        raise ValueError(f"a damaged file: {error}") from None
    return json.loads(metadata.get("record", "{}")), shapes


def read_record(path: Path) -> dict[str, Any]:
    """The record in the checkpoint at `path`, a file or a run's folder; empty where there is none that can be read."""
    file = path / TENSORS if path.is_dir() else path
    try:
        return read_header(file)[0] if file.is_file() else {}
    except (OSError, ValueError):
        return {}


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it to `path`: a reader sees the old file or
    the new one, also after a power cut.

    Raises:
        StorageError: the file system refused; `path` is then what it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with writing(path):
        try:
            write(partial)
            with partial.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system syncs folders
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Work that writes `path`: an OSError inside becomes a StorageError of one line.

    Raises:
        StorageError: the file system refused.
    """
    try:
        yield
    except OSError as error:
        folder, reason = path.parent, f" in {path.parent} ({error.strerror})"
        if error.errno in FULL:
            reason = f": the disk of {folder} is full ({size_text(shutil.disk_usage(folder).free)} free)"
        elif error.errno == errno.ENOENT and not folder.is_dir():
            reason = f": the folder {folder} has vanished; bring it back"
        raise StorageError(f"{path.name} cannot be written{reason}") from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def size_text(size: float) -> str:
    """Bytes for people: 1.8 GB, 340 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 45 s, 12 min, 1 h 50 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(seconds, 1):.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
