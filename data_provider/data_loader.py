"""A series in its own units with the scale that training gave it, and its windows: one dataset for every file."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from data_provider.notes import Notes, row_step, wall_clock
from data_provider.splits import Splits, find_csv, split_rows
from data_provider.synthetic import is_synthetic
from data_provider.table import FIRST_ROW_LINE, Table, read_table
from data_provider.timestamps import frequency, future_dates, infer_step, step_words, time_marks
from layers.errors import input_error, listed

# The model squares standardised values in float32, which ends at 3.4e38.
LARGEST_STANDARDISED = 1e18
PIECE = 1 << 20  # values of a wide series that are computed with at a time
CHUNK = 5_000_000  # values of windows in memory at a time: 40 MB


class WindowDataset(Dataset):
    """Every window of T input and H forecast rows in a run of rows.

    Items share the memory of the arrays given; nothing is copied.

    Args:
        values: standardised, `[rows, N]` float32.
        marks: time marks, `[rows, F]` float32.
        dates: `[rows]`.
        target_index: the one column that counts (`--features MS`), else None.
        history: values once more, with rows before them, `[h + rows, N]`: an item then has the h rows before its window.
        notes: an item then has those that its window's last row knows and that speak of its forecast rows.
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
        history: np.ndarray | None = None,
        notes: Notes | None = None,
    ):
        self.values, self.marks, self.dates, self.history = values, marks, dates, history
        self.notes, self.clock = notes, wall_clock(dates)
        self.step = row_step(self.clock) if notes else 0.0
        self.seq_len, self.label_len, self.pred_len = seq_len, label_len, pred_len
        self.target_index = target_index

    def __len__(self) -> int:
        return len(self.values) - self.seq_len - self.pred_len + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Window `index`: x `[T, N]`, y `[label_len + H, N]`, x_mark, y_mark `[.., F]`, index; history `[h, N]`, and notes
        `[k, 4]`, see `Notes.about`."""
        if not 0 <= index < len(self):
            raise IndexError(f"window: got {index}, expected 0 to {len(self) - 1}")
        now = index + self.seq_len  # the first forecast row
        x, y = slice(index, now), slice(now - self.label_len, now + self.pred_len)
        earlier: dict[str, Any] = (
            {}
            if self.history is None
            else {"history": torch.from_numpy(self.history[index : index + len(self.history) - len(self.values)])}
        )
        if self.notes is not None:
            earlier["notes"] = torch.from_numpy(
                self.notes.about(self.clock[now - 1], self.clock[now : now + self.pred_len], self.step)
            )
        return earlier | {
            "x": torch.from_numpy(self.values[x]),
            "y": torch.from_numpy(self.values[y]),
            "x_mark": torch.from_numpy(self.marks[x]),
            "y_mark": torch.from_numpy(self.marks[y]),
            "index": index,
        }

    @property
    def sequence_count(self) -> int:
        """Windows times the channels that count."""
        return len(self) * (self.values.shape[1] if self.target_index is None else 1)

    def sequences(self, every: int = 1, column: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs `[m, T]` and truths `[m, H]`, float64, of the windows and of the channels that count, or one column, in
        chunks."""
        column = self.target_index if column is None else column
        values = self.values if column is None else self.values[:, [column]]
        length = self.seq_len + self.pred_len
        view = np.lib.stride_tricks.sliding_window_view(values, length, axis=0)[::every]  # [windows, N, T + H]
        step = max(1, CHUNK // (values.shape[1] * length))
        for start in range(0, len(view), step):
            chunk = view[start : start + step].reshape(-1, length).astype(np.float64)
            yield chunk[:, : self.seq_len], chunk[:, self.seq_len :]


class ChannelItems(Dataset):
    """Every window of every one of N channels by itself, channel by channel, as the published code's training has them."""

    def __init__(self, windows: WindowDataset, channels: int):
        self.windows, self.channels = windows, channels

    def __len__(self) -> int:
        return len(self.windows) * self.channels

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Item `index`: x `[T, 1]`, y `[label_len + H, 1]`, x_mark, y_mark `[.., F]`, index, channel."""
        channel, window = divmod(index, len(self.windows))
        item: dict[str, Any] = self.windows[window]
        own = {name: item[name][:, channel : channel + 1] for name in ("x", "y", "history") if name in item}
        return item | own | {"index": index, "channel": channel}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where data come from, and their columns."""

    path: Path
    columns: list[str]  # [N], those that are read
    target_index: int | None  # MS: the one of the columns that is forecast
    synthetic: bool  # made by scripts/get_data.py, not measured
    read_as: str = ""  # what was found out about the file's format and dates, for people
    notes: Notes | None = None

    @property
    def forecast_slice(self) -> slice:
        """The columns that are forecast, as places among those that are read."""
        return slice(None) if self.target_index is None else slice(self.target_index, self.target_index + 1)

    @property
    def forecast_columns(self) -> list[str]:
        return self.columns[self.forecast_slice]

    @property
    def standard_bounds(self) -> np.ndarray | None:
        """The least and the largest value of each forecast column, `[2, N]` standardised; None: there are none."""
        return None


@dataclass(frozen=True, kw_only=True)
class Series(Source):
    """A file's columns in their own units, and the mean and deviation that standardise them."""

    dates: pd.DatetimeIndex  # [rows], of the whole file
    own: np.ndarray  # [rows, N] float64, in the columns' own units
    mean: np.ndarray  # [N] float64, of the training rows
    std: np.ndarray  # [N] float64
    target: str | None  # the column that S and MS forecast, given or chosen
    filled: int = 0  # cells that were empty in the file
    bounds: np.ndarray | None = None  # [2, N] the least and the largest value that there can be, in the columns' own units

    @cached_property
    def step(self) -> pd.offsets.BaseOffset | None:
        """The step between rows, see `infer_step`."""
        return infer_step(self.dates)

    @property
    def step_words(self) -> str:
        """The step for people: "15 minutes", "irregular"."""
        return step_words(self.step)

    @cached_property
    def values(self) -> np.ndarray:
        """Standardised `[rows, N]`: in float64, then rounded to float32; a few rows at a time."""
        values = np.empty_like(self.own, dtype=np.float32)  # with the order in memory, which decides that of sums
        for rows in pieces(self.own):
            values[rows] = (self.own[rows] - self.mean) / self.std
        return values

    def to_own_units(self, standardised: np.ndarray) -> np.ndarray:
        """Values of the forecast columns `[..., N]` on the standardised scale -> float64 in their own units."""
        kept = self.forecast_slice
        return standardised.astype(np.float64) * self.std[kept] + self.mean[kept]

    def within_bounds(self, own: np.ndarray) -> np.ndarray:
        """Forecasts or ends of bands `[..., N]` in own units, none beyond the bounds."""
        return own if self.bounds is None else own.clip(*self.bounds[:, self.forecast_slice])

    @property
    def standard_bounds(self) -> np.ndarray | None:
        return None if self.bounds is None else ((self.bounds - self.mean) / self.std)[:, self.forecast_slice]

    def future_dates(self, n: int) -> pd.DatetimeIndex:
        """The n timestamps `[n]` that follow the last row.

        Raises:
            InputError: the rows have no common step.
        """
        return future_dates(self.dates, n, self.step)


@dataclass(frozen=True, kw_only=True)
class SplitSeries(Source):
    """Data that train and test, one file's (`FileSeries`) or the many series of M4 (`data_provider.m4.M4Series`): what the
    loop, the checks, the results and a checkpoint ask of them."""

    seq_len: int
    label_len: int
    pred_len: int
    fingerprint: str  # of what trains, by which a checkpoint knows it again

    def windows(self, flag: str) -> Any:
        """The dataset of "train", "val" or "test", with what `fit_ridge` asks for."""

    def windows_for_a_map(self) -> tuple[Any, Any]:
        """The windows to which a linear map is fitted, and those by which its penalty is chosen."""
        return self.windows("train"), self.windows("val")

    def as_record(self) -> Any:
        """What a checkpoint says of the data: JSON values, by which they are known again and scaled."""

    def identity(self) -> Any:
        """What a run that resumes must find again: JSON values by names for people."""


@dataclass(frozen=True, kw_only=True)
class FileSeries(Series, SplitSeries):
    """A file's series that is split, ready to be cut into windows."""

    marks: np.ndarray  # [rows, F] float32, time marks
    splits: Splits
    history: int = 0  # rows before each window that come with it; training windows without them are left out
    all_rows: bool = False  # all rows of the file train (`--refit`)

    def windows(self, flag: str, seq_len: int | None = None) -> WindowDataset:
        """See `SplitSeries`; with `seq_len` windows of so many rows instead, without history."""
        splits, T, h = self.splits, seq_len or self.seq_len, 0 if seq_len else self.history
        tested = splits.train + splits.val
        rows = {  # validation and test look back seq_len rows
            "train": slice(h, len(self.dates) if self.all_rows else splits.few_shot),
            "val": slice(splits.train - T, tested),
            "test": slice(tested - T, tested + splits.test),
        }[flag]
        lengths = T, self.label_len, self.pred_len
        history = self.values[rows.start - h : rows.stop] if h else None
        of_rows = self.values[rows], self.marks[rows], self.dates[rows]
        return WindowDataset(*of_rows, *lengths, self.target_index, history, self.notes)

    @property
    def trained_until(self) -> pd.Timestamp:
        """The date of the last row that trains."""
        return self.dates[(len(self.dates) if self.all_rows else self.splits.few_shot) - 1]

    def windows_for_a_map(self) -> tuple[WindowDataset, WindowDataset]:
        return replace(self, all_rows=False).windows("train"), self.windows("val")

    def as_record(self) -> dict[str, Any]:
        return {
            "data": {
                "file": self.path.name,
                "rows": len(self.dates),
                "synthetic": self.synthetic,
                "step": self.step_words,
                "learned_until": str(self.trained_until),
                "mark": {"rows": self.splits.train, "sha256": self.fingerprint},
            },
            "columns": self.columns,
            "target": self.target,
            "scaler": {"mean": self.mean.tolist(), "deviation": self.std.tolist()},
        }

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.values.tobytes() + self.dates.asi8.tobytes()).hexdigest()
        notes = {} if self.notes is None else {"notes (SHA-256)": self.notes.digest()}
        return {"columns": self.columns, "number of rows": len(self.dates), "values (SHA-256)": digest} | notes


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
    encoding: str | None = None,
    date_column: str | None = None,
    id_column: str | None = None,
    drop_columns: Sequence[str] | None = None,
    dayfirst: bool | None = None,
    bounds: Sequence[str] | None = None,
) -> FileSeries:
    """Read, split and standardise a file (parameters as the flags of the same names).

    `target` None is the column OT where there is one, else the last; `freq` None is read off the timestamps.

    Raises:
        InputError: file, column, or lengths that cannot be used.
    """
    # Only now: scikit-learn takes half a second to load, and a forecast from a checkpoint has its scaler there.
    from sklearn.preprocessing import StandardScaler

    table, target = _choose(
        read_table(find_csv(root_path, data_path), fill_missing, encoding, date_column, id_column, drop_columns, dayfirst),
        features,
        target,
    )
    columns, own = table.columns, table.values
    splits = split_rows(data, len(table.dates), seq_len, pred_len, percent, table.path)
    scaler = StandardScaler().fit(own[: splits.train])
    check_size(table.path, columns, own, scaler.mean_, scaler.scale_)
    return FileSeries(
        path=table.path,
        dates=table.dates,
        columns=columns,
        own=own,
        mean=scaler.mean_,
        std=scaler.scale_,
        target=target,
        target_index=columns.index(target) if features == "MS" else None,
        synthetic=is_synthetic(table.path),
        filled=table.filled,
        read_as=table.read_as,
        bounds=bounds_of(bounds, columns),
        marks=time_marks(table.dates, freq or frequency(infer_step(table.dates)), embed),
        splits=splits,
        seq_len=seq_len,
        label_len=label_len,
        pred_len=pred_len,
        fingerprint=fingerprint(own[: splits.train]),
    )


def bounds_of(words: Sequence[str] | None, columns: list[str]) -> np.ndarray | None:
    """What --bounds says, `[2, N]`: the least and the largest value of each column, infinite where there is none.

    Args:
        words: a pair for all columns, ["0", "none"], or parts such as "rain:0:none" (or one word with commas);
            None: no bounds.

    Raises:
        InputError: another form, a column that there is not, or a least value that is not below the largest.
    """
    if not words:
        return None
    none = -np.inf, np.inf
    found = np.repeat(np.reshape(none, (2, 1)), len(columns), axis=1)
    parts = [":".join([":", *words])] if len(words) == 2 and not any(":" in word for word in words) else words
    for part in ",".join(parts).split(","):
        name, *ends = part.rsplit(":", 2)
        try:
            low, high = (free if end.lower() == "none" else float(end) for free, end in zip(none, ends, strict=True))
        except ValueError:
            low = high = np.nan
        if not low < high or name not in (":", *columns):
            expected = "a least and a largest value, --bounds 0 none, or parts such as rain:0:none of the columns "
            raise input_error("--bounds", repr(part.strip(":")), expected + listed(columns))
        found[:, [name in (":", column) for column in columns]] = [[low], [high]]
    return found


def own_scale(table: Table, features: str, target: str | None, bounds: Sequence[str] | None = None) -> Series:
    """The columns of a file that are forecast, on the file's own scale, for one that no training saw:
    the mean and deviation of all its rows.

    Args:
        features, target, bounds: as the flags of the same names.

    Raises:
        InputError: no such column.
    """
    table, target = _choose(table, "S" if features == "MS" else features, target)
    columns, own = table.columns, table.values
    std = own.std(axis=0)
    return Series(
        path=table.path,
        dates=table.dates,
        columns=columns,
        own=own,
        mean=own.mean(axis=0),
        std=np.where(std > 0, std, 1.0),
        target=target,
        target_index=None,  # it is the only column that is left
        synthetic=is_synthetic(table.path),
        filled=table.filled,
        read_as=table.read_as,
        bounds=bounds_of(bounds, columns),
    )


# The columns that are read, and the target: the one given, else OT, else the last.
#
# With M the target is a name that nothing looks up.
def _choose(table: Table, features: str, target: str | None) -> tuple[Table, str]:
    if target is None:
        target = "OT" if "OT" in table.columns else table.columns[-1]
    if features != "M" and target not in table.columns:
        raise input_error("--target", repr(target), f"one of the columns of {table.path}: {listed(table.columns)}")
    return table.only([target] if features == "S" else table.columns), target


def check_size(path: Path, columns: list[str], own: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Raise InputError for a value `[rows, N]`, scaled by `mean` and `deviation` `[N]`, too large to compute with."""
    for rows in pieces(own):
        values = (own[rows] - mean) / std
        large = np.argwhere(np.abs(values) > LARGEST_STANDARDISED)
        if large.size:
            row, column = large[0]
            raise input_error(
                f"{path}: row {rows.start + row + FIRST_ROW_LINE}, column {columns[column]!r}",
                f"{values[row, column]:.3g} in deviations of the training rows, too large to compute with",
                f"at most {LARGEST_STANDARDISED:.0e}",
            )


def fingerprint(values: np.ndarray) -> str:
    """What tells rows `[rows, N]` float64, in their own units, from all others: their SHA-256."""
    digest = hashlib.sha256()
    for rows in pieces(values):
        digest.update(np.ascontiguousarray(values[rows], dtype="<f8").tobytes())
    return digest.hexdigest()


def pieces(values: np.ndarray) -> Iterator[slice]:
    """The rows of `[rows, N]` in pieces of about PIECE values: what is computed of them takes no second such array."""
    step = max(1, PIECE // values.shape[1])
    return (slice(start, start + step) for start in range(0, len(values), step))
