"""A CSV file, or a pandas frame of a program, read into numbers and timestamps.

Everything that can be wrong with either is found here, once, and named by file, row and column, so that the rest of the
program can trust a Table. Empty cells are an error too, or filled from the rows around them (`--fill_missing`).
"""

import gzip
import re
import zlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from data_provider.timestamps import gaps_in, infer_step, read_timestamps, step_words
from layers.errors import InputError, input_error, listed

FIRST_ROW_LINE = 2  # line 1 of a file is the header
FRAME = Path("frame")  # what a message calls a frame
LARGEST = 1e150  # squares of more overflow float64
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
NAMELESS = re.compile(r"Unnamed: [\d.]+")  # what pandas calls a column without a name
# Two common characters of GB 2312 in a row, or one alone that is no two signs, which no words of western languages are in
# Latin-1.
CHINESE = re.compile(
    "(?:[\xb0-\xd7][\xa1-\xfe]){2}|(?<![\\w\x80-\xff])(?:[\xb0-\xbf][\xc0-\xfe]|[\xc0-\xd7][\xa1-\xfe])(?![\\w\x80-\xff])"
)
# A whole number without or with groups of thousands (1.234), to which decimals come behind a comma.
GROUP = "[.' \u00a0\u202f]"
WHOLE = rf"[+-]?(?:\d*|[1-9]\d{{0,2}}(?:{GROUP}\d{{3}})+)"
EXPONENT = r"(?:[eE][+-]?\d+)?"
ENGLISH = r"[+-]?(?:\d{1,3}|[1-9]\d{0,2}(?:,\d{3})+)"  # a whole number, with commas between thousands


@dataclass(frozen=True)
class Table:
    """A whole file or frame: `values[i, j]` is column `columns[j]` at `dates[i]`; `only` takes the columns that are used."""

    path: Path
    dates: pd.DatetimeIndex  # [rows], never decreasing
    columns: list[str]  # [N], a file's own order, without `date`
    values: np.ndarray  # [rows, N] float64, finite; 0 in the columns of `wrong`
    filled: int = 0  # cells that were empty, where `only` has chosen the columns
    empty: dict[str, int] = field(default_factory=dict)  # the same of each column
    wrong: dict[str, InputError] = field(default_factory=dict)  # columns that are no numbers, and what is wrong
    read_as: str = ""  # what was found out about the file's format and dates, for people

    def only(self, names: Sequence[str]) -> "Table":
        """The table of some of its columns.

        Raises:
            InputError: one of their cells is no finite number.
        """
        for wrong in (self.wrong[name] for name in names if name in self.wrong):
            raise wrong
        values = self.values if names == self.columns else self.values[:, [self.columns.index(name) for name in names]]
        return replace(self, columns=list(names), values=values, filled=sum(self.empty.get(name, 0) for name in names))


def read_table(
    path: str | Path,
    fill_missing: str | None = None,
    encoding: str | None = None,
    date_column: str | None = None,
    id_column: str | None = None,
    drop_columns: Sequence[str] | None = None,
    dayfirst: bool | None = None,
) -> Table:
    """Read a CSV with a column of timestamps and columns of numbers (parameters as the flags of the same names).

    Commas, semicolons, tabs or bars separate the cells, with a decimal point or a decimal comma; a .gz file is
    decompressed. A first column without a name is an index and left out, where it has whole numbers.

    Args:
        fill_missing: how empty cells are filled; None: they are an error.
            "linear" draws a line, row by row, between the values before and after a gap (so a filled
            cell knows the value that follows it); at either end the nearest value is repeated.
            "ffill" repeats the last value before the gap; empty cells at the start stay an error.
        encoding: None: UTF-8 with or without a byte-order mark, UTF-16 with one, GB 18030 where that makes Chinese words,
            else Latin-1, which reads any byte.
        date_column: None: `date`, in whatever case, else a first column without a name.
        id_column: names the series of each row; they become columns, named "<series> <column>" where a row has several
            numbers. None: a row has all series.
        drop_columns: are not read.
        dayfirst: see `read_timestamps`.

    Raises:
        InputError: no such file, nothing in it, no column of timestamps, or timestamps unreadable, out of order or
            repeated. The line names the file, the row (line of the file, header = 1) and the column. Cells that are no
            finite numbers raise when they are used, see `Table.only`.
    """
    path = Path(path)
    cells, tried, separator, decimal = _read_csv(path, encoding, [date_column, id_column])
    cells, notes = _name_columns(path, cells, SEPARATORS[separator], date_column, drop_columns or [])
    if len(cells.columns) < 2:
        raise input_error(path, "no column beside 'date'", "at least one column of numbers")
    if cells.empty:
        raise input_error(path, "only a header and no rows", "rows of numbers")
    dates, order = read_timestamps(cells["date"], str(path), FIRST_ROW_LINE, dayfirst)
    rows: pd.Index = pd.RangeIndex(FIRST_ROW_LINE, FIRST_ROW_LINE + len(cells))
    if id_column is not None:
        cells = _pivot(path, cells, dates, rows, id_column)
        rows = dates = pd.DatetimeIndex(cells["date"], name=None)
    found = (tried != "utf-8-sig", f"encoding {tried}"), (separator != ",", f"{SEPARATORS[separator]}-separated")
    notes = [note for new, note in (*found, (decimal == ",", "decimal commas")) if new] + notes
    table = _table(path, cells, [*cells.columns.drop("date")], dates, rows, fill_missing, order, decimal)
    told = [f"{path} was read as: {', '.join(notes)}"] * bool(notes) + [table.read_as] * bool(table.read_as)
    return replace(table, read_as="; ".join(told))


def read_cells(path: Path, encoding: str | None = None) -> pd.DataFrame:
    """A CSV's cells as they stand; `encoding` None: see `read_table`.

    Raises:
        InputError: a file that cannot be read, or no regular table.
    """
    return _read_csv(path, encoding, ["text", "until", "known"])[0]


# The file's cells, encoding, separator and decimal sign; row i of the frame is line i + FIRST_ROW_LINE of the file.
def _read_csv(path: Path, encoding: str | None, texts: list[str | None]) -> tuple[pd.DataFrame, str, str, str]:
    try:
        for tried in _encodings(path) if encoding is None else [encoding]:
            with suppress(UnicodeError), _open(path, tried) as file:
                return _parse(path, file, tried, texts)
    except (OSError, EOFError, zlib.error) as error:
        raise input_error(path, f"an unreadable file ({getattr(error, 'strerror', None) or error})", "a CSV file") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise input_error(
            path, f"no regular table ({' '.join(str(error).split())})", "the same number of cells in every row"
        ) from None
    raise input_error(path, f"bytes that are not {tried}", "text", "--encoding names another encoding, such as gbk")


def _open(path: Path, encoding: str) -> IO[Any]:
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding=encoding, newline="")


# Those to try: the last one reads any byte.
def _encodings(path: Path) -> Iterator[str]:
    with _open(path, "latin-1") as file:  # a character a byte
        start = file.read(4)
        if start.startswith(("\x1f\x8b", "PK\3\4", "\xd0\xcf\x11\xe0")):
            raise input_error(path, "an Excel workbook or a packed file", "a CSV file, or one whose name ends in .gz")
        yield from ["utf-16", "utf-8-sig"] if start.startswith(("\xff\xfe", "\xfe\xff")) else ["utf-8-sig"]
        yield from ["gb18030", "latin-1"] if CHINESE.search(file.read()) else ["latin-1"]


# `texts`: columns that are no numbers.
def _parse(path: Path, file: IO[Any], encoding: str, texts: list[str | None]) -> tuple[pd.DataFrame, str, str, str]:
    lines = [re.sub('"[^"]*"', "", line) for line in file.readlines(1 << 14)]
    if not "".join(lines).strip():
        raise input_error(path, "an empty file", "a header line and rows of numbers")
    if not lines[0].strip():
        raise input_error(f"{path}: row 1", "an empty line", "the header")
    counts = {sign: [line.count(sign) for line in lines if line.strip()] for sign in SEPARATORS}
    # The one that every line has as often, else the one that the header has most.
    separator = max(counts, key=lambda sign: (counts[sign][0] and len(set(counts[sign])) == 1, counts[sign][0]))
    # In a comma-separated file "1,234" could be thousands, too: it does not show that commas are decimal.
    comma = WHOLE + (r",(?:\d{1,2}|\d{4,})" if separator == "," else r",\d+") + EXPONENT
    for decimal in ".,":
        file.seek(0)
        # Blank lines stay, so that a row's place tells its line in the file.
        cells = pd.read_csv(
            file, sep=separator, decimal=decimal, skip_blank_lines=False, low_memory=False,
            dtype=dict.fromkeys(["date", "Date", "DATE", *texts], str),
        )  # fmt: skip
        unread = [text.dropna().astype(str) for _, text in cells.select_dtypes(exclude="number").items()]
        # 999 beside 1,234 in a column of no other cells: there commas part thousands.
        unread = [text for text in unread if text.str.contains(",").all() or not text.str.fullmatch(ENGLISH).all()]
        if not any(text.str.fullmatch(comma).any() for text in unread):
            break
    if not isinstance(cells.index, pd.RangeIndex):  # pandas takes cells beyond the header for an index
        raise input_error(
            f"{path}: row {FIRST_ROW_LINE}", "more cells than the header", f"{len(cells.columns)} cells in every row"
        )
    filled = np.flatnonzero(cells.notna().any(axis=1))
    return cells.iloc[: filled[-1] + 1 if filled.size else 0], encoding, separator, decimal  # no empty lines at the end


# The cells with the timestamps in a column `date`, and without the columns that are left out; notes for the user.
def _name_columns(
    path: Path, cells: pd.DataFrame, separator: str, date: str | None, drop: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    names: list[str] = list(cells.columns)
    alike = [name for name in sorted(names, key="date".__ne__) if name.lower() == "date"]
    unnamed = NAMELESS.fullmatch(names[0]) and not pd.api.types.is_numeric_dtype(cells[names[0]])
    date = date or next(iter(alike), names[0] if unnamed else "date")
    if date not in names:
        raise input_error(
            path,
            f"the columns {names}"[:1000],
            f"a {separator}-separated file with a column {date!r}",
            "--date_column names that of the timestamps",
        )
    left_out = [name for name in names if name == "date" != date and name not in drop]
    for place, name in enumerate(names):
        if NAMELESS.fullmatch(name) and name not in (date, *drop):
            held = cells[name].dropna()
            # pandas writes an index of whole numbers first; a separator at the end of each line makes an empty column.
            if held.size and (place > len(left_out) or not pd.api.types.is_numeric_dtype(held) or (held % 1).any()):
                raise input_error(
                    f"{path}: row 1, column {place + 1}",
                    "no name",
                    "one for each column",
                    f"or leave it out: --drop_columns {name!r}",
                )
            left_out.append(name)
    notes = [
        *[f"timestamps in column {date!r}"] * (date != "date"),
        *(f"without column {name!r}" for name in left_out),
        *(f"WARNING: no column {name!r} to leave out" for name in drop if name not in names),
    ]
    unread = [name for name in names if name != date and name in (*left_out, *drop)]
    return cells.drop(columns=unread).rename(columns={date: "date"}), notes  # neither copies the values


# A row for each series and date -> a column for each series, and a row for each date in increasing order.
def _pivot(path: Path, cells: pd.DataFrame, dates: pd.DatetimeIndex, rows: pd.Index, id_column: str) -> pd.DataFrame:
    if id_column not in cells.columns or id_column == "date" or len(cells.columns) < 3:
        raise input_error(
            "--id_column",
            repr(id_column),
            f"one of {listed([*map(str, cells.columns.drop('date'))])}, beside a column of numbers",
        )
    cells = cells.set_axis(rows).assign(date=dates).drop_duplicates()
    bad = cells[cells[id_column].isna() | cells.duplicated(["date", id_column])]
    if len(bad):
        raise input_error(
            f"{path}: row {bad.index[0]}, column {id_column!r}",
            f"{str(bad[id_column].iloc[0])!r} at {bad['date'].iloc[0]}",
            "a name, and one row of each date with it",
        )
    wide, one = cells.pivot(index="date", columns=id_column), len(cells.columns) == 3
    names = wide.columns.map(lambda pair: str(pair[1]) if one else f"{pair[1]} {pair[0]}")
    return wide.set_axis(names, axis=1).reset_index()


def tables_of(
    frame: pd.DataFrame,
    columns: Sequence[str],
    id_column: str | None = None,
    fill: str | None = None,
    date_column: str | None = None,
    pivot_by: str | None = None,
    dayfirst: bool | None = None,
    drop_columns: Sequence[str] | None = None,
) -> dict[Hashable, Table]:
    """Read a frame with a column `date` or a DatetimeIndex.

    Args:
        columns: those that are read, numbers; others are left alone.
        id_column: names the series that each row belongs to; None: all rows are one series, which is called None.
        fill: as `fill_missing` of `read_table`, within a series.
        date_column, pivot_by: as `date_column` and `id_column` of `read_table`, for a frame that has such columns.
        dayfirst, drop_columns: as those of `read_table`.

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
    if date_column in frame.columns:  # another column of the name `date` is left alone, as in a file
        kept = (frame.columns == date_column) | (frame.columns != "date")
        frame = frame.loc[:, kept].rename(columns={date_column: "date"})
    if "date" not in frame.columns:
        if not isinstance(frame.index, pd.DatetimeIndex):
            raise input_error(FRAME, f"the columns {list(frame.columns)}"[:200], "a column 'date' or a DatetimeIndex")
        frame = frame.assign(date=frame.index)
    told = ""
    if pivot_by in frame.columns and id_column is None:
        unread = [name for name in frame.columns if name in (drop_columns or ()) or NAMELESS.fullmatch(str(name))]
        frame = frame.drop(columns=unread)
        dates, told = read_timestamps(frame["date"], str(FRAME), 0, dayfirst)
        frame = _pivot(FRAME, frame, dates, pd.RangeIndex(len(frame)), str(pivot_by))
    asked = [*columns, *([] if id_column is None else [id_column])]
    for name in ["date", *asked]:
        found = int((frame.columns == name).sum())
        if found != 1:
            raise input_error(
                FRAME,
                f"no column {name!r}" if not found else f"{found} columns {name!r}",
                f"the columns {listed(list(map(repr, asked)))}, each once",
            )
    dates, order = read_timestamps(frame["date"], str(FRAME), 0, dayfirst)
    if id_column is None:
        return {None: _table(FRAME, frame, columns, dates, dates, fill, told or order).only(columns)}
    if id_column in (*columns, "date"):
        raise input_error("id_column", repr(id_column), "a column that is not forecast, with the names of the series")
    unnamed = np.flatnonzero(frame[id_column].isna())
    if unnamed.size:
        raise input_error(f"{FRAME}: row {unnamed[0]}, column {id_column!r}", "no name", "the name of the row's series")
    groups = frame.groupby(id_column, sort=False, observed=True).indices
    return {
        name: _table(
            Path(f"{FRAME}, series {str(name)[:60]!r}"), frame.iloc[rows], columns, (own := dates[rows]), own, fill, order
        ).only(columns)
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
    decimal: str = ".",
) -> Table:
    values = np.empty((len(cells), len(columns)), order="F")  # column after column, as they are read
    counts, errors = {}, {}
    steps = np.diff(dates.asi8)
    new = np.append(True, steps != 0)
    for place, name in enumerate(columns):
        column = cells[name]
        usable = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        text = column if usable else column.astype(str)
        if decimal == "," and not usable:  # what pandas leaves: groups of thousands, and what is no number
            text = (
                text.where(text.str.fullmatch(WHOLE + r"(?:,\d*)?" + EXPONENT))
                .str.replace(GROUP, "", regex=True)
                .str.replace(",", ".")
            )
        numbers = pd.to_numeric(text, errors="coerce").astype(np.float64)
        empty = column.isna().to_numpy()
        if fill and np.isfinite(numbers[~empty]).all():
            once = numbers[new].ffill() if fill == "ffill" else numbers[new].interpolate(limit_direction="both")
            numbers = numbers.where(~empty, once.to_numpy()[np.cumsum(new) - 1])  # a row that stands twice is filled alike
        values[:, place] = numbers
        counts[name] = int((empty & new).sum())
        wrong = ~(np.abs(values[:, place]) <= LARGEST)  # NaN is wrong, too
        if wrong.any():
            errors[name] = _wrong_cell(f"{path}: row {rows[int(wrong.argmax())]}", column, wrong, fill)
            values[:, place] = 0
    # A row that repeats the one above it whole is let through: no value is in doubt, and weather.csv as distributed has one.
    # Of more they are left out: a window would see each value twice.
    bad = np.flatnonzero((steps < 0) | ((steps == 0) & (values[1:] != values[:-1]).any(axis=1)))
    if bad.size:
        above, own = (repr(str(cell)) for cell in cells["date"].iloc[bad[0] : bad[0] + 2])
        what = "is earlier than" if steps[bad[0]] < 0 else "repeats, with other values,"
        hint = "sort the rows by date; where a column names the series of each row, give it as "
        raise input_error(
            f"{path}: row {rows[int(bad[0]) + 1]}, column 'date'",
            f"{own}, which {what} the row above ({above})",
            "timestamps that increase",
            hint + ("id_column" if rows is dates else "--id_column"),
        )
    if 10 * (repeats := int((steps == 0).sum())) > len(steps):
        dates, values = dates[new], values[new]
        order += f"{'; ' if order else ''}{path}: {repeats} rows that repeat the one above them are left out"
    return Table(path, dates, list(columns), values, 0, counts, errors, order)


def _wrong_cell(row: str, cells: pd.Series, wrong: np.ndarray, fill: str | None) -> InputError:
    bad = cells[wrong]
    first: Any = bad.iloc[0]
    cell = "an empty cell (or NaN)" if pd.isna(first) else repr(str(first))
    size = np.abs(pd.to_numeric(str(first), errors="coerce"))
    kinds = {"a number with a decimal comma, as others of this file": size <= LARGEST, "a number": not size < np.inf}
    expected = next((kind for kind, fits in kinds.items() if fits), f"a number of at most {LARGEST:.0e}")
    hint = f"--drop_columns {cells.name!r} leaves the column out" if bad.size == cells.size else ""
    if bad.isna().all() and not cells.isna().all():
        hint = (
            "--fill_missing linear or ffill fills empty cells (in Python: fill_missing='linear')"
            if fill is None
            else f"--fill_missing {fill} has no value to fill it with, linear takes the one below"
        )
    count = f"({len(bad)} such cell{'s' if len(bad) > 1 else ''} in this column)"
    return input_error(f"{row}, column {cells.name!r}", f"{cell} {count}", expected, hint)


def check_rows(table: Table, length: int, step: str | None) -> None:
    """Set the last `length` rows, which a forecast goes on from, against those of a training.

    Args:
        step: that of the training in words, see `step_words`; None: it is not known.

    Raises:
        InputError: too few rows, another step, or a row missing among them.
    """
    if len(table.dates) < length:
        raise input_error(table.path, f"{len(table.dates)} rows", f"at least {length}, which the trained model reads")
    own = infer_step(table.dates)
    if step not in (None, step_words(own)):
        raise input_error(
            table.path, f"rows that are {step_words(own)} apart", f"{step}, the step of the training", table.read_as
        )
    if gaps := gaps_in(table.dates, own, length):
        raise input_error(
            table.path,
            "no row between {} and {}".format(*gaps[0]),
            f"a row every {step_words(own).removeprefix('1 ')}",
            "fill the gap; gaps that recur show in two weeks of rows",
        )
