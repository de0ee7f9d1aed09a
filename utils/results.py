"""What a test pass leaves in the run's folder: metrics.json, predictions.npz and pictures."""

import json
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_provider.data_loader import Series
from utils.batches import Batch
from utils.files import write_json
from utils.metrics import Metrics
from utils.predictions import Predictions
from utils.recorded import recorded
from utils.report import METRICS, measured
from utils.run_log import peak_memory_gib
from utils.same_data import trained_on

DEFAULT_CHECKPOINTS = "./checkpoints/"
SHOWN_WINDOWS = 3  # in the pictures: the first, the middle and the last test window
# The flags that say on what data a test was made.
TESTED = (
    "data", "root_path", "data_path", "features", "target", "freq", "embed", "percent",
    "seq_len", "label_len", "pred_len", "fill_missing",
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A test window for a picture, in the data's own units."""

    dates: pd.DatetimeIndex  # [T + H]
    history: np.ndarray  # [T, N]
    true: np.ndarray  # [H, N]
    pred: np.ndarray  # [H, N]


class TestPass:
    """Takes in the batches of one pass over the test split, and writes what they come to.

    Pass `consume` to `evaluate`, then call `finish`.
    """

    __test__ = False  # no pytest class

    def __init__(self, run, series: Series, folder: Path):
        """Args:
            run: a `utils.train.Run` that is set up with the test loader.
            series: the data of that loader.
            folder: where the results go.
        """
        self.run, self.series, self.folder = run, series, folder
        self.data = series.windows("test")
        kept = slice(None) if series.target_index is None else slice(series.target_index, series.target_index + 1)
        self.columns = series.columns[kept]
        self.mean, self.deviation = series.scaler.mean_[kept], series.scaler.scale_[kept]
        accelerator, horizon = run.accelerator, series.pred_len
        self.metrics = Metrics(self.mean, self.deviation, horizon, accelerator.device)
        self.shown = set(np.linspace(0, len(self.data) - 1, SHOWN_WINDOWS).round().astype(int).tolist())
        self.windows: dict[int, Window] = {}
        self.predictions = None
        if run.args.save_predictions:
            folder.mkdir(parents=True, exist_ok=True)
            main = accelerator.is_main_process
            self.predictions = Predictions(folder, len(self.data), horizon, self.columns, main)
            accelerator.wait_for_everyone()

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        """Count a batch of M = B*N sequences, window by window, and its standardised forecasts `[M, H]`."""
        B, N = len(batch.index), len(self.columns)
        pred, true = forecast.view(B, N, -1), batch.y.view(B, N, -1)  # (B, N, H)
        self.metrics.add(pred, true)
        index = batch.index.tolist()
        if self.predictions is None and not self.shown.intersection(index):
            return
        pred, true, x = (self._own(v) for v in (pred, true, batch.x.view(B, N, -1)))
        if self.predictions is not None:  # a batch's windows are neighbours: test batches come in order
            self.predictions.add(index[0], pred, true)
        for place, number in enumerate(index):
            if number in self.shown:
                dates = self.data.dates[number : number + x.shape[1] + pred.shape[1]]
                self.windows[number] = Window(dates, x[place], true[place], pred[place])

    def _own(self, values: torch.Tensor) -> np.ndarray:
        """Standardised `[B, N, rows]` -> own units `[B, rows, N]`."""
        return values.transpose(1, 2).double().cpu().numpy() * self.deviation + self.mean

    def finish(self, figures: dict) -> dict:
        """Write metrics.json and predictions.npz; return the metrics.

        Args:
            figures: "test" (mse, mae), "data", "checkpoint" and what else metrics.json shall hold.
        """
        run = self.run
        self.metrics.reduce(run.accelerator)
        run.accelerator.wait_for_everyone()  # all have written their windows
        if not run.accelerator.is_main_process:
            return figures
        T, windows = self.series.seq_len, len(self.data)
        starts = self.data.dates[T : T + windows]
        memory = peak_memory_gib(run.accelerator.device)  # before the baselines take theirs
        metrics = figures | {
            "peak_memory_gib": memory,
            "windows": windows,
            "first_forecast_row": [str(starts[0]), str(starts[-1])],
            "flags": {name: getattr(run.args, name, None) for name in TESTED},
            **self.metrics.result(self.columns),
        }
        began = time.perf_counter()
        metrics["baselines"] = measured(self.series, self._kept())
        if time.perf_counter() - began > 1:
            run.log(f"Simple forecasts measured in {time.perf_counter() - began:.0f} s")
        write_json(self.folder / METRICS, metrics)
        if self.predictions is not None:
            self.predictions.close(starts, self.mean, self.deviation)
        return metrics

    def _kept(self) -> dict | None:
        """The baselines that an earlier metrics.json holds."""
        try:
            return json.loads((self.folder / METRICS).read_text(encoding="utf-8")).get("baselines")
        except (OSError, ValueError):
            return None


def results_folder(run_folder: Path, checkpoint: Path, args: Namespace, file: Path | None = None,
                   data: Series | None = None) -> Path:  # fmt: skip
    """Where results go: the run's folder, or `on_<file>` in it where that run was trained on another
    file (a zero-shot test leaves the results of the training's own test alone).

    A command line that names its checkpoint and no experiment of its own means the checkpoint's folder.

    Args:
        file: the data; None where they count as the training's.
        data: what was read from the file already.
    """
    own = recorded(checkpoint).get("flags", {})
    same = all(own.get(name) == getattr(args, name) for name in ("model_id", "model_comment", "des"))
    if args.checkpoint and same and Path(args.checkpoints).resolve() in (
        Path(DEFAULT_CHECKPOINTS).resolve(), checkpoint.parent.parent.resolve()
    ):
        run_folder = checkpoint.parent
    trained = recorded(run_folder)
    if file is None or not trained.get("data") or trained_on(trained, file, data, args.fill_missing):
        return run_folder
    return run_folder / f"on_{file.stem}"
