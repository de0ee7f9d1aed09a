"""Every model and every variant of Time-LLM in the loop: trained, interrupted, resumed, tested, asked to predict."""

import json
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import utils.run
from data_provider.batches import Batch, WindowCollate
from data_provider.timestamps import time_marks
from models.Autoformer import Model as Autoformer
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, figures, refusal, run_folder, train
from utils.flags import parse_flags
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import NEWEST, OFFSETS
from utils.saving.interrupt import Interrupted, Interrupts
from utils.setup import setup
from utils.training.evaluate import score, score_and_calibrate
from utils.training.train import EVENNESS, Clock, train_epoch, validate

WINDOWS = 101  # of the training rows
OTHERS = {
    "DLinear": {"model": "DLinear"},
    "PatchTST": {"model": "PatchTST", "ema": 0.9, "loss": "MAE+FFT", "head_dropout": 0.5},
    "Autoformer": {"model": "Autoformer"},
    "Ridge": {"model": "Ridge"},
    "LinearStack": {"model": "LinearStack", "stack_windows": 48},
}
VARIANTS = OTHERS | {
    "none": {"llm_ablation": "none", "use_reprogramming": 0},
    "attention": {"llm_ablation": "attention", "skip": "linear", "ema": 0.9},
    "transformer": {"llm_ablation": "transformer", "prompt_lags": "peaks"},
    "random": {"llm_ablation": "random", "skip": "stack", "stack_windows": 48, "skip_mode": "beside", "ema": 0.9},
    "patches alone": {"use_prompt": 0, "use_reprogramming": 0},
}  # fmt: skip


class StopAt(Interrupts):
    """A signal that has come by the time that the run looks for one once more than `looks` times."""

    def __init__(self, looks: int):
        self._looks = looks
        super().__init__()

    @property
    def received(self) -> int:
        self._looks -= 1
        return signal.SIGTERM if self._looks < 0 else 0

    @received.setter
    def received(self, number: int) -> None:
        pass  # none has come when the run begins


def scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["test"]


def same(first: Path, second: Path) -> bool:
    """Whether two states, or the trained tensors of two checkpoints, are the same to the last bit."""
    if first.suffix == ".pt":
        return first.read_bytes() == second.read_bytes()
    a, b = (load_file(file) | dict.fromkeys((OFFSETS, NEWEST), torch.zeros(0)) for file in (first, second))
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_interrupted_tested_and_asked_to_predict(small, capsys, tmp_path: Path, name: str) -> None:
    flags = VARIANTS[name] | {"do_predict": True}
    words = small(**flags)
    lines, folder = train(words, capsys), run_folder(words)
    found, forecast = scores(folder), (folder / "forecast.csv").read_text()
    assert figures(lines) == (f"{found['mse']:.7f}", f"{found['mae']:.7f}")
    path = next(line for line in lines if line.startswith("Trained values:")).partition("; ")[2]
    stands_in = {"none": "Nothing", "attention": "AttentionLayer", "transformer": "TransformerBlock"}
    llm = f"no language model ({stands_in[name]})" if name in stands_in else "fast path"
    assert path == ("" if name in OTHERS else llm)
    assert pd.read_csv(folder / "forecast.csv").shape == (PRED_LEN, 1 + 3 * len(COLUMNS))  # the ends of 80 %, too

    # interrupted in the middle, and resumed
    stopped = small(**flags, checkpoints=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        utils.run.main(parse_flags(stopped), StopAt(3))
    other = run_folder(stopped)
    train([*stopped, "--resume"], capsys)
    assert same(folder / "checkpoint.safetensors", other / "checkpoint.safetensors")
    assert same(*(sorted(place.glob("state.*"))[-1] for place in (folder, other)))
    assert scores(other) == found and (other / "forecast.csv").read_text() == forecast

    # from the checkpoint alone: what makes the model comes from its record
    for file in ("metrics.json", "forecast.csv"):
        (folder / file).unlink()
    alone = ["--is_training", "0", "--plots", "0", "--save_predictions", "0", "--device", "cpu", "--checkpoint", str(folder)]
    train(alone, capsys)
    assert scores(folder) == found
    train([*alone, "--do_predict"], capsys)
    assert (folder / "forecast.csv").read_text() == forecast


@pytest.mark.parametrize(("name", "features"), [("Autoformer", "S"), ("Ridge", "S"), ("PatchTST", "MS"), ("none", "MS")])
def test_one_column_is_forecast(small, capsys, name: str, features: str) -> None:
    words = small(**VARIANTS[name], features=features, target="flow", do_predict=True, max_iters=1)
    lines, folder = train(words, capsys), run_folder(words)
    assert list(pd.read_csv(folder / "forecast.csv")) == ["date", "flow", "flow_lo80", "flow_hi80"]
    assert figures(train([*words, "--is_training", "0", "--do_predict", "False"], capsys)) == figures(lines)
    assert Checkpoint.open(folder).flags["enc_in"] == (1 if features == "S" else 3)


def test_batch_normalisation_counts_the_steps_and_nothing_else(small, capsys, monkeypatch) -> None:
    """Neither the step that the loop tries first, nor one of which a window overflows: that one is skipped."""
    collate, count = WindowCollate.__call__, iter(range(1, 10**6))

    def broken(self: WindowCollate, items: list[dict]) -> Batch:
        batch = collate(self, items)
        batch.x[1, 3] = float("inf") if next(count) == 3 else batch.x[1, 3]
        return batch

    monkeypatch.setattr(WindowCollate, "__call__", broken)
    words = small(model="PatchTST", train_epochs=2, batch_size=8)
    lines = train(words, capsys)
    assert any(line.startswith("Dry run: ") for line in lines)
    assert any("epoch 1, iteration 2: the loss is nan; the step is skipped" in line for line in lines)  # after the dry run's
    assert all(np.isfinite(list(scores(run_folder(words)).values())))
    state = torch.load(sorted(run_folder(words).glob("state.*"))[-1])["model"]
    counts = [int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert counts == [2 * (WINDOWS // 8) - 1] * 4


def test_ridge_is_the_baseline_however_it_is_asked_for(small, capsys) -> None:
    """No batch is too large for it, one epoch is all, a repeat is the same."""
    for flags in ({"batch_size": WINDOWS + 1, "itr": 2}, {"batch_size": 7, "features": "MS", "itr": 2, "train_epochs": 5}):
        words = small(model="Ridge", eval_batch_size=7, learning_rate=1.0, **flags)
        lines, folder = train(words, capsys), run_folder(words, 1)
        metrics = json.loads((folder / "metrics.json").read_text())
        (ridge,) = (row for row in metrics["baselines"]["rows"] if row["name"] == "ridge")
        assert metrics["test"] == pytest.approx({"mse": ridge["mse"], "mae": ridge["mae"]}, abs=1e-6)
        assert len({line for line in lines if line.startswith("Test MSE")}) == 1
        assert len(pd.read_csv(folder / "history.csv")) == 1
        assert any(line.startswith("This run is finished") for line in train([*words, "--resume"], capsys))
    line = refusal(small(model="DLinear", batch_size=WINDOWS + 1), capsys)
    assert f"--batch_size: got {WINDOWS + 1}, expected at most {WINDOWS}" in line


def test_the_linear_skip_starts_at_ridge(small, capsys, tmp_path: Path) -> None:
    def held(said: bool = False, **flags: object) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        words = small(**flags)
        assert said == any("WARNING: " in line and "linear map is a poor one" in line for line in train(words, capsys))
        return load_file(run_folder(words) / "checkpoint.safetensors"), scores(run_folder(words))

    fitted, ridge = held(model="Ridge")
    for skip in ("ridge", "linear"):
        still, found = held(skip=skip, max_iters=1, learning_rate=1e-30)
        torch.testing.assert_close(still["linear_map"], fitted["linear_map"], rtol=0, atol=1e-25)
        assert found == pytest.approx(ridge, abs=1e-6)  # the head begins at zero
        moved, _ = held(skip=skip)
        assert torch.equal(moved["linear_map"], fitted["linear_map"]) == (skip == "ridge")
        assert moved["output_projection.linear.weight"].any()
    table = pd.read_csv(tmp_path / "series.csv", index_col="date")
    table[:] = np.random.default_rng(5).standard_normal(table.shape).cumsum(axis=0)  # a walk, which no map is good for
    table.to_csv(tmp_path / "series.csv")
    held(said=True, skip="linear", max_iters=1, percent=50)


def test_the_skip_stack_starts_at_the_stack(small, capsys) -> None:
    def tested(**flags: object) -> tuple[dict[str, float], dict[str, dict], Path]:
        words = small(stack_windows=48, **flags)
        train(words, capsys)
        rows = json.loads((run_folder(words) / "metrics.json").read_text())["baselines"]["rows"]
        return scores(run_folder(words)), {row["name"]: row for row in rows}, run_folder(words)

    alone, rows, folder = tested(model="LinearStack")
    found, beside, _ = tested(skip="stack", max_iters=1, learning_rate=1e-30)
    assert found == pytest.approx(alone, abs=1e-6)  # the head begins at zero
    assert beside["linear stack"]["mse"] == pytest.approx(alone["mse"], abs=1e-6)
    assert beside["ridge"]["mse"] == rows["ridge"]["mse"]  # fitted to all training windows, as in every report
    moved, beside, own = tested(skip="stack", learning_rate=1e-2, des="moved")
    fitted = load_file(folder / "checkpoint.safetensors")
    held = load_file(own / "checkpoint.safetensors")
    assert all(torch.equal(held[f"stack.{name}"], fitted[name]) for name in ("maps", "weights", "deviations"))
    assert moved != found and beside["linear stack"]["mse"] == pytest.approx(alone["mse"], abs=1e-6)


@pytest.mark.parametrize(
    ("skip", "bounds"), [("ridge", {}), ("stack", {}), ("ridge", {"bounds": "load:0:none,flow:0:none,OT:0:none"})]
)
def test_a_head_beside_the_map_is_averaged_with_it(small, skip: str, bounds: dict[str, str]) -> None:
    """Epochs are compared by half of each; the shares that are kept are those of the least error, drawn towards a half, of
    forecasts that no bound has cut."""
    words = small(skip=skip, skip_mode="beside", loss="MAE", stack_windows=48, **bounds)
    context = setup(parse_flags(words), 0, Interrupts())
    train_epoch(context, Clock(context))
    scores, share = validate(context), context.model.head_share.item()
    calibrated, parts = context.intervals.offsets, []
    truths = torch.cat([batch.y for batch in context.loaders["val"]])

    def forecasts(value: float) -> torch.Tensor:
        context.model.head_share.fill_(value)
        parts.clear()
        score(context, "val", lambda *batch: parts.append(batch[1]), bounded=False)
        found = score_and_calibrate(context, context.levels)
        assert bounds or (found == scores) == (value == 0.5)
        return torch.cat(parts)

    made = {value: forecasts(value) for value in (0, 0.5, 1, share)}
    assert np.array_equal(context.intervals.offsets, calibrated)  # of the shares that are kept
    torch.testing.assert_close(made[share], share * made[1] + (1 - share) * made[0])
    errors = [(made[value] - truths).square().mean() for value in (0, 1)]
    w = torch.linspace(0, 1, 2001)[:, None, None]
    squared = (w * made[1] + (1 - w) * made[0] - truths).square().mean(dim=(1, 2)) * 2 / sum(errors)
    best = w.flatten()[(squared + EVENNESS * 2 * (w.flatten() - 0.5).square()).argmin()].item()
    assert share == pytest.approx(best, abs=1e-3) and share not in (0, 0.5, 1)
    assert f"Share of the head, beside the linear map: {share:.3f}" in (context.folder / "train.log").read_text()
    context.close()


def test_the_preset_sets_what_is_left_out(small, capsys) -> None:
    words = small(preset="best", stack_windows=48, max_iters=2, ema=0.5, batch_size=4)
    lines, folder = train(words, capsys), run_folder(words)
    (line,) = (line for line in lines if line.startswith("--preset sets "))
    assert (
        line.startswith("--preset sets --skip stack --skip_mode beside --stride 16 --dropout 0.0 --head_dropout ")
        and "--ema" not in line
    )
    assert "Train, Vali and Test Loss are MAE+FFT; the test's own figures are MSE and MAE" in lines
    flags = Checkpoint.open(folder).flags
    assert (flags["preset"], flags["skip"], flags["ema"], flags["batch_size"]) == (None, "stack", 0.5, 4)
    spelled = small(stack_windows=48, max_iters=2, ema=0.5, batch_size=4) + line.split()[2:]
    assert any(line.startswith("This run is finished") for line in train([*spelled, "--resume"], capsys))


def test_a_drawn_language_model_is_that_of_the_training(small, capsys) -> None:
    words, found = small(llm_ablation="random", max_iters=1, itr=2), []
    train(words, capsys)
    for folder, seed in ((run_folder(words), 2021), (run_folder(words, 1), 2022)):
        assert Checkpoint.open(folder).backbone["random_seed"] == seed
        found.append(scores(folder))
        train(["--is_training", "0", "--plots", "0", "--device", "cpu", "--checkpoint", str(folder), "--seed", "5"], capsys)
        assert scores(folder) == found[-1]
    pretrained = small(max_iters=1)
    train(pretrained, capsys)
    assert scores(run_folder(pretrained)) not in found


def test_autoformer_reads_the_step_off_a_file_and_goes_on_from_another(small, capsys, tmp_path: Path) -> None:
    """Two horizons and a half by hand: what is forecast becomes the window's end, and the calendar goes on."""
    table = pd.read_csv(tmp_path / "series.csv")
    starts = {"series": ("2020-01-01", "15min"), "later": ("2021-03-01 22:00", "15min"), "daily": ("2020-01-01", "D")}
    for file, (start, step) in starts.items():
        table["date"] = pd.date_range(start, periods=len(table), freq=step)
        table.to_csv(tmp_path / f"{file}.csv", index=False)
    words = small(model="Autoformer", max_iters=2, moving_avg=5)
    train(words, capsys)
    folder, record = run_folder(words), Checkpoint.open(run_folder(words)).record
    assert record["flags"]["freq"] == "t"
    given = ["--is_training", "0", "--device", "cpu", "--plots", "0", "--checkpoint", str(folder)]
    daily = [*given, "--root_path", str(tmp_path), "--data_path", "daily.csv"]
    assert "time_embedding" in refusal(daily, capsys)  # another step has other marks
    train([*given, "--do_predict", "--predict_path", str(tmp_path / "later.csv"), "--predict_steps", "20"], capsys)
    found = pd.read_csv(folder / "forecast.csv", parse_dates=["date"])
    dates = pd.date_range(starts["later"][0], periods=len(table) + 24, freq="15min")
    assert list(found.date) == list(dates[len(table) :][:20])

    model = Autoformer(Namespace(**record["flags"])).eval()
    model.load_state_dict(load_file(folder / "checkpoint.safetensors"), strict=False)  # beside them, the intervals
    mean, std = (np.array(record["scaler"][name]) for name in ("mean", "deviation"))
    rows = torch.from_numpy(((table[list(COLUMNS)].to_numpy() - mean) / std).astype(np.float32))
    marks = torch.from_numpy(time_marks(dates, "t", "timeF"))
    with torch.no_grad():
        for end in range(len(table), len(table) + 20, PRED_LEN):
            ahead = marks[None, end - 8 : end + PRED_LEN]
            rows = torch.cat([rows, model(rows[None, -SEQ_LEN:], marks[None, end - SEQ_LEN : end], None, ahead)[0]])
    expected = rows[len(table) :][:20].numpy() * std + mean
    np.testing.assert_allclose(found[list(COLUMNS)], expected, rtol=1e-4, atol=1e-4)
