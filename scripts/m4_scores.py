"""Scores of the M4 competition: SMAPE, MASE and OWA by pattern and group, beside Naive2 and the paper's table.

    python scripts/m4_scores.py checkpoints/<run on Weekly> checkpoints/<run on Hourly> ...
    python scripts/m4_scores.py --forecast Naive2.csv --root_path dataset/m4

The first gathers tested runs, one a pattern. The second scores a file of forecasts: a header, then a line a series, its
id and its forecasts; the patterns are those whose files are there and whose series it has.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(REPO := Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from data_provider.m4 import load_m4, read_wide  # noqa: E402
from data_provider.splits import PATTERNS, find_m4  # noqa: E402
from layers.errors import InputError, input_error  # noqa: E402
from utils.results.m4 import NAIVE2, SYNTHETIC, TITLES, errors_of, naive2, scores_of, table, warnings_of  # noqa: E402
from utils.results.metrics import METRICS  # noqa: E402

ARGUMENTS = {
    "folders": dict(type=Path, nargs="*", help="the runs' folders, which run_m4.py prints at its end"),
    "--forecast": dict(type=Path, help="score this file of forecasts instead"),
    "--root_path": dict(type=Path, default=REPO / "dataset", help="folder of the organisers' files"),
}


def of_runs(folders: list[Path]) -> tuple[pd.DataFrame, list[str]]:
    """The scores of tested runs together, and what must be said of them.

    Raises:
        InputError: a folder is of no tested run on M4, or two are of one pattern.
    """
    scores: dict[str, pd.DataFrame] = {}
    warnings: list[str] = []
    for folder in folders:
        try:
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
            pattern, found = metrics["m4"]["pattern"], scores_of(metrics)
        except (OSError, ValueError, KeyError, TypeError):
            raise input_error(folder, f"no {METRICS} of a run on M4", "the folder of a run with --data m4, tested") from None
        if pattern in scores:
            raise input_error(folder, f"a second run on {pattern}", "one run a pattern")
        scores[pattern] = found
        warnings += warnings_of(metrics)
    return pd.concat(scores.values()), warnings


def of_forecasts(file: Path, root_path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The scores of a file of forecasts, and what must be said of them.

    Raises:
        InputError: it cannot be read, lacks some series of a pattern, or has none of the patterns that are there.
    """
    made, scores, warnings = read_wide(file), {}, []
    for name, kind in PATTERNS.items():
        try:
            find_m4(root_path, name)
        except InputError:
            continue
        series = load_m4(root_path, name, 2 * kind.horizon, kind.horizon, kind.horizon)
        if made.keys().isdisjoint(series.ids):
            continue
        for id in series.ids:
            if len(made.get(id, ())) != kind.horizon:
                raise input_error(
                    f"{file}: series {id!r}",
                    f"{len(made[id])} forecasts" if id in made else "no such series",
                    f"{kind.horizon} forecasts of every {name} series",
                )
        naive = [naive2(values, kind.season, kind.horizon) for values in series.known]
        for title, forecasts in {str(file): [made[id] for id in series.ids], TITLES[NAIVE2]: naive}.items():
            scores[title, name] = errors_of(np.stack(forecasts), series.future, series.known, kind.season)
        warnings += [SYNTHETIC] if series.synthetic else []
    if not scores:
        raise input_error(file, "no series of a pattern whose files are there", f"those of files in {root_path}")
    return pd.DataFrame(scores).T, warnings


def main(argv: list[str]) -> int:
    args = script_parser("m4_scores.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)

    def scores() -> None:
        if bool(args.folders) == bool(args.forecast):
            raise input_error("folders", "both or neither of folders and --forecast", "either")
        print(table(*(of_forecasts(args.forecast, args.root_path) if args.forecast else of_runs(args.folders))))

    return exit_code("m4_scores.py", scores)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
