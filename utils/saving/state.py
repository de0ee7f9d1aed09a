"""The whole state of a run between two iterations, in files that outlive what ends it.

`state.7.pt` is what `torch.save` writes of one dict: what the run is (`identity`), how far it is (`progress`), the trained
tensors, their average (`--ema`), the optimizer's, and the random generators of every process. The newest two are kept;
before a third is written the older one goes. The order of the batches needs no state (see `EpochBatches`), nor does the
learning rate (utils/training/optimizer.py).
"""

import copy
import json
import os
import shlex
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from data_provider.data_loader import SplitSeries
from data_provider.description import dataset_description
from layers.errors import RunError, input_error
from utils.flags import DEFAULTS, resumed
from utils.results.bands import Intervals
from utils.saving.checkpoint import DAMAGED, save_checkpoint, write_torch
from utils.saving.files import FULL, TENSORS

SECONDS = 600  # between two saves, unless --save_steps says otherwise
FIRST_SCALE = 2.0**16  # of the loss, see utils/training/precision.py


@dataclass
class Progress:
    """How far a run is; together with tensors and random generators, all that a state holds."""

    epoch: int = 1  # the one that runs
    iteration: int = 0  # iterations done in it
    steps: int = 0  # of the optimizer, in all epochs
    loss_sum: float = 0.0  # of these iterations
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
        self.epoch, self.iteration, self.skipped, self.loss_sum = self.epoch + 1, 0, 0, 0.0

    def finished(self, train_epochs: int, patience: int) -> bool:
        return self.epoch > train_epochs or self.epochs_without_improvement >= patience


def identity(
    args: Namespace, series: SplitSeries, backbone: dict[str, Any], pretrain: SplitSeries | None = None
) -> dict[str, Any]:
    """What must be the same for a run to resume: JSON values, compared one by one."""
    data = {"data": series} | ({"pretraining data": pretrain} if pretrain else {})
    return {
        **{f"--{name}": value for name, value in resumed(args).items()},
        **{f"the {name}'s {part}": value for name, of in data.items() for part, value in of.identity().items()},
        "the prompt's description": dataset_description(args),
        **{f"the language model's {name}": value for name, value in backbone.items()},
    }


def compare(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Set a state against the run that shall resume from it.

    Raises:
        InputError: it was saved by another run; what differs is named.
    """
    now, was = json.loads(json.dumps(now)), saved["identity"]
    # A flag that came to be after the state was saved had its default then.
    defaults = {f"--{name}": value for name, value in DEFAULTS.items()}
    different = [name for name in now | was if now.get(name) != was.get(name, defaults.get(name))]
    if different:
        sizes = {name: 8 if name.endswith(("(SHA-256)", "fingerprint")) else 60 for name in different}
        found, expected = ("; ".join(f"{name} {str(of.get(name))[:n]}" for name, n in sizes.items()) for of in (now, was))
        raise input_error(
            "--resume", found, f"{expected}, with which {saved['path']} was saved",
            "give the same ones, or start anew with --resume False (what is there is then moved aside)",
        )  # fmt: skip


def state_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("state.[0-9]*.pt"), key=lambda path: int(path.name.split(".")[1]), reverse=True)


def find_state(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest good state, and a line for every newer one that is damaged."""
    lines: list[str] = []
    for path in state_files(folder):
        try:
            with zipfile.ZipFile(path) as packed:  # torch.load sets no checksum against what it reads
                if wrong := packed.testzip():
                    raise ValueError(f"its part {wrong} has another checksum")
            return read_state(path), lines
        except (zipfile.BadZipFile, *DAMAGED) as error:
            lines.append(f"WARNING: {path.name} is damaged: {error}")
    return None, lines


def read_state(path: Path) -> dict[str, Any]:
    """What `Saver.save` has put into a state file, and its `path`; the tensors are windows into the file, on the CPU."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True) | {"path": path}


def part_random(rank: int, seed: int) -> None:
    """Let a process whose generators are as the first one's draw other numbers: each drops out of its own windows."""
    if rank > 0:
        drawn = np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(drawn >> np.uint64(1)))  # of the GPU, too


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that a training step draws from: PyTorch's, on the CPU and on this device."""
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state()} | on_gpu


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """The reverse of `random_state`; a device that it does not know keeps its own generator."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass
class Saver:
    """Saves a run's state when it is due, and its checkpoint.

    Attributes:
        identity: what the state says of the run, see `identity`.
        record: what the checkpoint says of the run.
        average: of the trained tensors, with --ema.
        last: the newest good state file.
    """

    folder: Path
    args: Namespace
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    device: torch.device
    identity: dict[str, Any]
    record: dict[str, Any]
    average: list[torch.Tensor] = field(default_factory=list)
    last: Path | None = None
    saved_step: tuple[int, int] | None = None  # epoch and iteration of that file
    saved_at: float = field(default_factory=time.monotonic)

    def resume(self, saved: dict[str, Any], log: Callable[[str], None]) -> Progress:
        """Bring model, optimizer and random generators to a saved state, and say where the run stands."""
        device, rank = self.device, self.accelerator.process_index
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(saved["model"][name])
            for tensor, held in zip(self.average, saved.get("average", []), strict=True):
                tensor.copy_(held)
        groups = self.optimizer.state_dict()["param_groups"]
        moments = copy.deepcopy(saved["optimizer"])  # windows would keep a removed file's space taken
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        has_own = rank < len(saved["random"])  # else there were fewer processes than now
        set_random_state(saved["random"][rank if has_own else 0], device)
        progress = Progress(**saved["progress"])
        if not has_own:
            part_random(rank, self.args.seed + progress.epoch)
        self.last, self.saved_step = saved["path"], (progress.epoch, progress.iteration)
        if progress.finished(self.args.train_epochs, self.args.patience):
            log(f"This run is finished ({len(progress.history)} epochs); only the test is left")
            return progress
        if not (self.folder / TENSORS).is_file():  # somebody has removed it: the next epoch's is kept
            progress.best_vali_loss = float("inf")
        log(f"Resuming from {self.last.name}: epoch {progress.epoch}, iteration {progress.iteration}")
        return progress

    def due(self, progress: Progress, ahead: int = 0) -> bool:
        """Whether it is time for a state, `ahead` iterations from now; the processes of a group must agree on the answer."""
        every = self.args.save_steps
        if every is None:
            return time.monotonic() - self.saved_at >= SECONDS
        return every > 0 and (progress.iteration + ahead) % every == 0

    def save(self, progress: Progress) -> None:
        """Save the state as the newest, unless it is saved already; beside it only the last good one is kept. All processes
        of a group take part, and the first one writes.

        Raises:
            StorageError: the file system refused; the last state is still there.
        """
        step = progress.epoch, progress.iteration
        if step == self.saved_step:
            return
        with self.explained():
            packed = {
                # Also the same bytes each time: pickle writes whether two equal strings are one object.
                **json.loads(json.dumps({"identity": self.identity, "progress": asdict(progress)})),
                "random": gather_object([random_state(self.device)]),
                "model": dict(self.model.state_dict()),
                "average": self.average,
                "optimizer": self.optimizer.state_dict()["state"],
            }
            if self.accelerator.is_main_process:
                for other in state_files(self.folder):
                    if other != self.last:
                        with suppress(OSError):  # a state too many does no harm
                            other.unlink()
                path = self.folder / f"state.{int(self.last.name.split('.')[1]) + 1 if self.last else 1}.pt"
                write_torch(path, packed)
                self.last = path
        # Nobody leaves before the file is in its place: a launcher ends the others soon after one has left.
        (self.last,) = broadcast_object_list([self.last])
        self.saved_step, self.saved_at = step, time.monotonic()

    def save_checkpoint(self, epoch: dict[str, Any], intervals: Intervals | None = None) -> None:
        """Write the checkpoint of the epoch that has just ended, whose losses go into the record; see `save`.

        Raises:
            StorageError: the file system refused; the checkpoint before is still there.
        """
        if self.accelerator.is_main_process:
            with self.explained():
                save_checkpoint(self.folder, self.model.state_dict(), self.record | epoch, intervals)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to what ends the run what it can resume from."""
        try:
            yield
        except RunError as error:
            is_full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
            error.args = (f"{error}; {'free some room there, then ' if is_full else ''}{self.kept()}",)
            raise

    # What a run that ends now can resume from.
    def kept(self) -> str:
        if self.last is None:
            return "start anew: no state was saved before"
        return f"the same command with --resume resumes from {self.last.name}, which is kept"


def resume_command(args: Namespace) -> str:
    """The command line of this process, for any folder; --resume is added where a training run lacks it. Of a group of
    processes it is that of their launcher on this machine."""
    words = list(sys.orig_argv)
    launcher = psutil.Process().parent() if "WORLD_SIZE" in os.environ else None
    if launcher is not None and sys.argv[0] in (started := launcher.cmdline()):
        words = started
    words += ["--resume"] if args.is_training and not args.resume else []
    # The scripts run in the repository's folder, which need not be the user's: relative paths mean this one.
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
