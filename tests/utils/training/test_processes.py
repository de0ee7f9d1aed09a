"""The same loop in a group of processes (gloo on the CPU), as torchrun or accelerate start it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from tests.m4_files import write_m4
from tests.realdata import ROOT
from tests.small_run import command_line, launched, run_folder, run_in_group, train
from utils.saving.state import state_files
from utils.study.cells import nvidia_smi

WITHOUT_DROPOUT = "tests/without_dropout.py"
M4 = {
    "task_name": "short_term_forecast", "data": "m4", "seasonal_patterns": "Yearly", "data_path": None, "seq_len": None,
    "label_len": None, "pred_len": None, "patch_len": 1, "stride": 1, "batch_size": 3, "train_epochs": 3,
    "optimizer": "adamw",
}  # fmt: skip
BESIDE = {"prototypes": "direct", "skip": "ridge", "skip_mode": "beside", "ema": 0.9, "loss": "MAE+FFT"}
SCORES = "test", "windows", "standardised"


@pytest.fixture
def words(backbones, tmp_path: Path):
    """`words(**flags)`: a command line of 8 steps without dropout, in this test's folder."""
    usual = {"dropout": 0, "batch_size": 6, "eval_batch_size": 5, "max_iters": 8, "log_every": 1, "plots": 0,
             "torch_checkpoint": 0, "learning_rate": 1e-4}  # fmt: skip

    def make(name: str = "x", **flags: object) -> list[str]:
        return command_line(tmp_path, backbones["qwen2"], **{"model_id": name} | usual | flags)

    return make


def left(words: list[str]) -> tuple[dict[str, torch.Tensor], pd.Series, pd.Series]:
    """Tensors of a run's newest state, losses of its steps, and the figures of its test."""
    folder = run_folder(words)
    held = torch.load(state_files(folder)[0])
    moments = {f"{number}.{name}": value for number, of in held["optimizer"].items() for name, value in of.items()}
    average = {f"average.{number}": value for number, value in enumerate(held["average"])}
    tensors = {name: value for name, value in (held["model"] | average | moments).items() if torch.is_tensor(value)}
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = pd.json_normalize({part: metrics[part] for part in SCORES if part in metrics}).iloc[0]
    return tensors, pd.read_csv(folder / "steps.csv")["loss"], scores.explode().astype(float)


def assert_alike(words: list[str], others: list[str], tolerance: float) -> None:
    """Two runs have left the same; trained values differ by no more than this, relative to their norm."""
    (one, losses, scores), (two, their_losses, their_scores) = left(words), left(others)
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    for name, tensor in one.items():
        if not name[0].isdigit():
            difference = (two[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)
            assert difference <= tolerance, (name, float(difference))
    np.testing.assert_allclose(losses, their_losses, rtol=1e-6)
    assert len(scores) >= 2  # the test's windows among them: one that is counted twice shows
    pd.testing.assert_series_equal(scores, their_scores, rtol=10 * tolerance, atol=0)


def without_dropout(words: list[str], processes: int) -> list[str]:
    run = run_in_group(launched(words, processes, WITHOUT_DROPOUT))
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# 8-bit moments take another level where the last bit of a gradient decides, in one process cut otherwise, too.
@pytest.mark.parametrize(
    ("flags", "processes", "tolerance"),
    [
        # Without --device, where there is no GPU: a group on the CPU all the same.
        ({"optimizer": "adam", "max_sequences": 5, "device": "cpu" if nvidia_smi("name") else None}, 2, 1e-6),
        (BESIDE, 2, 1e-6),
        pytest.param({"optimizer": "adamw8bit"}, 2, 1e-4, marks=pytest.mark.long),
        pytest.param({"optimizer": "adamw", "prototypes": "direct"}, 2, 1e-6, marks=pytest.mark.long),
        # Its norms' biases are near zero, where they began.
        pytest.param({"model": "PatchTST", "llm_model_path": None}, 3, 1e-5, marks=pytest.mark.long),
        pytest.param(M4, 2, 1e-6, marks=pytest.mark.long),
    ],
    ids=["vocab", "beside", "8bit", "direct", "batch norm", "m4"],
)
def test_several_processes_leave_what_one_leaves(
    words, capsys, monkeypatch, tmp_path: Path, flags, processes, tolerance
) -> None:
    monkeypatch.setattr("layers.reprogramming.ATTENTION_DROPOUT", 0.0)
    if "data" in flags:
        write_m4(tmp_path, flags["seasonal_patterns"])
    alone, group = words("alone", **flags), words("group", **flags)
    lone, lines = train(alone, capsys), without_dropout(group, processes)
    assert_alike(alone, group, tolerance)
    for start in ("\titers:", "Epoch:", "Test", "test"):  # each line once
        assert [line.startswith(start) for line in lines].count(True) == [line.startswith(start) for line in lone].count(
            True
        )
    size = group[group.index("--batch_size") + 1]
    assert any(line.startswith(f"{processes} processes: --batch_size {size} is what a training step sees") for line in lines)


@pytest.mark.long
def test_published_batches_are_of_each_process(words) -> None:
    one, two = (words(name, recipe="published", batch_size=size, dropout=0) for name, size in (("one", 6), ("two", 3)))
    without_dropout(one, 1), without_dropout(two, 2)
    assert_alike(one, two, 1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adam", 1e-6), ("adamw8bit", 1e-4)])
def test_a_state_goes_on_in_any_number_of_processes(words, optimizer, tolerance) -> None:
    first, second, third = (words(name, optimizer=optimizer) for name in ("first", "second", "third"))
    without_dropout([*first, "--train_epochs", "2"], 1)
    for argv, before, after in ((second, 1, 4), (third, 3, 1)):
        without_dropout(argv, before)
        without_dropout([*argv, "--train_epochs", "2", "--resume"], after)
        assert_alike(first, argv, 2 * tolerance)


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_same_command_goes_on(words, tmp_path: Path) -> None:
    flags = {"max_iters": 0, "dropout": 0.1, "batch_size": 8, "train_epochs": 1, "save_steps": 5, "resume": True}
    whole, killed = words("whole", **flags), words("killed", **flags)
    assert run_in_group(launched(whole)).returncode == 0
    with subprocess.Popen(launched(killed), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not state_files(run_folder(killed)):
            time.sleep(0.05)
        (process,) = [p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "0"]
        process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - began < 30
    done = run_in_group(launched(killed))
    assert done.returncode == 0 and "Resuming from" in done.stdout
    one, two = left(whole)[0], left(killed)[0]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.long
def test_a_signal_to_all_lets_them_save_and_leave(words) -> None:
    flags = {
        "model": "DLinear",
        "llm_model_path": None,
        "train_epochs": 500,
        "patience": 500,
        "save_steps": 0,
        "max_iters": 0,
    }
    argv = words(**flags, resume=True)
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(launched(argv), **options) as run:
        while run.poll() is None and not state_files(run_folder(argv)):
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert run.returncode != 0 and "run_main.py: error:" not in err, err
    assert "SIGINT: the state of epoch " in out and "To resume: " in out and "torch.distributed.run" in out.splitlines()[-1]
