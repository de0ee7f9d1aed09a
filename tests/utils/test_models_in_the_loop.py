"""Every model and every variant of Time-LLM in the loop: trained, interrupted, resumed, tested, asked to predict."""

import csv
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
from scripts import summary
from tests.small_run import (
    COLUMNS,
    PRED_LEN,
    SEQ_LEN,
    figures,
    refusal,
    run_folder,
    train,
)
from utils.flags import parse_flags
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import OFFSETS
from utils.saving.interrupt import Interrupted, Interrupts
from utils.setup import setup
from utils.training.memory import advice, fitting_sequences, loading_advice

WINDOWS = 101  # of the training rows
OTHERS = {
    "DLinear": {"model": "DLinear"},
    "PatchTST": {"model": "PatchTST"},
    "Autoformer": {"model": "Autoformer"},
    "Ridge": {"model": "Ridge"},
}
SUBSTITUTES = {name: {"llm_ablation": name} for name in ("none", "attention", "transformer")}
VARIANTS = OTHERS | SUBSTITUTES | {
    "random": {"llm_ablation": "random"},
    "skip ridge": {"skip": "ridge"},
    "skip linear": {"skip": "linear"},
    "w/o prompt": {"use_prompt": 0},
    "w/o reprogramming": {"use_reprogramming": 0},
    "peaks": {"prompt_lags": "peaks"},
    "nothing but the head": {"llm_ablation": "none", "use_reprogramming": 0, "skip": "linear"},
}  # fmt: skip


class StopAt(Interrupts):
    """A signal that has come by the time that the run looks for one once more than `looks` times."""

    def __init__(self, looks: int):
        self._looks = looks
        super().__init__()

    @property
    def received(self) -> int:
        """The signal's number; each reading is a look."""
        self._looks -= 1
        return signal.SIGTERM if self._looks < 0 else 0

    @received.setter
    def received(self, number: int) -> None:
        assert number == 0


def scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["test"]


def same(first: Path, second: Path) -> bool:
    """Whether two states, or the trained tensors of two checkpoints, are the same to the last bit."""
    if first.suffix == ".pt":
        return first.read_bytes() == second.read_bytes()
    a, b = ({name: tensor for name, tensor in load_file(file).items() if name != OFFSETS} for file in (first, second))
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
    ablation = str(flags.get("llm_ablation", "off"))
    llm = f"no language model ({stands_in[ablation]})" if ablation in stands_in else "fast path"
    assert path == ("" if name in OTHERS else llm)
    assert pd.read_csv(folder / "forecast.csv").shape == (PRED_LEN, 1 + 3 * len(COLUMNS))  # the ends of 80 %, too

    # interrupted in the middle, and resumed
    stopped = small(**flags, checkpoints=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        utils.run.main(parse_flags(stopped), StopAt(3))
    other = run_folder(stopped)
    assert not (other / "checkpoint.safetensors").exists()
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


@pytest.mark.parametrize(
    ("name", "features"),
    [("Autoformer", "S"), ("Ridge", "S"), ("DLinear", "MS"), ("PatchTST", "MS"), ("Ridge", "MS"), ("none", "MS")],
)
def test_one_column_is_forecast(small, capsys, name: str, features: str) -> None:
    words = small(**VARIANTS[name], features=features, target="flow", do_predict=True, max_iters=3)
    lines, folder = train(words, capsys), run_folder(words)
    assert list(pd.read_csv(folder / "forecast.csv")) == ["date", "flow", "flow_lo80", "flow_hi80"]
    assert figures(train([*words, "--is_training", "0", "--do_predict", "False"], capsys)) == figures(lines)
    if name != "none":  # the others read the target alone
        record = json.loads((folder / "checkpoint.json").read_text())
        assert record["flags"]["enc_in"] == (1 if features == "S" else 3)


def test_batch_normalisation_counts_the_steps_and_nothing_else(small, capsys) -> None:
    """Before the first step the loop tries one out, where the run is long enough; that leaves no trace."""
    words = small(model="PatchTST", train_epochs=2, batch_size=8)
    lines = train(words, capsys)
    assert any(line.startswith("Dry run: ") for line in lines)
    state = torch.load(sorted(run_folder(words).glob("state.*"))[-1])["model"]
    counts = [int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert counts == [2 * (WINDOWS // 8)] * 4


def test_a_step_without_numbers_does_not_spoil_the_batch_normalisation(small, capsys, monkeypatch) -> None:
    """A window that overflows in the third of six steps: that step is skipped, and what is trained is fit to be scored."""
    collate, count = WindowCollate.__call__, iter(range(1, 10**6))

    def broken(self: WindowCollate, items: list[dict]) -> Batch:
        batch = collate(self, items)
        batch.x[1, 3] = float("inf") if next(count) == 3 else batch.x[1, 3]
        return batch

    monkeypatch.setattr(WindowCollate, "__call__", broken)
    words = small(model="PatchTST")
    lines = train(words, capsys)
    assert any("epoch 1, iteration 3: the loss is nan; the step is skipped" in line for line in lines)
    assert all(np.isfinite(list(scores(run_folder(words)).values())))
    state = load_file(run_folder(words) / "checkpoint.safetensors")
    counts = [int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert counts == [WINDOWS // 16 - 1] * 4


def test_a_summary_names_no_language_model_where_none_runs(small, capsys, tmp_path: Path) -> None:
    def table(folder: str) -> list[dict[str, str]]:
        assert summary.main([str(tmp_path / folder), "--csv", str(tmp_path / "runs.csv")]) == 0
        with (tmp_path / "runs.csv").open(encoding="utf-8", newline="") as file:
            return sorted(csv.DictReader(file), key=lambda row: row["run"])

    def runs(folder: str, *several: dict) -> None:
        for number, flags in enumerate(several):
            train(small(**{"max_iters": 1, "checkpoints": tmp_path / folder, "model_id": number} | flags), capsys)

    without = {"llm_ablation": "none"}, {"llm_ablation": "attention"}, {"model": "DLinear"}, {"model": "Ridge"}
    runs("one", *without, {})
    assert not table("one")[0].keys() & {"llm_model", "llm_dim", "llm_layers"}  # where one alone runs, there is no choice
    assert [row["llm_ablation"] for row in table("one")] == ["none", "attention", "", "", "off"]
    runs("two", *without, {}, {"llm_model": "AUTO", "llm_layers": 2})
    for flag, values in (("llm_model", ["QWEN", "AUTO"]), ("llm_layers", ["1", "2"])):
        assert [row[flag] for row in table("two")] == [""] * 4 + values


def test_ridge_is_the_baseline(small, capsys) -> None:
    for features in ("M", "MS"):
        words = small(model="Ridge", features=features, eval_batch_size=7, train_epochs=5, learning_rate=1.0)
        lines = train(words, capsys)
        metrics = json.loads((run_folder(words) / "metrics.json").read_text())
        ridge = next(row for row in metrics["baselines"]["rows"] if row["name"] == "ridge")
        assert metrics["test"] == pytest.approx({"mse": ridge["mse"], "mae": ridge["mae"]}, abs=1e-6)
        assert sum("Vali Loss" in line for line in lines) == 1  # one epoch; there is nothing to repeat


def test_ridge_has_no_batches_that_could_be_too_large(small, capsys) -> None:
    found = []
    for size in (1, WINDOWS, WINDOWS + 1, 10**6):
        words = small(model="Ridge", batch_size=size, model_comment=f"of {size}")
        train(words, capsys)
        found.append(scores(run_folder(words)) | {"train": pd.read_csv(run_folder(words) / "history.csv").train_loss[0]})
        (line,) = (line for line in train([*words, "--resume"], capsys) if "finished" in line)
        assert line.startswith("This run is finished")
    assert all(row == pytest.approx(found[0], rel=1e-6) for row in found[1:])
    assert f"--batch_size: got {WINDOWS + 1}, expected at most {WINDOWS}" in refusal(
        small(model="DLinear", batch_size=WINDOWS + 1), capsys
    )


@pytest.mark.parametrize("every", [1, 2])
def test_ridge_repeated_and_seldom_tested(small, capsys, every: int) -> None:
    words = small(model="Ridge", itr=2, test_every=every, tensorboard=True)
    lines = train(words, capsys)
    assert len({line for line in lines if line.startswith("Test MSE")}) == 1
    assert sum(line.startswith("Test MSE") for line in lines) == 2
    history = pd.read_csv(run_folder(words, 1) / "history.csv")
    assert len(history) == 1 and history.train_loss[0] > 0
    assert history.test_loss.isna().all() == (every != 1)


def test_the_linear_skip_starts_at_ridge(small, capsys) -> None:
    words = small(model="Ridge")
    train(words, capsys)
    fitted, ridge = load_file(run_folder(words) / "checkpoint.safetensors")["linear_map"], scores(run_folder(words))
    for skip in ("ridge", "linear"):
        start = setup(parse_flags(small(skip=skip)), 0, Interrupts())
        assert torch.equal(start.model.linear_map, fitted)
        assert isinstance(start.model.linear_map, torch.nn.Parameter) == (skip == "linear")
        head = start.model.output_projection.linear
        assert not head.weight.any() and not head.bias.any()
        start.close()
        still = small(skip=skip, max_iters=1, learning_rate=1e-30, model_comment="still")
        train(still, capsys)
        assert scores(run_folder(still)) == pytest.approx(ridge, abs=1e-6)
        moved = small(skip=skip, model_comment="moved")
        train(moved, capsys)
        held = load_file(run_folder(moved) / "checkpoint.safetensors")
        assert torch.equal(held["linear_map"], fitted) == (skip == "ridge")
        assert held["output_projection.linear.weight"].any()


def test_a_poor_linear_map_is_said_to_be_one(small, capsys, tmp_path: Path) -> None:
    for flags in ({"skip": "ridge"}, {"skip": "linear"}, {"model": "Ridge"}):
        assert not any("linear map is a poor one" in line for line in train(small(**flags, max_iters=1), capsys))
    table = pd.read_csv(tmp_path / "series.csv")
    table[list(COLUMNS)] = np.random.default_rng(5).standard_normal((len(table), len(COLUMNS))).cumsum(axis=0)
    table.to_csv(tmp_path / "walk.csv", index=False)
    for flags in ({"skip": "ridge"}, {"skip": "linear"}, {"model": "Ridge"}):
        words = small(**flags, data_path="walk.csv", percent=50, max_iters=1)
        (line,) = (line for line in train(words, capsys) if "linear map is a poor one" in line)
        assert line.startswith("WARNING: ") and " training windows made it" in line
        assert ("--skip none" in line) == ("skip" in flags)


def test_a_drawn_language_model_is_that_of_the_training(small, capsys) -> None:
    words = small(llm_ablation="random", max_iters=2, itr=2)
    train(words, capsys)
    folders = [run_folder(words, repeat) for repeat in (0, 1)]
    assert [Checkpoint.open(folder).backbone["random_seed"] for folder in folders] == [2021, 2022]
    for folder in folders:
        found = scores(folder)
        test = ["--is_training", "0", "--plots", "0", "--device", "cpu", "--checkpoint", str(folder)]
        for seed in ("5", "2021"):
            train([*test, "--seed", seed], capsys)
            assert scores(folder) == found
    pretrained = small(max_iters=2, model_comment="pretrained")
    train(pretrained, capsys)
    assert scores(run_folder(pretrained)) != scores(folders[0])
    assert "random_seed" not in Checkpoint.open(run_folder(pretrained)).backbone


def test_a_strange_seed_in_a_record_is_none(small, capsys, monkeypatch) -> None:
    words = small(llm_ablation="random", max_iters=1)
    train(words, capsys)
    expected, backbone = scores(run_folder(words)), Checkpoint.open(run_folder(words)).backbone
    for held in (-1, 2**32, 10**30, True, "7", None):
        monkeypatch.setattr(Checkpoint, "backbone", backbone | {"random_seed": held})
        train([*words, "--is_training", "0"], capsys)
        assert scores(run_folder(words)) == expected


def test_autoformer_reads_the_step_off_a_file_and_goes_on_from_another(small, capsys, tmp_path: Path) -> None:
    """Two horizons and a half by hand: what is forecast becomes the window's end, and the calendar goes on."""
    table = pd.read_csv(tmp_path / "series.csv")
    table["date"] = pd.date_range("2020-01-01", periods=len(table), freq="15min")
    table.to_csv(tmp_path / "series.csv", index=False)
    words = small(model="Autoformer", max_iters=4, moving_avg=5)
    train(words, capsys)
    folder = run_folder(words)
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["flags"]["freq"] == "t"
    tensors = load_file(folder / "checkpoint.safetensors")
    del tensors[OFFSETS]
    assert tensors["enc_embedding.time_embedding.weight"].shape == (8, 5)

    later = table.iloc[-50:].copy()
    later["date"] = pd.date_range("2021-03-01 22:00", periods=50, freq="15min")
    later[list(COLUMNS)] *= 1.1
    later.to_csv(tmp_path / "later.csv", index=False)
    predict = ["--is_training", "0", "--device", "cpu", "--plots", "0", "--checkpoint", str(folder), "--do_predict"]
    train([*predict, "--predict_path", str(tmp_path / "later.csv"), "--predict_steps", "20"], capsys)
    found = pd.read_csv(folder / "forecast.csv", parse_dates=["date"])
    dates = pd.date_range(later.date.iloc[0], periods=50 + 24, freq="15min")
    assert list(found.date) == list(dates[50:70])

    model = Autoformer(Namespace(**record["flags"])).eval()
    model.load_state_dict(tensors)
    mean, deviation = (np.array(record["scaler"][name]) for name in ("mean", "deviation"))
    rows = torch.from_numpy(((later[list(COLUMNS)].to_numpy() - mean) / deviation).astype(np.float32))
    marks = torch.from_numpy(time_marks(dates, "t", "timeF"))
    with torch.no_grad():
        for end in (50, 58, 66):
            ahead = marks[None, end - 8 : end + PRED_LEN]
            rows = torch.cat([rows, model(rows[None, -SEQ_LEN:], marks[None, end - SEQ_LEN : end], None, ahead)[0]])
    np.testing.assert_allclose(found[list(COLUMNS)], rows[50:70].numpy() * deviation + mean, rtol=1e-4, atol=1e-4)


def test_another_step_than_the_trainings_has_other_marks(small, capsys, tmp_path: Path) -> None:
    words = small(model="Autoformer", max_iters=1)
    train(words, capsys)
    table = pd.read_csv(tmp_path / "series.csv")
    table["date"] = pd.date_range("2020-01-01", periods=len(table), freq="D")
    table.to_csv(tmp_path / "daily.csv", index=False)
    given = ["--is_training", "0", "--device", "cpu", "--checkpoint", str(run_folder(words)), "--root_path", str(tmp_path)]
    assert "time_embedding" in refusal([*given, "--data_path", "daily.csv"], capsys)


@pytest.mark.parametrize("name", ["Ridge", "none", "attention", "random", "w/o reprogramming", "peaks"])
def test_advice_names_nothing_that_would_be_refused_or_help_nothing(small, name: str) -> None:
    args = parse_flags(small(**VARIANTS[name], llm_layers=2))
    job = setup(args, 0, Interrupts())
    said = advice(job.args, job.model)
    assert said.startswith("change ") or said.startswith("change, ")
    if name in ("none", "attention", "transformer", "nothing but the head"):  # no layer is loaded
        assert "--llm_layers" not in said and "--load_in_4bit" not in said
        assert "--llm_layers" not in loading_advice(job.args) and "--load_in_4bit" not in loading_advice(job.args)
    elif name == "random":
        assert "--llm_layers" in said and "--load_in_4bit" not in said and "--load_in_4bit" not in loading_advice(job.args)
    elif name not in OTHERS:
        assert "--llm_layers" in said and "--load_in_4bit" in said
    assert ("--prototypes direct" in loading_advice(job.args)) == ("--prototypes direct" in said)
    assert ("--prototypes direct" in said) == (name not in OTHERS and VARIANTS[name].get("use_reprogramming", 1) == 1)
    parts = fitting_sequences(job.model, job.args)
    assert parts == 0 if name in OTHERS else parts >= 1 and parts & (parts - 1) == 0
    job.close()
