"""When a run's state is saved, and how a run that has to end ends."""

import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.checkpoint import save_checkpoint
from utils.errors import RunError, StorageError
from utils.files import FULL, free_bytes, size_text
from utils.interrupt import Interrupted, Interrupts
from utils.state import pack, save_state, state_bytes

SECONDS = 600  # between two saves, unless --save_steps says otherwise


class Saver:
    """Saves a run's state when it is due, and when a signal asks the run to end."""

    def __init__(self, run, identity: dict, interrupts: Interrupts, before: Path | None = None):
        """Args:
            run: a `utils.train.Run`.
            identity: what the state says of the run, see `utils.state.identity`.
            before: the state that the run goes on from.
        """
        self.run, self.identity, self.interrupts = run, identity, interrupts
        self.last = before  # the newest good state file
        self._saved_at = time.monotonic()
        self._saved_step: tuple[int, int] | None = None

    def mark_saved(self) -> None:
        """Where the run stands now is what the last state holds."""
        self._saved_step = self._step()

    def _step(self) -> tuple[int, int]:
        return self.run.progress.epoch, self.run.progress.iteration

    def after_iteration(self) -> None:
        """Save the state if it is due.

        Raises:
            Interrupted: a signal has come.
        """
        if self._signal():
            raise Interrupted(self._signal())
        if self._due():
            self.save()

    def _due(self) -> bool:
        every = self.run.args.save_steps
        if every is None:
            return self._agree(int(time.monotonic() - self._saved_at >= SECONDS)) > 0
        return every > 0 and self.run.progress.iteration % every == 0

    def _signal(self) -> int:
        return self._agree(self.interrupts.received)

    def _agree(self, number: int) -> int:
        """The largest of the processes' numbers: they must save and stop at the same iteration."""
        accelerator = self.run.accelerator
        if accelerator.num_processes == 1:
            return number
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())

    def save(self) -> None:
        """Save the state, unless it is saved already.

        Raises:
            StorageError: the file system refused; the last state is still there.
            RunError: a trained value is not finite; the last state is still there.
        """
        run = self.run
        run.guard.settle()
        if self._saved_step == self._step():
            return
        device = run.accelerator.device
        run.progress.max_sequences = run.max_sequences
        run.progress.loss_sum = run.accelerator.reduce(run.progress.loss_sum.to(device), "mean")
        if run.accelerator.is_main_process:
            with self._explained():
                packed = pack(run.model, run.optimizer, run.progress, self.identity, device)
                self.last = save_state(run.folder, packed, self.last)
        self._saved_at = time.monotonic()
        self.mark_saved()

    def interrupted(self, signal: Interrupted) -> None:
        """Save, and say how to go on."""
        self.save()
        run = self.run
        epoch, iteration = self._step()
        run.log(f"{signal}: the state of epoch {epoch}, iteration {iteration} is saved in {run.folder}")
        run.log(f"To go on: {resume_command(run.args)}")

    def save_checkpoint(self) -> None:
        """Write the checkpoint of the epoch that has just ended.

        Raises:
            StorageError: the file system refused; the checkpoint before is still there.
        """
        run = self.run
        if run.accelerator.is_main_process:
            with self._explained():
                save_checkpoint(run.folder, run.model, run.record | run.progress.history[-1])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add to what ends the run what it can go on from."""
        try:
            yield
        except StorageError as error:
            room = ""
            if error.errno in FULL:
                values = sum(parameter.numel() for parameter in self.run.model.parameters())
                need = state_bytes(self.run.args.optimizer, values)
                room = f"free {size_text(max(need - free_bytes(self.run.folder), need // 10))} there, then "
            raise StorageError(f"{error}; {room}{self.kept()}", error.errno) from error
        except RunError as error:
            raise RunError(f"{error}; {self.kept()}") from error

    def kept(self) -> str:
        """What a run that ends now can go on from."""
        if self.last is None:
            return "start anew: no state was saved before"
        return f"the same command with --resume goes on from {self.last.name}, which is kept"


def resume_command(args: Namespace) -> str:
    """The command line of this process, for any folder; --resume is added where a training run lacks it."""
    words = [*sys.orig_argv, *(["--resume"] if args.is_training and not args.resume else [])]
    # The scripts run in the repository's folder, which need not be the user's: relative paths mean this one.
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
