"""When a run's state is saved, and how a run that has to end ends."""

import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from utils.errors import RunError, StorageError
from utils.intervals import Intervals
from utils.saving.checkpoint import save_checkpoint
from utils.saving.files import FULL, free_bytes, size_text
from utils.saving.interrupt import Interrupted, Interrupts
from utils.saving.state import Progress, pack, save_state, state_bytes

SECONDS = 600  # between two saves, unless --save_steps says otherwise


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
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    interrupts: Interrupts
    identity: dict[str, Any]
    record: dict[str, Any]
    last: Path | None = None
    _saved_at: float = field(default_factory=time.monotonic)
    _saved_step: tuple[int, int] | None = None

    def mark_saved(self, progress: Progress) -> None:
        """Where the run stands now is what the last state holds."""
        self._saved_step = _step(progress)

    def check_signal(self) -> None:
        """Raises Interrupted if a signal has come to one of the processes."""
        received = self._agree(self.interrupts.received)
        if received:
            raise Interrupted(received)

    def due(self, progress: Progress) -> bool:
        """Whether it is time for a state."""
        every = self.args.save_steps
        if every is None:
            return self._agree(int(time.monotonic() - self._saved_at >= SECONDS)) > 0
        return every > 0 and progress.iteration % every == 0

    def _agree(self, number: int) -> int:
        """The largest of the processes' numbers: they must save and stop at the same iteration."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def save(self, progress: Progress) -> None:
        """Save the state, unless it is saved already.

        Raises:
            StorageError: the file system refused; the last state is still there.
            RunError: a trained value is not finite; the last state is still there.
        """
        if self._saved_step == _step(progress):
            return
        device = self.accelerator.device
        progress.loss_sum = self.accelerator.reduce(progress.loss_sum.to(device), "mean")
        if self.accelerator.is_main_process:
            with self.explained():
                packed = pack(self.model, self.optimizer, progress, self.identity, device)
                self.last = save_state(self.folder, packed, self.last)
        self._saved_at = time.monotonic()
        self.mark_saved(progress)

    def save_checkpoint(self, epoch: dict[str, Any], intervals: Intervals | None = None) -> None:
        """Write the checkpoint of the epoch that has just ended, whose losses go into the record.

        Raises:
            StorageError: the file system refused; the checkpoint before is still there.
        """
        if self.accelerator.is_main_process:
            with self.explained():
                save_checkpoint(self.folder, self.model, self.record | epoch, intervals)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to what ends the run what it can resume from."""
        try:
            yield
        except StorageError as error:
            room = ""
            if error.errno in FULL:
                values = sum(parameter.numel() for parameter in self.model.parameters())
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
    """The command line of this process, for any folder; --resume is added where a training run lacks it."""
    words = [*sys.orig_argv, *(["--resume"] if args.is_training and not args.resume else [])]
    # The scripts run in the repository's folder, which need not be the user's: relative paths mean this one.
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
