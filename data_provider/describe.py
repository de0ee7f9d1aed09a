"""What can be read off a file with timestamps: its step in words, its frequency, a description for the prompt."""

import numpy as np
import pandas as pd

from data_provider.timestamps import infer_step

LISTED = 8  # names or ranges in a description; the prompt has room for a few dozen words
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def step_words(dates: pd.DatetimeIndex) -> str:
    """The step between rows for people: "15 minutes", "1 hour", "1 business day", "1 month"; "irregular"."""
    step = infer_step(dates)
    if step is None:
        return "irregular"
    if isinstance(step, pd.offsets.BDay):
        return _count(step.n, "business day")
    months = _months(step)
    if months:
        return _count(months // 12, "year") if months % 12 == 0 else _count(months, "month")
    seconds = _seconds(step)
    if seconds % 604800 == 0:
        return _count(int(seconds // 604800), "week")
    for unit, length in _UNITS:
        if seconds >= length and seconds % length == 0:
            return _count(int(seconds // length), unit)
    return f"{seconds:g} seconds"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _months(step: pd.DateOffset) -> int:
    """Whole months of a step; 0 for a step of fixed length."""
    kinds = (pd.offsets.MonthBegin, pd.offsets.MonthEnd, pd.offsets.BMonthBegin, pd.offsets.BMonthEnd)
    if isinstance(step, kinds):
        return step.n
    return step.kwds.get("months", 0)


def _seconds(step: pd.DateOffset) -> float:
    start = pd.Timestamp("2001-01-01")
    return (start + step - start).total_seconds()


def frequency(dates: pd.DatetimeIndex) -> str:
    """The `--freq` of a file: s, t, h, d, b, w, m; h where the rows have no common step."""
    step = infer_step(dates)
    if step is None:
        return "h"
    if isinstance(step, pd.offsets.BDay):
        return "b"
    if _months(step):
        return "m"
    seconds = _seconds(step)
    for freq, length in (("w", 604800), ("d", 86400), ("h", 3600), ("t", 60)):
        if seconds >= length and seconds % length == 0:
            return freq
    return "t" if seconds > 60 else "s"


def make_description(dates: pd.DatetimeIndex, columns: list[str], low: np.ndarray, high: np.ndarray) -> str:
    """A description for the prompt of a file that nobody has described: names, ranges, step, length.

    Args:
        low, high: `[N]` smallest and largest value of each column, in its own units.
    """
    shown = [f"{name} from {a:.4g} to {b:.4g}" for name, a, b in zip(columns, low, high, strict=True)]
    more = f" and {len(columns) - LISTED} more" if len(columns) > LISTED else ""
    step = step_words(dates)
    measured = "at irregular times" if step == "irregular" else f"every {step.removeprefix('1 ')}"
    series = "one series" if len(columns) == 1 else f"{len(columns)} series"
    return (
        f"The data hold {series}, measured {measured}, {len(dates)} rows from {dates[0]} to {dates[-1]}: "
        f"{', '.join(shown[:LISTED])}{more}."
    )
