"""A series, a command line and a run small enough for a test: seconds on one core."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_provider.batches import Batch, WindowCollate
from models.TimeLLM import Model
from tests.realdata import ROOT
from utils.flags import FLAGS, parse_flags, run_name

COLUMNS = ("load", "flow", "OT")
ROWS = 320  # custom borders: 224 train, 32 validation, 64 test
SEQ_LEN, PRED_LEN = 32, 8


def write_csv(path: Path, rows: int = ROWS, columns: tuple[str, ...] = COLUMNS, seed: int = 0) -> Path:
    """A seeded file of daily cycles and noise, the columns on different scales."""
    rng, hour = np.random.default_rng(seed), np.arange(rows)
    table = {"date": pd.date_range("2020-01-01", periods=rows, freq="h").strftime("%Y-%m-%d %H:%M:%S")}
    for i, name in enumerate(columns):
        wave = np.sin(2 * np.pi * (hour + 5 * i) / 24) + 0.2 * rng.standard_normal(rows)
        table[name] = (10.0 ** (i % 8) * wave + i).round(4)
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def command_line(folder: Path, backbone: Path, **flags: object) -> list[str]:
    """Words of a run on `folder`/series.csv, written when missing; `flags` replace the defaults.

    None leaves a flag out, True gives it without a value.
    """
    if not (folder / "series.csv").is_file():
        write_csv(folder / "series.csv")
    chosen = {
        "task_name": "long_term_forecast", "is_training": 1, "model_id": "small", "model_comment": "run",
        "model": "TimeLLM", "data": "custom", "root_path": folder, "data_path": "series.csv",
        "checkpoints": folder / "checkpoints", "device": "cpu", "num_workers": 0,
        "seq_len": SEQ_LEN, "label_len": 8, "pred_len": PRED_LEN, "d_model": 8, "n_heads": 2, "d_ff": 8,
        "llm_model": "QWEN", "llm_model_path": backbone, "llm_layers": 1,
        "train_epochs": 1, "batch_size": 16, "eval_batch_size": 16, "learning_rate": 1e-3, "log_every": 4,
    } | flags  # fmt: skip
    words: list[str] = []
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def run_folder(argv: list[str], repeat: int = 0) -> Path:
    args = parse_flags(argv)
    return Path(args.checkpoints) / run_name(args, repeat)


def train(argv: list[str], capsys) -> list[str]:
    from utils.run import main

    capsys.readouterr()
    assert main(parse_flags(argv)) == 0
    return capsys.readouterr().out.splitlines()


def launched(argv: list[str], processes: int = 2, program: str = "run_main.py") -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), program, *argv]


def run_in_group(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def train_in_two_processes(argv: list[str]) -> list[str]:
    run = run_in_group(launched(argv))
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def refusal(argv: list[str], capsys) -> str:
    """The one line with which a command line is refused, without the program's name."""
    import run_main

    capsys.readouterr()
    try:
        code = run_main.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), (code, out, err)
    line = re.fullmatch(r"run_main\.py: error: (\S.*?: got .+, expected .+)\n", err)
    assert line, err
    return line[1]


def figures(lines: list[str]) -> tuple[str, str]:
    return next(match.groups() for line in reversed(lines) if (match := re.match(r"Test MSE: (\S+) MAE: (\S+)$", line)))


def small_model(folder: Path, backbone, **flags: object) -> Model:
    """A model around a loaded backbone, in eval mode, its weights drawn from a fixed seed."""
    args = parse_flags(command_line(folder, backbone.info.folder, **flags))
    torch.manual_seed(1)
    return Model(args, backbone).eval()


def defaults(**flags: object) -> Namespace:
    return Namespace(**{flag.name: flag.default for flag in FLAGS} | flags)


def make_batch(model: Model, x: torch.Tensor, seed: int = 0) -> Batch:
    """Windows `[B, T, N]` with random truths, as the loader hands them over."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(x.shape[0], model.pred_len, x.shape[2], generator=generator)
    items = [{"x": x[i], "y": y[i], "x_mark": x[i, :, :1], "y_mark": y[i, :, :1], "index": i} for i in range(len(x))]
    return WindowCollate(model.pred_len, None, model.prompts)(items)


def random_windows(windows: int = 3, seq_len: int = SEQ_LEN, channels: int = 2, seed: int = 0) -> torch.Tensor:
    """Windows `[B, T, N]` whose prompts differ in length: the first is the shortest there is, some have many digits."""
    x = torch.randn(windows, seq_len, channels, generator=torch.Generator().manual_seed(seed)).cumsum(1)
    x[0, :, 0] = 0.0
    x[-1] *= 1e-3
    return x
