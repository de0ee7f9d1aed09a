"""Entry of the program: read the command line, check it, hand over.

``python run_main.py --help`` lists the flags; README.md shows whole commands.
"""

import sys
from collections.abc import Sequence

from layers.errors import InputError
from utils.flags import parse_flags


def main(argv: Sequence[str]) -> int:
    """Run the command line ``argv``; return the exit code (2: one line has said what to mend)."""
    args = parse_flags(argv)
    # Only now, so that --help and a wrong flag answer without waiting for torch.
    from utils.run import main as run

    try:
        return run(args)
    except InputError as error:
        print(f"run_main.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
