"""Summary of all runs in a folder: one table.

    python scripts/summary.py checkpoints/
    python scripts/summary.py checkpoints/ --sort mae --csv runs.csv

A row a run: the flags in which the runs differ, the best epoch with its validation loss, the test
errors, the time of training and the peak memory. What a run lacks (it still trains, or has no
language model) is "-".
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from data_provider.splits import M4  # noqa: E402
from layers.ablation import make_substitute  # noqa: E402
from layers.errors import (  # noqa: E402
    InputError,
    StorageError,  # noqa: E402
    input_error,
)
from utils.flags import FLAGS  # noqa: E402
from utils.results.log import HISTORY, read_rows  # noqa: E402
from utils.saving.files import write_text  # noqa: E402

RECORD, METRICS = "checkpoint.json", "metrics.json"  # what a run leaves in its folder
M4_ERRORS = [
    "smape",
    "mase",
    "owa",
]  # of runs on M4 alone, whose series have no scale in common: an MSE says nothing of them
FIGURES = ["epochs", "best_epoch", "vali", "mse", "mae", *M4_ERRORS, "minutes", "memory_gib"]
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
        table = summary(args.folder)
        if args.sort not in table:
            raise input_error("--sort", repr(args.sort), f"one of {', '.join(table)}")
        numbers = pd.to_numeric(table[args.sort], errors="coerce")
        order = table[args.sort].astype(str) if numbers.isna().all() else numbers
        table = table.loc[order.sort_values(ascending=not args.reverse, kind="stable").index]
        print(table.map(_cell).to_string(index=False))
        if args.csv:
            write_text(args.csv, table.to_csv(index=False, lineterminator="\n"))
            print(f"Written: {args.csv}")
    except (InputError, StorageError) as error:
        print(f"summary.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _cell(value: object) -> str:
    text = "-" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDEST or "/" in text else f"{text[: WIDEST - 9]}…{text[-8:]}"


def summary(folder: Path) -> pd.DataFrame:
    """A row a run below `folder`: the flags in which the runs differ, the FIGURES that are known, and the run's folder.

    Raises:
        InputError: no runs there.
    """
    runs = list(read_runs(folder))
    if not runs:
        got = f"no {RECORD} in any folder there" if folder.is_dir() else "no such folder"
        raise input_error(folder, got, "a folder with the runs' folders")
    untried = {flag.name for flag in FLAGS if "unlisted" in flag.roles}
    flags = dict.fromkeys(name for run in runs for name in run if name not in {*untried, *FIGURES, "run"})
    differing = [name for name in flags if len({json.dumps(run[name]) for run in runs if name in run}) > 1]
    known = [name for name in FIGURES if name not in M4_ERRORS or any(name in run for run in runs)]
    return pd.DataFrame(runs, columns=[*differing, *known, "run"], dtype=object)


def read_runs(folder: Path) -> Iterator[dict]:
    """Of each run below `folder`: "run", the flags that say something of it, and the FIGURES that are known.

    A test on other data (`on_<file>`) is a run of its own, with the flags of its checkpoint.
    """
    for record in sorted(folder.rglob(RECORD)):
        held = _read(record)
        for metrics in [record.parent / METRICS, *sorted(record.parent.glob(f"on_*/{METRICS}"))]:
            found, own = _read(metrics), metrics.parent == record.parent
            tested = {} if own else {name: value for name, value in found.get("flags", {}).items() if value is not None}
            flags = held.get("flags", {}) | tested
            # Flags about the language model say nothing of a run without one, some of them nothing of one with a substitute.
            without, replaced = held.get("backbone") == {}, make_substitute(str(flags.get("llm_ablation")), 1, 1)
            silent = {
                flag.name
                for flag in FLAGS
                if flag.group == "language model"
                and flag.name != "llm_ablation"
                and (without or (replaced and flag.name.startswith(("llm_", "load_"))))
            }
            silent |= set() if flags.get("data") == M4 else {"seasonal_patterns"}
            run = {name: value for name, value in flags.items() if name not in silent}
            run |= {name: found.get("test", {}).get(name) for name in (M4_ERRORS if "m4" in found else ["mse", "mae"])}
            run |= {"memory_gib": found.get("peak_memory_gib"), "run": str(metrics.parent.relative_to(folder))}
            history = pd.DataFrame(read_rows(metrics.parent / HISTORY)).apply(pd.to_numeric, errors="coerce")
            if own and "vali_loss" in history:
                best = history[np.isfinite(history["vali_loss"])].nsmallest(
                    1, "vali_loss"
                )  # none: no epoch has a finite loss
                run |= {"epochs": len(history), "best_epoch": best["epoch"].max(), "vali": best["vali_loss"].max()}
                run["minutes"] = history.filter(["seconds", "evaluation_seconds"]).sum().sum() / 60
                run["memory_gib"] = history["peak_memory_gib"].max()
            yield run


def _read(path: Path) -> dict:
    """A JSON file; an absent one is empty, and so is a damaged one, with a warning."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        print(f"summary.py: warning: {path} is damaged ({error})", file=sys.stderr)
        return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
