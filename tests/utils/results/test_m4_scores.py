"""SMAPE, MASE, OWA and Naive2: against formulas written out, and against the organisers' own figures."""

import importlib.util
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from data_provider.m4 import M4Series, load_m4, read_wide
from data_provider.patterns import PATTERNS
from tests.m4_files import write_m4
from tests.realdata import ROOT
from utils.results.m4 import PAPER, Errors, errors_of, grouped, is_seasonal, naive2, seasonal_indices, table


def real(pattern: str) -> tuple[M4Series, Path]:
    """The organisers' files of a pattern and their Naive2.csv; skips the test where they are not at hand."""
    folders = [ROOT.parent / "shared" / "data", ROOT / "dataset"]
    if os.environ.get("TIMELLM_DATA"):
        folders.insert(0, Path(os.environ["TIMELLM_DATA"]))
    for folder in folders:
        if (folder / "m4" / f"{pattern}-test.csv").is_file() and (folder / "m4" / "Naive2.csv").is_file():
            H = PATTERNS[pattern].horizon
            return load_m4(folder / "m4", pattern, 2 * H, H, H), folder / "m4" / "Naive2.csv"
    pytest.skip("the M4 files and the organisers' Naive2.csv are not at hand: set TIMELLM_DATA")


@pytest.mark.parametrize(("pattern", "smape", "mase"), [("Hourly", 18.383, 2.395), ("Weekly", 9.161, 2.777)])
def test_the_organisers_naive2_has_the_organisers_figures_and_ours_too(pattern: str, smape: float, mase: float) -> None:
    series, file = real(pattern)
    official = read_wide(file)
    theirs = np.stack([official[name] for name in series.ids])
    season, H = series.kind.season, series.pred_len
    found = errors_of(theirs, series.future, series.known, season)
    assert (round(found.smape, 3), round(found.mase, 3)) == (smape, mase)
    ours = np.stack([naive2(values, season, H) for values in series.known])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    own = errors_of(ours, series.future, series.known, season)
    assert abs(own.smape - smape) < 0.01 and abs(own.mase - mase) < 0.01


def test_errors_are_their_formulas() -> None:
    random = np.random.default_rng(0)
    forecast, truth = random.uniform(1, 9, (3, 4)), random.uniform(1, 9, (3, 4))
    forecast[0, 0] = truth[0, 0] = 0.0
    known = [random.uniform(1, 9, n) for n in (10, 7, 12)]
    smape, mase = [], []
    for f, y, x in zip(forecast, truth, known, strict=True):
        smape.append(np.mean([200 * abs(a - b) / (abs(a) + abs(b)) if a or b else 0 for a, b in zip(f, y, strict=True)]))
        scale = np.mean([abs(x[t] - x[t - 4]) for t in range(4, len(x))])
        mase.append(np.mean(np.abs(f - y)) / scale)
    found = errors_of(forecast, truth, known, 4)
    assert (found.series, found.smape, found.mase) == (3, pytest.approx(np.mean(smape)), pytest.approx(np.mean(mase)))
    # a series that never moves, or is no longer than a season, has no scale: the mean is over the others
    known[1], known[2] = np.full(9, 5.0), known[2][:4]
    assert errors_of(forecast, truth, known, 4).mase == pytest.approx(mase[0])
    still = errors_of(truth, truth, [np.full(9, 5.0)] * 3, 4)
    assert still.smape == 0 and np.isnan(still.mase) and np.isnan(found.owa(still))


def test_naive2_of_a_pure_season_goes_on_with_it() -> None:
    shape = np.array([1.2, 0.7, 1.0, 1.1])
    values = 50 * shape[np.arange(30) % 4]
    assert is_seasonal(values, 4)
    np.testing.assert_allclose(seasonal_indices(values, 4), shape, rtol=1e-12)
    np.testing.assert_allclose(naive2(values, 4, 6), 50 * shape[np.arange(30, 36) % 4], rtol=1e-12)
    odd = np.array([0.5, 1.5, 1.0])
    np.testing.assert_allclose(seasonal_indices(odd[np.arange(20) % 3], 3), odd, rtol=1e-12)


def test_naive2_without_a_season_is_the_last_value() -> None:
    random = np.random.default_rng(1)
    walk = 100 + np.cumsum(random.normal(size=80))
    for values, season in ((walk, 1), (walk[:11], 4), (np.full(40, 3.0), 12)):  # none known, too short, never moves
        assert not is_seasonal(values, season)
        np.testing.assert_array_equal(naive2(values, season, 5), np.repeat(values[-1], 5))


@pytest.mark.parametrize(
    "values",
    [
        np.tile([1.0, 2.0, 3.0, 0.0], 8),  # the last index is 0
        np.tile([1.0, -1.0, 1.0, -1.0], 8),  # the trend is 0 everywhere
        np.tile([3.0, -1.0, -1.0, -1.0], 8) + np.eye(32)[5],  # in most places
    ],
    ids=["zero", "around zero", "indices of one place"],
)
def test_naive2_of_a_season_without_indices_is_the_last_value(values: np.ndarray) -> None:
    assert is_seasonal(values, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = naive2(values, 4, 6)
    np.testing.assert_array_equal(made, np.repeat(values[-1], 6))


def test_naive2_keeps_a_season_in_which_one_value_is_zero() -> None:
    np.testing.assert_allclose(naive2(np.tile([1.0, 0.0, 3.0, 2.0], 8), 4, 6), [1, 0, 3, 2, 1, 0])


def test_a_groups_mase_is_over_the_series_that_have_one() -> None:
    found = {
        "Weekly": (Errors(300, 8.0, 2.0, 100), Errors(300, 10.0, 4.0, 100)),
        "Daily": (Errors(50, 8.0, float("nan"), 0), Errors(50, 10.0, float("nan"), 0)),
        "Hourly": (Errors(100, 8.0, 1.0, 100), Errors(100, 10.0, 2.0, 100)),
    }
    others = {row.name: row for row in grouped(found)}["Others"]
    assert (others.errors.series, others.errors.mase, others.errors.scaled) == (450, 1.5, 200)
    assert others.owa == pytest.approx((0.8 + 0.5) / 2)
    still, moving = np.full(9, 5.0), np.arange(9.0)
    assert errors_of(np.ones((2, 2)), np.ones((2, 2)), [still, moving], 1).scaled == 1


def test_averages_stand_beside_those_of_the_same_series_alone() -> None:
    ones = (Errors(10, 1.0, 1.0), Errors(10, 2.0, 2.0))
    whole = dict.fromkeys(("Yearly", "Weekly", "Hourly"), ones)

    def names(method: dict) -> list[str]:
        return [row.name for row in grouped(method, whole)]

    assert names({"Yearly": ones, "Weekly": ones}) == ["Yearly", "Weekly"]
    assert names({"Weekly": ones, "Hourly": ones}) == ["Weekly", "Hourly", "Others"]
    assert names({"Weekly": ones}) == ["Weekly"] and names(whole)[-2:] == ["Others", "Average"]
    lines = table({"one": whole, "other": {"Weekly": ones, "Hourly": ones}}).splitlines()
    assert "one" in lines and "other (without Yearly, so without their average)" in lines
    assert sum(line.startswith("  Average") for line in lines) == 2  # the other one is the paper's


def test_groups_are_weighted_by_series() -> None:
    ones = Errors(1, 10.0, 1.0)
    found = {
        "Weekly": (Errors(300, 8.0, 2.0), Errors(300, 10.0, 4.0)),
        "Hourly": (Errors(100, 16.0, 1.0), Errors(100, 20.0, 2.0)),
        "Yearly": (Errors(600, 12.0, 3.0), Errors(600, 16.0, 4.0)),
    }
    rows = {row.name: row for row in grouped(found)}
    assert list(rows) == ["Yearly", "Weekly", "Hourly", "Others", "Average"]
    assert rows["Weekly"].owa == pytest.approx((0.8 + 0.5) / 2)
    others = rows["Others"]
    assert (others.errors.series, others.errors.smape, others.errors.mase) == (400, 10.0, 1.75)
    assert others.owa == pytest.approx((10 / 12.5 + 1.75 / 3.5) / 2)
    average = rows["Average"].errors
    assert (average.smape, average.mase) == (pytest.approx(11.2), pytest.approx(2.5))
    assert [row.name for row in grouped({"Weekly": (ones, ones)})] == ["Weekly"]


def test_the_papers_average_is_that_of_its_groups() -> None:
    series = {"Yearly": 23000, "Quarterly": 24000, "Monthly": 48000, "Others": 5000}
    for place in (0, 1):
        average = sum(series[name] * PAPER[name][place] for name in series) / 100_000
        assert average == pytest.approx(PAPER["Average"][place], abs=6e-4)
    assert PAPER["Average"] == (11.983, 1.595, 0.859) and PAPER["Others"] == (4.795, 3.178, 1.006)
    assert "11.983" in table({"x": {"Weekly": (Errors(1, 1.0, 1.0), Errors(1, 1.0, 1.0))}})


@pytest.fixture(scope="module")
def m4_scores():
    spec = importlib.util.spec_from_file_location("m4_scores", ROOT / "scripts" / "m4_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_of_forecasts_is_scored(m4_scores, capsys, tmp_path: Path) -> None:
    write_m4(tmp_path, "Yearly")
    write_m4(tmp_path, "Quarterly", lengths=(30, 40))
    yearly = load_m4(tmp_path, "Yearly", 12, 6, 6)
    rows = zip(yearly.ids, yearly.future.tolist(), strict=True)
    lines = ["id,F1", *(f"{name},{','.join(map(str, values))},NA" for name, values in rows)]
    (tmp_path / "forecasts.csv").write_text("\n".join(lines))
    words = ["--forecast", str(tmp_path / "forecasts.csv"), "--root_path", str(tmp_path)]
    assert m4_scores.main(words) == 0
    out = capsys.readouterr().out
    assert "Yearly                       6     0.000    0.000   0.000" in out and "Naive2" in out and "0.859" in out
    (tmp_path / "forecasts.csv").write_text("\n".join(lines[:-1]))
    assert m4_scores.main(words) == 2
    assert "series 'Y6': got no such series, expected 6 forecasts of every Yearly series" in capsys.readouterr().err
    (tmp_path / "forecasts.csv").write_text("id,F1\nX1,3\n")
    assert m4_scores.main(words) == 2 and "got no series of a pattern" in capsys.readouterr().err
    assert m4_scores.main([]) == 2 and "expected either" in capsys.readouterr().err
    assert m4_scores.main([str(tmp_path)]) == 2 and "got no metrics.json of a run on M4" in capsys.readouterr().err
