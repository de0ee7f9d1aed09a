"""The training loop as a user sees it: its lines, its losses, what it keeps and how it ends; dry run and evaluation."""

import itertools
import json
import re
from argparse import Namespace
from pathlib import Path

import bitsandbytes
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

import utils.setup
import utils.training.train
from data_provider.data_factory import EpochBatches
from layers.backbone import Backbone, find_backbone
from models.TimeLLM import Model
from tests.models.test_TimeLLM import TRAINED
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, command_line, figures, run_folder, train, write_csv
from utils.flags import parse_flags
from utils.saving.checkpoint import shapes_of
from utils.saving.interrupt import Interrupts
from utils.setup import setup
from utils.training.evaluate import score

# cli.md's lines of one epoch of 11 iterations with --log_every 4
EPOCH = r"""\titers: 4, epoch: {e} \| loss: \d+\.\d{{7}}
\tspeed: \d+\.\d{{4}}s/iter; left time: \d+\.\d{{4}}s
\titers: 8, epoch: {e} \| loss: \d+\.\d{{7}}
\tspeed: \d+\.\d{{4}}s/iter; left time: \d+\.\d{{4}}s
Epoch: {e} cost time: \d+\.\d
Epoch: {e} \| Train Loss: \d+\.\d{{4}} Vali Loss: \d+\.\d{{4}} Test Loss: \d+\.\d{{4}} MAE Loss: \d+\.\d{{4}}
(GPU )?Memory: \d+\.\dGB.*
EarlyStopping counter: {worse} out of 2"""
SAVED = r"Validation loss decreased \(inf --> \d+\.\d{6}\). Saving model ..."
DRY_RUN = (
    r"Dry run: \d+\.\d{4}s/iter; about \d+ s an epoch with its evaluations, \d+ s in all; "
    r"memory \d+\.\dGB at the peak, of \d+\.\dGB"
)


def assert_lines(lines: list[str], patterns: list[str]) -> None:
    for line, pattern in zip(lines, patterns, strict=False):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern}"
    assert len(lines) == len(patterns), lines[len(patterns) :] or patterns[len(lines) :]


def test_lines_best_weights_and_early_stopping(argv, capsys, monkeypatch) -> None:
    """The first epoch trains, then one step wrecks the weights: the first epoch's are what is tested."""
    usual = utils.setup.build_scheduler

    def wrecking(args, optimizer, steps, ranks):
        usual(args, optimizer, steps, ranks)
        rate = LambdaLR(optimizer, lambda step: 1.0 if step < steps else 1e4 if step == steps else 0.0)
        return rate, 1

    monkeypatch.setattr(utils.setup, "build_scheduler", wrecking)
    words = argv(train_epochs=9, patience=2)
    lines, folder = train(words, capsys), run_folder(words)
    head = [
        "Using device: cpu", r".*series\.csv: 320 rows .*", "3 channels: .*", "rows: train 224, .*",
        "prompt: The data hold .*", "No prediction intervals of 95 %: .*", "Trained values: .*; fast path",
        "Language model: random weights, .*", "train 185", "val 25", "test 57",
    ]  # fmt: skip
    saving = r"A state of .* MB is saved about every 10 minutes, the last two are kept"
    first, second, third = (EPOCH.format(e=epoch, worse=epoch - 1).split("\n") for epoch in (1, 2, 3))
    tail = [
        "Early stopping",
        f"Checkpoints saved at: {re.escape(str(folder))}",
        r"Test MSE: \d+\.\d{7} MAE: \d+\.\d{7}",
        "Prediction intervals: 80 %: .*",
    ]
    rate = r"learning rate 0.001 as it stands; the published code would train at 4e-05 \(--recipe published\)"
    assert_lines(lines, [*head, saving, rate, DRY_RUN, *first, SAVED, *second, *third, *tail])
    assert (folder / "train.log").read_text().splitlines() == lines

    summaries = [line for line in lines if "Vali Loss" in line]
    best, *later = [float(re.search(r"Vali Loss: (\S+)", line)[1]) for line in summaries]
    assert all(loss > 2 * best for loss in later)  # an equal one is no improvement either
    mse, mae = figures(lines)
    assert f"Test Loss: {float(mse):.4f} MAE Loss: {float(mae):.4f}" in summaries[0]
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["epoch"] == 1 and f"{record['vali_loss']:.4f}" == f"{best:.4f}"
    assert f"{record['test_loss']:.7f}" == mse

    # and again from the checkpoint, by itself
    kept = (folder / "checkpoint.safetensors").read_bytes()
    again = train([*words, "--is_training", "0"], capsys)
    assert_lines(again, [*head[:5], *head[6:8], head[-1], *tail[2:]])  # the levels are those that the training found
    assert figures(again) == (mse, mae)
    assert (folder / "checkpoint.safetensors").read_bytes() == kept
    assert (folder / "test.log").read_text().splitlines() == again
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['test']['mse']:.7f}" == mse and f"{metrics['test']['mae']:.7f}" == mae


def test_a_seed_decides_all_and_workers_nothing(small, capsys, tmp_path: Path) -> None:
    outcomes = []
    for name, flags in (("a", {}), ("workers", {"num_workers": 2}), ("c", {"seed": 7})):
        words = small(train_epochs=2, max_iters=4, checkpoints=tmp_path / name, **flags)
        lines = [line.replace(str(tmp_path / name), "") for line in train(words, capsys)]
        lines = [line for line in lines if not re.search("speed:|cost time:|Memory:", line)]
        outcomes.append((lines, load_file(run_folder(words) / "checkpoint.safetensors")))
    (lines, tensors), (same_lines, same), (other_lines, other) = outcomes
    assert lines == same_lines != other_lines
    assert all(torch.equal(tensors[name], same[name]) for name in TRAINED)
    assert not any(torch.equal(tensors[name], other[name]) for name in TRAINED)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("adamw8bit", bitsandbytes.optim.AdamW8bit)],
)
def test_a_run_is_the_plain_loop(argv, backbones, capsys, tmp_path: Path, name: str, optimizer) -> None:
    """Two epochs of three steps in ten lines of PyTorch: the same losses, and the same tensors in the checkpoint.

    The file's windows, the seed's weights and dropout, autograd's gradients, the library's optimizer, a rate that halves.
    """
    words = argv(train_epochs=2, max_iters=3, log_every=1, max_sequences=0, learning_rate=0.004, optimizer=name, plots=0)
    lines = train(words, capsys)
    found = [float(re.search(r"loss: (\S+)", line)[1]) for line in lines if line.startswith("\titers:")]

    values = pd.read_csv(tmp_path / "series.csv")[list(COLUMNS)].to_numpy()
    values = ((values - values[:224].mean(0)) / values[:224].std(0)).astype(np.float32)
    order = EpochBatches(185, 16, seed=2021, shuffle=True)
    assert len(list(order)) == 11  # the last 9 windows are dropped
    record = json.loads((run_folder(words) / "checkpoint.json").read_text())
    assert record["epoch"] == 2  # else the checkpoint is of another step
    set_seed(2021)
    model = Model(Namespace(**record["flags"]), Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 1)).train()
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain, losses = optimizer(model.parameters(), lr=0.004), []
    for epoch in (1, 2):
        order.set_epoch(epoch)
        plain.param_groups[0]["lr"] = 0.004 / epoch
        for starts in itertools.islice(order, 3):
            windows = torch.from_numpy(np.stack([values[s : s + SEQ_LEN + PRED_LEN] for s in starts]))  # (B, T + H, N)
            loss = torch.nn.functional.mse_loss(model(windows[:, :SEQ_LEN]), windows[:, SEQ_LEN:])
            loss.backward()
            plain.step(), plain.zero_grad()
            losses.append(loss.item())
    assert found == pytest.approx(losses, rel=1e-4, abs=2e-6) and found[0] == pytest.approx(losses[0], abs=2e-6)
    assert [f"Train Loss: {np.mean(found[i : i + 3]):.4f}" in " ".join(lines) for i in (0, 3)] == [True, True]
    saved = load_file(run_folder(words) / "checkpoint.safetensors")
    for key, tensor in model.state_dict().items():
        assert (saved[key] - tensor).norm() <= 0.01 * (tensor - start[key]).norm(), key


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
    lines = train(argv(train_epochs=2, test_every=every, plots=0, model="DLinear", llm_model_path=None), capsys)
    found = [line.strip() for line in lines if "left time" in line]
    guess = 0.7 * 0.25 / 16  # a window's evaluation over its training step, in batches of 16
    left = [18 * 0.25 + to_come * guess, 14 * 0.25 + to_come * guess, 7 * 0.25 + then / timed, 3 * 0.25 + then / timed]
    assert found == [f"speed: 0.2500s/iter; left time: {seconds:.4f}s" for seconds in left]


def test_learns_a_clean_cycle(backbones, capsys, tmp_path: Path) -> None:
    """From the level of a mean forecast (1.0) down, on a series that is nearly all daily cycle; each epoch is better."""
    write_csv(tmp_path / "series.csv", rows=600)
    flags = {"train_epochs": 3, "patience": 1, "learning_rate": 3e-3, "features": "S", "plots": 0}
    lines = train(command_line(tmp_path, backbones["qwen2"], seq_len=48, **flags), capsys)
    assert [line.split()[2] for line in lines if line.startswith("EarlyStopping")] == ["0", "0", "0"]
    assert "Early stopping" not in lines and float(figures(lines)[0]) < 0.5


def dry_runs(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("Dry run:")]


@pytest.mark.parametrize(
    "flags",
    [{}, {"model": "PatchTST", "llm_model_path": None, "num_workers": 1}],
    ids=["vocab", "batch norm, workers"],
)
def test_a_run_is_the_same_with_and_without(small, capsys, monkeypatch, tmp_path, flags) -> None:
    """Generators, loader, buffers and gradients are as they were: the states of both runs have the same bytes."""
    words = small(train_epochs=4, checkpoints=tmp_path / "with", **flags)
    lines = train(words, capsys)
    (line,) = dry_runs(lines)
    assert re.fullmatch(DRY_RUN, line)
    assert lines.index(line) < next(n for n, text in enumerate(lines) if "iters:" in text)

    monkeypatch.setattr(utils.training.train, "dry_run", lambda *_: None)
    bare = small(train_epochs=4, checkpoints=tmp_path / "without", **flags)
    other = train(bare, capsys)
    same = [[x for x in y if not re.search("speed:|cost time:|Memory:|Dry run:|saved at", x)] for y in (lines, other)]
    assert not dry_runs(other) and same[0] == same[1]
    one, two = ((run_folder(w) / "state.4.pt").read_bytes() for w in (words, bare))
    assert one == two


def test_short_and_resumed_runs_have_none(small, capsys) -> None:
    """18 steps; and of 24 the last 6, after a run of 18."""
    flags = {"model": "DLinear", "llm_model_path": None, "max_iters": 6}
    assert not dry_runs(train(small(train_epochs=3, **flags), capsys))
    resumed = train(small(train_epochs=4, resume=True, **flags), capsys)
    assert any(line.startswith("Resuming from") for line in resumed) and not dry_runs(resumed)
    assert dry_runs(train(small(train_epochs=4, model_id="whole", **flags), capsys))


@pytest.mark.parametrize("features", ["M", "S", "MS"])
def test_errors_against_numpy_whatever_the_batch(argv, capsys, tmp_path: Path, features: str) -> None:
    """The test windows from the file by hand: 70/10/20, the training rows' scale. MS: all columns are read, one counts."""
    words = argv(features=features, max_iters=4, plots=0)
    mse = float(figures(train(words, capsys))[0])
    columns = ["OT"] if features == "S" else list(COLUMNS)
    assert json.loads((run_folder(words) / "checkpoint.json").read_text())["columns"] == columns
    values = pd.read_csv(tmp_path / "series.csv")[columns].to_numpy()
    values = (values - values[:224].mean(0)) / values[:224].std(0)
    starts, target = range(256, 313), slice(-1 if features == "MS" else 0, None)  # 57 windows: none is dropped
    truth = np.stack([values[i : i + PRED_LEN, target] for i in starts])
    inputs = np.stack([values[i - SEQ_LEN : i, target] for i in starts])

    for size in (1, 5, 100) if features == "M" else (16,):
        context = setup(parse_flags([*words, "--is_training", "0", "--eval_batch_size", str(size)]), 0, Interrupts())
        context.model.load_state_dict(context.checkpoint.tensors(shapes_of(context.model)))
        seen, forecasts = [], []

        def consume(batch, forecast, seen=seen, forecasts=forecasts):
            for kept, rows in ((seen, batch.x), (forecasts, forecast)):
                kept.append(rows.view(len(batch.index), -1, rows.shape[1]).mT.numpy())

        scores = score(context, "test", consume)
        np.testing.assert_allclose(np.concatenate(seen), inputs, rtol=1e-5, atol=1e-5)
        error = np.concatenate(forecasts) - truth
        assert scores.mse == pytest.approx(np.square(error).mean(), rel=1e-5)
        assert scores.mae == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert mse == pytest.approx(scores.mse, rel=1e-6, abs=1e-7)
