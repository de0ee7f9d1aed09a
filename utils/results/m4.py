"""The M4 competition: its scores SMAPE, MASE and OWA by pattern and group, and its benchmark Naive2.

Sources: Makridakis, Spiliotis and Assimakopoulos, The M4 Competition: 100,000 time series and 61 forecasting methods,
International Journal of Forecasting 36 (2020). Shapes: S series, H values ahead.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_provider.splits import PATTERNS
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


Errors = dict[str, float]  # series, smape, mase; and scaled: how many series have a MASE, which is the mean over these


def errors_of(forecast: np.ndarray, truth: np.ndarray, known: list[np.ndarray], season: int) -> Errors:
    """Mean errors of forecasts `[S, H]`, each series counting alike.

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
    return {"series": len(forecast), "smape": float(smape), "mase": float(mase), "scaled": int(there.sum())}


def owa(errors: Errors, naive2: Errors) -> float:
    """Overall weighted average: the mean of both errors as parts of Naive2's; NaN where Naive2 has none."""
    return sum(errors[name] / (naive2[name] or float("nan")) for name in ("smape", "mase")) / 2


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


def scores_of(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """What the metrics.json of a run on a pattern says of its model and of the simple forecasts: `Errors` as columns, by
    (title, pattern).

    Raises:
        KeyError, TypeError: it is of another run.
    """
    rows = {"Time-LLM" if metrics["model"] == "TimeLLM" else metrics["model"]: metrics["test"]}
    rows |= {row["title"]: row for row in metrics["baselines"]["rows"]}
    by_name = {(title, metrics["m4"]["pattern"]): row for title, row in rows.items()}
    return pd.DataFrame(by_name, ["series", "smape", "mase", "scaled"]).astype(float).T


def warnings_of(metrics: Mapping[str, Any]) -> list[str]:
    """What must be said of the metrics.json of a run on a pattern: made-up series, and a training on other data."""
    said = [SYNTHETIC] if metrics["m4"].get("synthetic") else []
    trained = metrics.get("trained_on", {})  # only of other data than the tested
    if trained:
        said.append(f"{metrics['m4']['pattern']}: after training on other series, those of {trained.get('file')}")
    if trained.get("synthetic"):
        said.append(f"SYNTHETIC DATA: {trained.get('file')}, which the model was trained on, was generated, not measured")
    return said


def grouped(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of the patterns, of the competition's groups, and of all, weighted by series; with a column owa.

    A method that lacks a pattern which others have, or is of one pattern alone, has neither groups nor an average: they
    would stand beside those of other series.

    Args:
        scores: `Errors` by (title, pattern), those of Naive2 among them.
    """
    sums = scores.sort_index(level=1, key=lambda names: names.map([*PATTERNS].index), sort_remaining=False, kind="stable")
    sums = sums.assign(smape=sums["smape"] * sums["series"], mase=(sums["mase"] * sums["scaled"]).fillna(0))
    number, among = sums.groupby(level=0)["series"].transform("size"), sums.index.unique(1).size
    whole = sums[(number == among) & (among > 1)]
    others = whole.rename(lambda name: PATTERNS[name].group, level=1).drop([*PATTERNS], level=1, errors="ignore")
    average = whole.rename(lambda name: AVERAGE, level=1)
    rows = pd.concat([sums, others, average]).groupby(level=[0, 1], sort=False).sum()
    rows["smape"] /= rows["series"]
    rows["mase"] /= rows["scaled"]
    naive = rows.xs(TITLES[NAIVE2]).reindex(rows.index, level=1)
    told = (naive["smape"] > 0) & (naive["mase"] > 0)
    rows["owa"] = (rows["smape"] / naive["smape"] + rows["mase"] / naive["mase"]).where(told) / 2
    return rows


def table(scores: pd.DataFrame, warnings: Iterable[str] = ()) -> str:
    """An aligned table: a block a method, the paper's figures in the last one.

    Args:
        scores: of a run, or of several runs together, see `grouped`.
        warnings: lines for its end; one that comes twice is said once.
    """
    rows, there = grouped(scores), scores.index.get_level_values(1)
    lines = [f"{'':24}{'series':>8}{'SMAPE':>10}{'MASE':>9}{'OWA':>8}"]
    for title in scores.index.unique(0):
        lacking = [name for name in PATTERNS if name in there and (title, name) not in scores.index]
        lines += ["", f"{title} (without {', '.join(lacking)}, so without their average)" if lacking else title]
        for name, (count, smape, mase, _, part) in rows.loc[title].iterrows():
            lines.append(f"  {name:22}{count:8.0f}{smape:10.3f}{mase:9.3f}{part:8.3f}")
    lines += ["", "Time-LLM in its paper (all 100,000 series)"]
    lines += [f"  {name:22}{'':8}{smape:10.3f}{mase:9.3f}{part:8.3f}" for name, (smape, mase, part) in PAPER.items()]
    missing = [name for name in PATTERNS if name not in there]
    if missing and there.nunique() > 1:
        lines += ["", f"Others and Average are without {', '.join(missing)}, which are not here"]
    for warning in dict.fromkeys(warnings):
        lines += ["", warning]
    return "\n".join(lines)
