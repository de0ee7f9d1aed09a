"""Scores of the M4 competition: SMAPE, MASE and OWA by pattern and group, and its benchmark Naive2.

Sources: Makridakis, Spiliotis and Assimakopoulos, The M4 Competition: 100,000 time series and 61 forecasting methods,
International Journal of Forecasting 36 (2020). Shapes: S series, H values ahead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_provider.splits import GROUPS, PATTERNS

SIGNIFICANT = 1.645  # a normal variable is further from 0 in 10 % of cases
AVERAGE = "Average"
NAIVE2, NAIVE2_TITLE = "naive2", "Naive2"  # in metrics.json, and for people
SYNTHETIC = "SYNTHETIC DATA: the series were generated, not measured; these figures say nothing about M4"
# Time-LLM in its paper's table of short-term forecasts: SMAPE, MASE, OWA.
PAPER = {
    "Yearly": (13.419, 3.005, 0.789),
    "Quarterly": (10.110, 1.178, 0.889),
    "Monthly": (12.980, 0.963, 0.903),
    "Others": (4.795, 3.178, 1.006),
    AVERAGE: (11.983, 1.595, 0.859),
}


@dataclass(frozen=True)
class Errors:
    """Mean errors over series, each counting alike."""

    series: int
    smape: float
    mase: float
    scaled: int | None = None  # series that have a MASE, over which it is the mean; None: all

    def owa(self, naive2: "Errors") -> float:
        """Overall weighted average: the mean of both errors as parts of Naive2's; NaN where Naive2 has none."""
        if not (naive2.smape > 0 and naive2.mase > 0):
            return float("nan")
        return (self.smape / naive2.smape + self.mase / naive2.mase) / 2

    @classmethod
    def joined(cls, parts: Iterable["Errors"]) -> "Errors":
        """Of several sets of series together, each of which counts alike."""
        parts = list(parts)
        count = sum(part.series for part in parts)
        smape = sum(part.series * part.smape for part in parts) / count
        weights = [(part.series if part.scaled is None else part.scaled, part.mase) for part in parts]
        scaled = sum(weight for weight, _ in weights)
        mase = sum(weight * mase for weight, mase in weights if weight) / scaled if scaled else float("nan")
        return cls(count, smape, mase, scaled)


def errors_of(forecast: np.ndarray, truth: np.ndarray, known: list[np.ndarray], season: int) -> Errors:
    """Errors of forecasts `[S, H]`.

    - SMAPE: mean of 200 |f - y| / (|f| + |y|); f = y = 0 counts as 0.
    - MASE: mean of |f - y| in units of the series' own mean |y_t - y_{t-season}| before the forecast; a series that has
      no such steps, or steps of 0 alone, has none, and the mean is over the others.

    Args:
        truth: `[S, H]`.
        known: `[S]` of `[values]` before the forecast.
    """
    error = np.abs(forecast - truth)
    size = np.abs(forecast) + np.abs(truth)
    smape = 200 * np.divide(error, size, out=np.zeros_like(error), where=size > 0).mean()
    scale = np.array([_seasonal_step(values, season) for values in known])  # (S,)
    there = scale > 0
    mase = (error[there].mean(axis=1) / scale[there]).mean() if there.any() else float("nan")
    return Errors(len(forecast), float(smape), float(mase), int(there.sum()))


def _seasonal_step(values: np.ndarray, season: int) -> float:
    return float(np.abs(values[season:] - values[:-season]).mean()) if len(values) > season else 0.0


def naive2(values: np.ndarray, season: int, horizon: int) -> np.ndarray:
    """The last value `[horizon]`, of a series that the 90 % test calls seasonal without its season, and the season put
    back; a series whose values cannot be divided by their seasonal indices counts as without a season.

    Args:
        values: `[values]`.
        season: values in a season; 1 for none.
    """
    last, n = np.repeat(values[-1], horizon), len(values)
    if not is_seasonal(values, season):
        return last
    # A series around 0 may have no multiplicative season: the last index is 0, or has nothing to be the mean of.
    with np.errstate(all="ignore"):
        indices = seasonal_indices(values, season)
        made = values[-1] / indices[(n - 1) % season] * indices[np.arange(n, n + horizon) % season]
    return made if np.isfinite(made).all() else last


def is_seasonal(values: np.ndarray, season: int) -> bool:
    """Whether the autocorrelation at the season is significant at 90 %, after Bartlett's formula for its deviation; never
    of a series shorter than three seasons."""
    n = len(values)
    if season < 2 or n < 3 * season:
        return False
    centred = values - values.mean()
    variance = centred @ centred
    if variance == 0:
        return False
    correlation = np.array([centred[lag:] @ centred[:-lag] for lag in range(1, season + 1)]) / variance
    deviation = np.sqrt((1 + 2 * np.square(correlation[:-1]).sum()) / n)
    return bool(abs(correlation[-1]) > SIGNIFICANT * deviation)


def seasonal_indices(values: np.ndarray, season: int) -> np.ndarray:
    """Indices `[season]` of mean 1, beginning with that of `values[0]`: classical multiplicative decomposition.
    NaN where the trend is 0 wherever a season has it, or the mean of the indices is.

    The trend is the centred moving average over a season, whose two end values count half where the season is even.
    """
    weights = np.full(season, 1 / season)
    if season % 2 == 0:
        weights = np.convolve(weights, [0.5, 0.5])
    half = len(weights) // 2
    ratio = np.full(len(values), np.nan)
    trend = np.convolve(values, weights, mode="valid")
    np.divide(values[half : len(values) - half], trend, out=ratio[half : len(values) - half], where=trend != 0)
    ratios = [ratio[place::season] for place in range(season)]
    counts = np.array([np.count_nonzero(~np.isnan(found)) for found in ratios])
    figure = np.full(season, np.nan)
    np.divide([np.nansum(found) for found in ratios], counts, out=figure, where=counts > 0)
    return figure / figure.mean()


@dataclass(frozen=True)
class Row:
    """A line of a table: of a pattern, of a group, or of all."""

    name: str
    errors: Errors
    owa: float


def grouped(found: Mapping[str, tuple[Errors, Errors]], among: Iterable[str] = ()) -> list[Row]:
    """Rows of the patterns found, of the competition's groups, and the average, all weighted by series; of one pattern
    alone its own.

    Args:
        found: pattern -> errors of a method and of Naive2 on the same series.
        among: patterns that other methods of the table have: a group that has one of them which this method lacks is left
            out, and so is the average, for they would stand beside those of other series.
    """

    def row(name: str, patterns: list[str]) -> Row:
        errors, naive = (Errors.joined(found[pattern][place] for pattern in patterns) for place in (0, 1))
        return Row(name, errors, errors.owa(naive))

    present = [pattern for pattern in PATTERNS if pattern in found]
    lacking = {*among} - {*found}
    rows = [row(pattern, [pattern]) for pattern in present]
    for group in GROUPS:
        members = [pattern for pattern in present if PATTERNS[pattern].group == group]
        whole = not any(PATTERNS[pattern].group == group for pattern in lacking)
        if members and whole and group not in PATTERNS:
            rows.append(row(group, members))
    if len(present) == 1 and not lacking:
        return rows[:1]
    return rows if lacking else [*rows, row(AVERAGE, present)]


Methods = dict[str, dict[str, tuple[Errors, Errors]]]  # title -> what `grouped` takes


def read_errors(row: Mapping[str, Any]) -> Errors:
    """Errors as metrics.json has them; that of an earlier version does not say how many series have a MASE.

    Raises:
        KeyError: it lacks one.
    """
    return Errors(row["series"], row["smape"], row["mase"], row.get("scaled"))


def methods_of(metrics: Mapping[str, Any]) -> Methods:
    """What the metrics.json of a run on a pattern says of its model and of the simple forecasts.

    Raises:
        KeyError, TypeError: it is of another run.
    """
    held, test = metrics["m4"], metrics["test"]
    rows = {row["title"]: read_errors(row) for row in metrics["baselines"]["rows"]}
    name = "Time-LLM" if metrics["model"] == "TimeLLM" else metrics["model"]
    own = {name: read_errors(held | test)} | rows
    return {title: {held["pattern"]: (errors, rows[NAIVE2_TITLE])} for title, errors in own.items()}


def warnings_of(metrics: Mapping[str, Any]) -> list[str]:
    """What must be said of the metrics.json of a run on a pattern: made-up series, and a training on other data."""
    said = [SYNTHETIC] if metrics["m4"].get("synthetic") else []
    trained = metrics.get("trained_on", {})  # only of other data than the tested
    if trained:
        said.append(f"{metrics['m4']['pattern']}: after training on other series, those of {trained.get('file')}")
    if trained.get("synthetic"):
        said.append(f"SYNTHETIC DATA: {trained.get('file')}, which the model was trained on, was generated, not measured")
    return said


def table(methods: Methods, warnings: Iterable[str] = ()) -> str:
    """An aligned table: a block a method, the paper's figures in the last one.

    Args:
        methods: of a run, or of several runs together.
        warnings: lines for its end; one that comes twice is said once.
    """
    found = {pattern for patterns in methods.values() for pattern in patterns}
    lines = [f"{'':24}{'series':>8}{'SMAPE':>10}{'MASE':>9}{'OWA':>8}"]
    for title, patterns in methods.items():
        lacking = [pattern for pattern in PATTERNS if pattern in found and pattern not in patterns]
        lines += ["", f"{title} (without {', '.join(lacking)}, so without their average)" if lacking else title]
        for row in grouped(patterns, found):
            e = row.errors
            lines.append(f"  {row.name:22}{e.series:8}{e.smape:10.3f}{e.mase:9.3f}{row.owa:8.3f}")
    lines += ["", "Time-LLM in its paper (all 100,000 series)"]
    lines += [f"  {name:22}{'':8}{smape:10.3f}{mase:9.3f}{owa:8.3f}" for name, (smape, mase, owa) in PAPER.items()]
    missing = [pattern for pattern in PATTERNS if pattern not in found]
    if missing and len(found) > 1:
        lines += ["", f"Others and Average are without {', '.join(missing)}, which are not here"]
    for warning in dict.fromkeys(warnings):
        lines += ["", warning]
    return "\n".join(lines)
