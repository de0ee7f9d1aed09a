"""Steps whose numbers have gone wrong: skipped, counted, and named when they do not end."""

import math

import torch
from torch.nn import functional as F

from utils.batches import Batch
from utils.errors import RunError
from utils.memory import OutOfMemory, advice, out_of_memory_told

LIMIT = 10  # skipped iterations in a row that a run survives


class Guard:
    """Applies a step unless its loss or a gradient is NaN or infinite.

    Nothing waits for the device: a fused optimizer is told there whether to skip, and the count is
    read an iteration later, when the answer has long arrived.
    """

    def __init__(self, run):
        """`run` is a `utils.train.Run`."""
        self.run = run
        self._pending: tuple | None = None

    def step(self, batch: Batch, loss: torch.Tensor) -> torch.Tensor:
        """Step the optimizer or not; return what counts of the loss, `[]` float64 (0 for a skipped step)."""
        run = self.run
        # A sum is finite only if every term is, and takes no memory of its own.
        sums = [parameter.grad.sum() for parameter in run.model.parameters() if parameter.grad is not None]
        wrong = ~torch.isfinite(torch.stack([loss, *sums])).all()
        if run.accelerator.num_processes > 1:
            wrong = run.accelerator.reduce(wrong.float(), "sum") > 0
        # The first step makes the optimizer's moments, which are larger than the trained values.
        with out_of_memory_told("the optimizer's step", lambda: advice(run)):
            if getattr(run.optimizer, "_step_supports_amp_scaling", False):  # PyTorch's fused optimizers
                run.optimizer.found_inf = wrong.float()
                run.optimizer.step()
            elif not wrong:
                run.optimizer.step()
        self.settle()
        self._pending = (_Later(wrong), _Later(loss), batch, run.progress.epoch, run.progress.iteration + 1)
        return torch.where(wrong, 0.0, loss.double())

    def settle(self) -> None:
        """Count the last step.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        if self._pending is None:
            return
        (wrong, loss, batch, epoch, iteration), self._pending = self._pending, None
        progress = self.run.progress
        if not wrong.read():
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        value = loss.read()
        what = f"the loss is {value}" if not math.isfinite(value) else "a gradient is NaN or infinite"
        self.run.log(
            f"WARNING: epoch {epoch}, iteration {iteration}: {what}; the step is skipped "
            f"({progress.skipped} in this epoch, {progress.skipped_in_a_row} in a row)"
        )
        if progress.skipped_in_a_row > LIMIT:
            raise RunError(
                f"{progress.skipped_in_a_row} steps in a row had no finite loss or gradient; the last is of "
                f"{self._name(batch)}; try a lower --learning_rate; {self.run.saver.kept()}"
            )

    @torch.no_grad()
    def _name(self, batch: Batch) -> str:
        """Dates of the batch's windows, and the columns that go wrong in them."""
        run, data = self.run, self.run.loaders["train"].dataset
        dates = [data.window_dates(int(index))[0] for index in batch.index]
        width = len(batch.x) // len(dates)
        columns = run.record["columns"]
        if data.target_index is not None:
            columns = [columns[data.target_index]]
        try:
            batch, prototypes = batch.to(run.accelerator.device), run.model.text_prototypes()
            with run.accelerator.autocast():
                parts = batch.parts(run.max_sequences)
                forecast = torch.cat([run.model.forecast(p.x, p.prompts, prototypes).float() for p in parts])  # (M, H)
        except OutOfMemory:  # the numbers end the run; that they cannot be looked at more closely must not hide it
            return f"the windows that start at {_some([str(date) for date in dates])}"
        error = F.mse_loss(forecast, batch.y, reduction="none").mean(1).view(-1, width).cpu()  # (B, N)
        bad = ~torch.isfinite(error)
        if not bad.any():
            bad = torch.ones_like(bad)
        windows = [str(date) for date, row in zip(dates, bad, strict=True) if row.any()]
        named = [name for name, column in zip(columns, bad.T, strict=True) if column.any()]
        return f"the windows that start at {_some(windows)}, columns {_some(named)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


class _Later:
    """A number on its way from the device."""

    def __init__(self, value: torch.Tensor):
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> float:
        """The number; waits for the device if it has not come that far."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()
