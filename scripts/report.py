"""Report of a run: its test error beside what simple forecasts reach on the same windows, best first.

    python scripts/report.py checkpoints/<run name>

The simple forecasts are measured once, with the run's own data and lengths, and kept in its metrics.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from layers.errors import (
    InputError,  # noqa: E402
    StorageError,  # noqa: E402
)
from utils.results.report import report  # noqa: E402


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(), help="the run's folder, which run_main.py prints at its end"
    )
    try:
        print(report(parser.parse_args(argv).folder))
    except (InputError, StorageError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
