"""One evaluation for validation, test and inference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from data_provider.batches import Batch
from models.base import ForecastModel
from utils.saving.interrupt import Interrupted
from utils.training.losses import Loss, loss_of, mean_squared
from utils.training.memory import advice, explain_out_of_memory, give_back_idle, halve_on_out_of_memory
from utils.training.precision import Autocast
from utils.training.session import Job

Shared = tuple[torch.Tensor, ...]  # what the sequences of a pass share, see models.base
Forecast = Callable[[Batch, Shared], torch.Tensor]  # -> [M, H] float32


@dataclass(frozen=True)
class Scores:
    """Errors over all elements of a split, on the standardised scale."""

    mse: float
    mae: float
    loss: float  # what training minimises and validation compares; the mse, unless `--loss` names another


@torch.inference_mode()
def evaluate(
    model: ForecastModel,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    forecast: Forecast,
    consume: Callable[[Batch, torch.Tensor], None] | None = None,
    loss: Loss = mean_squared,
) -> Scores:
    """Forecast every window; sums over elements divided by their count, whatever the batch size.

    Args:
        batches: each process passes its own share of the windows.
        forecast: forecasts sequences, in parts where need be.
        consume: called with each batch and its forecasts `[M, H]`, both on the device.
        loss: of sequences with masks, of which each counts alike.
    """
    give_back_idle(accelerator.device)
    training = model.training
    model.eval()
    shared = model.prototype_kv()  # once for the whole evaluation
    totals = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        batch = batch.to(accelerator.device)
        forecasts = forecast(batch, shared)  # (M, H)
        error, mask = (forecasts - batch.y).double(), batch.y_mask
        count = torch.full_like(totals[2], error.numel())
        if mask is not None:
            error, count = error * mask, mask.sum().double()
            totals[3] += loss(forecasts, batch).double() * len(batch)
            totals[4] += len(batch)
        totals[:3] += torch.stack([error.square().sum(), error.abs().sum(), count])
        if consume is not None:
            consume(batch, forecasts)
    squared, absolute, elements, lost, sequences_lost = accelerator.reduce(totals).tolist()
    model.train(training)
    mse = squared / elements
    return Scores(mse, absolute / elements, lost / sequences_lost if sequences_lost else mse)


def forecast_in_parts(model: ForecastModel, precision: Autocast, batch: Batch, shared: Shared, size: int) -> torch.Tensor:
    """Forecasts `[M, H]` float32 of a batch, at most `size` of them at once (0: all)."""
    with precision.autocast():
        return torch.cat([model(part, shared).float() for part in batch.split(size)])


def forecast_within_memory(job: Job, batch: Batch, shared: Shared, most: int = 0) -> torch.Tensor:
    """As `forecast_in_parts`, with as many at once as `job.evaluation_limit` says, and at most `most` (0: no limit)."""

    def work(size: int) -> torch.Tensor:
        size = min(size or most, most) if most else size
        return forecast_in_parts(job.model, job.precision, batch, shared, size)

    return halve_on_out_of_memory(job, job.evaluation_limit, min(len(batch), most or len(batch)), work)


def score(job: Job, split: str, consume: Callable[[Batch, torch.Tensor], None] | None = None) -> Scores:
    """Score "val" or "test".

    Raises:
        Interrupted: a signal has come between two batches.
        RunError: not even one sequence fits into the GPU's memory.
    """
    loader = job.loaders[split]
    batches = job.interrupts.between(loader) if job.accelerator.num_processes == 1 else _together(job, loader)
    # Beside the parts, the prototypes take memory.
    with explain_out_of_memory("an evaluation", lambda: advice(job.args, job.model)):
        return evaluate(
            job.model,
            batches,
            job.accelerator,
            lambda part, shared: forecast_within_memory(job, part, shared),
            consume,
            loss_of(job.args),
        )


def _together(job: Job, loader: "DataLoader[Batch]") -> Iterator[Batch]:
    """This process's batches, with a look before each whether a signal has come to any of the group: all leave at once.

    Raises:
        Interrupted: one has.
    """
    batches = iter(loader)
    for _ in range(loader.batch_sampler.most_batches):  # type: ignore[union-attr]
        received = job.accelerator.gather(torch.tensor([job.interrupts.received], device=job.device)).max()
        if received:
            raise Interrupted(int(received))
        batch = next(batches, None)
        if batch is not None:
            yield batch
