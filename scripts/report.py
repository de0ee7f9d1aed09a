"""Report of a run: its test error beside what simple forecasts reach on the same windows, best first.

    python scripts/report.py checkpoints/<run name>

The simple forecasts are measured once, with the run's own data and lengths, and kept in its metrics.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
from utils.results.report import report  # noqa: E402

ARGUMENTS = {
    "folder": dict(type=Path, metavar="checkpoints/RUN", help="the run's folder, which run_main.py prints at its end")
}


def main(argv: list[str]) -> int:
    args = script_parser("report.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)
    return exit_code("report.py", lambda: print(report(args.folder)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
