"""The M4 competition's files, many series of different lengths in one wide file and what follows each in another, and the
windows that are cut from them.

A line is a series: its id, then its values, as many as it has. Everything that can be wrong with such a file is found
here, and named by file, line and series. Shapes: T = seq_len, H = pred_len.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from data_provider.data_loader import CHUNK, LARGEST_STANDARDISED, SplitSeries
from data_provider.splits import PATTERNS, Pattern, find_m4
from data_provider.synthetic import SYNTHETIC_ID
from layers.errors import input_error

CHOOSING = 5
STILL = 1e-6  # of its level: a history that deviates less stands still
ABSENT = ("", "NA", "NaN", "nan")  # cells behind a series' last value


def read_wide(path: Path) -> dict[str, np.ndarray]:
    """The series of a wide file by their ids, in the file's order, each `[values]` float64.

    Raises:
        InputError: unreadable, no series, an id twice, a cell that is no number, a gap, or a series without values.
    """
    series: dict[str, np.ndarray] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(file, "")
            cells = next(csv.reader([header]), [])
            if len(cells) > 1 and pd.notna(pd.to_numeric(cells[1], errors="coerce")):  # a series, which would be lost
                raise input_error(f"{path}: row 1", f"the values of a series, {header[:30]!r}...", "a header")
            # Most cells of most lines are the empty ones of the longest series: they go before the line is parsed.
            for number, cells in enumerate(csv.reader(line.rstrip("\r\n,") for line in file), 2):
                if not cells:
                    continue
                name = cells[0].strip()
                place = f"{path}: row {number}, series {name!r}"
                if not name or name in series:
                    raise input_error(place, "an id that stands twice" if name else "no id", "an id of its own")
                series[name] = _values(place, [cell.strip() for cell in cells[1:]])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise input_error(path, f"an unreadable file ({error})", "a wide CSV file") from None
    return series


def _values(place: str, cells: list[str]) -> np.ndarray:
    while cells and cells[-1] in ABSENT:
        cells.pop()
    if not cells:
        raise input_error(place, "no values", "at least one, or no such line")
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        values = pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~(np.abs(values) <= LARGEST_STANDARDISED))  # NaN is none either
    if wrong.size:
        cell = cells[wrong[0]]
        raise input_error(
            f"{place}, value {wrong[0] + 1}",
            "an empty cell between its values" if cell in ABSENT else repr(cell[:40]),
            f"a number of at most {LARGEST_STANDARDISED:.0e}",
        )
    return values


class M4Windows(Dataset):
    """A window of each series: its T values before a cut, and the H behind it.

    Where either is shorter it is padded with zeros, and masks x_mask `[T, 1]` and y_mask `[H, 1]` are 1 where there is a
    value. The number of an item says the series, and where in `cuts` it is cut: the item depends on nothing else.

    Args:
        ids, series: `[S]` names, and values `[values]` in their own units.
        cuts: `[S]` the places where each may be cut, in values before the cut.
        drawn: which of them is drawn for each epoch, see `EpochBatches`.
    """

    def __init__(
        self,
        ids: list[str],
        series: list[np.ndarray],
        cuts: list[range],
        lengths: tuple[int, int, int],
        drawn: bool = False,
    ):
        self.ids, self.series, self.cuts, self.drawn = ids, series, cuts, drawn
        self.lengths = self.seq_len, self.label_len, self.pred_len = lengths

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """x `[T, 1]`, y `[label_len + H, 1]`, marks without columns, index, and the masks."""
        draw, number = divmod(index, len(self))
        values, cuts = self.series[number], self.cuts[number]
        cut, T, H = cuts[draw % len(cuts)], self.seq_len, self.pred_len
        rows = torch.zeros(T + H, 2)  # the values, and whether there is one
        known = torch.from_numpy(values[max(cut - T, 0) : cut + H].astype(np.float32))
        start = T - min(cut, T)
        rows[start : start + len(known)] = torch.stack([known, torch.ones_like(known)], dim=1)
        y = rows[T - self.label_len :, :1]
        return {
            "x": rows[:T, :1],
            "y": y,
            "x_mark": torch.zeros(T, 0),
            "y_mark": torch.zeros(len(y), 0),
            "index": index,
            "x_mask": rows[:T, 1:],
            "y_mask": rows[T:, 1:],
        }

    # Windows that are whole on both sides.
    @property
    def sequence_count(self) -> int:
        return sum(len(self.whole(number)) for number in range(len(self)))

    def sequences(self, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs `[m, T]` and truths `[m, H]` of every k-th window that is whole on both sides, each in units of its
        history's deviation, so that all count alike; a history that stands still is left out."""
        rows = [row for number in range(len(self)) for row in self.whole(number)][::every]
        step = max(1, CHUNK // (self.seq_len + self.pred_len))
        for start in range(0, len(rows), step):
            chunk = np.stack(rows[start : start + step])
            x = chunk[:, : self.seq_len]
            moves, mean, std = self.moves(x), x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
            chunk = (chunk[moves] - mean[moves]) / std[moves]
            yield chunk[:, : self.seq_len], chunk[:, self.seq_len :]

    # The windows of the series with these numbers alone.
    def subset(self, chosen: Sequence[int]) -> "M4Windows":
        ids, series = [self.ids[n] for n in chosen], [self.series[n] for n in chosen]
        return M4Windows(ids, series, [self.cuts[n] for n in chosen], self.lengths, self.drawn)

    # The windows `[cuts, T + H]` of a series that are whole.
    def whole(self, number: int) -> np.ndarray:
        values, length = self.series[number], self.seq_len + self.pred_len
        if len(values) < length:
            return np.empty((0, length))
        return np.lib.stride_tricks.sliding_window_view(values[max(self.cuts[number].start - self.seq_len, 0) :], length)

    @staticmethod
    def moves(x: np.ndarray) -> np.ndarray:
        return x.std(axis=1) > STILL * np.abs(x.mean(axis=1))


@dataclass(frozen=True, kw_only=True)
class M4Series(SplitSeries):
    """The series of a pattern.

    Their values stay in their own units: no two series have a scale in common, and the model normalises every window by
    itself. They have no dates.

    The last horizon of each training series is held out for validation; the published code takes the test set for that.
    """

    pattern: str
    kind: Pattern  # what the competition says of it
    ids: list[str]  # [S]
    known: list[np.ndarray]  # [S] of [values] float64, as the training file has them
    future: np.ndarray  # [S, H] float64, the test file

    # The step between values for people.
    @property
    def step_words(self) -> str:
        return self.kind.step

    def as_record(self) -> dict[str, Any]:
        return {
            "data": {
                "file": self.path.name,
                "rows": len(self.ids),
                "synthetic": self.synthetic,
                "step": self.step_words,
                "mark": {"rows": len(self.ids), "sha256": self.fingerprint},
            },
            "columns": self.columns,
            "target": None,
            "scaler": {"mean": [0.0], "deviation": [1.0]},  # none: a series stays in its own units
        }

    def identity(self) -> dict[str, Any]:
        # The test file is no part of it, for no training reads it.
        content = hashlib.sha256(json.dumps([self.ids, self.fingerprint]).encode()).hexdigest()
        return {"number of series": len(self.ids), "training series (SHA-256)": content}

    def windows(self, flag: str) -> M4Windows:
        H, lengths = self.pred_len, (self.seq_len, self.label_len, self.pred_len)
        if flag == "test":
            series = [np.append(v[-self.seq_len :], future) for v, future in zip(self.known, self.future, strict=True)]
        else:
            series = [values if flag == "val" else values[:-H] for values in self.known]
        if flag == "train":
            cuts = [range(max(1, len(values) - int(self.kind.recent * H)), len(values)) for values in series]
        else:
            cuts = [range(len(values) - H, len(values) - H + 1) for values in series]
        all_windows = M4Windows(self.ids, series, cuts, lengths, drawn=flag == "train")
        return all_windows.subset([n for n, places in enumerate(cuts) if places and places.start > 0])

    def windows_for_a_map(self) -> tuple[M4Windows, M4Windows]:
        # Training windows, and every CHOOSINGth of them chooses. The validation windows all lie at one moment, which says
        # little of others: the map that is best there reverts to the mean, for example, where the series did so just then.
        # A series that stands still says nothing of either.
        train, T = self.windows("train"), self.seq_len
        used = [n for n in range(len(train)) if train.moves(train.whole(n)[:, :T]).any()] or list(range(len(train)))
        choosing = used[::CHOOSING]
        return train.subset([n for n in used if n not in set(choosing)] or used), train.subset(choosing)


def load_m4(root_path: str | Path, seasonal_patterns: str, seq_len: int, label_len: int, pred_len: int) -> M4Series:
    """Read the two files of a pattern (parameters as the flags of the same names).

    Raises:
        InputError: a file is missing or cannot be used, or they have not the same series.
    """
    train, test = find_m4(root_path, seasonal_patterns)
    known, future = read_wide(train), read_wide(test)
    for name in known | future:
        if name not in known:
            raise input_error(f"{test}: series {name!r}", "no such series in the training file", f"the ids of {train}")
        if (found := len(future.get(name, ()))) != pred_len:
            raise input_error(
                f"{test}: series {name!r}", f"{found} values", f"{pred_len}, the horizon of {seasonal_patterns}"
            )
    if all(len(values) <= pred_len + 1 for values in known.values()):
        raise input_error(
            train,
            f"{len(known)} series, all shorter",
            f"at least one of {pred_len + 2} values: a horizon to validate on, and two to cut",
        )
    digest = hashlib.sha256()  # of lengths and values: it tells these series from all others
    for values in known.values():
        digest.update(len(values).to_bytes(8, "little") + np.ascontiguousarray(values, dtype="<f8").tobytes())
    return M4Series(
        path=train,
        columns=["value"],
        target_index=None,
        fingerprint=digest.hexdigest(),
        pattern=seasonal_patterns,
        kind=PATTERNS[seasonal_patterns],
        ids=list(known),
        known=list(known.values()),
        future=np.stack([future[name] for name in known]),
        synthetic=any(name.startswith(SYNTHETIC_ID) for name in known),
        seq_len=seq_len,
        label_len=label_len,
        pred_len=pred_len,
    )
