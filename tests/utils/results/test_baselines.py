"""The baselines against other ways to compute them."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from data_provider import data_loader
from data_provider.data_loader import load_series
from data_provider.synthetic import write_synthetic
from data_provider.timestamps import infer_step
from tests.realdata import real_data
from utils.results import baselines as module
from utils.results.baselines import PENALTIES, baselines, doubts, fit_ridge, ridge_forecast, season_length


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three hourly columns of a day's rhythm with noise, 600 rows."""
    path, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    hours = np.arange(600)[:, None]
    values = np.sin(2 * np.pi * hours / 24 + np.arange(3)) * [1, 5, 2] + random.standard_normal((600, 3)) * 0.3
    frame = pd.DataFrame(values, columns=["a", "OT", "c"])
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=600, freq="h"))
    frame.to_csv(path / "own.csv", index=False)
    return path


def small(folder, **flags):
    return load_series("custom", folder, "own.csv", seq_len=30, label_len=0, pred_len=5, **flags)


def stacked(windows, columns):
    """Inputs and truths of all windows, one by one: `[windows * columns, T]`, `[.., H]`."""
    items = [windows[index] for index in range(len(windows))]
    return tuple(np.concatenate([item[key].double().numpy()[:, columns].T for item in items]) for key in ("x", "y"))


@pytest.mark.parametrize(("features", "columns"), [("M", [0, 1, 2]), ("MS", [1])])
def test_rows_by_hand(folder, features, columns):
    series = small(folder, features=features)
    last, season, ridge = baselines(series)
    x, y = stacked(series.windows("test"), columns)
    assert last.mse == pytest.approx(np.mean((x[:, -1:] - y) ** 2)) and last.mae == pytest.approx(
        np.mean(abs(x[:, -1:] - y))
    )
    assert season.mse == pytest.approx(np.mean((x[:, 6:11] - y) ** 2))  # 24 rows before each of the five
    assert ridge.mse < season.mse < last.mse
    assert [row.name for row in (last, season, ridge)] == ["last value", "last season", "ridge"]


def test_season_repeats_within_the_horizon(folder):
    series = small(folder)
    x, y = stacked(series.windows("test"), [0, 1, 2])
    expected = np.mean((np.concatenate([x[:, -3:], x[:, -3:-1]], axis=1) - y) ** 2)
    assert baselines(series, season=3)[1].mse == pytest.approx(expected)
    assert [row.name for row in baselines(series, season=31)] == ["last value", "ridge"]


def test_ridge_is_scikit_learns(folder, monkeypatch):
    monkeypatch.setattr(data_loader, "CHUNK_SEQUENCES", 50)  # many chunks, the last one short
    series = small(folder)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    deviation, found = None, {}
    for flag in ("train", "val"):
        x, y = stacked(series.windows(flag), [0, 1, 2])
        mean, deviation = x.mean(axis=1, keepdims=True), np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
        found[flag] = ((x - mean) / deviation, (y - mean) / deviation, deviation[:, 0], x, y)
    z, target, weight, _, _ = found["train"]
    scores = []
    for candidate in module.PENALTIES:
        ridge = Ridge(alpha=candidate * weight.sum(), fit_intercept=False, solver="svd").fit(z, target, sample_weight=weight)
        z_val, target_val, weight_val, x_val, y_val = found["val"]
        scores.append(np.average((ridge.predict(z_val) - target_val) ** 2, axis=0, weights=weight_val**2).mean())
        if candidate == penalty:
            np.testing.assert_allclose(weights, ridge.coef_.T, atol=1e-7)
            denormalised = ridge.predict(z_val) * weight_val[:, None] + x_val.mean(axis=1, keepdims=True)
            np.testing.assert_allclose(ridge_forecast(x_val, weights), denormalised, atol=1e-7)
    assert module.PENALTIES[int(np.argmin(scores))] == penalty


@pytest.mark.parametrize(
    ("kind", "largest", "worse"), [("waves", False, False), ("noise", True, False), ("walk", False, True)]
)
def test_what_speaks_against_a_map(folder, tmp_path, kind, largest, worse):
    """Of noise the window's mean is the best forecast, a map of zeros; of a random walk it is the last value."""
    random = np.random.default_rng(7)
    frame = pd.read_csv(folder / "own.csv")
    steps = random.standard_normal((600, 3))
    frame[["a", "OT", "c"]] = {"waves": frame[["a", "OT", "c"]], "noise": steps, "walk": steps.cumsum(axis=0)}[kind]
    frame.to_csv(tmp_path / "own.csv", index=False)
    series = small(tmp_path, percent=100 if kind == "waves" else 10)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    said = doubts(weights, penalty, series.windows("val"))
    x, y = stacked(series.windows("val"), [0, 1, 2])
    errors = [np.mean((forecast - y) ** 2) for forecast in (ridge_forecast(x, weights), x[:, -1:])]
    assert (penalty == PENALTIES[-1], errors[0] > errors[1]) == (largest, worse)
    assert ("its penalty is the largest that is tried, 100" in said) == largest
    assert (f"validation MSE is {errors[0]:.4f}, that of the last value {errors[1]:.4f}" in said) == worse
    assert bool(said) == (largest or worse)


@pytest.mark.parametrize(
    ("freq", "rows"),
    [
        ("h", 24),
        ("15min", 96),
        ("10min", 144),
        ("D", 7),
        ("B", 5),
        ("7D", 52),
        ("ME", 12),
        ("MS", 12),
        ("QE", 4),
        ("YS", 1),
        ("12h", 2),
    ],
)
def test_season_length(freq, rows):
    assert season_length(infer_step(pd.date_range("2019-01-01", periods=40, freq=freq))) == rows


def test_synthetic_series_can_be_learnt(tmp_path):
    path = write_synthetic("ETTh1", tmp_path)
    last, season, ridge = baselines(load_series("ETTh1", tmp_path, path.name, seq_len=96, pred_len=24))
    assert ridge.mse < 0.9 * season.mse and ridge.mse < 0.5 * last.mse


def test_figures_on_etth1():
    path = real_data("ETTh1")
    last, season, ridge = baselines(load_series("ETTh1", path.parent, path.name, seq_len=512, pred_len=96))
    assert (last.mse, season.mse) == (pytest.approx(1.294, abs=1e-3), pytest.approx(0.512, abs=1e-3))
    assert (ridge.mse, ridge.mae) == (pytest.approx(0.365, abs=1e-3), pytest.approx(0.391, abs=1e-3))


def test_no_penalty_is_one_of_the_choices():
    """On ETTm1 validation is the better the smaller the penalty: a grid of powers alone would end at its edge."""
    path = real_data("ETTm1")
    series = load_series("ETTm1", path.parent, path.name, seq_len=96, pred_len=24)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    assert penalty == 0
    assert np.abs(weights.sum(axis=0)).max() < 1e-9  # of the solutions the smallest: a normalised window has no mean


def test_windows_of_a_dead_sensor_do_not_decide_the_map():
    path = real_data("ETTh2")
    _, season, ridge = baselines(load_series("ETTh2", path.parent, path.name, seq_len=192, pred_len=96))
    assert ridge.mse < 0.8 * season.mse  # 1.14 of it without the weights
