"""Headers of safetensors files, and the record that a checkpoint carries in its own.

Only the standard library is imported here: the command line is read before torch is loaded. The files may
be anyone's, so nothing in them is taken for granted.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layers.errors import input_error

TENSORS, LEGACY = "checkpoint.safetensors", "checkpoint"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
PARTS = ("flags", "data", "scaler", "backbone", "pretrain")  # of a record: each a dict, or absent


@dataclass(frozen=True)
class Header:
    """What stands in front of the tensors of a safetensors file."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]  # by the tensors' names


def find_checkpoint(path: Path) -> Path:
    """The file of a checkpoint: `path`, or the one in that folder.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return path
    for name in (TENSORS, LEGACY):
        if (path / name).is_file():
            return path / name
    hint = "train first with --is_training 1 and the same flags, or name a folder with --checkpoint"
    raise input_error(f"--checkpoint {path}", "no checkpoint", f"{TENSORS} (or older {LEGACY}) in it", hint)


def read_header(file: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, or cut short in its header.
    """
    with file.open("rb") as held:
        length = held.read(8)  # safetensors: length of the header, header, tensors
        if len(length) < 8:
            raise ValueError("it is cut short")
        (size,) = struct.unpack("<Q", length)
        text = held.read(size) if size < LARGEST_HEADER else b""
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("it has no header of a safetensors file") from None
    return Header(metadata, shapes)


def parse_record(metadata: dict[str, str]) -> dict[str, Any]:
    """The record in a header's metadata; empty where there is none.

    Raises:
        ValueError: it is something else than a record.
    """
    try:
        record = json.loads(metadata.get("record", "{}"))
    except RecursionError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(part, {}), dict) for part in PARTS):
        raise ValueError("found a record of another shape")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """The record in the checkpoint at `path`, a file or a run's folder.

    Empty where there is none: no such file, an older format, or damage, which `Checkpoint.open` names.
    """
    try:
        return parse_record(read_header(path / TENSORS if path.is_dir() else path).metadata)
    except (OSError, ValueError):
        return {}
