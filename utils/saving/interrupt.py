"""Ctrl+C and its relatives: the first one ends the run in good order, the second at once."""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

# A closed terminal (tmux that dies, a dropped ssh) sends SIGHUP; Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

REPEATED = 5.0  # seconds in which a launcher passes on what all its processes have been told already


class Interrupted(Exception):
    """A signal asks the run to end; raised only between two iterations or two evaluation batches."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interrupts:
    """A context that takes the signals.

    Until `defer` is called nothing is at stake, and a signal ends the process where it is. From then
    on the first signal is noted, for `check` to raise when the work in hand is done. A second one ends
    the process at once: files are renamed into place whole, so none is ever half-written.
    """

    def __init__(self):
        self.received = 0  # the signal's number
        self._received_at = 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        self._deferred = True

    def check(self) -> None:
        if self.received:
            raise Interrupted(self.received)

    def _handle(self, number: int, _frame: object) -> None:
        name, in_group = signal.Signals(number).name, os.environ.get("WORLD_SIZE", "1") != "1"
        is_first, is_echo = not self.received, in_group and time.monotonic() - self._received_at < REPEATED
        if self._deferred and is_first:
            self.received, self._received_at = number, time.monotonic()
            line = f"{name}: ending after the work in hand; once more ends at once"
        elif self._deferred and is_echo:
            return
        else:
            line = f"{name}: ended at once" if self._deferred else f"{name}: ended; nothing is left half-written"
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be gone, which is what the signal says
                # Past Python's buffers, which the interrupted code may be holding.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())
        if not (self._deferred and is_first):
            for worker in multiprocessing.active_children():  # of the loader, which would complain of a parent that is gone
                worker.kill()
            os._exit(128 + number)
