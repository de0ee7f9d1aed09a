"""The flags of a checkpoint's training, for runs that name a checkpoint and leave the rest out.

Only the standard library is imported here: the command line is read before torch is loaded.
"""

import json
import struct
from pathlib import Path
from typing import Any

from layers.errors import InputError

TENSORS = "checkpoint.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
# What is about the data of the training; with other data it does not hold.
DATA = ("data", "root_path", "data_path", "target", "freq", "percent", "fill_missing", "prompt_text", "enc_in")
# What makes the model, or the folder's name.
KEPT = (
    "task_name", "model_id", "model_comment", "model", "des", "seed", "features", "embed", "num_workers",
    "seq_len", "label_len", "pred_len", "d_model", "n_heads", "d_ff", "e_layers", "d_layers", "factor",
    "dropout", "patch_len", "stride", "prompt_domain", "llm_model", "llm_model_path", "llm_dim",
    "llm_layers", "load_in_4bit", "prototypes", "prompt_decimals", "eval_batch_size",
)  # fmt: skip


def recorded(path: Path) -> dict[str, Any]:
    """The record in the checkpoint at `path`, a file or a run's folder (see utils.checkpoint).

    Empty where there is none: no such file, an older format, or damage, which the reader of its
    tensors names. What it holds under "flags", "data" and "scaler" is a dict or absent.
    """
    file = path / TENSORS if path.is_dir() else path
    try:
        with file.open("rb") as held:
            (size,) = struct.unpack("<Q", held.read(8))  # safetensors: length of the header, header, tensors
            header = json.loads(held.read(size)) if size < LARGEST_HEADER else {}
        record = json.loads(header["__metadata__"]["record"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error):
        return {}
    parts = ("flags", "data", "scaler")  # the file may be anyone's
    if not isinstance(record, dict) or not all(isinstance(record.get(part, {}), dict) for part in parts):
        return {}
    return record


def recorded_flags(path: Path) -> dict[str, Any]:
    """The flags that the checkpoint at `path` was trained with; empty where it does not say."""
    return recorded(path).get("flags", {})


def inherited_flags(checkpoint: str, given: set[str]) -> dict[str, str]:
    """Values, as the words of a command line, for the flags that one with `--checkpoint` leaves out.

    As words they go through the same checks as a user's own: the checkpoint may be anyone's.

    Args:
        given: names of the flags on the command line. One that names other data (--data, --root_path,
            --data_path) leaves the training's data out of account; the kind of data, --data, is kept
            where only a file is named.

    Raises:
        InputError: a value that is no text, number or switch.
    """
    flags = recorded_flags(Path(checkpoint))
    names = KEPT if given & {"data", "root_path", "data_path"} else KEPT + DATA
    if "data" not in given and flags.get("data") == "custom":
        names = (*names, "data")
    held = {name: flags[name] for name in names if flags.get(name) is not None}
    for name, value in held.items():
        if not isinstance(value, (str, int, float)):
            raise InputError(
                f"--checkpoint {checkpoint}: found --{name} {str(value)[:40]!r} in its record, need text or a number"
            )
    return {name: str(value) for name, value in held.items()}
