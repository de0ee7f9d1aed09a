"""A pandas frame of a program as tables: one, or one a series where a column names them.

What `read_table` is for files, this is for frames: what can be wrong is found here and named by column, row or series.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.description import step_words
from data_provider.table import Table, fill_empty
from data_provider.timestamps import gaps_in, infer_step, read_timestamps
from layers.errors import input_error, listed

FRAME = Path("frame")  # what a message calls it
DATE = "date"


def tables_of(
    frame: pd.DataFrame, columns: Sequence[str], id_column: str | None = None, fill: str | None = None
) -> dict[Hashable, Table]:
    """Read a frame with a column `date` or a DatetimeIndex.

    Args:
        columns: those that are read, numbers; others are left alone.
        id_column: names the series that each row belongs to; None: all rows are one series, which is called None.
        fill: how empty cells are filled, "linear" or "ffill", within a series; None: they are an error.

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
    dates = _dates(frame)
    asked = [*columns, *([] if id_column is None else [id_column])]
    for name in asked:
        found = int((frame.columns == name).sum())
        if found != 1:
            got = f"no column {name!r}" if not found else f"{found} columns {name!r}"
            raise input_error(FRAME, got, f"the columns {listed(list(map(repr, asked)))}, each once")
    if id_column is None:
        return {None: _table(FRAME, frame, dates, columns, fill)}
    if id_column in (*columns, DATE):
        raise input_error("id_column", repr(id_column), "a column that is not forecast, with the names of the series")
    names = frame[id_column]
    if names.isna().any():
        row = int(np.flatnonzero(names.isna())[0])
        raise input_error(f"{FRAME}: row {row}, column {id_column!r}", "no name", "the name of the row's series")
    groups = frame.groupby(id_column, sort=False, observed=True).indices
    ordered = sorted(groups.items(), key=lambda group: group[1][0])
    return {
        name: _table(Path(f"{FRAME}, series {str(name)[:60]!r}"), frame.iloc[rows], dates[rows], columns, fill)
        for name, rows in ordered
    }


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
        raise input_error(table.path, f"rows that are {step_words(own)} apart", f"{step}, the step of the training")
    gaps = gaps_in(table.dates[-length:], own)
    if gaps:
        got = "no row between {} and {}".format(*gaps[0])
        raise input_error(table.path, got, f"a row every {step_words(own).removeprefix('1 ')}", "fill the gap")


def _dates(frame: pd.DataFrame) -> pd.DatetimeIndex:
    """The timestamps `[rows]` of a frame."""
    if DATE not in frame.columns:
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise input_error(FRAME, f"the columns {list(frame.columns)}"[:200], "a column 'date' or a DatetimeIndex")
        cells = frame.index.to_series(index=pd.RangeIndex(len(frame)))
    else:
        cells = frame[DATE]
        if isinstance(cells, pd.DataFrame):
            raise input_error(FRAME, f"{cells.shape[1]} columns 'date'", "one")
    if pd.api.types.is_datetime64_any_dtype(cells):
        dates = pd.DatetimeIndex(cells, name=None)
    elif pd.api.types.is_numeric_dtype(cells):
        raise input_error(f"{FRAME}: column 'date'", f"numbers such as {cells.iloc[0]}", "timestamps")
    else:
        text = cells.astype(object).map(str, na_action="ignore").reset_index(drop=True)
        dates = read_timestamps(text, str(FRAME), 0)
    missing = np.flatnonzero(dates.isna())
    if missing.size:
        raise input_error(f"{FRAME}: row {missing[0]}, column 'date'", "no date", "a timestamp")
    return dates


def _table(path: Path, frame: pd.DataFrame, dates: pd.DatetimeIndex, columns: Sequence[str], fill: str | None) -> Table:
    steps = np.diff(dates.asi8)
    back = np.flatnonzero(steps <= 0)
    if back.size:
        what = "repeats the row above" if steps[back[0]] == 0 else f"is earlier than the row above ({dates[back[0]]})"
        hint = "sort the rows by date; where several series are in one frame, name the column of their names as id_column"
        got = f"{dates[back[0] + 1]}, which {what}"
        raise input_error(f"{path}: column 'date'", got, "dates that increase", hint)
    values, filled = np.empty((len(frame), len(columns))), 0
    for n, name in enumerate(columns):
        empty = frame[name].isna().to_numpy()
        values[:, n] = _numbers(path, frame[name], dates, fill)
        filled += int(empty.sum())
    return Table(path, dates, list(columns), values, filled)


def _numbers(path: Path, cells: pd.Series, dates: pd.DatetimeIndex, fill: str | None) -> np.ndarray:
    """A column as float64 `[rows]`, all finite; empty cells are filled or an error."""
    usable = pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells)
    numbers = pd.to_numeric(cells if usable else cells.astype(str), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if fill and not (~np.isfinite(numbers) & cells.notna().to_numpy()).any():
        numbers = fill_empty(numbers, fill)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        cell = cells.iloc[wrong[0]]
        got = "NaN" if pd.isna(cell) else repr(cell)
        hint = "" if fill or not pd.isna(cell) else "fill the gaps, or load with fill_missing='linear' or 'ffill'"
        raise input_error(f"{path}: row {dates[wrong[0]]}, column {cells.name!r}", got, "a number", hint)
    return numbers
