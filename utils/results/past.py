"""Past forecasts: what forecasts.csv holds, scored against what has come true since.

A row of a forecast has come true once the data file has a row of its date.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.splits import find_csv
from data_provider.table import Table, read_table
from data_provider.timestamps import read_timestamps
from layers.errors import NAMED, input_error
from utils.results.bands import name_of
from utils.results.forecast import band_columns, levels_of
from utils.results.forecast_files import HISTORY, ORIGIN
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import LEGACY, TENSORS

ENDS = 5  # columns of very many that have a line: so many at each end


@dataclass(frozen=True)
class Past:
    """Forecasts that were made, R rows of N columns in their own units.

    Attributes:
        origins, dates: `[R]`, the last date that was known, and the date that was forecast.
        values: `[R, N]`.
        bands: level in per cent -> lower and upper ends, each `[R, N]`.
    """

    columns: list[str]
    origins: pd.DatetimeIndex
    dates: pd.DatetimeIndex
    values: np.ndarray
    bands: dict[float, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Score:
    """Errors of forecasts, in deviations of the columns or, of one column, in its own units.

    Attributes:
        rows: that have come true.
        coverage: level in per cent -> the part of the truths that lay in the band.
        last: MAE and RMSE of the last value that was known; None where the file no longer has the origin's row.
    """

    rows: int
    mae: float
    rmse: float
    coverage: dict[float, float]
    last: tuple[float, float] | None


def report(folder: Path, data: Path | None = None) -> str:
    """The table of a run's past forecasts, as text: by origin and in all, and by column.

    Args:
        folder: of the run, or `on_<file>` in it, or whatever folder holds a forecasts.csv.
        data: the CSV to score against, as it is now; None: the file of the training.

    Raises:
        InputError: no history, no data, or other columns in them.
    """
    checkpoint = _checkpoint(folder)
    fill = checkpoint.flags.get("fill_missing") if checkpoint else None
    table = read_table(_data_file(folder, checkpoint) if data is None else data, fill)
    past = read_past(folder / HISTORY, checkpoint.scaler()[0] if checkpoint else table.columns)
    missing = [name for name in past.columns if name not in table.columns]
    if missing:
        raise input_error(table.path, f"no column {missing[0]!r}", f"the columns of {folder / HISTORY}")
    deviation = table.values[:, [table.columns.index(name) for name in past.columns]].std(axis=0)
    whose = f"all rows of {table.path.name}"
    if checkpoint is not None:
        names, _, trained = checkpoint.scaler()
        deviation, whose = trained[[names.index(name) for name in past.columns]], "the training"
    if len(past.columns) == 1:
        unit, deviation = f"in units of {past.columns[0]}", np.ones(1)
    else:
        unit = f"in deviations of {whose}"
    return _text(folder, table, past, np.where(deviation > 0, deviation, 1.0), unit)


def read_past(path: Path, known: Sequence[str]) -> Past:
    """Read a forecasts.csv.

    Args:
        known: names that columns of the data may have, to tell them from those of bands.

    Raises:
        InputError: no such file, or something else in it.
    """
    expected = "the history that run_main.py --do_predict --append keeps"
    try:
        text = path.read_text(encoding="utf-8")
        frame = pd.read_csv(io.StringIO(text), dtype={ORIGIN: str, "date": str})
    except FileNotFoundError:
        raise input_error(path, "no such file", expected) from None
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors, as UnicodeDecodeError is
        raise input_error(path, f"a file that cannot be read ({' '.join(str(error).split())[:200]})", expected) from None
    header = list(frame.columns)
    if header[:2] != [ORIGIN, "date"] or frame.empty:
        raise input_error(path, f"the columns {', '.join(header)[:200]}" if len(frame) else "no rows", expected)
    columns, levels = _columns(path, header[2:], known)
    numbers = frame.iloc[:, 2:].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    wrong = np.argwhere(~np.isfinite(numbers[:, : len(columns)]))
    if len(wrong):
        row, column = wrong[0]
        raise input_error(f"{path}: row {row + 2}, column {columns[column]!r}", "no number", "a forecast")
    origins, dates = (read_timestamps(frame[name], str(path), 2) for name in (ORIGIN, "date"))
    N, L = len(columns), len(levels)
    ends = numbers[:, N:].reshape(len(frame), N, L, 2)
    bands = {level: (ends[:, :, i, 0], ends[:, :, i, 1]) for i, level in enumerate(levels)}
    return Past(columns, origins, dates, numbers[:, :N], bands)


def _columns(path: Path, names: list[str], known: Sequence[str]) -> tuple[list[str], list[float]]:
    """Which of the names are columns of the data, and the levels of the bands that the others are the ends of."""
    of_data = set(known)
    most = next((place for place, name in enumerate(names) if name not in of_data), len(names))
    for N in range(most, 0, -1):
        columns, rest = names[:N], names[N:]
        levels = levels_of(rest, columns)
        if band_columns(columns, levels) == rest:
            return columns, levels
    raise input_error(path, f"the columns {', '.join(names)[:200]}", f"columns of the data such as {known[0]}, and bands")


def _checkpoint(folder: Path) -> Checkpoint | None:
    """The run's checkpoint, whose scale the forecasts have; a folder of forecasts on other data has none."""
    if (folder / HISTORY).is_file() and not any((folder / name).is_file() for name in (TENSORS, LEGACY)):
        return None
    checkpoint = Checkpoint.open(folder)
    return checkpoint if checkpoint.record else None


def _data_file(folder: Path, checkpoint: Checkpoint | None) -> Path:
    flags = checkpoint.flags if checkpoint else {}
    if not isinstance(flags.get("root_path"), str) or not isinstance(flags.get("data_path"), str):
        raise input_error("--data", "nothing", f"the CSV to score against, for {folder} has no checkpoint that names one")
    return find_csv(flags["root_path"], flags["data_path"])


def score(past: Past, table: Table, deviation: np.ndarray, rows: np.ndarray) -> Score | None:
    """Score some of the rows of past forecasts; None where none of them has come true.

    Args:
        deviation: `[N]`, the unit of each column's errors.
        rows: `[R]` bool, which of them.
    """
    places = [table.columns.index(name) for name in past.columns]
    at = _row_of(table, past.dates)
    rows = rows & (at >= 0)
    if not rows.any():
        return None
    truth = table.values[at[rows]][:, places]  # (r, N)
    error = (past.values[rows] - truth) / deviation
    coverage = {}
    for level, (low, high) in past.bands.items():
        inside = (truth >= low[rows]) & (truth <= high[rows])
        coverage[level] = float(inside.mean())
    origin = _row_of(table, past.origins)[rows]
    last = None
    if (origin >= 0).all():
        naive = (table.values[origin][:, places] - truth) / deviation
        last = float(np.abs(naive).mean()), float(np.sqrt(np.square(naive).mean()))
    mae, rmse = float(np.abs(error).mean()), float(np.sqrt(np.square(error).mean()))
    return Score(int(rows.sum()), mae, rmse, coverage, last)


def _row_of(table: Table, dates: pd.DatetimeIndex) -> np.ndarray:
    """The last row of the table with each date; -1: none."""
    if (table.dates.tz is None) != (dates.tz is None):
        got = f"dates {'without' if table.dates.tz is None else 'with'} a time zone"
        raise input_error(table.path, got, "those of the forecasts, which are otherwise")
    place = table.dates.searchsorted(dates, side="right") - 1
    return np.where(table.dates[place.clip(0)] == dates, place, -1)


def _text(folder: Path, table: Table, past: Past, deviation: np.ndarray, unit: str) -> str:
    everything = np.ones(len(past.dates), dtype=bool)
    parts = [(str(origin), np.asarray(past.origins == origin)) for origin in past.origins.unique()]
    scores = [(name, int(rows.sum()), score(past, table, deviation, rows)) for name, rows in [*parts, ("all", everything)]]
    lines = [
        f"Past forecasts of {folder}, against {table.path.name} up to {table.dates[-1]}; errors {unit}",
        "",
        *_aligned("origin", scores, list(past.bands)),
        "",
    ]
    found = scores[-1][2]
    if found is None:
        return "\n".join([*lines, "No row has come true yet: the data file ends before their dates, or is another one."])
    if len(past.columns) > 1:
        shown, note = _shown(past, table, deviation)
        lines += [*_aligned("column, own units", list(_by_column(past, table, shown)), list(past.bands)), *note, ""]
    if found.last is not None:
        won = "was lower" if found.mae < found.last[0] else "was not lower"
        figures = f"{found.mae:.4g} against {found.last[0]:.4g}"
        lines.append(f"Over all rows that have come true, the forecasts' MAE {won} than that of the last value: {figures}.")
    if past.bands:
        named = name_of(min(past.bands))
        lines.append(f"Under {named} % stands how many of the truths lay in that band: it should be about {named} %.")
    return "\n".join(lines)


def _shown(past: Past, table: Table, deviation: np.ndarray) -> tuple[list[int], list[str]]:
    """The columns that have a line, and a line that says which they are, unless they are all."""
    N = len(past.columns)
    if N <= NAMED:
        return list(range(N)), []
    at = _row_of(table, past.dates)
    truth = table.values[at[at >= 0]][:, [table.columns.index(name) for name in past.columns]]
    order = np.argsort((np.abs(past.values[at >= 0] - truth) / deviation).mean(axis=0), kind="stable").tolist()
    few = f"  {N} columns: the {ENDS} columns with the lowest MAE in deviations, and the {ENDS} with the highest"
    return order[:ENDS] + order[-ENDS:], [few]


def _by_column(past: Past, table: Table, shown: list[int]) -> Iterator[tuple[str, int, Score | None]]:
    """All origins together, column by column in its own units."""
    rows = np.ones(len(past.dates), dtype=bool)
    for n in shown:
        name = past.columns[n]
        bands = {level: (low[:, n : n + 1], high[:, n : n + 1]) for level, (low, high) in past.bands.items()}
        alone = Past([name], past.origins, past.dates, past.values[:, n : n + 1], bands)
        yield name, len(rows), score(alone, table, np.ones(1), rows)


def _aligned(title: str, scores: list[tuple[str, int, Score | None]], levels: list[float]) -> list[str]:
    """A line a score under a line of headings.

    Args:
        scores: name, how many rows were forecast, and what came of them.
    """
    grid = [[title, "come true", "MAE", "RMSE", *(f"{name_of(level)} %" for level in levels), "last value: MAE", "RMSE"]]
    for name, made, found in scores:
        cells = ["-"] * (len(levels) + 4)
        if found is not None:
            shares = [f"{100 * part:.1f} %" for part in found.coverage.values()]
            last = ["-", "-"] if found.last is None else [f"{value:.4g}" for value in found.last]
            cells = [f"{found.mae:.4g}", f"{found.rmse:.4g}", *shares, *last]
        grid.append([name, f"{found.rows if found else 0} of {made}", *cells])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    rest = widths[1:]
    return [
        f"  {row[0]:{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], rest, strict=True))
        for row in grid
    ]
