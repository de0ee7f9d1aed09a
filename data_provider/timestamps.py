"""Timestamps: read from cells, their step and its name, how they go on, and the time marks that a model may read."""

import calendar
from itertools import accumulate, product

import numpy as np
import pandas as pd

from layers.errors import input_error

# Written forms beside ISO 8601. Month-first comes first, as pandas has it;
# a file whose timestamps would not increase under it is read day-first.
_DAYS = (
    "%m/%d/%Y",
    "%d/%m/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%d %b %Y",
    "%b %d %Y",
    "%d-%b-%Y",
    "%Y年%m月%d日",
)
_TIMES = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
_MONTHLY = (pd.offsets.MonthBegin, pd.offsets.MonthEnd, pd.offsets.BMonthEnd, pd.offsets.BMonthBegin)
_UNITS = ((604800, "week"), (86400, "day"), (3600, "hour"), (60, "minute"))
_START = pd.Timestamp("2001-01-01")

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
# The longest unit of each row; a business month may reach from one week's end to another's.
_SPANS = {"s": "59s", "t": "59min", "h": "23h", "d": "1D", "w": "7D", "m": "40D", "q": "140D"}


def read_timestamps(cells: pd.Series, source: str, first_row: int) -> pd.DatetimeIndex:
    """Cells `[rows]`, text or timestamps, as timestamps.

    Args:
        source: name of the file or frame, for the message.
        first_row: number of the first cell's row there.

    Raises:
        InputError: numbers, or naming the first cell that cannot be read.
    """
    if pd.api.types.is_datetime64_any_dtype(cells):
        best = pd.DatetimeIndex(cells, name=None)
    elif pd.api.types.is_numeric_dtype(cells):
        raise input_error(f"{source}: column 'date'", f"numbers such as {cells.iloc[0]}", "timestamps")
    else:
        cells = cells.astype("string")
        # pandas reads words such as "now" as the present moment: a timestamp has a digit.
        text = cells.where(cells.str.contains(r"\d", na=False))
        best = _parse(text, "ISO8601")
        if best.isna().any() and text.notna().all():
            best = _best_form(text, best)
    unread = np.flatnonzero(best.isna())
    if unread.size:
        cell = cells.iloc[unread[0]]
        found = "an empty cell" if pd.isna(cell) else repr(cell)
        place = f"{source}: row {unread[0] + first_row}, column 'date'"
        raise input_error(place, found, "a timestamp such as 2016-07-01 00:00:00")
    return best


def _parse(text: pd.Series, form: str) -> pd.DatetimeIndex:
    try:
        return pd.DatetimeIndex(pd.to_datetime(text, format=form, errors="coerce"), name=None)
    except ValueError:  # offsets that change with daylight saving have UTC in common
        return pd.DatetimeIndex(pd.to_datetime(text, format=form, errors="coerce", utc=True), name=None)


def _best_form(text: pd.Series, best: pd.DatetimeIndex) -> pd.DatetimeIndex:
    # The first form that reads every cell in increasing order, else the one that reads most.
    for day, time in product(_DAYS, _TIMES):
        if _parse(text.iloc[:1], day + time).isna().all():
            continue
        read = _parse(text, day + time)
        if read.notna().all() and read.is_monotonic_increasing:
            return read
        if np.count_nonzero(read.notna()) > np.count_nonzero(best.notna()):
            best = read
    return best


def infer_step(dates: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """The step between rows, a few gaps and repeats aside.

    Returns:
        An offset to add to the last timestamp: a fixed length (hours, minutes,
        days, weeks), a business day, or months (first, last, last business or
        the same day of the month). None where fewer than two rows or no step
        that at least half of the rows share exist.
    """
    deltas = np.diff(dates.as_unit("us").asi8)
    lengths, counts = np.unique(deltas[deltas > 0], return_counts=True)
    if not lengths.size:
        return None
    months = _month_step(dates.unique())
    if months is not None:
        return months
    common = pd.Timedelta(int(lengths[counts.argmax()]), "us")
    if 2 * counts.max() < counts.sum():
        return None
    if common == pd.Timedelta(days=1) and dates.day_of_week.max() < 5 and (dates[-1] - dates[0]).days >= 5:
        return pd.offsets.BDay()  # no Saturday or Sunday although the rows span one
    if common % pd.Timedelta(days=1) == pd.Timedelta(0):
        return pd.offsets.Day(common.days)  # a calendar day, also across a change of clocks
    return pd.tseries.frequencies.to_offset(common)


def _month_step(dates: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    # The step in whole months, where every row keeps to one rule for its day.
    steps, counts = np.unique(np.diff(dates.year * 12 + dates.month), return_counts=True)
    if steps[0] < 1 or 2 * counts.max() < counts.sum():
        return None
    step = int(steps[counts.argmax()])
    for rule in _MONTHLY:
        if all(rule().is_on_offset(date) for date in dates):
            return rule(step)
    day = int(dates.day.max())  # the 30th of each month is the 28th in February
    kept = all(date.day == min(day, calendar.monthrange(date.year, date.month)[1]) for date in dates)
    return pd.DateOffset(months=step, day=day) if kept else None


def step_words(step: pd.offsets.BaseOffset | None) -> str:
    """A step of `infer_step` for people: "15 minutes", "1 hour", "1 business day", "1 month"; "irregular"."""
    if step is None:
        return "irregular"
    months = step.n if isinstance(step, _MONTHLY) else step.kwds.get("months", 0)
    if isinstance(step, pd.offsets.BDay):
        count, length, unit = float(step.n), 1, "business day"
    elif months:
        count, length, unit = months, *((1, "month") if months % 12 else (12, "year"))
    else:
        count = (_START + step - _START).total_seconds()
        length, unit = next((pair for pair in _UNITS if count % pair[0] == 0), (1, "second"))
    return f"{count / length:.15g} {unit}{'' if count == length else 's'}"


def gaps_in(dates: pd.DatetimeIndex, step: pd.offsets.BaseOffset | None) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
    """Neighbouring timestamps that are not one step apart; none where no step is known, or for business days, whose gaps
    are holidays."""
    if step is None or isinstance(step, pd.offsets.BDay) or len(dates) < 2:
        return []
    expected = [date + step for date in dates[:-1]] if type(step) is pd.DateOffset else dates[:-1] + step
    late = np.flatnonzero(dates[1:] > pd.DatetimeIndex(expected))
    return list(zip(dates[late], dates[late + 1], strict=True))


def future_dates(dates: pd.DatetimeIndex, n: int, step: pd.offsets.BaseOffset | None) -> pd.DatetimeIndex:
    """The n timestamps `[n]` that follow the last of `dates`.

    Raises:
        InputError: no step is common to half of the rows.
    """
    if step is None:
        raise input_error("column 'date'", "timestamps with no common step", "evenly spaced rows, to be continued")
    return pd.DatetimeIndex(list(accumulate([dates[-1], *[step] * n]))[1:], dtype=dates.dtype)


def frequency(step: pd.offsets.BaseOffset | None) -> str:
    """The `--freq` of a step of `infer_step`: s, t, h, d, b, w, m; h where the rows have no common step."""
    if step is None:
        return "h"
    if type(step) is pd.DateOffset:
        return "m"
    weeks = isinstance(step, pd.offsets.Day) and step.n % 7 == 0
    return "w" if weeks else _nearest(step)


def frequency_key(freq: str) -> str:
    """The row of time marks for `--freq`, any frequency that pandas reads: "15min" and "min" are "t".

    A unit without a row of its own has that of the nearest: half months that of months.

    Raises:
        InputError: unknown frequency.
    """
    name = freq.strip().lower().lstrip("0123456789").split("-")[0]
    if name in _OLD:
        return _OLD[name]
    for written in (freq.strip(), freq.strip().upper()):  # some names pandas reads in one case only
        try:
            return _nearest(pd.tseries.frequencies.to_offset(written))
        except (ValueError, OverflowError):
            pass
    raise input_error("--freq", repr(freq), "one of s, t (or min, 15min), h, d, b, w, m, q, a")


def _nearest(offset: pd.offsets.BaseOffset) -> str:
    # The row of time marks for the unit that an offset counts.
    if isinstance(offset, pd.offsets.BusinessDay):  # CustomBusinessDay is one
        return "b"
    span = _START + offset.base + offset.base - (_START + offset.base)  # from one to the next, wherever the first lies
    return next((key for key, longest in _SPANS.items() if span <= pd.Timedelta(longest)), "a")


def time_marks(dates: pd.DatetimeIndex, freq: str, embed: str) -> np.ndarray:
    """Time marks `[rows, F]` float32 of a whole table at once.

    `embed="timeF"`: fields that fit `freq`, each scaled to [-0.5, 0.5].
    Otherwise the integers month, day, weekday, hour and, below an hour, minute.
    """
    key = frequency_key(freq)
    names: tuple[str, ...] = ("month", "day", "weekday", "hour") + (("minute",) if key in ("s", "t") else ())
    marks = []
    for name in _SCALED[key] if embed == "timeF" else names:
        field, low, high = _FIELDS[name]
        values = np.asarray(field(dates), dtype=np.float64)
        marks.append((values - low) / (high - low) - 0.5 if embed == "timeF" else values)
    return np.stack(marks, axis=1).astype(np.float32)
