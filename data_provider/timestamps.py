"""Timestamps: read from text, their step, and how they go on."""

import calendar
from itertools import product

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


def read_timestamps(cells: pd.Series, source: str, first_line: int) -> pd.DatetimeIndex:
    """Text cells `[rows]` as timestamps.

    Args:
        source: the file's name, for the message.
        first_line: line of the file on which the first cell stands.

    Raises:
        InputError: naming the first cell that cannot be read.
    """
    # pandas reads words such as "now" as the present moment: a timestamp has a digit.
    text = cells.where(cells.str.contains(r"\d", na=False))
    best = _parse(text, "ISO8601")
    if best.isna().any() and text.notna().all():
        best = _best_form(text, best)
    unread = np.flatnonzero(best.isna())
    if unread.size:
        cell = cells.iloc[unread[0]]
        found = "an empty cell" if pd.isna(cell) else repr(cell)
        raise input_error(
            f"{source}: row {unread[0] + first_line}, column 'date'", found, "a timestamp such as 2016-07-01 00:00:00"
        )
    return best


def _parse(text: pd.Series, form: str) -> pd.DatetimeIndex:
    try:
        return pd.DatetimeIndex(pd.to_datetime(text, format=form, errors="coerce"), name=None)
    except ValueError:  # offsets that change with daylight saving have UTC in common
        return pd.DatetimeIndex(pd.to_datetime(text, format=form, errors="coerce", utc=True), name=None)


def _best_form(text: pd.Series, best: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """The first form that reads every cell in increasing order, else the one that reads most."""
    for day, time in product(_DAYS, _TIMES):
        if _parse(text.iloc[:1], day + time).isna().all():
            continue
        read = _parse(text, day + time)
        if read.notna().all() and read.is_monotonic_increasing:
            return read
        if np.count_nonzero(read.notna()) > np.count_nonzero(best.notna()):
            best = read
    return best


def gaps_in(dates: pd.DatetimeIndex, step: pd.offsets.BaseOffset | None) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
    """Neighbouring timestamps that are not one step apart; none where no step is known, or for business days, whose gaps
    are holidays."""
    if step is None or isinstance(step, pd.offsets.BDay) or len(dates) < 2:
        return []
    expected = [date + step for date in dates[:-1]] if type(step) is pd.DateOffset else dates[:-1] + step
    late = np.flatnonzero(dates[1:] > pd.DatetimeIndex(expected))
    return list(zip(dates[late], dates[late + 1], strict=True))


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
    months = _month_step(dates)
    if months is not None:
        return months
    common = pd.Timedelta(int(lengths[counts.argmax()]), "us")
    if 2 * counts.max() < counts.sum():
        return None
    if common == pd.Timedelta(days=1) and _skips_weekends(dates):
        return pd.offsets.BDay()
    if common % pd.Timedelta(days=1) == pd.Timedelta(0):
        return pd.offsets.Day(common.days)  # a calendar day, also across a change of clocks
    return pd.tseries.frequencies.to_offset(common)


def _skips_weekends(dates: pd.DatetimeIndex) -> bool:
    """No Saturday or Sunday although the rows span one."""
    return dates.day_of_week.max() < 5 and (dates[-1] - dates[0]).days >= 5


def _month_step(dates: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """The step in whole months, where every row keeps to one rule for its day."""
    dates = dates.unique()
    steps, counts = np.unique(np.diff(dates.year * 12 + dates.month), return_counts=True)
    if steps[0] < 1 or 2 * counts.max() < counts.sum():
        return None
    step = int(steps[counts.argmax()])
    for rule in (pd.offsets.MonthBegin, pd.offsets.MonthEnd, pd.offsets.BMonthEnd, pd.offsets.BMonthBegin):
        if all(rule().is_on_offset(date) for date in dates):
            return rule(step)
    day = int(dates.day.max())  # the 30th of each month is the 28th in February
    kept = all(date.day == min(day, calendar.monthrange(date.year, date.month)[1]) for date in dates)
    return pd.DateOffset(months=step, day=day) if kept else None


def future_dates(dates: pd.DatetimeIndex, n: int, step: pd.offsets.BaseOffset | None = None) -> pd.DatetimeIndex:
    """The n timestamps `[n]` that follow the last of `dates` at the data's own step.

    Args:
        step: that of the dates, where it has been inferred already.

    Raises:
        InputError: no step is common to half of the rows.
    """
    step = infer_step(dates) if step is None else step
    if step is None:
        raise input_error(
            "column 'date'", "timestamps with no common step", "evenly spaced rows, which alone can be continued"
        )
    following, current = [], dates[-1]
    for _ in range(n):
        current = current + step
        following.append(current)
    return pd.DatetimeIndex(following, dtype=dates.dtype)
