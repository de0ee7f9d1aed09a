"""Prediction intervals, calibrated on the errors of the validation windows; those of the future on the newest errors.

Split-conformal prediction (Papadopoulos et al., ECML 2002) with signed errors, so that both sides have their own
length (Linusson et al., PAKDD 2014), each divided by the deviation of its window's history (Lei et al., JASA 2018,
section 5.2): quiet hours get narrow bands. Of n errors that can be exchanged with the next one, the k-th smallest lies
above it with probability k / (n + 1); from this come the ranks below, and with them the promise: a truth lies below
the band's lower end with at most, and above its upper end with at most, half of what the level leaves. Each band reaches
at least to its own forecast, so that a biased model's holds it, too; its coverage is then more than was promised.

The best epoch, and the penalty of a linear map, are chosen on the same validation windows: docs/measured.md has what that
costs.

Shapes: W validation windows, N channels, H steps ahead, Q probabilities.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_provider.batches import Batch
from data_provider.data_loader import Series, SplitSeries
from layers.norm import instance_norm
from utils.saving.files import writing

LEVELS = (80.0, 95.0)  # per cent, unless --intervals says otherwise
DECILES = tuple(tenth / 10 for tenth in range(1, 10))  # what quantile losses of public leaderboards are taken at
LEAST = 0.2  # units that a band reaches to each side at least, where a column is mostly constant
LARGEST = 1e30  # an offset beyond is no number of deviations
KEPT = "errors.npy"  # `[W, N, H]` of the validation windows, then of the test's, in deviations of their histories
FLOOR = 0.05  # the least deviation of a history, as a part of the training's: a sensor stands still, rain has not begun
ERRORS_AT_ONCE = 1 << 23  # errors in memory at a time: 32 MB
POOL = 500  # windows, the newest, whose errors make the bands of forecasts of the future
RATE = 0.01  # how far a miss moves an adaptive band's level
EXACT = 10**8  # probabilities are whole numbers of these parts: 0.1 * 50 as a float lies beside 5


def ends(level: float) -> tuple[float, float]:
    """The probabilities of a band's lower and upper end: 80 % has 0.1 and 0.9."""
    low = round((100 - level) / 200, 8)
    return low, round(1 - low, 8)


# Those of the levels' ends, and the deciles, in order.
def probabilities(levels: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted({*DECILES, *(end for level in levels for end in ends(level))}))


def fewest_windows(level: float) -> int:
    """How many validation windows it takes to have one error beyond each end: 9 for 80 %, 39 for 95 %."""
    return -(-EXACT // round(ends(level)[0] * EXACT)) - 1


def name_of(level: float) -> str:
    """80.0 -> "80", 99.5 -> "99.5": as in the names of columns."""
    return f"{level:g}"


def units(x: torch.Tensor) -> torch.Tensor:
    """The unit of a window's band `[..., 1]`: the deviation of its history `[..., T]`, as the models normalise it, and at
    least FLOOR."""
    return instance_norm(x)[2].clamp(min=FLOOR)


def stds(x: np.ndarray) -> np.ndarray:
    """As `units`, for an array."""
    return units(torch.from_numpy(x)).numpy()


def quantiles(errors: np.ndarray, probabilities: Sequence[float]) -> np.ndarray:
    """Errors `[W, ...]` -> their quantiles `[Q, ...]` with the finite-sample correction; NaN where W is too small."""
    W, ordered = len(errors), np.sort(errors, axis=0)
    found = np.full((len(probabilities), *errors.shape[1:]), np.nan, dtype=np.float32)
    for row, probability in zip(found, probabilities, strict=True):
        parts = round(probability * EXACT) * (W + 1)
        rank = parts // EXACT if probability < 0.5 else -(-parts // EXACT)  # of two ranks the outer one
        if probability == 0.5:
            row[:] = (ordered[(W - 1) // 2] + ordered[W // 2]) / 2
        elif 1 <= rank <= W:
            row[:] = ordered[rank - 1]
    return found


@dataclass(frozen=True)
class Intervals:
    """The calibrated quantiles of a model's errors.

    Attributes:
        levels: per cent, those that were asked for.
        offsets: `[Q + 2, N, H]` float32, in units of a window, see `stds`: a quantile of the truth is the forecast plus
            offset times unit. NaN where the windows were too few. The last two rows are how far below and above its
            forecast each band reaches at least: see `intervals_of`.
        windows: how many were calibrated on, W.
        newest: calibrated on the newest POOL windows of validation and test: for forecasts of rows that neither has.
    """

    levels: tuple[float, ...]
    offsets: np.ndarray
    windows: int
    newest: "Intervals | None" = None

    def has(self, levels: Iterable[float]) -> bool:
        """Whether the ends of these levels were calibrated: those asked for, and 20, 40, 60 and 80 %."""
        return all(level in (*self.levels, 20, 40, 60, 80) and self.windows >= fewest_windows(level) for level in levels)

    # Offsets of the lower and the upper end, each `[N, H]`.
    def band(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        low, high = (self.offsets[probabilities(self.levels).index(end)] for end in ends(level))
        return np.minimum(low, self.offsets[-2]), np.maximum(high, self.offsets[-1])

    # These levels, of which all `has` to be there.
    def only(self, levels: Iterable[float]) -> "Intervals":
        levels, held = tuple(levels), probabilities(self.levels)
        kept = self.offsets[[*(held.index(end) for end in probabilities(levels)), -2, -1]]
        return Intervals(levels, kept, self.windows, self.newest and self.newest.only(levels))

    # Those of some channels.
    def of(self, places: Sequence[int]) -> "Intervals":
        kept = self.offsets[:, list(places)]
        return Intervals(self.levels, kept, self.windows, self.newest and self.newest.of(places))


def follow(errors: np.ndarray, origins: np.ndarray, dates: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Bands whose level follows their misses (adaptive conformal inference: Gibbs and Candes, NeurIPS 2021), each side by
    itself.

    Args:
        errors: `[O, N, H]` of past forecasts in units of their windows; NaN where they have not come true.
        origins: `[O]` the last date (or row) that each knew, in order.
        dates: `[O, H]` of their rows.

    Returns:
        The probabilities beyond the lower and the upper end that hold now, `[2, N]`; and `[O, N, H]` which truths lay in the
        bands that would have been forecast at the time, NaN where there were too few errors for one.
    """
    each, ranks, inside = ends(level)[0], np.full(errors.shape, np.nan), np.full(errors.shape, np.nan)
    beyond, at = np.full((2, errors.shape[1]), each), np.empty((len(errors), 2, errors.shape[1]))
    times = np.concatenate([origins[:1], origins, [dates.max()]])
    order = np.argsort(dates, axis=None, kind="stable")
    known_by = np.searchsorted(dates.ravel()[order], times, side="right")
    for o, now in enumerate(times[1:]):
        new = np.unravel_index(order[known_by[o] : known_by[o + 1]], dates.shape)
        found = ranks[new[0], :, new[1]]  # (rows that have just come true, N)
        if np.isfinite(found).any():
            missed = np.stack([found <= at[new[0], 0], 1 - found <= at[new[0], 1]]).sum(axis=1)
            beyond = beyond + RATE * (each - missed / np.isfinite(found).sum(axis=0).clip(min=1))
        if o == len(errors):
            break
        at[o] = beyond
        for h, error in enumerate(errors[o].T):  # its place among the errors that were known
            known = errors[: np.searchsorted(dates[:, h], now, side="right"), :, h][-POOL:]
            if len(known) >= fewest_windows(level):
                ranks[o, :, h] = ((known < error).sum(axis=0) + (known <= error).sum(axis=0) + 1) / (2 * len(known) + 2)
        ranks[o] += 0 * errors[o]
        held = (ranks[o] > beyond[0][:, None]) & (1 - ranks[o] > beyond[1][:, None])
        inside[o] = np.where(np.isnan(ranks[o]), np.nan, held)
    return beyond, inside


def recalibrated(errors: np.ndarray, levels: tuple[float, ...], beyond: dict[float, np.ndarray]) -> Intervals:
    """Intervals from the errors `[O, N, H]` of past forecasts, NaN where they have not come true; the newest POOL count.

    Args:
        beyond: of levels whose ends shall have other probabilities, those that `follow` has found.
    """
    held, rows = probabilities(levels), []
    for h in range(errors.shape[2]):
        known = errors[np.isfinite(errors[:, 0, h])][-POOL:, :, h]
        found = offsets_of(known, held)
        ordered, W = np.sort(known, axis=0), len(known)
        inner = np.inf, -np.inf  # a wider band holds the narrower one
        for level, (low, high) in sorted(beyond.items()):  # the ranks of `quantiles`, of each column its own
            places = np.floor(low * (W + 1)) - 1, W - np.floor(high * (W + 1))
            ranks = (place.clip(0, W - 1).astype(int)[None] for place in places)
            ends_now = (np.take_along_axis(ordered, rank, axis=0)[0] for rank in ranks)
            inner = tuple(outer(*pair) for outer, *pair in zip((np.minimum, np.maximum), ends_now, inner, strict=True))
            found[[held.index(end) for end in ends(level)]] = inner
        rows.append(found)
    return Intervals(levels, np.stack(rows, axis=-1), len(errors))


def continued(offsets: np.ndarray, steps: int) -> np.ndarray:
    """Offsets `[N, H]` of one end, for `steps` rows `[N, steps]` of a forecast that goes on from itself.

    Beyond H nothing was calibrated: there the band widens as if the errors of the rounds were independent, so
    that their squares add up. It never gets narrower where one round ends.
    """
    H = offsets.shape[1]
    rounds = np.arange(steps) // H
    per_step = offsets[:, np.arange(steps) % H]
    whole = offsets[:, -1:]
    return np.where(rounds, np.sign(whole) * np.hypot(np.sqrt(rounds) * whole, per_step), per_step)


def make_array(path: Path, shape: tuple[int, ...], part_of: Path) -> None:
    """Make a float32 .npy file of zeros, to be filled through memory maps.

    Its room on the disk is taken at once: a map that meets a full disk would end the program without a word.

    Args:
        part_of: the file that it becomes a part of, named in an error.

    Raises:
        StorageError: the file system refused.
    """
    with writing(part_of):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype="<f4", shape=shape)
        if hasattr(os, "posix_fallocate"):  # Linux
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def write_errors(path: Path, batch: Batch, forecast: torch.Tensor, after: int = 0) -> None:
    """Write the errors of whole windows, with their standardised forecasts `[M, H]`, into a file such as KEPT; `after` so
    many others."""
    first, B = after + int(batch.index[0]), len(batch.index)
    held = np.load(path, mmap_mode="r+")  # anew for each batch, so that memory holds no more than that
    errors = (batch.y - forecast) / units(batch.x)  # (M, H)
    held[first : first + B] = errors.view(B, *held.shape[1:]).float().cpu().numpy()  # batches are neighbours


def offsets_of(errors: np.ndarray, probabilities: Sequence[float]) -> np.ndarray:
    """The offsets of `Intervals`, `[Q + 2, ...]`, of errors `[W, ...]` in units of their windows.

    A column that is mostly constant, such as rain, has errors of 0 nearly always, and a band between their quantiles has no
    width. On a side where the quantile of 10 or of 90 % is nearer than the mean error of that side, they reach to it, or to
    LEAST; else they reach to the forecast.
    """
    found = quantiles(errors, probabilities)
    ends = np.stack([found[probabilities.index(end)] for end in (0.1, 0.9)])
    mean = np.stack([errors.clip(max=0).mean(axis=0), errors.clip(min=0).mean(axis=0)])
    reach = np.where(np.abs(ends) <= np.abs(mean), [mean[0].clip(max=-LEAST), mean[1].clip(min=LEAST)], 0)
    return np.concatenate([found, reach]).astype(np.float32)


def intervals_of(files: Sequence[Path], levels: tuple[float, ...], windows: slice = slice(None)) -> Intervals:
    """The intervals of the mean of the errors in these files, of some of their windows; memory holds a few channels."""
    W, N, H = np.load(files[0], mmap_mode="r")[windows].shape
    step = max(1, ERRORS_AT_ONCE // (W * H * len(files)))
    rows = []
    for first in range(0, N, step):
        errors = np.mean([np.load(file, mmap_mode="r")[windows, first : first + step] for file in files], axis=0)
        rows.append(offsets_of(errors, probabilities(levels)))
    return Intervals(levels, np.concatenate(rows, axis=1), W)


def has_errors(folder: Path, series: Series) -> bool:
    """Whether a pass over the validation windows of this series has left its errors in a folder."""
    file = folder / KEPT
    if not file.is_file() or not isinstance(series, SplitSeries):
        return file.is_file()
    windows = len(series.windows("val")) + len(series.windows("test"))
    return np.load(file, mmap_mode="r").shape == (windows, len(series.forecast_columns), series.pred_len)
