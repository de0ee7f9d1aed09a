"""The data sets by name, which rows of theirs train, validate and test, and where a file lies.

Only the standard library is imported here, so that the command line can name the data sets before torch is loaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data_provider.patterns import M4
from layers.errors import input_error

SPLITS = ("train", "val", "test")
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
class Splits:
    """Rows of each split, before the look-back of seq_len rows is added."""

    train: int
    val: int
    test: int
    few_shot: int  # rows of the training range that training windows may use

    def slice(self, flag: str, seq_len: int) -> slice:
        """The rows a split's windows lie in; validation and test look back seq_len rows."""
        if flag == "train":
            return slice(0, self.few_shot)
        start, rows = {"val": (self.train, self.val), "test": (self.train + self.val, self.test)}[flag]
        return slice(start - seq_len, start + rows)


def split_rows(data: str, rows: int, seq_len: int, pred_len: int, percent: int, path: Path) -> Splits:
    """Split a file of `rows` rows.

    Args:
        percent: the training windows are in the first p % of the training range.

    Raises:
        InputError: unknown name, a percentage outside 1..100, fewer rows than
            the data set's fixed borders take, or a split too short for one window.
    """
    if not 1 <= percent <= 100:
        raise input_error("--percent", percent, "a whole number from 1 to 100")
    if data not in DATASETS:
        raise input_error("--data", repr(data), f"one of {', '.join(DATASETS)}")
    borders = DATASETS[data].borders
    if borders is None:
        train, test = int(0.7 * rows), int(0.2 * rows)
        val = rows - train - test
    else:
        train, val, test = borders
        if rows < sum(borders):
            parts = " + ".join(map(str, borders))
            raise input_error(
                f"--data {data}",
                f"{path} with {rows} rows",
                f"at least {sum(borders)} ({parts}), its fixed borders",
                "use --data custom for another file",
            )
    splits = Splits(train, val, test, max((train - seq_len) * percent // 100, 0) + seq_len)
    _check_lengths(splits, seq_len, pred_len, percent, path)
    return splits


def _check_lengths(splits: Splits, seq_len: int, pred_len: int, percent: int, path: Path) -> None:
    """Every split must hold one window of seq_len + pred_len rows."""
    train_rows = min(splits.few_shot, splits.train)
    have = {"train": train_rows, "val": splits.val + seq_len, "test": splits.test + seq_len}
    window = seq_len + pred_len
    short = [flag for flag in SPLITS if have[flag] < window]
    if not short:
        return
    flag = short[0]
    own = train_rows if flag == "train" else getattr(splits, flag)
    shot = f" (--percent {percent} of {splits.train})" if flag == "train" and percent < 100 else ""
    least = f"{window}" if flag == "train" else f"{pred_len} beside the {seq_len} rows before it"
    raise input_error(
        f"--seq_len {seq_len} --pred_len {pred_len}",
        f"{own} rows{shot} in the {flag} split of {path}",
        f"at least {least}",
        _longest(splits, seq_len, pred_len, percent),
    )


def _longest(splits: Splits, seq_len: int, pred_len: int, percent: int) -> str:
    """The longest lengths that fit, each with the other length kept where it can be."""

    def longest_seq(horizon: int) -> int:
        return splits.train - -(-100 * horizon // percent)  # (train - T) * p // 100 >= H, solved for T

    most = min(splits.val, splits.test)  # the longest horizon that validation and test hold
    options = []
    horizon = min(most, (splits.train - seq_len) * percent // 100)
    if horizon >= 1:
        options.append(f"--pred_len {horizon} with --seq_len {seq_len}")
    if pred_len <= most and longest_seq(pred_len) >= 1:
        options.append(f"--seq_len {longest_seq(pred_len)} with --pred_len {pred_len}")
    if not options and most >= 1 and longest_seq(most) >= 1:
        options.append(f"--seq_len {longest_seq(most)} with --pred_len {most}")
    return f"the longest that fit: {' or '.join(options)}" if options else "no lengths fit: the file has too few rows"


def find_csv(root_path: str | Path, data_path: str | Path) -> Path:
    """The file `--root_path`/`--data_path`, else its copy under $TIMELLM_DATA.

    A folder below each is looked in as well: the public collections have ETT-small/ETTh1.csv and traffic/traffic.csv.

    Raises:
        InputError: in none of these places; they are named.
    """
    places = csv_places(root_path, data_path)
    for place in places:
        if place.is_file():
            return place
    raise input_error(
        f"--root_path {root_path} --data_path {data_path}",
        "no such file",
        f"one of {', '.join(map(str, places))}",
        "public collections have it" if _has_a_folder(data_path) else "the ETT files come with: python scripts/get_data.py",
    )


def csv_places(root_path: str | Path, data_path: str | Path) -> list[Path]:
    """Where `find_csv` looks, in this order."""
    roots = [Path(root_path)]
    if os.environ.get("TIMELLM_DATA"):
        roots.append(Path(os.environ["TIMELLM_DATA"]))
    below = Path(data_path).stem if _has_a_folder(data_path) else "ETT-small"
    places = (place for root in roots for place in (root / data_path, root / below / data_path))
    return list(dict.fromkeys(places))


def _has_a_folder(data_path: str | Path) -> bool:
    """Whether public collections have a folder for this file alone."""
    return str(data_path) in [row.file for row in DATASETS.values()]
