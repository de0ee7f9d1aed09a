"""Entry of the program: read the command line, check it, hand over.

``python run_main.py --help`` lists the flags; README.md shows whole commands.
"""

import gc
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from layers.errors import InputError
from utils.command_line import parse_flags
from utils.errors import RunError
from utils.inputs import check_inputs
from utils.processes.group import in_group, launched, start_those_of_accelerate, tells_errors
from utils.saving.interrupt import Interrupted, Interrupts
from utils.threads import spin_briefly


def main(argv: Sequence[str], prog: str = "run_main.py") -> int:
    """Run the command line ``argv`` of the script ``prog``; return the exit code.

    2: one line has said what to mend; 1: the run had to end, and one line has said why; 130 and 143:
    a signal has ended it.
    """
    args = parse_flags(argv, prog)
    spin_briefly()
    with Interrupts() as interrupts:

        def work() -> int:
            check_inputs(args)
            return _load_run()(args, interrupts)

        try:
            start_those_of_accelerate()
            return work() if launched() == 1 else in_group(args, work)
        except (InputError, RunError) as error:
            if tells_errors():
                print(f"{prog}: error: {error}", file=sys.stderr)
            return 2 if isinstance(error, InputError) else 1
        except Interrupted as signal:
            return signal.exit_code


def _load_run() -> Callable[[Namespace, Interrupts], int]:
    """The run itself, imported only now: --help, a wrong flag and a missing file do not wait seconds for torch.

    What is imported stays. Looking for garbage in it would take a fifth of the import's time, and a fifth of a second more
    whenever a model's memory is given back.
    """
    if "utils.run" not in sys.modules:
        gc.disable()
        try:
            import utils.run  # noqa: F401
        finally:
            gc.enable()
        gc.freeze()
    from utils.run import main as run

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
