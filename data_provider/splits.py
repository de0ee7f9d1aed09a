"""Which rows train, validate and test, and where the file with them lies."""

import os
from dataclasses import dataclass
from pathlib import Path

from layers.errors import InputError

FLAGS = ("train", "val", "test")
_MONTH = 30 * 24  # hours
_ETT_HOURS = (12 * _MONTH, 4 * _MONTH, 4 * _MONTH)
# Rows of train, validation and test by the name of the data set (spec: 12/4/4 months of 30 days).
ETT_ROWS = {
    name: tuple(per_hour * rows for rows in _ETT_HOURS)
    for name, per_hour in (("ETTh1", 1), ("ETTh2", 1), ("ETTm1", 4), ("ETTm2", 4))
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
            the ETT borders need, or a split too short for one window.
    """
    if not 1 <= percent <= 100:
        raise InputError(f"--percent {percent}: a whole number from 1 to 100 is needed")
    if data in ETT_ROWS:
        train, val, test = ETT_ROWS[data]
        if rows < train + val + test:
            raise InputError(
                f"--data {data}: {path} has {rows} rows, its fixed borders need {train + val + test}"
                f" ({train} + {val} + {test}); use --data custom for another file"
            )
    elif data == "custom":
        train, test = int(0.7 * rows), int(0.2 * rows)
        val = rows - train - test
    else:
        raise InputError(f"--data {data}: unknown; needed is one of {', '.join((*ETT_ROWS, 'custom'))}")
    splits = Splits(train, val, test, max((train - seq_len) * percent // 100, 0) + seq_len)
    _check_lengths(splits, seq_len, pred_len, percent, path)
    return splits


def _check_lengths(splits: Splits, seq_len: int, pred_len: int, percent: int, path: Path) -> None:
    """Every split must hold one window of seq_len + pred_len rows."""
    train_rows = min(splits.few_shot, splits.train)
    have = {"train": train_rows, "val": splits.val + seq_len, "test": splits.test + seq_len}
    need = seq_len + pred_len
    short = [flag for flag in FLAGS if have[flag] < need]
    if not short:
        return
    flag = short[0]
    own = train_rows if flag == "train" else getattr(splits, flag)
    shot = f" (--percent {percent} of {splits.train})" if flag == "train" and percent < 100 else ""
    back = "" if flag == "train" else f" beside the {seq_len} rows before it"
    raise InputError(
        f"--seq_len {seq_len} --pred_len {pred_len}: the {flag} split of {path} has {own} rows{shot},"
        f" needed are {need if flag == 'train' else pred_len}{back};"
        f" {_longest(splits, seq_len, pred_len, percent)}"
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
    return (
        f"the longest that fit: {' or '.join(options)}"
        if options
        else "no lengths fit: the file needs more rows"
    )


def find_csv(root_path: str | Path, data_path: str | Path) -> Path:
    """The file `--root_path`/`--data_path`, else its copy under $TIMELLM_DATA.

    The folder ETT-small below each is looked in as well: scripts/get_data.py
    and the public collections put the ETT files there.

    Raises:
        InputError: in none of these places; they are named.
    """
    roots = [Path(root_path)]
    if os.environ.get("TIMELLM_DATA"):
        roots.append(Path(os.environ["TIMELLM_DATA"]))
    places = list(
        dict.fromkeys(place for root in roots for place in (root / data_path, root / "ETT-small" / data_path))
    )
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(
        f"--root_path {root_path} --data_path {data_path}: no such file (looked for {looked});"
        " the ETT files come with: python scripts/get_data.py"
    )
