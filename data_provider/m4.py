"""The M4 competition's files: many series of different lengths in one wide file, and what follows each in another.

A line is a series: its id, then its values, as many as it has. Everything that can be wrong with such a file is found
here, and named by file, line and series.
"""

import csv
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from data_provider.data_loader import LARGEST_STANDARDISED, SplitSeries
from data_provider.m4_windows import Cuts, Ends
from data_provider.patterns import M4, PATTERNS, Pattern, find_m4
from data_provider.splits import Splits
from layers.errors import input_error

SYNTHETIC_ID = "synthetic"  # how the ids of series begin that `scripts/get_data.py` has made up
CHOOSING = 5
ABSENT = ("", "NA", "NaN", "nan")  # cells behind a series' last value


def read_wide(path: Path, most: int | None = None) -> dict[str, np.ndarray]:
    """The series of a wide file by their ids, in the file's order, each `[values]` float64.

    Args:
        most: values that a line may have; what is left of its cells must be empty.

    Raises:
        InputError: unreadable, no series, an id twice, a cell that is no number, a gap, or a series without values.
    """
    series: dict[str, np.ndarray] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            _check_header(path, next(file, ""))
            # Most cells of most lines are the empty ones of the longest series: they go before the line is parsed.
            lines = csv.reader(line.rstrip("\r\n,") for line in file)
            for number, cells in enumerate(lines, 2):
                if not cells:
                    continue
                name = cells[0].strip()
                place = f"{path}: row {number}, series {name!r}"
                if not name or name in series:
                    raise input_error(place, "no id" if not name else "an id that stands twice", "an id of its own")
                series[name] = _numbers(place, [cell.strip() for cell in cells[1:]], most)
    except FileNotFoundError:
        raise input_error(path, "no such file", "a wide CSV file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise input_error(path, f"an unreadable file ({error})", "a wide CSV file") from None
    if not series:
        raise input_error(path, "no series", "a header, then a line a series: an id and its values")
    return series


def _check_header(path: Path, line: str) -> None:
    """A first line with numbers is a series, which would be lost without a word."""
    cells = next(csv.reader([line]), [])
    if len(cells) > 1 and not np.isnan(_number(cells[1])):
        raise input_error(f"{path}: row 1", f"the values of a series, {line[:30]!r}...", "a header")


def _numbers(place: str, cells: list[str], most: int | None) -> np.ndarray:
    while cells and cells[-1] in ABSENT:
        cells.pop()
    if not cells:
        raise input_error(place, "no values", "at least one, or no such line")
    if most is not None and len(cells) > most:
        raise input_error(place, f"{len(cells)} values", f"at most {most}")
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        values = np.array([_number(cell) for cell in cells])
    wrong = np.flatnonzero(~(np.abs(values) <= LARGEST_STANDARDISED))  # NaN is none either
    if wrong.size:
        cell = cells[wrong[0]]
        got = "an empty cell between its values" if cell in ABSENT else repr(cell[:40])
        raise input_error(f"{place}, value {wrong[0] + 1}", got, f"a number of at most {LARGEST_STANDARDISED:.0e}")
    return values


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


@dataclass(frozen=True, kw_only=True)
class M4Series(SplitSeries):
    """The series of a pattern, in the place of the one file of other data sets.

    Their values stay in their own units (the mean is 0 and the deviation 1): no two series have a scale in common, and the
    model normalises every window by itself. They have no dates.

    The last horizon of each training series is held out for validation; the published code takes the test set for that.
    """

    pattern: str
    ids: list[str]  # [S]
    known: list[np.ndarray]  # [S] of [values] float64, as the training file has them
    future: np.ndarray  # [S, H] float64, the test file

    @property
    def kind(self) -> Pattern:
        """What the competition says of the pattern."""
        return PATTERNS[self.pattern]

    @property
    def rows(self) -> int:
        """How many series there are."""
        return len(self.ids)

    @property
    def step_words(self) -> str:
        """The step between values for people."""
        return self.kind.step

    def identity(self) -> dict[str, Any]:
        """See `SplitSeries`; the test file is no part of it, for no training reads it."""
        return {"number of series": len(self.ids), "training series (SHA-256)": content(self.ids, self.known)}

    def windows(self, flag: str) -> Dataset:  # type: ignore[override]
        """The windows of "train", "val" or "test"; see `data_provider.m4_windows`."""
        lengths = self.seq_len, self.label_len, self.pred_len
        if flag == "test":
            return Ends(self.ids, self.known, list(self.future), *lengths)
        H = self.pred_len
        if flag == "val":
            held = [n for n, values in enumerate(self.known) if len(values) > H]
            return Ends(
                [self.ids[n] for n in held],
                [self.known[n][:-H] for n in held],
                [self.known[n][-H:] for n in held],
                *lengths,
            )
        used = [n for n, values in enumerate(self.known) if len(values) > H + 1]
        return Cuts([self.ids[n] for n in used], [self.known[n][:-H] for n in used], *lengths, int(self.kind.recent * H))

    def windows_for_a_map(self) -> tuple[Cuts, Cuts]:  # type: ignore[override]
        """Training windows of most series, and those of every `CHOOSING`th, by which the penalty is chosen.

        The validation windows all lie at one moment, which says little of others: the map that is best there reverts to the
        mean, for example, where the series did so just then. A series that stands still says nothing of either.
        """
        train = self.windows("train")
        assert isinstance(train, Cuts)
        used = train.moving() or list(range(len(train)))
        choosing = set(used[::CHOOSING])
        fitted = [n for n in used if n not in choosing] or used
        return train.some(fitted), train.some(sorted(choosing))


def load_m4(root_path: str | Path, seasonal_patterns: str, seq_len: int, label_len: int, pred_len: int) -> M4Series:
    """Read the two files of a pattern (parameters as the flags of the same names).

    Raises:
        InputError: a file is missing or cannot be used, or they have not the same series.
    """
    train, test = find_m4(root_path, seasonal_patterns)
    known, future = read_wide(train), read_wide(test, pred_len)
    for name in future:
        if name not in known:
            raise input_error(f"{test}: series {name!r}", "no such series in the training file", f"the ids of {train}")
    for name in known:
        found = len(future[name]) if name in future else 0
        if found != pred_len:
            raise input_error(
                f"{test}: series {name!r}", f"{found} values", f"{pred_len}, the horizon of {seasonal_patterns}"
            )
    usable = sum(len(values) > pred_len + 1 for values in known.values())
    if not usable:
        expected = f"at least one of {pred_len + 2} values: a horizon to validate on, and two to cut"
        raise input_error(train, f"{len(known)} series, all shorter", expected)
    return M4Series(
        path=train,
        dates=pd.DatetimeIndex([]),
        columns=["value"],
        own=np.empty((0, 1)),
        mean=np.zeros(1),
        deviation=np.ones(1),
        target=None,
        target_index=None,
        synthetic=any(name.startswith(SYNTHETIC_ID) for name in known),
        data=M4,
        freq=None,
        embed="timeF",
        splits=Splits(len(known), usable, len(known), usable),
        seq_len=seq_len,
        label_len=label_len,
        pred_len=pred_len,
        fingerprint=fingerprint(known.values()),
        pattern=seasonal_patterns,
        ids=list(known),
        known=list(known.values()),
        future=np.stack([future[name] for name in known]),
    )


def fingerprint(series: Iterable[np.ndarray]) -> str:
    """What tells the training series from all others: the SHA-256 of their lengths and values."""
    digest = hashlib.sha256()
    for values in series:
        digest.update(len(values).to_bytes(8, "little") + np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def content(ids: list[str], series: Iterable[np.ndarray]) -> str:
    """What tells named series from all others: the SHA-256 of their ids, lengths and values."""
    names = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return hashlib.sha256((names + fingerprint(series)).encode()).hexdigest()
