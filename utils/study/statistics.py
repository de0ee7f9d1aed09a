"""Statistics of a study: means and deviations over seeds, and differences paired over the same seed, data and horizon."""

import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped]

from layers.errors import input_error
from utils.study.cells import Measured
from utils.study.grid import DATA, HORIZON, SEED, SHARE, VARIANT, Cell, Grid

ERRORS = ("mse", "mae")
LEVEL = 0.95  # of the intervals
PAIRS = 3  # from which on there is an interval: of two, Student's t is 12.7 (of three 4.3)
Key = tuple[tuple[str, str], ...]  # axis and value, of all axes that make a table's row
Result = tuple[Cell, Measured]


@dataclass(frozen=True, order=True)
class Column:
    """A column of a table: a horizon, or the mean over all, and an error."""

    horizon: int  # MEAN: over all horizons
    error: str  # mse or mae


MEAN = 0


@dataclass(frozen=True)
class Figure:
    """A mean over seeds."""

    mean: float
    deviation: float | None  # of a sample; None with one seed
    number: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with Student's interval."""

    mean: float
    low: float | None  # None with fewer than PAIRS, which say next to nothing of the spread
    high: float | None
    number: int


@dataclass
class Row:
    """A row of runs: error by column and seed."""

    label: str
    key: Key
    by_seed: dict[Column, dict[int, float]] = field(default_factory=dict)

    def figure(self, column: Column) -> Figure | None:
        """Mean and deviation over the seeds; None where no run is done."""
        return mean_over(list(self.by_seed.get(column, {}).values()))


@dataclass
class Fixed:
    """A row of figures without seeds: a simple forecast, or what others have published."""

    label: str
    values: dict[Column, float]
    note: str = ""


@dataclass
class Section:
    """A table: one data set, one share of its training windows."""

    title: str
    horizons: list[int]
    rows: list[Row]
    baselines: list[Fixed]
    published: list[Fixed]
    windows: dict[int, list[int]]  # horizon -> numbers of test windows scored (more than one: runs differ)
    intervals: list[str] = field(default_factory=list)  # figures of prediction intervals that there are, as columns

    @property
    def columns(self) -> list[Column]:
        """MSE and MAE of each horizon, and of their mean where there are more than one."""
        means = [MEAN] if len(self.horizons) > 1 else []
        return [Column(horizon, error) for horizon in [*self.horizons, *means] for error in ERRORS]


def mean_over(values: Sequence[float]) -> Figure | None:
    """Mean and sample standard deviation (n - 1); None of nothing."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.fmean(values), deviation, len(values))


def paired(one: dict[int, float], other: dict[int, float]) -> Difference | None:
    """`one` minus `other` over the seeds that both have: the mean, and from `PAIRS` on its interval mean ± t s / sqrt(n)."""
    found = mean_over([one[seed] - other[seed] for seed in one if seed in other])
    if found is None:
        return None
    if found.deviation is None or found.number < PAIRS:
        return Difference(found.mean, None, None, found.number)
    t = float(stdtrit(found.number - 1, (1 + LEVEL) / 2))
    half = t * found.deviation / math.sqrt(found.number)
    return Difference(found.mean, found.mean - half, found.mean + half, found.number)


def label_of(key: Key) -> str:
    """A row's name: the variant and the model by their values alone."""
    return ", ".join(value if axis in (VARIANT, "model") else f"{axis} {value}" for axis, value in key)


def row_key(cell: Cell) -> Key:
    """The axes that make a row: all but seed, horizon, data and share."""
    return tuple((axis, value) for axis, value in cell.values.items() if axis not in (SEED, HORIZON, DATA, SHARE))


def sections(grid: Grid, results: list[Result], published: list[dict[str, Any]]) -> list[Section]:
    """The tables of what is done, in the grid's order."""
    groups: dict[tuple, list[Result]] = {}
    for cell, found in results:
        groups.setdefault((getattr(cell.args, DATA), getattr(cell.args, SHARE)), []).append((cell, found))
    return [_section(data, share, group, published) for (data, share), group in groups.items()]


def _section(data: str, share: int, group: list[Result], published: list[dict[str, Any]]) -> Section:
    rows: dict[Key, Row] = {}
    windows: dict[int, set[int]] = {}
    intervals: dict[str, None] = {}
    simple: dict[str, list[tuple[Fixed, list[str]]]] = {}
    for cell, found in group:
        key, horizon, seed = row_key(cell), getattr(cell.args, HORIZON), getattr(cell.args, SEED)
        row = rows.setdefault(key, Row(label_of(key) or cell.args.model, key))
        windows.setdefault(horizon, set()).add(found.windows)
        for error in ERRORS:
            row.by_seed.setdefault(Column(horizon, error), {})[seed] = getattr(found, error)
        for name, value in found.intervals.items():
            row.by_seed.setdefault(Column(horizon, name), {})[seed] = value
            intervals[name] = None
        for title, errors in found.baselines.items():
            values = {Column(horizon, error): value for error, value in zip(ERRORS, errors, strict=True)}
            values |= {Column(horizon, name): value for name, value in found.baseline_intervals.get(title, {}).items()}
            _add_simple(simple.setdefault(title, []), title, values, row.label)
    horizons = sorted(windows)
    for row in rows.values():
        for error in ERRORS:
            held = [row.by_seed.get(Column(horizon, error), {}) for horizon in horizons]
            seeds = [seed for seed in held[0] if all(seed in values for values in held)]
            row.by_seed[Column(MEAN, error)] = {s: statistics.fmean(values[s] for values in held) for s in seeds}
    first = group[0][1]
    title = (
        first.data
        + (", a synthetic series" if first.synthetic else "")
        + (f", {share} % of training" if share < 100 else "")
    )
    baselines = [fixed for every in simple.values() for fixed in _named(every)]
    known = [] if first.synthetic or first.data != f"{data}.csv" else _published(data, horizons, group, published)
    for fixed in [*baselines, *known]:
        fixed.values |= _means(fixed.values, horizons)
    counts = {h: sorted(n) for h, n in windows.items()}
    return Section(title, horizons, list(rows.values()), baselines, known, counts, list(intervals))


def _add_simple(held: list[tuple[Fixed, list[str]]], title: str, values: dict[Column, float], label: str) -> None:
    """A simple forecast is one row for all runs that had the same windows before them; others have rows of their own."""
    for fixed, labels in held:
        if all(math.isclose(fixed.values.get(column, value), value, rel_tol=1e-9) for column, value in values.items()):
            fixed.values |= values
            if label not in labels:
                labels.append(label)
            return
    held.append((Fixed(title, dict(values)), [label]))


def _named(held: list[tuple[Fixed, list[str]]]) -> list[Fixed]:
    if len(held) > 1:
        for fixed, labels in held:
            fixed.label += f" (beside {'; '.join(labels)})"
    return [fixed for fixed, _ in held]


def _means(values: dict[Column, float], horizons: list[int]) -> dict[Column, float]:
    """The mean over the horizons, where all are known."""
    found = {}
    for error in ERRORS:
        known = [values[Column(h, error)] for h in horizons if Column(h, error) in values]
        if len(known) == len(horizons):
            found[Column(MEAN, error)] = statistics.fmean(known)
    return found


def _published(data: str, horizons: list[int], group: list[Result], sources: list[dict[str, Any]]) -> list[Fixed]:
    """The figures of others for a data set, where all runs beside them meet their conditions."""
    rows = []
    for source in sources:
        alike = all(getattr(cell.args, name, None) == value for cell, _ in group for name, value in source["when"].items())
        figures = source.get(data, {}) if alike else {}
        values = {}
        for horizon in horizons:
            for error, value in zip(ERRORS, figures.get(str(horizon), ()), strict=False):  # some give no MAE
                values[Column(horizon, error)] = value
        if values:
            rows.append(Fixed(f"{source['name']} (published)", values, source["note"]))
    return rows


def read_published(file: Path) -> list[dict[str, Any]]:
    """The sources in a file as scripts/published.toml.

    Raises:
        InputError: the file is missing, or is not such a one.
    """
    try:
        sources = tomllib.loads(file.read_text(encoding="utf-8"))["source"]
        if any(not isinstance(source[name], kind) for source in sources for name, kind in _FIELDS.items()):
            raise ValueError("a source without a name, a note or its conditions")
        return sources
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise input_error(file, f"no published figures ({error})", "tables [[source]] with name, note and when") from None


_FIELDS: dict[str, type] = {"name": str, "note": str, "when": dict}


def reference_of(grid: Grid) -> tuple[str, str] | None:
    """The axis along which rows are compared, and the value that the others are compared with; None: one row alone.

    The first axis is the variant, where there are variants.
    """
    special = (SEED, HORIZON, DATA, SHARE)
    axes = {axis: values for axis, values in grid.axes.items() if axis not in special and len(values) > 1}
    chosen = next((axis for axis, values in axes.items() if grid.reference in values), None)
    axis = chosen or next(iter(axes), None)
    if axis is None:
        return None
    return axis, (grid.reference if chosen and grid.reference else axes[axis][0])


def differences(grid: Grid, section: Section) -> list[tuple[Row, Row, dict[Column, Difference]]]:
    """Each row, the row of the reference that is the same in all other axes, and the first minus the second."""
    compared = reference_of(grid)
    if compared is None:
        return []
    axis, reference = compared
    by_key, found = {row.key: row for row in section.rows}, []
    for row in section.rows:
        other = by_key.get(tuple((name, reference if name == axis else value) for name, value in row.key))
        if other is None or other is row:
            continue
        pairs = {c: paired(row.by_seed.get(c, {}), other.by_seed.get(c, {})) for c in section.columns}
        found.append((row, other, {column: difference for column, difference in pairs.items() if difference}))
    return found
