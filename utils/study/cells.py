"""Cells of a study: how far each is, what a finished one has measured, and the queue that runs the others as processes."""

import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from utils.saving.files import write_json
from utils.saving.interrupt import SIGNALS
from utils.study.grid import Cell

NOTE, LOG = "cell.json", "log.txt"  # in a cell's folder, beside the run's
NEW, HALF, FAILED, DONE = "to do", "half way", "failed", "done"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def measure(cell: Cell) -> dict[str, Any]:
    """How far a cell is (`state`); of one that is done also the figures of results.csv, machine and data, and figures of
    prediction intervals and of the simple forecasts."""
    metrics, header = read_json(cell.run / "metrics.json"), read_json(cell.run / "checkpoint.json")
    note = read_json(cell.folder / NOTE)
    if not metrics.get("test") or not header:
        return {"state": FAILED if note.get("exit_code") else HALF if cell.run.is_dir() else NEW}
    history, tensors, trained = cell.run / "history.csv", cell.run / "checkpoint.safetensors", None
    epochs = pd.read_csv(history) if history.is_file() else pd.DataFrame()
    if tensors.is_file():  # large ones may have been removed
        with safe_open(tensors, "np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if not name.startswith("intervals.")]
        trained = sum(math.prod(shape) for shape in shapes)
    simple = metrics.get("baselines", {}).get("rows", [])
    return {
        "state": DONE,
        "mse": metrics["test"]["mse"],
        "mae": metrics["test"]["mae"],
        "windows": metrics["windows"],
        "windows_dropped": 0,  # the test split is scored whole
        "trained_values": trained,
        "epochs": len(epochs) or None,
        "best_epoch": header.get("epoch"),
        "validation_loss": header.get("vali_loss"),
        # A call that was killed could not write its time down; the epochs' own times are there still.
        "seconds": max(note.get("seconds", 0.0), epochs.reindex(columns=["seconds", "evaluation_seconds"]).sum().sum()),
        "machine": note.get("machine", "unknown"),
        "data": metrics["data"]["file"] + (", a synthetic series" if metrics["data"]["synthetic"] else ""),
        "intervals": interval_figures(metrics),
        "simple": [{"row": r["title"], "mse": r["mse"], "mae": r["mae"], **interval_figures(r)} for r in simple],
    }


def interval_figures(found: dict[str, Any]) -> dict[str, float]:
    """What metrics.json says of prediction intervals, under a table's heads: "in 80 %" is the part of truths inside."""
    intervals = found.get("intervals") or {"levels": {}, "wql": None}
    figures = {} if intervals["wql"] is None else {"WQL": intervals["wql"]}
    for level, held in reversed(intervals["levels"].items()):
        figures = {f"in {level} %": held["coverage"], f"width {level} %": held["width"], **figures}
    return figures


def last_line(cell: Cell) -> str:
    """The last line of a failed cell's log that says something."""
    lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "an empty log")


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_note(cell: Cell, **values: object) -> None:
    """Write down what is known of a cell now, beside what was."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.folder / NOTE, read_json(cell.folder / NOTE) | {"command": cell.command} | values)


def card_names() -> list[str]:
    """The graphics cards that nvidia-smi lists; none where it is missing."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []


def machine() -> str:
    """CPU, cores and torch's version, and the graphics cards where there are some."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else []
    name = models[0] if models else platform.processor() or platform.machine()
    return ", ".join([name, f"{cores()} cores", *card_names(), f"torch {importlib.metadata.version('torch')}"])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_cells(
    cells: list[Cell], jobs: int, gpus: Sequence[str], lock: int
) -> tuple[list[str], int]:
    """Run the cells that are not done, each in a process; signals are passed on, failures told, and the rest goes on.

    Args:
        cells: all cells of the study, in order.
        jobs: how many run at once.
        gpus: the cards that they share; none: what the flags say.
        lock: a file handle that the runs keep open until they end.

    Returns:
        The cells that failed, and the number of the signal that has ended the study, or 0.
    """
    seconds = {cell.name: found["seconds"] for cell in cells if (found := measure(cell))["state"] == DONE}
    cards = [gpus[number % len(gpus)] if gpus else None for number in range(jobs)]  # free ones
    processes: list[subprocess.Popen] = []
    received, failed = 0, []

    def pass_on(number: int, _frame: object) -> None:
        # The runs save and end, and no other starts; a second signal ends them at once.
        nonlocal received
        received = number
        for process in processes:
            process.send_signal(number)  # one that has ended gets none

    def run(cell: Cell) -> tuple[int, float, str]:
        card, environment = cards.pop(0), os.environ.copy()
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, int(environment.get("OMP_NUM_THREADS") or cores()) // jobs))
        if card is not None:
            # CUDA counts the fastest card first unless it is told to count as nvidia-smi does.
            environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environment, VISIBLE: card}
            print(f"{cell.name} begins on GPU {card}", flush=True)
        write_note(cell, exit_code=0, machine=machine())
        began = time.monotonic()
        with (cell.folder / LOG).open("ab") as log:
            # A session of its own: Ctrl+C reaches the run once, through `pass_on`, and not twice.
            process = subprocess.Popen(
                cell.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                pass_fds=[lock],
            )  # fmt: skip
        processes.append(process)
        if received:  # it came between the two lines
            process.send_signal(received)
        code = process.wait()
        cards.append(card)
        return code, time.monotonic() - began, f" on GPU {card}" if gpus else ""

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, pass_on)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(lambda c=cell: None if received else run(c)): cell for cell in cells if cell.name not in seconds}
        for future in as_completed(waiting):
            if future.result() is None:
                continue
            cell, (code, spent, where) = waiting[future], future.result()
            stopped = bool(received and code)  # a run that is stopped while it starts may die with any code
            write_note(cell, exit_code=0 if stopped else code, seconds=read_json(cell.folder / NOTE).get("seconds", 0.0) + spent)
            found = measure(cell)
            if stopped:
                print(f"{cell.name}: stopped, {found['state']}", flush=True)
            elif code or found["state"] != DONE:
                failed.append(cell.name)
                print(f"{cell.name} failed{where} (exit code {code}): {last_line(cell)}; the rest goes on", flush=True)
            else:
                seconds[cell.name] = found["seconds"]
                rest = len(cells) - len(seconds) - len(failed)
                left = f"left about {time_text(sum(seconds.values()) / len(seconds) * rest / jobs)}" if rest else "nothing left"
                count, figures = f"cell {len(seconds)} of {len(cells)}", f"mse {found['mse']:.4f} mae {found['mae']:.4f}"
                print(f"{count} done in {time_text(spent)}{where}: {cell.name} {figures}; {left}", flush=True)
    return failed, received


def time_text(seconds: float) -> str:
    """Seconds for people: 45 s, 4 min 12 s, 1 h 50 min."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{whole} s" if not minutes else f"{minutes} min {whole} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
