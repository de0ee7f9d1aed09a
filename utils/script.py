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


def exit_code(prog: str, work: Callable[[], object]) -> int:
    """The code that `work` returns, 0 for none; after one line of error 2 for what the user can mend, and else 1."""
    try:
        return int(work() or 0)  # type: ignore[call-overload]
    except OSError as error:
        line: object = input_error(
            error.filename or prog, error.strerror or error, "a file or folder that can be read and written"
        )
    except (InputError, RunError) as error:
        line = error
    print(f"{prog}: error: {line}", file=sys.stderr)
    return 1 if isinstance(line, RunError) else 2
