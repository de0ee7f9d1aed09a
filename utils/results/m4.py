"""The M4 competition: its scores SMAPE, MASE and OWA by pattern and group, and its benchmark Naive2.

Sources: Makridakis, Spiliotis and Assimakopoulos, The M4 Competition: 100,000 time series and 61 forecasting methods,
International Journal of Forecasting 36 (2020). Shapes: S series, H values ahead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_provider.splits import GROUPS, PATTERNS
from utils.results.baselines import LAST, RIDGE

SIGNIFICANT = 1.645  # a normal variable is further from 0 in 10 % of cases
AVERAGE = "Average"
MODEL, NAIVE2 = "model", "naive2"
TITLES = {NAIVE2: "Naive2", LAST: "Last value", RIDGE: "Linear map (ridge)"}  # for people; the names are metrics.json's
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
    scaled: int  # series that have a MASE, over which it is the mean

    @classmethod
    def of(cls, forecast: np.ndarray, truth: np.ndarray, known: list[np.ndarray], season: int) -> "Errors":
        """Errors of forecasts `[S, H]`.

        - SMAPE: mean of 200 |f - y| / (|f| + |y|); f = y = 0 counts as 0.
        - MASE: mean of |f - y| in units of the series' own mean |y_t - y_{t-season}| before the forecast; a series that
          has no such steps, or steps of 0 alone, has none, and the mean is over the others.

        Args:
            truth: `[S, H]`.
            known: `[S]` of `[values]` before the forecast.
        """
        error, size = np.abs(forecast - truth), np.abs(forecast) + np.abs(truth)
        smape = 200 * np.divide(error, size, out=np.zeros_like(error), where=size > 0).mean()
        steps = [np.abs(values[season:] - values[:-season]) for values in known]
        scale = np.array([step.mean() if len(step) else 0.0 for step in steps])  # (S,)
        there = scale > 0
        mase = (error[there].mean(axis=1) / scale[there]).mean() if there.any() else float("nan")
        return cls(len(forecast), float(smape), float(mase), int(there.sum()))

    @classmethod
    def joined(cls, parts: list["Errors"]) -> "Errors":
        """Of several sets of series together, each of which counts alike."""
        count, scaled = sum(part.series for part in parts), sum(part.scaled for part in parts)
        smape = sum(part.series * part.smape for part in parts) / count
        mase = sum(part.scaled * part.mase for part in parts if part.scaled) / scaled if scaled else float("nan")
        return cls(count, smape, mase, scaled)

    def owa(self, naive2: "Errors") -> float:
        """Overall weighted average: the mean of both errors as parts of Naive2's; NaN where Naive2 has none."""
        if not (naive2.smape > 0 and naive2.mase > 0):
            return float("nan")
        return (self.smape / naive2.smape + self.mase / naive2.mase) / 2


def naive2(values: np.ndarray, season: int, horizon: int) -> np.ndarray:
    """The last value `[horizon]`, of a series that the 90 % test calls seasonal without its season, and the season put
    back; a series whose values cannot be divided by their seasonal indices counts as without a season.

    Args:
        values: `[values]`.
        season: values in a season; 1 for none.
    """
    last, n = np.repeat(values[-1], horizon), len(values)
    if season < 2 or n < 3 * season:
        return last
    # What cannot be divided becomes NaN: a series that never moves, or one around 0, whose trend or last index is 0.
    with np.errstate(all="ignore"):
        # Seasonal is a significant autocorrelation at the season, by Bartlett's formula for its deviation.
        centred = values - values.mean()
        correlation = np.array([centred[lag:] @ centred[:-lag] for lag in range(1, season + 1)]) / (centred @ centred)
        limit = SIGNIFICANT * np.sqrt((1 + 2 * np.square(correlation[:-1]).sum()) / n)
        if not abs(correlation[-1]) > limit:
            return last
        # Classical multiplicative decomposition: the trend is the centred moving average over a season, whose two end
        # values count half where the season is even; an index is the mean of the values' ratios to it.
        window = np.full(season, 1 / season)
        window = np.convolve(window, [0.5, 0.5]) if season % 2 == 0 else window
        half, ratios = len(window) // 2, np.full(-(-n // season) * season, np.nan)
        trend = np.convolve(values, window, mode="valid")
        ratios[half : n - half] = np.where(trend == 0, np.nan, values[half : n - half] / trend)
        by_place = ratios.reshape(-1, season)
        indices = np.nansum(by_place, axis=0) / np.count_nonzero(~np.isnan(by_place), axis=0)
        indices /= indices.mean()
        made = values[-1] / indices[(n - 1) % season] * indices[np.arange(n, n + horizon) % season]
    return made if np.isfinite(made).all() else last


Methods = dict[str, dict[str, tuple[Errors, Errors]]]  # title -> pattern -> its errors, and Naive2's on the same series


def methods_of(metrics: Mapping[str, Any]) -> Methods:
    """What the metrics.json of a run on a pattern says of its model and of the simple forecasts.

    Raises:
        KeyError, TypeError: it is of another run.
    """
    rows = {"Time-LLM" if metrics["model"] == "TimeLLM" else metrics["model"]: metrics["test"]}
    rows |= {row["title"]: row for row in metrics["baselines"]["rows"]}
    fields = Errors.__dataclass_fields__
    found = {title: Errors(**{name: row[name] for name in fields}) for title, row in rows.items()}
    return {title: {metrics["m4"]["pattern"]: (errors, found[TITLES[NAIVE2]])} for title, errors in found.items()}


def warnings_of(metrics: Mapping[str, Any]) -> list[str]:
    """What must be said of the metrics.json of a run on a pattern: made-up series, and a training on other data."""
    said = [SYNTHETIC] if metrics["m4"].get("synthetic") else []
    trained = metrics.get("trained_on", {})  # only of other data than the tested
    if trained:
        said.append(f"{metrics['m4']['pattern']}: after training on other series, those of {trained.get('file')}")
    if trained.get("synthetic"):
        said.append(f"SYNTHETIC DATA: {trained.get('file')}, which the model was trained on, was generated, not measured")
    return said


def grouped(found: Mapping[str, tuple[Errors, Errors]], among: Iterable[str] = ()) -> dict[str, tuple[Errors, float]]:
    """Errors and OWA of the patterns found, of the competition's groups, and of all, weighted by series; of one pattern
    alone its own.

    Args:
        found: pattern -> errors of a method and of Naive2 on the same series.
        among: patterns that other methods of the table have: where this method lacks one, it has neither groups nor an
            average, for they would stand beside those of other series.
    """
    present = [pattern for pattern in PATTERNS if pattern in found]
    sets = {pattern: [pattern] for pattern in present}
    if len(present) > 1 and {*present} >= {*among}:
        for group in GROUPS:
            sets.setdefault(group, [pattern for pattern in present if PATTERNS[pattern].group == group])
        sets[AVERAGE] = present
    rows = {}
    for name, patterns in sets.items():
        if patterns:
            errors, naive = (Errors.joined([found[pattern][place] for pattern in patterns]) for place in (0, 1))
            rows[name] = errors, errors.owa(naive)
    return rows


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
        for name, (e, owa) in grouped(patterns, found).items():
            lines.append(f"  {name:22}{e.series:8}{e.smape:10.3f}{e.mase:9.3f}{owa:8.3f}")
    lines += ["", "Time-LLM in its paper (all 100,000 series)"]
    lines += [f"  {name:22}{'':8}{smape:10.3f}{mase:9.3f}{owa:8.3f}" for name, (smape, mase, owa) in PAPER.items()]
    missing = [pattern for pattern in PATTERNS if pattern not in found]
    if missing and len(found) > 1:
        lines += ["", f"Others and Average are without {', '.join(missing)}, which are not here"]
    for warning in dict.fromkeys(warnings):
        lines += ["", warning]
    return "\n".join(lines)
