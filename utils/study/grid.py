"""Grid of a study: a TOML file and the command line, read into cells, each one command line of run_main.py.

Only the standard library is imported here; every cell is parsed before the first one runs.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from data_provider.splits import M4
from layers.errors import input_error
from utils.command_line import parse_flags
from utils.flags import FLAGS, clean_name

VARIANT = "variant"  # the axis whose values are named sets of flags
SEED = "seed"  # the axis over which means are taken
HORIZON = "pred_len"  # the axis that makes a table's columns
DATA = "data"  # this axis and the next one make tables of their own
SHARE = "percent"
PARTS = ("title", "reference", "flags", "grid", VARIANT, "skip")
# What run_main asks for and a study need not say.
USUAL = {"--task_name": "long_term_forecast", "--is_training": "1", "--model_id": "study", "--model_comment": "study"}
# What a study says itself. A repeat is a value of the axis seed here.
OWN = {"--checkpoints": "the folder of the cell", "--checkpoint": "a training in each cell", "--resume": "always on"}
KINDS = {flag.name: flag.kind for flag in FLAGS}
RECORDED = {flag.name for flag in FLAGS if flag.role.recorded}
LONGEST = 120  # characters of a cell's id without its hash


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    values: dict[str, str]  # axis -> value
    given: dict[str, str]  # flag -> value, as words, of all that the study says
    args: argparse.Namespace  # the whole command line, read and completed

    @property
    def hash(self) -> str:
        """Names what was tried: all flags that are given, but for those of output."""
        kept = sorted((name, word) for name, word in self.given.items() if name in RECORDED)
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]

    @property
    def id(self) -> str:
        """Readable, unique and the same in each call."""
        parts = [word if axis == VARIANT else f"{axis}-{word}" for axis, word in self.values.items()]
        name = re.sub(r"_{2,}", "_", clean_name("_".join(parts)))
        return f"{name[:LONGEST]}_{self.hash}"

    def words(self) -> list[str]:
        """The flags as words of a command line, without those of the folder."""
        every = USUAL | {f"--{name}": word for name, word in self.given.items()}
        return [word for pair in every.items() for word in pair]


@dataclass(frozen=True)
class Grid:
    """All cells of a study, in the order in which they run."""

    title: str
    axes: dict[str, list[str]]
    reference: str | None  # the value to which others are compared
    cells: list[Cell]


@dataclass
class _Source:
    """What the file and the command line say, checked value by value."""

    name: str  # for messages
    title: str = ""
    reference: str | None = None
    flags: dict[str, str] = field(default_factory=dict)
    axes: dict[str, list[str]] = field(default_factory=dict)
    variants: dict[str, dict[str, str]] = field(default_factory=dict)
    skips: list[dict[str, str]] = field(default_factory=list)


def read_grid(file: Path | None, axes: Sequence[str], flags: Sequence[str], reference: str | None = None) -> Grid:
    """The grid of a TOML file, of axes `name=value,value`, and of flags for every run, which win over the file's [flags].

    Raises:
        InputError: the first thing that is wrong, with the file, what was found and what was expected.
    """
    source = _read_file(file) if file else _Source("--grid")
    for text in axes:
        name, _, words = text.partition("=")
        values = words.split(",") if words else []
        source.axes[name] = _axis("--grid", name, values)
    own_flags = _read_words(flags)
    source.flags |= own_flags
    source.reference = reference or source.reference
    cells = _cells(source, own_flags)
    axes_now = _all_axes(source)
    known = [value for values in axes_now.values() for value in values]
    if source.reference is not None and source.reference not in known:
        raise input_error(
            f"{source.name}: reference", repr(source.reference), _near(source.reference, known, "a value of an axis")
        )
    return Grid(source.title or (file.stem if file else "study"), axes_now, source.reference, cells)


def _read_file(file: Path) -> _Source:
    try:
        held = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise input_error(file, f"no reading ({error.strerror})", "a grid file") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise input_error(file, f"no TOML ({error})", "a grid file as scripts/studies/example.toml") from None
    for name in held:
        if name not in PARTS:
            raise input_error(f"{file}: {name}", "an unknown part", _near(name, PARTS, f"one of {', '.join(PARTS)}"))
    source = _Source(str(file), _text(file, held, "title") or "", _text(file, held, "reference"))
    source.flags = _flags(f"{file}: [flags]", _table(file, held, "flags"))
    for name, values in _table(file, held, "grid").items():
        source.axes[name] = _axis(f"{file}: [grid]", name, values)
    for number, row in enumerate(_tables(file, held, VARIANT), 1):
        where, name = f"{file}: [[{VARIANT}]] {number}", row.pop("name", None)
        if not isinstance(name, str) or not name.strip():
            raise input_error(f"{where}: name", "nothing" if name is None else repr(name), "some text")
        if name in source.variants:
            raise input_error(f"{where}: name", f"{name!r} again", "a name of its own")
        source.variants[name] = _flags(where, row)
    for number, row in enumerate(_tables(file, held, "skip"), 1):
        where, name = f"{file}: [[skip]] {number}", row.pop(VARIANT, None)
        if name is not None and name not in source.variants:
            raise input_error(
                f"{where}: {VARIANT}", repr(name), _near(str(name), source.variants, f"the name of a {VARIANT}")
            )
        if not row and name is None:
            raise input_error(where, "nothing", "flags whose values are left out together")
        source.skips.append(_flags(where, row) | ({VARIANT: name} if name else {}))
    return source


def _text(file: Path, held: dict, name: str) -> str | None:
    value = held.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise input_error(f"{file}: {name}", repr(value), "some text")
    return value


def _table(file: Path, held: dict, name: str) -> dict[str, Any]:
    value = held.get(name, {})
    if not isinstance(value, dict):
        raise input_error(f"{file}: {name}", repr(value), f"a table [{name}]")
    return value


def _tables(file: Path, held: dict, name: str) -> list[dict[str, Any]]:
    value = held.get(name, [])
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise input_error(f"{file}: {name}", repr(value), f"tables [[{name}]]")
    return [dict(row) for row in value]


def _axis(where: str, name: str, values: object) -> list[str]:
    """The values of an axis, checked by the flag's kind.

    Raises:
        InputError: none, one twice, or one that the flag refuses.
    """
    _known(where, name)
    if not isinstance(values, list) or not values:
        got = "no values" if values == [] else repr(values)
        raise input_error(f"{where} {name}", got, "a list of values, such as [1, 2, 3]")
    words = [_word(where, name, value) for value in values]
    for number, word in enumerate(words):
        if word in words[:number]:
            raise input_error(f"{where} {name}", f"{word!r} twice", "each value once")
    return words


def _flags(where: str, held: dict[str, Any]) -> dict[str, str]:
    for name in held:
        _known(where, name)
    return {name: _word(where, name, value) for name, value in held.items()}


def _known(where: str, name: str) -> None:
    if name not in KINDS:
        raise input_error(f"{where} {name}", "an unknown flag", _near(name, KINDS, "one that run_main.py --help lists"))
    if f"--{name}" in OWN:
        raise input_error(f"{where} {name}", "a flag that the study sets", f"it left out: {OWN[f'--{name}']}")


def _word(where: str, name: str, value: object) -> str:
    """A value as the word of a command line, in the one form that the flag's kind gives it."""
    kind = KINDS[name]
    if not isinstance(value, (str, int, float)):
        raise input_error(f"{where} {name}", repr(value), kind.expected)
    try:
        return str(kind(str(value)))
    except argparse.ArgumentTypeError:
        raise input_error(f"{where} {name}", repr(value), kind.expected, kind.hint(str(value))) from None


def _read_words(words: Sequence[str]) -> dict[str, str]:
    """Flags as they stand on a command line: --name value, --name=value, --switch."""
    found: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            _known("after --:", name)
            found[name], waiting = (value, None) if equals else ("True", name)
        elif waiting is None:
            raise input_error(f"after --: {word!r}", "a value without a flag", "every value right after its flag")
        else:
            found[waiting], waiting = word, None
    return {name: _word("after --:", name, value) for name, value in found.items()}


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"perhaps {near[0]}" if near else otherwise


def _all_axes(source: _Source) -> dict[str, list[str]]:
    return ({VARIANT: list(source.variants)} if source.variants else {}) | source.axes


def _cells(source: _Source, own: dict[str, str]) -> list[Cell]:
    """All combinations but those left out, each read as its run will read it.

    Raises:
        InputError: a flag in two places, a cell that run_main refuses, two that are the same.
    """
    variants = [(f"the {VARIANT} {name!r}", held) for name, held in source.variants.items()]
    for name in source.axes:
        for place, held in (("[flags]", source.flags), *variants):
            if name in held:
                raise input_error(f"{source.name}: {name}", f"an axis, and a flag of {place}", "one of the two")
    for place, held in variants:  # its name would say what the cell is not
        for name in held.keys() & own.keys():
            raise input_error(f"after --: {name}", f"a flag of {place} too", "one of the two")
    axes = _all_axes(source)
    used = [False] * len(source.skips)
    cells: dict[str, Cell] = {}
    for combination in product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        variant = source.variants.get(values.get(VARIANT, ""), {})
        given = source.flags | variant | {axis: word for axis, word in values.items() if axis != VARIANT}
        fits = [(given | values).items() >= skip.items() for skip in source.skips]
        used = [a or b for a, b in zip(used, fits, strict=True)]
        if any(fits):
            continue
        cell = Cell(values, given, _parsed(f"{source.name}: cell {_shown(values)}", given))
        same = json.dumps(vars(cell.args), sort_keys=True)
        if same in cells:
            raise input_error(
                f"{source.name}: cell {_shown(values)}", f"the flags of {_shown(cells[same].values)}", "others"
            )
        cells[same] = cell
    for skip, fitted in zip(source.skips, used, strict=True):
        if not fitted:
            raise input_error(f"{source.name}: [[skip]] {_shown(skip)}", "a combination that no cell has", "one of the grid")
    if not cells:
        raise input_error(source.name, "no cells", "an axis, and not all of it left out")
    return list(cells.values())


def _shown(values: dict[str, str]) -> str:
    return ", ".join(f"{name} = {word}" for name, word in values.items()) or "without axes"


def _parsed(where: str, given: dict[str, str]) -> argparse.Namespace:
    """A cell's command line as run_main reads it.

    Raises:
        InputError: run_main would refuse it; its own line is in it.
    """
    if given.get(DATA) == M4:
        expected, hint = "data whose errors are standardised", "run_m4.py trains, scripts/m4_scores.py makes the table"
        raise input_error("--data", f"{M4} in {where}", expected, hint)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_flags(Cell({}, given, argparse.Namespace()).words())
    except SystemExit:
        reason = said.getvalue().strip().removeprefix("run_main.py: error: ")
        raise input_error(where, f"a refusal of run_main.py ({reason})", "flags that fit together") from None
    if args.is_training != 1 or args.itr != 1:
        raise input_error(where, f"--is_training {args.is_training} --itr {args.itr}", "1 of both; repeats are an axis seed")
    return args
