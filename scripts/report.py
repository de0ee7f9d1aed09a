"""Report of a run: its test error beside what simple forecasts reach on the same windows, best first.

    python scripts/report.py checkpoints/<run name>

The simple forecasts are measured once, with the run's own data and lengths, and kept in its metrics.json.
"""

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.errors import StorageError  # noqa: E402
from utils.results.comparison import report  # noqa: E402


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="the run's folder, which run_main.py prints at its end")
    args = parser.parse_args(argv)
    try:
        if args.folder is None:
            raise input_error("folder", "none", "that of a run, which run_main.py prints at its end")
        print(report(args.folder))
    except (InputError, StorageError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
