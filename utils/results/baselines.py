"""Baselines, which a forecast must beat: last value, last season, and a closed-form linear map.

All are measured on the standardised test windows of a Series, as the model is.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from data_provider.data_loader import FileSeries, WindowDataset
from layers.norm import EPSILON
from utils.intervals import Intervals, deviations, probabilities, quantiles
from utils.results.interval_metrics import IntervalMetrics

LAST, SEASON, RIDGE = "last value", "last season", "ridge"  # names in metrics.json
MOST_FITTED = 1_000_000  # training sequences that a ridge regression is fitted to; of more, every k-th window's
PENALTIES = np.append(0, np.logspace(-6, 2, 25))  # as parts of the total weight of the training sequences

Forecast = Callable[[np.ndarray], np.ndarray]  # x [M, T] -> [M, H]


class Pairs(Protocol):
    """Windows that a linear map can be fitted to."""

    @property
    def sequence_count(self) -> int:
        """How many there are."""

    def sequences(self, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs `[m, T]` and truths `[m, H]` of every k-th, in chunks."""


@dataclass(frozen=True)
class Baseline:
    """A row of the comparison; errors on the standardised scale."""

    name: str
    title: str  # for people
    mse: float
    mae: float
    seconds: float  # fit and test
    detail: str
    intervals: dict | None = None  # "levels" with their coverage and width, and "wql", see `IntervalMetrics`


def baselines(series: FileSeries, season: int | None = None, levels: tuple[float, ...] = ()) -> list[Baseline]:
    """Measure the naive forecasts and the ridge regression on the test windows.

    Args:
        season: length of a season in rows; None takes it from the data's step
            (24 hours for steps below a day). The seasonal row is left out
            where a season is one row or does not fit in seq_len.
        levels: of the prediction intervals that they get as the models do, per cent.
    """
    horizon = series.pred_len
    season = season_length(series.step) if season is None else season
    began = time.perf_counter()
    rows = [
        _measure(LAST, "repeat the last value", "repeats x[T-1]", series, levels, began,
                 lambda x: np.repeat(x[:, -1:], horizon, axis=1))
    ]  # fmt: skip
    if 1 < season <= series.seq_len:
        last_season = np.arange(horizon) % season - season
        title, detail = _season_title(season, series.step), f"repeats the last {season} rows"
        rows.append(_measure(SEASON, title, detail, series, levels, time.perf_counter(), lambda x: x[:, last_season]))
    began = time.perf_counter()
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    every = fitted_every(series.windows("train"))
    thinned = f", fitted to one training window in {every}" if every > 1 else ""
    detail = f"linear map T to H, relative penalty {penalty:.2g}{thinned}"
    rows.append(_measure(RIDGE, "ridge regression", detail, series, levels, began, lambda x: ridge_forecast(x, weights)))
    return rows


def _season_title(season: int, step: pd.offsets.BaseOffset | None) -> str:
    """What repeating the last `season` rows is called: "repeat the last 24 h" for an hourly series."""
    start = pd.Timestamp("2001-01-01")
    length = None if step is None else start + season * step - start
    return "repeat the last 24 h" if length == pd.Timedelta(days=1) else f"repeat the last {season} rows"


def season_length(step: pd.offsets.BaseOffset | None) -> int:
    """Rows of the shortest natural season of a series with this step between rows: a day, else a week, else a
    year; 1 where none is known."""
    if step is None:
        return 1
    if isinstance(step, pd.offsets.BDay):
        return 5
    start = pd.Timestamp("2001-01-01")
    length = (start + 12 * step - start) / 12  # months differ in length
    for span in (pd.Timedelta(days=1), pd.Timedelta(days=7), pd.Timedelta(days=365.25)):
        if 2 * length <= span:
            return round(span / length)
    return 1


def _measure(
    name: str, title: str, detail: str, series: FileSeries, levels: tuple[float, ...], start: float, forecast: Forecast
) -> Baseline:
    kept, columns = series.forecast_slice, series.forecast_columns
    metrics = None
    if levels:
        intervals = _calibrate(series.windows("val"), forecast, levels)
        metrics = IntervalMetrics(intervals, series.mean[kept], series.deviation[kept])
    squares = absolutes = count = 0.0
    for x, y in series.windows("test").sequences():
        made = forecast(x)
        if metrics is not None:
            shaped = (torch.from_numpy(v).unflatten(0, (-1, len(columns))) for v in (made, y, deviations(x)))
            metrics.add(*shaped)  # (B, N, H), (B, N, H), (B, N, 1)
        error = made - y
        squares += np.square(error).sum()
        absolutes += np.abs(error).sum()
        count += error.size
    seconds = time.perf_counter() - start
    found = _brief(metrics.result(columns)) if metrics else None
    return Baseline(name, title, float(squares / count), float(absolutes / count), seconds, detail, found)


def _mse(windows: Pairs, forecast: Forecast) -> float:
    errors = [(np.square(forecast(x) - y).sum(), y.size) for x, y in windows.sequences()]
    count = sum(count for _, count in errors)
    return float(sum(squares for squares, _ in errors) / count) if count else float("nan")


def _calibrate(windows: WindowDataset, forecast: Forecast, levels: tuple[float, ...]) -> Intervals:
    """The intervals of a simple forecast; memory holds a channel's errors."""
    places = range(windows.values.shape[1]) if windows.target_index is None else [windows.target_index]
    rows = []
    for place in places:
        alone = WindowDataset(windows.values, windows.marks, windows.dates, windows.seq_len, windows.label_len,
                              windows.pred_len, target_index=place)  # fmt: skip
        errors = [((y - forecast(x)) / deviations(x)).astype(np.float32) for x, y in alone.sequences()]
        rows.append(quantiles(np.concatenate(errors), probabilities(levels)))
    return Intervals(levels, np.stack(rows, axis=1), len(windows))


def _brief(found: dict) -> dict:
    """What a row of a table needs of `IntervalMetrics.result`."""
    levels = {name: {key: level[key] for key in ("coverage", "width")} for name, level in found["levels"].items()}
    return {"levels": levels, "wql": found["wql"]}


def normalise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instance normalisation of `[M, T]`: z `[M, T]`, mean and deviation `[M, 1]`."""
    mean = x.mean(axis=1, keepdims=True)
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + EPSILON)
    return (x - mean) / deviation, mean, deviation


def ridge_forecast(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Forecast `[M, H]` from `[M, T]` with a map `[T, H]` of normalised windows."""
    z, mean, deviation = normalise(x)
    return z @ weights * deviation + mean


def _moments(windows: Pairs, power: int) -> tuple[np.ndarray, np.ndarray, float]:
    """All that least squares needs of the normalised windows: xx `[T, T]`, xy `[T, H]`, and the total weight.

    Each sequence is weighted by its deviation to the `power`. Of very many, see `fitted_every`.
    """
    xx, xy, total = np.zeros(()), np.zeros(()), 0.0
    for x, y in windows.sequences(fitted_every(windows)):
        z, mean, deviation = normalise(x)
        weighted = z * deviation**power  # (m, T)
        xx, xy = xx + weighted.T @ z, xy + weighted.T @ ((y - mean) / deviation)
        total += float((deviation**power).sum())
    return xx, xy, total


def fitted_every(windows: Pairs) -> int:
    """k, where every k-th window is enough to fit a linear map to: neighbours say nearly the same, and a file of hundreds
    of channels has millions of sequences."""
    return -(-windows.sequence_count // MOST_FITTED)


def fit_ridge(train: Pairs, val: Pairs) -> tuple[np.ndarray, float]:
    """One linear map for all channels, the penalty with the lowest validation MSE.

    A training sequence is weighted by its deviation. Unweighted, the few windows in which a sensor stood
    still (deviation near 0, ETTh2 has them) would decide the map; weighted by the variance, as the
    de-normalised loss does, the few wildest would. Of the three this one has the lowest validation error
    on ETTh1 and on ETTh2.

    Returns:
        weights `[T, H]`, and the penalty as a part of the total weight of the training sequences.
    """
    xx, xy, total = _moments(train, 1)
    val_xx, val_xy, _ = _moments(val, 2)  # errors count on the standardised scale
    candidates = list(ridge_maps(xx, xy, PENALTIES * total))
    # |z w - y|^2 summed over validation, without the part that no w changes
    errors = [np.sum(w * (val_xx @ w - 2 * val_xy)) for w in candidates]
    best = int(np.argmin(errors))
    return candidates[best], float(PENALTIES[best])


def doubts(weights: np.ndarray, penalty: float, val: Pairs) -> str:
    """What speaks against a map `[T, H]` that `fit_ridge` has chosen; empty where nothing does.

    The penalty is the largest that is tried (a larger one might have been chosen; at the other end is 0, with nothing
    beyond), or its errors in validation are larger than those of the last value; or nothing chose it.
    """
    found = _mse(val, lambda x: ridge_forecast(x, weights))
    last = _mse(val, lambda x: np.repeat(x[:, -1:], weights.shape[1], axis=1))
    said = [f"its penalty is the largest that is tried, {penalty:g}"] if penalty == PENALTIES[-1] else []
    if np.isnan(found):
        return "none of the windows by which its penalty is chosen moves"
    if found > last:
        said.append(f"its validation MSE is {found:.4f}, that of the last value {last:.4f}")
    return ", and ".join(said)


def ridge_maps(xx: np.ndarray, xy: np.ndarray, penalties: np.ndarray) -> Iterator[np.ndarray]:
    """Ridge solutions `[T, H]`, one a penalty, from one eigendecomposition of xx `[T, T]`; with the penalty 0
    the least-squares solution of smallest norm."""
    eigenvalues, vectors = np.linalg.eigh(xx)
    eigenvalues = np.maximum(eigenvalues, 0)  # the sum of a normalised window is 0: one is, up to rounding
    none = eigenvalues <= eigenvalues[-1] * len(eigenvalues) * np.finfo(float).eps
    projected = vectors.T @ xy
    for penalty in penalties:
        scale = eigenvalues + penalty
        if penalty == 0:
            scale[none] = np.inf
        yield vectors @ (projected / scale[:, None])
