"""Cells of a study on the disk: where each lies, how far it is, and what a finished one has measured."""

import csv
import errno
import importlib.metadata
import json
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layers.errors import InputError, input_error
from utils.flags import run_name
from utils.saving.files import TENSORS, read_header, write_json
from utils.study.devices import ask_cards
from utils.study.grid import Cell, Grid

try:
    import fcntl
except ImportError:  # Windows without WSL: nothing there keeps two studies apart
    fcntl = None  # type: ignore[assignment]

CELLS, NOTE, LOG, LOCK, RESULTS_LOCK = "cells", "cell.json", "log.txt", ".lock", ".results.lock"
RECORD, METRICS, HISTORY = "checkpoint.json", "metrics.json", "history.csv"  # what a run leaves in its folder
NEW, HALF, FAILED, DONE = "to do", "half way", "failed", "done"


@dataclass(frozen=True)
class Measured:
    """What a finished cell has found."""

    mse: float
    mae: float
    windows: int  # scored
    trained_values: int | None
    epochs: int | None
    best_epoch: int | None
    validation_loss: float | None
    seconds: float
    machine: str
    data: str  # the file's name
    synthetic: bool
    baselines: dict[str, tuple[float, float]]  # title -> MSE and MAE on the same windows
    intervals: dict[str, float] = field(default_factory=dict)  # see `interval_figures`
    baseline_intervals: dict[str, dict[str, float]] = field(default_factory=dict)  # by title


class Place:
    """A cell's folder in a study."""

    def __init__(self, study: Path, cell: Cell):
        """The folder keeps its name when the grid's axes are named otherwise: the hash at its end says what was tried."""
        held = sorted((study / CELLS).glob(f"*_{cell.hash}"))
        self.cell, self.folder = cell, held[0] if held else study / CELLS / cell.id
        self.run, self.log = self.folder / run_name(cell.args, 0), self.folder / LOG

    def note(self) -> dict[str, Any]:
        """What earlier calls have written down."""
        return _read(self.folder / NOTE)

    def write_note(self, **values: object) -> None:
        """Write down what is known of the cell now, beside what was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / NOTE, self.note() | {"id": self.cell.id, "flags": self.cell.given} | values)

    def foreign(self) -> bool:
        """Whether the run in the folder was made with other flags than the cell's."""
        recorded = _read(self.run / RECORD).get("flags", {})
        asked = {name: getattr(self.cell.args, name) for name in self.cell.given}
        return any(name in recorded and recorded[name] != value for name, value in asked.items())

    def state(self) -> str:
        """How far the cell is."""
        if self.measured() is not None:
            return DONE
        code = self.note().get("exit_code", 0)
        if code:
            return FAILED
        return HALF if self.run.is_dir() else NEW

    def last_line(self) -> str:
        """The last line of the log that says something."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return "no log"
        return next((line.strip() for line in reversed(lines) if line.strip()), "an empty log")

    def measured(self) -> Measured | None:
        """What the finished run has found; None where it is not finished, or another cell's."""
        metrics, record, note = _read(self.run / METRICS), _read(self.run / RECORD), self.note()
        test = metrics.get("test")
        if not isinstance(test, dict) or not record or self.foreign():
            return None
        history = _rows(self.run / HISTORY)
        spent = sum(float(row[name] or 0) for row in history for name in ("seconds", "evaluation_seconds") if name in row)
        rows = metrics.get("baselines", {}).get("rows", [])
        return Measured(
            mse=test["mse"],
            mae=test["mae"],
            windows=metrics["windows"],
            trained_values=_trained_values(self.run / TENSORS),
            epochs=len(history) or None,
            best_epoch=record.get("epoch"),
            validation_loss=record.get("vali_loss"),
            # A call that was killed could not write its time down; the epochs' own times are there still.
            seconds=max(note.get("seconds", 0.0), spent),
            machine=note.get("machine", "unknown"),
            data=str(metrics.get("data", {}).get("file", "")),
            synthetic=bool(metrics.get("data", {}).get("synthetic")),
            baselines={row["title"]: (row["mse"], row["mae"]) for row in rows},
            intervals=interval_figures(metrics.get("intervals")),
            baseline_intervals={row["title"]: interval_figures(row.get("intervals")) for row in rows},
        )


def interval_figures(found: dict[str, Any] | None) -> dict[str, float]:
    """What metrics.json says of prediction intervals, under the heads of a table: "in 80 %" is the part of the truths that
    the 80 % intervals held."""
    if not found:
        return {}
    figures: dict[str, float] = {}
    for level, held in found["levels"].items():
        figures |= {f"in {level} %": held["coverage"], f"width {level} %": held["width"]}
    return figures if found["wql"] is None else figures | {"WQL": found["wql"]}


def left_over(study: Path, grid: Grid) -> list[str]:
    """Names of the cells' folders that the grid does not have (any more)."""
    ours = {Place(study, cell).folder.name for cell in grid.cells}
    folder = study / CELLS
    return (
        sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in ours) if folder.is_dir() else []
    )


def machine() -> str:
    """CPU, cores and torch's version, and the graphics cards where there are some."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), name)
    cards = "".join(f", {card}" for card in ask_cards("name") or [])
    return f"{name}, {cores()} cores{cards}, torch {importlib.metadata.version('torch')}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StudyLock:
    """The study's folder is this process's until it ends, however it ends."""

    def __init__(self, study: Path, shared: bool = False):
        """Make the folder if need be, and lock it.

        Args:
            shared: with others that share it, such as tasks that run a cell each (see `CellLock`).

        Raises:
            InputError: it cannot be written, or another study runs in it.
        """
        self._handle = _open_lock(study, study / LOCK)
        if not _lock(self._handle, shared):
            os.close(self._handle)
            raise input_error(f"--out {study}", "another study that runs in it", "none", "wait for it or end it")

    def release(self) -> None:
        """Give the folder back."""
        os.close(self._handle)


class CellLock:
    """A cell is this task's until it ends, however it ends."""

    def __init__(self, study: Path, place: Place):
        """Lock a cell of a study.

        Raises:
            InputError: its folder cannot be written, or another task runs it.
        """
        self._handle = _open_lock(study, _lock_of(place))
        if not _lock(self._handle):
            os.close(self._handle)
            raise input_error(f"--cell {place.cell.id}", "another task that runs it", "none", "wait for it or end it")

    def release(self) -> None:
        """Give the cell back."""
        os.close(self._handle)


class ResultsLock:
    """A context in which no other process writes a study's tables: each is made from all cells that are done, and one that
    had looked earlier must not replace one that has seen more."""

    def __init__(self, study: Path):
        self._study = study

    def __enter__(self) -> None:
        """Wait for the others.

        Raises:
            InputError: the study's folder cannot be written.
        """
        self._handle = _open_lock(self._study, self._study / RESULTS_LOCK)
        _lock(self._handle, wait=True)

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _lock_of(place: Place) -> Path:
    # Beside the cell's folder, which may be moved aside.
    return place.folder.with_name(f".{place.folder.name}{LOCK}")


def _open_lock(study: Path, path: Path) -> int:
    """A lock's file, made where there is none.

    Raises:
        InputError: the study's folder cannot be written.
    """
    try:
        (study / CELLS).mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise input_error(f"--out {study}", f"no writing ({error.strerror})", "a folder that can be written") from None


def has_task(place: Place) -> bool:
    """Whether a task runs the cell, as far as this machine can see."""
    return _is_locked(_lock_of(place))


def in_use(run: Path) -> bool:
    """Whether a process trains in a run's folder: one that has outlived a study that was killed."""
    return _is_locked(run / LOCK)


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)  # gives a lock back, too


def _lock(handle: int, shared: bool = False, wait: bool = False) -> bool:
    """Take a lock that dies with the process; False: another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks goes without
    return True


def _trained_values(file: Path) -> int | None:
    try:
        return sum(math.prod(shape) for shape in read_header(file)[1].values())
    except (OSError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _damaged(path, error) from None
    return held if isinstance(held, dict) else {}


def _damaged(path: Path, error: ValueError) -> InputError:
    return input_error(path, f"a damaged file ({error})", "JSON", "move the cell's folder away, and it runs anew")


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
