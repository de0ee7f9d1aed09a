"""Prediction intervals: how far the truth lay from the validation windows' forecasts, by channel and step ahead.

Split-conformal prediction (Papadopoulos et al., ECML 2002) with signed errors, so that both sides have their own
length (Linusson et al., PAKDD 2014), each divided by the deviation of its window's history (Lei et al., JASA 2018,
section 5.2): quiet hours get narrow bands. Of n errors that can be exchanged with the next one, the k-th smallest lies
above it with probability k / (n + 1); from this come the ranks below, and with them the promise: a truth lies below
the band's lower end with at most, and above its upper end with at most, half of what the level leaves.

Shapes: W validation windows, N channels, H steps ahead, Q probabilities.
"""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from layers.norm import EPSILON

LEVELS = (80.0, 95.0)  # per cent, unless --intervals says otherwise
DECILES = tuple(tenth / 10 for tenth in range(1, 10))  # what quantile losses of public leaderboards are taken at
MOST_OFFSETS = 14_000_000  # as text 75 MB of the 100 MB that a safetensors header may have
LARGEST = 1e30  # an offset beyond is no number of deviations


def ends(level: float) -> tuple[float, float]:
    """The probabilities of a band's lower and upper end: 80 % has 0.1 and 0.9."""
    low = round((100 - level) / 200, 8)
    return low, round(1 - low, 8)


def probabilities(levels: Iterable[float]) -> tuple[float, ...]:
    """Those of the levels' ends, and the deciles, in order."""
    return tuple(sorted({*DECILES, *(end for level in levels for end in ends(level))}))


def rank(windows: int, probability: float) -> int | None:
    """Which of the errors in order, counted from 1, stands for a probability other than 1/2; None: they are too few."""
    exact = Fraction(round(probability * 10**8), 10**8) * (windows + 1)
    found = math.floor(exact) if probability < 0.5 else math.ceil(exact)
    return found if 1 <= found <= windows else None


def fewest_windows(level: float) -> int:
    """How many validation windows it takes to have one error beyond each end: 9 for 80 %, 39 for 95 %."""
    return math.ceil(1 / Fraction(round(ends(level)[0] * 10**8), 10**8)) - 1


def supported(levels: Sequence[float], windows: int) -> tuple[float, ...]:
    """Those of the levels that so many windows are enough for."""
    return tuple(level for level in levels if windows >= fewest_windows(level))


def name_of(level: float) -> str:
    """80.0 -> "80", 99.5 -> "99.5": as in the names of columns."""
    return f"{level:g}"


def deviations(x: np.ndarray) -> np.ndarray:
    """The unit of a window's band `[..., 1]`: the deviation of its history `[..., T]`, as the models normalise it."""
    return np.sqrt(x.var(axis=-1, keepdims=True) + EPSILON)


def quantiles(errors: np.ndarray, probabilities: Sequence[float]) -> np.ndarray:
    """Errors `[W, H]` -> their quantiles `[Q, H]` with the finite-sample correction; NaN where W is too small for one."""
    ordered = np.sort(errors, axis=0)
    rows = np.full((len(probabilities), errors.shape[1]), np.nan, dtype=np.float32)
    for row, probability in zip(rows, probabilities, strict=True):
        place = rank(len(ordered), probability)
        if probability == 0.5:
            row[:] = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        elif place is not None:
            row[:] = ordered[place - 1]
    return rows


@dataclass(frozen=True)
class Intervals:
    """The calibrated quantiles of a model's errors.

    Attributes:
        levels: per cent, those that were asked for.
        offsets: `[Q, N, H]` float32, in deviations of a window's history: a quantile of the truth is the forecast plus
            offset times deviation. NaN where the windows were too few.
        windows: how many were calibrated on, W.
    """

    levels: tuple[float, ...]
    offsets: np.ndarray
    windows: int

    @cached_property
    def probabilities(self) -> tuple[float, ...]:
        """Of the offsets' first axis."""
        return probabilities(self.levels)

    def has(self, levels: Iterable[float]) -> bool:
        """Whether the ends of these levels were calibrated: those asked for, and 20, 40, 60 and 80 %."""
        return all(level in (*self.levels, 20, 40, 60, 80) and self.windows >= fewest_windows(level) for level in levels)

    def band(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of the lower and the upper end, each `[N, H]`."""
        low, high = (self.offsets[self.probabilities.index(end)] for end in ends(level))
        return low, high

    def only(self, levels: Iterable[float]) -> "Intervals":
        """These levels, of which all `has` to be there."""
        levels = tuple(levels)
        rows = [self.probabilities.index(probability) for probability in probabilities(levels)]
        return Intervals(levels, self.offsets[rows], self.windows)

    def of(self, places: Sequence[int]) -> "Intervals":
        """Those of some channels."""
        return Intervals(self.levels, self.offsets[:, list(places)], self.windows)

    def encode(self) -> str:
        """As text, for a checkpoint's header."""
        values = base64.b64encode(np.ascontiguousarray(self.offsets, "<f4").tobytes()).decode()
        return json.dumps(
            {"levels": self.levels, "windows": self.windows, "shape": self.offsets.shape[1:], "offsets": values}
        )

    @classmethod
    def decode(cls, text: str) -> "Intervals":
        """What `encode` made; the text may be anyone's.

        Raises:
            ValueError: it is something else.
        """
        try:
            held = json.loads(text)
            levels, windows, shape = tuple(held["levels"]), held["windows"], held["shape"]
            sound = type(windows) is int and windows > 0 and len(levels) <= 100
            sound = sound and all(type(level) in (int, float) and 0 < level < 100 for level in levels)
            sound = sound and len({round(level, 4) for level in levels} & set(levels)) == len(levels)
            if not sound or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError
            values = np.frombuffer(base64.b64decode(held["offsets"], validate=True), "<f4")
            offsets = values.astype(np.float32).reshape(len(probabilities(levels)), *shape)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise ValueError("intervals that cannot be read") from None
        if np.isinf(offsets).any() or np.nanmax(np.abs(offsets), initial=0) > LARGEST:
            raise ValueError("intervals of numbers that are none")
        return cls(tuple(map(float, levels)), offsets, windows)


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
