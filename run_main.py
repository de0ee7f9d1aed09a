"""Entry of the program: read the command line, run it, and say in one line what is wrong.

``python run_main.py --help`` lists the flags; README.md shows whole commands.
"""

import os
import sys
import time
from collections.abc import Sequence

import utils.script  # noqa: F401  # first: it answers where the environment is not there

# isort: split
from layers.errors import InputError, RunError
from utils.flags import parse_flags
from utils.saving.interrupt import Interrupted, Interrupts


def main(argv: Sequence[str], prog: str = "run_main.py") -> int:
    """Run the command line `argv` of the script `prog`; return the exit code.

    2: one line has said what to mend; 1: why the run could not go on; 130 and 143: a signal has ended it.
    """
    args = parse_flags(argv, prog)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads of OpenMP that wait hold their core for milliseconds: beside another job on the same cores a step took 5 to
        # 25 times as long. It counts when torch loads OpenMP.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with Interrupts() as interrupts:
        try:
            from utils.run import main as run  # only now: --help and a wrong flag do not wait seconds for torch

            return run(args, interrupts)
        except (InputError, RunError, OSError, MemoryError) as error:
            rank = os.environ.get("RANK", "0")
            if rank != "0":
                time.sleep(5)  # what all find is said once: the launcher ends this process after the first one
            who = prog if rank == "0" else f"{prog}: rank {rank}"
            print(f"{who}: error: {str(error) or 'no memory'}", file=sys.stderr, flush=True)
            return 2 if isinstance(error, InputError) else 1
        except Interrupted as signal:
            return signal.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
