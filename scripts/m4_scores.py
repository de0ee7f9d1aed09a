"""Scores of the M4 competition: SMAPE, MASE and OWA by pattern and group, beside Naive2 and the paper's table.

    python scripts/m4_scores.py checkpoints/<run on Weekly> checkpoints/<run on Hourly> ...

It gathers tested runs, one a pattern.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import pandas as pd  # noqa: E402

from layers.errors import input_error  # noqa: E402
from utils.results.m4 import scores_of, table, warnings_of  # noqa: E402
from utils.results.metrics import METRICS  # noqa: E402

ARGUMENTS = {
    "folders": dict(type=Path, nargs="+", help="the runs' folders, which run_m4.py prints at its end"),
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


def main(argv: list[str]) -> int:
    args = script_parser("m4_scores.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)
    return exit_code("m4_scores.py", lambda: print(table(*of_runs(args.folders))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
