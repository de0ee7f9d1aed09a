"""One evaluation for validation, test and inference."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from data_provider.batches import Batch
from models.base import ForecastModel
from utils.results.bands import KEPT, LARGEST, POOL, Intervals, has_errors, intervals_of, make_array, write_errors
from utils.results.log import Progress
from utils.saving.files import PARTIAL, writing
from utils.training.context import Context
from utils.training.losses import Loss, loss_of, mean_squared
from utils.training.memory import advice, explain_out_of_memory, halve_on_out_of_memory
from utils.training.precision import Precision

PrototypeKV = tuple[torch.Tensor, ...]  # keys and values that all sequences of a pass share, see models.base
Forecast = Callable[[Batch, PrototypeKV], torch.Tensor]  # -> [M, H] float32


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
    device: torch.device | None = None,
) -> Scores:
    """Forecast every window, in eval mode; sums over elements divided by their count, whatever the batch size.

    Args:
        batches: each process passes its own share of the windows.
        forecast: forecasts a batch, in parts where need be.
        consume: called with each batch and its forecasts `[M, H]`, both on the device.
        loss: of sequences, each of which counts alike.
        device: the model's; None: the accelerator's.
    """
    device = device or accelerator.device
    if device.type == "cuda":  # tensors of other sizes would lie beside the idle blocks of the training
        torch.cuda.empty_cache()
    model.eval()
    prototype_kv = model.prototype_kv()  # once for the whole evaluation
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        forecasts = forecast(batch, prototype_kv)  # (M, H)
        error, mask = (forecasts - batch.y).double(), batch.y_mask
        count = torch.full_like(totals[2], error.numel())
        if mask is not None:
            error, count = error * mask, mask.sum().double()
        if mask is not None or loss is not mean_squared:
            totals[3] += loss(forecasts, batch).double() * len(batch)
            totals[4] += len(batch)
        totals[:3] += torch.stack([error.square().sum(), error.abs().sum(), count])
        if consume is not None:
            consume(batch, forecasts)
    squared, absolute, elements, lost, sequences = accelerator.reduce(totals).tolist()
    mse = squared / elements
    return Scores(mse, absolute / elements, lost / sequences if sequences else mse)


def forecast_in_parts(
    model: ForecastModel, precision: Precision | Accelerator, batch: Batch, prototype_kv: PrototypeKV, size: int
) -> torch.Tensor:
    """Forecasts `[M, H]` float32 of a batch, at most `size` of its sequences at once (0: all)."""
    with precision.autocast():
        return torch.cat([model(part, prototype_kv).float() for part in batch.split(size)])


def forecast_within_memory(
    context: Context, batch: Batch, prototype_kv: PrototypeKV, most: int = 0, bounded: bool = True
) -> torch.Tensor:
    """As `forecast_in_parts`, with as many at once as `context.evaluation_limit` says, and at most `most` (0: no limit),
    not beyond the series' bounds."""

    def work(size: int) -> torch.Tensor:
        size = min(size or most, most) if most else size
        return forecast_in_parts(context.model, context.precision, batch, prototype_kv, size)

    forecast = halve_on_out_of_memory(context, context.evaluation_limit, min(len(batch), most or len(batch)), work)
    if context.series.standard_bounds is None or not bounded:
        return forecast
    low, high = torch.from_numpy(context.series.standard_bounds).to(forecast)[:, batch.channel, None]
    return forecast.clamp(low, high)


def score(
    context: Context, split: str, consume: Callable[[Batch, torch.Tensor], None] | None = None, bounded: bool = True
) -> Scores:
    """Score "train", "val" or "test"; `bounded`: within the series' bounds, but for "train", which may be another series.

    Raises:
        Interrupted: a signal has come between two batches (of a group of processes the next training step tells all).
        RunError: not even one sequence fits into the GPU's memory.
    """
    loader = context.loaders[split]

    def forecast(batch: Batch, prototype_kv: PrototypeKV) -> torch.Tensor:
        if context.accelerator.num_processes == 1:
            context.interrupts.check()
        return forecast_within_memory(context, batch, prototype_kv, bounded=bounded and split != "train")

    bar = Progress(loader, desc=f"{split} batches", log=context.log)
    with bar, explain_out_of_memory("an evaluation", lambda: advice(context.args, context.model)):
        return evaluate(context.model, bar, context.accelerator, forecast, consume, loss_of(context.args), context.device)


def score_and_calibrate(
    context: Context, levels: tuple[float, ...], when: Callable[[Scores], bool] = lambda scores: True
) -> Scores:
    """Score the validation split. Where `when` says so of the scores, the run gets the prediction intervals of these levels
    that its errors come to, or none where they are no finite numbers.

    The errors lie on the disk meanwhile, where all processes of a group write theirs. Those that calibrate stay in the run's
    folder, as KEPT, with room for those of the test.

    Raises:
        Interrupted, RunError: see `score`.
        StorageError: the file system refused.
    """
    series, path, accelerator = context.windows, context.folder / f".{KEPT}{PARTIAL}", context.accelerator
    windows = len(series.windows("val"))
    try:
        if accelerator.is_main_process:
            shape = windows + len(series.windows("test")), len(series.forecast_columns), series.pred_len
            make_array(path, shape, context.folder / KEPT)
        accelerator.wait_for_everyone()
        scores = score(context, "val", partial(write_errors, path))
        if when(scores):
            accelerator.wait_for_everyone()  # all have written their windows
            found = intervals_of([path], levels, slice(windows))
            finite = bool((np.abs(found.offsets[~np.isnan(found.offsets)]) < LARGEST).all())
            context.intervals = found if finite else None
            if not finite:
                context.log("No prediction intervals: errors of the validation windows are no finite numbers")
            accelerator.wait_for_everyone()
            if finite and accelerator.is_main_process:
                with writing(path):
                    path.replace(context.folder / KEPT)
            accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return scores


def all_intervals(context: Context, folders: Sequence[Path], levels: tuple[float, ...]) -> Intervals | None:
    """Those of the mean of the forecasts that runs have left in these folders, whose errors are the mean of theirs, with the
    newest; None where one has not left them."""
    if context.intervals is None or not levels or not all(has_errors(folder, context.series) for folder in folders):
        return None
    files = [folder / KEPT for folder in folders]
    val, newest = (intervals_of(files, levels, some) for some in (slice(context.intervals.windows), slice(-POOL, None)))
    return replace(val, newest=newest)
