"""What the scripts share: a command line from a table, and one line with an exit code for what ends them."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from layers.errors import InputError, RunError, input_error
from utils.flags import FlagParser


def script_parser(prog: str, doc: str | None, arguments: dict[str, dict[str, Any]], **settings: Any) -> FlagParser:
    """A parser of what stands in a table: the name of a flag -> what `add_argument` takes."""
    looks: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | settings
    parser = FlagParser(prog=prog, description=doc, **looks)
    for name, words in arguments.items():
        parser.add_argument(name, **words)
    return parser


def exit_code(prog: str, work: Callable[[], object], out: object = None) -> int:
    """The code that `work` returns, 0 for none; after one line of error 2 for what the user can mend, and else 1.

    Args:
        out: where the files of --out were to go, for the line that says that none can be written there.
    """
    try:
        return int(work() or 0)  # type: ignore[call-overload]
    except (InputError, RunError, OSError) as error:
        if isinstance(error, OSError) and out is None:
            raise
        if isinstance(error, OSError):
            error = input_error("--out", f"{out}, where no writing is ({error})", "a folder that can be written")
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
