"""What a run says as it goes: printed lines and train.log, history.csv and steps.csv, TensorBoard events."""

import csv
import io
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from utils.saving.files import write_text, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTORY, STEPS = "history.csv", "steps.csv"
POINTS = 100  # step losses kept an epoch


class RunLog:
    """Prints lines and appends them to a log file, so that a lost terminal loses nothing.

    Where one of the two can no longer be written (a closed terminal, a full disk) the other goes on:
    a run does not end for the sake of a line.

    Attributes:
        lines: those that were not printed, of a log without a terminal.
    """

    def __init__(self, path: Path | None = None, terminal: bool = True):
        self.path, self.terminal = path, terminal
        self.lines: list[str] = []
        self._warned = False

    def __call__(self, *lines: str) -> None:
        for line in lines:
            if not self.terminal:
                self.lines.append(line)
            else:
                try:
                    tqdm.write(line, file=sys.stdout)  # above a progress bar, where there is one
                    sys.stdout.flush()
                except OSError:
                    # Nobody reads any more. Python itself would complain once more at its end.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.note(line)

    def note(self, line: str) -> None:
        """Append a line to the file alone."""
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._warned:
                self._warned = True
                self(f"WARNING: {self.path} cannot be written ({error.strerror})")


@dataclass
class Journal:
    """Writes history.csv, a row an epoch, and steps.csv, about POINTS losses an epoch; one process of a group has it.

    A step loss is the mean over the iterations since the one before it.
    """

    folder: Path
    steps_per_epoch: int
    events: "SummaryWriter | None" = None
    _since: list[float] = field(default_factory=list)  # losses since the last row of steps

    def start(self, epoch: int, iteration: int) -> None:
        """Drop step losses after (epoch, iteration): these steps will be done again."""
        rows = [row for row in read_rows(self.folder / STEPS)
                if (int(row["epoch"]), int(row["iteration"])) <= (epoch, iteration)]  # fmt: skip
        _write_rows(self.folder / STEPS, rows, ["epoch", "iteration", "loss", "learning_rate"])

    def step(self, epoch: int, iteration: int, loss: float, lr: float) -> None:
        """Record the loss of an iteration (counted from 1)."""
        self._since.append(loss)
        if iteration % max(1, self.steps_per_epoch // POINTS) == 0:
            path, loss, self._since = self.folder / STEPS, sum(self._since) / len(self._since), []
            with writing(path), path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow((epoch, iteration, loss, lr))
            if self.events is not None:
                at = (epoch - 1) * self.steps_per_epoch + iteration
                self.events.add_scalar("step/loss", loss, at)
                self.events.add_scalar("step/learning_rate", lr, at)

    def epoch(self, history: list[dict], costs: dict[str, float]) -> None:
        """Write history.csv anew from all epochs so far.

        Args:
            history: losses, a row an epoch, with its number under "epoch".
            costs: time and memory of the last one. Those of earlier epochs are in the file.
        """
        before = {int(row["epoch"]): row for row in read_rows(self.folder / HISTORY)}
        rows = [{name: before.get(row["epoch"], {}).get(name) for name in costs} | row for row in history]
        rows[-1] |= costs
        _write_rows(self.folder / HISTORY, rows, [*history[-1], *costs])
        if self.events is not None:
            for name in rows[-1].keys() - {"epoch"}:
                self.events.add_scalar(f"epoch/{name}", rows[-1][name], rows[-1]["epoch"])
            self.events.flush()


def tensorboard_writer(folder: Path, log: RunLog) -> "SummaryWriter | None":
    """A writer of events to `folder`/tensorboard; None, with a line, where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        log("--tensorboard: TensorBoard is not installed (pip install tensorboard); the run goes on without events")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file. A last row that a kill cut short is left out."""
    if not path.is_file():
        return []
    return [row for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))) if None not in row.values()]


def _write_rows(path: Path, rows: list[dict], columns: list[str]) -> None:
    write_text(path, pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n"))


class Progress(tqdm):
    """A progress bar on stderr; where that is no terminal, a line every so often with the time left.

    Args:
        log: takes the lines; one without a terminal (another process of a group, a program's) has neither line nor bar.
        every: seconds to the first line, and from one to the next.
        args, settings: of tqdm.
    """

    def __init__(self, *args: Any, log: RunLog | None = None, every: float = 60.0, **settings: Any):
        self.log, self.every, self.is_bar, self.told = log or RunLog(), every, sys.stderr.isatty(), time.monotonic()
        lines = {"file": io.StringIO(), "bar_format": "\t{desc}: {n_fmt} of {total_fmt}; left time: {remaining}{postfix}"}
        # One step may take minutes: each counts as soon as it is done, and the speed is that of all so far.
        super().__init__(
            *args,
            **settings
            | {"disable": not self.log.terminal, "leave": False, "miniters": 1, "smoothing": 0}
            | ({} if self.is_bar else lines),
        )
        if getattr(self, "ncols", None) == -1:  # a terminal without a size, as a container's may be, would show none
            self.ncols, self.nrows = 80, 20

    # Between two steps the time left stays what it was: by tqdm's speed, all steps over all the time so far, it would grow.
    @property
    def format_dict(self) -> Any:
        held = super().format_dict
        if held["elapsed"] and self.n == self.last_print_n:
            held["rate"] = (self.n - self.initial) / (self.last_print_t - self.start_t or 1)
        return held

    # What tqdm calls to show how far it is.
    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self.is_bar:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self.told >= self.every:
            self.told = time.monotonic()
            self.log(str(self))
