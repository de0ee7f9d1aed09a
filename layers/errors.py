"""The errors that end a run with one line: what a user can mend (exit code 2), and what ended a run that had started (1)."""

from collections.abc import Sequence

NAMED = 30  # names of which a line has all


def listed(names: Sequence[str]) -> str:
    """Names for a line: all, or of many the first few and how many more there are."""
    return ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[:8])} and {len(names) - 8} more"


class InputError(ValueError):
    """A flag, file or folder that cannot be used; the message is one line, made by `input_error`.

    ``run_main.py`` prints it without a traceback and exits with code 2.
    """


def input_error(what: object, got: object, expected: object, hint: str = "") -> InputError:
    """The error to raise: ``--features: got 'X', expected one of M, S, MS; hint``.

    Args:
        what: the flag with its dashes, or the file (with row and column where they are known).
        got: what was found there.
        expected: what would have been right.
        hint: what to do about it, where that is not plain.
    """
    line = f"{what}: got {got}, expected {expected}" + (f"; {hint}" if hint else "")
    # Names of flags, files and columns may hold a line break.
    return InputError("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


class RunError(RuntimeError):
    """The run cannot go on; the message is one line that says what is kept and what to do."""


class LoaderError(OSError):
    """A loader's workers cannot go on; raised between two batches, so a state can still be saved."""


class StorageError(RunError):
    """A file could not be written; what lay there before is what it was. Its cause is the operating system's error."""
