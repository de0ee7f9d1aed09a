"""Threads: how long those of a CPU product wait for each other before they sleep.

Only the standard library is imported here: what is set counts when torch loads its OpenMP library, once.
"""

import os


def spin_briefly() -> None:
    """Let OpenMP's threads (GNU's, which PyTorch brings on Linux) spin for microseconds instead of milliseconds.

    A thread that spins holds its core. Beside another job on the same cores two threads then wait for one that has
    none: steps took 5 to 25 times as long, where sleeping threads share the cores. On a quiet machine it costs nothing
    that could be measured. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
