"""Cells of a study: a grid, a TOML file and the command line, read into command lines of run_main.py; and how far each is,
and what it has measured."""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from data_provider.splits import M4
from layers.errors import InputError, input_error
from utils.flags import FLAGS, clean_name, read_flags, run_name
from utils.saving.files import read_header, write_json

PROGRAM = Path(__file__).resolve().parents[2] / "run_main.py"
VARIANT = "variant"  # the axis whose values are named sets of flags
PARTS = {"title": str, "reference": str, "flags": dict, "grid": dict, VARIANT: list, "skip": list}  # of a grid file
# What run_main asks for and a study need not say.
USUAL = {"task_name": "long_term_forecast", "is_training": 1, "model_id": "study", "model_comment": "study"}
OWN = {"checkpoints", "checkpoint", "resume"}  # the study sets them
RECORDED = {flag.name for flag in FLAGS if flag.group != "output"}  # the others are of output and change no result
LONGEST = 120  # characters of a cell's name without its hash
NOTE, LOG = "cell.json", "log.txt"  # in a cell's folder, beside the run's
NEW, HALF, FAILED, DONE = "to do", "half way", "failed", "done"


@dataclass(frozen=True)
class Cell:
    # One run of a study.

    values: dict[str, str]  # axis -> value
    args: argparse.Namespace  # its flags, read and completed
    name: str  # readable, unique and the same in each call; its end says what was tried
    folder: Path
    run: Path  # the folder in it in which run_main.py leaves its files
    command: list[str]


@dataclass(frozen=True)
class Study:
    # All cells of a grid, in the order in which they run.

    folder: Path
    title: str
    axes: dict[str, list[str]]
    reference: str | None  # the value to which others are compared
    cells: list[Cell]


def read_study(
    folder: Path, file: Path | None, axes: Sequence[str], words: Sequence[str], reference: str | None = None
) -> Study:
    """The study of a TOML file, of axes `name=value,value`, and of flags for every run, which win over the file's [flags].

    Raises:
        InputError: the first thing that is wrong, with the file or the flag, what was found and what was expected.
    """
    where = str(file or "--grid")
    try:
        held = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise input_error(where, f"no readable TOML ({error})", "a grid file such as scripts/studies/example.toml") from None
    for name, value in held.items():
        rows = value if isinstance(value, list) else []
        if not isinstance(value, PARTS.get(name, ())) or not all(isinstance(row, dict) for row in rows):
            raise input_error(
                f"{where}: {name}",
                repr(value),
                f"one of the parts {', '.join(PARTS)} as in scripts/studies/example.toml",
            )
    own = {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    rows = [_as_text(row) for row in held.get(VARIANT, [])]
    variants = {row.pop("name", ""): row for row in rows}
    if "" in variants or len(variants) < len(rows):
        raise input_error(f"{where}: [[{VARIANT}]]", f"the names {list(variants)}", "a name of its own for each variant")
    grid: dict[str, Any] = {VARIANT: list(variants)} if variants else {}
    grid |= held.get("grid", {}) | {name: text.split(",") for name, _, text in (axis.partition("=") for axis in axes)}
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise input_error(f"{where}: [grid] {name}", repr(values), "a list of values, such as [1, 2, 3]")
    flags = {name: value for name, value in _as_text(held.get("flags", {})).items() if name not in own}
    for place, names in {"[flags]": flags, "the flags after --": own, **variants}.items():
        if twice := set(names) & (grid.keys() | (own if place in variants else set())):
            raise input_error(
                f"{where}: {min(twice)}", f"a flag of {place!r}, and an axis or a flag after --", "it in one place"
            )
    cells: list[Cell] = []
    skips = [_as_text(row) for row in held.get("skip", [])]
    unused = list(skips)
    for combination in product(*grid.values()):
        values = _as_text(dict(zip(grid, combination, strict=True)))
        given = flags | variants.get(values.get(VARIANT, ""), {}) | values
        fits = [skip for skip in skips if given.items() >= skip.items()]
        unused = [skip for skip in unused if skip not in fits]
        if not fits:
            given.pop(VARIANT, None)
            cells.append(_cell(folder, where, values, given, words, own))
            same = next(cell for cell in cells if cell.args == cells[-1].args)
            if same is not cells[-1]:
                raise input_error(f"{where}: cell {values}", f"the flags of {same.values}", "others")
    if unused:
        raise input_error(f"{where}: [[skip]] {unused[0]}", "a combination that no cell has", "one of the grid")
    if not cells:
        raise input_error(where, "no cells", "an axis, and not all of it left out")
    read = {name: list(dict.fromkeys(cell.values[name] for cell in cells)) for name in grid}
    reference = reference or held.get("reference")
    if reference is not None and not any(reference in values for values in read.values()):
        raise input_error(f"{where}: reference", repr(reference), f"a value of an axis: {read}")
    return Study(folder, held.get("title") or (file.stem if file else "study"), read, reference, cells)


def _as_text(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items()}


def _cell(
    folder: Path, where: str, values: dict[str, str], given: dict[str, str], words: Sequence[str], own: set[str]
) -> Cell:
    """A cell whose command line run_main.py takes.

    Args:
        values: axis -> value; given: flag -> value of the grid file; words: the flags after --, own: their names.

    Raises:
        InputError: run_main.py refuses, in its own words; or it would train no single run.
    """
    where = f"{where}: cell {', '.join(f'{name} = {word}' for name, word in values.items()) or 'without axes'}"
    if M4 in (given.get("data"), *words):
        raise input_error(
            "--data",
            f"{M4} in {where}",
            "data whose errors are standardised",
            "run_m4.py trains, scripts/m4_scores.py makes the table",
        )
    if OWN & (given.keys() | own):
        raise input_error(where, f"--{min(OWN & (given.keys() | own))}", "it left out: the study sets it")
    every = {name: value for name, value in (USUAL | given).items() if name not in own}
    line = [word for name, value in every.items() for word in (f"--{name}", str(value))] + list(words)
    try:
        args = read_flags(line)
    except InputError as error:
        flag, got, expected = re.split(": got |, expected ", str(error), maxsplit=2)
        raise input_error(f"{where}: {flag}", got, expected) from None
    if args.is_training != 1 or args.itr != 1:
        raise input_error(where, f"--is_training {args.is_training} --itr {args.itr}", "1 of both; repeats are an axis seed")
    # Values as the parser reads them: two ways to write a number are the same run.
    values = {name: word if name == VARIANT else str(getattr(args, name)) for name, word in values.items()}
    tried = sorted((name, str(getattr(args, name))) for name in (given.keys() | own) & RECORDED)
    digest = hashlib.sha256(json.dumps(tried).encode()).hexdigest()[:8]
    readable = clean_name("_".join(word if name == VARIANT else f"{name}-{word}" for name, word in values.items()))
    name = f"{re.sub(r'_{2,}', '_', readable)[:LONGEST]}_{digest}"
    held = sorted((folder / "cells").glob(f"*_{digest}"))  # the folder stays where the axes were named otherwise
    home = held[0] if held else folder / "cells" / name
    line = [sys.executable, str(PROGRAM), *line, "--checkpoints", str(home), "--resume"]
    return Cell(values, args, name, home, home / run_name(args, 0), line)


def measure(cell: Cell) -> dict[str, Any]:
    """How far a cell is (`state`); of one that is done also the figures of results.csv, machine and data, and figures of
    prediction intervals and of the simple forecasts."""
    metrics, header = read_json(cell.run / "metrics.json"), read_json(cell.run / "checkpoint.json")
    note = read_json(cell.folder / NOTE)
    if not metrics.get("test") or not header:
        return {"state": FAILED if note.get("exit_code") else HALF if cell.run.is_dir() else NEW}
    history, tensors = cell.run / "history.csv", cell.run / "checkpoint.safetensors"
    epochs = pd.read_csv(history) if history.is_file() else pd.DataFrame()
    # Large ones may have been removed.
    trained = sum(map(math.prod, read_header(tensors)[1].values())) if tensors.is_file() else None
    simple, notes = metrics.get("baselines", {}).get("rows", []), metrics.get("control", {})
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
        "intervals": interval_figures(metrics)
        | {f"{name} notes, {on}": notes[name][figure] for name in ("true", "shuffled", "no") if name in notes
           for on, figure in (("all rows", "mse"), ("their rows", "mse_concerned"))},
        "simple": [{"row": r["title"], "mse": r["mse"], "mae": r["mae"], **interval_figures(r)} for r in simple],
    }  # fmt: skip


def interval_figures(found: dict[str, Any]) -> dict[str, float]:
    """The figures of prediction intervals in a metrics.json, or in a row of its simple forecasts, under a table's heads:
    "in 80 %" is the part of the truths inside the 80 % intervals."""
    intervals: dict[str, Any] = found.get("intervals") or {"levels": {}, "wql": None}
    heads = {"in": "coverage", "width": "width"}
    figures = {f"{head} {level} %": held[heads[head]] for level, held in intervals["levels"].items() for head in heads}
    return figures if intervals["wql"] is None else figures | {"WQL": intervals["wql"]}


def last_line(cell: Cell) -> str:
    lines = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "an empty log")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run or a cell holds; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise input_error(path, f"a damaged file ({error})", "what training and testing a run write") from None


def write_note(cell: Cell, **values: object) -> None:
    """Write down what is known of a cell now, beside what was."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.folder / NOTE, read_json(cell.folder / NOTE) | {"command": cell.command} | values)


def nvidia_smi(field: str) -> list[str]:
    """What nvidia-smi says of each graphics card, such as its "name"; nothing where it is missing, or sees no card."""
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")  # the latter is WSL2's
    if program is None:
        return []
    answer = subprocess.run([program, f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def machine() -> str:
    """CPU, cores and torch's version, and the graphics cards where there are some."""
    return ", ".join([processor(), f"{cores()} cores", *nvidia_smi("name"), f"torch {importlib.metadata.version('torch')}"])


def processor() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else []
    return models[0] if models else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
