"""Baselines, which a forecast must beat: last value, last season, and a closed-form linear map.

All are measured on the standardised test windows of a series, as the model is.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_provider.data_loader import FileSeries, WindowDataset
from data_provider.m4 import M4Windows
from layers.norm import instance_norm
from utils.results.bands import Intervals, probabilities, quantiles, stds
from utils.results.metrics import Metrics

LAST, SEASON, RIDGE = "last value", "last season", "ridge"  # names in metrics.json
MOST_FITTED = 1_000_000  # training sequences that a ridge regression is fitted to; of more, every k-th window's
PENALTIES = np.append(0, np.logspace(-6, 2, 25))  # as parts of the total weight of the training sequences

Forecast = Callable[[np.ndarray], np.ndarray]  # x [M, T] -> [M, H]
Windows = WindowDataset | M4Windows


def measured(series: FileSeries, levels: tuple[float, ...] = ()) -> dict[str, Any]:
    """What metrics.json has of the baselines: {"of": what they were measured on, "rows": see `baselines`}."""
    every = fitted_every(series.windows("train"))
    of = {
        "file": series.path.name,
        "rows": len(series.dates),
        "columns": series.columns,
        "target": None if series.target_index is None else series.columns[series.target_index],
        "seq_len": series.seq_len,
        "pred_len": series.pred_len,
        "train_rows": series.splits.few_shot,
        "penalties": [float(PENALTIES[0]), float(PENALTIES[-1]), len(PENALTIES)],  # of the ridge regression
        **({"levels": list(levels)} if levels else {}),
        **({"fitted_every": every} if every > 1 else {}),
    }
    return {"of": of, "rows": baselines(series, levels=levels)}


def baselines(series: FileSeries, levels: tuple[float, ...] = ()) -> list[dict[str, Any]]:
    """Measure the naive forecasts and the ridge regression on the test windows.

    A season is that of the data's step (24 hours for steps below a day). Its row is left out where a season is one row or
    does not fit in seq_len.

    Args:
        levels: of the prediction intervals that they get as the models do, per cent.

    Returns:
        Rows of the comparison: name, title (for people), mse and mae on the standardised scale, seconds (fit and test),
        detail, and intervals: None, or "levels" with their coverage and width, and "wql", see `Metrics`.
    """
    H, step, season, began = series.pred_len, series.step, season_length(series.step), time.perf_counter()
    rows = [_row(LAST, "repeat the last value", "repeats x[T-1]", series, levels, began, lambda x: x[:, np.full(H, -1)])]
    if 1 < season <= series.seq_len:
        began, start, last_season = time.perf_counter(), pd.Timestamp("2001-01-01"), np.arange(H) % season - season
        daily = step is not None and start + season * step - start == pd.Timedelta(days=1)
        title, detail = f"repeat the last {'24 h' if daily else f'{season} rows'}", f"repeats the last {season} rows"
        rows.append(_row(SEASON, title, detail, series, levels, began, lambda x: x[:, last_season]))
    began, train = time.perf_counter(), series.windows("train")
    weights, penalty = fit_ridge(train, series.windows("val"))
    thinned = f", fitted to one training window in {every}" if (every := fitted_every(train)) > 1 else ""
    detail = f"linear map T to H, relative penalty {penalty:.2g}{thinned}"
    rows.append(_row(RIDGE, "ridge regression", detail, series, levels, began, lambda x: ridge_forecast(x, weights)))
    return rows


def season_length(step: pd.offsets.BaseOffset | None) -> int:
    """Rows of the shortest natural season of a series with this step between rows: a day, else a week, else a
    year; 1 where none is known."""
    if step is None or isinstance(step, pd.offsets.BDay):
        return 1 if step is None else 5
    start = pd.Timestamp("2001-01-01")
    length = (start + 12 * step - start) / 12  # months differ in length
    spans = (pd.Timedelta(days=days) for days in (1, 7, 365.25))
    return next((round(span / length) for span in spans if 2 * length <= span), 1)


# A row of the comparison; memory holds the errors of one channel.
def _row(
    name: str, title: str, detail: str, series: FileSeries, levels: tuple[float, ...], began: float, forecast: Forecast
) -> dict[str, Any]:
    kept, columns, val, intervals = series.forecast_slice, series.forecast_columns, series.windows("val"), None
    if levels:
        offsets = []
        for place in range(len(series.columns))[kept]:
            channel = copy.copy(val)
            channel.target_index = place
            errors = [((y - forecast(x)) / stds(x)).astype(np.float32) for x, y in channel.sequences()]
            offsets.append(quantiles(np.concatenate(errors), probabilities(levels)))
        intervals = Intervals(levels, np.stack(offsets, axis=1), len(val))
    metrics = Metrics(columns, series.mean[kept], series.std[kept], series.pred_len, intervals)
    for x, y in series.windows("test").sequences():
        metrics.add(*(torch.from_numpy(v).unflatten(0, (-1, len(columns))) for v in (forecast(x), y, stds(x))))
    found = metrics.result()
    held = found.get("intervals", {"levels": {}, "wql": None})
    brief = {level: {key: figures[key] for key in ("coverage", "width")} for level, figures in held["levels"].items()}
    return {
        "name": name,
        "title": title,
        "mse": found["standardised"]["all"]["mse"],
        "mae": found["standardised"]["all"]["mae"],
        "seconds": time.perf_counter() - began,
        "detail": detail,
        "intervals": {"levels": brief, "wql": held["wql"]} if levels else None,
    }


def ridge_forecast(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Forecast `[M, H]` from `[M, T]` with a map `[T, H]` of normalised windows."""
    z, mean, std = (v.numpy() for v in instance_norm(torch.from_numpy(x)))
    return z @ weights * std + mean


def fitted_every(windows: Windows) -> int:
    """k, where every k-th window is enough to fit a linear map to: neighbours say nearly the same, and a file of hundreds
    of channels has millions of sequences."""
    return -(-windows.sequence_count // MOST_FITTED)


# All that least squares needs of the normalised windows: xx `[T, T]`, xy `[T, H]`, and the total weight.
#
# Each sequence is weighted by its deviation to the `power`. Of very many, see `fitted_every`.
def _moments(windows: Windows, power: int) -> tuple[np.ndarray, np.ndarray, float]:
    xx, xy, total = np.zeros(()), np.zeros(()), 0.0
    for x, y in windows.sequences(fitted_every(windows)):
        z, mean, std = (v.numpy() for v in instance_norm(torch.from_numpy(x)))
        weighted = z * std**power  # (m, T)
        xx, xy = xx + weighted.T @ z, xy + weighted.T @ ((y - mean) / std)
        total += float((std**power).sum())
    return xx, xy, total


def fit_ridge(train: Windows, val: Windows) -> tuple[np.ndarray, float]:
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
    # All penalties from one eigendecomposition; without one, the least-squares solution of smallest norm.
    eigenvalues, vectors = np.linalg.eigh(xx)
    eigenvalues = np.maximum(eigenvalues, 0)  # the sum of a normalised window is 0: one is, up to rounding
    none = eigenvalues <= eigenvalues[-1] * len(eigenvalues) * np.finfo(float).eps
    projected = vectors.T @ xy
    candidates, errors = [], []
    for penalty in PENALTIES:
        scale = np.where(none & (penalty * total == 0), np.inf, eigenvalues + penalty * total)
        candidates.append(vectors @ (projected / scale[:, None]))
        # |z w - y|^2 summed over validation, without the part that no w changes
        errors.append(np.sum(candidates[-1] * (val_xx @ candidates[-1] - 2 * val_xy)))
    best = int(np.argmin(errors))
    return candidates[best], float(PENALTIES[best])


def doubts(weights: np.ndarray, penalty: float, val: Windows) -> str:
    """What speaks against a map `[T, H]` that `fit_ridge` has chosen; empty where nothing does.

    The penalty is the largest that is tried (a larger one might have been chosen; at the other end is 0, with nothing
    beyond), or its errors in validation are larger than those of the last value; or nothing chose it.
    """
    squares, count = np.zeros(2), 0
    for x, y in val.sequences():
        squares += np.square(ridge_forecast(x, weights) - y).sum(), np.square(x[:, -1:] - y).sum()
        count += y.size
    if not count:
        return "none of the windows by which its penalty is chosen moves"
    ridge, last = squares / count
    said = [f"its penalty is the largest that is tried, {penalty:g}"] if penalty == PENALTIES[-1] else []
    if ridge > last:
        said.append(f"its validation MSE is {ridge:.4f}, that of the last value {last:.4f}")
    return ", and ".join(said)
