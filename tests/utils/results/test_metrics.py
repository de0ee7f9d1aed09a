"""Figures of a test pass, and what it leaves, against NumPy on the whole arrays."""

import tracemalloc
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from data_provider.data_factory import batch_loader
from data_provider.data_loader import load_series
from tests.small_run import COLUMNS, run_folder, train
from utils.results import metrics as module
from utils.results import test_pass
from utils.results.bands import DECILES, Intervals, probabilities, quantiles
from utils.results.metrics import Metrics
from utils.results.test_pass import TestPass

W, H, N = 37, 5, 3
MEAN, DEVIATION = np.array([10.0, -3.0, 0.0]), np.array([2.0, 0.5, 40.0])


@pytest.fixture
def arrays():
    """Standardised forecasts and truths `[W, N, H]`, some truths at zero, one exact hit there; and units `[W, N, 1]`."""
    random = np.random.default_rng(3)
    pred, true = random.standard_normal((2, W, N, H))
    true[:4, :, 0] = 0.0
    pred[0, :, 0] = 0.0
    return pred, true, random.uniform(0.5, 2, (W, N, 1))


def by_hand(p, y, unit):
    error, far, size = np.abs(p - y), np.abs(y) > 0.01 * unit, np.abs(p) + np.abs(y)
    return {
        "mse": np.mean(error**2),
        "mae": np.mean(error),
        "rmse": np.sqrt(np.mean(error**2)),
        "mape": 100 * np.mean(error[far] / np.abs(y[far])),
        "mape_share": np.mean(far),
        "smape": 100 * np.mean([2 * e / s if s else 0.0 for e, s in zip(error.flat, size.flat, strict=True)]),
    }


@pytest.mark.parametrize(("size", "at_once"), [(1, 10**9), (8, 1), (W, W * H * 2)])  # windows, and channels, at a time
def test_figures_are_those_of_numpy_for_any_batch_size(arrays, monkeypatch, size, at_once):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    pred, true, units = arrays
    errors = np.random.default_rng(5).normal(size=(100, N, H))
    intervals = Intervals((80.0,), quantiles(errors, probabilities((80.0,))), 100)
    metrics = Metrics(list(COLUMNS), MEAN, DEVIATION, H, intervals)
    for start in range(0, W, size):
        metrics.add(*(torch.from_numpy(v[start : start + size]) for v in arrays))
    found = metrics.result()
    for scale, mean, deviation in (("standardised", np.zeros(N), np.ones(N)), ("own_units", MEAN, DEVIATION)):
        p, y = (v * deviation[:, None] + mean[:, None] for v in (pred, true))
        unit = np.broadcast_to(deviation[:, None], p.shape)
        assert found[scale]["all"] == pytest.approx(by_hand(p, y, unit))
        for channel, name in enumerate(COLUMNS):
            assert found[scale]["channels"][name] == pytest.approx(by_hand(p[:, channel], y[:, channel], unit[:, channel]))
        for step in range(H):
            expected = by_hand(p[..., step], y[..., step], unit[..., step])
            assert {key: values[step] for key, values in found[scale]["steps"].items()} == pytest.approx(expected)
    # pinball and weighted quantile loss, term by term
    losses, made = {}, found["intervals"]
    for probability, offset in zip(probabilities((80.0,)), intervals.offsets, strict=True):
        error = true - (pred + units * offset)
        losses[probability] = np.where(error > 0, probability * error, (probability - 1) * error)
        assert made["pinball"][f"{probability:g}"] == pytest.approx(losses[probability].mean(), rel=1e-5)
    spread, size_of_truths = DEVIATION[:, None], np.abs(true * DEVIATION[:, None] + MEAN[:, None])
    wql = [2 * (losses[q] * spread).sum() / size_of_truths.sum() for q in DECILES]
    assert made["wql"] == pytest.approx(np.mean(wql), rel=1e-5)
    alone = [2 * (losses[q][:, 1] * spread[1]).sum() / size_of_truths[:, 1].sum() for q in DECILES]
    assert made["wql_channels"][COLUMNS[1]] == pytest.approx(np.mean(alone), rel=1e-5)
    low, high = intervals.band(80.0)
    inside, level = (true - pred >= units * low) & (true - pred <= units * high), made["levels"]["80"]
    np.testing.assert_allclose(level["steps"]["coverage"], inside.mean(axis=(0, 1)))
    np.testing.assert_allclose(level["steps"]["width"], (units * (high - low)).mean(axis=(0, 1)), rtol=1e-6)


def test_truths_at_zero_give_no_infinity():
    metrics = Metrics(["x"], np.zeros(1), np.ones(1), 2)
    metrics.add(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 1))
    figures = metrics.result()["own_units"]["all"]
    assert figures["mape"] is None and figures["mape_share"] == 0 and figures["smape"] == 100


@pytest.mark.filterwarnings("error")
def test_predictions_are_whole_and_memory_does_not_grow_with_them(tmp_path):
    columns, rows = [f"c{n}" for n in range(100)], 1700
    frame = pd.DataFrame(np.random.default_rng(1).normal(size=(rows, 100)).round(3), columns=columns)
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=rows, freq="h", tz="UTC"))
    frame.to_csv(tmp_path / "wide.csv", index=False)
    series = load_series("custom", tmp_path, "wide.csv", seq_len=16, label_len=0, pred_len=100)
    job = SimpleNamespace(
        windows=series, folder=tmp_path / "run", intervals=None, levels=(), device=torch.device("cpu"), log=print,
        accelerator=Accelerator(cpu=True), args=Namespace(save_predictions=1, num_workers=0, eval_batch_size=8, seed=0),
    )  # fmt: skip
    _, loader = batch_loader(job.args, "test", series)
    results = TestPass(job)
    tracemalloc.start()
    for batch in loader:
        results.consume(batch, batch.y + 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not (tmp_path / "run/predictions.npz").exists()
    found = results.finish({"test": {}})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"predictions.npz", "metrics.json"}
    windows = len(series.windows("test"))
    assert found["windows"] == windows and peak < 4 * windows * 100 * 100 / 2  # half of one of the arrays
    with np.load(tmp_path / "run/predictions.npz", allow_pickle=False) as held:
        whole = np.lib.stride_tricks.sliding_window_view(frame[columns].to_numpy()[-windows - 99 :], 100, axis=0)
        np.testing.assert_allclose(held["true"], whole.swapaxes(1, 2), atol=1e-5)
        np.testing.assert_allclose((held["pred"] - held["true"]) / held["deviation"], 1, atol=1e-4)
        assert held["columns"].tolist() == columns and len(held["start"]) == windows
        assert held["start"][0] == frame["date"].dt.tz_localize(None).to_numpy()[-windows - 99]
    np.testing.assert_allclose(found["standardised"]["all"]["mse"], 1, rtol=1e-5)


def test_predictions_are_left_out_where_the_disk_is_too_small(argv, capsys, monkeypatch):
    monkeypatch.setattr(test_pass, "free_bytes", lambda folder: 1000)
    words = argv(model="DLinear", max_iters=2, plots=0)
    (warning,) = [line for line in train(words, capsys) if line.startswith("WARNING: predictions.npz is left out")]
    # 57 windows of 8 rows and 3 columns: pred, true, the ends of 80 %, and one of them once more
    assert f"it takes {57 * 8 * 3 * 4 * 5 / 1e6:.1f} MB on the disk, 0.0 MB are free" in warning
    folder = run_folder(words)
    assert not (folder / "predictions.npz").exists() and "mse" in (folder / "metrics.json").read_text()
