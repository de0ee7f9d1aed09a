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


def exit_code(prog: str, work: Callable[[], object], out: object = None) -> int:
    """The code that `work` returns, 0 for none; after one line of error 2 for what the user can mend, and else 1.

    Args:
        out: where the files of --out were to go, for the line that says that none can be written there.
    """
    try:
        return int(work() or 0)  # type: ignore[call-overload]
    except (InputError, RunError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and out is not None:
            error = input_error("--out", f"{out}, where no writing is ({error})", "a folder that can be written")
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
