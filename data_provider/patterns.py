"""The M4 competition's six seasonal patterns, and where their files lie.

Only the standard library is imported here, so that the command line can name the patterns before torch is loaded.
Horizons, seasons and groups are the organisers' (Makridakis et al., International Journal of Forecasting, 2020).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from layers.errors import input_error


@dataclass(frozen=True)
class Pattern:
    """What the competition says of the series of one frequency.

    Attributes:
        horizon: values to forecast.
        season: values in a season, for MASE and Naive2; 1 where the competition knows none.
        recent: training windows are cut within the last so many horizons of a series.
        step: from one value to the next, for people.
        group: under which the competition's tables have it.
    """

    horizon: int
    season: int
    recent: float
    step: str
    group: str


PATTERNS = {
    "Yearly": Pattern(6, 1, 1.5, "1 year", "Yearly"),
    "Quarterly": Pattern(8, 4, 1.5, "1 quarter", "Quarterly"),
    "Monthly": Pattern(18, 12, 1.5, "1 month", "Monthly"),
    "Weekly": Pattern(13, 1, 10, "1 week", "Others"),
    "Daily": Pattern(14, 1, 10, "1 day", "Others"),
    "Hourly": Pattern(48, 24, 10, "1 hour", "Others"),
}
GROUPS = ("Yearly", "Quarterly", "Monthly", "Others")
M4 = "m4"  # the name for --data, and of the folder


def m4_file(pattern: str, part: str) -> str:
    """The organisers' name of a file; part is "train" or "test"."""
    return f"{pattern}-{part}.csv"


def find_m4(root_path: str | Path, pattern: str) -> tuple[Path, Path]:
    """The training and the test file of a pattern: in `root_path`, its folder m4, or the same two of $TIMELLM_DATA.

    Raises:
        InputError: the two lie together in none of these folders.
    """
    roots = [Path(root_path)]
    if os.environ.get("TIMELLM_DATA"):
        roots.append(Path(os.environ["TIMELLM_DATA"]))
    folders = list(dict.fromkeys(folder for root in roots for folder in (root, root / M4)))
    names = m4_file(pattern, "train"), m4_file(pattern, "test")
    for folder in folders:
        if all((folder / name).is_file() for name in names):
            return folder / names[0], folder / names[1]
    raise input_error(
        f"--root_path {root_path} --seasonal_patterns {pattern}",
        f"no {' and '.join(names)}",
        f"both in one of {', '.join(map(str, folders))}",
        "they come with: python scripts/get_data.py --name m4",
    )
