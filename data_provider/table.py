"""A CSV file, or a pandas frame of a program, read into numbers and timestamps.

Everything that can be wrong with either is found here, once, and named by file, row and column, so that the rest of the
program can trust a Table. Empty cells are an error too, or filled from the rows around them (`--fill_missing`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_provider.timestamps import gaps_in, infer_step, read_timestamps, step_words
from layers.errors import InputError, input_error, listed

FIRST_ROW_LINE = 2  # line 1 of a file is the header
FRAME = Path("frame")  # what a message calls a frame
LARGEST = 1e150  # squares of more overflow float64


@dataclass(frozen=True)
class Table:
    """A whole file or frame: `values[i, j]` is column `columns[j]` at `dates[i]`."""

    path: Path
    dates: pd.DatetimeIndex  # [rows], never decreasing
    columns: list[str]  # [N], a file's own order, without `date`
    values: np.ndarray  # [rows, N] float64, finite
    filled: int = 0  # cells that were empty
    read_as: str = ""  # what was found out about the dates, for people


def read_table(path: str | Path, fill: str | None = None, dayfirst: bool | None = None) -> Table:
    """Read a CSV with a `date` column and numeric columns.

    UTF-8 with or without a byte-order mark, any line ending. Bytes that are
    not UTF-8 are taken as Latin-1, which reads any byte.

    Args:
        fill: how empty cells are filled; None: they are an error.
            "linear" draws a line, row by row, between the values before and after a gap (so a filled
            cell knows the value that follows it); at either end the nearest value is repeated.
            "ffill" repeats the last value before the gap; empty cells at the start stay an error.
        dayfirst: see `read_timestamps`.

    Raises:
        InputError: no such file, nothing in it, no `date` column, a cell that
            is no finite number, timestamps unreadable, out of order or
            repeated. The line names the file, the row (line of the file,
            header = 1) and the column.
    """
    path, cells = Path(path), _read_csv(Path(path))
    if "date" not in cells.columns:
        raise input_error(path, f"the columns {list(cells.columns)}"[:1000], "a comma-separated file with a column 'date'")
    columns = [name for name in cells.columns if name != "date"]
    if not columns:
        raise input_error(path, "no column beside 'date'", "at least one column of numbers")
    if cells.empty:
        raise input_error(path, "only a header and no rows", "rows of numbers")
    dates, order = read_timestamps(cells["date"], str(path), FIRST_ROW_LINE, dayfirst)
    lines = pd.RangeIndex(FIRST_ROW_LINE, FIRST_ROW_LINE + len(cells))
    return _table(path, cells, columns, dates, lines, fill, order)


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        try:
            return _parse(path, "utf-8-sig")
        except UnicodeDecodeError:
            return _parse(path, "latin-1")
    except FileNotFoundError:
        raise input_error(path, "no such file", "a CSV file") from None
    except OSError as error:
        raise input_error(path, f"an unreadable file ({error.strerror})", "a CSV file") from None
    except pd.errors.EmptyDataError:
        raise input_error(path, "an empty file", "a header line and rows of numbers") from None
    except pd.errors.ParserError as error:
        found = " ".join(str(error).split())
        raise input_error(path, f"no regular table ({found})", "the same number of cells in every row") from None


# The file's cells; row i of the frame is line i + FIRST_ROW_LINE of the file.
def _parse(path: Path, encoding: str) -> pd.DataFrame:
    with path.open(encoding=encoding, newline="") as file:
        blank = not file.readline().strip()
        file.seek(0)
        header = pd.read_csv(file, header=None, nrows=1, dtype=str).iloc[0]
        if blank:
            raise input_error(f"{path}: row 1", "an empty line", "the header")
        if header.isna().any():
            place = int(np.flatnonzero(header.isna())[0]) + 1
            raise input_error(f"{path}: row 1, column {place}", "no name", "one for each column", "or remove the column")
        file.seek(0)
        # Blank lines stay, so that a row's place tells its line in the file.
        cells = pd.read_csv(file, dtype={"date": str}, skip_blank_lines=False, low_memory=False)
    if not isinstance(cells.index, pd.RangeIndex):  # pandas takes cells beyond the header for an index
        expected = f"{len(header)} cells in every row"
        raise input_error(f"{path}: row {FIRST_ROW_LINE}", "more cells than the header", expected)
    filled = np.flatnonzero(cells.notna().any(axis=1))
    return cells.iloc[: filled[-1] + 1 if filled.size else 0]  # empty lines at the end are no rows


def tables_of(
    frame: pd.DataFrame,
    columns: Sequence[str],
    id_column: str | None = None,
    fill: str | None = None,
    dayfirst: bool | None = None,
) -> dict[Hashable, Table]:
    """Read a frame with a column `date` or a DatetimeIndex.

    Args:
        columns: those that are read, numbers; others are left alone.
        id_column: names the series that each row belongs to; None: all rows are one series, which is called None.
        fill: as that of `read_table`, within a series.
        dayfirst: as that of `read_table`.

    Returns:
        The series by name, in the order of their first rows.

    Raises:
        InputError: no frame, no rows, columns missing or twice there, a cell that is no finite number, dates that
            cannot be read, repeat or go back.
    """
    if not isinstance(frame, pd.DataFrame):
        raise input_error(FRAME, f"a {type(frame).__name__}", "a pandas.DataFrame")
    if frame.empty:
        raise input_error(FRAME, f"{len(frame)} rows of {len(frame.columns)} columns", "rows with a date and numbers")
    if "date" not in frame.columns:
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise input_error(FRAME, f"the columns {list(frame.columns)}"[:200], "a column 'date' or a DatetimeIndex")
        frame = frame.assign(date=frame.index)
    asked = [*columns, *([] if id_column is None else [id_column])]
    for name in ["date", *asked]:
        found = int((frame.columns == name).sum())
        if found != 1:
            got = f"no column {name!r}" if not found else f"{found} columns {name!r}"
            raise input_error(FRAME, got, f"the columns {listed(list(map(repr, asked)))}, each once")
    dates, order = read_timestamps(frame["date"], str(FRAME), 0, dayfirst)
    if id_column is None:
        return {None: _table(FRAME, frame, columns, dates, dates, fill, order)}
    if id_column in (*columns, "date"):
        raise input_error("id_column", repr(id_column), "a column that is not forecast, with the names of the series")
    unnamed = np.flatnonzero(frame[id_column].isna())
    if unnamed.size:
        place = f"{FRAME}: row {unnamed[0]}, column {id_column!r}"
        raise input_error(place, "no name", "the name of the row's series")
    groups = frame.groupby(id_column, sort=False, observed=True).indices
    return {
        name: _table(
            Path(f"{FRAME}, series {str(name)[:60]!r}"), frame.iloc[rows], columns, (own := dates[rows]), own, fill, order
        )
        for name, rows in sorted(groups.items(), key=lambda group: group[1][0])
    }


def _table(
    path: Path,
    cells: pd.DataFrame,
    columns: Sequence[str],
    dates: pd.DatetimeIndex,
    rows: pd.Index,  # what a message calls each row: a file's line, or a frame's date
    fill: str | None,
    order: str,  # of the dates, for people
) -> Table:
    values, filled = np.empty((len(cells), len(columns)), order="F"), 0  # column after column, as they are read
    for place, name in enumerate(columns):
        column = cells[name]
        usable = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        numbers = pd.to_numeric(column if usable else column.astype(str), errors="coerce").astype(np.float64)
        empty = column.isna().to_numpy()
        if fill and np.isfinite(numbers[~empty]).all():
            numbers = numbers.ffill() if fill == "ffill" else numbers.interpolate(limit_direction="both")
        values[:, place] = numbers
        filled += int(empty.sum())
        wrong = ~(np.abs(values[:, place]) <= LARGEST)  # NaN is wrong, too
        if wrong.any():
            raise _wrong_cell(f"{path}: row {rows[int(wrong.argmax())]}", column, wrong, fill)
    steps = np.diff(dates.asi8)
    # A row that repeats the one above it whole is let through: no value is in doubt, and weather.csv as distributed has one.
    # Of more they are left out: a window would see each value twice.
    bad = np.flatnonzero((steps < 0) | ((steps == 0) & (values[1:] != values[:-1]).any(axis=1)))
    if bad.size:
        above, own = (repr(str(cell)) for cell in cells["date"].iloc[bad[0] : bad[0] + 2])
        what = "is earlier than" if steps[bad[0]] < 0 else "repeats, with other values,"
        hint = "sort the rows by date; where a frame has several series, name the column of their names as id_column"
        raise input_error(
            f"{path}: row {rows[int(bad[0]) + 1]}, column 'date'",
            f"{own}, which {what} the row above ({above})",
            "timestamps that increase",
            hint if rows is dates else "",
        )
    if 10 * (repeats := int((steps == 0).sum())) > len(steps):
        dates, values = dates[np.append(True, steps > 0)], values[np.append(True, steps > 0)]
        order += f"{'; ' if order else ''}{path}: {repeats} rows that repeat the one above them are left out"
    return Table(path, dates, list(columns), values, filled, order)


def _wrong_cell(row: str, cells: pd.Series, wrong: np.ndarray, fill: str | None) -> InputError:
    bad = cells[wrong]
    first: Any = bad.iloc[0]
    got = "an empty cell (or NaN)" if pd.isna(first) else repr(str(first))
    got += f" ({len(bad)} such cell{'s' if len(bad) > 1 else ''} in this column)"
    large = pd.notna(first) and np.isfinite(pd.to_numeric(str(first), errors="coerce"))
    expected = f"a number of at most {LARGEST:.0e}" if large else "a number"
    hint = f"--fill_missing {fill} has no value to fill it with, linear takes the one below"
    if fill is None:
        hint = "--fill_missing linear or ffill fills empty cells (in Python: fill_missing='linear')"
    helps = bad.isna().all() and not cells.isna().all()
    return input_error(f"{row}, column {cells.name!r}", got, expected, hint if helps else "")


def check_rows(table: Table, length: int, step: str | None) -> None:
    """Set the last `length` rows, which a forecast goes on from, against those of a training.

    Args:
        step: that of the training in words, see `step_words`; None: it is not known.

    Raises:
        InputError: too few rows, another step, or a row missing among them.
    """
    if len(table.dates) < length:
        raise input_error(table.path, f"{len(table.dates)} rows", f"at least {length}, the seq_len of the training")
    own = infer_step(table.dates)
    if step not in (None, step_words(own)):
        raise input_error(
            table.path, f"rows that are {step_words(own)} apart", f"{step}, the step of the training", table.read_as
        )
    gaps = gaps_in(table.dates, own, length)
    if gaps:
        got, expected = "no row between {} and {}".format(*gaps[0]), f"a row every {step_words(own).removeprefix('1 ')}"
        raise input_error(table.path, got, expected, "fill the gap; gaps that recur show in two weeks of rows")
