"""The whole state of a run between two iterations, in files that outlive what ends it.

`state.7.safetensors` holds the trained tensors, the optimizer's and the random generators', and in its
header, as JSON, what the run was (`identity`) and how far it is (`progress`). The newest two are kept:
a new one is safe on the disk before the oldest goes. The order of the batches needs no state (see
data_provider/sampler.py), nor does the learning rate (utils/schedule.py).
"""

import hashlib
import json
import random
import re
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data_provider.data_loader import Series
from layers.errors import InputError
from models.TimeLLM import describe
from utils.errors import RunError, StorageError
from utils.files import FULL, write_atomic
from utils.progress import Progress
from utils.tensors import damage, write_tensors

VERSION = 1
Packed = tuple[dict[str, torch.Tensor], dict[str, str]]  # named tensors, metadata
_NAME = re.compile(r"state\.(\d+)\.safetensors")
# Flags that decide nothing about the numbers, or whose effect `identity` compares itself.
MAY_CHANGE = {
    "train_epochs", "patience", "num_workers", "save_steps", "log_every", "resume", "itr", "is_training",
    "checkpoints", "checkpoint", "root_path", "data_path", "llm_model_path", "eval_batch_size", "device",
    "max_sequences", "grad_checkpoint", "fast_path", "freq", "loader", "seasonal_patterns", "dec_in", "c_out",
    "moving_avg", "activation", "output_attention", "align_epochs", "prompt_text", "fill_missing", "do_predict",
    "predict_path", "predict_steps", "save_predictions", "plots", "tensorboard",
}  # fmt: skip


@dataclass(frozen=True)
class SavedState:
    """A state file whose checksum is right."""

    path: Path
    identity: dict
    progress: dict
    random: dict
    optimizer: list

    def where(self) -> str:
        """How far it is, for people."""
        return f"epoch {self.progress['epoch']}, iteration {self.progress['iteration']}"


def identity(args: Namespace, series: Series, backbone: dict, processes: int = 1) -> dict:
    """What must be the same for a run to go on: JSON values, compared one by one."""
    data = hashlib.sha256(series.values.tobytes())
    data.update(series.dates.asi8.tobytes())
    matter = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    return {f"--{name}": value for name, value in sorted(matter.items())} | {
        "the data's columns": series.columns,
        "the data's number of rows": len(series.dates),
        "the data's values (SHA-256)": data.hexdigest(),
        "the prompt's description": describe(args),
        **{f"the language model's {name}": value for name, value in backbone.items()},
        "the number of processes": processes,
    }


def compare(saved: SavedState, now: dict) -> None:
    """Raise InputError, naming what differs, if a state was saved by another run than this one."""
    now = json.loads(json.dumps(now))
    different = [name for name in now | saved.identity if now.get(name) != saved.identity.get(name)]
    if different:
        was = saved.identity
        parts = [f"{name} was {_short(was.get(name))}, is {_short(now.get(name))}" for name in different]
        raise InputError(
            f"--resume: {saved.path} was saved with other settings: {'; '.join(parts)}; give the same "
            "ones, or start anew with --resume False (what is there is then moved aside)"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def state_bytes(optimizer: str, trained_values: int) -> int:
    """About how large a state is: the trained values, and two moments of each."""
    return trained_values * (4 + (2 if optimizer == "adamw8bit" else 8)) + 2**18


def state_files(folder: Path) -> list[Path]:
    """The folder's states, newest first."""
    found = [path for path in folder.glob("state.*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def find_state(folder: Path) -> tuple[SavedState | None, list[str]]:
    """The newest good state, and a line for every newer one that is damaged."""
    lines = []
    for path in state_files(folder):
        wrong = damage(path)
        if wrong is None:
            try:
                return _read_header(path), lines
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                wrong = f"its header cannot be used ({error})"
        lines.append(f"WARNING: {path.name} is damaged: {wrong}")
    return None, lines


def _read_header(path: Path) -> SavedState:
    with safe_open(path, framework="pt") as file:
        held = json.loads(file.metadata()["state"])
    if held["version"] != VERSION:
        raise ValueError(f"version {held['version']}, not {VERSION}")
    Progress.from_json(held["progress"])
    return SavedState(path, held["identity"], held["progress"], held["random"], held["optimizer"])


def pack(model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, identity: dict,
         device: torch.device) -> Packed:  # fmt: skip
    """The whole state as named tensors (not copied) and metadata.

    Raises:
        RunError: a trained value is NaN or infinite.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"{name.removeprefix('model.')} has become NaN or infinite, so it is not saved")
    generators = random_state(device)
    tensors |= generators.pop("tensors")
    moments = optimizer.state_dict()["state"].items()
    held = {
        "version": VERSION,
        "identity": identity,
        "progress": progress.to_json(),
        "random": generators,
        "optimizer": [[index, _take(state, f"optimizer.{index}", tensors)] for index, state in moments],
    }
    return tensors, {"state": json.dumps(held, ensure_ascii=False)}


def save_state(folder: Path, packed: Packed, before: Path | None) -> Path:
    """Write the state as the newest; then only it and `before`, the last good one, are kept.

    Where the disk has no room for a third, the others go first, if `before` is sound.

    Raises:
        StorageError: the file system refused; `before` is still there.
    """
    newest = state_files(folder)[:1]
    path = folder / f"state.{int(_NAME.fullmatch(newest[0].name)[1]) + 1 if newest else 1}.safetensors"

    def write() -> None:
        write_atomic(path, lambda partial: write_tensors(partial, *packed))

    try:
        write()
    except StorageError as error:
        if error.errno not in FULL or before is None or damage(before) is not None:
            raise
        _remove_states(folder, keep=[before])
        write()
    _remove_states(folder, keep=[path, before])
    return path


def _remove_states(folder: Path, keep: list[Path | None]) -> None:
    for path in state_files(folder):
        if path not in keep:
            with suppress(OSError):  # a state too many does no harm
                path.unlink()


def _take(tree: object, name: str, tensors: dict[str, torch.Tensor]) -> dict:
    """Put the tensors of nested dicts into `tensors` by name; return the tree as JSON."""
    if torch.is_tensor(tree):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": {key: _take(value, f"{name}.{key}", tensors) for key, value in tree.items()}}
    return {"value": tree}


def _give(tree: dict, tensor) -> object:
    """The reverse of `_take`; `tensor` reads one by name."""
    if "tensor" in tree:
        return tensor(tree["tensor"])
    if "dict" in tree:
        return {key: _give(value, tensor) for key, value in tree["dict"].items()}
    return tree["value"]


def restore(
    saved: SavedState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Progress:
    """Bring model, optimizer and random generators to a saved state; return how far it is."""
    with safe_open(saved.path, framework="pt", device="cpu" if device.type == "cpu" else str(device)) as file:

        def tensor(name: str) -> torch.Tensor:
            # On the CPU it is a window into the file, which would keep a removed file's space taken.
            return file.get_tensor(name).clone() if device.type == "cpu" else file.get_tensor(name)

        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                parameter.copy_(file.get_tensor(f"model.{name}"))
        states = {index: _give(tree, tensor) for index, tree in saved.optimizer}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        generators = {name: file.get_tensor(name).cpu() for name in file.keys() if name.startswith("random.")}
    set_random_state(saved.random | {"tensors": generators}, device)
    return Progress.from_json(saved.progress)


def random_state(device: torch.device) -> dict:
    """Every generator that a training step may draw from: JSON values, and under "tensors" tensors."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, spare = random.getstate()
    tensors = {"random.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return {
        "python": [version, list(numbers), spare],
        "numpy": [kind, keys.tolist(), *rest],
        "tensors": tensors,
    }


def set_random_state(state: dict, device: torch.device) -> None:
    """The reverse of `random_state`; a device that it does not know keeps its own generator."""
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers), spare))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["tensors"]["random.torch"])
    if device.type == "cuda" and "random.cuda" in state["tensors"]:
        torch.cuda.set_rng_state(state["tensors"]["random.cuda"], device)


