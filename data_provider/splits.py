"""The data sets by name, which rows of theirs train, validate and test, what the M4 competition says of its six patterns,
and where their files lie.

Only the standard library is imported here, so that the command line can name the data sets before torch is loaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from layers.errors import input_error

SPLITS = ("train", "val", "test")
M4 = "m4"  # the name for --data, and of the folder
_MONTH = 30 * 24  # hours
_HOURLY = (12 * _MONTH, 4 * _MONTH, 4 * _MONTH)
_QUARTER_HOURLY = (4 * 12 * _MONTH, 4 * 4 * _MONTH, 4 * 4 * _MONTH)


@dataclass(frozen=True)
class DataSet:
    """A name for `--data`: how its file is split, and what else it stands for."""

    borders: tuple[int, int, int] | None = None  # rows of train, val and test; None: 70 %, 10 % and 20 % of the file
    file: str | None = None  # its default --data_path; None: its name with .csv


# A new data set is a row here.
DATASETS = {
    "ETTh1": DataSet(_HOURLY),
    "ETTh2": DataSet(_HOURLY),
    "ETTm1": DataSet(_QUARTER_HOURLY),
    "ETTm2": DataSet(_QUARTER_HOURLY),
    "custom": DataSet(),
    M4: DataSet(),
    "ECL": DataSet(file="electricity.csv"),
    "Traffic": DataSet(file="traffic.csv"),
    "Weather": DataSet(file="weather.csv"),
}


@dataclass(frozen=True)
class Pattern:
    """What the competition says of the series of one frequency."""

    horizon: int  # values to forecast
    season: int  # values in a season, for MASE and Naive2; 1 where the competition knows none
    recent: float  # training windows are cut within the last so many horizons of a series
    step: str  # from one value to the next, for people
    group: str  # under which the competition's tables have it


# The organisers' horizons, seasons and groups (Makridakis et al., International Journal of Forecasting, 2020).
PATTERNS = {
    "Yearly": Pattern(6, 1, 1.5, "1 year", "Yearly"),
    "Quarterly": Pattern(8, 4, 1.5, "1 quarter", "Quarterly"),
    "Monthly": Pattern(18, 12, 1.5, "1 month", "Monthly"),
    "Weekly": Pattern(13, 1, 10, "1 week", "Others"),
    "Daily": Pattern(14, 1, 10, "1 day", "Others"),
    "Hourly": Pattern(48, 24, 10, "1 hour", "Others"),
}


@dataclass(frozen=True)
class Splits:
    """Rows of each split, before the look-back of seq_len rows is added."""

    train: int
    val: int
    test: int
    few_shot: int  # rows of the training range that training windows may use


def split_rows(data: str, rows: int, seq_len: int, pred_len: int, percent: int, path: Path) -> Splits:
    """Split a file of `rows` rows.

    Args:
        percent: the training windows are in the first p % of the training range.

    Raises:
        InputError: fewer rows than the data set's fixed borders take, or a split too short for one window.
    """
    borders = DATASETS[data].borders
    if borders is not None and rows < sum(borders):
        raise input_error(
            f"--data {data}",
            f"{path} with {rows} rows",
            f"at least {sum(borders)} ({' + '.join(map(str, borders))}), its fixed borders",
            "use --data custom for another file",
        )
    train, val, test = borders or (int(0.7 * rows), rows - int(0.7 * rows) - int(0.2 * rows), int(0.2 * rows))
    few_shot = max((train - seq_len) * percent // 100, 0) + seq_len
    own = {"train": min(few_shot, train), "val": val, "test": test}
    short = [flag for flag in SPLITS if own[flag] < pred_len + (seq_len if flag == "train" else 0)]
    if short:
        flag = short[0]
        shot = f" (--percent {percent} of {train})" if flag == "train" and percent < 100 else ""
        raise input_error(
            f"--seq_len {seq_len} --pred_len {pred_len}",
            f"{own[flag]} rows{shot} in the {flag} split of {path}",
            f"at least {seq_len + pred_len if flag == 'train' else f'{pred_len} beside the {seq_len} rows before it'}",
            "a shorter --seq_len or --pred_len, or a file of more rows",
        )
    return Splits(train, val, test, few_shot)


def _roots(root_path: str | Path) -> list[Path]:
    return [Path(root) for root in (root_path, os.environ.get("TIMELLM_DATA")) if root]


def find_csv(root_path: str | Path, data_path: str | Path) -> Path:
    """The file `--root_path`/`--data_path`, else its copy under $TIMELLM_DATA.

    Raises:
        InputError: in none of these places; they are named.
    """
    places = csv_places(root_path, data_path)
    for file in (file for place in places for file in (place, place.with_name(f"{place.name}.gz"))):
        if file.is_file():
            return file
    public = str(data_path) in [row.file for row in DATASETS.values()]
    raise input_error(
        f"--root_path {root_path} --data_path {data_path}",
        "no such file",
        f"one of {', '.join(map(str, places))}",
        "public collections have it" if public else "the ETT files come with: python scripts/get_data.py",
    )


def csv_places(root_path: str | Path, data_path: str | Path) -> list[Path]:
    """Where `find_csv` looks, in this order. The public collections have a folder more: ETT-small/ETTh1.csv and
    traffic/traffic.csv."""
    own_folder = str(data_path).removesuffix(".gz") in [row.file for row in DATASETS.values()]
    below = Path(str(data_path).removesuffix(".gz")).stem if own_folder else "ETT-small"
    places = (place for root in _roots(root_path) for place in (root / data_path, root / below / data_path))
    return list(dict.fromkeys(places))


def m4_file(pattern: str, part: str) -> str:
    """The organisers' name of a file; part is "train" or "test"."""
    return f"{pattern}-{part}.csv"


def find_m4(root_path: str | Path, pattern: str) -> tuple[Path, Path]:
    """The training and the test file of a pattern: in `root_path`, its folder m4, or the same two of $TIMELLM_DATA.

    Raises:
        InputError: the two lie together in none of these folders.
    """
    folders = list(dict.fromkeys(folder for root in _roots(root_path) for folder in (root, root / M4)))
    train, test = m4_file(pattern, "train"), m4_file(pattern, "test")
    for folder in folders:
        if (folder / train).is_file() and (folder / test).is_file():
            return folder / train, folder / test
    raise input_error(
        f"--root_path {root_path} --seasonal_patterns {pattern}",
        f"no {train} and {test}",
        f"both in one of {', '.join(map(str, folders))}",
        "they come with: python scripts/get_data.py --name m4",
    )
