"""Ctrl+C and its relatives: the first one ends the run in good order, the second at once."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

# A closed terminal (tmux that dies, a dropped ssh) sends SIGHUP; Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

REPEATED = 5.0  # seconds in which a second signal is the first one's echo
PAUSE = 2.0  # seconds, more than the watch over a group takes to say who has failed


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
        self._in_group = os.environ.get("WORLD_SIZE", "1") != "1"
        self._speaks = os.environ.get("RANK", "0") == "0"
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
        """From now on a first signal waits for `check`."""
        self._deferred = True

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received:
            raise Interrupted(self.received)

    def between(self, items: Iterable) -> Iterator:
        """The items, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def _handle(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self._in_group and self._deferred and self.received and time.monotonic() - self._received_at < REPEATED:
            return  # the launcher passes on what the terminal has told all already
        if self._deferred and not self.received:
            self.received, self._received_at = number, time.monotonic()
            if not (self._in_group and number == signal.SIGTERM):  # a launcher's: another process has failed, as it will say
                self._tell(f"{name}: ending after the work in hand; once more ends at once")
            return
        if self._in_group:
            time.sleep(PAUSE)  # the watch may have something to say of it
        self._tell(f"{name}: ended at once" if self._deferred else f"{name}: ended; nothing is left half-written")
        end_workers()
        os._exit(128 + number)

    def _tell(self, line: str) -> None:
        """A line on stderr, past Python's buffers, which the interrupted code may be holding."""
        if not self._speaks:
            return
        try:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())
        except OSError:
            return  # the terminal is gone, which is what the signal says


def end_workers() -> None:
    """End the loader's workers, which would complain of a parent that is gone."""
    if hasattr(signal, "SIGCHLD"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # PyTorch raises an error at it
    for worker in multiprocessing.active_children():
        worker.kill()
