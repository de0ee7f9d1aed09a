"""The baselines against other ways to compute them."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from data_provider import data_loader
from data_provider.data_loader import load_series
from data_provider.timestamps import infer_step
from tests.realdata import real_data
from utils.results import baselines as module
from utils.results.baselines import PENALTIES, baselines, doubts, fit_ridge, ridge_forecast, season_length


@pytest.fixture(scope="module")
def frame():
    """Three hourly columns of a day's rhythm with noise, 600 rows."""
    random, hours = np.random.default_rng(0), np.arange(600)[:, None]
    values = np.sin(2 * np.pi * hours / 24 + np.arange(3)) * [1, 5, 2] + random.standard_normal((600, 3)) * 0.3
    days = pd.date_range("2020-01-01", periods=600, freq="h", name="date")
    return pd.DataFrame(values, index=days, columns=["a", "OT", "c"])


def small(folder, frame, **flags):
    frame.to_csv(folder / "own.csv")
    return load_series("custom", folder, "own.csv", **{"seq_len": 30, "label_len": 0, "pred_len": 5} | flags)


def stacked(windows, columns=(0, 1, 2)):
    """Inputs and truths of all windows, one by one: `[windows * columns, T]`, `[.., H]`."""
    items = [windows[index] for index in range(len(windows))]
    return tuple(np.concatenate([item[key].double().numpy()[:, columns].T for item in items]) for key in ("x", "y"))


@pytest.mark.parametrize(
    ("flags", "columns", "places"),
    [
        ({"features": "M"}, [0, 1, 2], range(6, 11)),  # 24 rows before each of the five
        ({"features": "MS"}, [1], range(6, 11)),
        ({"pred_len": 30}, [0, 1, 2], [*range(6, 30), *range(6, 12)]),  # the season repeats within the horizon
        ({"seq_len": 23}, [0, 1, 2], None),  # none fits
    ],
)
def test_rows_by_hand(tmp_path, frame, flags, columns, places):
    series = small(tmp_path, frame, **flags)
    x, y = stacked(series.windows("test"), columns)
    weights, _ = fit_ridge(series.windows("train"), series.windows("val"))
    forecasts = {"last value": x[:, -1:], "ridge": ridge_forecast(x, weights)}
    forecasts |= {"last season": x[:, list(places)]} if places else {}
    rows = {row["name"]: row for row in baselines(series)}
    assert rows.keys() == forecasts.keys()
    for name, forecast in forecasts.items():
        found = rows[name]["mse"], rows[name]["mae"]
        assert found == pytest.approx((np.mean((forecast - y) ** 2), np.mean(abs(forecast - y))))


def test_ridge_is_scikit_learns(tmp_path, frame, monkeypatch):
    monkeypatch.setattr(data_loader, "CHUNK_SEQUENCES", 50)  # many chunks, the last one short
    series = small(tmp_path, frame)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    found = {}
    for flag in ("train", "val"):
        x, y = stacked(series.windows(flag))
        mean, std = x.mean(axis=1, keepdims=True), np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
        found[flag] = (x - mean) / std, (y - mean) / std, std[:, 0]
    z, target, weight = found["train"]
    z_val, target_val, weight_val = found["val"]  # x and its mean are those of the last split, val
    fits = [Ridge(alpha=each * weight.sum(), fit_intercept=False, solver="svd").fit(z, target, sample_weight=weight)
            for each in PENALTIES]  # fmt: skip
    errors = [np.average(np.square(fit.predict(z_val) - target_val).mean(axis=1), weights=weight_val**2) for fit in fits]
    best = int(np.argmin(errors))
    assert PENALTIES[best] == penalty
    np.testing.assert_allclose(weights, fits[best].coef_.T, atol=1e-7)
    np.testing.assert_allclose(ridge_forecast(x, weights), fits[best].predict(z_val) * std + mean, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "largest", "worse"), [("waves", False, False), ("noise", True, False), ("walk", False, True)]
)
def test_what_speaks_against_a_map(tmp_path, frame, kind, largest, worse):
    """Of noise the window's mean is the best forecast, a map of zeros; of a random walk it is the last value."""
    steps = np.random.default_rng(7).standard_normal((600, 3))
    values = {"waves": frame.to_numpy(), "noise": steps, "walk": steps.cumsum(axis=0)}[kind]
    own = pd.DataFrame(values, frame.index, frame.columns)
    series = small(tmp_path, own, percent=100 if kind == "waves" else 10)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    x, y = stacked(series.windows("val"))
    errors = [np.mean((forecast - y) ** 2) for forecast in (ridge_forecast(x, weights), x[:, -1:])]
    assert (penalty == PENALTIES[-1], errors[0] > errors[1]) == (largest, worse)
    said = doubts(weights, penalty, series.windows("val"))
    assert ("its penalty is the largest that is tried, 100" in said) == largest
    assert (f"validation MSE is {errors[0]:.4f}, that of the last value {errors[1]:.4f}" in said) == worse
    assert bool(said) == (largest or worse)


def test_very_many_sequences_are_fitted_to_every_kth_window(tmp_path, frame, monkeypatch) -> None:
    series = small(tmp_path, frame)
    train = series.windows("train")
    monkeypatch.setattr(module, "MOST_FITTED", 3 * 50)
    every = -(-len(train) // 50)
    assert every == module.fitted_every(train) == 8
    x, y = (rows.reshape(-1, 3, rows.shape[-1])[::every].reshape(-1, rows.shape[-1]) for rows in stacked(train))
    for found, expected in zip(zip(*train.sequences(every), strict=True), (x, y), strict=True):
        np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-6)
    assert baselines(series)[-1]["detail"].endswith(f", fitted to one training window in {every}")


@pytest.mark.parametrize(
    ("freq", "rows"),
    [("h", 24), ("15min", 96), ("12h", 2), ("D", 7), ("B", 5), ("7D", 52), ("ME", 12), ("MS", 12), ("QE", 4), ("YS", 1)],
)
def test_season_length(freq, rows):
    assert season_length(infer_step(pd.date_range("2019-01-01", periods=40, freq=freq))) == rows


def test_figures_on_real_data():
    path = real_data("ETTh1")
    last, season, ridge = baselines(load_series("ETTh1", path.parent, path.name, seq_len=512, pred_len=96))
    assert (last["mse"], season["mse"]) == (pytest.approx(1.294, abs=1e-3), pytest.approx(0.512, abs=1e-3))
    assert (ridge["mse"], ridge["mae"]) == (pytest.approx(0.365, abs=1e-3), pytest.approx(0.391, abs=1e-3))
    # On ETTm1 validation is the better the smaller the penalty: a grid of powers alone would end at its edge.
    path = real_data("ETTm1")
    series = load_series("ETTm1", path.parent, path.name, seq_len=96, pred_len=24)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    assert penalty == 0
    assert np.abs(weights.sum(axis=0)).max() < 1e-9  # of the solutions the smallest: a normalised window has no mean
    # Windows of a dead sensor in ETTh2 do not decide the map: 1.14 of the season's error without the weights.
    path = real_data("ETTh2")
    _, season, ridge = baselines(load_series("ETTh2", path.parent, path.name, seq_len=192, pred_len=96))
    assert ridge["mse"] < 0.8 * season["mse"]
