"""What the processes of a group ask of each other: to end, because a signal has come to one, or to save the state.

All have to do either at the same iteration. What they ask travels with the numbers of a step, which are added up over the
group anyway, and is acted upon a step later, when it has long arrived: nothing waits for it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.saving.interrupt import SIGNALS, Interrupted, Interrupts

SECONDS = 600  # between two saves, unless --save_steps says otherwise


@dataclass
class Asks:
    """Signals and the time of the next state, of one process or agreed upon by several.

    Attributes:
        processes: how many there are.
    """

    interrupts: Interrupts
    processes: int = 1
    _saved_at: float = field(default_factory=time.monotonic)
    _received: int = 0  # a signal that came to one of several processes
    _due: bool = False

    @property
    def alone(self) -> bool:
        """Whether nobody else is to be asked."""
        return self.processes == 1

    def say(self) -> list[float]:
        """What this process asks for, numbers to be added up over the group."""
        received = self.interrupts.received
        return [*(float(number == received) for number in SIGNALS), float(self._is_time())]

    def hear(self, sums: Sequence[float]) -> None:
        """Take in what all have said."""
        *signals, due = sums
        came = [number for number, count in zip(SIGNALS, signals, strict=True) if count]
        self._received, self._due = max([self._received, *came]), due > 0

    def check_signal(self) -> None:
        """Raises Interrupted if a signal has come."""
        received = self.interrupts.received if self.alone else self._received
        if received:
            raise Interrupted(received)

    def due(self) -> bool:
        """Whether it is long since the last state."""
        return self._is_time() if self.alone else self._due

    def saved(self) -> None:
        """A state has just been saved."""
        self._saved_at, self._due = time.monotonic(), False

    def _is_time(self) -> bool:
        return time.monotonic() - self._saved_at >= SECONDS
