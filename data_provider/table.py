"""A CSV file with a `date` column, read into numbers and timestamps.

Everything that can be wrong with such a file is found here, once, and named
by file, line and column, so that the rest of the program can trust a Table.
Empty cells are an error too, or filled from the rows around them (`--fill_missing`).
"""

import codecs
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_provider.timestamps import read_timestamps
from layers.errors import input_error

FIRST_ROW_LINE = 2  # line 1 of the file is the header
FILLS = ("linear", "ffill")
PIECE = 1 << 20  # bytes looked at at once


@dataclass(frozen=True)
class Table:
    """The whole file: `values[i, j]` is column `columns[j]` at `dates[i]`."""

    path: Path
    dates: pd.DatetimeIndex  # [rows], never decreasing
    columns: list[str]  # [N], the file's own order, without `date`
    values: np.ndarray  # [rows, N] float64, finite
    filled: int = 0  # cells that were empty in the file


def read_table(path: str | Path, fill: str | None = None) -> Table:
    """Read a CSV with a `date` column and numeric columns.

    UTF-8 with or without a byte-order mark, any line ending. Bytes that are
    not UTF-8 are taken as Latin-1, which reads any byte.

    Args:
        fill: how empty cells are filled, "linear" or "ffill" (see `fill_empty`); None: they are an error.

    Raises:
        InputError: no such file, nothing in it, no `date` column, a cell that
            is no finite number, timestamps unreadable, out of order or
            repeated. The line names the file, the row (line of the file,
            header = 1) and the column.
    """
    path = Path(path)
    frame = _parse(path, *_read(path))
    if "date" not in frame.columns:
        raise input_error(path, f"the columns {list(frame.columns)}"[:1000], "a comma-separated file with a column 'date'")
    columns = [name for name in frame.columns if name != "date"]
    if not columns:
        raise input_error(path, "no column beside 'date'", "at least one column of numbers")
    if frame.empty:
        raise input_error(path, "only a header and no rows", "rows of numbers")
    values = np.empty((len(frame), len(columns)), order="F")  # column after column, as they are read
    filled = 0
    for place, name in enumerate(columns):
        values[:, place] = _numbers(path, frame[name], fill)
        filled += int(frame[name].isna().sum())
    dates = read_timestamps(frame["date"], str(path), FIRST_ROW_LINE)
    _check_order(path, frame["date"], dates, values)
    return Table(path, dates, columns, values, filled)


def _read(path: Path) -> tuple[bytes, str]:
    """The file's bytes, and their encoding. They stay bytes: as text a file may take four times the memory."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise input_error(path, "no such file", "a CSV file") from None
    except OSError as error:
        raise input_error(path, f"an unreadable file ({error.strerror})", "a CSV file") from None
    encoding = _encoding(raw)
    if not _start(raw, encoding).strip() and not raw.decode(encoding).strip():
        raise input_error(path, "an empty file", "a header line and rows of numbers")
    return raw, encoding


def _start(raw: bytes, encoding: str) -> str:
    """The first PIECE of a file as text."""
    return raw[:PIECE].decode(encoding, "ignore")


def _encoding(raw: bytes) -> str:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for start in range(0, len(raw), PIECE):
            decoder.decode(raw[start : start + PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def _parse(path: Path, raw: bytes, encoding: str) -> pd.DataFrame:
    """The file's cells; row i of the frame is line i + FIRST_ROW_LINE of the file."""
    if not _start(raw, encoding).splitlines()[0].strip():
        raise input_error(f"{path}: row 1", "an empty line", "the header")
    header = _read_csv(path, raw, encoding, "the same number of", header=None, nrows=1, dtype=str).iloc[0]
    if header.isna().any():
        place = int(np.flatnonzero(header.isna())[0]) + 1
        raise input_error(f"{path}: row 1, column {place}", "no name", "one for each column", "or remove the column")
    # Blank lines stay, so that a row's place tells its line in the file.
    frame = _read_csv(path, raw, encoding, len(header), dtype={"date": str}, skip_blank_lines=False, low_memory=False)
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes cells beyond the header for an index
        raise input_error(f"{path}: row {FIRST_ROW_LINE}", "more cells than the header", f"{len(header)} cells in every row")
    filled = np.flatnonzero(frame.notna().any(axis=1))
    return frame.iloc[: filled[-1] + 1 if filled.size else 0]  # empty lines at the end are no rows


def _read_csv(path: Path, raw: bytes, encoding: str, cells: int | str, **options: Any) -> pd.DataFrame:
    """pandas' reader; a table that it refuses is an InputError, which says how many cells a row has to have."""
    try:
        return pd.read_csv(io.TextIOWrapper(io.BytesIO(raw), encoding, newline=""), **options)
    except pd.errors.ParserError as error:
        found = " ".join(str(error).split())
        raise input_error(path, f"no regular table ({found})", f"{cells} cells in every row") from None


def _numbers(path: Path, cells: pd.Series, fill: str | None) -> np.ndarray:
    """One column as float64 `[rows]`, all finite; empty cells are filled or an error."""
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        numbers = cells.to_numpy(np.float64)
    else:
        numbers = pd.to_numeric(cells.astype(str), errors="coerce").to_numpy(np.float64)
    wrong = ~np.isfinite(numbers)
    if fill and not (wrong & cells.notna().to_numpy()).any():
        numbers = fill_empty(numbers, fill)
        wrong = ~np.isfinite(numbers)
    bad = np.flatnonzero(wrong)
    if bad.size:
        cell = cells.iloc[bad[0]]
        found = "an empty cell (or NaN)" if pd.isna(cell) else repr(str(cell))
        raise input_error(
            f"{path}: row {bad[0] + FIRST_ROW_LINE}, column {cells.name!r}",
            f"{found} ({bad.size} such cell{'s' if bad.size > 1 else ''} in this column)",
            "a number",
            _offer(cells, bad, fill),
        )
    return numbers


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


def _offer(cells: pd.Series, bad: np.ndarray, fill: str | None) -> str:
    """What a message about empty cells says of filling them."""
    if cells.iloc[bad].notna().any() or cells.isna().all():
        return ""  # filling would not help
    if fill is None:
        return f"--fill_missing {' or '.join(FILLS)} fills empty cells"
    return f"--fill_missing {fill} has no value to fill it with, linear takes the one below"


def _check_order(path: Path, cells: pd.Series, dates: pd.DatetimeIndex, values: np.ndarray) -> None:
    """Timestamps must increase.

    A row that repeats the one above it whole, timestamp and values, is let
    through: the widely used weather.csv has one, and no value is in doubt.
    """
    steps = np.diff(dates.asi8)
    repeats = np.all(values[1:] == values[:-1], axis=1)
    bad = np.flatnonzero((steps < 0) | ((steps == 0) & ~repeats))
    if bad.size:
        at = bad[0] + 1
        what = "is earlier than" if steps[bad[0]] < 0 else "repeats, with other values,"
        raise input_error(
            f"{path}: row {at + FIRST_ROW_LINE}, column 'date'",
            f"{cells.iloc[at]!r}, which {what} the row above ({cells.iloc[at - 1]!r})",
            "timestamps that increase",
        )
