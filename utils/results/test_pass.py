"""Test pass: what it leaves in the run's folder is metrics.json, predictions.npz and pictures."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from data_provider.batches import Batch
from data_provider.data_factory import series_flags
from layers.norm import instance_norm
from utils.intervals import Intervals, name_of
from utils.results.interval_metrics import IntervalMetrics
from utils.results.log import peak_memory_gib
from utils.results.metrics import Metrics
from utils.results.predictions import PREDICTIONS, Predictions
from utils.results.report import METRICS, measured
from utils.saving.files import free_bytes, size_text, write_json
from utils.training.evaluate import Scores
from utils.training.session import Job

SHOWN_WINDOWS = 3  # in the pictures: the first, the middle and the last test window


@dataclass(frozen=True)
class Window:
    """A test window for a picture, in the data's own units."""

    dates: pd.DatetimeIndex  # [T + H]
    history: np.ndarray  # [T, N]
    true: np.ndarray  # [H, N]
    pred: np.ndarray  # [H, N]
    bands: dict[str, np.ndarray] = field(default_factory=dict)  # lo80, hi80, ...: [H, N]


class Tally:
    """Sums of a pass: its errors, and how good the job's prediction intervals were."""

    def __init__(self, job: Job, intervals: Intervals | None, columns: list[str], mean: np.ndarray, deviation: np.ndarray):
        """Args:
        columns, mean, deviation: `[N]` of the forecast columns.
        """
        self.columns = columns
        self.metrics = Metrics(mean, deviation, job.args.pred_len, job.device)
        self.interval_metrics = IntervalMetrics(intervals, mean, deviation, job.device) if intervals is not None else None

    def add(self, batch: Batch, forecast: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Count a batch of M = B*N sequences, window by window, and its standardised forecasts `[M, H]`.

        Returns:
            forecast and truth `[B, N, H]`, history `[B, N, T]` and its deviation `[B, N, 1]`.
        """
        B, N = len(batch.index), len(self.columns)
        pred, true, x = forecast.view(B, N, -1), batch.y.view(B, N, -1), batch.x.view(B, N, -1)
        self.metrics.add(pred, true)
        deviation = instance_norm(x)[2]
        if self.interval_metrics is not None:
            self.interval_metrics.add(pred, true, deviation)
        return pred, true, x, deviation

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        self.metrics.reduce(accelerator)
        if self.interval_metrics is not None:
            self.interval_metrics.reduce(accelerator)

    def result(self) -> dict[str, Any]:
        """What metrics.json has of it."""
        found = self.metrics.result(self.columns)
        return found if self.interval_metrics is None else found | {"intervals": self.interval_metrics.result(self.columns)}


class TestPass:
    """Takes in the batches of one pass over the test split, and writes what they come to.

    Pass `consume` to `score`, then call `finish`.
    """

    __test__ = False  # no pytest class

    def __init__(self, job: Job):
        self.job, self.series, self.folder = job, job.windows, job.folder
        self.data = self.series.windows("test")
        self.columns = self.series.forecast_columns
        kept = self.series.forecast_slice
        self.mean, self.deviation = self.series.mean[kept], self.series.deviation[kept]
        accelerator, horizon = job.accelerator, self.series.pred_len
        intervals = job.intervals
        self.tally = Tally(job, intervals, self.columns, self.mean, self.deviation)
        self.shown = set(np.linspace(0, len(self.data) - 1, SHOWN_WINDOWS).round().astype(int).tolist())
        self.windows: dict[int, Window] = {}
        self.predictions: Predictions | None = None
        levels = intervals.levels if intervals else ()
        if job.args.save_predictions and self._has_room(len(levels)):
            self.folder.mkdir(parents=True, exist_ok=True)
            main = accelerator.is_main_process
            self.predictions = Predictions(self.folder, len(self.data), horizon, self.columns, main, levels)
            accelerator.wait_for_everyone()

    def _has_room(self, levels: int) -> bool:
        """Whether the disk can hold predictions.npz; says so where it cannot, for a wide file's takes many gigabytes."""
        size = Predictions.room(len(self.data), self.series.pred_len, len(self.columns), levels)
        place = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        free = free_bytes(place)
        short = torch.tensor(float(0 < free < size), device=self.job.device)  # 0: that cannot be told
        if self.job.accelerator.reduce(short) == 0:  # of several processes, one alone must not leave it out
            return True
        self.job.log(
            f"WARNING: {PREDICTIONS} is left out: it takes {size_text(size)} on the disk, {size_text(free)} are free "
            "(--save_predictions 0 does without it)"
        )
        return False

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        """Count a batch of M = B*N sequences, window by window, and its standardised forecasts `[M, H]`."""
        pred, true, x, deviation = self.tally.add(batch, forecast)
        index = batch.index.tolist()
        if self.predictions is None and not self.shown.intersection(index):
            return
        own_pred, own_true = self._own(pred), self._own(true)
        bands = {name: self._own(values) for name, values in self._bands(pred, deviation)}
        if self.predictions is not None:  # a batch's windows are neighbours: test batches come in order
            self.predictions.add(index[0], own_pred, own_true, bands)
        for place, number in enumerate(index):
            if number in self.shown:
                own_x = self._own(x[place : place + 1])[0]
                dates = self.data.dates[number : number + len(own_x) + own_pred.shape[1]]
                shown = {name: band[place] for name, band in bands.items()}
                self.windows[number] = Window(dates, own_x, own_true[place], own_pred[place], shown)

    def _bands(self, pred: torch.Tensor, deviation: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Names of the bands' ends, and their standardised values `[B, N, H]`."""
        if self.job.intervals is not None:
            for level in self.job.intervals.levels:
                for side, offsets in zip(("lo", "hi"), self.job.intervals.band(level), strict=True):
                    yield side + name_of(level), pred + deviation * torch.from_numpy(offsets).to(pred.device)

    def _own(self, values: torch.Tensor) -> np.ndarray:
        """Standardised `[B, N, rows]` -> own units `[B, rows, N]`."""
        return self.series.to_own_units(values.transpose(1, 2).double().cpu().numpy())

    def headline(self, scores: Scores) -> str:
        """The line with the test's figures."""
        return f"Test MSE: {scores.mse:.7f} MAE: {scores.mae:.7f}"

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and predictions.npz; return the metrics.

        Args:
            figures: "test" (mse, mae), "data", "checkpoint" and what else metrics.json shall hold.
        """
        job = self.job
        self.tally.reduce(job.accelerator)
        job.accelerator.wait_for_everyone()  # all have written their windows
        if not job.accelerator.is_main_process:
            return figures
        T, windows = self.series.seq_len, len(self.data)
        starts = self.data.dates[T : T + windows]
        memory = peak_memory_gib(job.device)  # before the baselines take theirs
        metrics = figures | {
            "peak_memory_gib": memory,
            "windows": windows,
            "first_forecast_row": [str(starts[0]), str(starts[-1])],
            "flags": series_flags(job.args),  # on what data the test was made
            **self.tally.result(),
        }
        began = time.perf_counter()
        metrics["baselines"] = measured(self.series, self._kept(), job.levels if job.intervals else ())
        if time.perf_counter() - began > 1:
            job.log(f"Simple forecasts measured in {time.perf_counter() - began:.0f} s")
        write_json(self.folder / METRICS, metrics)
        if self.predictions is not None:
            self.predictions.close(starts, self.mean, self.deviation)
        return metrics

    def _kept(self) -> dict[str, Any] | None:
        """The baselines that an earlier metrics.json holds."""
        try:
            return json.loads((self.folder / METRICS).read_text(encoding="utf-8")).get("baselines")
        except (OSError, ValueError):
            return None
