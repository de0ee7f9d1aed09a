"""Past forecasts of a run, scored against what has come true since, beside the last value that was known.

    python scripts/past_forecasts.py checkpoints/<run name> [--data FILE]

They are those of forecasts.csv, which `run_main.py --do_predict --append` keeps.
"""

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.results.past import report  # noqa: E402


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="past_forecasts.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="the run's folder, which has a forecasts.csv")
    parser.add_argument("--data", type=Path, help="the CSV as it is now (default: the file of the training)")
    args = parser.parse_args(argv)
    try:
        if args.folder is None:
            raise input_error("folder", "none", "that of a run whose forecasts were kept with --append")
        print(report(args.folder, args.data))
    except InputError as error:
        print(f"past_forecasts.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
