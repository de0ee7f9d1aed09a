"""The training loop as a user sees it: its lines, its losses, what it keeps and how it ends."""

import itertools
import json
import os
import re
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file

import utils.run
import utils.training.train
from data_provider.sampler import EpochBatches
from layers.backbone import Backbone, find_backbone
from layers.errors import InputError
from models.TimeLLM import Model
from tests.models.test_TimeLLM import TRAINED
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, command_line, figures, run_folder, train, write_csv
from utils.flags import parse_flags
from utils.saving.interrupt import Interrupted, Interrupts
from utils.training.evaluate import score

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


def without_times(lines: list[str]) -> list[str]:
    return [line for line in lines if not re.search("speed:|cost time:|Memory:", line)]


def test_lines_best_weights_and_early_stopping(argv, capsys, monkeypatch) -> None:
    """The first epoch trains, then one step wrecks the weights: the first epoch's are what is tested."""
    usual = utils.training.train.learning_rate

    def wrecking(schedule, base, step, steps, *rest):
        if step < steps:
            return usual(schedule, base, step, steps, *rest)
        return 10.0 if step == steps else 0.0

    monkeypatch.setattr(utils.training.train, "learning_rate", wrecking)
    words = argv(train_epochs=9, patience=2)
    lines, folder = train(words, capsys), run_folder(words)
    own_file = [
        r".*series\.csv: 320 rows .*",
        "3 channels: .*",
        "rows: train 224, .*",
        "prompt: The data hold .*",
        "No prediction intervals of 95 %: .*",
    ]
    head = ["Using device: cpu", *own_file, "Trained values: .*; fast path", "train 185", "val 25", "test 57"]
    saving = r"A state of .* MB is saved about every 10 minutes, the last two are kept"
    trial = r"Dry run: \d+\.\d{4}s/iter; .*"
    tail = [
        "Early stopping",
        f"Checkpoints saved at: {re.escape(str(folder))}",
        r"Test MSE: \d+\.\d{7} MAE: \d+\.\d{7}",
        "Prediction intervals: 80 %: .*",
    ]
    assert_lines(lines, [*head, saving, trial] + epoch_lines(1, 0, 2) + epoch_lines(2, 1, 2) + epoch_lines(3, 2, 2) + tail)
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
    assert_lines(again, [*head[:7], head[-1], *tail[2:]])
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
    assert files[0].replace(str(tmp_path / "a").encode(), b"") == files[1].replace(str(tmp_path / "b").encode(), b"")


def test_dropout_is_on_in_training(argv, capsys, tmp_path: Path) -> None:
    losses = []
    for rate in (0.0, 0.5):
        lines = train(argv(dropout=rate, checkpoints=tmp_path / str(rate), learning_rate=1e-30), capsys)
        losses.append(float(re.search(r"Train Loss: (\S+)", " ".join(lines))[1]))
    assert abs(losses[0] - losses[1]) > 0.01  # the same weights and windows


def test_last_short_training_batch_is_dropped_and_evaluation_drops_nothing(argv, capsys) -> None:
    lines = train(argv(batch_size=50, log_every=1, eval_batch_size=50), capsys)  # 185 windows
    assert sum(line.startswith("\titers:") for line in lines) == 3
    assert "test 57" in lines


def test_first_loss_is_that_of_the_first_batch(argv, backbones, capsys, tmp_path: Path) -> None:
    """The first printed loss by hand: the file's windows, the seed's weights and dropout; then the mean of all."""
    words = argv(log_every=1, max_sequences=0)
    lines = train(words, capsys)
    losses = [float(re.search(r"loss: (\S+)", line)[1]) for line in lines if line.startswith("\titers:")]
    assert len(losses) == 185 // 16

    values = pd.read_csv(tmp_path / "series.csv")[list(COLUMNS)].to_numpy()
    values = ((values - values[:224].mean(0)) / values[:224].std(0)).astype(np.float32)
    order = EpochBatches(185, 16, seed=2021, shuffle=True, drop_last=True)
    order.set_epoch(1)
    windows = np.stack([values[start : start + SEQ_LEN + PRED_LEN] for start in next(iter(order))])  # (B, T + H, N)
    record = json.loads((run_folder(words) / "checkpoint.json").read_text())
    set_seed(2021)
    model = Model(Namespace(**record["flags"]), Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 1)).train()
    with torch.no_grad():
        forecast = model(torch.from_numpy(windows[:, :SEQ_LEN])).numpy()  # (B, H, N)
    assert losses[0] == pytest.approx(np.square(forecast - windows[:, SEQ_LEN:]).mean(), abs=2e-6)

    assert f"Train Loss: {np.mean(losses):.4f}" in " ".join(lines)


@pytest.mark.parametrize(
    ("every", "to_come", "then", "timed"),
    [
        (1, 2 * 25 + 2 * 57, 25 + 57, 25 + 57),  # the best epoch's test is the one at the end
        (2, 2 * 25 + 2 * 57, 25 + 2 * 57, 25),  # epoch 2 is tested, and at the end the best
        (0, 2 * 25 + 57, 25 + 57, 25),
    ],
)
def test_left_time_counts_iterations_and_evaluations(argv, capsys, monkeypatch, every, to_come, then, timed) -> None:
    """With a clock on which a second passes from one look to the next: 4 iterations, or an epoch's evaluation, take one.

    Args:
        to_come: windows that are evaluated from the first epoch on; `then` from the second on.
        timed: windows in the first epoch's evaluation, which says how long one takes.
    """
    monkeypatch.setattr(utils.training.train, "time", Namespace(perf_counter=itertools.count().__next__))
    lines = train(argv(train_epochs=2, test_every=every), capsys)
    found = [line.strip() for line in lines if "left time" in line]
    guess = 0.7 * 0.25 / 16  # a window's evaluation over its training step, in batches of 16
    left = [18 * 0.25 + to_come * guess, 14 * 0.25 + to_come * guess, 7 * 0.25 + then / timed, 3 * 0.25 + then / timed]
    assert found == [f"speed: 0.2500s/iter; left time: {seconds:.4f}s" for seconds in left]


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
    before, after = (load_file(run_folder(w) / "checkpoint.safetensors") for w in (start, moved) if train(w, capsys))
    name = "output_projection.linear.weight"
    kept = before[name] * (1 - 1e-2 * 1e-2) if optimizer.startswith("adamw") else before[name]
    torch.testing.assert_close((after[name] - kept).abs(), torch.full_like(kept, 1e-2), rtol=1e-3, atol=1e-5)


def test_eight_bit_states_go_through_a_resume(argv, capsys, monkeypatch, tmp_path: Path) -> None:
    """Stopped in the evaluation behind an epoch that --max_iters ended early; then the same to the end."""
    words = argv(max_iters=3, train_epochs=2, optimizer="adamw8bit", prototypes="direct", resume=True)
    whole = argv(max_iters=3, train_epochs=2, optimizer="adamw8bit", prototypes="direct", checkpoints=tmp_path / "whole")
    expected = train(whole, capsys)

    def interrupted(job, split, consume):
        states = {s["state1"].dtype for s in job.training.optimizer.state.values() if s["state1"].numel() >= 4096}
        assert states == {torch.uint8}
        os.kill(os.getpid(), signal.SIGTERM)
        return score(job, split, consume)

    with monkeypatch.context() as patch, Interrupts() as interrupts, pytest.raises(Interrupted):
        patch.setattr(utils.training.train, "score", interrupted)
        utils.run.main(parse_flags(words), interrupts)
    found = train(words, capsys)
    assert any("Resuming from" in line and "iteration 3" in line for line in found)
    assert figures(found) == figures(expected)


def test_mixed_precision_on_the_cpu(argv, capsys, tmp_path: Path) -> None:
    """A checkpoint is tested with the precision of its training; another is refused."""
    full = train(argv(max_iters=4), capsys)
    words = argv(max_iters=4, use_amp=True, checkpoints=tmp_path / "mixed")
    again = ["--is_training", "0", "--checkpoint", str(run_folder(words))]
    AcceleratorState._reset_state(True)
    try:
        mixed = train(words, capsys)
        assert figures(train(again, capsys)) == figures(mixed)
    finally:
        AcceleratorState._reset_state(True)
    assert figures(mixed) != figures(full)
    assert float(figures(mixed)[0]) == pytest.approx(float(figures(full)[0]), rel=0.05)
    with pytest.raises(InputError, match="--use_amp: got False, expected True, with which .* was trained"):
        train([*again, "--use_amp", "False"], capsys)


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
