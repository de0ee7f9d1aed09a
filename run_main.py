"""Entry of the program: read the command line, check it, hand over.

``python run_main.py --help`` lists the flags; README.md shows whole commands.
"""

import sys
from collections.abc import Sequence

from layers.errors import InputError
from utils.command_line import parse_flags
from utils.errors import RunError
from utils.saving.interrupt import Interrupted, Interrupts
from utils.threads import spin_briefly


def main(argv: Sequence[str]) -> int:
    """Run the command line ``argv``; return the exit code.

    2: one line has said what to mend; 1: the run had to end, and one line has said why; 130 and 143:
    a signal has ended it.
    """
    args = parse_flags(argv)
    spin_briefly()
    with Interrupts() as interrupts:
        # Only now, so that --help and a wrong flag answer without waiting for torch.
        from utils.run import main as run

        try:
            return run(args, interrupts)
        except (InputError, RunError) as error:
            print(f"run_main.py: error: {error}", file=sys.stderr)
            return 2 if isinstance(error, InputError) else 1
        except Interrupted as signal:
            return signal.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
