"""Empty cells of a column, filled from the rows around them (`--fill_missing`)."""

import numpy as np

FILLS = ("linear", "ffill")


def fill_empty(numbers: np.ndarray, how: str) -> np.ndarray:
    """Replace the NaN of a column `[rows]`; without any, or with nothing but NaN, it comes back as it is.

    Args:
        how: "linear" draws a line, row by row, between the values before and after a gap (so a filled
            cell knows the value that follows it); at either end the nearest value is repeated.
            "ffill" repeats the last value before the gap; empty cells at the start stay empty.
    """
    known = np.flatnonzero(~np.isnan(numbers))
    if known.size in (0, numbers.size):
        return numbers
    rows = np.arange(numbers.size)
    if how == "linear":
        return np.interp(rows, known, numbers[known])
    last = np.searchsorted(known, rows, side="right") - 1  # the last known row at or before each row
    return np.where(last >= 0, numbers[known[np.maximum(last, 0)]], np.nan)
