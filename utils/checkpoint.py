"""The checkpoint: the trained tensors, and beside them what is needed to use them again.

`checkpoint.safetensors` holds the tensors under the names of model.md, and in its header the record
(flags, columns, scaler, backbone, versions) as JSON, so that the two cannot be parted. The same record
lies in `checkpoint.json` for people to read. A `checkpoint` file of older Time-LLM code loads too.
"""

import json
import math
import pickle
import platform
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from layers.errors import InputError
from utils.files import write_atomic, write_json
from utils.tensors import damage, write_tensors

TENSORS, RECORD, LEGACY = "checkpoint.safetensors", "checkpoint.json", "checkpoint"
LIBRARIES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy", "pandas")
FROZEN = ("llm_model.", "word_embeddings")  # what older checkpoints may hold besides the trained tensors

# What torch.load raises of a file in which bytes are wrong.
DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AssertionError, AttributeError, OverflowError, MemoryError, struct.error,
)  # fmt: skip


def save_checkpoint(folder: Path, model: torch.nn.Module, record: dict) -> None:
    """Write the trained tensors with their record; an earlier checkpoint stays until this one is safe."""
    record = record | {"versions": versions()}
    metadata = {"record": json.dumps(record, ensure_ascii=False)}
    write_atomic(folder / TENSORS, lambda path: write_tensors(path, model.state_dict(), metadata))
    write_json(folder / RECORD, record)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def find_checkpoint(path: Path) -> Path:
    """The file of tensors: `path` itself, or the one in that folder.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return path
    for name in (TENSORS, LEGACY):
        if (path / name).is_file():
            return path / name
    raise InputError(
        f"--checkpoint: found no {TENSORS} (or older {LEGACY}) in {path}; "
        "train first with --is_training 1 and the same flags, or name a folder with --checkpoint"
    )


def read_checkpoint(file: Path, expected: dict[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and record; the record of an older file is empty. Nothing is unpickled but tensors.

    Args:
        expected: name -> shape of every trained tensor of the model that the flags describe.

    Raises:
        InputError: unreadable, or tensors missing, unknown or of another shape.
    """
    tensors, record = _read_legacy(file) if file.suffix != ".safetensors" else _read_safetensors(file)
    _compare(file, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    return tensors, record


def check_checkpoint(file: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """The same checks as `read_checkpoint`, from the header alone where the format allows it."""
    if file.suffix != ".safetensors":
        read_checkpoint(file, expected)
        return
    with _open(file) as held:
        _compare(file, {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}, expected)


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"--checkpoint {file}: damaged or not a safetensors file ({error})") from error


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with _open(file) as held:
        metadata = held.metadata() or {}
        # What this program wrote has a checksum; a bare safetensors file of tensors need not.
        wrong = damage(file) if metadata.keys() - {"format"} else None
        if wrong is not None:
            raise InputError(f"--checkpoint {file}: damaged, {wrong}; take another copy of it")
        return {name: held.get_tensor(name) for name in held.keys()}, _record(file, metadata)


def _record(file: Path, metadata: dict[str, str]) -> dict:
    """The record in a header; the header may be anyone's, so nothing in it is taken for granted."""
    try:
        record = json.loads(metadata.get("record", "{}"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("backbone", {}), dict):
        raise InputError(f"--checkpoint {file}: found a record that cannot be read, need the one that training wrote")
    return record


def _read_legacy(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise InputError(
            f"--checkpoint {file}: found something else than tensors, or a damaged file; "
            "need safetensors or a state dict of tensors"
        ) from error
    if isinstance(held, dict) and isinstance(held.get("module"), dict):  # DeepSpeed wraps it once more
        held = held["module"]
    named = held.items() if isinstance(held, dict) else ()
    tensors = {str(name).removeprefix("module."): value for name, value in named if torch.is_tensor(value)}
    return {name: t.float() for name, t in tensors.items() if not name.startswith(FROZEN)}, {}


def _compare(file: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"--checkpoint {file}: found no tensor {name}; {_hint(name)}")
        if name not in expected:
            raise InputError(f"--checkpoint {file}: found the unknown tensor {name}; {_hint(name)}")
        if tuple(found[name]) != tuple(expected[name]):
            raise InputError(
                f"--checkpoint {file}: found {name} of shape {list(found[name])}, "
                f"need {list(expected[name])} for these flags; {_hint(name)}"
            )


def _hint(name: str) -> str:
    """Which flags decide about a tensor."""
    flags = {
        "patch_embedding": "--patch_len --d_model",
        "mapping_layer": "--llm_model_path --prototypes",
        "prototypes": "--llm_model_path --prototypes",
        "reprogramming_layer": "--d_model --n_heads --d_ff --llm_model_path",
        "output_projection": "--d_ff --seq_len --patch_len --stride --pred_len",
    }
    return f"give the flags of its training ({flags.get(name.split('.')[0], 'see its checkpoint.json')})"


def parameter_count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Number of trained values."""
    return sum(math.prod(shape) for shape in shapes.values())
