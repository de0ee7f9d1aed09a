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
from tests.small_run import COLUMNS
from utils.results import metrics as module
from utils.results.bands import DECILES, Intervals, offsets_of, probabilities
from utils.results.metrics import Metrics
from utils.results.test_pass import TestPass

W, H, N = 37, 5, 3
MEAN, DEVIATION = np.array([10.0, -3.0, 0.0]), np.array([2.0, 0.5, 40.0])


def by_hand(p, y, unit):
    error, far, size = np.abs(p - y), np.abs(y) > 0.01 * unit, np.abs(p) + np.abs(y)
    return {
        "mse": np.mean(error**2),
        "mae": np.mean(error),
        "rmse": np.sqrt(np.mean(error**2)),
        "mape": 100 * np.mean(error[far] / np.abs(y[far])),
        "mape_share": np.mean(far),
        "smape": 100 * np.mean(np.divide(2 * error, size, out=np.zeros_like(size), where=size > 0)),
    }


@pytest.mark.parametrize(("size", "at_once"), [(1, 10**9), (8, 1), (W, W * H * 2)])  # windows, and channels, at a time
def test_figures_are_those_of_numpy_for_any_batch_size(monkeypatch, size, at_once):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    random = np.random.default_rng(3)
    pred, true = random.standard_normal((2, W, N, H))  # standardised
    true[:4, :, 0] = pred[0, :, 0] = 0.0  # some truths at zero, one exact hit there
    units, errors = random.uniform(0.5, 2, (W, N, 1)), random.normal(size=(100, N, H))
    intervals = Intervals((80.0,), offsets_of(errors, probabilities((80.0,))), 100)
    metrics = Metrics(list(COLUMNS), MEAN, DEVIATION, H, intervals)
    for start in range(0, W, size):
        metrics.add(*(torch.from_numpy(v[start : start + size]) for v in (pred, true, units)))
    found = metrics.result()
    for scale, mean, std in (("standardised", np.zeros(N), np.ones(N)), ("own_units", MEAN, DEVIATION)):
        p, y = (v * std[:, None] + mean[:, None] for v in (pred, true))
        unit = np.broadcast_to(std[:, None], p.shape)
        assert found[scale]["all"] == pytest.approx(by_hand(p, y, unit))
        for channel, name in enumerate(COLUMNS):
            assert found[scale]["channels"][name] == pytest.approx(by_hand(p[:, channel], y[:, channel], unit[:, channel]))
        for step in range(H):
            expected = by_hand(p[..., step], y[..., step], unit[..., step])
            assert {key: values[step] for key, values in found[scale]["steps"].items()} == pytest.approx(expected)
    # pinball and weighted quantile loss, term by term
    made, places = found["intervals"], np.array(probabilities((80.0,)))
    error = true - (pred + units * intervals.offsets[:-2, None])  # (Q, W, N, H)
    losses = np.where(error > 0, places[:, None, None, None] * error, (places[:, None, None, None] - 1) * error)
    assert list(made["pinball"].values()) == pytest.approx(list(losses.mean(axis=(1, 2, 3))), rel=1e-5)
    assert list(places) == list(DECILES)  # of which those of 80 % are two
    sums = 2 * (losses * DEVIATION[:, None]).sum(axis=(1, 3)).mean(axis=0)
    sizes = np.abs(true * DEVIATION[:, None] + MEAN[:, None]).sum(axis=(0, 2))
    assert made["wql"] == pytest.approx(sums.sum() / sizes.sum(), rel=1e-5)
    assert list(made["wql_channels"].values()) == pytest.approx(list(sums / sizes), rel=1e-5)
    low, high = intervals.band(80.0)
    inside, level = (true - pred >= units * low) & (true - pred <= units * high), made["levels"]["80"]
    np.testing.assert_allclose(level["steps"]["coverage"], inside.mean(axis=(0, 1)))
    np.testing.assert_allclose(level["steps"]["width"], (units * (high - low)).mean(axis=(0, 1)), rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_memory_does_not_grow_with_the_predictions(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(1).normal(size=(1700, 100)).round(3)).add_prefix("c")
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=1700, freq="h", tz="UTC"))
    frame.to_csv(tmp_path / "wide.csv", index=False)
    series = load_series("custom", tmp_path, "wide.csv", seq_len=16, label_len=0, pred_len=100)
    context = SimpleNamespace(
        windows=series, folder=tmp_path / "run", intervals=None, levels=(), device=torch.device("cpu"), log=print,
        accelerator=Accelerator(cpu=True), model=None, pretrain=None, remarks=[],
        args=Namespace(save_predictions=1, num_workers=0, eval_batch_size=8, seed=0, season=None),
    )  # fmt: skip
    results, windows = TestPass(context), len(series.windows("test"))
    tracemalloc.start()
    for batch in batch_loader(context.args, "test", series)[1]:
        results.consume(batch, batch.y + 1)
    assert tracemalloc.get_traced_memory()[1] < 4 * windows * 100 * 100 / 2  # half of one of the arrays
    tracemalloc.stop()
    found = results.finish({"test": {}})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"predictions.npz", "metrics.json"}
    assert found["windows"] == windows and found["standardised"]["all"]["mse"] == pytest.approx(1, rel=1e-5)
    held = np.load(tmp_path / "run/predictions.npz", allow_pickle=False)
    assert held["start"][0] == frame["date"].dt.tz_localize(None).to_numpy()[-windows - 99]
