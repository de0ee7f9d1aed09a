"""One evaluation for validation, test and inference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from models.TimeLLM import Model
from utils.batches import Batch


@dataclass(frozen=True)
class Scores:
    """Errors over all elements of a split, on the standardised scale."""

    mse: float
    mae: float


@torch.inference_mode()
def evaluate(
    model: Model,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    max_sequences: int = 0,
    consume: Callable[[Batch, torch.Tensor], None] | None = None,
) -> Scores:
    """Forecast every window; sums over elements divided by their count, whatever the batch size.

    Args:
        batches: each process passes its own share of the windows.
        max_sequences: sequences that are run at once; 0 is no limit.
        consume: called with each batch and its forecasts `[M, H]`, both on the device.
    """
    training = model.training
    model.eval()
    prototypes = model.text_prototypes()  # once for the whole evaluation
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            forecast = torch.cat(
                [model.forecast(p.x, p.prompts, prototypes).float() for p in batch.parts(max_sequences)]
            )  # (M, H)
        error = (forecast - batch.y).double()
        totals += torch.stack([error.square().sum(), error.abs().sum(), torch.full_like(totals[2], error.numel())])
        if consume is not None:
            consume(batch, forecast)
    squared, absolute, count = accelerator.reduce(totals).tolist()
    model.train(training)
    return Scores(squared / count, absolute / count)
