"""From a CSV file to windows: one series, one window dataset for every file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset

from data_provider.describe import frequency
from data_provider.splits import Splits, find_csv, split_rows
from data_provider.synthetic import is_synthetic
from data_provider.table import FIRST_ROW_LINE, Table, read_table
from data_provider.timefeatures import time_marks
from layers.errors import InputError

# The model squares standardised values in float32, which ends at 3.4e38.
LARGEST_STANDARDISED = 1e18


class WindowDataset(Dataset):
    """Every window of T input and H forecast rows in a run of rows.

    Items share the memory of the arrays given; nothing is copied.

    Args:
        values: standardised, `[rows, N]` float32.
        marks: time marks, `[rows, F]` float32.
        dates: `[rows]`.
        target_index: the one column that counts (`--features MS`), else None.
    """

    def __init__(
        self,
        values: np.ndarray,
        marks: np.ndarray,
        dates: pd.DatetimeIndex,
        seq_len: int,
        label_len: int,
        pred_len: int,
        target_index: int | None = None,
    ):
        self.values, self.marks, self.dates = values, marks, dates
        self.seq_len, self.label_len, self.pred_len = seq_len, label_len, pred_len
        self.target_index = target_index

    def __len__(self) -> int:
        return len(self.values) - self.seq_len - self.pred_len + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Window `index`: x `[T, N]`, y `[label_len + H, N]`, x_mark, y_mark `[.., F]`, index."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        now = index + self.seq_len  # the first forecast row
        x, y = slice(index, now), slice(now - self.label_len, now + self.pred_len)
        return {
            "x": torch.from_numpy(self.values[x]),
            "y": torch.from_numpy(self.values[y]),
            "x_mark": torch.from_numpy(self.marks[x]),
            "y_mark": torch.from_numpy(self.marks[y]),
            "index": index,
        }

    def window_dates(self, index: int) -> tuple[pd.Timestamp, pd.Timestamp]:
        """The first input date and the first forecast date of window `index`."""
        return self.dates[index], self.dates[index + self.seq_len]


@dataclass(frozen=True)
class Series:
    """A file, split and standardised, ready to be cut into windows."""

    data: str  # the name given with --data
    path: Path
    dates: pd.DatetimeIndex  # [rows], of the whole file
    columns: list[str]  # [N], those that are read
    values: np.ndarray  # [rows, N] float32, standardised
    marks: np.ndarray  # [rows, F] float32
    scaler: StandardScaler  # fitted on the training rows; mean_ and scale_ are [N] float64
    splits: Splits
    target_index: int | None  # MS: the column that counts
    seq_len: int
    label_len: int
    pred_len: int
    synthetic: bool  # made by scripts/get_data.py, not measured
    target: str | None = None  # the column that S and MS forecast, given or chosen
    filled: int = 0  # cells that were empty in the file
    mark: str = ""  # of the training rows, see data_mark

    def windows(self, flag: str) -> WindowDataset:
        """The windows of "train", "val" or "test"."""
        rows = self.splits.slice(flag, self.seq_len)
        return WindowDataset(
            self.values[rows],
            self.marks[rows],
            self.dates[rows],
            self.seq_len,
            self.label_len,
            self.pred_len,
            self.target_index,
        )


def load_series(
    data: str = "ETTh1",
    root_path: str | Path = "./dataset",
    data_path: str | Path = "ETTh1.csv",
    features: str = "M",
    target: str | None = "OT",
    freq: str | None = "h",
    embed: str = "timeF",
    percent: int = 100,
    seq_len: int = 96,
    label_len: int = 48,
    pred_len: int = 96,
    fill_missing: str | None = None,
) -> Series:
    """Read, split and standardise a file (parameters as the flags of the same names).

    `target` None is the column OT where there is one, else the last; `freq` None is read off the timestamps.

    Raises:
        InputError: file, column, name or lengths that cannot be used.
    """
    _check_lengths(seq_len, label_len, pred_len)
    table = read_table(find_csv(root_path, data_path), fill_missing)
    if target is None:
        target = "OT" if "OT" in table.columns else table.columns[-1]
    columns, chosen, target_index = _choose_columns(table, features, target)
    splits = split_rows(data, len(table.dates), seq_len, pred_len, percent, table.path)
    scaler, values = _standardise(table.path, columns, table.values[:, chosen], splits.train)
    return Series(
        data=data,
        path=table.path,
        mark=data_mark(table.values[: splits.train, chosen]),
        dates=table.dates,
        columns=columns,
        values=values,
        marks=time_marks(table.dates, freq or frequency(table.dates), embed),
        scaler=scaler,
        splits=splits,
        target_index=target_index,
        seq_len=seq_len,
        label_len=label_len,
        pred_len=pred_len,
        synthetic=is_synthetic(table.path),
        target=target,
        filled=table.filled,
    )


def _check_lengths(seq_len: int, label_len: int, pred_len: int) -> None:
    for name, value in (("seq_len", seq_len), ("pred_len", pred_len)):
        if value < 1:
            raise InputError(f"--{name} {value}: at least 1 is needed")
    if not 0 <= label_len <= seq_len:
        raise InputError(f"--label_len {label_len}: from 0 to --seq_len {seq_len} is needed")


def data_mark(values: np.ndarray) -> str:
    """What tells rows `[rows, N]` float64, in their own units, from all others: their SHA-256."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f8").tobytes()).hexdigest()


def _choose_columns(table: Table, features: str, target: str) -> tuple[list[str], list[int], int | None]:
    """Names and positions of the columns that are read, and the target's place among them (MS)."""
    if features not in ("M", "S", "MS"):
        raise InputError(f"--features {features}: unknown; needed is M, S or MS")
    if features == "M":
        return table.columns, list(range(len(table.columns))), None
    if target not in table.columns:
        raise InputError(
            f"--target {target}: no such column in {table.path}; needed is one of {', '.join(table.columns)}"
        )
    place = table.columns.index(target)
    if features == "S":
        return [target], [place], None
    return table.columns, list(range(len(table.columns))), place


def _standardise(
    path: Path, columns: list[str], values: np.ndarray, train: int
) -> tuple[StandardScaler, np.ndarray]:
    """Standardise in float64 with the training rows' mean and deviation, then go to float32 `[rows, N]`."""
    _check_size(path, columns, values, 1e150, "as it is")  # squares of more overflow float64
    scaler = StandardScaler().fit(values[:train])
    standardised = scaler.transform(values)
    _check_size(path, columns, standardised, LARGEST_STANDARDISED, "in deviations of the training rows")
    return scaler, standardised.astype(np.float32)


def _check_size(path: Path, columns: list[str], values: np.ndarray, limit: float, scale: str) -> None:
    large = np.argwhere(np.abs(values) > limit)
    if large.size:
        row, column = large[0]
        raise InputError(
            f"{path}: row {row + FIRST_ROW_LINE}, column {columns[column]!r}:"
            f" {values[row, column]:.3g} {scale} is too large to compute with; at most {limit:.0e} is needed"
        )
