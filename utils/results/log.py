"""Lines of a run: on stdout, and in `train.log` in the run's folder; its progress bar and its memory."""

import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm


class RunLog:
    """Prints each line and appends it to a log file, so that a lost terminal loses nothing.

    Where one of the two can no longer be written (a closed terminal, a full disk) the other goes on:
    a run does not end for the sake of a line.
    """

    def __init__(self, path: Path | None):
        """`path` None prints only (processes of a group other than the first print nothing)."""
        self.path = path
        self._file_lost = False

    def __call__(self, line: str) -> None:
        self._print(line)
        self.note(line)

    def note(self, line: str) -> None:
        """Append a line to the file alone."""
        if self.path is None:
            return
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(self.path, flags, 0o644), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._file_lost:
                self._print(f"WARNING: {self.path} cannot be written ({error.strerror})")
            self._file_lost = True

    @staticmethod
    def _print(line: str) -> None:
        try:
            tqdm.write(line, file=sys.stdout)  # above a progress bar, where there is one
            sys.stdout.flush()
        except OSError:
            # Nobody reads any more. Python itself would complain once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class SilentLog(RunLog):
    """The log of the other processes of a group."""

    def __init__(self):
        super().__init__(None)

    def __call__(self, line: str) -> None:
        """Print nothing."""


class KeptLog(RunLog):
    """The log of a program: nothing is printed, and the lines that a user would have read are kept.

    Attributes:
        lines: so far.
    """

    def __init__(self):
        super().__init__(None)
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)


def progress_bar(total: int, done: int = 0) -> tqdm:
    """A bar on stderr; none where that is not a terminal."""
    return tqdm(total=total, initial=done, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)


def memory_line(device: torch.device) -> str:
    """Peak memory so far: of the GPU beside its size, or of this process."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_reserved(device) / 2**30
        return f"GPU Memory: {held:.1f}GB / {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}GB"
    return f"Memory: {peak_memory_gib(device):.1f}GB (RAM, largest so far)"


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far, in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30  # type: ignore[attr-defined]  # Windows has it
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
