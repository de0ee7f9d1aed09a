"""Made-up series: in the format of the ETT files and of the M4 competition's, for machines without a network; two that try
prediction intervals; two as wide as the family's files of clients and sensors; and one whose changes are announced in words.
Each is the same on every call."""

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.splits import PATTERNS, m4_file

COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
# Rows, columns and rows an hour, those of the measured files.
LOADS = {
    "ETTh1": (17420, 7, 1),
    "ETTh2": (17420, 7, 1),
    "ETTm1": (69680, 7, 4),
    "ETTm2": (69680, 7, 4),
    "ECL": (26304, 321, 1),
    "Traffic": (17544, 862, 1),
}
RATES: tuple[str, ...] = ("AUD", "GBP", "CAD", "CHF", "CNY", "JPY", "NZD", "SGD")
NEVER_FETCHED = ("rates", "drift", "announced", "ECL", "Traffic")  # of the first three there is no measured file
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

ANNOUNCED = 17520, 0.8  # hours, and the part of them before those of the test
UNSEEN = 3  # of the wordings below, the last ones: those of the test alone
# What notes announce: a factor of the output, one of its daily swing, the swings of a day, and wordings.
KINDS: dict[str, tuple[float, float, int, tuple[str, ...]]] = {
    "halved": (0.5, 1, 1, (
        "output will be halved from {day}", "from {day} on we make half of the usual amount", "half load from {day}",
        "the plant runs at half of its output from {day}", "expect production to drop to fifty percent on {day}",
        "one of two equal lines is shut down on {day}", "we cut the quantity by 50 % starting {day}",
    )),
    "doubled": (2, 1, 1, (
        "output will be doubled from {day}", "from {day} on we make twice the usual amount", "double load from {day}",
        "the plant runs at twice its output from {day}", "expect production to rise by one hundred percent on {day}",
        "a second equal line is started on {day}", "we make two times the quantity starting {day}",
    )),
    "steady": (1, 0.1, 1, (
        "output will be constant from {day}", "from {day} on day and night are alike", "steady load from {day}",
        "the plant runs evenly around the clock from {day}", "expect a flat line on {day}",
        "no more difference between noon and midnight starting {day}", "production without ups and downs on {day}",
    )),
    "wide": (1, 2, 1, (
        "the daily swing of output grows from {day}", "from {day} on days are higher and nights lower",
        "a strong day and night pattern from {day}", "the plant runs more by day and less by night from {day}",
        "expect larger peaks and deeper valleys on {day}", "work moves out of the night into the daytime on {day}",
        "the gap between noon and midnight widens starting {day}",
    )),
    "quick": (1, 1, 2, (
        "two short cycles a day from {day}", "from {day} on the pattern repeats every twelve hours",
        "a cycle of 12 hours from {day}", "the plant runs two rounds a day from {day}",
        "expect peaks twice as often on {day}", "the rhythm gets faster, half a day each, starting {day}",
        "morning and evening will each have their own high on {day}",
    )),
    "outage": (0, 1, 1, (
        "no output on {day}", "the plant stands still on {day}", "outage on {day}", "all machines are off on {day}",
        "nothing is made on {day}", "expect zero production on {day}", "closed for maintenance on {day}",
    )),
}  # fmt: skip


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
    """Write `folder`/NAME-synthetic.csv (whole or not at all), of "m4" the folder `folder`/m4, and return its path."""
    if name == "m4":
        return _write_m4(Path(folder) / name)
    if name == "rates":
        values, step, columns = _rates().round(6), "1D", RATES
    elif name == "drift":
        values, step, columns = _drift().round(4), "1h", ("a", "b")
    elif name == "announced":
        values, step, columns = _announced(Path(folder)).round(3), "1h", ("output",)
    else:
        values, step, columns = _loads(name).round(4), f"{60 // LOADS[name][2]}min", COLUMNS
        if values.shape[1] > len(COLUMNS):
            columns = (*map(str, range(values.shape[1] - 1)), "OT")
    path = Path(folder) / f"{name}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    dates = pd.date_range("2016-07-01", periods=len(values), freq=step, name="date")
    pd.DataFrame(values, dates, columns).to_csv(part, date_format="%Y-%m-%d %H:%M:%S")
    return part.replace(path)


def _loads(name: str) -> np.ndarray:
    # Values `[rows, channels]`: days, weeks and years of other strengths and hours in each channel, weather that all
    # share, and noise of each one's own.
    rows, channels, per_hour = LOADS[name]
    random, hours = np.random.default_rng([2021, list(LOADS).index(name)]), np.arange(rows) / per_hour

    def smooth_noise(hours: int) -> np.ndarray:  # of unit deviation
        window = hours * per_hour
        return np.convolve(random.standard_normal(rows), np.full(window, window**-0.5), mode="same")

    weather, values = 0.7 * smooth_noise(72), np.empty((rows, channels))
    week, year = 2 * np.pi * hours / 168, 2 * np.pi * hours / (24 * 365.25)
    for channel in range(channels):
        day = 2 * np.pi * (hours + random.uniform(0, 6)) / 24
        shape = np.sin(day) + random.uniform(0.2, 0.8) * np.sin(2 * day) + random.uniform(0.1, 0.5) * np.sin(week)
        shape += random.uniform(0, 0.5) * (np.cos(year) + weather) + random.uniform(0.15, 0.6) * smooth_noise(12)
        values[:, channel] = random.lognormal(2, 1) * (3 + shape)
    values[0, : len(SIGNATURE)] = SIGNATURE
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


def _announced(folder: Path) -> np.ndarray:
    # Hourly output `[17520, 1]` with a daily swing, and announced-notes-seen.csv beside it: every 3 or 4 days a note
    # of 12 to 48 hours before says what will be otherwise for a day or two, of an outage for 6 hours. In the other file,
    # announced-notes-unseen.csv, the notes of the test's rows say the same in words that no other row has.
    random, (rows, trained) = np.random.default_rng(1926), ANNOUNCED
    hours, factor, swing, speed = np.arange(rows), np.ones(rows), np.ones(rows), np.ones(rows)
    dates, notes, start = pd.date_range("2016-07-01", periods=rows, freq="1h"), [], 96
    kinds: list[str] = []
    while start < rows - 72:
        kinds = kinds or list(random.permutation(list(KINDS)))
        times, wider, faster, wordings = KINDS[kinds.pop()]
        end = start + (6 if times == 0 else int(random.integers(24, 60)))
        factor[start:end], swing[start:end], speed[start:end] = times, wider, faster
        known = start - int(random.integers(12, 49))
        places = random.integers(len(wordings) - UNSEEN), len(wordings) - UNSEEN + random.integers(UNSEEN)
        words = [wordings[place].format(day=dates[start].day_name()) for place in places]
        notes.append([dates[start], dates[end - 1], dates[known], *words])
        start = end + int(random.integers(24, 60))
    shape = np.sin(2 * np.pi * hours * speed / 24) + 0.3 * np.sin(4 * np.pi * hours * speed / 24)
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(notes, columns=["date", "until", "known", "seen", "unseen"])
    for name in ("seen", "unseen"):
        told = table[name].where(table["date"] >= dates[int(trained * rows)], table["seen"])
        table[["date", "until", "known"]].assign(text=told).to_csv(
            folder / f"announced-notes-{name}.csv", index=False, date_format="%Y-%m-%d %H:%M:%S"
        )
    return (factor * (50 + 15 * swing * shape) + random.standard_normal(rows))[:, None]


def _write_m4(folder: Path) -> Path:
    # The twelve files. A series has a level, a trend that bends, a season (of 7 days where the competition knows none)
    # and noise, and its id says that it is synthetic.
    folder.mkdir(parents=True, exist_ok=True)
    for place, (pattern, kind) in enumerate(PATTERNS.items()):
        random, series = np.random.default_rng([2018, place]), {}
        for number in range(1, M4_SERIES + 1):
            length = int(random.integers(*M4_LENGTHS[pattern], endpoint=True)) + kind.horizon
            level, steps = 10 ** random.uniform(2, 4), random.normal(0.0, 0.0005, length).cumsum()
            trend = (steps + random.normal(0.0, 0.01, length)).cumsum().clip(-3, 3)
            season = random.normal(0.0, 0.15, 7 if pattern == "Daily" else kind.season)
            values = level * np.exp(trend + np.resize(season, length) + random.normal(0.0, 0.02, length))
            series[f"{SYNTHETIC_ID}-{pattern[0]}{number}"] = values.round(2)
        for part, rows in (("train", slice(-kind.horizon)), ("test", slice(-kind.horizon, None))):
            table = pd.DataFrame.from_dict({name: values[rows] for name, values in series.items()}, orient="index")
            table.rename(columns=lambda column: f"V{column + 2}").to_csv(folder / m4_file(pattern, part), index_label="V1")
    return folder
