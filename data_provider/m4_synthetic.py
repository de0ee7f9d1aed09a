"""Made-up series in the format of the M4 competition's files, for machines without a network."""

from pathlib import Path

import numpy as np

from data_provider.m4 import SYNTHETIC_ID
from data_provider.patterns import PATTERNS, m4_file

SERIES = 60  # of a pattern
# The shortest and the longest training series; the organisers' are as short, and some far longer.
LENGTHS = {
    "Yearly": (13, 60),
    "Quarterly": (16, 120),
    "Monthly": (42, 300),
    "Weekly": (80, 600),
    "Daily": (93, 600),
    "Hourly": (700, 960),
}


def write_synthetic_m4(folder: Path) -> Path:
    """Write the twelve files, the same on every call; return the folder.

    Each series has a level, a trend that bends, a season (of 7 days where the competition knows none) and noise, and its
    id says that it is synthetic.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, (pattern, kind) in enumerate(PATTERNS.items()):
        random = np.random.default_rng([2018, place])
        parts: dict[str, list[str]] = {"train": [], "test": []}
        season = 7 if pattern == "Daily" else kind.season
        for number in range(1, SERIES + 1):
            length = int(random.integers(*LENGTHS[pattern], endpoint=True))
            values = _series(random, length + kind.horizon, season).round(2)
            name = f"{SYNTHETIC_ID}-{pattern[0]}{number}"
            parts["train"].append(_line(name, values[:length]))
            parts["test"].append(_line(name, values[length:]))
        for part, lines in parts.items():
            width = LENGTHS[pattern][1] if part == "train" else kind.horizon
            header = ",".join(f'"V{n}"' for n in range(1, width + 2))
            text = "".join(f"{line}\n" for line in [header, *(_filled(line, width) for line in lines)])
            (folder / m4_file(pattern, part)).write_text(text, encoding="utf-8")
    return folder


def _series(random: np.random.Generator, length: int, season: int) -> np.ndarray:
    """Positive values `[length]`."""
    level = 10 ** random.uniform(2, 4)
    steps = random.normal(0.0, 0.01, length) + np.cumsum(random.normal(0.0, 0.0005, length))
    cycle = np.zeros(length)
    if season > 1:
        shape = random.normal(0.0, 0.15, season)
        cycle = (shape - shape.mean())[np.arange(length) % season]
    return level * np.exp(np.clip(np.cumsum(steps), -3, 3) + cycle + random.normal(0.0, 0.02, length))


def _line(name: str, values: np.ndarray) -> str:
    return ",".join([f'"{name}"', *(f'"{value}"' for value in values)])


def _filled(line: str, width: int) -> str:
    """A line with the empty cells behind its last value that the wide files have."""
    return line + "," * (width - line.count(","))
