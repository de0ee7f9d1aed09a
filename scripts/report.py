"""Print a run's test error beside what simple forecasts reach on the same windows, best first.

    python scripts/report.py checkpoints/<run name>

The simple forecasts are measured once, with the run's own data and lengths, and kept in its metrics.json.
"""

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.results.comparison import report  # noqa: E402


def main(argv: list[str]) -> int:
    """Print the table of the run folder `argv[0]`; return the exit code."""
    try:
        if len(argv) != 1:
            raise input_error("usage", f"{len(argv)} arguments", "python scripts/report.py <run folder>")
        print(report(Path(argv[0])))
    except InputError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
