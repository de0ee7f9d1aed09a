"""Real runs of the program for tests: a tiny backbone, a short series, and processes that are watched."""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from scripts.make_backbone import make_backbone
from tests.small_run import command_line, write_csv

PATIENCE = 300  # seconds to wait for something that takes a few
USUAL = {
    "seq_len": 64, "label_len": 16, "pred_len": 16, "d_ff": 16, "train_epochs": 2, "batch_size": 8, "eval_batch_size": None,
    "learning_rate": None, "num_workers": 1, "log_every": 1,
}  # fmt: skip


class Lab:
    """A folder with a backbone and a series of 400 rows, and the command lines of runs on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.backbone = make_backbone(folder / "backbone", "tiny")
        write_csv(folder / "series.csv", 400, ("a", "b"))

    def argv(self, where: Path, *flags: object) -> list[str]:
        return [*command_line(self.folder, self.backbone, checkpoints=where, **USUAL), *map(str, flags)]

    def start(self, where: Path, *flags: object) -> "Live":
        return Live(self.argv(where, *flags), where)


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
        end = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < end, self.text
            if not self.process.is_alive():
                return
            time.sleep(0.002)

    def end(self) -> int:
        self.process.join(PATIENCE)
        assert "Traceback" not in self.text, self.text
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal, to the loader's workers too, as a closed terminal or a shutdown does."""
        for pid in (*self.workers(), self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def workers(self) -> list[int]:
        pid = self.process.pid
        with suppress(FileNotFoundError):
            return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_folder(where: Path) -> Path:
    """The one run's folder in `where` (none that was moved aside)."""
    (folder,) = (path for path in where.iterdir() if path.is_dir() and not path.suffix[1:].isdigit())
    return folder


def results(where: Path) -> list[object]:
    """What a run leaves, to the last bit (but for the memory it took, and where it lies)."""
    folder = run_folder(where)
    files = [(folder / name).read_bytes() for name in ("checkpoint.safetensors", "checkpoint", "checkpoint.json")]
    return [json.loads((folder / "metrics.json").read_text())["test"], *files]


def losses(*texts: str) -> list[str]:
    """The lines with losses, each once: an iteration that a resumed run repeats must print the same."""
    lines = [line for text in texts for line in text.splitlines() if "loss" in line.lower() and "WARN" not in line]
    return list(dict.fromkeys(line for line in lines if "left time" not in line))
