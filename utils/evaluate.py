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
    consume: Callable[[Batch, torch.Tensor], None] | None = None,
    within: Callable[[int, Callable[[int], torch.Tensor]], torch.Tensor] | None = None,
) -> Scores:
    """Forecast every window; sums over elements divided by their count, whatever the batch size.

    Args:
        batches: each process passes its own share of the windows.
        consume: called with each batch and its forecasts `[M, H]`, both on the device.
        within: calls a function of the number of sequences to run at once (0: all) with one that fits
            the memory, see `utils.memory.within_memory`.
    """
    training = model.training
    model.eval()
    prototypes = model.text_prototypes()  # once for the whole evaluation
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        batch = batch.to(accelerator.device)

        def run(sequences: int, batch: Batch = batch) -> torch.Tensor:
            with accelerator.autocast():
                parts = batch.parts(sequences)
                return torch.cat([model.forecast(p.x, p.prompts, prototypes).float() for p in parts])

        forecast = within(len(batch.x), run) if within else run(0)  # (M, H)
        error = (forecast - batch.y).double()
        totals += torch.stack([error.square().sum(), error.abs().sum(), torch.full_like(totals[2], error.numel())])
        if consume is not None:
            consume(batch, forecast)
    squared, absolute, count = accelerator.reduce(totals).tolist()
    model.train(training)
    return Scores(squared / count, absolute / count)
