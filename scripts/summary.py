"""Summary of all runs in a folder: one table.

    python scripts/summary.py checkpoints/
    python scripts/summary.py checkpoints/ --sort mae --csv runs.csv

A row a run: the flags in which the runs differ, the best epoch with its validation loss, the test
errors, the time of training and the peak memory. What a run lacks (it still trains, or has no
language model) is "-".
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from data_provider.splits import M4  # noqa: E402
from layers.ablation import make_substitute  # noqa: E402
from layers.errors import InputError, input_error  # noqa: E402
from utils.errors import StorageError  # noqa: E402
from utils.flags import FLAGS  # noqa: E402
from utils.results.journal import HISTORY, read_rows, write_rows  # noqa: E402

RECORD, METRICS = "checkpoint.json", "metrics.json"  # what a run leaves in its folder
FIGURES = ("epochs", "best_epoch", "vali", "mse", "mae", "smape", "mase", "owa", "minutes", "memory_gib")
M4_FIGURES = FIGURES[5:8]  # of runs on M4 alone, whose series have no scale in common: an MSE says nothing of them
ABLATION = "llm_ablation"
WIDEST = 28  # characters of a cell in the table; the CSV has them whole


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="summary.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("checkpoints"), help="folder of the runs' folders")
    parser.add_argument("--sort", default="mse", metavar="COLUMN", help="column to sort by (default: mse)")
    parser.add_argument("--reverse", action="store_true", help="largest first")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to this file too")
    args = parser.parse_args(argv)
    try:
        summarise(args.folder, args.sort, args.reverse, args.csv)
    except (InputError, StorageError) as error:
        print(f"summary.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def summarise(folder: Path, sort: str, reverse: bool, csv: Path | None) -> None:
    """Print the table of the runs below `folder`, sorted by a column; write it to `csv` too.

    Raises:
        InputError: no runs there, or no such column.
        StorageError: the CSV cannot be written.
    """
    runs = list(read_runs(folder))
    if not runs:
        got = f"no {RECORD} in any folder there" if folder.is_dir() else "no such folder"
        raise input_error(folder, got, "a folder with the runs' folders")
    figures = [name for name in FIGURES if name not in M4_FIGURES or any(name in run for run in runs)]
    columns = [*differing(runs), *figures, "run"]
    if sort not in columns:
        raise input_error("--sort", repr(sort), f"one of {', '.join(columns)}")
    rows = [{name: None if name in run["silent"] else (run | run["flags"]).get(name) for name in columns} for run in runs]
    rows.sort(key=lambda row: _order(row[sort]), reverse=reverse)
    print(table(columns, rows))
    if csv:
        write_rows(csv, columns, rows)
        print(f"Written: {csv}")


def read_runs(folder: Path) -> Iterator[dict]:
    """What each run's folder below `folder` says: "run", "flags", names of those that are "silent", and the FIGURES that
    are known.

    A test on other data (`on_<file>`) is a run of its own, with the flags of its checkpoint.
    """
    for record in sorted(folder.rglob(RECORD)):
        held = _read(record)
        flags = held.get("flags", {})
        silent = _silent(flags, held.get("backbone"))
        yield _run(folder, record.parent, flags, held.get("epoch")) | {"silent": silent}
        for metrics in sorted(record.parent.glob(f"on_*/{METRICS}")):
            tested = {name: value for name, value in _read(metrics).get("flags", {}).items() if value is not None}
            yield _run(folder, metrics.parent, flags | tested, None) | {"silent": silent}


def _silent(flags: dict, backbone: object) -> set[str]:
    """Names of the flags that say nothing of a run: of one without a language model those about it; of one that is not
    TimeLLM, whose record has no backbone, all of their group; of one that is not on M4 the competition's pattern."""
    without = backbone == {}
    replaced = make_substitute(str(flags.get(ABLATION)), 1, 1) is not None
    llm = {flag.name for flag in FLAGS if flag.group == "language model"}
    itself = {name for name in llm if name.startswith(("llm_", "load_")) and name != ABLATION}
    silent = llm if without else itself if replaced else set()
    return silent if flags.get("data") == M4 else silent | {"seasonal_patterns"}


def _run(root: Path, folder: Path, flags: dict, best_epoch: int | None) -> dict:
    history, metrics = read_rows(folder / HISTORY), _read(folder / METRICS)
    found: dict[str, Any] = {"run": str(folder.relative_to(root)), "flags": flags, "best_epoch": best_epoch}
    errors = M4_FIGURES if "m4" in metrics else ("mse", "mae")
    found |= {name: metrics.get("test", {}).get(name) for name in errors}
    found["memory_gib"] = metrics.get("peak_memory_gib")
    if history:
        finite = [row for row in history if math.isfinite(float(row["vali_loss"]))]  # no other epoch is kept
        best = min(finite, key=lambda row: float(row["vali_loss"]), default=None)
        spent = [float(row[name]) for row in history for name in ("seconds", "evaluation_seconds") if row.get(name)]
        found |= {
            "epochs": len(history),
            "best_epoch": int(best["epoch"]) if best else None,
            "vali": float(best["vali_loss"]) if best else None,
            "minutes": sum(spent) / 60,
            "memory_gib": max(float(row["peak_memory_gib"] or 0) for row in history),
        }
    return found


def _read(path: Path) -> dict:
    """A JSON file; an absent one is empty, and so is a damaged one, with a warning."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError("no JSON object")
        return held
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"summary.py: warning: {path} is damaged ({error})", file=sys.stderr)
        return {}


def differing(runs: list[dict]) -> list[str]:
    """Names of the flags in which the runs differ, of those that say what was tried; a run of which a flag says nothing
    does not count."""
    names = dict.fromkeys(name for run in runs for name in run["flags"])
    left_out = {flag.name for flag in FLAGS if "unlisted" in flag.roles or flag.group == "output"}
    kept = [name for name in names if name not in left_out]
    return [
        name for name in kept if len({json.dumps(run["flags"].get(name)) for run in runs if name not in run["silent"]}) > 1
    ]


def _order(value: object) -> tuple:
    """Numbers by size, then words, then what is missing."""
    if value is None:
        return (2, 0, "")
    if isinstance(value, (int, float)):
        return (0, value, "")
    return (1, 0, str(value))


def table(columns: list[str], rows: list[dict]) -> str:
    """The rows as aligned text; numbers to the right."""
    cells = [[_cell(row[name]) for name in columns[:-1]] + [row["run"]] for row in rows]  # the folder: whole
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(not isinstance(row[name], str) for row in rows) for name in columns]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 9]}…{text[-8:]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
