"""Grid of a study: a TOML file and the command line, read into cells, each one command line of run_main.py."""

import argparse
import contextlib
import hashlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from data_provider.patterns import M4
from layers.errors import InputError, input_error
from utils.command_line import parse_flags
from utils.flags import FLAGS, clean_name, run_name

PROGRAM = Path(__file__).resolve().parents[2] / "run_main.py"
VARIANT = "variant"  # the axis whose values are named sets of flags
PARTS = {"title": str, "reference": str, "flags": dict, "grid": dict, VARIANT: list, "skip": list}  # of a grid file
# What run_main asks for and a study need not say.
USUAL = {"task_name": "long_term_forecast", "is_training": 1, "model_id": "study", "model_comment": "study"}
OWN = {"checkpoints", "checkpoint", "resume"}  # the study sets them
RECORDED = {flag.name for flag in FLAGS if flag.role.recorded}  # the others are of output and change no result
LONGEST = 120  # characters of a cell's name without its hash


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    values: dict[str, str]  # axis -> value
    words: list[str]  # its flags, but for those of its folder
    args: argparse.Namespace  # the same, read and completed
    name: str  # readable, unique and the same in each call; its end says what was tried
    folder: Path

    @property
    def run(self) -> Path:
        """The folder in which run_main.py leaves its files."""
        return self.folder / run_name(self.args, 0)

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, str(PROGRAM), *self.words, "--checkpoints", str(self.folder), "--resume"]


@dataclass(frozen=True)
class Study:
    """All cells of a grid, in the order in which they run."""

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
    where, held = str(file or "--grid"), _read_file(file) if file else {}
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
            got = f"a flag of {place!r}, and an axis or a flag after --"
            raise input_error(f"{where}: {min(twice)}", got, "it in one place")
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
    if not cells or not grid:
        raise input_error(where, "no cells", "an axis, and not all of it left out")
    read = {name: list(dict.fromkeys(cell.values[name] for cell in cells)) for name in grid}
    reference = reference or held.get("reference")
    if reference is not None and not any(reference in values for values in read.values()):
        raise input_error(f"{where}: reference", repr(reference), f"a value of an axis: {read}")
    return Study(folder, held.get("title") or (file.stem if file else "study"), read, reference, cells)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        held = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise input_error(file, f"no TOML ({error})", "a grid file such as scripts/studies/example.toml") from None
    for name, value in held.items():
        rows = value if isinstance(value, list) else []
        if not isinstance(value, PARTS.get(name, ())) or not all(isinstance(row, dict) for row in rows):
            expected = f"one of the parts {', '.join(PARTS)} as in scripts/studies/example.toml"
            raise input_error(f"{file}: {name}", repr(value), expected)
    return held


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
    where = f"{where}: cell {', '.join(f'{name} = {word}' for name, word in values.items())}"
    if M4 in (given.get("data"), *words):
        expected, hint = "data whose errors are standardised", "run_m4.py trains, scripts/m4_scores.py makes the table"
        raise input_error("--data", f"{M4} in {where}", expected, hint)
    if OWN & (given.keys() | own):
        raise input_error(where, f"--{min(OWN & (given.keys() | own))}", "it left out: the study sets it")
    every = {name: value for name, value in (USUAL | given).items() if name not in own}
    line = [word for name, value in every.items() for word in (f"--{name}", str(value))] + list(words)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_flags(line)
    except SystemExit:
        raise InputError(f"{where}: {said.getvalue().strip().removeprefix('run_main.py: error: ')}") from None
    if args.is_training != 1 or args.itr != 1:
        raise input_error(where, f"--is_training {args.is_training} --itr {args.itr}", "1 of both; repeats are an axis seed")
    # Values as the parser reads them: two ways to write a number are the same run.
    values = {name: word if name == VARIANT else str(getattr(args, name)) for name, word in values.items()}
    tried = sorted((name, str(getattr(args, name))) for name in (given.keys() | own) & RECORDED)
    digest = hashlib.sha256(json.dumps(tried).encode()).hexdigest()[:8]
    readable = clean_name("_".join(word if name == VARIANT else f"{name}-{word}" for name, word in values.items()))
    name = f"{re.sub(r'_{2,}', '_', readable)[:LONGEST]}_{digest}"
    held = sorted((folder / "cells").glob(f"*_{digest}"))  # the folder stays where the axes were named otherwise
    return Cell(values, line, args, name, held[0] if held else folder / "cells" / name)
