"""The mean of the forecasts of a run's repeats (`--itr`), scored like any of them.

The repeats differ in their seed. Their test forecasts lie in their predictions.npz, and the errors of their
validation windows beside it: the mean of these errors is the error of the mean, so that it has intervals of its own.
"""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_provider.data_factory import batch_loader
from data_provider.data_loader import SplitSeries
from utils.intervals import Intervals, probabilities, quantiles
from utils.results.calibration import KEPT
from utils.results.predictions import PREDICTIONS
from utils.results.test_pass import TestPass
from utils.saving.checkpoint import RECORD
from utils.saving.files import write_json
from utils.saving.folder import move_aside
from utils.saving.record import TENSORS
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
    try:
        held = [_Predictions(place, job) for place in repeats]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        job.log(f"No mean of the {len(repeats)} repeats' forecasts: not all have left theirs ({error})")
        return None
    if accelerator.is_main_process and _is_anothers(folder, job):
        job.log(f"An earlier mean is now in: {move_aside(folder)}")
    accelerator.wait_for_everyone()
    job = replace(job, folder=folder, intervals=mean_intervals(job, repeats))
    results = TestPass(job)
    mean, deviation = results.mean[:, None], results.deviation[:, None]  # (N, 1)
    rank, world = accelerator.process_index, accelerator.num_processes
    whole = not job.model.channel_independent
    _, loader = batch_loader(job.args, "test", job.windows, rank=rank, world=world, whole=whole)
    totals = torch.zeros(3, dtype=torch.float64, device=job.device)
    for batch in loader:
        first, last = int(batch.index[0]), int(batch.index[-1])
        own = np.mean([pred.read(first, last + 1) for pred in held], axis=0).swapaxes(1, 2)  # (B, N, H)
        forecast = torch.from_numpy((own - mean) / deviation).flatten(0, 1).float().to(job.device)
        batch = batch.to(job.device)
        missed = (forecast - batch.y).double()
        totals += torch.stack([missed.square().sum(), missed.abs().sum(), torch.full_like(totals[2], missed.numel())])
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


def _is_anothers(folder: Path, job: Job) -> bool:
    """Whether the folder has the mean of runs with other flags."""
    try:
        held = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not isinstance(held, dict) or held.get("flags") != json.loads(json.dumps(job.record["flags"]))


class _Predictions:
    """The test forecasts that a repeat has left, in own units; read as they are asked for."""

    def __init__(self, folder: Path, job: Job):
        """Raises:
        OSError, ValueError, KeyError, BadZipFile: none, not of these windows, or older than the checkpoint.
        """
        path, series = folder / PREDICTIONS, job.windows
        windows = series.windows("test")
        with np.load(path, allow_pickle=False) as held:
            first = np.datetime64(windows.window_dates(0)[1].tz_localize(None), "ns")
            fits = held["columns"].tolist() == series.forecast_columns and held["start"][0] == first
        stale = path.stat().st_mtime_ns < (folder / TENSORS).stat().st_mtime_ns
        # Its members are stored as they are, so a place in one is a place in the file.
        self._file = zipfile.ZipFile(path).open("pred.npy")
        np.lib.format.read_magic(self._file)
        self.shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._file)
        self._start = self._file.tell()
        if not fits or stale or self.shape != (len(windows), series.pred_len, len(series.forecast_columns)):
            raise ValueError("forecasts of other windows, or of an earlier checkpoint")

    def read(self, first: int, stop: int) -> np.ndarray:
        """Windows `[stop - first, H, N]`, float64."""
        size = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        self._file.seek(self._start + first * size)
        values = np.frombuffer(self._file.read((stop - first) * size), self._dtype)
        return values.reshape(-1, *self.shape[1:]).astype(np.float64)


def mean_intervals(job: Job, repeats: list[Path]) -> Intervals | None:
    """Those of the mean, where all repeats have left the errors of their validation windows; memory holds a channel's."""
    files = [place / KEPT for place in repeats]
    if not job.levels or not all(file.is_file() for file in files):
        return None
    series = job.series
    shape = (len(series.forecast_columns), job.args.pred_len)
    try:
        errors = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]  # each (W, N, H)
    except (OSError, ValueError):
        return None
    windows = (
        len(job.windows.windows("val")) if isinstance(series, SplitSeries) else len(errors[0])
    )  # else they are not here
    if any(each.shape != (windows, *shape) for each in errors):
        return None
    channels = range(errors[0].shape[1])
    rows = [quantiles(np.mean([e[:, n] for e in errors], axis=0), probabilities(job.levels)) for n in channels]
    return Intervals(job.levels, np.stack(rows, axis=1), len(errors[0]))
