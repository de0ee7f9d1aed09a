"""Timestamps: read from cells, their step and its name, how they go on, and the time marks that a model may read."""

import calendar
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, product

import numpy as np
import pandas as pd

from layers.errors import input_error

# Written forms of a day beside ISO 8601, and whether the day is first; None: no other order is written so.
# Month-first comes first, as pandas has it.
_DAYS = {
    order.replace("/", mark): order.startswith("%d")
    for order, mark in product(("%m/%d/%Y", "%m/%d/%y", "%d/%m/%Y", "%d/%m/%y"), "/-")
} | dict.fromkeys(
    ("%d.%m.%Y", "%d.%m.%y", "%y-%m-%d", "%y/%m/%d", "%d %b %Y", "%d %b %y", "%b %d %Y", "%d-%b-%Y", "%d-%b-%y")
    + ("%Y-%m-%d", "%Y/%m/%d", "%Y年%m月%d日")  # for the times that ISO 8601 does not have
)
_TIMES = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
_MONTHLY = (pd.offsets.MonthBegin, pd.offsets.MonthEnd, pd.offsets.BMonthEnd, pd.offsets.BMonthBegin)
_UNITS = ((604800, "week"), (86400, "day"), (3600, "hour"), (60, "minute"))
_START = pd.Timestamp("2001-01-01")  # a Monday
_DAY, _WEEK = 86400, 604800  # seconds

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


def read_timestamps(
    cells: pd.Series, source: str, first_row: int, dayfirst: bool | None = None, columns: Sequence[str] = ("date",)
) -> tuple[pd.DatetimeIndex, str]:
    """Cells `[rows]`, text or timestamps, as timestamps.

    Args:
        source: name of the file or frame, for the message.
        first_row: number of the first cell's row there.
        dayfirst: whether 01/02/2020 is in February, where both orders can be read; None: the order with even steps.
        columns: of which the cells are, one after the other, for the message.

    Returns:
        The timestamps; which order was taken, in words, empty where only one can be read.

    Raises:
        InputError: numbers, or naming the first cell that cannot be read.
    """
    if pd.api.types.is_datetime64_any_dtype(cells):
        best, note = pd.DatetimeIndex(cells, name=None), ""
    elif pd.api.types.is_numeric_dtype(cells):
        raise input_error(f"{source}: column 'date'", f"numbers such as {cells.iloc[0]}", "timestamps")
    else:
        cells = cells.astype("string")
        # pandas reads words such as "now" as the present moment: a timestamp has a digit.
        text = cells.where(cells.str.contains(r"\d", na=False))
        best, note = _parse(text, "ISO8601"), ""
        if best.isna().any() and text.notna().all():
            best, note = _best_form(text.str.replace(r"\s*(?:UTC|GMT)$", "Z", regex=True), source, dayfirst)
    if (unread := np.flatnonzero(best.isna())).size:
        found = "an empty cell" if pd.isna(cell := cells.iloc[unread[0]]) else repr(cell)
        column, row = divmod(int(unread[0]), len(cells) // len(columns))
        raise input_error(
            f"{source}: row {row + first_row}, column {columns[column]!r}", found, "a timestamp such as 2016-07-01 00:00:00"
        )
    return best, note


def _parse(text: pd.Series, form: str) -> pd.DatetimeIndex:
    try:
        return pd.DatetimeIndex(pd.to_datetime(text, format=form, errors="coerce"), name=None)
    except ValueError:  # offsets that change with daylight saving have UTC in common
        return pd.DatetimeIndex(pd.to_datetime(text, format=form, errors="coerce", utc=True), name=None)


def _best_form(text: pd.Series, source: str, dayfirst: bool | None) -> tuple[pd.DatetimeIndex, str]:
    # Of the forms that read most cells and step back least often, that of `dayfirst`, else the one with even steps:
    # months that are read as days leap once a year.
    marks = re.sub(r"\w", "", text.iloc[0])  # they rule out most forms at once
    read = [(_parse(text, "ISO8601"), None)] + [
        (_parse(text, form), order)
        for (day, order), time, zone in product(_DAYS.items(), _TIMES, ("", "%z"))
        if marks.startswith(re.sub(r"%.|\w", "", form := day + time + zone)) and _parse(text.iloc[:1], form).notna().all()
    ]
    found = [(_faults(dates, dayfirst not in (None, order)), dates, order) for dates, order in read]
    faults, best, order = min(found, key=lambda form: form[0])
    rivals = [  # of the other order, and as readable
        other for other, dates, first in found if first is (not order) and other[:2] == faults[:2] and not dates.equals(best)
    ]
    taken, left = ("day", "month") if order else ("month", "day")
    note = (
        f"{source}: {'WARNING: both orders of the dates fit; they' if faults in rivals else 'dates'} are read {taken} first "
        f"({text.iloc[-1]} is {best[-1]}), --dayfirst {not order} reads them {left} first"
    )
    return best, note if rivals and order is not None else ""


def _faults(dates: pd.DatetimeIndex, unasked: bool) -> tuple[int, int, bool, int]:
    # What speaks against a reading: cells not read, steps back, not the order that is asked for, uneven steps.
    known, step = dates.dropna(), infer_step(dates.dropna())
    return (
        len(dates) - len(known),
        int((np.diff(known.asi8) < 0).sum()),  # a frame of several series steps back in any order
        unasked,
        len(known) if step is None else len(gaps_in(known, step)),
    )


def infer_step(dates: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """The step between rows, a few gaps and repeats aside.

    Returns:
        An offset to add to the last timestamp: a fixed length (hours, minutes,
        days, weeks), a business day, or months (first, last, last business or
        the same day of the month). None where fewer than two rows or no step
        that at least half of the rows share exist; below a day they share one
        from which they differ by up to 15 %, as those of 30 Hz do that
        are written in milliseconds.
    """
    deltas = np.diff(dates.as_unit("us").asi8)
    deltas = deltas[deltas > 0]
    lengths, counts = np.unique(deltas, return_counts=True)
    if not lengths.size:
        return None
    if (months := _month_step(dates.unique())) is not None:
        return months
    common, shared = lengths[counts.argmax()], 2 * counts.max() >= counts.sum()
    away = np.abs(deltas / np.median(deltas) - 1)
    mean = deltas[away < 0.5].mean() / 1e6 if 2 * np.count_nonzero(away < 0.15) >= deltas.size else np.inf
    if mean < 1.2 * _DAY and not (shared and (common % (_DAY * 10**6) == 0 or abs(1e6 * mean / common - 1) < 1e-3)):
        sign = 1 if mean >= 1 else -1  # below a second it is a rate; in few digits it is the same in any part of the rows
        rate = next(few for n in range(1, 9) if abs((few := float(f"{mean**sign:.{n}g}")) / mean**sign - 1) < 3e-3)
        common, shared = 1e6 * rate**sign, True
    if not shared:
        return None
    common = pd.Timedelta(round(common), "us")
    if common == pd.Timedelta(days=1) and dates.day_of_week.max() < 5 and (dates[-1] - dates[0]).days >= 5:
        return pd.offsets.BDay()  # no Saturday or Sunday although the rows span one
    whole = common % pd.Timedelta(days=1) == pd.Timedelta(0)  # days of the calendar, also across a change of clocks
    return pd.offsets.Day(common.days) if whole else pd.tseries.frequencies.to_offset(common)


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


def step_words(step: pd.offsets.BaseOffset | None, dates: pd.DatetimeIndex | None = None) -> str:
    """A step of `infer_step` for people: "15 minutes", "1 hour", "1 business day", "1 month"; "irregular".

    With the `dates` of the rows also how many `open_times` they have, where they have such.
    """
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
    times = None if dates is None or unit == "business day" else open_times(dates, step)
    pattern = "" if times is None else f", at {len(times)} times of the week"
    return f"{count / length:.6g} {unit}{'' if count == length else 's'}{pattern}"


def open_times(dates: pd.DatetimeIndex, step: pd.offsets.BaseOffset | None) -> np.ndarray | None:
    """The times of a week, in seconds `[times]` since its Monday, at which rows stand in the last four weeks, on the dates'
    own clock: trading hours, or the days on which a shop is open.

    None where rows stand all the time or without a pattern, and for less than two weeks of rows, which do not show one.
    """
    length = np.inf if step is None else (_START + step - _START).total_seconds()
    recent = (wall := dates.unique().tz_localize(None))[wall > wall[-1] - pd.Timedelta(weeks=4)]
    if length > _DAY or length % 1 or recent[-1] - recent[0] < pd.Timedelta(weeks=2):
        return None
    times, counts = np.unique(_in_week(recent.round("s" if length % 60 else "min")), return_counts=True)
    weeks = (recent[-1] - recent[0]).total_seconds() / _WEEK
    often = 2 * counts >= int(weeks)  # once in four weeks is an exception
    closed, missing = 1 - len(times := times[often]) * length / _WEEK, 1 - len(recent) * length / (weeks * _WEEK + length)
    # Rows that are missing at random, or in one long gap, are mostly missing at other times.
    regular = 1e-9 < closed < 1 and closed >= 2 / 3 * missing and counts[often].mean() >= 0.7 * weeks
    # Times closer than that are of rows that jitter by minutes.
    return times if regular and np.diff(times, append=times[0] + _WEEK).min() >= length / 2 else None


def _in_week(wall: pd.DatetimeIndex) -> np.ndarray:
    return np.asarray((wall - _START).total_seconds() % _WEEK)


def gaps_in(
    dates: pd.DatetimeIndex, step: pd.offsets.BaseOffset | None, rows: float = np.inf
) -> list[tuple[pd.Timestamp, pd.Timestamp]]:
    """Neighbouring timestamps among the last `rows` that are one and a half steps apart or more.

    None where no step is known, or for business days, whose gaps are holidays. Where rows keep to some times of the week
    (`open_times`), the times between are no gaps, nor are holidays: days without a row.
    """
    if step is None or isinstance(step, pd.offsets.BDay) or len(dates) < 2:
        return []
    wall = dates if isinstance(step, pd.offsets.Tick) else dates.tz_localize(None)  # days go by the clock on the wall
    following = [date + step for date in wall[:-1]] if type(step) is pd.DateOffset else wall[:-1] + step
    late = (apart := wall[1:] - wall[:-1]) >= 1.5 * (pd.DatetimeIndex(following) - wall[:-1])
    if (times := open_times(dates, step)) is not None:
        now, half = _in_week(dates.tz_localize(None)), (_START + step - _START).total_seconds() / 2
        due, came = (np.searchsorted(times, at) % len(times) for at in (now[:-1] + half, now[1:] - half))
        late &= (due != came) & (apart < pd.Timedelta(days=1))
    return [(dates[place], dates[place + 1]) for place in np.flatnonzero(late).tolist() if place >= len(dates) - rows]


def future_dates(dates: pd.DatetimeIndex, n: int, step: pd.offsets.BaseOffset | None) -> pd.DatetimeIndex:
    """The n timestamps `[n]` that follow the last of `dates`, at its `open_times` where it has such.

    Raises:
        InputError: no step is common to half of the rows.
    """
    if step is None:
        uneven = int(np.abs(np.diff(dates.asi8, 2)).argmax()) if len(dates) > 2 else 0
        raise input_error(
            "column 'date'",
            f"timestamps with no common step ({', '.join(map(str, dates[uneven : uneven + 3]))})",
            "even steps, to be continued",
        )
    times = open_times(dates, step)
    wall = dates if times is None and isinstance(step, pd.offsets.Tick) else dates.tz_localize(None)
    if times is None:
        # The last day may itself have lacked its usual time.
        usual = wall[-2] + step if wall.tz is None and dates.tz is not None else wall[-1]
        shifted = usual == wall[-1] or usual.tz_localize(dates.tz, ambiguous=False, nonexistent="shift_forward") == dates[-1]
        ahead = pd.DatetimeIndex(list(accumulate([usual if shifted else wall[-1], *[step] * n]))[1:], dtype=wall.dtype)
    else:
        after = _WEEK * np.arange(n // len(times) + 2)[:, None] + times - _in_week(wall[-1:])
        ahead = (wall[-1] + pd.to_timedelta(after.ravel(), unit="s")).round("s").as_unit(dates.unit)
        ahead = ahead[ahead >= wall[-1] + (_START + step - _START) / 2][:n]
    if ahead.tz is None:  # of an hour that clocks leave out the next is taken, of two the second
        ahead = ahead.tz_localize(dates.tz, ambiguous=np.zeros(n, dtype=bool), nonexistent="shift_forward")
    return ahead.round("ms") if dates.tz is None and (dates == dates.round("ms")).all() else ahead


def frequency(step: pd.offsets.BaseOffset | None) -> str:
    """The `--freq` of a step of `infer_step`: s, t, h, d, b, w, m; h where the rows have no common step."""
    if step is None:
        return "h"
    if type(step) is pd.DateOffset:
        return "m"
    return "w" if isinstance(step, pd.offsets.Day) and step.n % 7 == 0 else _nearest(step)


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
        with suppress(ValueError, OverflowError):
            return _nearest(pd.tseries.frequencies.to_offset(written))
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
