"""Prediction intervals: against NumPy on what whole runs leave, and coverage where theory promises it."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils.run
from data_provider.batches import Batch
from data_provider.data_factory import series_from_args
from data_provider.data_loader import load_series
from data_provider.synthetic import write_synthetic
from layers.norm import instance_norm
from tests.small_run import COLUMNS, PRED_LEN, refusal, run_folder, train, write_csv
from utils.flags import parse_flags
from utils.results import bands
from utils.results.bands import continued, deviations, ends, fewest_windows, intervals_of, quantiles
from utils.results.baselines import baselines
from utils.saving.checkpoint import Checkpoint, save_checkpoint

N = len(COLUMNS)


@pytest.fixture
def dlinear(argv, tmp_path: Path):
    """`dlinear(**flags)`: the command line of a DLinear of 3 iterations."""
    write_csv(tmp_path / "series.csv", 500)
    return lambda **flags: argv(**{"model": "DLinear", "max_iters": 3, "plots": 0, "torch_checkpoint": 0} | flags)


def test_ranks_and_the_fewest_windows_worked_by_hand() -> None:
    # 19 errors split the line into 20 pieces, each as likely to hold the next one: 10 % lie below the second.
    errors = np.random.default_rng(1).permutation(np.arange(1.0, 20.0))[:, None] * [[1.0, -2.0]]  # 19 windows, 2 steps
    found = quantiles(errors, (0.025, 0.1, 0.5, 0.9, 0.975))
    assert np.isnan(found[[0, 4]]).all()
    np.testing.assert_array_equal(found[1:4], [[2, -36], [10, -20], [18, -4]])
    # Between two ranks the outer one counts: of 25, floor(2.6) and ceil(23.4). As floats 0.1 * 50 and 1 - 0.9 are inexact.
    for n, level, expected in ((25, 80, (2, 24)), (39, 95, (1, 39)), (49, 80, (5, 45)), (1999, 99.9, (1, 1999))):
        np.testing.assert_array_equal(quantiles(np.arange(1.0, n + 1)[:, None], ends(level))[:, 0], expected)
    assert [fewest_windows(level) for level in (80, 90, 95, 99)] == [9, 19, 39, 199]
    for level in (10, 50, 80, 95, 99.9):
        n = fewest_windows(level)
        enough, few = (quantiles(np.ones((windows, 1)), ends(level)) for windows in (n, n - 1))
        assert np.isfinite(enough).all() and np.isnan(few).all()


def test_coverage_of_exchangeable_errors_is_what_was_promised() -> None:
    """Coverage given n errors is Beta distributed; over many draws its mean lies between the level and level + 2/(n+1)."""
    generator, n, draws = np.random.default_rng(7), 60, 4000
    for level in (80.0, 90.0, 95.0):
        low, high = ends(level)
        # Skewed errors, and a step each with its own scale.
        errors = generator.exponential(size=(n + 1, draws)) * generator.uniform(0.1, 10, draws)
        bounds = quantiles(errors[:-1], (low, high))
        inside = (errors[-1] >= bounds[0]) & (errors[-1] <= bounds[1])
        exact = (math.ceil((n + 1) * high) - math.floor((n + 1) * low)) / (n + 1)
        assert level / 100 <= exact <= level / 100 + 2 / (n + 1)
        assert abs(inside.mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)


@pytest.mark.parametrize("at_once", [1, 40 * 3 * 11, 10**9])
def test_errors_are_read_in_blocks_of_channels(tmp_path: Path, monkeypatch, at_once: int) -> None:
    errors = np.random.default_rng(0).standard_normal((2, 40, 60, 3)).astype("f4")
    files = [tmp_path / "0.npy", tmp_path / "1.npy"]
    for file, each in zip(files, errors, strict=True):
        np.save(file, each)
    monkeypatch.setattr(bands, "ERRORS_AT_ONCE", at_once)
    for chosen, expected in ((files[:1], errors[0]), (files, errors.mean(axis=0))):
        found = intervals_of(chosen, (80.0,))
        assert found.windows == 40 and found.offsets.shape == (9, 60, 3)
        ordered = np.sort(expected, axis=0)
        np.testing.assert_array_equal(found.band(80.0), [ordered[int(0.1 * 41) - 1], ordered[-int(0.1 * 41)]])


def test_the_unit_is_the_models_own_and_a_forecast_that_goes_on_from_itself_widens() -> None:
    x = np.random.default_rng(3).normal(size=(5, 40)) * [[0], [1e-4], [1], [10], [1e4]]
    np.testing.assert_allclose(deviations(x), instance_norm(torch.from_numpy(x))[2].numpy(), rtol=1e-12)
    high = np.array([[1.0, 2.0]])
    # The second round's errors come on top of a whole first one's: hypot(2, 1), hypot(2, 2), then hypot(sqrt(2) * 2, 1).
    expected = [[1, 2, math.sqrt(5), math.sqrt(8), 3]]
    np.testing.assert_allclose(continued(high, 5), expected)
    np.testing.assert_allclose(continued(-high, 5), np.negative(expected))


def errors_by_hand(words: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the checkpoint's forecasts `[W, N, H]` and deviations of the histories `[W, N, 1]`, window by window."""
    windows = series_from_args(parse_flags(words)).windows(split)
    items = [windows[number] for number in range(len(windows))]
    x, y = (torch.stack([item[name] for item in items]).transpose(1, 2) for name in ("x", "y"))  # (W, N, rows)
    job = utils.run.setup(parse_flags([*words, "--is_training", "0"]), 0, utils.run.Interrupts())
    utils.run.load_checkpoint(job)
    with torch.inference_mode():
        forecast = job.model.eval()(Batch(x.flatten(0, 1), y.flatten(0, 1))).view(len(items), N, -1)
    return (y[..., -PRED_LEN:] - forecast).numpy(), np.sqrt(x.numpy().var(axis=2, keepdims=True) + 1e-5)


def test_intervals_of_a_run_against_numpy(dlinear, capsys) -> None:
    words = dlinear(intervals="80")
    train(words, capsys)
    folder = run_folder(words)
    scores = json.loads((folder / "metrics.json").read_text())
    found, level = scores["intervals"], scores["intervals"]["levels"]["80"]
    # the ranks of the definition: floor((n + 1) / 10) and ceil(9 (n + 1) / 10)
    errors, units = errors_by_hand(words, "val")
    n, ordered = len(errors), np.sort(errors / units, axis=0)
    assert found["calibration_windows"] == n
    low, high = ordered[(n + 1) // 10 - 1], ordered[-(-9 * (n + 1) // 10) - 1]
    errors, units = errors_by_hand(words, "test")
    inside, width = (errors >= units * low) & (errors <= units * high), units * (high - low)
    assert level["coverage"] == pytest.approx(inside.mean(), abs=2 / inside.size)
    assert level["width"] == pytest.approx(width.mean(), rel=1e-5)
    by_channel = [level["channels"][name]["coverage"] for name in COLUMNS]
    np.testing.assert_allclose(by_channel, inside.mean(axis=(0, 2)), atol=1e-3)
    np.testing.assert_allclose(level["steps"]["width"], width.mean(axis=(0, 1)), rtol=1e-5)
    # predictions.npz, in own units
    with np.load(folder / "predictions.npz") as held:
        assert {"lo80", "hi80"} <= set(held) and "lo95" not in held
        counted = (held["true"] >= held["lo80"]) & (held["true"] <= held["hi80"])
        assert counted.mean() == pytest.approx(level["coverage"], abs=2 / counted.size)
        own = (held["pred"] - held["mean"]) / held["deviation"] + (units * low).swapaxes(1, 2)
        np.testing.assert_allclose(held["lo80"], own * held["deviation"] + held["mean"], rtol=1e-4, atol=1e-4)
        widths = [((held["hi80"] - held["lo80"])[:, :, place]).mean() for place in range(N)]
    own_widths = [level["channels"][name]["width_own_units"] for name in COLUMNS]
    np.testing.assert_allclose(own_widths, widths, rtol=1e-4)
    # the simple forecasts have theirs
    rows = {row["name"]: row["intervals"] for row in scores["baselines"]["rows"]}
    assert all(0 < row["levels"]["80"]["coverage"] < 1 and row["wql"] > 0 for row in rows.values())
    assert not list(folder.glob(".validation*")) and not (folder / "validation_errors.npy").exists()


def test_a_checkpoint_without_intervals_gets_them_by_a_test(dlinear, capsys) -> None:
    words = dlinear(do_predict=True)
    train(words, capsys)
    folder = run_folder(words)
    checkpoint, scores = Checkpoint.open(folder), json.loads((folder / "metrics.json").read_text())
    kept, tensors = checkpoint.intervals, checkpoint.tensors(checkpoint.header.shapes)
    save_checkpoint(folder, tensors, checkpoint.record)  # as one of before there were intervals
    assert kept is not None and kept.levels == (80.0, 95.0) and Checkpoint.open(folder).intervals is None

    test, only_forecast = (["--is_training", "0", "--checkpoint", str(folder), *more] for more in ([], ["--do_predict"]))
    (line,) = [line for line in train(only_forecast, capsys) if line.startswith("No prediction intervals")]
    assert f"python run_main.py --is_training 0 --checkpoint {folder}" in line
    assert refusal([*only_forecast, "--intervals", "80"], capsys).startswith("--intervals: got a checkpoint without any")

    assert any(line.startswith("Prediction intervals of 80 % and 95 % calibrated") for line in train(test, capsys))
    added = Checkpoint.open(folder)
    np.testing.assert_allclose(added.intervals.offsets, kept.offsets, rtol=1e-5, atol=1e-6)
    for name, tensor in added.tensors(added.header.shapes).items():
        assert torch.equal(tensor, tensors[name])
    again = json.loads((folder / "metrics.json").read_text())
    assert again["intervals"]["levels"]["95"]["coverage"] == scores["intervals"]["levels"]["95"]["coverage"]
    # the next has no validation pass; another level is calibrated beside those, and a forecast before is told how
    assert not any("calibrated" in line or line.startswith("val ") for line in train(test, capsys))
    line = refusal([*only_forecast, "--intervals", "50"], capsys)
    assert line.startswith("--intervals: got 50, expected those that ") and line.endswith("--intervals 50")
    assert any(line.startswith("Prediction intervals: 50 %") for line in train([*test, "--intervals", "50"], capsys))
    more = Checkpoint.open(folder).intervals
    assert more.levels == (50.0, 80.0, 95.0)
    np.testing.assert_allclose(more.only(kept.levels).offsets, kept.offsets, rtol=1e-5, atol=1e-6)


def test_levels_that_the_validation_windows_cannot_support_and_none(argv, tmp_path: Path, capsys) -> None:
    write_csv(tmp_path / "series.csv", 200)  # 20 validation rows: 13 windows of 8 rows
    words = argv(model="DLinear", max_iters=2, plots=0, do_predict=True)
    line = refusal([*words, "--intervals", "80", "95"], capsys)
    assert line.startswith("--intervals: got 95 with 13 validation windows, expected at least 39")
    lines = train(words, capsys)  # what nobody asked for is left out
    assert "No prediction intervals of 95 %: 13 validation windows, 39 are the fewest" in lines
    folder = run_folder(words)
    assert list(json.loads((folder / "metrics.json").read_text())["intervals"]["levels"]) == ["80"]
    # a finished run leaves out those that it has, where none is asked for
    lines = train([*words, "--resume", "--intervals", "none"], capsys)
    assert not any(line.startswith("Prediction intervals") for line in lines)
    assert "intervals" not in json.loads((folder / "metrics.json").read_text())
    with np.load(folder / "predictions.npz") as held:
        assert set(held) == {"pred", "true", "start", "columns", "mean", "deviation"}
    assert list(pd.read_csv(folder / "forecast.csv").columns) == ["date", *COLUMNS]
    assert Checkpoint.open(folder).intervals.levels == (80.0,)


def test_the_mean_of_the_repeats(dlinear, capsys) -> None:
    words = dlinear(itr=2, intervals="80", dropout=0.3, do_predict=True)
    lines = train(words, capsys)
    first = run_folder(words)
    second, mean = (first.with_name(first.name.replace("test_0-", f"test_{which}-")) for which in (1, "mean"))
    preds = []
    for folder in (first, second, mean):
        with np.load(folder / "predictions.npz") as held:
            preds.append(held["pred"])
            true, spread, widths = held["true"], held["deviation"], held["hi80"] - held["lo80"]
    assert not np.array_equal(preds[0], preds[1])
    np.testing.assert_allclose(preds[2], (preds[0] + preds[1]) / 2, rtol=1e-4, atol=1e-5)
    mse = np.square(((preds[0] + preds[1]) / 2 - true) / spread).mean()
    (line,) = [line for line in lines if line.startswith("Mean of 2 repeats: ")]
    assert float(line.split("MSE: ")[1].split()[0]) == pytest.approx(mse, rel=1e-4)
    frames = [pd.read_csv(folder / "forecast.csv") for folder in (first, second, mean)]
    for name in COLUMNS:
        middle = (frames[0][name] + frames[1][name]) / 2
        np.testing.assert_allclose(frames[2][name], middle, rtol=1e-5)
        assert (frames[2][f"{name}_lo80"] < middle).all() and (middle < frames[2][f"{name}_hi80"]).all()
    # its bands are those of the mean of the errors
    errors = [np.load(folder / "validation_errors.npy") for folder in (first, second)]
    n, ordered = len(errors[0]), np.sort((errors[0] + errors[1]) / 2, axis=0)
    offsets = ordered[-(-9 * (n + 1) // 10) - 1] - ordered[(n + 1) // 10 - 1]  # in deviations of the histories
    scores = json.loads((mean / "metrics.json").read_text())
    at = scores["intervals"]["levels"]["80"]["steps"]["width"]
    _, units = errors_by_hand(words, "test")
    np.testing.assert_allclose(at, (units * offsets).mean(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(at, (widths / spread).mean(axis=(0, 2)), rtol=1e-3)
    assert scores["repeats"] == 2 and scores["test"]["mse"] == pytest.approx(mse, rel=1e-4)

    train([*words, "--is_training", "0"], capsys)  # forecasts again, without windows
    pd.testing.assert_frame_equal(pd.read_csv(mean / "forecast.csv"), frames[2])
    # no mean of forecasts of an earlier checkpoint; the earlier one stays, and moves aside for that of other flags
    before = (mean / "metrics.json").read_bytes()
    lines = train([*words, "--resume", "--train_epochs", "2", "--save_predictions", "0"], capsys)
    assert any("an earlier checkpoint" in line for line in lines) and (mean / "metrics.json").read_bytes() == before
    lines = train([*words, "--batch_size", "8"], capsys)
    aside = mean.with_name(f"{mean.name}.1")
    assert f"An earlier mean is now in: {aside}" in lines and (aside / "metrics.json").read_bytes() == before


def test_other_data_get_intervals_of_their_own_and_the_target_those_of_all(dlinear, tmp_path: Path, capsys) -> None:
    words = dlinear()
    train(words, capsys)
    folder = run_folder(words)
    before = (folder / "checkpoint.safetensors").read_bytes()
    frame = pd.read_csv(tmp_path / "series.csv")
    frame[list(COLUMNS)] = np.random.default_rng(9).normal(size=(len(frame), N))
    frame.to_csv(tmp_path / "other.csv", index=False)
    here = ["--is_training", "0", "--checkpoint", str(folder)]
    other = [*here, "--root_path", str(tmp_path), "--data_path", "other.csv"]
    lines = train(other, capsys)
    assert any("calibrated on" in line for line in lines) and (folder / "checkpoint.safetensors").read_bytes() == before
    (scores,) = (json.loads(path.read_text()) for path in folder.glob("on_*/metrics.json"))
    # White noise: what the windows before were like is what the next are.
    assert scores["intervals"]["levels"]["80"]["coverage"] == pytest.approx(0.8, abs=0.05)
    lines = train([*other, "--do_predict"], capsys)
    assert any(line.startswith("No prediction intervals: they would be those of other data") for line in lines)
    train([*here, "--features", "MS", "--do_predict"], capsys)
    alone = pd.read_csv(folder / "forecast.csv")
    train([*here, "--do_predict"], capsys)
    names = ["OT", *(f"OT_{end}" for end in ("lo80", "hi80", "lo95", "hi95"))]
    assert list(alone.columns) == ["date", *names]
    np.testing.assert_allclose(alone[names], pd.read_csv(folder / "forecast.csv")[names], rtol=1e-5)


def test_where_the_test_data_change_their_ways_the_promise_breaks(tmp_path: Path) -> None:
    path = write_synthetic("drift", tmp_path)
    series = load_series("custom", tmp_path, path.name, seq_len=96, pred_len=24)
    assert baselines(series, levels=(80.0,))[-1]["intervals"]["levels"]["80"]["coverage"] < 0.5
