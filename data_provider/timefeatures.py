"""Time marks: what the calendar says of each row, for models that read it."""

import numpy as np
import pandas as pd

from layers.errors import input_error

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
# Names of older pandas, in either case, that today's refuses or reads otherwise ("m" was a month, "t" a minute).
_OLD = {key: key for key in _SCALED} | {"y": "a", "l": "s", "u": "s", "n": "s"}
# Names that pandas reads in one case only.
_ALIASES = {"min": "t", "me": "m", "qs": "q", "qe": "q", "ys": "a", "ye": "a"}
# The longest unit of each row; a business month may reach from one week's end to another's.
_SPANS = {"s": "59s", "t": "59min", "h": "23h", "d": "1D", "w": "7D", "m": "40D", "q": "140D"}


def frequency_key(freq: str) -> str:
    """The row of the table above for `--freq`, any frequency that pandas reads: "15min" and "min" are "t".

    A unit without a row of its own has that of the nearest: half months that of months.

    Raises:
        InputError: unknown frequency.
    """
    name = freq.strip().lower().lstrip("0123456789").split("-")[0]
    if name in _OLD:
        return _OLD[name]
    try:
        return _nearest(pd.tseries.frequencies.to_offset(freq.strip()))
    except (ValueError, OverflowError):
        if name in _ALIASES:
            return _ALIASES[name]
    raise input_error("--freq", repr(freq), "one of s, t (or min, 15min), h, d, b, w, m, q, a")


def _nearest(offset: pd.offsets.BaseOffset) -> str:
    """The row of the table for the unit that an offset counts."""
    if isinstance(offset, pd.offsets.BusinessDay):  # CustomBusinessDay is one
        return "b"
    first = pd.Timestamp("2001-01-01") + offset.base
    span = first + offset.base - first
    return next((key for key, longest in _SPANS.items() if span <= pd.Timedelta(longest)), "a")


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
