"""Entry of the program: read the command line, check it, hand over.

``python run_main.py --help`` lists the flags; README.md shows whole commands.
"""

import os
import sys
import time
from collections.abc import Sequence

from layers.errors import InputError
from utils.command_line import parse_flags
from utils.errors import RunError
from utils.inputs import check_inputs
from utils.saving.interrupt import Interrupted, Interrupts
from utils.threads import spin_briefly


def main(argv: Sequence[str], prog: str = "run_main.py") -> int:
    """Run the command line ``argv`` of the script ``prog``; return the exit code.

    2: one line has said what to mend; 1: the run had to end, and one line has said why; 130 and 143: a signal has ended it.
    """
    args = parse_flags(argv, prog)
    spin_briefly()
    with Interrupts() as interrupts:
        try:
            check_inputs(args)
            from utils.run import main as run  # only now: --help and a wrong flag do not wait seconds for torch

            return run(args, interrupts)
        except (InputError, RunError) as error:
            rank = os.environ.get("RANK", "0")
            who = prog if rank == "0" else f"{prog}: rank {rank}"
            if rank == "0" or isinstance(error, RunError):
                print(f"{who}: error: {error}", file=sys.stderr, flush=True)
            if rank != "0":
                time.sleep(5)  # a launcher ends all processes once one has ended: let the first one say why
            return 2 if isinstance(error, InputError) else 1
        except Interrupted as signal:
            return signal.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
