"""The flags of a checkpoint's training, for runs that name a checkpoint and leave the rest out.

Only the standard library is imported here: the command line is read before torch is loaded.
"""

import json
import struct
from pathlib import Path
from typing import Any

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
    tensors names.
    """
    file = path / TENSORS if path.is_dir() else path
    try:
        with file.open("rb") as held:
            (size,) = struct.unpack("<Q", held.read(8))  # safetensors: length of the header, header, tensors
            header = json.loads(held.read(size)) if size < LARGEST_HEADER else {}
        return json.loads(header["__metadata__"]["record"])
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return {}


def recorded_flags(path: Path) -> dict[str, Any]:
    """The flags that the checkpoint at `path` was trained with; empty where it does not say."""
    return recorded(path).get("flags", {})


def inherited_flags(checkpoint: str, given: set[str]) -> dict[str, Any]:
    """Values for the flags that a command line with `--checkpoint` leaves out.

    Args:
        given: names of the flags on the command line. One that names other data (--data, --root_path,
            --data_path) leaves the training's data out of account; the kind of data, --data, is kept
            where only a file is named.
    """
    flags = recorded_flags(Path(checkpoint))
    names = KEPT if given & {"data", "root_path", "data_path"} else KEPT + DATA
    if "data" not in given and flags.get("data") == "custom":
        names = (*names, "data")
    return {name: flags[name] for name in names if flags.get(name) is not None}
