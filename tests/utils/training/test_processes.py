"""The same loop in a group of processes (gloo on the CPU), as torchrun or accelerate start it."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.m4_files import write_m4
from tests.realdata import ROOT
from tests.small_run import (
    command_line,
    figures,
    launched,
    run_folder,
    run_in_group,
    train,
    train_in_two_processes,
)
from utils.saving.state import state_files

WITHOUT_DROPOUT = "tests/without_dropout.py"
M4 = {
    "task_name": "short_term_forecast", "data": "m4", "seasonal_patterns": "Yearly", "data_path": None, "seq_len": None,
    "label_len": None, "pred_len": None, "patch_len": 1, "stride": 1, "batch_size": 3, "train_epochs": 3,
    "optimizer": "adamw",
}  # fmt: skip
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture
def words(backbones, tmp_path: Path):
    """`words(**flags)`: a command line of 8 steps without dropout, in this test's folder."""
    usual = {"dropout": 0, "batch_size": 6, "eval_batch_size": 5, "max_iters": 8, "log_every": 1, "plots": 0,
             "torch_checkpoint": 0, "learning_rate": 1e-4}  # fmt: skip

    def make(name: str = "x", **flags: object) -> list[str]:
        return command_line(tmp_path, backbones["qwen2"], **{"model_id": name} | usual | flags)

    return make


def losses(words: list[str]) -> list[float]:
    with (run_folder(words) / "steps.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def tensors(words: list[str]) -> dict[str, torch.Tensor]:
    """Those of the newest state, without the random generators'."""
    held = torch.load(state_files(run_folder(words))[0])
    moments = {f"{number}.{name}": value for number, of in held["optimizer"].items() for name, value in of.items()}
    named = {"model": held["model"], "optimizer": moments}
    return {f"{kind}.{name}": value for kind, of in named.items() for name, value in of.items() if torch.is_tensor(value)}


def assert_alike(words: list[str], others: list[str], tolerance: float) -> None:
    """Two runs have left the same files; tensors differ by no more than this, relative to their norm."""
    one, two = tensors(words), tensors(others)
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    for name, tensor in one.items():
        if tensor.dtype == torch.float32 and name.startswith("model."):
            difference = (two[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)
            assert difference <= tolerance, (name, float(difference))
    np.testing.assert_allclose(losses(words), losses(others), rtol=1e-6)


def without_dropout(words: list[str], processes: int) -> None:
    run = run_in_group(launched(words, processes, WITHOUT_DROPOUT))
    assert run.returncode == 0, run.stderr


# 8-bit moments take another level where the last bit of a gradient decides, in one process cut otherwise, too.
@pytest.mark.parametrize(
    ("flags", "processes", "tolerance"),
    [
        ({"optimizer": "adam", "max_sequences": 5}, 2, 1e-6),
        pytest.param({"optimizer": "adamw8bit"}, 2, 1e-4, marks=pytest.mark.long),
        pytest.param({"optimizer": "adamw", "prototypes": "direct"}, 2, 1e-6, marks=pytest.mark.long),
        # Its norms' biases are near zero, where they began.
        pytest.param({"model": "PatchTST", "llm_model_path": None}, 3, 1e-5, marks=pytest.mark.long),
        pytest.param(M4, 2, 1e-6, marks=pytest.mark.long),
    ],
    ids=["vocab", "8bit", "direct", "batch norm", "m4"],
)
def test_several_processes_leave_what_one_leaves(words, tmp_path: Path, flags, processes, tolerance) -> None:
    if "data" in flags:
        write_m4(tmp_path, flags["seasonal_patterns"])
    alone, group = words("alone", **flags), words("group", **flags)
    without_dropout(alone, 1)
    without_dropout(group, processes)
    assert_alike(alone, group, tolerance)


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adam", 1e-6), ("adamw8bit", 1e-4)])
def test_a_state_goes_on_in_any_number_of_processes(words, optimizer, tolerance) -> None:
    first, second, third = (words(name, optimizer=optimizer) for name in ("first", "second", "third"))
    without_dropout([*first, "--train_epochs", "2"], 1)
    for argv, before, after in ((second, 1, 4), (third, 3, 1)):
        without_dropout(argv, before)
        without_dropout([*argv, "--train_epochs", "2", "--resume"], after)
        assert_alike(first, argv, 2 * tolerance)


def test_two_processes_train_and_score_as_one(backbones, capsys, tmp_path: Path) -> None:
    words = command_line(tmp_path, backbones["qwen2"], batch_size=16, eval_batch_size=5)
    lines = train_in_two_processes(words)
    # Every line once; 185 windows are 11 iterations of 16.
    assert [line for line in lines if line in ("train 185", "val 25", "test 57")] == ["train 185", "val 25", "test 57"]
    assert sum("iters:" in line for line in lines) == 2 and sum(line.startswith("Test MSE") for line in lines) == 1
    assert any(line.startswith("2 processes: --batch_size 16 is what a training step sees in all, 8 in") for line in lines)
    # 12 test batches: 6 for each process, of 30 and 27 windows. One process gets the same sums.
    assert figures(train([*words, "--is_training", "0"], capsys)) == figures(lines)


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
    one, two = tensors(whole), tensors(killed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.long
def test_what_all_refuse_is_said_once(words) -> None:
    run = run_in_group(launched(words(batch_size=1)))
    told = [line for line in run.stderr.splitlines() if line.startswith("run_main.py: error: ")]
    expected = "run_main.py: error: --batch_size: got 1, expected at least 2, a window of each step for each process"
    assert told == [expected] and run.stdout == ""


@pytest.mark.long
def test_two_machines_that_share_a_folder(words) -> None:
    flags = {"model": "DLinear", "llm_model_path": None}
    alone, group = words("alone", **flags), words("group", **flags)
    without_dropout(alone, 1)
    port = str(29500 + time.monotonic_ns() % 1000)
    options = f"--num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank"
    start = [*ACCELERATE, "--config_file", "scripts/accelerate/cpu.yaml", *options.split()]
    second = subprocess.Popen([*start, "1", "run_main.py", *group], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first = run_in_group([*start, "0", "run_main.py", *group])
    silent, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode, silent) == (0, 0, ""), first.stderr
    assert_alike(alone, group, 1e-6)


@pytest.mark.long
def test_an_error_of_one_process_ends_all_and_is_told(words, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from layers.errors import RunError\nimport utils.run\n"
        "def fail(job): raise RunError('the disk is gone')\n"
        "if os.environ['RANK'] == '1':\n    utils.run.fit = fail\n"
        "from run_main import main\nsys.exit(main(sys.argv[1:], 'program.py'))\n"
    )
    began = time.monotonic()
    run = run_in_group(launched(words(model="DLinear", llm_model_path=None), program=str(program)))
    assert run.returncode != 0 and time.monotonic() - began < 100
    assert "program.py: rank 1: error: the disk is gone" in run.stderr, run.stderr


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
