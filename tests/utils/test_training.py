"""A run as a user sees it: its lines, its figures, its files."""

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

import utils.run
import utils.train
from data_provider.data_factory import series_from_args
from layers.backbone_files import find_backbone
from layers.errors import InputError
from tests.models.test_TimeLLM import TRAINED
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, command_line, figures, run_folder, train, write_csv
from utils.checkpoint import read_checkpoint
from utils.flags import parse_flags
from utils.interrupt import Interrupted, Interrupts

LOSS = r"\d+\.\d{4}"
# cli.md's lines of one epoch of 11 iterations with --log_every 4
ITERATIONS = [
    r"\titers: {n}, epoch: {e} \| loss: \d+\.\d{{7}}",
    r"\tspeed: \d+\.\d{{4}}s/iter; left time: \d+\.\d{{4}}s",
]
EPOCH = [
    *(line.replace("{n}", n) for n in ("4", "8") for line in ITERATIONS),
    r"Epoch: {e} cost time: \d+\.\d",
    rf"Epoch: {{e}} \| Train Loss: {LOSS.replace('{4}', '{{4}}')} Vali Loss: {LOSS.replace('{4}', '{{4}}')} "
    rf"Test Loss: {LOSS.replace('{4}', '{{4}}')} MAE Loss: {LOSS.replace('{4}', '{{4}}')}",
    r"(GPU )?Memory: \d+\.\dGB.*",
    r"EarlyStopping counter: {worse} out of {patience}",
]
SAVED = r"Validation loss decreased \((inf|\d+\.\d{6}) --> \d+\.\d{6}\). Saving model ..."


def epoch_lines(epoch: int, worse: int, patience: int) -> list[str]:
    lines = [line.format(e=epoch, worse=worse, patience=patience) for line in EPOCH]
    return lines if worse else [*lines, SAVED]


def assert_lines(lines: list[str], patterns: list[str]) -> None:
    for line, pattern in zip(lines, patterns, strict=False):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern}"
    assert len(lines) == len(patterns), lines[len(patterns) :] or patterns[len(lines) :]


@pytest.fixture
def argv(backbones, tmp_path: Path):
    """`argv(**flags)`: the command line of a small run in this test's folder."""
    return lambda **flags: command_line(tmp_path, backbones["qwen2"], **flags)


def without_times(lines: list[str]) -> list[str]:
    return [line for line in lines if not re.search("speed:|cost time:|Memory:", line)]


def test_lines_best_weights_and_early_stopping(argv, capsys, monkeypatch) -> None:
    """The first epoch trains, then one step wrecks the weights: the first epoch's are what is tested."""
    usual = utils.train.learning_rate

    def wrecking(schedule, base, step, steps, *rest):
        if step < steps:
            return usual(schedule, base, step, steps, *rest)
        return 10.0 if step == steps else 0.0

    monkeypatch.setattr(utils.train, "learning_rate", wrecking)
    words = argv(train_epochs=9, patience=2)
    lines, folder = train(words, capsys), run_folder(words)
    own_file = [r".*series\.csv: 320 rows .*", "3 channels: .*", "rows: train 224, .*", "prompt: The data hold .*"]
    head = ["Using device: cpu", *own_file, "Trained values: .*; fast path", "train 185", "val 25", "test 57"]
    saving = r"A state of .* MB is saved about every 10 minutes, the last two are kept"
    tail = [
        "Early stopping",
        f"Checkpoints saved at: {re.escape(str(folder))}",
        r"Test MSE: \d+\.\d{7} MAE: \d+\.\d{7}",
    ]
    assert_lines(lines, [*head, saving] + epoch_lines(1, 0, 2) + epoch_lines(2, 1, 2) + epoch_lines(3, 2, 2) + tail)
    assert (folder / "train.log").read_text().splitlines() == lines

    summaries = [line for line in lines if "Vali Loss" in line]
    first, *later = [float(re.search(r"Vali Loss: (\S+)", line)[1]) for line in summaries]
    assert all(loss > 2 * first for loss in later)
    mse, mae = figures(lines)
    assert f"Test Loss: {float(mse):.4f} MAE Loss: {float(mae):.4f}" in summaries[0]
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["epoch"] == 1 and f"{record['vali_loss']:.4f}" == f"{first:.4f}"
    assert f"{record['test_loss']:.7f}" == mse

    # and again from the checkpoint, by itself
    kept = (folder / "checkpoint.safetensors").read_bytes()
    again = train([*words, "--is_training", "0"], capsys)
    assert_lines(again, [*head[:6], head[-1], tail[2]])
    assert figures(again) == (mse, mae)
    assert (folder / "checkpoint.safetensors").read_bytes() == kept
    assert (folder / "test.log").read_text().splitlines() == again
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['test']['mse']:.7f}" == mse and f"{metrics['test']['mae']:.7f}" == mae


def test_no_better_validation_loss_stops_the_run(argv, capsys) -> None:
    """At a rate below what float32 resolves nothing changes, so nothing gets better."""
    lines = train(argv(learning_rate=1e-30, train_epochs=9, patience=3), capsys)
    counters = [line for line in lines if line.startswith("EarlyStopping")]
    assert counters == [f"EarlyStopping counter: {n} out of 3" for n in (0, 1, 2, 3)]
    assert "Early stopping" in lines and sum("Saving model" in line for line in lines) == 1


def test_all_epochs_run_while_it_gets_better(argv, capsys) -> None:
    lines = train(argv(train_epochs=3, patience=1), capsys)
    counters = [line.split()[2] for line in lines if line.startswith("EarlyStopping")]
    assert counters == ["0", "0", "0"] and "Early stopping" not in lines
    losses = [float(re.search(r"Vali Loss: (\S+)", line)[1]) for line in lines if "Vali Loss" in line]
    assert losses == sorted(losses, reverse=True)


def test_two_runs_are_bit_identical_and_another_seed_is_not(argv, capsys, tmp_path: Path) -> None:
    outcomes = []
    for name, flags in (("a", {}), ("b", {}), ("c", {"seed": 7}), ("workers", {"num_workers": 2})):
        words = argv(train_epochs=2, max_iters=4, checkpoints=tmp_path / name, **flags)
        lines = [line.replace(str(tmp_path / name), "") for line in without_times(train(words, capsys))]
        outcomes.append((lines, load_file(run_folder(words) / "checkpoint.safetensors"), words))
    (
        (lines, tensors, words),
        (same_lines, same, same_words),
        (other_lines, other, _),
        (w_lines, w_tensors, _),
    ) = outcomes
    assert lines == same_lines == w_lines
    assert all(tensors[name].numpy().tobytes() == same[name].numpy().tobytes() for name in TRAINED)
    assert all(torch.equal(tensors[name], w_tensors[name]) for name in TRAINED)
    assert other_lines != lines and not any(torch.equal(tensors[name], other[name]) for name in TRAINED)
    # to the byte, but for the folder that the record names
    files = [(run_folder(w) / "checkpoint.safetensors").read_bytes() for w in (words, same_words)]
    assert files[0].replace(str(tmp_path / "a").encode(), b"") == files[1].replace(
        str(tmp_path / "b").encode(), b""
    )


def test_dropout_is_on_in_training(argv, capsys, tmp_path: Path) -> None:
    losses = []
    for rate in (0.0, 0.5):
        lines = train(argv(dropout=rate, checkpoints=tmp_path / str(rate), learning_rate=1e-30), capsys)
        losses.append(float(re.search(r"Train Loss: (\S+)", " ".join(lines))[1]))
    assert abs(losses[0] - losses[1]) > 0.01  # the same weights and windows


def test_each_repeat_has_its_folder_and_its_seed(argv, capsys) -> None:
    words = argv(itr=2, max_iters=3)
    lines = train(words, capsys)
    folders = [run_folder(words, repeat) for repeat in (0, 1)]
    assert [f"Checkpoints saved at: {folder}" for folder in folders] == [
        x for x in lines if x.startswith("Checkpoints")
    ]
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in folders)
    assert not any(torch.equal(first[name], second[name]) for name in TRAINED)
    assert sum(line.startswith("Test MSE") for line in lines) == 2


def test_the_largest_seed_has_a_repeat(argv, capsys) -> None:
    lines = train(argv(itr=2, max_iters=1, seed=2**32 - 1), capsys)
    assert sum(line.startswith("Test MSE") for line in lines) == 2


def windows(path: Path, features: str) -> tuple[np.ndarray, np.ndarray]:
    """The test windows' inputs and truths, from the file by hand: 70/10/20, training rows' scale."""
    table = pd.read_csv(path)
    values = table[["OT"] if features == "S" else list(COLUMNS)].to_numpy()
    n = len(values)
    training = values[: int(0.7 * n)]
    values = (values - training.mean(0)) / training.std(0)
    start = n - int(0.2 * n)
    truth = [values[i : i + PRED_LEN] for i in range(start, n - PRED_LEN + 1)]
    inputs = [values[i - SEQ_LEN : i] for i in range(start, n - PRED_LEN + 1)]
    target = slice(2, 3) if features == "MS" else slice(None)
    return np.stack(inputs)[..., target], np.stack(truth)[..., target]


@pytest.mark.parametrize("features", ["M", "S", "MS"])
def test_errors_against_numpy_whatever_the_batch(argv, capsys, tmp_path: Path, features: str) -> None:
    words = argv(features=features, max_iters=4)
    lines = train(words, capsys)
    inputs, truth = windows(tmp_path / "series.csv", features)
    for size in (1, 5, 57, 100) if features == "M" else (16,):
        args = parse_flags([*words, "--is_training", "0", "--eval_batch_size", str(size)])
        folder = run_folder(words)
        series, info, checkpoint = utils.run.check(args, folder)
        record = utils.run.describe_run(args, series, info)
        run = utils.run.set_up(args, 0, folder, series, info, Accelerator(cpu=True), record, Interrupts())
        shapes = {name: tuple(t.shape) for name, t in run.model.state_dict().items()}
        run.model.load_state_dict(read_checkpoint(checkpoint, shapes)[0])
        seen, forecasts = [], []

        def consume(batch, forecast, seen=seen, forecasts=forecasts):
            channels = len(batch.x) // len(batch.index)
            seen.append(batch.x.view(-1, channels, SEQ_LEN).mT.numpy())
            forecasts.append(forecast.view(-1, channels, PRED_LEN).mT.numpy())

        scores = run.evaluate("test", consume)
        np.testing.assert_allclose(np.concatenate(seen), inputs, rtol=1e-5, atol=1e-5)
        error = np.concatenate(forecasts) - truth
        assert error.shape == (57, PRED_LEN, 3 if features == "M" else 1)
        assert scores.mse == pytest.approx(np.square(error).mean(), rel=1e-5)
        assert scores.mae == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert float(figures(lines)[0]) == pytest.approx(scores.mse, rel=1e-6, abs=1e-7)


def test_target_alone_is_scored_and_every_column_is_read(argv, capsys, tmp_path: Path) -> None:
    """MS: the record has all columns. S: only the target; the forecasts of one channel are the same."""
    outcome = {}
    for features in ("S", "MS"):
        words = argv(features=features, max_iters=4, checkpoints=tmp_path / features)
        outcome[features] = (
            figures(train(words, capsys)),
            json.loads((run_folder(words) / "checkpoint.json").read_text()),
        )
    assert outcome["S"][1]["columns"] == ["OT"] and outcome["MS"][1]["columns"] == list(COLUMNS)
    assert outcome["S"][0] == outcome["MS"][0]


def test_last_short_training_batch_is_dropped_and_evaluation_drops_nothing(argv, capsys) -> None:
    lines = train(argv(batch_size=50, log_every=1, eval_batch_size=50), capsys)  # 185 windows
    assert sum(line.startswith("\titers:") for line in lines) == 3
    assert "test 57" in lines


def test_first_loss_is_the_loss_of_the_first_batch(argv, capsys) -> None:
    """Printed losses and their mean are those of the standardised series."""
    lines = train(argv(log_every=1), capsys)
    losses = [float(re.search(r"loss: (\S+)", line)[1]) for line in lines if line.startswith("\titers:")]
    assert len(losses) == 185 // 16
    assert f"Train Loss: {np.mean(losses):.4f}" in " ".join(lines)


def test_schedule_reaches_the_optimizer(argv, capsys, monkeypatch) -> None:
    """type1: the rate that Adam steps with is --learning_rate itself, halved in the second epoch."""
    used = []
    adam = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        used.extend({group["lr"] for group in self.param_groups})
        return adam(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train(argv(train_epochs=2, max_iters=3, learning_rate=0.004), capsys)
    assert used == [0.004] * 3 + [0.002] * 3


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamw8bit"])
def test_first_update_is_the_optimizers(argv, capsys, tmp_path: Path, optimizer: str) -> None:
    """Adam's first step moves every weight with a gradient by the learning rate; AdamW decays as well."""
    start = argv(max_iters=1, learning_rate=1e-30, checkpoints=tmp_path / "start", optimizer="adam")
    moved = argv(max_iters=1, learning_rate=1e-2, checkpoints=tmp_path / "moved", optimizer=optimizer)
    before, after = (
        load_file(run_folder(w) / "checkpoint.safetensors") for w in (start, moved) if train(w, capsys)
    )
    name = "output_projection.linear.weight"
    kept = before[name] * (1 - 1e-2 * 1e-2) if optimizer.startswith("adamw") else before[name]
    torch.testing.assert_close((after[name] - kept).abs(), torch.full_like(kept, 1e-2), rtol=1e-3, atol=1e-5)


def test_eight_bit_states_go_through_a_resume(argv, capsys, monkeypatch, tmp_path: Path) -> None:
    """Stopped in the evaluation behind an epoch that --max_iters ended early; then the same to the end."""
    words = argv(max_iters=3, train_epochs=2, optimizer="adamw8bit", prototypes="direct", resume=True)
    whole = argv(max_iters=3, train_epochs=2, optimizer="adamw8bit", prototypes="direct", checkpoints=tmp_path / "whole")
    expected = train(whole, capsys)

    def interrupted(run, split, consume=None):
        states = {s["state1"].dtype for s in run.optimizer.state.values() if s["state1"].numel() >= 4096}
        assert states == {torch.uint8}
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run, split, consume)

    evaluate = utils.train.Run.evaluate
    with monkeypatch.context() as patch, Interrupts() as interrupts, pytest.raises(Interrupted):
        patch.setattr(utils.train.Run, "evaluate", interrupted)
        utils.run.main(parse_flags(words), interrupts)
    found = train(words, capsys)
    assert any("Going on from" in line and "iteration 3" in line for line in found)
    assert figures(found) == figures(expected)


def test_mixed_precision_on_the_cpu(argv, capsys, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    full = train(argv(max_iters=4), capsys)
    AcceleratorState._reset_state(True)
    try:
        mixed = train(argv(max_iters=4, use_amp=True, checkpoints=tmp_path / "mixed"), capsys)
    finally:
        AcceleratorState._reset_state(True)
    assert figures(mixed) != figures(full)
    assert float(figures(mixed)[0]) == pytest.approx(float(figures(full)[0]), rel=0.05)


def test_a_changed_file_is_refused_and_the_line_says_how_to_start_anew(argv, capsys, tmp_path: Path) -> None:
    words = argv(max_iters=1, resume=True)
    train(words, capsys)
    write_csv(tmp_path / "series.csv", seed=1)
    with pytest.raises(InputError, match="the data's values .* or start anew with --resume False"):
        train(words, capsys)
    assert any("held an earlier run" in line for line in train([*words, "--resume", "False"], capsys))


def test_an_earlier_run_is_moved_aside(argv, capsys) -> None:
    words = argv(max_iters=1)
    folder = run_folder(words)
    kept = []
    for number in range(3):
        lines = train([*words, "--seed", str(number)], capsys)
        if number:
            aside = folder.with_name(f"{folder.name}.{number}")
            assert f"The folder held an earlier run, now in: {aside}" in lines
            assert (aside / "checkpoint.safetensors").read_bytes() == kept[-1]
            assert (aside / "train.log").is_file()
        kept.append((folder / "checkpoint.safetensors").read_bytes())
    assert len(set(kept)) == 3


def test_record_of_a_checkpoint(argv, backbones, capsys, tmp_path: Path) -> None:
    words = argv(max_iters=1, features="MS")
    train(words, capsys)
    folder = run_folder(words)
    record = json.loads((folder / "checkpoint.json").read_text())
    args = parse_flags(words)
    series = series_from_args(args)
    filled = {"enc_in": 3, "llm_dim": 128, "prompt_text": record["flags"]["prompt_text"]}
    assert "one series" in filled["prompt_text"]
    assert filled.items() <= record["flags"].items()
    assert {k: v for k, v in record["flags"].items() if k not in filled} == {
        k: v for k, v in vars(args).items() if k not in filled | dict.fromkeys(utils.run.SAVING)
    }
    assert record["columns"] == list(COLUMNS)
    training = pd.read_csv(tmp_path / "series.csv")[list(COLUMNS)].to_numpy()[:224]
    np.testing.assert_allclose(record["scaler"]["mean"], training.mean(0), rtol=1e-9)
    np.testing.assert_allclose(record["scaler"]["deviation"], training.std(0), rtol=1e-9)
    data = dict(record["data"])
    mark = data.pop("mark")
    assert mark["rows"] == len(training) and len(mark["sha256"]) == 64
    assert data == {"file": "series.csv", "rows": len(series.dates), "synthetic": False, "step": "1 hour"}
    identity = find_backbone("QWEN", str(backbones["qwen2"])).identity
    assert record["backbone"] == identity | {"layers": 1, "load_in_4bit": False}
    assert {"python", "torch", "transformers", "accelerate", "numpy"} <= set(record["versions"])
    assert record["versions"]["torch"] == torch.__version__
    assert math.isfinite(record["vali_loss"])
    with safe_open(folder / "checkpoint.safetensors", "pt") as held:
        assert json.loads(held.metadata()["record"]) == record
        assert set(held.keys()) == set(TRAINED)
    size = sum(t.numel() for t in load_file(folder / "checkpoint.safetensors").values()) * 4
    assert (folder / "checkpoint.safetensors").stat().st_size < size + 10_000  # nothing of the backbone in it


def test_other_weights_are_noticed(argv, backbones, capsys, tmp_path: Path) -> None:
    """A checkpoint is told from one that was trained on another language model of the same shape."""
    from scripts.make_backbone import make_backbone

    words = argv(max_iters=1)
    train(words, capsys)
    other = make_backbone(tmp_path / "other", seed=5)
    lines = train([*words, "--is_training", "0", "--llm_model_path", str(other)], capsys)
    assert sum(line.startswith("WARNING: the checkpoint was trained on") for line in lines) == 1
    lines = train([*words, "--is_training", "0"], capsys)
    assert not any(line.startswith("WARNING") for line in lines)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", {}), ("gpt2", {}), ("bert", {}), ("qwen2", {"prototypes": "direct"}),
        ("qwen2", {"load_in_4bit": True}), ("qwen2", {"fast_path": "plain"}), ("qwen2", {"max_sequences": 7}),
    ],
)  # fmt: skip
def test_other_backbones_and_ways_to_run(backbones, capsys, tmp_path: Path, family: str, flags: dict) -> None:
    name = {"qwen2": "QWEN"}.get(family, family.upper())
    words = command_line(tmp_path, backbones[family], llm_model=name, max_iters=2, **flags)
    lines = train(words, capsys)
    path = "plain" if family == "bert" or "fast_path" in flags else "fast"
    assert any(line.endswith(f"{path} path") for line in lines)
    assert figures(train([*words, "--is_training", "0"], capsys)) == figures(lines)


def test_learns_a_clean_cycle(backbones, capsys, tmp_path: Path) -> None:
    """From the level of a mean forecast (1.0) down, on a series that is nearly all daily cycle."""
    write_csv(tmp_path / "series.csv", rows=1200)
    words = command_line(
        tmp_path,
        backbones["qwen2"],
        seq_len=48,
        train_epochs=1,
        learning_rate=3e-3,
        lradj="constant",
        features="S",
    )
    assert float(figures(train(words, capsys))[0]) < 0.5
