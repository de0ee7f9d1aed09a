"""Report of a run: its test error beside what simple forecasts reach on the same windows, best first.

    python scripts/report.py checkpoints/<run name>

The simple forecasts are measured by the run's test, which keeps them in its metrics.json.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import pandas as pd  # noqa: E402

from data_provider.data_factory import series_from_args  # noqa: E402
from layers.errors import input_error  # noqa: E402
from utils.results.baselines import RIDGE, measured  # noqa: E402
from utils.results.m4 import scores_of, warnings_of  # noqa: E402
from utils.results.m4 import table as table_of_m4  # noqa: E402
from utils.results.metrics import METRICS  # noqa: E402
from utils.saving.files import RECORD  # noqa: E402
from utils.study.cells import interval_figures  # noqa: E402

ALIKE = 0.005  # relative difference of two errors below which neither is called the winner
ARGUMENTS = {
    "folder": dict(type=Path, metavar="checkpoints/RUN", help="the run's folder, which run_main.py prints at its end")
}


def main(argv: list[str]) -> int:
    args = script_parser("report.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)
    return exit_code("report.py", lambda: print(report(args.folder)))


def report(folder: Path) -> str:
    """The table and what it says, as text.

    Raises:
        InputError: the folder lacks a record or test figures, or its data are gone.
    """
    # A test on other data lies in a folder on_<file> in the run's, and has the record of its checkpoint.
    elsewhere = folder.resolve().name.startswith("on_") and not (folder / RECORD).is_file()
    record = _read((folder.resolve().parent if elsewhere else folder) / RECORD, "flags")
    metrics = _read(folder / METRICS, "test")
    if "m4" in metrics:
        return table_of_m4(scores_of(metrics), warnings_of(metrics))
    series = series_from_args(Namespace(**record["flags"] | metrics.get("flags", {})))  # the data that were tested on
    levels = list(metrics.get("intervals", {}).get("levels", {}))
    found = metrics.get("baselines") or measured(series, tuple(map(float, levels)))
    trained_on = metrics.get("trained_on", {})  # named where it is not the data of the test
    title = f"{record['flags'].get('model', 'TimeLLM').replace('TimeLLM', 'Time-LLM')} (this run)"
    test = metrics["test"] | {"title": title, "intervals": metrics.get("intervals")}
    source = f" after training on {trained_on['file']}" if trained_on.get("file") else ""
    lines = [
        "",
        f"Test windows of {series.path.name}{source}, {series.seq_len} rows -> {series.pred_len} rows, standardised scale "
        "(lower is better):",
        "",
        _table([test, *found["rows"]]),
        "",
    ]
    if levels:
        lines += [
            "in 80 %: truths inside the 80 % prediction interval; width: its mean width, standardised; "
            "WQL: weighted quantile loss.",
            "",
        ]
    lines += verdict(test["mse"], found["rows"])
    if record.get("backbone", {}).get("note"):
        lines += ["", f"Language model: {record['backbone']['note']}"]
    if series.synthetic or trained_on.get("synthetic"):
        lines += ["", "*** SYNTHETIC DATA: this series was generated, not measured. ***"]
        lines += ["*** The figures say nothing about real data or about the paper's. ***"]
    return "\n".join(lines)


# A JSON file that has a `part`.
def _read(path: Path, part: str) -> dict[str, Any]:
    expected = "the folder of a run that was trained and tested (run_main.py prints it at its end)"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held | {part: dict(held[part])}
    except FileNotFoundError:
        raise input_error(path.parent, f"no {path.name}", expected) from None
    except (ValueError, TypeError, KeyError) as error:
        raise input_error(path, f"a file without {part!r} ({error!r})", "what training and testing a run write") from None


# A line a forecast, best first: title, errors, and how good its prediction intervals were.
def _table(rows: list[dict]) -> str:
    errors = [{"": row["title"], "MSE": row["mse"], "MAE": row["mae"]} | interval_figures(row) for row in rows]
    frame = pd.DataFrame(errors).set_index("").sort_values("MSE", kind="stable")
    for name in frame:
        form = "{:.1%}" if name.startswith("in ") else "{:.3f}" if name.startswith("width ") else "{:.4f}"
        frame[name] = frame[name].map(form.format, na_action="ignore")
    return frame.to_string(na_rep="-", col_space=9, index_names=False)


def verdict(mse: float, rows: list[dict]) -> list[str]:
    """Plain sentences: which simple forecasts beat the run, and which it beats."""
    lines, beaten = [], False
    for row in sorted(rows, key=lambda row: row["mse"]):
        other, name = row["mse"], row["title"].replace("repeat ", "repeating ", 1)
        if other < mse * (1 - ALIKE):
            beaten = beaten or row["name"] == RIDGE
            cost = f", fitted and tested in {row['seconds']:.0f} s," if row["name"] == RIDGE else ""
            lower = f"its MSE is {100 * (1 - other / mse):.1f} % lower ({other:.4f} against {mse:.4f})"
            lines.append(f"{name[0].upper()}{name[1:]}{cost} beats this run: {lower}.")
        elif other > mse * (1 + ALIKE):
            lower = f"its MSE is {100 * (1 - mse / other):.1f} % lower ({mse:.4f} against {other:.4f})"
            lines.append(f"This run beats {name}: {lower}.")
        else:
            lines.append(f"This run and {name} are level (MSE {mse:.4f} and {other:.4f}).")
    if beaten:
        lines.append("A forecaster that a linear map beats has more training ahead of it, or is not needed here.")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
