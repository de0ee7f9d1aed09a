"""Graphics cards that the cells of a study share: what nvidia-smi lists, and what --gpus names of it.

Only the standard library is imported here; torch would take seconds to say the same.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from layers.errors import input_error

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
ALL = "all"
# A number, or the name that nvidia-smi -L prints of a card or of a part of one.
_CARD = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
_EXPECTED = f"{ALL}, or the numbers that nvidia-smi shows, such as 0 1"


def ask_cards(what: str) -> list[str] | None:
    """A property (`name`, `index`) of each card, as nvidia-smi says it; None where it cannot be asked."""
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")  # the latter is WSL2's
    if program is None:
        return None
    words = [program, f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else None


def read_gpus(words: Sequence[str]) -> list[str]:
    """The cards that --gpus names, each a value for CUDA_VISIBLE_DEVICES.

    Args:
        words: `all`, or numbers and names, apart by blanks or commas. `all` means those of CUDA_VISIBLE_DEVICES where
            that is set, as in a job of a cluster.

    Raises:
        InputError: no card's name, one twice, or one that nvidia-smi does not list (where it can be asked).
    """
    names = [name for word in words for name in word.split(",") if name]
    if names == [ALL]:
        return _all_cards()
    if not names:
        raise input_error("--gpus", "nothing", _EXPECTED)
    names = [str(int(name)) if name.isdecimal() else name for name in names]
    listed = ask_cards("index")
    for number, name in enumerate(names):
        if not _CARD.fullmatch(name):
            hint = "GRID.toml goes before it" if name.endswith(".toml") else ""
            raise input_error("--gpus", repr(name), _EXPECTED, hint)
        if name in names[:number]:
            raise input_error("--gpus", f"{name} twice", "each card once", "--jobs N lets cells share cards")
        if listed is not None and name.isdecimal() and name not in listed:
            raise input_error("--gpus", name, f"one of {', '.join(listed)}" if listed else "none: nvidia-smi lists no card")
    return names


def _all_cards() -> list[str]:
    if VISIBLE in os.environ:
        names, where = [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()], f"in {VISIBLE}"
    else:
        names, where = ask_cards("index") or [], "that nvidia-smi lists"
    if not names:
        raise input_error(f"--gpus {ALL}", f"no card {where}", "one or more", "give their numbers, or leave --gpus out")
    return names


def environment_of(card: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that sees one card alone."""
    # CUDA counts the fastest card first unless it is told to count as nvidia-smi does.
    return {ORDER: "PCI_BUS_ID", **environment, VISIBLE: card}
