"""The whole state of a run between two iterations, in files that outlive what ends it.

`state.7.safetensors` holds the trained tensors, the optimizer's and the random generators', and in its
header, as JSON, what the run was (`identity`) and how far it is (`progress`). The newest two are kept:
a new one is safe on the disk before the oldest goes. The order of the batches needs no state (see
data_provider/sampler.py), nor does the learning rate (utils/training/schedule.py).
"""

import hashlib
import json
import random
import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open

from data_provider.data_loader import SplitSeries
from data_provider.description import dataset_description
from layers.errors import input_error
from layers.ranks import from_all, processes, this_process
from models.base import ForecastModel
from utils.errors import RunError, StorageError
from utils.flags import resumed, resumed_defaults
from utils.saving.files import FULL, write_atomic
from utils.saving.record import read_header
from utils.saving.shares import Shares
from utils.saving.tensors import damage, write_tensors

VERSION = 1
PROCESSES = "the number of processes"  # in the identity that earlier versions wrote
FIRST_SCALE = 2.0**16  # of the loss, see utils/training/precision.py
Packed = tuple[dict[str, torch.Tensor], dict[str, str]]  # named tensors, metadata
_NAME = re.compile(r"state\.(\d+)\.safetensors")


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Progress:
    """How far a run is; together with tensors and random generators, all that a state holds."""

    epoch: int = 1  # the one that runs
    iteration: int = 0  # iterations done in it
    loss_sum: torch.Tensor = field(default_factory=_zero)  # of these iterations
    best_vali_loss: float = float("inf")
    epochs_without_improvement: int = 0
    skipped: int = 0  # iterations of the epoch whose loss was no number
    skipped_in_a_row: int = 0
    max_sequences: int = 0  # of a training step run at once; how a batch is cut decides how its sums are rounded
    evaluation_sequences: int = 0  # the same of an evaluation
    loss_scale: float = FIRST_SCALE  # in fp16
    good_steps: int = 0  # since the scale last changed
    history: list[dict[str, Any]] = field(default_factory=list)  # a row an epoch

    def next_epoch(self) -> None:
        """Stand before the first iteration of the next epoch."""
        self.epoch, self.iteration, self.skipped, self.loss_sum = self.epoch + 1, 0, 0, _zero()

    def finished(self, train_epochs: int, patience: int) -> bool:
        """Whether epochs or patience are used up."""
        return self.epoch > train_epochs or self.epochs_without_improvement >= patience

    def to_json(self) -> dict[str, Any]:
        """Values that JSON keeps to the last bit, under the names that state files have always had."""
        values = asdict(self) | {"loss_sum": float(self.loss_sum)}
        return {_NAMES_IN_FILES.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "Progress":
        """The reverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        # Earlier versions had one number for both kinds of parts, and no fp16.
        held = {"evaluation_sequences": held["max_sequences"], "loss_scale": FIRST_SCALE, "good_steps": 0} | held
        return cls(**{name: read(held[_NAMES_IN_FILES.get(name, name)]) for name, read in _READ.items()})


_NAMES_IN_FILES = {"best_vali_loss": "best", "epochs_without_improvement": "worse"}
_READ: dict[str, Callable[[Any], Any]] = {
    "epoch": int,
    "iteration": int,
    "loss_sum": lambda value: torch.tensor(float(value), dtype=torch.float64),
    "best_vali_loss": float,
    "epochs_without_improvement": int,
    "skipped": int,
    "skipped_in_a_row": int,
    "max_sequences": int,
    "evaluation_sequences": int,
    "loss_scale": float,
    "good_steps": int,
    "history": list,
}


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


def identity(
    args: Namespace, series: SplitSeries, backbone: dict[str, Any], pretrain: SplitSeries | None = None
) -> dict[str, Any]:
    """What must be the same for a run to resume: JSON values, compared one by one."""
    return {f"--{name}": value for name, value in resumed(args).items()} | {
        **_of_data("data", series),
        **(_of_data("pretraining data", pretrain) if pretrain else {}),
        "the prompt's description": dataset_description(args),
        **{f"the language model's {name}": value for name, value in backbone.items()},
    }


def _of_data(name: str, series: SplitSeries) -> dict[str, Any]:
    return {f"the {name}'s {part}": value for part, value in series.identity().items()}


def compare(saved: SavedState, now: dict[str, Any]) -> None:
    """Set a state against the run that shall resume from it.

    Raises:
        InputError: it was saved by another run; what differs is named.
    """
    now = json.loads(json.dumps(now))
    # A flag that came to be after the state was saved had its default then.
    was = {name: value for name, value in _defaults().items() if name in now} | saved.identity
    # Earlier versions gave each of several processes a whole --batch_size: what one alone has saved is as now.
    if was.get(PROCESSES) == 1:
        del was[PROCESSES]
    different = [name for name in now | was if now.get(name) != was.get(name)]
    if different:
        found, expected = ("; ".join(f"{name} {_short(of.get(name))}" for name in different) for of in (now, was))
        raise input_error(
            "--resume", found, f"{expected}, with which {saved.path} was saved",
            "give the same ones, or start anew with --resume False (what is there is then moved aside)",
        )  # fmt: skip


def _defaults() -> dict[str, Any]:
    return {f"--{name}": value for name, value in resumed_defaults().items()}


def _short(value: object) -> str:
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):  # a SHA-256
        return text[:8]
    return text if len(text) <= 60 else f"{text[:57]}..."


def state_bytes(optimizer: str, trained_values: int) -> int:
    """About how large a state is: the trained values, and two moments of each."""
    return trained_values * (4 + (2 if optimizer == "adamw8bit" else 8)) + 2**18


def state_files(folder: Path) -> list[Path]:
    """The folder's states, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("state.*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_state(folder: Path) -> tuple[SavedState | None, list[str]]:
    """The newest good state, and a line for every newer one that is damaged."""
    lines: list[str] = []
    for path in state_files(folder):
        wrong = damage(path)
        if wrong is None:
            try:
                return read_state(path), lines
            except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                wrong = f"its header cannot be used ({error})"
        lines.append(f"WARNING: {path.name} is damaged: {wrong}")
    return None, lines


def read_state(path: Path) -> SavedState:
    """A state file's header, whose checksum is not looked at.

    Raises:
        OSError, KeyError, TypeError, ValueError: it is none.
    """
    held = json.loads(read_header(path).metadata["state"])
    if held["version"] != VERSION:
        raise ValueError(f"version {held['version']}, not {VERSION}")
    Progress.from_json(held["progress"])
    for part, kind in (("identity", dict), ("random", dict), ("optimizer", list)):
        if not isinstance(held[part], kind):
            raise TypeError(f"its {part} is no {kind.__name__}")
    return SavedState(path, held["identity"], held["progress"], held["random"], held["optimizer"])


def pack(model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, identity: dict,
         device: torch.device) -> Packed:  # fmt: skip
    """The whole state as named tensors (not copied) and metadata; of a group of processes, in the first, of all together.

    Raises:
        RunError: a trained value is NaN or infinite.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    # A sum is finite only if every value is, and takes no memory of its own.
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.sum())]
    if wrong := [name for found in from_all(wrong) for name in found]:
        raise RunError(f"{wrong[0].removeprefix('model.')} has become NaN or infinite, so it is not saved")
    moments = optimizer.state_dict()["state"].items()
    trees = [[index, _flatten(state, f"optimizer.{index}", tensors)] for index, state in moments]
    if processes() > 1:
        tensors = Shares(cast(ForecastModel, model)).collect(tensors)
    generators = random_state(device)
    tensors |= generators.pop("tensors")
    for rank, other in enumerate(from_all({name: tensor.cpu() for name, tensor in _generators(device).items()})):
        if rank > 0:
            tensors |= {f"{name}.{rank}": tensor for name, tensor in other.items()}
    held = {
        "version": VERSION,
        "identity": identity,
        "progress": progress.to_json(),
        "random": generators,
        "optimizer": trees,
    }
    return tensors, {"state": json.dumps(held, ensure_ascii=False)}


def save_state(folder: Path, packed: Packed, before: Path | None) -> Path:
    """Write the state as the newest; then only it and `before`, the last good one, are kept.

    Where the disk has no room for a third, the others go first, if `before` is sound.

    Raises:
        StorageError: the file system refused; `before` is still there.
    """
    newest = state_files(folder)[:1]
    number = int(newest[0].name.split(".")[1]) + 1 if newest else 1
    path = folder / f"state.{number}.safetensors"

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


def _flatten(tree: object, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put the tensors of nested dicts into `tensors` by name; return the tree as JSON."""
    if torch.is_tensor(tree):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": {key: _flatten(value, f"{name}.{key}", tensors) for key, value in tree.items()}}
    return {"value": tree}


def _unflatten(tree: dict[str, Any], tensor: Callable[[str], torch.Tensor]) -> Any:
    """The reverse of `_flatten`; `tensor` reads one by name."""
    if "tensor" in tree:
        return tensor(tree["tensor"])
    if "dict" in tree:
        return {key: _unflatten(value, tensor) for key, value in tree["dict"].items()}
    return tree["value"]


def restore(saved: SavedState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Progress:
    """Bring model, optimizer and random generators to a saved state; return how far it is."""
    shares = Shares(cast(ForecastModel, model)) if processes() > 1 else None
    # Opened on the CPU, where a tensor is a window into the file. For another device the library would
    # stage each tensor in pinned memory of its full size.
    with safe_open(saved.path, framework="pt", device="cpu") as file:

        def held(name: str) -> torch.Tensor:
            rows = shares.range(name) if shares else None
            return file.get_slice(name)[rows[0] : rows[1]] if rows else file.get_tensor(name)

        def tensor(name: str) -> torch.Tensor:
            # A copy: the window would keep a removed file's space taken.
            return held(name).to(device, copy=True)

        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                parameter.copy_(held(f"model.{name}"))
        states = {index: _unflatten(tree, tensor) for index, tree in saved.optimizer}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        generators = {name: file.get_tensor(name).clone() for name in file.keys() if name.startswith("random.")}
    set_random_state(saved.random | {"tensors": _own(generators, device)}, device)
    return Progress.from_json(saved.progress)


def _own(generators: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Those of this process: its own, where there was one of its number; else new ones, which follow from the first's."""
    rank = this_process()
    if rank == 0:
        return generators
    own = {name.removesuffix(f".{rank}"): held for name, held in generators.items() if name.endswith(f".{rank}")}
    if "random.torch" in own:
        return own
    digest = hashlib.sha256(generators["random.torch"].numpy().tobytes() + rank.to_bytes(4, "little")).digest()
    seed = int.from_bytes(digest[:7], "little")
    fresh = {"random.torch": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        fresh["random.cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return fresh


def part_random(seed: int) -> None:
    """Let each process of a group draw other numbers than the first, from now on: each drops out of its own windows."""
    if this_process() == 0:
        return
    drawn = np.random.SeedSequence([seed % 2**63, this_process()]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(drawn >> np.uint64(1)))  # of the GPU, too


def random_state(device: torch.device) -> dict:
    """Every generator that a training step may draw from: JSON values, and under "tensors" tensors."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    version, numbers, spare = random.getstate()
    return {
        "python": [version, list(numbers), spare],
        "numpy": [kind, keys.tolist(), *rest],
        "tensors": _generators(device),
    }


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    """PyTorch's own."""
    tensors = {"random.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def set_random_state(state: dict, device: torch.device) -> None:
    """The reverse of `random_state`; a device that it does not know keeps its own generator."""
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(numbers), spare))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["tensors"]["random.torch"])
    if device.type == "cuda" and "random.cuda" in state["tensors"]:
        torch.cuda.set_rng_state(state["tensors"]["random.cuda"], device)
