"""When a run's state is saved, and how a run that has to end ends."""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from layers.ranks import from_all, processes
from models.base import ForecastModel
from utils.errors import RunError, StorageError
from utils.intervals import Intervals
from utils.saving.asks import Asks
from utils.saving.checkpoint import save_checkpoint, value_count
from utils.saving.files import FULL, free_bytes, size_text
from utils.saving.shares import whole_shapes, whole_state
from utils.saving.state import Progress, pack, save_state, state_bytes


@dataclass
class Saver:
    """Saves a run's state when it is due, and when a signal asks the run to end.

    Attributes:
        identity: what the state says of the run, see `utils.saving.state.identity`.
        record: what the checkpoint says of the run.
        last: the newest good state file.
    """

    folder: Path
    args: Namespace
    model: ForecastModel
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    asks: Asks
    identity: dict[str, Any]
    record: dict[str, Any]
    last: Path | None = None
    _saved_step: tuple[int, int] | None = None

    def mark_saved(self, progress: Progress) -> None:
        """Where the run stands now is what the last state holds."""
        self._saved_step = _step(progress)

    def due(self, progress: Progress) -> bool:
        """Whether it is time for a state."""
        every = self.args.save_steps
        if every is None:
            return self.asks.due()
        return every > 0 and progress.iteration % every == 0

    def save(self, progress: Progress) -> None:
        """Save the state, unless it is saved already. All processes of a group take part, and the first one writes.

        Raises:
            StorageError: the file system refused; the last state is still there.
            RunError: a trained value is not finite; the last state is still there.
        """
        if self._saved_step == _step(progress):
            return
        with self.explained():
            packed = pack(self.model, self.optimizer, progress, self.identity, self.accelerator.device)
            if self.accelerator.is_main_process:
                self.last = save_state(self.folder, packed, self.last)
        # Nobody leaves before the file is in its place: a launcher ends the others soon after one has left.
        self.last = from_all(self.last)[0]
        self.asks.saved()
        self.mark_saved(progress)

    def save_checkpoint(self, epoch: dict[str, Any], intervals: Intervals | None = None) -> None:
        """Write the checkpoint of the epoch that has just ended, whose losses go into the record; see `save`.

        Raises:
            StorageError: the file system refused; the checkpoint before is still there.
        """
        tensors = whole_state(self.model)
        if self.accelerator.is_main_process:
            with self.explained():
                save_checkpoint(self.folder, tensors, self.record | epoch, intervals)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to what ends the run what it can resume from."""
        try:
            yield
        except StorageError as error:
            room = ""
            if error.errno in FULL:
                values = value_count(whole_shapes(self.model))
                size = state_bytes(self.args.optimizer, values)
                room = f"free {size_text(max(size - free_bytes(self.folder), size // 10))} there, then "
            raise StorageError(f"{error}; {room}{self.kept()}", error.errno) from error
        except RunError as error:
            raise RunError(f"{error}; {self.kept()}") from error

    def kept(self) -> str:
        """What a run that ends now can resume from."""
        if self.last is None:
            return "start anew: no state was saved before"
        return f"the same command with --resume resumes from {self.last.name}, which is kept"


def _step(progress: Progress) -> tuple[int, int]:
    return progress.epoch, progress.iteration


def resume_command(args: Namespace) -> str:
    """The command line of this process, for any folder; --resume is added where a training run lacks it. Of a group of
    processes it is that of their launcher on this machine."""
    words = list(sys.orig_argv)
    launcher = psutil.Process().parent() if processes() > 1 else None
    if launcher is not None and sys.argv[0] in (started := launcher.cmdline()):
        words = started
    words += ["--resume"] if args.is_training and not args.resume else []
    # The scripts run in the repository's folder, which need not be the user's: relative paths mean this one.
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
