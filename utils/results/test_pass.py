"""Test passes: what they leave in the run's folder is metrics.json and predictions.npz, or M4's file of forecasts."""

import json
import math
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_provider.batches import Batch
from data_provider.data_factory import batch_loader, series_flags
from data_provider.m4 import M4Series
from layers.norm import instance_norm
from utils.results.bands import KEPT, has_errors, make_array, name_of, units, write_errors
from utils.results.baselines import LAST, RIDGE, fit_ridge, measured
from utils.results.m4 import MODEL, NAIVE2, TITLES, Errors, errors_of, naive2, owa, scores_of, table, warnings_of
from utils.results.metrics import METRICS, Metrics
from utils.saving.files import RECORD, TENSORS, size_text, write_atomic, write_json
from utils.saving.folder import move_aside
from utils.training.context import Context
from utils.training.evaluate import Scores, all_intervals, evaluate
from utils.training.memory import peak_memory_gib

PREDICTIONS = "predictions.npz"


# A test window for a picture, in the data's own units: dates `[T + H]`, history `[T, N]`, true and pred `[H, N]`, and bands,
# whose lo80, hi80, ... are `[H, N]`.
Window = namedtuple("Window", "dates history true pred bands")


class TestPass:
    """Takes in the batches of one pass over the test split, and writes what they come to.

    Pass `consume` to `score`, then call `finish`. Members of predictions.npz, for W windows, H steps ahead and N channels,
    in the data's own units:

    - pred, true `[W, H, N]` float32; with prediction intervals also lo80, hi80 and so on, the ends of their bands
    - start `[W]` datetime64: date of the first forecast row
    - columns `[N]` names; mean, deviation `[N]`: standardised = (value - mean) / deviation

    Memory holds one batch of them: all processes write to files in a folder of the run's, from which they are packed.
    """

    __test__ = False  # no pytest class

    def __init__(self, context: Context):
        self.context, self.series, self.folder = context, context.windows, context.folder
        self.data, self.columns = self.series.windows("test"), self.series.forecast_columns
        kept, shape = self.series.forecast_slice, (len(self.data), self.series.pred_len, len(self.columns))
        self.mean, self.std = self.series.mean[kept], self.series.std[kept]
        intervals, bounds = context.intervals, self.series.standard_bounds
        self.metrics = Metrics(
            self.columns, self.mean, self.std, shape[1], intervals, context.device, bounds, len(self.data)
        )
        # With notes, the squared errors [W, H], the mean over the columns.
        self.by_row = torch.zeros(*shape[:2], dtype=torch.float64, device=context.device) if self.data.notes else None
        self.windows: dict[str, Window] = {}  # for the pictures, by what they are
        self.parts, self.saves_predictions = self.folder / ".predictions.parts", bool(context.args.save_predictions)
        self.writes_errors = has_errors(self.folder, self.series)
        self.levels = intervals.levels if intervals else ()
        self.bands = {} if intervals is None else {
            f"{side}{name_of(level)}": offsets
            for level in self.levels
            for side, offsets in zip(("lo", "hi"), intervals.band(level), strict=True)
        }  # fmt: skip
        size = 4 * math.prod(shape) * (3 + len(self.bands))  # one of the arrays lies there twice while it is packed
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free  # 0: that cannot be told
        # Of several processes, one alone must not leave it out.
        short = context.accelerator.reduce(torch.tensor(float(0 < free < size), device=context.device)) > 0
        if self.saves_predictions and short:
            self.saves_predictions = False
            context.log(
                f"WARNING: {PREDICTIONS} is left out: it takes {size_text(size)} on the disk, {size_text(free)} are free"
                " (--save_predictions 0 does without it)"
            )
        if self.saves_predictions and context.accelerator.is_main_process:
            shutil.rmtree(self.parts, ignore_errors=True)
            for name in ("pred", "true", *self.bands):
                make_array(self.parts / f"{name}.npy", shape, self.folder / PREDICTIONS)
        context.accelerator.wait_for_everyone()

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        """Count a batch of M = B*N sequences, window by window, and its standardised forecasts `[M, H]`."""
        index = batch.index.tolist()
        pred, true, x = (v.view(len(index), len(self.columns), -1) for v in (forecast, batch.y, batch.x))
        unit = units(x)  # (B, N, 1)
        self.metrics.add(pred, true, unit, batch.index)
        if self.by_row is not None:
            self.by_row[batch.index.to(pred.device)] = (pred - true).double().square().mean(dim=1)
        if self.writes_errors:
            write_errors(self.folder / KEPT, batch, forecast, after=len(self.series.windows("val")))
        if not self.saves_predictions:
            return
        values = {"pred": pred}
        values |= {end: pred + unit * torch.from_numpy(offsets).to(pred.device) for end, offsets in self.bands.items()}
        own = {name: self.series.to_own_units(rows.transpose(1, 2).double().cpu().numpy()) for name, rows in values.items()}
        own = {name: self.series.within_bounds(rows) for name, rows in own.items()}
        first, kept = self.series.splits.train + self.series.splits.val, self.series.forecast_slice
        own["true"] = np.stack([self.series.own[first + n :][: self.series.pred_len, kept] for n in index])  # as in the file
        for name, rows in own.items():  # a batch's windows are neighbours
            np.load(self.parts / f"{name}.npy", mmap_mode="r+")[index[0] : index[-1] + 1] = rows

    # The first and the last window, and those with the median and the largest MSE.
    def _windows_to_show(self, errors: np.ndarray) -> dict[str, Window]:
        order, T, shown = np.argsort(errors, kind="stable"), self.series.seq_len, {}
        places = {"first": 0, "median error": order[len(order) // 2], "largest error": order[-1], "last": len(order) - 1}
        held = {file.stem: np.load(file, mmap_mode="r") for file in self.parts.glob("*.npy")}
        for name, place in places.items():
            bands = {end: np.array(rows[place]) for end, rows in held.items()}
            history = self.series.to_own_units(self.data.values[place : place + T, self.series.forecast_slice])
            dates = self.data.dates[place : place + T + self.series.pred_len]
            shown[name] = Window(dates, history, bands.pop("true"), bands.pop("pred"), bands)
        return shown

    def headline(self, scores: Scores) -> str:
        return f"Test MSE: {scores.mse:.7f} MAE: {scores.mae:.7f}"

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and predictions.npz; return the metrics.

        Args:
            figures: "test" (mse, mae), "data", "checkpoint" and what else metrics.json shall hold.
        """
        context = self.context
        self.metrics.sums, ours = (context.accelerator.reduce(held) for held in (self.metrics.sums, self.metrics.by_window))
        context.accelerator.wait_for_everyone()  # all have written their windows
        if not context.accelerator.is_main_process:
            return figures
        starts = self.data.dates[self.series.seq_len :][: len(self.data)]
        found = figures | {
            "peak_memory_gib": peak_memory_gib(context.device),  # before the baselines take theirs
            "windows": len(self.data),
            "first_forecast_row": [str(starts[0]), str(starts[-1])],
            "flags": series_flags(context.args),  # on what data the test was made
            "remarks": context.remarks,
            **self.metrics.result(),
            "baselines": measured(
                self.series, self.levels, ours.cpu().numpy(), getattr(context.model, "stack", None),
                context.pretrain, context.args.season,
            ),
        }  # fmt: skip
        if self.saves_predictions:
            self.windows = self._windows_to_show(ours[0].cpu().numpy())
        write_json(self.folder / METRICS, found)
        small = {
            "start": starts.tz_localize(None).to_numpy().astype("datetime64[ns]"),
            "columns": np.array(self.columns),
            "mean": self.mean,
            "deviation": self.std,
        }

        def pack(path: Path) -> None:
            for name, values in small.items():
                np.save(self.parts / f"{name}.npy", values, allow_pickle=False)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as packed:
                for part in sorted(self.parts.glob("*.npy")):
                    packed.write(part, part.name)  # copied in small pieces
                    part.unlink()  # so that the disk never holds all of it twice

        if self.saves_predictions:
            write_atomic(self.folder / PREDICTIONS, pack)  # an earlier one stays until this one is whole
            shutil.rmtree(self.parts)
        return found


class M4Pass:
    """As `TestPass`, for the competition's series: it leaves `<Pattern>_forecast.csv` and metrics.json."""

    def __init__(self, context: Context):
        assert isinstance(context.series, M4Series)
        self.context, self.series, self.folder = context, context.series, context.folder
        shape = len(self.series.ids), self.series.pred_len
        self.made = torch.zeros(shape, dtype=torch.float64, device=context.device)  # zero where another process forecasts

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        self.made[batch.index.to(self.made.device)] = forecast.double()

    @cached_property
    def forecasts(self) -> np.ndarray:
        # (S, H), those of all processes
        return self.context.accelerator.reduce(self.made).cpu().numpy()

    @cached_property
    def errors(self) -> dict[str, Errors]:
        """Errors of the model, Naive2, the last value, and the linear map where a training series fills a window."""
        series, H, season = self.series, self.series.pred_len, self.series.kind.season
        made = {
            MODEL: self.forecasts,
            NAIVE2: np.stack([naive2(values, season, H) for values in series.known]),
            LAST: np.stack([np.repeat(values[-1], H) for values in series.known]),
        }
        if any(len(values) >= series.seq_len + 2 * H for values in series.known):
            weights, _ = fit_ridge(*series.windows_for_a_map())
            windows = series.windows("test")
            items: list[Any] = [windows[number] for number in range(len(series.ids))]
            x, mask = (torch.stack([item[name][:, 0] for item in items]).double() for name in ("x", "x_mask"))  # (S, T)
            z, mean, std = instance_norm(x, mask)
            made[RIDGE] = (z @ torch.from_numpy(weights) * std + mean).numpy()
        return {name: errors_of(forecast, series.future, series.known, season) for name, forecast in made.items()}

    def headline(self, scores: Scores) -> str:
        own = self.errors[MODEL]
        return f"Test SMAPE: {own['smape']:.3f} MASE: {own['mase']:.3f} OWA: {owa(own, self.errors[NAIVE2]):.3f}"

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write the forecasts in the competition's format, a line a series, and metrics.json; return the metrics."""
        context, series, errors = self.context, self.series, self.errors
        if not context.accelerator.is_main_process:
            return figures
        found = {name: of | {"owa": owa(of, errors[NAIVE2])} for name, of in errors.items()}
        metrics = figures | {
            "test": figures["test"] | found.pop(MODEL),
            "peak_memory_gib": peak_memory_gib(context.device),
            "windows": len(series.ids),
            "flags": series_flags(context.args) | {"seasonal_patterns": series.pattern},
            "m4": {"pattern": series.pattern, "series": len(series.ids), "synthetic": series.synthetic},
            "baselines": {"rows": [{"name": name, "title": TITLES[name]} | row for name, row in found.items()]},
        }
        steps = [f"F{step}" for step in range(1, series.pred_len + 1)]
        frame = pd.DataFrame(self.forecasts, index=pd.Index(series.ids, name="id"), columns=steps)
        file = self.folder / f"{series.pattern}_forecast.csv"
        write_atomic(file, frame.to_csv)
        context.log(f"Forecasts of {len(series.ids)} series: {file}")
        write_json(self.folder / METRICS, metrics)
        context.log(*table(scores_of(metrics), warnings_of(metrics)).splitlines())
        return metrics


def open_pass(context: Context) -> TestPass | M4Pass:
    return M4Pass(context) if isinstance(context.series, M4Series) else TestPass(context)


def score_mean(context: Context, repeats: list[Path], folder: Path) -> tuple[TestPass, dict] | None:
    """Score the mean of the repeats' test forecasts (`--itr`); leaves in `folder` what a test leaves in a run's.

    Args:
        context: of the last repeat, tested. Of a group of processes each scores its share.
        repeats: the runs' folders.

    Returns:
        The pass and its metrics; None where a repeat has left no predictions of these test windows.
    """
    accelerator = context.accelerator
    accelerator.wait_for_everyone()  # the last predictions.npz is whole
    try:
        readers = [_reader(place, context) for place in repeats]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        context.log(f"No mean of the {len(repeats)} repeats' forecasts: not all have left theirs ({error})")
        return None
    if accelerator.is_main_process:
        record = json.loads(json.dumps(context.record | {"repeats": [place.name for place in repeats]}))
        earlier = json.loads((folder / RECORD).read_text(encoding="utf-8")) if (folder / RECORD).is_file() else record
        if earlier["flags"] != record["flags"]:
            context.log(f"An earlier mean is now in: {move_aside(folder)}")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, record)
    accelerator.wait_for_everyone()
    context = replace(context, folder=folder, intervals=all_intervals(context, repeats, context.levels))
    results = TestPass(context)
    rank, world = accelerator.process_index, accelerator.num_processes
    _, loader = batch_loader(context.args, "test", context.windows, rank=rank, world=world)

    def forecast(batch: Batch, shared: object) -> torch.Tensor:
        first, last = int(batch.index[0]), int(batch.index[-1])  # a batch's windows are neighbours
        own = np.mean([read(first, last + 1) for read in readers], axis=0)  # (B, H, N)
        standardised = torch.from_numpy((own - results.mean) / results.std)
        return standardised.transpose(1, 2).flatten(0, 1).float().to(context.device)

    scores = evaluate(context.model, loader, accelerator, forecast, results.consume, device=context.device)
    figures = {"repeats": len(repeats), "data": context.record["data"], "model": context.args.model}
    metrics = results.finish({"test": {"mse": scores.mse, "mae": scores.mae}} | figures)
    context.log(f"Mean of {len(repeats)} repeats: {results.headline(scores)}; saved at: {folder}")
    return results, metrics


def _reader(folder: Path, context: Context) -> Callable[[int, int], np.ndarray]:
    """Reads windows from one number to another, `[B, H, N]` float64, of the test forecasts that a run has left.

    Raises:
        OSError, ValueError, KeyError, BadZipFile: none, not of these windows, or older than the checkpoint.
    """
    path, series = folder / PREDICTIONS, context.windows
    # Its members are stored as they are, so a place in one is a place in the file.
    file = zipfile.ZipFile(path).open("pred.npy")
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    start, size = file.tell(), dtype.itemsize * math.prod(shape[1:])
    stale = path.stat().st_mtime_ns < (folder / TENSORS).stat().st_mtime_ns
    if stale or shape != (len(series.windows("test")), series.pred_len, len(series.forecast_columns)):
        raise ValueError("forecasts of other windows, or of an earlier checkpoint")

    def read(first: int, stop: int) -> np.ndarray:
        file.seek(start + first * size)
        return np.frombuffer(file.read((stop - first) * size), dtype).reshape(-1, *shape[1:]).astype(np.float64)

    return read
