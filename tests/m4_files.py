"""Small files in the M4 competition's format, for tests."""

from pathlib import Path

import numpy as np

from data_provider.splits import PATTERNS, m4_file


def write_wide(path: Path, series: dict[str, np.ndarray]) -> Path:
    """A wide file as the organisers write it: quoted, with empty cells behind shorter series."""
    width = max(map(len, series.values()))
    header = ",".join(f'"V{n + 1}"' for n in range(width + 1))
    lines = [
        ",".join([f'"{name}"', *(f'"{value!r}"' for value in values.tolist()), *[""] * (width - len(values))])
        for name, values in series.items()
    ]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def write_m4(
    folder: Path, pattern: str = "Yearly", lengths: tuple[int, ...] = (13, 40, 25, 60, 33, 8), seed: int = 0
) -> Path:
    """The two files of a pattern: one series of each length, on scales of their own; returns the folder."""
    random = np.random.default_rng(seed)
    horizon, known, future = PATTERNS[pattern].horizon, {}, {}
    for number, length in enumerate(lengths, 1):
        values = 10 ** random.uniform(1, 4) * np.exp(np.cumsum(random.normal(0.01, 0.05, length + horizon)))
        known[f"{pattern[0]}{number}"], future[f"{pattern[0]}{number}"] = values[:length], values[length:]
    folder.mkdir(parents=True, exist_ok=True)
    write_wide(folder / m4_file(pattern, "train"), known)
    write_wide(folder / m4_file(pattern, "test"), future)
    return folder
