"""Baselines, which a forecast must beat: last value, last season, and a closed-form linear map.

All are measured on the standardised test windows of a series, as the model is.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from data_provider.batches import Batch
from data_provider.data_loader import FileSeries, WindowDataset
from data_provider.m4 import M4Windows
from layers.norm import instance_norm
from models.LinearStack import Model as LinearStack
from utils.results.bands import Intervals, offsets_of, probabilities, stds
from utils.results.metrics import FEWEST, Metrics, difference

LAST, SEASON, RIDGE, SOURCE, STACK = (
    "last value",
    "last season",
    "ridge",
    "ridge of the source",
    "linear stack",
)  # names in metrics.json
MOST_FITTED = 1_000_000  # training sequences that a ridge regression is fitted to; of more, every k-th window's
PENALTIES = np.append(0, np.logspace(-6, 2, 25))  # as parts of the total weight of the training sequences
STACK_PENALTIES = 1e-6, 1e-4, 1e-3, 5e-3, 0.02, 0.07, 0.25, 1, 4
DEVIATION_PENALTIES = 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, np.inf  # the last one: the shared map as it is
EVENNESS = 0.03  # how strongly the weights of a stack are drawn towards equal ones
STACK_COST = 2 * 10**11  # multiplications of all pairs of a longest window's rows; beyond, every k-th window is fitted to
STACK_SEASONS, STACK_WINDOWS, STACK_ROWS = (5, 10, 15, 21, 30, 42), 4, 2200

Forecast = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x [M, T] and channels [M] -> [M, H]
Windows = WindowDataset | M4Windows
Moments = tuple[np.ndarray, np.ndarray, float]  # see `_moments`


def measured(
    series: FileSeries,
    levels: tuple[float, ...] = (),
    ours: np.ndarray | None = None,
    stack: LinearStack | None = None,
    source: FileSeries | None = None,
    season: int | None = None,
) -> dict[str, Any]:
    """What metrics.json has of the baselines, which are measured on the test windows of a series.

    Args:
        levels: of the prediction intervals that they get as the models do, per cent.
        ours: a model's figures by window, see `Metrics`, that theirs are compared with.
        stack: a fitted one, which gets a row.
        source: what the model was trained on, where that is another series: a ridge regression of it gets a row, too.
        season: rows of the season that is repeated; None: see `find_season`.

    Returns:
        "no season": why there is no such row; "rows": name, title (for people), mse and
        mae on the standardised scale, both by step, seconds (fit and test), detail, intervals: None, or "levels" with their
        coverage and width, and "wql", see `Metrics`; "difference": for mse, mae and wql what `difference` finds, ours less
        theirs.
    """
    every, rows, began = fitted_every(series.windows("train")), [], time.perf_counter()
    H, spans = series.pred_len, natural_seasons(series.step)
    season = find_season(series) if season is None else season

    # A row of the comparison, of a forecast from windows of `rows_read` rows.
    def add(name: str, title: str, detail: str, forecast: Forecast, rows_read: int = series.seq_len) -> None:
        nonlocal began
        rows.append(
            _row(name, title, detail, replace(series, seq_len=rows_read, history=0), levels, began, forecast, ours, block)
        )
        began = time.perf_counter()

    block = max(H, min(season, len(series.windows("test")) // FEWEST))
    add(LAST, "repeat the last value", "repeats x[T-1]", lambda x, _: x[:, np.full(H, -1)])
    if season > 1:
        last_season, words = np.arange(H) % season - season, {spans.get("day"): "24 h", spans.get("week"): "week"}
        title = f"repeat the last {words.get(season, f'{season} rows')}"
        add(SEASON, title, f"repeats the last {season} rows of the file", lambda x, _: x[:, last_season], season)
    thinned = f", fitted to one training window in {every}" if every > 1 else ""
    for origin in (series, source):
        if origin is not None:
            weights, penalty = fit_ridge(*origin.windows_for_a_map())
            title = "ridge regression" + (f" fitted to {origin.path.name}" if origin is source else "")
            detail = f"linear map T to H, relative penalty {penalty:.2g}{thinned}"
            name = RIDGE if origin is series else SOURCE
            add(name, title, detail, lambda x, _, weights=weights: ridge_forecast(x, weights))  # type: ignore[misc]
    if stack is not None:
        add(STACK, STACK, stack.title, lambda x, channel: _of_a_stack(stack, x, channel), stack.maps.shape[1])
    none = f"no natural season of rows {series.step_words} apart fits into the training rows (--season N sets one)"
    return {"rows": rows} | ({} if season > 1 else {"no season": none})


def find_season(series: FileSeries) -> int:
    """Rows of the day, week or year that repeats itself best in the training rows, by the mean square of what changes; 1
    where none of them fits in there twice."""
    known = series.values[: series.splits.few_shot, series.forecast_slice]
    fitting = [length for length in natural_seasons(series.step).values() if 2 * length <= len(known) - series.pred_len]
    return min(fitting, key=lambda length: np.square(known[length:] - known[:-length]).mean(), default=1)


def natural_seasons(step: pd.offsets.BaseOffset | None) -> dict[str, int]:
    """Rows of a day, a week and a year of a series with this step between rows, where that is at least 2."""
    if step is None or isinstance(step, pd.offsets.BDay):
        return {} if step is None else {"week": 5, "year": 261}
    start = pd.Timestamp("2001-01-01")
    length = (start + 12 * step - start) / 12  # months differ in length
    spans = {"day": pd.Timedelta(days=1), "week": pd.Timedelta(days=7), "year": pd.Timedelta(days=365.25)}
    return {name: round(span / length) for name, span in spans.items() if 2 * length <= span}


def _of_a_stack(stack: LinearStack, x: np.ndarray, channel: np.ndarray) -> np.ndarray:
    rows, columns = (torch.from_numpy(v).to(stack.maps.device) for v in (x, channel))
    return stack(Batch(rows.float(), rows[:, :0].float(), channel=columns)).cpu().double().numpy()


def season_length(step: pd.offsets.BaseOffset | None) -> int:
    """Rows of the shortest natural season of a series with this step between rows; 1 where none is known."""
    return next(iter(natural_seasons(step).values()), 1)


# A row of the comparison; memory holds the errors of one channel.
def _row(
    name: str,
    title: str,
    detail: str,
    series: FileSeries,
    levels: tuple[float, ...],
    began: float,
    forecast: Forecast,
    ours: np.ndarray | None,
    block: int,
) -> dict[str, Any]:
    kept, columns, intervals, bounds = series.forecast_slice, series.forecast_columns, None, series.standard_bounds

    def made(x: np.ndarray, channel: np.ndarray) -> np.ndarray:
        return forecast(x, channel) if bounds is None else forecast(x, channel).clip(*bounds[:, channel, None])

    if levels:
        offsets = []
        for n, place in enumerate(range(len(series.columns))[kept]):
            own = series.windows("val").sequences(column=place)
            errors = np.concatenate([(y - made(x, np.full(len(x), n))) / stds(x) for x, y in own]).astype(np.float32)
            offsets.append(offsets_of(errors, probabilities(levels)))
        intervals = Intervals(levels, np.stack(offsets, axis=1), len(series.windows("val")))
    W, first = len(series.windows("test")), 0
    metrics = Metrics(columns, series.mean[kept], series.std[kept], series.pred_len, intervals, bounds=bounds, windows=W)
    for x, y in series.windows("test").sequences():
        values = (made(x, np.resize(np.arange(len(columns)), len(x))), y, stds(x))
        forecasts, truths, unit = (torch.from_numpy(v).unflatten(0, (-1, len(columns))) for v in values)
        metrics.add(forecasts, truths, unit, torch.arange(first, first + len(forecasts)))
        first += len(forecasts)
    found, theirs = metrics.result(), metrics.by_window.numpy()
    held = found.get("intervals", {"levels": {}, "wql": None})
    brief = {level: {key: figures[key] for key in ("coverage", "width")} for level, figures in held["levels"].items()}
    of_all, compared = found["standardised"]["all"], {}
    if ours is not None:
        scales = {"mse": 1.0, "mae": 1.0}
        if held["wql"] is not None and theirs[2].any():
            scales["wql"] = held["wql"] / theirs[2].mean()
        compared = {
            figure: difference(ours[row] * scale, theirs[row] * scale, block)
            for row, (figure, scale) in enumerate(scales.items())
        }
    return {
        "name": name,
        "title": title,
        "mse": of_all["mse"],
        "mae": of_all["mae"],
        "steps": {figure: found["standardised"]["steps"][figure] for figure in ("mse", "mae")},
        "seconds": time.perf_counter() - began,
        "detail": detail,
        "intervals": {"levels": brief, "wql": held["wql"]} if levels else None,
        "difference": compared,
    }


def stack_windows(series: FileSeries) -> list[int]:
    """Rows of the windows of a linear stack: the longest of 5 to 42 days (of rows a day or more apart, see `season_length`)
    which leave half of the training rows for other windows; `seq_len` where there is none."""
    season, most = season_length(series.step), min(STACK_ROWS, series.splits.few_shot // 2 - series.pred_len)
    found = [times * season for times in STACK_SEASONS if season > 1 and times * season <= most]
    return found[-STACK_WINDOWS:] or [series.seq_len]


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
# Each sequence of every k-th window is weighted by its deviation to the `power`.
def _moments(windows: Windows, power: int, every: int, *column: int) -> Moments:
    xx, xy, total = np.zeros(()), np.zeros(()), 0.0
    for x, y in windows.sequences(every, *column):
        z, mean, std = (v.numpy() for v in instance_norm(torch.from_numpy(x)))
        weighted = z * std ** (power / 2)  # (m, T); its product with itself takes half the time of another one
        xx, xy = xx + weighted.T @ weighted, xy + weighted.T @ ((y - mean) * std ** (power / 2 - 1))
        total += float((std**power).sum())
    return xx, xy, total


# The map `[T, H]` of least squares with the penalty that has the lowest validation error, and that penalty: a part of the
# total weight. Input j is scaled by `scale[j]` before: a small one is penalised more.
def _choose(train: Moments, val: Moments, penalties: Iterable[float], scale: np.ndarray) -> tuple[np.ndarray, float]:
    xx, xy, total = train
    # All penalties from one eigendecomposition; without one, the least-squares solution of smallest norm.
    eigenvalues, vectors = np.linalg.eigh(xx * scale * scale[:, None])
    eigenvalues = np.maximum(eigenvalues, 0)  # the sum of a normalised window is 0: one is, up to rounding
    none = eigenvalues <= eigenvalues[-1] * len(eigenvalues) * np.finfo(float).eps
    vectors *= scale[:, None]
    projected, lowest, best = vectors.T @ xy, np.inf, (np.zeros_like(xy), np.inf)
    for penalty in penalties:
        divisor = np.where(none & (penalty * total == 0), np.inf, eigenvalues + penalty * total)
        weights = vectors @ (projected / divisor[:, None])
        # |z w - y|^2 summed over validation, without the part that no w changes
        error = np.sum(weights * (val[0] @ weights - 2 * val[1]))
        if error < lowest:
            lowest, best = error, (weights, float(penalty))
    return best


def fit_ridge(train: Windows, val: Windows, final: Windows | None = None) -> tuple[np.ndarray, float]:
    """One linear map for all channels, the penalty with the lowest validation MSE.

    A training sequence is weighted by its deviation. Unweighted, the few windows in which a sensor stood
    still (deviation near 0, ETTh2 has them) would decide the map; weighted by the variance, as the
    de-normalised loss does, the few wildest would. Of the three this one has the lowest validation error
    on ETTh1 and on ETTh2.

    Args:
        final: fitted to in the end, with the penalty that was chosen, in the place of `train`.

    Returns:
        weights `[T, H]`, and the penalty as a part of the total weight of the training sequences.
    """
    chosen_by = _moments(val, 2, fitted_every(val))  # errors count on the standardised scale
    ones = np.ones(train.seq_len)
    weights, penalty = _choose(_moments(train, 1, fitted_every(train)), chosen_by, PENALTIES, ones)
    if final is not None:
        weights, penalty = _choose(_moments(final, 1, fitted_every(final)), chosen_by, [penalty], ones)
    return weights, penalty


def fit_stack(series: FileSeries, members: Sequence[tuple[int, float]], deviating: Sequence[int]) -> dict[str, torch.Tensor]:
    """A few linear maps, and for each channel the weights of their mean; never one that validation alone has picked.

    Of wide files and long windows every k-th window is fitted to (STACK_COST); memory holds one channel's windows.

    Args:
        series: has the rows that the longest window takes before its own. Where `all_rows` train, penalties and weights are
            still those of its splits.
        members: of each map the rows T of its window, and q: input j is scaled by (1 + lag of j in seasons)^-q.
        deviating: places of members; each channel has one more map beside each, which deviates from it as validation says.

    Returns:
        The tensors of a `models.LinearStack`: maps `[K, L, H]` of windows of L rows, which take a level to itself; weights
        `[N, K]`; and deviations `[N, rows, H]`, what is to be added for each channel.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # only now: it takes half a second to load

    L, H, season = series.seq_len + series.history, series.pred_len, season_length(series.step)
    places = range(len(series.columns))[series.forecast_slice]
    every = -(-series.windows("train").sequence_count * L**2 // STACK_COST)

    chosen: dict[tuple[int, ...], list[float]] = {}  # penalties, by the member and the column
    split, shares = replace(series, all_rows=False), {}

    # A map `[T, H]` of what the shared one leaves to explain, of all columns or of one.
    def fit(rows: FileSeries, penalties: Iterable[float], shared: np.ndarray, k: int, *column: int) -> np.ndarray:
        T, q = members[k]
        train, val = (
            (xx, xy - xx @ shared, total)
            for windows, power in ((rows.windows("train", T), 1), (split.windows("val", T), 2))
            for xx, xy, total in [_moments(windows, power, every, *column)]
        )
        scale = (1 + np.arange(T)[::-1] / season) ** -q
        weights, *chosen[k, *column] = _choose(train, val, chosen.get((k, *column), penalties), scale)
        return weights

    for part in (split, series) if series.all_rows else (split,):  # penalties and shares are those of the first
        fitted = [fit(part, STACK_PENALTIES, np.zeros((T, H)), k) for k, (T, _) in enumerate(members)]
        maps = np.stack([np.pad(of - of.mean(axis=0) + 1 / len(of), ((L - len(of), 0), (0, 0))) for of in fitted])
        rows, shared = max((members[k][0] for k in deviating), default=0), len(members)
        count = shared + len(deviating)
        weights, deviations = np.zeros((len(places), shared)), np.zeros((len(places), rows, H))
        for n, place in enumerate(places):
            own = [
                np.pad(of - of.mean(axis=0), ((rows - len(of), 0), (0, 0)))
                for of in (fit(part, DEVIATION_PENALTIES, fitted[k], k, place) for k in deviating)
            ]
            if n not in shares:
                products = np.zeros((count, count))
                for x, y in split.windows("val", L).sequences(every, place):
                    z = x - x[:, -1:]
                    errors = [z @ of - (y - x[:, -1:]) for of in maps]
                    errors += [errors[k] + z[:, L - rows :] @ of for k, of in zip(deviating, own, strict=True)]
                    flat = np.reshape(errors, (count, -1))
                    products += flat @ flat.T
                products = products * count / max(np.trace(products), np.finfo(float).tiny) + EVENNESS * np.eye(count)
                # The least w'(products)w of weights from 0 on with the sum 1, where |w - 1/K|^2 is |w|^2 but for a number.
                tall = np.vstack([np.linalg.cholesky(products).T, np.full(count, 1e4)])
                shares[n] = nnls(tall, np.append(np.zeros(count), 1e4))[0]
            weights[n] = shares[n] @ np.vstack([np.eye(shared), np.eye(shared)[list(deviating)]])
            deviations[n] = np.tensordot(shares[n][shared:], np.reshape(own, (len(own), rows, H)), 1)
    tensors = (torch.from_numpy(values).float() for values in (maps, weights, deviations))
    return dict(zip(("maps", "weights", "deviations"), tensors, strict=True))


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
