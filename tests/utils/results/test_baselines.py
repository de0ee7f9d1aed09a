"""The baselines against other ways to compute them."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from data_provider import data_loader
from data_provider.batches import WindowCollate
from data_provider.data_loader import load_series
from data_provider.timestamps import infer_step
from models import LinearStack
from tests.realdata import real_data
from utils.results import baselines as module
from utils.results.baselines import (
    DEVIATION_PENALTIES,
    EVENNESS,
    PENALTIES,
    STACK_PENALTIES,
    doubts,
    find_season,
    fit_ridge,
    fit_stack,
    measured,
    ridge_forecast,
    season_length,
    stack_windows,
)
from utils.results.metrics import difference


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
        ({"seq_len": 23}, [0, 1, 2], None),  # the season lies before the window
    ],
)
def test_rows_by_hand(tmp_path, frame, flags, columns, places):
    series = small(tmp_path, frame, **flags)
    x, y = stacked(series.windows("test"), columns)
    weights, _ = fit_ridge(series.windows("train"), series.windows("val"))
    forecasts = {"last value": x[:, -1:], "ridge": ridge_forecast(x, weights)}
    values, first, H = series.values[:, columns].astype(float), series.splits.train + series.splits.val, series.pred_len
    starts = first + np.arange(len(series.windows("test")))
    before = np.concatenate([values[start - 24 + np.arange(H) % 24].T for start in starts])
    assert places is None or np.array_equal(before, x[:, list(places)])
    forecasts["last season"] = before
    rows = {row["name"]: row for row in measured(series, season=24)["rows"]}
    assert rows.keys() == forecasts.keys()
    for name, forecast in forecasts.items():
        found = rows[name]["mse"], rows[name]["mae"]
        assert found == pytest.approx((np.mean((forecast - y) ** 2), np.mean(abs(forecast - y))))


def test_ridge_is_scikit_learns(tmp_path, frame, monkeypatch):
    monkeypatch.setattr(data_loader, "CHUNK", 5000)  # many chunks, the last one short
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


def test_a_stack_of_one_map_is_the_ridge(tmp_path, frame, monkeypatch):
    series = small(tmp_path, frame)
    weights, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    monkeypatch.setattr(module, "STACK_PENALTIES", [penalty])
    maps, shares, deviations = (tensor.double().numpy() for tensor in fit_stack(series, [(30, 0.0)], []).values())
    x, _ = stacked(series.windows("test"))
    mean = x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose((x - mean) @ maps[0] + mean, ridge_forecast(x, weights), atol=1e-6)
    assert shares == pytest.approx(1) and deviations.shape == (3, 0, 5)


# Weighted least squares by scikit-learn, penalised as a part of the total weight: the fit of lowest validation error.
def best_fit(penalties, scale, train, val):
    (z, target, weight), (z_val, target_val, _) = train, val
    fits = [np.zeros((z.shape[1], target.shape[1]))]
    for each in penalties:
        if np.isfinite(each):
            fit = Ridge(alpha=each * weight.sum(), fit_intercept=False, solver="svd").fit(z * scale, target, weight)
            fits.append(scale[:, None] * fit.coef_.T)
    return min(fits, key=lambda of: np.square(z_val @ of - target_val).sum())


@pytest.mark.parametrize("features", ["M", "MS"])
def test_a_stack_by_hand(tmp_path, frame, monkeypatch, features):
    """Maps of 48 and 30 rows; each channel deviates from the first; all are weighed by the validation errors."""
    monkeypatch.setattr(LinearStack, "DEVIATING", (range(48, 49),))
    series = small(tmp_path, frame, features=features)
    columns = [0, 1, 2] if features == "M" else [1]
    stack = LinearStack.Model(Namespace(seq_len=30, pred_len=5, features=features, enc_in=3, stack_windows=[48]))
    assert (stack.members, stack.deviating, stack.history) == ([(48, 0.5), (30, 0.0)], [0], 18)
    series = replace(series, history=stack.history)
    stack.load_state_dict(fit_stack(series, stack.members, stack.deviating))

    values, train = series.values.astype(float), series.splits.train
    ends = {"train": range(48, train - 4), "val": range(train, train + series.splits.val - 4)}
    ends["test"] = range(train + series.splits.val, 600 - 4)

    def sequences(flag, T, channels):  # by channel: inputs and truths less their window's mean, that mean, the deviation
        first = T if flag == "train" else 0  # a map's training windows are all that have its own rows
        moments = range(first, train - 4) if flag == "train" else ends[flag]
        x = np.concatenate([[values[now - T : now, c] for now in moments] for c in channels])
        y = np.concatenate([[values[now : now + 5, c] for now in moments] for c in channels])
        mean = x.mean(axis=1, keepdims=True)
        return x - mean, y - mean, mean, np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)

    def fit(T, q, penalties, channels, shared):
        scale, made = (1 + np.arange(T)[::-1] / 24) ** -q, []
        for flag in ("train", "val"):
            z, target, _, std = sequences(flag, T, channels)
            target = target - z @ shared
            made.append((z / std, target / std, std[:, 0]) if flag == "train" else (z, target, None))
        return best_fit(penalties, scale, *made)

    shared = {T: fit(T, q, STACK_PENALTIES, columns, np.zeros((T, 5))) for T, q in stack.members}
    forecasts, truths = [], []
    for channel in columns:
        own = shared[48] + fit(48, 0.5, DEVIATION_PENALTIES, [channel], shared[48])
        made = {}
        for flag in ("val", "test"):
            windows = {T: sequences(flag, T, [channel]) for T in (48, 30)}
            made[flag] = [windows[T][0] @ of + windows[T][2] for T, of in ((48, shared[48]), (30, shared[30]), (48, own))]
            truth = windows[30][1] + windows[30][2]
            if flag == "val":
                errors = np.reshape([forecast - truth for forecast in made[flag]], (3, -1))
        G = errors @ errors.T
        G *= 3 / np.trace(G)
        weights = minimize(
            lambda w, G=G: w @ G @ w + EVENNESS * np.square(w - 1 / 3).sum(), np.full(3, 1 / 3), bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-14, "maxiter": 500},
        ).x  # fmt: skip
        forecasts.append(np.tensordot(weights, made["test"], 1))
        truths.append(truth)
    forecasts, truths = np.stack(forecasts, axis=1), np.stack(truths, axis=1)  # (W, N, H)

    test = series.windows("test")  # through the loader, which gives the rows before the window
    batch = WindowCollate(5, series.target_index)([test[number] for number in range(len(test))])
    found = torch.cat([stack(part) for part in batch.split(7)]).unflatten(0, (-1, len(columns))).numpy()
    np.testing.assert_allclose(found, forecasts, atol=2e-4)
    row = measured(series, (80.0,), stack=stack)["rows"][-1]
    assert row["name"] == "linear stack"
    assert row["mse"] == pytest.approx(np.square(forecasts - truths).mean(), rel=1e-4)
    assert 0 < row["intervals"]["levels"]["80"]["coverage"] <= 1
    assert len(series.windows("train")) == len(ends["train"])
    if features == "M":  # as the Time-Series-Library calls a model
        now = ends["test"][0]
        x = torch.from_numpy(values[now - 48 : now]).float()[None]
        np.testing.assert_allclose(stack(x)[0].T, forecasts[0], atol=2e-4)


@pytest.mark.parametrize(
    ("freq", "rows", "expected"),
    [
        ("15min", 60_000, [480, 960, 1440, 2016]),
        ("h", 17_420, [360, 504, 720, 1008]),
        ("h", 1000, [120, 240]),  # 700 rows train
        ("D", 4000, [105, 147, 210, 294]),  # in weeks
        ("h", 200, [32]),  # no day fits: seq_len
    ],
)
def test_the_windows_of_a_stack_are_days_that_the_file_allows(tmp_path, freq, rows, expected):
    days = pd.date_range("2016-07-01", periods=rows, freq=freq, name="date")
    series = small(tmp_path, pd.DataFrame({"OT": np.arange(rows) % 7.0}, index=days), seq_len=32)
    assert stack_windows(series) == expected


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
    assert measured(series)["rows"][-1]["detail"].endswith(f", fitted to one training window in {every}")


@pytest.mark.parametrize(
    ("freq", "rows"),
    [("h", 24), ("15min", 96), ("12h", 2), ("D", 7), ("B", 5), ("7D", 52), ("ME", 12), ("MS", 12), ("QE", 4), ("YS", 1)],
)
def test_season_length(freq, rows):
    assert season_length(infer_step(pd.date_range("2019-01-01", periods=40, freq=freq))) == rows


def test_the_season_is_that_which_repeats_itself_best_and_may_be_longer_than_a_window(tmp_path) -> None:
    weeks = pd.date_range("2010-01-03", periods=400, freq="7D", name="date")
    year = np.sin(2 * np.pi * np.arange(400) / 52) + 0.1 * np.random.default_rng(1).standard_normal(400)
    series = small(tmp_path, pd.DataFrame({"ill": year}, weeks))  # windows of 30 weeks
    (row,) = [row for row in measured(series)["rows"] if row["name"] == "last season"]
    assert find_season(series) == 52 and row["title"] == "repeat the last 52 rows" and row["mse"] < 0.1
    hours = pd.date_range("2020-01-01", periods=2000, freq="h", name="date")
    for weekly, expected in ((0.0, 24), (3.0, 168)):
        shape = np.sin(2 * np.pi * np.arange(2000) / 24) + weekly * (np.arange(2000) // 24 % 7 > 4) + 0.002 * np.arange(2000)
        assert find_season(small(tmp_path, pd.DataFrame({"load": shape}, hours))) == expected
    years = pd.date_range("1700-01-01", periods=300, freq="YS", name="date")
    found = measured(small(tmp_path, pd.DataFrame({"spots": year[:300]}, years)))
    assert found["no season"].startswith("no natural season of rows 1 year apart") and len(found["rows"]) == 2


def test_differences_have_the_interval_of_their_mean() -> None:
    """Of independent windows the usual one; of windows that go together a wider one, as the theory of means has it."""
    rng, W = np.random.default_rng(3), 4000
    noise = rng.standard_normal(W + 9)
    alone, together = noise[:W] + 0.1, np.convolve(noise, np.ones(10), "valid")  # each shock counts in ten windows
    for values, block, sd in ((alone, 1, 1), (together, 100, 10)):
        mean, low, high = difference(values, np.zeros(W), block)
        assert mean == pytest.approx(values.mean())
        assert (high - low) / 2 == pytest.approx(1.96 * sd / np.sqrt(W), rel=0.15)
        assert low < mean < high
    assert difference(alone[:399], np.zeros(399), 100) is None


def test_a_map_is_fitted_to_all_rows_with_the_penalty_of_the_training(tmp_path, frame) -> None:
    series = small(tmp_path, frame)
    _, penalty = fit_ridge(series.windows("train"), series.windows("val"))
    everything = replace(series, all_rows=True).windows("train")
    assert len(everything) == 600 - 35 + 1
    found, held = fit_ridge(series.windows("train"), series.windows("val"), everything)
    x, y = stacked(everything)
    mean, std = x.mean(axis=1, keepdims=True), np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    weight = std[:, 0]
    fit = Ridge(alpha=penalty * weight.sum(), fit_intercept=False, solver="svd").fit(
        (x - mean) / std, (y - mean) / std, weight
    )
    assert held == penalty
    np.testing.assert_allclose(found, fit.coef_.T, rtol=1e-5, atol=1e-8)


def test_figures_on_real_data():
    path = real_data("ETTh1")
    last, season, ridge = measured(load_series("ETTh1", path.parent, path.name, seq_len=512, pred_len=96), season=24)["rows"]
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
    _, season, ridge = measured(load_series("ETTh2", path.parent, path.name, seq_len=192, pred_len=96))["rows"]
    assert ridge["mse"] < 0.8 * season["mse"]
