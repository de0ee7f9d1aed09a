"""Test pass of the M4 competition: its forecast file, its scores, and simple forecasts beside them."""

import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_provider.batches import Batch
from data_provider.data_factory import series_flags
from data_provider.m4 import M4Series, content
from layers.norm import instance_norm
from utils.results.baselines import LAST, PENALTIES, RIDGE, fit_ridge
from utils.results.log import peak_memory_gib
from utils.results.m4_scores import (
    NAIVE2,
    NAIVE2_TITLE,
    Errors,
    errors_of,
    methods_of,
    naive2,
    read_errors,
    table,
    warnings_of,
)
from utils.results.report import METRICS
from utils.results.test_pass import TestPass
from utils.saving.files import write_atomic, write_json
from utils.training.evaluate import Scores
from utils.training.session import Job

TITLES = {NAIVE2: NAIVE2_TITLE, LAST: "Last value", RIDGE: "Linear map (ridge)"}


def open_pass(job: Job) -> TestPass:
    """The test pass of a job's data."""
    return M4Pass(job) if isinstance(job.series, M4Series) else TestPass(job)


class M4Pass(TestPass):
    """Gathers the forecasts of all series; what it leaves is `<Pattern>_forecast.csv` and metrics.json."""

    __test__ = False  # no pytest class
    series: M4Series

    def __init__(self, job: Job):
        assert isinstance(job.series, M4Series)
        self.job, self.series, self.folder = job, job.series, job.folder
        shape = len(self.series.ids), self.series.pred_len
        self.made = torch.zeros(shape, dtype=torch.float64, device=job.device)  # zero where another process forecasts

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        """Keep the forecasts `[B, H]` of a batch."""
        self.made[batch.index.to(self.made.device)] = forecast.double()

    @cached_property
    def forecasts(self) -> np.ndarray:
        """`[S, H]`, those of all processes."""
        return self.job.accelerator.reduce(self.made).cpu().numpy()

    @cached_property
    def simple(self) -> dict[str, Errors]:
        """What `simple_errors` finds, unless an earlier metrics.json of the same data has it."""
        of, kept = _measured_on(self.series), self._kept()
        if isinstance(kept, dict) and kept.get("of") == of:
            return {row["name"]: read_errors(row) for row in kept["rows"]}
        began = time.perf_counter()
        found = simple_errors(self.series)
        if time.perf_counter() - began > 1:
            self.job.log(f"Simple forecasts measured in {time.perf_counter() - began:.0f} s")
        return found

    @cached_property
    def errors(self) -> Errors:
        """The model's."""
        series = self.series
        return errors_of(self.forecasts, series.future, series.known, series.kind.season)

    def headline(self, scores: Scores) -> str:
        """The line with the test's figures."""
        own = self.errors
        return f"Test SMAPE: {own.smape:.3f} MASE: {own.mase:.3f} OWA: {own.owa(self.simple[NAIVE2]):.3f}"

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write the forecasts in the competition's format and metrics.json; return the metrics."""
        job, series, naive = self.job, self.series, self.simple[NAIVE2]
        if not job.accelerator.is_main_process:
            return figures
        memory = peak_memory_gib(job.device)
        rows = [{"name": name, "title": TITLES[name], **asdict(e), "owa": e.owa(naive)} for name, e in self.simple.items()]
        metrics = figures | {
            "test": figures["test"] | asdict(self.errors) | {"owa": self.errors.owa(naive)},
            "peak_memory_gib": memory,
            "windows": len(series.ids),
            "flags": series_flags(job.args) | {"seasonal_patterns": series.pattern},
            "m4": {"pattern": series.pattern, "series": len(series.ids), "synthetic": series.synthetic},
            "baselines": {"of": _measured_on(series), "rows": rows},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{series.pattern}_forecast.csv"
        write_forecasts(file, series.ids, self.forecasts)
        job.log(f"Forecasts of {len(series.ids)} series: {file}")
        write_json(self.folder / METRICS, metrics)
        for line in table(methods_of(metrics), warnings_of(metrics)).splitlines():
            job.log(line)
        return metrics


def simple_errors(series: M4Series) -> dict[str, Errors]:
    """Errors of Naive2, of the last value, and of a linear map of the window, which is left out where no training series
    fills a window."""
    H, season = series.pred_len, series.kind.season
    made = {
        NAIVE2: np.stack([naive2(values, season, H) for values in series.known]),
        LAST: np.repeat([[values[-1]] for values in series.known], H, axis=1),
    }
    if any(len(values) >= series.seq_len + 2 * H for values in series.known):
        made[RIDGE] = _ridge(series)
    return {name: errors_of(forecast, series.future, series.known, season) for name, forecast in made.items()}


def _ridge(series: M4Series) -> np.ndarray:
    """Forecasts `[S, H]` of one linear map of the normalised window."""
    weights, _ = fit_ridge(*series.windows_for_a_map())
    test = series.windows("test")
    items = [test[number] for number in range(len(series.ids))]
    x, mask = (torch.stack([item[name][:, 0] for item in items]).double() for name in ("x", "x_mask"))  # (S, T)
    z, mean, deviation = instance_norm(x, mask)
    return (z @ torch.from_numpy(weights) * deviation + mean).numpy()


def _measured_on(series: M4Series) -> dict[str, Any]:
    return {
        "file": series.path.name,
        "sha256": series.fingerprint,
        "test_sha256": content(series.ids, series.future),
        "seq_len": series.seq_len,
        "pred_len": series.pred_len,
        "penalties": [float(PENALTIES[0]), float(PENALTIES[-1]), len(PENALTIES)],
    }


def write_forecasts(path: Path, ids: list[str], forecasts: np.ndarray) -> None:
    """Write forecasts `[S, H]` in the competition's format, a line a series: its id, then F1 to FH.

    Raises:
        StorageError: the file system refused.
    """
    names = [f"F{step}" for step in range(1, forecasts.shape[1] + 1)]
    frame = pd.DataFrame(forecasts, index=pd.Index(ids, name="id"), columns=names)
    write_atomic(path, lambda part: frame.to_csv(part))
