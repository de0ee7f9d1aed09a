"""Report of a run: its test error beside what simple forecasts reach on the same windows, best first.

    python scripts/report.py checkpoints/<run name>
    python scripts/report.py checkpoints/<run name> --html report.html    # one file with the pictures in it

The simple forecasts are measured by the run's test, which keeps them in its metrics.json.
"""

import base64
import html
import shlex
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
from utils.flags import DEFAULTS  # noqa: E402
from utils.results.baselines import RIDGE  # noqa: E402
from utils.results.m4 import scores_of, warnings_of  # noqa: E402
from utils.results.m4 import table as table_of_m4  # noqa: E402
from utils.results.metrics import METRICS, missed  # noqa: E402
from utils.results.notes import verdict as control_line  # noqa: E402
from utils.saving.files import RECORD, write_text  # noqa: E402
from utils.study.cells import interval_figures, read_json  # noqa: E402

ARGUMENTS: dict[str, dict] = {
    "folder": dict(type=Path, metavar="checkpoints/RUN", help="the run's folder, which run_main.py prints at its end"),
    "--html": dict(type=Path, metavar="FILE", help="write the report with its pictures to this file, too"),
}
# Light and dark, on a phone and on a wide screen; nothing is loaded from elsewhere.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 0 1rem }}
pre, .wide {{ overflow-x: auto }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left; white-space: normal }}
img {{ max-width: 100%; background: #fff; border-radius: 4px }}
</style></head><body><h1>{title}</h1>
{parts}
</body></html>
"""


SAID = {  # whether the run is better in one of the figures, and worse in one
    (False, False): "this run and {} are level",
    (True, False): "this run beats {}",
    (False, True): "{} beats this run",
    (True, True): "neither this run nor {} is better in all",
}


def main(argv: list[str]) -> int:
    args = script_parser("report.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)
    return exit_code("report.py", lambda: print(report(args.folder, args.html)))


def report(folder: Path, page: Path | None = None) -> str:
    """The table and what it says, as text; with `page`, written to that file as HTML, too.

    Raises:
        InputError: the folder lacks a record or test figures, or its data are gone.
        StorageError: the file system refused.
    """
    # A test on other data lies in a folder on_<file> in the run's, and has the record of its checkpoint.
    elsewhere = folder.resolve().name.startswith("on_") and not (folder / RECORD).is_file()
    record = _read((folder.resolve().parent if elsewhere else folder) / RECORD, "flags")
    metrics = _read(folder / METRICS, "test")
    if "m4" in metrics:
        return table_of_m4(scores_of(metrics), warnings_of(metrics))
    flags = record["flags"] | metrics.get("flags", {})
    series = series_from_args(Namespace(**flags))  # the data that were tested on
    trained_on = metrics.get("trained_on", {})  # named where it is not the data of the test
    skip = {"none": "", "stack": " on a linear stack"}.get(flags.get("skip", "none"), " on a ridge map")
    title = f"{flags.get('model', 'TimeLLM').replace('TimeLLM', 'Time-LLM')}{skip} (this run)"
    test = metrics["test"] | {"title": title, "intervals": metrics.get("intervals")}
    rows = _read(folder / METRICS, "baselines")["baselines"]["rows"]
    source = f" after training on {trained_on['file']}" if trained_on.get("file") else ""
    windows = f"{series.seq_len} rows -> {series.pred_len} rows, standardised scale (lower is better)"
    head, table = f"Test windows of {series.path.name}{source}, {windows}:", _table([test, *rows])
    keys = (
        "in N %: truths inside that prediction interval; width: its mean width, standardised; WQL: weighted quantile loss."
    )
    said = [*verdict(test, rows), *(missed(metrics["intervals"]) if "intervals" in metrics else ())]
    if "no season" in metrics["baselines"]:
        said.append(f"No last season among them: {metrics['baselines']['no season']}.")
    said += metrics.get("remarks", [])
    if "control" in metrics:
        said.append(control_line(metrics["control"]))
    note, drawn = record.get("backbone", {}).get("note", ""), record.get("backbone", {}).get("random_seed") is not None
    if drawn or "random weights" in note:
        said.append("The language model has read nothing, for its weights are random: what it adds, any network may.")
    if note:
        said.append(f"Language model: {note}")
    if series.synthetic or trained_on.get("synthetic"):
        said += ["", "*** SYNTHETIC DATA: this series was generated, not measured. ***"]
        said += ["*** The figures say nothing about real data or about the paper's. ***"]
    if page is not None:
        there = {"is_training": 0, "checkpoint": str(folder.resolve().parent)} | metrics.get("flags", {})
        repeated = there if elsewhere else flags | record.get("output", {})
        write_text(page, _page(folder, f"{title}: {series.path.name}", head, table, said, metrics, repeated))
    return "\n".join(["", head, "", table.to_string(na_rep="-", col_space=9, index_names=False), "",
                      *([keys, ""] if "intervals" in metrics else []), *said])  # fmt: skip


# A JSON file that has a `part`.
def _read(path: Path, part: str) -> dict[str, Any]:
    held = read_json(path)
    if part not in held:
        expected = "the folder of a run that was trained and tested (run_main.py prints it at its end)"
        raise input_error(path.parent, f"no {path.name} with {part!r}", expected)
    return held


# A line a forecast, best first: title, errors, and how good its prediction intervals were.
def _table(rows: list[dict]) -> pd.DataFrame:
    errors = [{"": row["title"], "MSE": row["mse"], "MAE": row["mae"]} | interval_figures(row) for row in rows]
    frame = pd.DataFrame(errors).set_index("").sort_values("MSE", kind="stable")
    for name in frame:
        form = "{:.1%}" if name.startswith("in ") else "{:.3f}" if name.startswith("width ") else "{:.4f}"
        frame[name] = frame[name].map(form.format, na_action="ignore")
    return frame


def verdict(ours: dict, rows: list[dict]) -> list[str]:
    """Plain sentences: which simple forecasts beat the run, and which it beats, in MSE, MAE and weighted quantile loss.

    A difference whose 95 % interval, from one window of the test to another, has 0 in it is none.
    """
    lines = ["How far this run's errors lie from the others', with 95 % intervals; where 0 is in one, they are level:"]
    beaten = False
    for row in sorted(rows, key=lambda row: row["mse"]):
        better, worse, parts = 0, 0, []
        for figure, held in (("mse", row), ("mae", row), ("wql", row.get("intervals") or {})):
            found = row.get("difference", {}).get(figure)
            if found is not None and held[figure]:
                part, low, high = (100 * value / held[figure] for value in found)
                parts.append(f"{figure.upper()} {part:+.1f} % ({low:+.1f} to {high:+.1f})")
                better, worse = better + (high < 0), worse + (low > 0)
        name = row["title"].replace("repeat ", "repeating ", 1)
        beaten = beaten or (row["name"] == RIDGE and worse > 0 == better)
        said = (
            SAID[better > 0, worse > 0]
            if parts
            else "no interval of the difference from {} (too few windows, or an older test)"
        ).format(name)
        parts = parts or [f"MSE {ours['mse']:.4f} and {row['mse']:.4f}"]
        lines.append(f"- {said[0].upper()}{said[1:]}: {', '.join(parts)}.")
    if beaten:
        lines.append("A forecaster that a linear map beats has more training ahead of it, or is not needed here.")
    return lines


# The report as one HTML file: what the text has, the pictures, the columns, and the command to repeat the run.
def _page(
    folder: Path, title: str, head: str, table: pd.DataFrame, said: list[str], metrics: dict[str, Any], flags: dict[str, Any]
) -> str:
    parts = [f"<p>{html.escape(head)}</p><div class=wide>{table.to_html(na_rep='-', border=0, index_names=False)}</div>"]
    parts.append(f"<pre>{html.escape(chr(10).join(said))}</pre>")
    pictures = [*(folder / "plots").glob("*.png"), *(folder / "refit/plots").glob("forecast.png")]
    for picture in sorted(pictures, key=lambda path: (path.stem[:4] not in ("fore", "test"), path)):
        name = picture.stem.replace("_", " ").capitalize()
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    columns = pd.DataFrame(metrics["standardised"]["channels"]).T[["mse", "mae"]]
    for level, held in metrics.get("intervals", {"levels": {}})["levels"].items():
        columns[f"in {level} %"] = pd.Series({name: figures["coverage"] for name, figures in held["channels"].items()})
    words = {name: value or ["none"] if isinstance(value, list) else [value] for name, value in flags.items()}
    given = [
        f"--{name} {shlex.join(map(str, words[name]))}" for name in DEFAULTS if flags.get(name) not in (None, DEFAULTS[name])
    ]
    command = html.escape("python run_main.py " + " ".join(given))
    parts += [
        f"<h2>By column, standardised</h2><div class=wide>{columns.to_html(border=0, float_format='{:.4f}'.format)}</div>",
        f"<h2>To repeat it</h2><pre>{command}</pre>",
    ]
    return PAGE.format(title=html.escape(title), parts="\n".join(parts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
