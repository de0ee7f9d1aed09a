"""Real runs of the program for tests: a tiny backbone, a short series, and processes that are watched."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.make_backbone import make_backbone

PATIENCE = 300  # seconds to wait for something that takes a few


def write_series(path: Path, rows: int = 400) -> Path:
    """A CSV with the columns a and b, hour by hour."""
    hours = np.arange(rows)
    noise = np.random.default_rng(0).standard_normal((2, rows)) / 10
    values = {"a": np.sin(hours / 4) + noise[0], "b": np.cos(hours / 4) + noise[1]}
    pd.DataFrame({"date": pd.date_range("2020-01-01", periods=rows, freq="h")} | values).to_csv(path, index=False)
    return path


class Lab:
    """A folder with a backbone and a series, and the command lines of runs on them."""

    def __init__(self, folder: Path, rows: int = 400):
        self.folder = folder
        self.backbone = make_backbone(folder / "backbone", "tiny")
        self.csv = write_series(folder / "series.csv", rows)

    def argv(self, where: Path, *flags: object, training: int = 1) -> list[str]:
        """The flags of a run that keeps its folder in `where`."""
        text = (
            f"--task_name long_term_forecast --is_training {training} --model_id x --model_comment c --model TimeLLM "
            f"--data custom --seq_len 64 --label_len 16 --pred_len 16 --d_model 8 --d_ff 16 --n_heads 2 "
            f"--llm_layers 1 --train_epochs 2 --batch_size 8 --num_workers 1 --log_every 1 --device cpu"
        )
        paths = ["--root_path", self.folder, "--data_path", self.csv.name, "--llm_model_path", self.backbone]
        return [*text.split(), *map(str, [*paths, "--checkpoints", where, *flags])]

    def start(self, where: Path, *flags: object, **options) -> "Live":
        """Start a run as a process."""
        return Live(self.argv(where, *flags, **options), where)

    def command(self, where: Path, *flags: object, **options) -> list[str]:
        """The same as a user's command line."""
        return [sys.executable, "run_main.py", *self.argv(where, *flags, **options)]


def _run(argv: list[str], output: Path) -> None:
    """What the process does: the program's entry, with its two outputs in a file."""
    # A shell's background job is started deaf to Ctrl+C, one under nohup to SIGHUP. The program heeds
    # that; the tests send both.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from run_main import main

    sys.exit(main(argv))


class Live:
    """A process of the program, forked from one that has imported the libraries: a start takes a second."""

    _forks = multiprocessing.get_context("forkserver")
    _forks.set_forkserver_preload(["utils.run", "transformers.models.qwen2.modeling_qwen2"])

    def __init__(self, argv: list[str], where: Path):
        where.mkdir(parents=True, exist_ok=True)
        self.where = where
        # Beside the folder of runs, which a test may fill to the last byte.
        self.output = where.parent / f"{where.name}.{time.monotonic_ns()}.out"
        self.output.touch()
        self.process = self._forks.Process(target=_run, args=(argv, self.output))
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text()

    def until(self, seen) -> None:
        """Wait until `seen()` is true or the process has ended."""
        end = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < end, self.text
            if not self.process.is_alive():
                return
            time.sleep(0.002)

    def until_line(self, start: str) -> None:
        """Wait for a line that starts like this."""
        self.until(lambda: f"\n{start}" in f"\n{self.text}")

    def end(self) -> int:
        """Wait for the end; the exit code."""
        self.process.join(PATIENCE)
        assert "Traceback" not in self.text, self.text
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self.process.kill()
        self.process.join()


def run_folder(where: Path) -> Path:
    """The one run's folder in `where` (none that was moved aside)."""
    (folder,) = (path for path in where.iterdir() if path.is_dir() and not path.suffix[1:].isdigit())
    return folder


def losses(*texts: str) -> list[str]:
    """The lines with losses, each once: an iteration that a resumed run repeats must print the same."""
    lines = [line for text in texts for line in text.splitlines() if "loss" in line.lower() and "WARN" not in line]
    return list(dict.fromkeys(line for line in lines if "left time" not in line))
