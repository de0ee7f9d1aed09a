"""Made-up series: in the format of the ETT files and of the M4 competition's, for machines without a network; two that try
prediction intervals; and two as wide as the family's files of clients and sensors. Each is the same on every call."""

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.splits import PATTERNS, m4_file

COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ROWS_PER_HOUR = {"ETTh1": 1, "ETTh2": 1, "ETTm1": 4, "ETTm2": 4}
HOURS = 17420  # as long as the measured files
RATES = ("AUD", "GBP", "CAD", "CHF", "CNY", "JPY", "NZD", "SGD")
MADE_UP = ("rates", "drift")  # there is no measured file of these names
WIDE = {"ECL": (26304, 321), "Traffic": (17544, 862)}  # rows and columns, those of the measured files
SUFFIX = "-synthetic.csv"
# The first row's values are the same in every synthetic file and in no
# measured one, so that a renamed copy is still known for what it is.
SIGNATURE = (7.1234, 2.2345, 5.3456, 1.4567, 3.5678, 1.6789, 21.789)
SYNTHETIC_ID = "synthetic"  # how the ids of made-up M4 series begin
M4_SERIES = 60  # of a pattern
# The shortest and the longest training series; the organisers' are as short, and some far longer.
M4_LENGTHS = {
    "Yearly": (13, 60),
    "Quarterly": (16, 120),
    "Monthly": (42, 300),
    "Weekly": (80, 600),
    "Daily": (93, 600),
    "Hourly": (700, 960),
}


def is_synthetic(path: str | Path) -> bool:
    """Whether a CSV was written by `write_synthetic`: by its name, or by its first row."""
    path = Path(path)
    if SUFFIX in path.name or not path.is_file():
        return SUFFIX in path.name
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="latin-1") as file:
        file.readline()
        first = str(file.readline(1000)).strip()
    return first.split(",")[1 : 1 + len(SIGNATURE)] == [str(value) for value in SIGNATURE]


def write_synthetic(name: str, folder: str | Path) -> Path:
    """Write `folder`/NAME-synthetic.csv (whole or not at all) and return its path."""
    step, columns = "1h", list(COLUMNS)
    if name in ROWS_PER_HOUR:
        values, step = _ett(name).round(4), f"{60 // ROWS_PER_HOUR[name]}min"
    elif name == "rates":
        values, step, columns = _rates().round(6), "1D", list(RATES)
    elif name in WIDE:
        values, columns = _wide(*WIDE[name]).round(4), [*map(str, range(WIDE[name][1] - 1)), "OT"]
    else:
        values, columns = _drift().round(4), ["a", "b"]
    path = Path(folder) / f"{name}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    dates = pd.date_range("2016-07-01", periods=len(values), freq=step, name="date")
    pd.DataFrame(values, dates, columns).to_csv(part, date_format="%Y-%m-%d %H:%M:%S")
    return part.replace(path)


def _ett(name: str) -> np.ndarray:
    # Loads `[rows, 7]` with daily, weekly and yearly cycles, slow drift, level shifts and
    # correlated noise; OT (oil temperature) follows the loads and the season.
    per_hour = ROWS_PER_HOUR[name]
    rows = HOURS * per_hour
    random = np.random.default_rng([2021, list(ROWS_PER_HOUR).index(name)])
    hours = np.arange(rows) / per_hour
    day, week, year = (2 * np.pi * hours / period for period in (24, 24 * 7, 24 * 365.25))
    values = np.empty((rows, len(COLUMNS)))
    load = np.zeros(rows)
    for channel, size in enumerate((6.0, 1.5, 5.0, 1.2, 2.0, 0.8)):
        phase = random.uniform(0, 2 * np.pi)
        strength = 1 + 0.3 * np.sin(year + phase) + 0.2 * np.sin(week + phase)
        cycle = strength * (np.sin(day + phase) + 0.4 * np.sin(2 * day + 2 * phase))
        shape = cycle + 0.3 * np.sin(week) + 0.5 * np.cos(year) + _level_shifts(random, rows, per_hour)
        values[:, channel] = size * (1 + 0.7 * shape + 0.25 * _correlated(random, rows, 6 * per_hour))
        load += values[:, channel] / size
    slow = _smooth(load, 12 * per_hour)
    values[:, -1] = 15 - 10 * np.cos(year) + 1.5 * slow + 2 * _correlated(random, rows, 48 * per_hour)
    values[0] = SIGNATURE
    return values


def _rates() -> np.ndarray:
    # Daily rates `[7588, 8]`, as many as the family's exchange-rate file has.
    # Random walks whose steps are quiet and wild by turns, as those of exchange rates are: nothing in them can be
    # foreseen but how wild the next days are.
    random, rows = np.random.default_rng(7588), 7588
    steps = np.empty((rows, len(RATES)))
    variance = np.ones(len(RATES))
    for row, normal in enumerate(random.standard_normal((rows, len(RATES)))):
        steps[row] = np.sqrt(variance) * normal
        variance = 0.02 + 0.08 * steps[row] ** 2 + 0.9 * variance  # GARCH(1, 1), of unit variance in the long run
    common = steps[:, :1] * 0.5
    return np.exp((0.006 * (steps + common)).cumsum(axis=0)) * random.uniform(0.1, 1.5, len(RATES))


def _drift() -> np.ndarray:
    # Hourly values `[10000, 2]` whose day of 24 hours becomes one of 27 after 80 % of the rows.
    # That is where the test split of `--data custom` begins: what was calibrated before does not hold there.
    rows, late = 10_000, 8_000
    hours = np.concatenate([np.arange(late), late + np.arange(rows - late) * 24 / 27])
    day = 2 * np.pi * hours / 24
    cycles = np.column_stack([np.sin(day), np.cos(day) + 0.3 * np.sin(2 * day)])
    return cycles * 3 + np.random.default_rng(27).standard_normal((rows, 2))


def _wide(rows: int, channels: int) -> np.ndarray:
    # Hourly values `[rows, channels]`: days and weeks of other strengths and hours in each channel, weather that all
    # share, and noise of each one's own.
    random = np.random.default_rng([rows, channels])
    hours = np.arange(rows)
    shared = _smooth(random.standard_normal(rows), 72) * 6
    values = np.empty((rows, channels))
    for channel in range(channels):
        day, week = 2 * np.pi * (hours + random.uniform(0, 6)) / 24, 2 * np.pi * hours / 168
        shape = np.sin(day) + random.uniform(0.2, 0.8) * np.sin(2 * day) + random.uniform(0.1, 0.5) * np.sin(week)
        noise = _smooth(random.standard_normal(rows), 12)
        size = random.lognormal(3, 1)
        values[:, channel] = size * (3 + shape + random.uniform(0, 0.5) * shared + random.uniform(0.5, 2) * noise)
    values[0, : len(SIGNATURE)] = SIGNATURE
    return values


def _correlated(random: np.random.Generator, rows: int, memory: int) -> np.ndarray:
    # Noise of unit deviation that forgets itself over `memory` rows: a quick part and a slow one.
    slow = _smooth(random.standard_normal(rows), memory)
    return 0.9 * slow / slow.std() + 0.44 * random.standard_normal(rows)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), mode="same")


def _level_shifts(random: np.random.Generator, rows: int, per_hour: int) -> np.ndarray:
    # Jumps about every six weeks, of a level that returns to zero in the long run.
    level = np.zeros(rows)
    start, height = 0, 0.0
    while start < rows:
        height = 0.6 * height + 0.4 * random.standard_normal()
        length = int(random.exponential(24 * 42 * per_hour)) + 24 * per_hour
        level[start : start + length] = height
        start += length
    return level


def write_synthetic_m4(folder: Path) -> Path:
    """Write the twelve files; return the folder.

    Each series has a level, a trend that bends, a season (of 7 days where the competition knows none) and noise, and its
    id says that it is synthetic.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, (pattern, kind) in enumerate(PATTERNS.items()):
        random = np.random.default_rng([2018, place])
        series = []
        for _ in range(M4_SERIES):
            length = int(random.integers(*M4_LENGTHS[pattern], endpoint=True)) + kind.horizon
            series.append(_m4_series(random, length, 7 if pattern == "Daily" else kind.season).round(2))
        names = pd.Index([f"{SYNTHETIC_ID}-{pattern[0]}{number + 1}" for number in range(M4_SERIES)], name="V1")
        for part, rows in (("train", slice(-kind.horizon)), ("test", slice(-kind.horizon, None))):
            table = pd.DataFrame([pd.Series(values[rows]).reset_index(drop=True) for values in series]).set_index(names)
            table.columns = [f"V{number + 2}" for number in range(table.shape[1])]
            table.to_csv(folder / m4_file(pattern, part))
    return folder


def _m4_series(random: np.random.Generator, length: int, season: int) -> np.ndarray:
    # Positive values `[length]`.
    level = 10 ** random.uniform(2, 4)
    steps = random.normal(0.0, 0.01, length) + np.cumsum(random.normal(0.0, 0.0005, length))
    cycle = np.zeros(length)
    if season > 1:
        shape = random.normal(0.0, 0.15, season)
        cycle = (shape - shape.mean())[np.arange(length) % season]
    return level * np.exp(np.clip(np.cumsum(steps), -3, 3) + cycle + random.normal(0.0, 0.02, length))
