"""What the programs share: what they need of Python and of the terminal, before any other import of theirs; a command line
from a table, and one line with an exit code for what ends them."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

MISSING = [
    name
    for name in ("torch", "transformers", "accelerate", "safetensors", "pandas", "sklearn", "scipy", "matplotlib", "psutil")
    if find_spec(name) is None
]
if MISSING or sys.version_info < (3, 11):
    print(
        f"{os.path.basename(sys.argv[0])}: error: {sys.executable}: got Python {sys.version.split()[0]} without "
        f"{', '.join(MISSING) or 'what needs a newer one'}, expected the environment in .venv; "
        "bash scripts/setup_env.sh makes it, source .venv/bin/activate takes it",
        file=sys.stderr,
    )
    sys.exit(2)
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal in ASCII or Latin-1 has no letters for a Chinese column
if not hasattr(sys, "ps1"):  # else in a notebook, which shows pictures itself
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; the shell's backend may be of a notebook, and not installed

from layers.errors import InputError, RunError, input_error  # noqa: E402
from utils.flags import FlagParser  # noqa: E402


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
        what, why = error.filename or prog, error.strerror or error
        failure: Exception = input_error(what, why, "a file or folder that can be read and written")
    except (InputError, RunError, MemoryError) as error:
        failure = error
    print(f"{prog}: error: {str(failure) or 'no memory'}", file=sys.stderr)
    return 2 if isinstance(failure, InputError) else 1
