"""The optimizer's step: which optimizer, and the guard that skips a step whose numbers have gone wrong."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data_provider.batches import Batch
from models.base import ForecastModel
from utils.results.log import RunLog
from utils.saving.asks import Asks
from utils.saving.state import Progress
from utils.training.precision import LossScale

MAX_SKIPS = 10  # skipped iterations in a row that a run survives


class TooManySkips(Exception):
    """Too many steps in a row had no finite loss or gradient.

    Attributes:
        batch: that of the last of them.
        count: how many there were.
    """

    def __init__(self, batch: Batch, count: int):
        super().__init__(f"{count} steps in a row had no finite loss or gradient")
        self.batch, self.count = batch, count


class Guard:
    """Keeps a step from being taken whose loss or a gradient is NaN or infinite, and counts such steps.

    Nothing waits for the device: a fused optimizer is told there whether to skip, and the count is
    read an iteration later, when the answer has long arrived.
    """

    def __init__(
        self,
        model: ForecastModel,
        optimizer: torch.optim.Optimizer,
        asks: Asks,
        log: RunLog,
        scale: LossScale | None = None,
    ):
        """Args:
        asks: what the processes of a group ask of each other, which travels with the step's own numbers.
        scale: what the loss was multiplied with, so that the gradients are as much too large; None: 1.
        """
        self.model, self.optimizer, self.asks, self.log, self.scale = model, optimizer, asks, log, scale
        self._wrong = torch.zeros((), dtype=torch.bool)  # what is known of the step in hand, on the device
        self._pending: _Step | None = None
        self._asked: _Later | None = None

    def whole(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of the whole batch, of this process's part of it. Gradients are there already, those of all added up."""
        # A sum is finite only if every term is, and takes no memory of its own.
        sums = [gradient.sum() for gradient in self.model.gradients()]
        self._wrong = ~torch.isfinite(torch.stack([loss, *sums])).all()
        if self.asks.alone:
            return loss
        if self._asked is not None:
            self.asks.hear(self._asked.read())
        own = torch.tensor(self.asks.say())
        if loss.device.type == "cuda":
            own = own.pin_memory().to(loss.device, non_blocking=True)
        told = torch.cat([torch.stack([loss.float(), self._wrong.float()]), own])
        dist.all_reduce(told)
        self._wrong, self._asked = told[1] > 0, _Later(told[2:])
        return told[0]

    def allows_step(self) -> bool:
        """Whether the optimizer may step. A fused one always may: it is told on the device to skip a wrong step itself."""
        wrong = self._wrong
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):  # PyTorch's fused optimizers
            self.optimizer.found_inf = wrong.float()  # type: ignore[attr-defined]
            if self.scale is not None:
                self.optimizer.grad_scale = self.scale.value  # type: ignore[attr-defined]
            return True
        if wrong:
            return False
        if self.scale is not None:
            for gradient in self.model.gradients():
                gradient.div_(self.scale.value)
        return True

    def count(self, batch: Batch, loss: torch.Tensor, progress: Progress) -> torch.Tensor:
        """Take note of a step; return what counts of its loss, `[]` float64 (0 for a skipped one).

        Raises:
            TooManySkips: as `settle`, about the step before.
        """
        self.settle(progress)
        wrong, scale = self._wrong, None if self.scale is None else _Later(self.scale.value)
        self._pending = _Step(_Later(wrong), _Later(loss), scale, batch, progress.epoch, progress.iteration + 1)
        if self.scale is not None:
            self.scale.update(wrong)
        return torch.where(wrong, 0.0, loss.double())

    def settle(self, progress: Progress) -> None:
        """Count the last step.

        Raises:
            TooManySkips: more steps in a row were skipped than a run survives.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        if not step.wrong.read():
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        value, scale = step.loss.read(), step.scale.read() if step.scale else 1
        what = f"the loss is {value}" if not math.isfinite(value) else "a gradient is NaN or infinite"
        scaled = f"; the loss was scaled by {scale:.0f}" if step.scale else ""
        self.log(
            f"WARNING: epoch {step.epoch}, iteration {step.iteration}: {what}; the step is skipped "
            f"({progress.skipped} in this epoch, {progress.skipped_in_a_row} in a row){scaled}"
        )
        # While the scale comes down, the next step may be a good one.
        if progress.skipped_in_a_row > MAX_SKIPS and scale <= 1:
            raise TooManySkips(step.batch, progress.skipped_in_a_row)


class _Step(NamedTuple):
    """A step that is done, of which nobody knows yet how it went."""

    wrong: "_Later"
    loss: "_Later"
    scale: "_Later | None"  # of the loss, in this step
    batch: Batch
    epoch: int
    iteration: int


class _Later:
    """Numbers on their way from the device."""

    def __init__(self, value: torch.Tensor):
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Any:
        """The numbers; waits for the device if it has not come that far."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()
