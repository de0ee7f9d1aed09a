"""Scores of the M4 competition: SMAPE, MASE and OWA by pattern and group, beside Naive2 and the paper's table.

    python scripts/m4_scores.py checkpoints/<run on Weekly> checkpoints/<run on Hourly> ...
    python scripts/m4_scores.py --forecast Naive2.csv --root_path dataset/m4

The first gathers tested runs, one a pattern. The second scores a file of forecasts: a header, then a line a series, its
id and its forecasts; the patterns are those whose files are there and whose series it has.
"""

import argparse
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

import numpy as np  # noqa: E402

from data_provider.m4 import load_m4, read_wide  # noqa: E402
from data_provider.patterns import PATTERNS, find_m4  # noqa: E402
from layers.errors import InputError, input_error  # noqa: E402
from utils.results.m4_scores import (  # noqa: E402
    NAIVE2_TITLE,
    SYNTHETIC,
    Methods,
    errors_of,
    methods_of,
    naive2,
    table,
    warnings_of,
)
from utils.results.report import METRICS  # noqa: E402


def of_runs(folders: list[Path]) -> tuple[Methods, list[str]]:
    """The figures of tested runs together, and what must be said of them.

    Raises:
        InputError: a folder is of no tested run on M4, or two are of one pattern.
    """
    together: Methods = {}
    warnings: list[str] = []
    seen: dict[str, Path] = {}
    for folder in folders:
        try:
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
            pattern, methods, said = metrics["m4"]["pattern"], methods_of(metrics), warnings_of(metrics)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise input_error(folder, f"no {METRICS} of a run on M4", "the folder of a run with --data m4, tested") from None
        if pattern in seen:
            raise input_error(folder, f"a second run on {pattern} beside {seen[pattern]}", "one run a pattern")
        seen[pattern] = folder
        warnings += said
        for title, found in methods.items():
            together.setdefault(title, {}).update(found)
    return together, warnings


def of_forecasts(file: Path, root_path: Path) -> tuple[Methods, list[str]]:
    """The figures of a file of forecasts, and what must be said of them.

    Raises:
        InputError: it cannot be read, lacks some series of a pattern, or has none of the patterns that are there.
    """
    made = read_wide(file)
    methods: Methods = {str(file): {}, NAIVE2_TITLE: {}}
    warnings: list[str] = []
    for name, kind in PATTERNS.items():
        try:
            find_m4(root_path, name)
        except InputError:
            continue
        H, season = kind.horizon, kind.season
        series = load_m4(root_path, name, 2 * H, H, H)
        there = [id for id in series.ids if id in made]
        if not there:
            continue
        wrong = next((id for id in series.ids if len(made.get(id, ())) != H), None)
        if wrong is not None:
            got = f"{len(made[wrong])} forecasts" if wrong in made else "no such series"
            raise input_error(f"{file}: series {wrong!r}", got, f"{H} forecasts of every {name} series")
        warnings += [SYNTHETIC] if series.synthetic else []
        naive = errors_of(np.stack([naive2(v, season, H) for v in series.known]), series.future, series.known, season)
        own = errors_of(np.stack([made[id] for id in series.ids]), series.future, series.known, season)
        methods[str(file)][name], methods[NAIVE2_TITLE][name] = (own, naive), (naive, naive)
    if not methods[NAIVE2_TITLE]:
        raise input_error(file, "no series of a pattern whose files are there", f"those of files in {root_path}")
    return methods, warnings


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="m4_scores.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="the runs' folders, which run_m4.py prints at its end")
    parser.add_argument("--forecast", type=Path, help="score this file of forecasts instead")
    parser.add_argument("--root_path", type=Path, default=REPO / "dataset", help="folder of the organisers' files")
    args = parser.parse_args(argv)
    try:
        if bool(args.folders) == bool(args.forecast):
            raise input_error("folders", "both or neither of folders and --forecast", "either")
        print(table(*(of_forecasts(args.forecast, args.root_path) if args.forecast else of_runs(args.folders))))
    except InputError as error:
        print(f"m4_scores.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
