"""Kinds of flag values: how the words of a command line are read, and what a message says was expected."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST_NAME, LONGEST_PATH = 255, 2000  # bytes; a system call takes 4096, for folder and file together


@dataclass(frozen=True)
class Kind:
    """What a flag's value must be: how it is read (ValueError: it is not), the words for a message, and the names that it
    is one of, where it is."""

    read: Callable[[str], Any]
    expected: str
    names: tuple[str, ...] = ()

    def __call__(self, text: str) -> Any:
        try:
            return self.read(text)
        except ValueError:
            hint = self.hint(text)
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected {self.expected}" + (f"; {hint}" if hint else "")
            ) from None

    def hint(self, text: str) -> str:
        """The name that a wrong value may have been meant for; empty where none is near."""
        known = {name.lower(): name for name in self.names}
        near = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.7)
        return f"perhaps {known[near[0]]}" if near else ""


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number of at least `low`, and at most `high` where that is given."""

    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return Kind(read, f"a whole number {limits}")


def real(inside: Callable[[float], bool], expected: str) -> Kind:
    """A finite number for which `inside` holds."""

    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and inside(value)):
            raise ValueError
        return value

    return Kind(read, expected)


def one_of(*names: str) -> Kind:
    """One of some names, in upper or lower case; the value is the name as it stands here."""
    known = {name.lower(): name for name in names}

    def read(text: str) -> str:
        if text.lower() not in known:
            raise ValueError
        return known[text.lower()]

    return Kind(read, names[0] if len(names) == 1 else "one of " + ", ".join(names), names)


def text_of(expected: str, pattern: str = r"(?s).*\S.*") -> Kind:
    """Text that `pattern` matches as a whole; the default takes all that is not blank."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Kind(read, expected)


def path_of(expected: str) -> Kind:
    """A path that the file system can be asked for; whether it is there is not looked at."""

    def read(text: str) -> str:
        path = os.fsencode(text)  # a ValueError of its own where it cannot be
        too_long = len(path) > LONGEST_PATH or max(map(len, path.split(b"/"))) > LONGEST_NAME
        if not text.strip() or too_long or b"\0" in path:
            raise ValueError
        return text

    return Kind(read, expected)


def _yes_or_no(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def _per_cent(text: str) -> float:
    if text.lower() == "none":
        return 0.0
    value = float(text)
    if not 0 < value < 100 or round(value, 4) != value:
        raise ValueError
    return value


# Of one word or several; 0 stands for none.
LEVELS = Kind(_per_cent, "numbers between 0 and 100 such as 80 95, or none")
COUNT, COUNT_OR_0, SWITCH = whole(1), whole(0), whole(0, 1)
TEXT, FOLDER, FILE = text_of("some text"), path_of("a folder"), path_of("a file name")
FREQUENCY = text_of("a pandas frequency such as h, t, d or 15min", r"\d*[A-Za-z][0-9A-Za-z]*(-[0-9A-Za-z]+)*")
BOOL = Kind(_yes_or_no, "nothing, or True or False")
