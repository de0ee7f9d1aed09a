"""Prediction intervals: against NumPy on what whole runs leave, and coverage where theory promises it."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save

import utils.run
from data_provider.batches import Batch
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, refusal, run_folder, train, write_csv
from utils.flags import parse_flags
from utils.forecaster import Forecaster
from utils.results import bands
from utils.results.bands import ends, fewest_windows, follow, probabilities, quantiles, recalibrated
from utils.results.metrics import missed
from utils.saving.checkpoint import Checkpoint, save_checkpoint
from utils.saving.files import NEWEST, OFFSETS

N = len(COLUMNS)


@pytest.fixture
def dlinear(argv, tmp_path: Path):
    write_csv(tmp_path / "series.csv", 500)
    return lambda **flags: argv(**{"model": "DLinear", "max_iters": 3, "plots": 0, "torch_checkpoint": 0} | flags)


def test_ranks_and_the_fewest_windows_worked_by_hand() -> None:
    # 19 errors split the line into 20 pieces, each as likely to hold the next one: 10 % lie below the second.
    errors = np.random.default_rng(1).permutation(np.arange(1.0, 20.0))[:, None] * [[1.0, -2.0]]  # 19 windows, 2 steps
    missing = [np.nan, np.nan]
    expected = [missing, [2, -36], [10, -20], [18, -4], missing]
    np.testing.assert_array_equal(quantiles(errors, (0.025, 0.1, 0.5, 0.9, 0.975)), expected)
    # Between two ranks the outer one counts: of 25, floor(2.6) and ceil(23.4). As floats 0.1 * 50 and 1 - 0.9 are inexact.
    for n, level, expected in ((25, 80, (2, 24)), (39, 95, (1, 39)), (49, 80, (5, 45)), (1999, 99.9, (1, 1999))):
        np.testing.assert_array_equal(quantiles(np.arange(1.0, n + 1)[:, None], ends(level))[:, 0], expected)
    for level, n in ((10, 2), (80, 9), (90, 19), (95, 39), (99, 199)):
        enough, few = (quantiles(np.ones((windows, 1)), ends(level)) for windows in (n, n - 1))
        assert fewest_windows(level) == n and np.isfinite(enough).all() and np.isnan(few).all()


@pytest.mark.parametrize("level", [80.0, 90.0, 95.0])
def test_coverage_of_exchangeable_errors_is_what_was_promised(level: float) -> None:
    """Coverage given n errors is Beta distributed; over many draws its mean lies between the level and level + 2/(n+1)."""
    generator, n, draws, (low, high) = np.random.default_rng(7), 60, 4000, ends(level)
    # Skewed errors, and a step each with its own scale.
    errors = generator.exponential(size=(n + 1, draws)) * generator.uniform(0.1, 10, draws)
    bounds = quantiles(errors[:-1], (low, high))
    inside = (errors[-1] >= bounds[0]) & (errors[-1] <= bounds[1])
    exact = (math.ceil((n + 1) * high) - math.floor((n + 1) * low)) / (n + 1)
    assert level / 100 <= exact <= level / 100 + 2 / (n + 1)
    assert abs(inside.mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)


def errors_by_hand(words: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the checkpoint's forecasts `[W, N, H]` and deviations of the histories `[W, N, 1]`, window by window."""
    context = utils.run.setup(parse_flags([*words, "--is_training", "0", "--do_predict", "0"]), 0, utils.run.Interrupts())
    utils.run.load_checkpoint(context)
    items = list(context.windows.windows(split))
    x, y = (torch.stack([item[name] for item in items]).transpose(1, 2) for name in ("x", "y"))  # (W, N, rows)
    with torch.inference_mode():
        forecast = context.model.eval()(Batch(x.flatten(0, 1), y.flatten(0, 1))).view(len(items), N, -1)
    return (y[..., -PRED_LEN:] - forecast).numpy(), np.sqrt(x.numpy().var(axis=2, keepdims=True) + 1e-5)


def test_intervals_of_a_run_against_numpy(dlinear, tmp_path: Path, capsys) -> None:
    words = dlinear(intervals="80", do_predict=True)
    train(words, capsys)
    folder = run_folder(words)
    scores = json.loads((folder / "metrics.json").read_text())
    level, errors, units = scores["intervals"]["levels"]["80"], *errors_by_hand(words, "val")
    # the ranks of the definition: floor((n + 1) / 10) and ceil(9 (n + 1) / 10)
    n, ordered = len(errors), np.sort(errors / units, axis=0)
    low, high = ordered[(n + 1) // 10 - 1], ordered[-(-9 * (n + 1) // 10) - 1]
    errors, units = errors_by_hand(words, "test")
    inside, width = (errors >= units * low) & (errors <= units * high), units * (high - low)
    assert scores["intervals"]["calibration_windows"] == n
    assert level["coverage"] == pytest.approx(inside.mean(), abs=2 / inside.size)
    assert level["width"] == pytest.approx(width.mean(), rel=1e-5)
    by_channel = [level["channels"][name]["coverage"] for name in COLUMNS]
    np.testing.assert_allclose(by_channel, inside.mean(axis=(0, 2)), atol=1e-3)
    np.testing.assert_allclose(level["steps"]["width"], width.mean(axis=(0, 1)), rtol=1e-5)
    # predictions.npz, in own units
    with np.load(folder / "predictions.npz") as held:
        assert {"lo80", "hi80"} <= set(held) and "lo95" not in held
        own = (held["pred"] - held["mean"]) / held["deviation"] + (units * low).swapaxes(1, 2)
        np.testing.assert_allclose(held["lo80"], own * held["deviation"] + held["mean"], rtol=1e-4, atol=1e-4)
        own_widths = (held["hi80"] - held["lo80"]).mean(axis=(0, 1))
    np.testing.assert_allclose([level["channels"][name]["width_own_units"] for name in COLUMNS], own_widths, rtol=1e-4)
    # what is forecast beyond the file has those of validation and test (fewer than 500), and its own forecast in each
    both = [np.concatenate(parts) for parts in zip(errors_by_hand(words, "val"), (errors, units), strict=True)]
    n, ordered = len(both[0]), np.sort(both[0] / both[1], axis=0)
    low, high = ordered[(n + 1) // 10 - 1].clip(max=0), ordered[-(-9 * (n + 1) // 10) - 1].clip(min=0)
    frame, history = pd.read_csv(folder / "forecast.csv"), pd.read_csv(tmp_path / "series.csv")[list(COLUMNS)][-SEQ_LEN:]
    for place, name in enumerate(COLUMNS):
        for end, offset in (("lo80", low), ("hi80", high)):
            expected = frame[name] + history[name].std(ddof=0) * offset[place]
            np.testing.assert_allclose(frame[f"{name}_{end}"], expected, rtol=1e-3, atol=1e-3 * history[name].std())
    # the simple forecasts have theirs
    for row in scores["baselines"]["rows"]:
        assert 0 < row["intervals"]["levels"]["80"]["coverage"] < 1 and row["intervals"]["wql"] > 0


def test_a_checkpoint_without_intervals_gets_them_by_a_test(dlinear, capsys) -> None:
    words = dlinear(do_predict=True, save_predictions=0)
    train(words, capsys)
    folder = run_folder(words)
    checkpoint = Checkpoint.open(folder)
    kept, tensors = checkpoint.intervals, checkpoint.tensors(checkpoint.shapes)
    record = {name: held for name, held in checkpoint.record.items() if name != "intervals"}
    save_checkpoint(folder, tensors, record)  # as one of before there were intervals
    assert kept.levels == (80.0, 95.0) and Checkpoint.open(folder).intervals is None

    test, only_forecast = (["--is_training", "0", "--checkpoint", str(folder), *more] for more in ([], ["--do_predict"]))
    (line,) = [line for line in train(only_forecast, capsys) if line.startswith("No prediction intervals")]
    assert f"python run_main.py --is_training 0 --checkpoint {folder}" in line
    assert refusal([*only_forecast, "--intervals", "80"], capsys).startswith("--intervals: got a checkpoint without any")

    assert any(line.startswith("Prediction intervals of 80 % and 95 % calibrated") for line in train(test, capsys))
    added = Checkpoint.open(folder)
    np.testing.assert_allclose(added.intervals.offsets, kept.offsets, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in added.tensors(added.shapes).items())
    older = {name: held for name, held in load_file(folder / "checkpoint.safetensors").items() if name != NEWEST}
    record = dict(added.record) | {"intervals": {"levels": [80.0, 95.0], "windows": added.intervals.windows}}
    older[OFFSETS] = older[OFFSETS][:-2]  # as the version before wrote them
    (folder / "checkpoint.safetensors").write_bytes(save(older, {"record": json.dumps(record)}))
    assert any("calibrated" in line for line in train(test, capsys)) and Checkpoint.open(folder).intervals.newest
    # the next has no validation pass; another level is calibrated beside those, and a forecast before is told how
    assert not any("calibrated" in line or line.startswith("val ") for line in train(test, capsys))
    line = refusal([*only_forecast, "--intervals", "50"], capsys)
    assert line.startswith("--intervals: got 50, expected those that ") and line.endswith("--intervals 50")
    train([*test, "--intervals", "50"], capsys)
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
    train([*words, "--resume", "--intervals", "none"], capsys)
    assert "intervals" not in json.loads((folder / "metrics.json").read_text())
    assert set(np.load(folder / "predictions.npz")) == {"pred", "true", "start", "columns", "mean", "deviation"}
    assert list(pd.read_csv(folder / "forecast.csv").columns) == ["date", *COLUMNS]
    assert Checkpoint.open(folder).intervals.levels == (80.0,)


def test_the_mean_of_the_repeats(dlinear, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bands, "ERRORS_AT_ONCE", 1)  # errors are read channel by channel
    words = dlinear(itr=2, intervals="80", dropout=0.3, do_predict=True)
    lines = train(words, capsys)
    first = run_folder(words)
    second, mean = (first.with_name(first.name.replace("test_0-", f"test_{which}-")) for which in (1, "mean"))
    held = [dict(np.load(folder / "predictions.npz")) for folder in (first, second, mean)]
    middle, spread = (held[0]["pred"] + held[1]["pred"]) / 2, held[2]["deviation"]
    np.testing.assert_allclose(held[2]["pred"], middle, rtol=1e-4, atol=1e-5)
    mse = np.square((middle - held[2]["true"]) / spread).mean()
    (line,) = [line for line in lines if line.startswith("Mean of 2 repeats: ")]
    assert float(line.split("MSE: ")[1].split()[0]) == pytest.approx(mse, rel=1e-4)
    frames = [pd.read_csv(folder / "forecast.csv", index_col="date") for folder in (first, second, mean)]
    middle = (frames[0] + frames[1])[list(COLUMNS)] / 2
    np.testing.assert_allclose(frames[2][list(COLUMNS)], middle, rtol=1e-5)
    assert all((frames[2][f"{n}_lo80"] < middle[n]).all() and (middle[n] < frames[2][f"{n}_hi80"]).all() for n in COLUMNS)
    # its bands are those of the mean of the errors
    errors = [np.load(folder / "errors.npy") for folder in (first, second)]  # of validation, then of the test
    n = json.loads((first / "metrics.json").read_text())["intervals"]["calibration_windows"]
    assert len(errors[0]) == n + len(held[0]["pred"])
    ordered = np.sort((errors[0][:n] + errors[1][:n]) / 2, axis=0)
    offsets = ordered[-(-9 * (n + 1) // 10) - 1] - ordered[(n + 1) // 10 - 1]  # in deviations of the histories
    scores = json.loads((mean / "metrics.json").read_text())
    at = scores["intervals"]["levels"]["80"]["steps"]["width"]
    _, units = errors_by_hand(words, "test")
    np.testing.assert_allclose(at, (units * offsets).mean(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(at, ((held[2]["hi80"] - held[2]["lo80"]) / spread).mean(axis=(0, 2)), rtol=1e-3)
    assert scores["repeats"] == 2 and scores["test"]["mse"] == pytest.approx(mse, rel=1e-4)

    train([*words, "--is_training", "0"], capsys)  # forecasts again, without windows
    pd.testing.assert_frame_equal(pd.read_csv(mean / "forecast.csv", index_col="date"), frames[2])


def test_other_data_get_intervals_of_their_own_and_the_target_those_of_all(dlinear, tmp_path: Path, capsys) -> None:
    words = dlinear(save_predictions=0)
    train(words, capsys)
    folder = run_folder(words)
    before = [(folder / name).read_bytes() for name in ("checkpoint.safetensors", "metrics.json")]
    frame = pd.read_csv(tmp_path / "series.csv")
    frame[list(COLUMNS)] = np.random.default_rng(9).normal(size=(len(frame), N))
    frame.to_csv(tmp_path / "other.csv", index=False)
    here = ["--is_training", "0", "--checkpoint", str(folder)]
    other = [*here, "--root_path", str(tmp_path), "--data_path", "other.csv"]
    assert any("calibrated on" in line for line in train(other, capsys))
    assert [(folder / name).read_bytes() for name in ("checkpoint.safetensors", "metrics.json")] == before
    scores = json.loads((folder / "on_other" / "metrics.json").read_text())
    # White noise: what the windows before were like is what the next are.
    assert scores["intervals"]["levels"]["80"]["coverage"] == pytest.approx(0.8, abs=0.05)
    lines = train([*other, "--do_predict"], capsys)
    assert any(line.startswith("No prediction intervals: they would be those of other data") for line in lines)
    frames = []
    for features in ("MS", "M"):
        train([*here, "--features", features, "--do_predict"], capsys)
        frames.append(pd.read_csv(folder / "forecast.csv"))
    assert list(frames[0].columns) == ["date", "OT", *(f"OT_{end}" for end in ("lo80", "hi80", "lo95", "hi95"))]
    pd.testing.assert_frame_equal(frames[0], frames[1][list(frames[0])], rtol=1e-5)


def test_a_column_that_is_mostly_zero_has_a_band_with_its_forecast_in_it(argv, tmp_path: Path, capsys) -> None:
    rng, rows = np.random.default_rng(4), 1500
    frame = pd.read_csv(write_csv(tmp_path / "series.csv", rows, ("rain", "OT")))
    frame["rain"] = np.where(rng.uniform(size=rows) < 0.995, 0.0, rng.exponential(5, rows)).round(2)
    frame.to_csv(tmp_path / "series.csv", index=False)
    words = argv(model="Ridge", do_predict=True, plots=0, torch_checkpoint=0)
    lines = train(words, capsys)
    assert any(line.startswith("WARNING: rain hardly ever changed") for line in lines)
    assert any(line.startswith("No value of rain is below 0") for line in lines)
    level = json.loads((run_folder(words) / "metrics.json").read_text())["intervals"]["levels"]["80"]
    assert level["channels"]["rain"]["coverage"] > 0.9 and level["channels"]["rain"]["width"] > 0.01
    frame = pd.read_csv(run_folder(words) / "forecast.csv")
    for level in (80, 95):
        low, high = frame[f"rain_lo{level}"], frame[f"rain_hi{level}"]
        assert (low <= frame["rain"]).all() and (frame["rain"] <= high).all() and (low < high).all()

    words = argv(model="Ridge", do_predict=True, plots=0, torch_checkpoint=0, des="bounded", bounds="rain:0:6,OT:none:none")
    (line,) = [line for line in train(words, capsys) if "--bounds" in line]
    assert line.startswith("WARNING: --bounds: the file has values of rain beyond them")
    folder = run_folder(words)
    bounded, held = pd.read_csv(folder / "forecast.csv"), dict(np.load(folder / "predictions.npz"))
    for name in (name for name in frame if name != "date"):  # where nothing is beyond, all is as it was
        limits = (0, 6) if name.startswith("rain") else (-np.inf, np.inf)
        # The bands are those of bounded forecasts, whose errors differ a little.
        np.testing.assert_allclose(bounded[name], frame[name].clip(*limits), rtol=0.1, atol=2e-3)
    assert all(held[name][..., 0].min() >= 0 and held[name][..., 0].max() <= 6 for name in ("pred", "lo95", "hi95"))
    metrics = json.loads((folder / "metrics.json").read_text())
    own = metrics["own_units"]["channels"]["rain"]
    assert own["mse"] == pytest.approx(np.square(held["pred"] - held["true"])[..., 0].mean(), rel=1e-4)
    rain = metrics["intervals"]["levels"]["95"]["channels"]["rain"]
    assert rain["width_own_units"] == pytest.approx((held["hi95"] - held["lo95"])[..., 0].mean(), rel=1e-4)
    # truths are those of the file: a zero is no rounded one, which would lie below a band that ends at 0
    truths = np.lib.stride_tricks.sliding_window_view(pd.read_csv(tmp_path / "series.csv")["rain"][-300:], PRED_LEN)
    assert np.array_equal(held["true"][..., 0], truths.astype(np.float32))
    assert ((held["lo95"] <= held["true"]) & (held["true"] <= held["hi95"]))[..., 0].mean() == pytest.approx(
        rain["coverage"]
    )
    # a program that loads it has them, too
    predicted = Forecaster.load(folder).predict(pd.read_csv(tmp_path / "series.csv"))
    np.testing.assert_allclose(predicted["rain_lo80"], bounded["rain_lo80"], rtol=1e-4, atol=1e-6)
    scores = Forecaster.load(folder).evaluate(pd.read_csv(tmp_path / "series.csv")[-300 - 32 :])["intervals"]["levels"]
    assert scores["95"]["width"] == pytest.approx(metrics["intervals"]["levels"]["95"]["width"], rel=1e-4)
    for wrong in ("snow:0:none", "rain:3", "5", "rain:2:1"):
        assert refusal(argv(model="Ridge", bounds=wrong), capsys).startswith(f"--bounds: got '{wrong}', expected a least")


def test_a_band_reaches_to_its_own_forecast_and_both_kinds_say_what_they_missed() -> None:
    errors = np.random.default_rng(2).normal(3, 1, (200, 1, 4))  # a biased model: all truths lie above it
    intervals = bands.Intervals((80.0,), bands.offsets_of(errors, probabilities((80.0,))), 200)
    low, high = intervals.band(80.0)
    assert (low == 0).all()
    np.testing.assert_allclose(high, np.sort(errors, axis=0)[180], rtol=1e-6)
    levels = {"80": {"coverage": 0.81, "channels": {"a": {"coverage": 0.9}, "b": {"coverage": 0.65}}}}
    (line,) = missed({"levels": levels})
    assert line == "The 80 % band missed its promise: it held 81.0 % of the test's truths; of the worst column, b, 65.0 %"
    assert not missed({"levels": {"80": {"coverage": 0.78, "channels": {"a": {"coverage": 0.71}}}}})


def adaptive_by_hand(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of 80 %, `[N, H]`, of errors `[O, N, H]` of windows a row apart: written as Gibbs and Candes have it."""
    count, H, low, high = len(errors), errors.shape[2], np.empty(errors.shape[1:]), np.empty(errors.shape[1:])
    for n in range(errors.shape[1]):
        beyond, levels, places = np.array([0.1, 0.1]), [], {}
        for now in range(count + H):
            came = [(now - 1 - h, h) for h in range(H) if (now - 1 - h, h) in places]
            if now >= count:  # the file has ended, and all is known at once
                came = [at for at in places if at[0] + at[1] + 1 > count - 1]
            if came:
                below = np.mean([places[at] <= levels[at[0]][0] for at in came])
                above = np.mean([1 - places[at] <= levels[at[0]][1] for at in came])
                beyond = beyond + 0.01 * (0.1 - np.array([below, above]))
            if now >= count:
                break
            levels.append(beyond)
            for h in range(H):
                known = errors[: max(0, now - h), n, h]
                if len(known) >= 9:
                    lower, equal = np.sum(known < errors[now, n, h]), np.sum(known == errors[now, n, h])
                    places[now, h] = (lower + equal / 2 + 0.5) / (len(known) + 1)
        ordered = np.sort(errors[:, n], axis=0)
        low[n] = ordered[max(0, math.floor(beyond[0] * (count + 1)) - 1)]
        high[n] = ordered[min(count - 1, count - math.floor(beyond[1] * (count + 1)))]
    return low, high


def test_adaptive_bands_are_those_of_the_definition() -> None:
    errors = np.random.default_rng(6).standard_normal((90, 2, 4)).cumsum(axis=0)[:, :, ::-1] / 4  # which go together
    rows = np.arange(90)
    beyond, _ = follow(errors, rows, rows[:, None] + np.arange(1, 5), 80.0)
    low, high = recalibrated(errors, (80.0,), {80.0: beyond}).band(80.0)
    expected = adaptive_by_hand(errors)
    np.testing.assert_allclose([low, high], [expected[0].clip(max=0), expected[1].clip(min=0)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["a longer day", "more variance", "neither"])
def test_adaptive_bands_hold_what_they_promise_where_the_data_change(kind: str) -> None:
    """Errors of an hourly forecast of 6 rows, before and after a change that fixed bands do not survive."""
    rng, count, H = np.random.default_rng(8), 1600, 6
    spread = np.where(np.arange(count + H) < 600, 1, {"more variance": 3.0}.get(kind, 1.0))
    bias = np.where(np.arange(count + H) < 600, 0, {"a longer day": 4.0}.get(kind, 0.0)) * np.sin(np.arange(count + H) / 30)
    shocks = rng.standard_normal((count + H, 2)) * spread[:, None] + bias[:, None]
    errors = np.stack([shocks[o + 1 : o + 1 + H].T for o in range(count)])  # origins, columns, steps
    origins = np.arange(count).astype("datetime64[h]").astype("datetime64[ns]")
    dates = origins[:, None] + np.arange(1, H + 1).astype("timedelta64[h]")
    fixed = quantiles(errors[:500], (0.1, 0.9))
    before = ((errors >= fixed[0]) & (errors <= fixed[1]))[1100:].mean()
    assert before > 0.75 if kind == "neither" else before < 0.6
    beyond, inside = follow(errors, origins, dates, 80.0)
    assert abs(np.nanmean(inside[1100:]) - 0.8) < 0.03  # 500 forecasts after the change
    made = recalibrated(errors, (80.0,), {80.0: beyond}).band(80.0)
    both = recalibrated(errors, (80.0, 95.0), {80.0: beyond, 95.0: np.full((2, 2), 0.3)})
    assert all((outer <= inner).all() for outer, inner in zip(both.band(95.0)[:1], both.band(80.0)[:1], strict=True))
    assert made[0].shape == (2, H) and (np.abs(made[1]) > 0.5).all()
    # what has not come true is not known: rows cut off at the end change nothing before them
    later = errors.copy()
    later[dates.repeat(2, axis=0).reshape(errors.shape) > origins[1200]] = np.nan
    np.testing.assert_array_equal(follow(later, origins, dates, 80.0)[1][: 1200 - H], inside[: 1200 - H])


def test_a_band_at_a_bound_has_a_width() -> None:
    """Of rain that falls on one day in twenty, a forecast that is never below 0 errs upwards on most days."""
    random = np.random.default_rng(8)
    rain = np.where(random.random(2000) < 0.05, random.gamma(2, 3, 2000), 0)
    errors = (rain - random.normal(0.1, 0.3, 2000).clip(min=0)).reshape(-1, 1, 1)  # of which nine in ten are 0 or below
    low, high = bands.Intervals((80.0,), bands.offsets_of(errors, probabilities((80.0,))), 2000).band(80.0)
    assert low.item() < 0 and high.item() == pytest.approx(errors.clip(min=0).mean(), rel=1e-6)
