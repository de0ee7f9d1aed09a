"""Time marks: what the calendar says of each row, for models that read it."""

import numpy as np
import pandas as pd

from layers.errors import InputError

# Calendar fields as (name, function of the index, lowest value, highest value).
_FIELDS = {
    "second": (lambda dates: dates.second, 0, 59),
    "minute": (lambda dates: dates.minute, 0, 59),
    "hour": (lambda dates: dates.hour, 0, 23),
    "weekday": (lambda dates: dates.day_of_week, 0, 6),
    "day": (lambda dates: dates.day, 1, 31),
    "yearday": (lambda dates: dates.day_of_year, 1, 366),
    "week": (lambda dates: dates.isocalendar().week, 1, 53),
    "month": (lambda dates: dates.month, 1, 12),
}
# Which fields say something at a frequency; the sets that GluonTS and the Time-Series-Library use.
_SCALED = {
    "s": ("second", "minute", "hour", "weekday", "day", "yearday"),
    "t": ("minute", "hour", "weekday", "day", "yearday"),
    "h": ("hour", "weekday", "day", "yearday"),
    "d": ("weekday", "day", "yearday"),
    "b": ("weekday", "day", "yearday"),
    "w": ("day", "week"),
    "m": ("month",),
    "q": ("month",),
    "a": ("month",),
}
_ALIASES = {"min": "t", "y": "a", "me": "m", "ms": "m", "qs": "q", "qe": "q", "ys": "a", "ye": "a"}


def frequency_key(freq: str) -> str:
    """The row of the table above for `--freq`: "15min" and "min" are "t", "h" is "h".

    Raises:
        InputError: unknown frequency.
    """
    name = freq.strip().lower().lstrip("0123456789").split("-")[0]
    key = _ALIASES.get(name, name)
    if key not in _SCALED:
        raise InputError(
            f"--freq {freq!r}: unknown; needed is one of s, t (or min, 15min), h, d, b, w, m, q, a"
        )
    return key


def time_marks(dates: pd.DatetimeIndex, freq: str, embed: str) -> np.ndarray:
    """Time marks `[rows, F]` float32 of a whole table at once.

    `embed="timeF"`: fields that fit `freq`, each scaled to [-0.5, 0.5].
    Otherwise the integers month, day, weekday, hour and, below an hour, minute.
    """
    key = frequency_key(freq)
    if embed == "timeF":
        marks = [_scaled(dates, name) for name in _SCALED[key]]
    else:
        names = ("month", "day", "weekday", "hour") + (("minute",) if key in ("s", "t") else ())
        marks = [np.asarray(_FIELDS[name][0](dates)) for name in names]
    return np.stack(marks, axis=1).astype(np.float32)


def _scaled(dates: pd.DatetimeIndex, name: str) -> np.ndarray:
    field, low, high = _FIELDS[name]
    return (np.asarray(field(dates), dtype=np.float64) - low) / (high - low) - 0.5
