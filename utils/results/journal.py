"""Journal of a run as it goes: a row an epoch, thinned step losses, and TensorBoard events."""

import csv
import io
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.results.log import RunLog
from utils.saving.files import write_text, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTORY, STEPS = "history.csv", "steps.csv"
POINTS = 100  # step losses kept an epoch
STEP_COLUMNS = ("epoch", "iteration", "loss", "learning_rate")


@dataclass
class Journal:
    """Writes history.csv and steps.csv in the run's folder; one process of a group has it.

    A step loss is the mean over the iterations since the one before it. It stays on the device until
    `flush`, so that recording does not make a GPU wait.
    """

    folder: Path
    steps_per_epoch: int
    events: "SummaryWriter | None" = None
    _sum: "torch.Tensor | float" = 0.0
    _count: int = 0
    _waiting: list[tuple] = field(default_factory=list)

    @property
    def every(self) -> int:
        """Iterations between two recorded losses."""
        return max(1, self.steps_per_epoch // POINTS)

    def start(self, epoch: int, iteration: int) -> None:
        """Forget rows of steps after (epoch, iteration): they are to be done again."""
        kept = [row for row in read_rows(self.folder / STEPS)
                if (int(row["epoch"]), int(row["iteration"])) <= (epoch, iteration)]  # fmt: skip
        write_rows(self.folder / STEPS, STEP_COLUMNS, kept)

    def step(self, epoch: int, iteration: int, loss: float, rate: float) -> None:
        """Take in the loss of an iteration (counted from 1)."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if iteration % self.every == 0:
            self._waiting.append((epoch, iteration, self._sum / self._count, rate))
            self._sum, self._count = 0.0, 0

    def flush(self) -> None:
        """Write the step losses that wait."""
        rows = [(epoch, iteration, float(loss), rate) for epoch, iteration, loss, rate in self._waiting]
        self._waiting.clear()
        path = self.folder / STEPS
        with writing(path), path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        if self.events is not None:
            for epoch, iteration, loss, rate in rows:
                at = (epoch - 1) * self.steps_per_epoch + iteration
                self.events.add_scalar("step/loss", loss, at)
                self.events.add_scalar("step/learning_rate", rate, at)

    def epoch(self, history: list[dict], costs: dict[str, float]) -> None:
        """Write history.csv anew from all epochs so far.

        Args:
            history: losses, a row an epoch, with its number under "epoch".
            costs: time and memory of the last one. Those of earlier epochs are in the file.
        """
        self.flush()
        path = self.folder / HISTORY
        before = {int(row["epoch"]): row for row in read_rows(path)}
        rows = [{name: before.get(row["epoch"], {}).get(name) for name in costs} | row for row in history]
        rows[-1] |= costs
        write_rows(path, [*history[-1], *costs], rows)
        if self.events is not None:
            for name, value in rows[-1].items():
                if name != "epoch":
                    self.events.add_scalar(f"epoch/{name}", value, rows[-1]["epoch"])
            self.events.flush()

    def close(self) -> None:
        """Close the events' file."""
        if self.events is not None:
            self.events.close()


def tensorboard_writer(folder: Path, log: RunLog) -> "SummaryWriter | None":
    """A writer of events to `folder`/tensorboard; None, with a line, where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        log("--tensorboard: TensorBoard is not installed (pip install tensorboard); the run goes on without events")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file. A last row cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [row for row in csv.DictReader(io.StringIO(text)) if None not in row.values()]


def write_rows(path: Path, columns: list[str] | tuple[str, ...], rows: list[dict]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
