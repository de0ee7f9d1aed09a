"""The mean of the forecasts of a run's repeats (`--itr`), scored like any of them.

The repeats differ in their seed. Their test forecasts lie in their predictions.npz, and the errors of their
validation windows beside it: the mean of these errors is the error of the mean, so that it has intervals of its own.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_provider.data_factory import data_provider
from utils.intervals import Intervals, probabilities, quantiles
from utils.results.calibration import KEPT
from utils.results.predictions import PREDICTIONS
from utils.results.test_pass import TestPass
from utils.saving.checkpoint import RECORD
from utils.saving.files import write_json
from utils.training.session import Job


def score_mean(job: Job, repeats: list[Path], folder: Path) -> tuple[TestPass, dict] | None:
    """Score the mean of the repeats' test forecasts; leaves in `folder` what a test leaves in a run's.

    Args:
        job: of the last repeat, tested. Of a group of processes each scores its share.
        repeats: the runs' folders.

    Returns:
        The pass and its metrics; None where a repeat has left no predictions of these test windows.
    """
    accelerator = job.accelerator
    accelerator.wait_for_everyone()  # the last predictions.npz is whole
    held = [pred for place in repeats if (pred := _predictions(place, job)) is not None]
    if len(held) < len(repeats):
        job.log(f"No mean of the {len(repeats)} repeats' forecasts: not all have left their {PREDICTIONS}")
        return None
    job = replace(job, folder=folder, intervals=mean_intervals(job, repeats))
    results = TestPass(job)
    mean, deviation = results.mean[:, None], results.deviation[:, None]  # (N, 1)
    rank, world = accelerator.process_index, accelerator.num_processes
    whole = not job.model.channel_independent
    _, loader = data_provider(job.args, "test", job.windows, rank=rank, world=world, whole=whole)
    totals = torch.zeros(3, dtype=torch.float64, device=job.device)
    for batch in loader:
        first, last = int(batch.index[0]), int(batch.index[-1])
        some = np.stack([pred[first : last + 1] for pred in held]).astype(np.float64)
        own = some.mean(axis=0).swapaxes(1, 2)  # (B, N, H)
        forecast = torch.from_numpy((own - mean) / deviation).flatten(0, 1).float().to(job.device)
        batch = batch.to(job.device)
        error = (forecast - batch.sequences().y).double()
        totals += torch.stack([error.square().sum(), error.abs().sum(), torch.full_like(totals[2], error.numel())])
        results.consume(batch, forecast)
    squared, absolute, count = accelerator.reduce(totals).tolist()
    test = {"mse": squared / count, "mae": absolute / count}
    figures = {"test": test, "repeats": len(repeats), "data": job.record["data"], "model": job.args.model}
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, job.record | {"repeats": [place.name for place in repeats]})
    metrics = results.finish(figures)
    job.log(f"Mean of {len(repeats)} repeats: Test MSE: {test['mse']:.7f} MAE: {test['mae']:.7f}; saved at: {folder}")
    return results, metrics


def _predictions(folder: Path, job: Job) -> np.ndarray | None:
    """The test forecasts `[W, H, N]` that a repeat has left, in own units; None where it has left none of these windows."""
    path = folder / PREDICTIONS
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as held:
        pred = held["pred"]
    expected = (len(job.windows.windows("test")), job.windows.pred_len, len(job.windows.forecast_columns))
    return pred if pred.shape == expected else None


def mean_intervals(job: Job, repeats: list[Path]) -> Intervals | None:
    """Those of the mean, where all repeats have left the errors of their validation windows; memory holds a channel's."""
    files = [place / KEPT for place in repeats]
    if not job.levels or not all(file.is_file() for file in files):
        return None
    errors = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]  # each (W, N, H)
    channels = range(errors[0].shape[1])
    rows = [quantiles(np.mean([e[:, n] for e in errors], axis=0), probabilities(job.levels)) for n in channels]
    return Intervals(job.levels, np.stack(rows, axis=1), len(errors[0]))
