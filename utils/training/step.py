"""The optimizer's step: which optimizer, and the guard that skips a step whose numbers have gone wrong."""

import math

import torch
from accelerate import Accelerator

from data_provider.batches import Batch
from layers.backbone import require_bitsandbytes
from models.TimeLLM import Model
from utils.results.log import RunLog
from utils.saving.state import Progress

LIMIT = 10  # skipped iterations in a row that a run survives


def build_optimizer(name: str, model: Model, rate: float) -> torch.optim.Optimizer:
    """Adam, AdamW, or bitsandbytes' AdamW with 8-bit states, over the trained tensors."""
    parameters = list(model.parameters())
    if name == "adamw8bit":
        require_bitsandbytes("optimizer adamw8bit")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=rate)
    # fused: one pass over the weights, and no temporary copies of them
    fused = parameters[0].device.type in ("cpu", "cuda")
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, fused=fused)
    return torch.optim.Adam(parameters, lr=rate, fused=fused)


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
    """Applies a step unless its loss or a gradient is NaN or infinite.

    Nothing waits for the device: a fused optimizer is told there whether to skip, and the count is
    read an iteration later, when the answer has long arrived.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, accelerator: Accelerator, log: RunLog):
        self.model, self.optimizer, self.accelerator, self.log = model, optimizer, accelerator, log
        self._pending: tuple[_Later, _Later, Batch, int, int] | None = None

    def step(self, batch: Batch, loss: torch.Tensor, progress: Progress) -> torch.Tensor:
        """Step the optimizer or not; return what counts of the loss, `[]` float64 (0 for a skipped step).

        Raises:
            TooManySkips: as `settle`, about the step before.
        """
        # A sum is finite only if every term is, and takes no memory of its own.
        sums = [parameter.grad.sum() for parameter in self.model.parameters() if parameter.grad is not None]
        wrong = ~torch.isfinite(torch.stack([loss, *sums])).all()
        if self.accelerator.num_processes > 1:
            wrong = self.accelerator.reduce(wrong.float(), "sum") > 0
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):  # PyTorch's fused optimizers
            self.optimizer.found_inf = wrong.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not wrong:
            self.optimizer.step()
        self.settle(progress)
        self._pending = (_Later(wrong), _Later(loss), batch, progress.epoch, progress.iteration + 1)
        return torch.where(wrong, 0.0, loss.double())

    def settle(self, progress: Progress) -> None:
        """Count the last step.

        Raises:
            TooManySkips: more steps in a row were skipped than a run survives.
        """
        if self._pending is None:
            return
        (wrong, loss, batch, epoch, iteration), self._pending = self._pending, None
        if not wrong.read():
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        value = loss.read()
        what = f"the loss is {value}" if not math.isfinite(value) else "a gradient is NaN or infinite"
        self.log(
            f"WARNING: epoch {epoch}, iteration {iteration}: {what}; the step is skipped "
            f"({progress.skipped} in this epoch, {progress.skipped_in_a_row} in a row)"
        )
        if progress.skipped_in_a_row > LIMIT:
            raise TooManySkips(batch, progress.skipped_in_a_row)


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
