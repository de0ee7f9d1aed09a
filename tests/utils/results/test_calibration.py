"""Prediction intervals of whole runs, against NumPy on what the runs leave."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils.run
import utils.training.train
from data_provider.data_factory import data_provider
from data_provider.data_loader import load_series
from data_provider.synthetic import write_synthetic
from layers.errors import InputError
from tests.small_run import COLUMNS, PRED_LEN, run_folder, train, write_csv
from utils.command_line import parse_flags
from utils.results.bands import DECILES
from utils.results.baselines import baselines
from utils.results.bands import IntervalMetrics
from utils.saving.checkpoint import Checkpoint
from utils.saving.tensors import write_tensors

N = len(COLUMNS)


@pytest.fixture
def dlinear(argv, tmp_path: Path):
    """`dlinear(**flags)`: the command line of a DLinear of 3 iterations."""
    write_csv(tmp_path / "series.csv", 500)
    return lambda **flags: argv(**{"model": "DLinear", "max_iters": 3, "plots": 0, "torch_checkpoint": 0} | flags)


def errors_by_hand(words: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the checkpoint's forecasts `[W, N, H]` and deviations of the histories `[W, N, 1]`, window by window."""
    args = parse_flags(words)
    data, _ = data_provider(args, split)
    model = utils.run.setup(parse_flags([*words, "--is_training", "0"]), 0, utils.run.Interrupts())
    utils.run.load_checkpoint(model)
    errors, deviations = [], []
    for item in (data[i] for i in range(len(data))):
        with torch.inference_mode():
            forecast = model.model.eval()(item["x"][None])[0]
        errors.append((item["y"][-PRED_LEN:] - forecast).numpy().T)
        deviations.append(np.sqrt(item["x"].numpy().T.var(axis=1, keepdims=True) + 1e-5))
    return np.stack(errors), np.stack(deviations)


def test_intervals_of_a_run_against_numpy(dlinear, capsys) -> None:
    words = dlinear(intervals="80")
    train(words, capsys)
    folder = run_folder(words)
    scores = json.loads((folder / "metrics.json").read_text())
    found = scores["intervals"]
    # the ranks of the definition: floor((n + 1) / 10) and ceil(9 (n + 1) / 10)
    errors, deviations = errors_by_hand(words, "val")
    n, ordered = len(errors), np.sort(errors / deviations, axis=0)
    assert found["calibration_windows"] == n
    low, high = ordered[(n + 1) // 10 - 1], ordered[-(-9 * (n + 1) // 10) - 1]
    errors, deviations = errors_by_hand(words, "test")
    inside = (errors >= deviations * low) & (errors <= deviations * high)
    width = deviations * (high - low)
    assert found["levels"]["80"]["coverage"] == pytest.approx(inside.mean(), abs=2 / inside.size)
    assert found["levels"]["80"]["width"] == pytest.approx(width.mean(), rel=1e-5)
    for name, channel in zip(COLUMNS, range(N), strict=True):
        by_channel = found["levels"]["80"]["channels"][name]
        assert by_channel["coverage"] == pytest.approx(inside[:, channel].mean(), abs=1e-3)
    steps = found["levels"]["80"]["steps"]
    np.testing.assert_allclose(steps["width"], width.mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(steps["coverage"], inside.mean(axis=(0, 1)), atol=1e-2)
    # predictions.npz, in own units
    with np.load(folder / "predictions.npz") as held:
        assert {"lo80", "hi80"} <= set(held) and "lo95" not in held
        counted = (held["true"] >= held["lo80"]) & (held["true"] <= held["hi80"])
        assert counted.mean() == pytest.approx(found["levels"]["80"]["coverage"], abs=2 / counted.size)
        own = (held["pred"] - held["mean"]) / held["deviation"] + (deviations * low).swapaxes(1, 2)
        np.testing.assert_allclose(held["lo80"], own * held["deviation"] + held["mean"], rtol=1e-4, atol=1e-4)
    # the simple forecasts have theirs
    rows = {row["name"]: row["intervals"] for row in scores["baselines"]["rows"]}
    assert all(0 < row["levels"]["80"]["coverage"] < 1 and row["wql"] > 0 for row in rows.values())
    assert not list(folder.glob(".validation*")) and not (folder / "validation_errors.npy").exists()


def test_losses_by_definition() -> None:
    """Pinball and weighted quantile loss, term by term."""
    from tests.utils.test_intervals import made

    intervals, random = made(levels=(80.0,), channels=2, steps=3), np.random.default_rng(2)
    forecast, truth = random.normal(size=(2, 5, 2, 3)).astype(np.float32)
    deviation = random.uniform(0.5, 2, size=(5, 2, 1)).astype(np.float32)
    mean, spread = np.array([3.0, -1.0]), np.array([2.0, 10.0])
    metrics = IntervalMetrics(intervals, mean, spread)
    for part in (slice(0, 2), slice(2, 5)):
        metrics.add(*(torch.from_numpy(v[part]) for v in (forecast, truth, deviation)))
    found = metrics.result(["a", "b"])
    losses = {}
    for probability, offset in zip(intervals.probabilities, intervals.offsets, strict=True):
        error = truth - (forecast + deviation * offset)
        losses[probability] = np.where(error > 0, probability * error, (probability - 1) * error)
        assert found["pinball"][f"{probability:g}"] == pytest.approx(losses[probability].mean(), rel=1e-5)
    own = truth * spread[:, None] + mean[:, None]
    wql = [2 * (losses[q] * spread[:, None]).sum() / np.abs(own).sum() for q in DECILES]
    assert found["wql"] == pytest.approx(np.mean(wql), rel=1e-5)
    alone = [2 * (losses[q][:, 1] * spread[1]).sum() / np.abs(own[:, 1]).sum() for q in DECILES]
    assert found["wql_channels"]["b"] == pytest.approx(np.mean(alone), rel=1e-5)


def stripped(folder: Path) -> bytes:
    """Make the checkpoint one of before there were intervals; its tensors' bytes."""
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.header is not None
    tensors = checkpoint.tensors(checkpoint.header.shapes)
    checkpoint.file.unlink()
    write_tensors(checkpoint.file, tensors, {"record": checkpoint.header.metadata["record"]})
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


def test_an_older_checkpoint_gets_its_intervals_by_a_test(dlinear, capsys) -> None:
    words = dlinear(do_predict=True)
    train(words, capsys)
    folder = run_folder(words)
    kept = Checkpoint.open(folder).intervals
    scores = json.loads((folder / "metrics.json").read_text())
    before = stripped(folder)
    assert Checkpoint.open(folder).intervals is None

    only_forecast = ["--is_training", "0", "--do_predict", "--checkpoint", str(folder)]
    lines = train(only_forecast, capsys)
    (line,) = [line for line in lines if line.startswith("No prediction intervals")]
    assert f"python run_main.py --is_training 0 --checkpoint {folder}" in line
    with pytest.raises(InputError, match="--intervals: got a checkpoint without any"):
        utils.run.main(parse_flags([*only_forecast, "--intervals", "80"]))

    lines = train(["--is_training", "0", "--checkpoint", str(folder)], capsys)
    assert any(line.startswith("Prediction intervals of 80 % and 95 % calibrated") for line in lines)
    added = Checkpoint.open(folder)
    assert kept is not None and added.intervals is not None and added.header is not None
    np.testing.assert_allclose(added.intervals.offsets, kept.offsets, rtol=1e-5, atol=1e-6)
    tensors = added.tensors(added.header.shapes)
    assert b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors)) == before
    again = json.loads((folder / "metrics.json").read_text())
    assert again["intervals"]["levels"]["95"]["coverage"] == scores["intervals"]["levels"]["95"]["coverage"]
    # and the next has no validation pass
    lines = train(["--is_training", "0", "--checkpoint", str(folder)], capsys)
    assert not any("calibrated" in line or line.startswith("val ") for line in lines)
    # another level is calibrated, and told to a forecast that asks for it before
    with pytest.raises(InputError, match=r"--intervals: got 90, expected those that .* has, 80 95; .*--intervals 90$"):
        utils.run.main(parse_flags([*only_forecast, "--intervals", "90"]))


def test_more_than_the_validation_windows_can_support(argv, tmp_path: Path, capsys) -> None:
    write_csv(tmp_path / "series.csv", 200)  # 20 validation rows: 17 windows of 4 rows
    words = argv(model="DLinear", max_iters=2, plots=0)
    windows = 20 - PRED_LEN + 1
    assert 9 <= windows < 39
    with pytest.raises(InputError, match=f"--intervals: got 95 with {windows} validation windows, expected at least 39"):
        utils.run.main(parse_flags([*words, "--intervals", "80", "95"]))
    lines = train(words, capsys)  # what nobody asked for is left out
    assert f"No prediction intervals of 95 %: {windows} validation windows, 39 are the fewest" in lines
    scores = json.loads((run_folder(words) / "metrics.json").read_text())
    assert list(scores["intervals"]["levels"]) == ["80"]


def test_none_is_what_there_was_before(dlinear, capsys) -> None:
    words = dlinear(intervals="none", do_predict=True)
    lines = train(words, capsys)
    folder = run_folder(words)
    assert not any("ntervals" in line for line in lines) and Checkpoint.open(folder).intervals is None
    assert "intervals" not in json.loads((folder / "metrics.json").read_text())
    with np.load(folder / "predictions.npz") as held:
        assert set(held) == {"pred", "true", "start", "columns", "mean", "deviation"}
    assert list(pd.read_csv(folder / "forecast.csv").columns) == ["date", *COLUMNS]


def test_the_mean_of_the_repeats(dlinear, capsys) -> None:
    words = dlinear(itr=2, intervals="80", dropout=0.3, do_predict=True)
    lines = train(words, capsys)
    first = run_folder(words)
    second, mean = (first.with_name(first.name.replace("test_0-", f"test_{which}-")) for which in (1, "mean"))
    preds = []
    for folder in (first, second, mean):
        with np.load(folder / "predictions.npz") as held:
            preds.append(held["pred"])
            true, centre, spread = held["true"], held["mean"], held["deviation"]
    assert not np.array_equal(preds[0], preds[1])
    np.testing.assert_allclose(preds[2], (preds[0] + preds[1]) / 2, rtol=1e-4, atol=1e-5)
    standardised = ((preds[0] + preds[1]) / 2 - true) / spread
    (line,) = [line for line in lines if line.startswith("Mean of 2 repeats: ")]
    assert float(line.split("MSE: ")[1].split()[0]) == pytest.approx(np.square(standardised).mean(), rel=1e-4)
    scores = json.loads((mean / "metrics.json").read_text())
    assert scores["repeats"] == 2 and centre.shape == (N,)
    frames = [pd.read_csv(folder / "forecast.csv") for folder in (first, second, mean)]
    for name in COLUMNS:
        middle = (frames[0][name] + frames[1][name]) / 2
        np.testing.assert_allclose(frames[2][name], middle, rtol=1e-5)
        assert (frames[2][f"{name}_lo80"] < middle).all() and (middle < frames[2][f"{name}_hi80"]).all()
    train([*words, "--is_training", "0"], capsys)  # forecasts again, without windows
    pd.testing.assert_frame_equal(pd.read_csv(mean / "forecast.csv"), frames[2])
    errors = [np.load(folder / "validation_errors.npy") for folder in (first, second)]
    n, ordered = len(errors[0]), np.sort((errors[0] + errors[1]) / 2, axis=0)
    widths = ordered[-(-9 * (n + 1) // 10) - 1] - ordered[(n + 1) // 10 - 1]  # in deviations of the histories
    at = scores["intervals"]["levels"]["80"]["steps"]["width"]
    with np.load(mean / "predictions.npz") as held:
        found = ((held["hi80"] - held["lo80"]) / held["deviation"]).mean(axis=(0, 2))
    np.testing.assert_allclose(at, found, rtol=1e-3)
    _, deviations = errors_by_hand(words, "test")
    np.testing.assert_allclose(at, (deviations * widths).mean(axis=(0, 1)), rtol=1e-4)


def test_other_data_get_intervals_of_their_own(dlinear, tmp_path: Path, capsys) -> None:
    words = dlinear()
    train(words, capsys)
    folder = run_folder(words)
    before = (folder / "checkpoint.safetensors").read_bytes()
    frame = pd.read_csv(tmp_path / "series.csv")
    frame[list(COLUMNS)] = np.random.default_rng(9).normal(size=(len(frame), N))
    frame.to_csv(tmp_path / "other.csv", index=False)
    test = ["--is_training", "0", "--checkpoint", str(folder), "--root_path", str(tmp_path), "--data_path", "other.csv"]
    lines = train(test, capsys)
    assert any("calibrated on" in line for line in lines) and (folder / "checkpoint.safetensors").read_bytes() == before
    (scores,) = (json.loads(path.read_text()) for path in folder.glob("on_*/metrics.json"))
    # White noise: what the windows before were like is what the next are.
    assert scores["intervals"]["levels"]["80"]["coverage"] == pytest.approx(0.8, abs=0.05)
    lines = train([*test, "--do_predict"], capsys)
    assert any(line.startswith("No prediction intervals: they would be those of other data") for line in lines)


def test_where_the_test_data_change_their_ways_the_promise_breaks(tmp_path: Path) -> None:
    path = write_synthetic("drift", tmp_path)
    series = load_series("custom", tmp_path, path.name, seq_len=96, pred_len=24)
    ridge = baselines(series, levels=(80.0,))[-1]
    assert ridge.intervals is not None and ridge.intervals["levels"]["80"]["coverage"] < 0.5


def test_other_levels_are_added_to_those_that_are_kept(dlinear, capsys) -> None:
    words = dlinear()
    train(words, capsys)
    folder = run_folder(words)
    before = Checkpoint.open(folder).intervals
    lines = train(["--is_training", "0", "--checkpoint", str(folder), "--intervals", "50"], capsys)
    assert any(line.startswith("Prediction intervals: 50 %") for line in lines)
    after = Checkpoint.open(folder).intervals
    assert before is not None and after is not None and after.levels == (50.0, 80.0, 95.0)
    np.testing.assert_allclose(after.only(before.levels).offsets, before.offsets, rtol=1e-5, atol=1e-6)


def test_the_targets_intervals_of_a_training_on_all_columns(dlinear, tmp_path: Path, capsys) -> None:
    words = dlinear(model_id="all")
    train(words, capsys)
    folder = run_folder(words)
    train(["--is_training", "0", "--checkpoint", str(folder), "--features", "MS", "--do_predict"], capsys)
    (ms,) = folder.glob("**/forecast.csv")
    alone = pd.read_csv(ms)
    train(["--is_training", "0", "--checkpoint", str(folder), "--do_predict"], capsys)
    whole = pd.read_csv(folder / "forecast.csv")
    ends = [f"OT_{end}" for end in ("lo80", "hi80", "lo95", "hi95")]
    assert list(alone.columns) == ["date", "OT", *ends]
    np.testing.assert_allclose(alone[["OT", *ends]], whole[["OT", *ends]], rtol=1e-5)


def test_a_finished_run_gives_the_intervals_that_are_asked_for(dlinear, capsys) -> None:
    words = dlinear(do_predict=True)
    train(words, capsys)
    folder = run_folder(words)
    lines = train([*words, "--resume", "--intervals", "none"], capsys)
    assert not any(line.startswith("Prediction intervals") for line in lines)
    assert list(pd.read_csv(folder / "forecast.csv").columns) == ["date", *COLUMNS]
    train([*words, "--resume", "--intervals", "80"], capsys)
    assert [name for name in pd.read_csv(folder / "forecast.csv").columns if name.startswith("OT")] == [
        "OT", "OT_lo80", "OT_hi80",
    ]  # fmt: skip
    kept = Checkpoint.open(folder).intervals
    assert kept is not None and kept.levels == (80.0, 95.0)


def test_an_interrupted_validation_leaves_no_file(dlinear, capsys, monkeypatch) -> None:
    words = dlinear()

    def stopped(job, split, consume=None):
        assert list(job.folder.glob(".validation*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.training.train, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        utils.run.main(parse_flags(words))
    assert not list(run_folder(words).glob(".validation*"))


def test_no_mean_of_forecasts_that_do_not_belong_together(dlinear, tmp_path: Path, capsys) -> None:
    words = dlinear(itr=2, intervals="80")
    train(words, capsys)
    first = run_folder(words)
    mean = first.with_name(first.name.replace("test_0-", "test_mean-"))
    before = (mean / "metrics.json").read_bytes()
    # the repeats have gone on since, and left no forecasts
    lines = train([*words, "--resume", "--train_epochs", "2", "--save_predictions", "0"], capsys)
    assert any("an earlier checkpoint" in line for line in lines) and (mean / "metrics.json").read_bytes() == before
    (first / "predictions.npz").write_bytes((first / "predictions.npz").read_bytes()[:1000])
    lines = train([*words, "--resume", "--train_epochs", "2", "--save_predictions", "0"], capsys)
    assert any(line.startswith("No mean of the 2 repeats' forecasts") for line in lines)
    # tested on other data in the file's place, they lie elsewhere
    frame = pd.read_csv(tmp_path / "series.csv")
    frame["load"] += 1000 * np.random.default_rng(1).normal(size=len(frame))
    frame.to_csv(tmp_path / "series.csv", index=False)
    lines = train([*words, "--is_training", "0"], capsys)
    assert not any(line.startswith("Mean of") for line in lines) and (mean / "metrics.json").read_bytes() == before


def test_an_earlier_mean_of_other_flags_moves_aside(dlinear, capsys) -> None:
    words = dlinear(itr=2, intervals="80")
    train(words, capsys)
    first = run_folder(words)
    mean = first.with_name(first.name.replace("test_0-", "test_mean-"))
    before = (mean / "metrics.json").read_bytes()
    lines = train([*words, "--batch_size", "8"], capsys)
    aside = mean.with_name(f"{mean.name}.1")
    assert f"An earlier mean is now in: {aside}" in lines and (aside / "metrics.json").read_bytes() == before
    assert (mean / "metrics.json").read_bytes() != before
