"""Figures of a test pass against numpy on the whole arrays."""

import tracemalloc

import numpy as np
import pytest
import torch

from utils.results.metrics import Metrics
from utils.results.metrics import Predictions

W, H, N = 37, 5, 3
COLUMNS = ["a", "b", "c"]
MEAN, DEVIATION = np.array([10.0, -3.0, 0.0]), np.array([2.0, 0.5, 40.0])


@pytest.fixture
def arrays():
    """Standardised forecasts and truths `[W, H, N]`, with truths at zero and one exact hit at zero."""
    random = np.random.default_rng(3)
    pred, true = random.standard_normal((2, W, H, N))
    true[:4, 0, :] = 0.0
    pred[0, 0, :] = 0.0
    return pred, true


def gather(pred, true, size):
    metrics = Metrics(MEAN, DEVIATION, H, torch.device("cpu"))
    for start in range(0, W, size):
        part = slice(start, start + size)
        metrics.add(*(torch.from_numpy(v[part]).transpose(1, 2) for v in (pred, true)))
    return metrics.result(COLUMNS)


def by_hand(p, y, unit):
    error, far = np.abs(p - y), np.abs(y) > 0.01 * unit
    size = np.abs(p) + np.abs(y)
    return {
        "mse": np.mean(error**2),
        "mae": np.mean(error),
        "rmse": np.sqrt(np.mean(error**2)),
        "mape": 100 * np.mean(error[far] / np.abs(y[far])),
        "mape_share": np.mean(far),
        "smape": 100 * np.mean([2 * e / s if s else 0.0 for e, s in zip(error.flat, size.flat, strict=True)]),
    }


@pytest.mark.parametrize("size", [1, 8, W])
def test_figures_are_those_of_numpy_for_any_batch_size(arrays, size):
    pred, true = arrays
    found = gather(pred, true, size)
    for scale, mean, deviation in (("standardised", 0.0, np.ones(N)), ("own_units", MEAN, DEVIATION)):
        p, y = (v * deviation + mean for v in (pred, true))
        unit = np.broadcast_to(deviation, p.shape)
        assert found[scale]["all"] == pytest.approx(by_hand(p, y, unit))
        for channel, name in enumerate(COLUMNS):
            expected = by_hand(p[..., channel], y[..., channel], unit[..., channel])
            assert found[scale]["channels"][name] == pytest.approx(expected)
        for step in range(H):
            expected = by_hand(p[:, step], y[:, step], unit[:, step])
            assert {key: values[step] for key, values in found[scale]["steps"].items()} == pytest.approx(expected)


def test_truths_at_zero_give_no_infinity():
    metrics = Metrics(np.zeros(1), np.ones(1), 2, torch.device("cpu"))
    metrics.add(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2))
    figures = metrics.result(["x"])["own_units"]["all"]
    assert figures["mape"] is None and figures["mape_share"] == 0 and figures["smape"] == 100


def test_predictions_in_any_order_and_whole(tmp_path, arrays):
    pred, true = (v.astype(np.float32) for v in arrays)
    starts = np.arange("2020-01-31", "2020-03-08", dtype="datetime64[D]")[:W]
    file = Predictions(tmp_path, W, H, COLUMNS)
    for first in (30, 0, 10, 20):
        file.add(first, pred[first : first + 10], true[first : first + 10])
    assert not (tmp_path / "predictions.npz").exists()
    file.close(starts, MEAN, DEVIATION)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]
    held = np.load(tmp_path / "predictions.npz", allow_pickle=False)
    assert np.array_equal(held["pred"], pred) and np.array_equal(held["true"], true)
    assert held["columns"].tolist() == COLUMNS and (held["start"] == starts).all()
    assert np.array_equal(held["mean"], MEAN) and np.array_equal(held["deviation"], DEVIATION)


def test_memory_does_not_grow_with_the_test_set(tmp_path):
    windows, horizon, batch = 8000, 100, np.zeros((8, 100, 10), dtype=np.float32)  # 64 MB in all
    tracemalloc.start()
    file = Predictions(tmp_path, windows, horizon, [f"c{n}" for n in range(10)])
    for first in range(0, windows, 8):
        file.add(first, batch, batch)
    file.close(np.zeros(windows, "datetime64[s]"), np.zeros(10), np.ones(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # Python's own table of names may grow meanwhile, by 8 MB in a long session
    assert (tmp_path / "predictions.npz").stat().st_size > 2 * windows * horizon * 10 * 4
