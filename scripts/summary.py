"""Summary of all runs in a folder: one table.

    python scripts/summary.py checkpoints/
    python scripts/summary.py checkpoints/ --sort mae --csv runs.csv
    python scripts/summary.py checkpoints/ --columns seed vali minutes

A row a run: the flags in which the runs differ, the best epoch with its validation loss, the test errors, that of the ridge
regression beside it, the share of the truths in the 80 % band, the time of training and the peak memory. Printed are the
flags, a few of the figures and the run, or --columns; the CSV has all. What a run lacks (it still trains, or has no language
model) is "-".
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from data_provider.splits import M4  # noqa: E402
from layers.ablation import SUBSTITUTES  # noqa: E402
from layers.errors import InputError, input_error  # noqa: E402
from utils.flags import FLAGS  # noqa: E402
from utils.results.log import HISTORY, read_rows  # noqa: E402
from utils.saving.files import RECORD, write_text  # noqa: E402
from utils.study.cells import read_json  # noqa: E402

METRICS = "metrics.json"
# Of runs on M4 alone, whose series have no scale in common: an MSE says nothing of them.
M4_ERRORS = ["smape", "mase", "owa"]
FIGURES = ["epochs", "best_epoch", "vali", "mse", "mae", *M4_ERRORS, "ridge", "in_80", "minutes", "memory_gib"]
WIDE = {"epochs", "best_epoch", "vali", "memory_gib"}  # printed with --columns alone
WIDEST = 28  # characters of a cell in the table; the CSV has them whole
ARGUMENTS = {
    "folder": dict(type=Path, nargs="?", default=Path("checkpoints"), help="folder of the runs' folders"),
    "--sort": dict(default="mse", metavar="COLUMN", help="column to sort by (default: mse)"),
    "--reverse": dict(action="store_true", help="largest first"),
    "--columns": dict(nargs="+", metavar="COLUMN", help="those that are printed (default: a few)"),
    "--csv": dict(type=Path, metavar="FILE", help="write the table to this file too"),
}


def main(argv: list[str]) -> int:
    args = script_parser("summary.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)
    return exit_code("summary.py", lambda: show(summary(args.folder), args.sort, args.reverse, args.csv, args.columns))


def show(table: pd.DataFrame, column: str, descending: bool, file: Path | None, columns: list[str] | None = None) -> None:
    # Print the table of runs in the order of a column; write it, too, where a file is named.
    for flag, name in [("--sort", column), *(("--columns", name) for name in columns or ())]:
        if name not in table:
            raise input_error(flag, repr(name), f"one of {', '.join(table)}")
    numbers = pd.to_numeric(table[column], errors="coerce")
    order = table[column].astype(str) if numbers.isna().all() else numbers
    table = table.loc[order.sort_values(ascending=not descending, kind="stable").index]

    def cell(value: object) -> str:
        text = "-" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)
        return text if len(text) <= WIDEST or "/" in text else f"{text[: WIDEST - 9]}…{text[-8:]}"

    print(table[columns or [name for name in table if name not in WIDE]].map(cell).to_string(index=False))
    if file:
        write_text(file, table.to_csv(index=False, lineterminator="\n"))
        print(f"Written: {file}")


def summary(folder: Path) -> pd.DataFrame:
    """A row a run below `folder`: the flags in which the runs differ, the FIGURES that are known, and the run's folder.

    Raises:
        InputError: no runs there.
    """
    runs = list(read_runs(folder))
    if not runs:
        raise input_error(
            folder,
            f"no {RECORD} in any folder there" if folder.is_dir() else "no such folder",
            "a folder with the runs' folders",
        )
    untried = {flag.name for flag in FLAGS if "unlisted" in flag.roles}
    flags = dict.fromkeys(name for run in runs for name in run if name not in {*untried, *FIGURES, "run"})
    differing = [name for name in flags if len({json.dumps(run[name]) for run in runs if name in run}) > 1]
    known = [name for name in FIGURES if name not in M4_ERRORS or any(name in run for run in runs)]
    return pd.DataFrame(runs, columns=[*differing, *known, "run"], dtype=object)


def read_runs(folder: Path) -> Iterator[dict]:
    """Of each run below `folder`: "run", the flags that say something of it, and the FIGURES that are known.

    A test on other data (`on_<file>`) is a run of its own, with the flags of its checkpoint.
    """
    for record in sorted(path for path in folder.rglob(RECORD) if path.parent.name != "refit"):
        held = _read(record)
        for metrics in [record.parent / METRICS, *sorted(record.parent.glob(f"on_*/{METRICS}"))]:
            found, own = _read(metrics), metrics.parent == record.parent
            tested = {} if own else {name: value for name, value in found.get("flags", {}).items() if value is not None}
            flags = held.get("flags", {}) | tested
            # Flags about the language model say nothing of a run without one, some of them nothing of one with a substitute.
            without, replaced = held.get("backbone") == {}, flags.get("llm_ablation") in SUBSTITUTES
            silent = {
                flag.name
                for flag in FLAGS
                if flag.group == "language model"
                and flag.name != "llm_ablation"
                and (without or (replaced and flag.name.startswith(("llm_", "load_"))))
            }
            silent |= set() if flags.get("data") == M4 else {"seasonal_patterns"}
            ridge = [row for row in found.get("baselines", {}).get("rows", ()) if row["name"] == "ridge"]
            run = {name: value for name, value in flags.items() if name not in silent} | {
                "ridge": ridge[0].get("mse", ridge[0].get("owa")) if ridge else None,
                "in_80": found.get("intervals", {}).get("levels", {}).get("80", {}).get("coverage"),
                "memory_gib": found.get("peak_memory_gib"),
                "run": str(metrics.parent.relative_to(folder)),
            }
            run |= {name: found.get("test", {}).get(name) for name in (M4_ERRORS if "m4" in found else ["mse", "mae"])}
            history = pd.DataFrame(read_rows(metrics.parent / HISTORY)).apply(pd.to_numeric, errors="coerce")
            if own and "vali_loss" in history:
                best = history[np.isfinite(history["vali_loss"])].nsmallest(1, "vali_loss")  # empty: no finite loss
                run |= {
                    "epochs": len(history),
                    "best_epoch": best["epoch"].max(),
                    "vali": best["vali_loss"].max(),
                    "minutes": history.filter(["seconds", "evaluation_seconds"]).sum().sum() / 60,
                    "memory_gib": history["peak_memory_gib"].max(),
                }
            yield run


def _read(path: Path) -> dict:
    # A damaged file is as good as none: the other runs still have their rows.
    try:
        return read_json(path)
    except InputError as error:
        print(f"summary.py: warning: {error}", file=sys.stderr)
        return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
