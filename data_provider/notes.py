"""Notes: texts with dates beside a series, and what a forecast may know of them.

A note holds from its date to `until`, of which a day is held to its end; without one, until the next such note begins, as a
status line does. It exists for a
forecast from its date on, or from `known` on, which may be earlier: what a window's last row does not know of is not there.
"""

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import tzinfo
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.splits import csv_places
from data_provider.table import FIRST_ROW_LINE, read_cells
from data_provider.timestamps import read_timestamps
from layers.errors import input_error, listed

LONGEST = 10_000  # characters of a note
ALWAYS = np.iinfo(np.int64).min  # known before any row
NEVER = np.iinfo(np.int64).max  # an end that the next note sets
DAY = pd.Timedelta(days=1).value
DAY_ALONE = re.compile(r"\d+[-/.]\d+[-/.]\d+")


@dataclass(frozen=True)
class Notes:
    """n notes in the order of their beginnings; times are those of a wall clock, in nanoseconds."""

    texts: list[str]  # [V], each once
    text: np.ndarray  # [n] which of them
    start: np.ndarray  # [n]
    until: np.ndarray  # [n]
    known: np.ndarray  # [n]
    read_as: str = ""  # in which order its dates were read, where there are two

    def about(self, now: int, ahead: np.ndarray, step: float) -> np.ndarray:
        """The notes known at `now`, a window's last row, that speak of the H forecast rows `ahead`.

        Args:
            step: see `row_step`.

        Returns:
            `[k, 4]` int64: the text's number; the first and the last of the rows, from 0 on; and the row with which the note
            begins, negative where that is in the window or before it.
        """
        seen = np.flatnonzero(self.known <= now)
        start, until = self.start[seen], self.until[seen].copy()
        status = np.flatnonzero(until == NEVER)
        until[status[:-1]] = start[status[1:]] - 1
        first, last = np.searchsorted(ahead, start), np.searchsorted(ahead, until, side="right") - 1
        began = np.rint((start - ahead[0]) / step).astype(np.int64)
        return np.stack([self.text[seen], first, last, began], axis=1)[first <= last]

    def latest(self, now: pd.Timestamp, most: int) -> list[tuple[pd.Timestamp, pd.Timestamp, str]]:
        """Beginning, end (where there is none the beginning) and text of the notes known at `now` that begin last."""
        ends = np.where(self.until == NEVER, self.start, self.until)
        seen = np.flatnonzero(self.known <= wall_clock([now])[0])[-most:]
        return [(*(pd.Timestamp(of[n], tz=now.tz) for of in (self.start, ends)), self.texts[self.text[n]]) for n in seen]

    def shuffled(self, seed: int) -> "Notes":
        """The same texts among the same dates in another order."""
        return replace(self, text=np.random.default_rng(seed).permutation(self.text))

    def digest(self) -> str:
        """SHA-256 of all that they say."""
        said = json.dumps([self.texts, *(of.tolist() for of in (self.text, self.start, self.until, self.known))])
        return hashlib.sha256(said.encode()).hexdigest()


def wall_clock(dates: pd.DatetimeIndex | list[pd.Timestamp]) -> np.ndarray:
    """Timestamps as nanoseconds, without their time zone."""
    return pd.DatetimeIndex(dates).tz_localize(None).as_unit("ns").asi8


def row_step(clock: np.ndarray) -> float:
    """The usual time from a row to the next one, in nanoseconds, whatever gaps there are, and rows that come twice."""
    return float(np.median(np.diff(np.unique(clock))))


def notes_from_args(args: Namespace, path: Path, dates: pd.DatetimeIndex, frame: pd.DataFrame | None = None) -> Notes | None:
    """The notes of `--text_path`, of `--text_column` and of `--holidays`; None without.

    Args:
        path: the data's file.
        dates: its timestamps: their time zone is that of the notes, their years are those of the holidays.
        frame: notes of a program, which stand for those of `--text_path`.

    Raises:
        InputError: a file that cannot be read as notes, or a country of which the package holidays knows nothing.
    """
    held, told = [], list[str]()
    if frame is not None:
        held.append(_read("notes", frame, args.dayfirst, 0, dates.tz, told, sparse=True))
    elif args.text_path:
        places = [Path(args.text_path), *csv_places(args.root_path, args.text_path)]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise input_error("--text_path", f"no file {args.text_path}", f"one of {', '.join(map(str, places))}")
        held.append(_read(str(file), read_cells(file, args.encoding), args.dayfirst, FIRST_ROW_LINE, dates.tz, told))
    if args.text_column and frame is None:
        cells = read_cells(path, args.encoding)
        names = [*map(str, cells.columns)]
        date = args.date_column or next((name for name in names if name.lower() == "date"), names[0])
        if args.text_column not in names:
            raise input_error("--text_column", repr(args.text_column), f"one of the columns of {path}: {listed(names)}")
        cells = cells.set_axis(names, axis=1)[[date, args.text_column]].set_axis(["date", "text"], axis=1)
        held.append(_read(str(path), cells, args.dayfirst, FIRST_ROW_LINE, dates.tz, [], sparse=True))
    if args.holidays:
        held.append(_holidays(args.holidays, range(dates[0].year, dates[-1].year + 3)))
    if not held:
        return None
    every = pd.concat(held, ignore_index=True).sort_values("start", kind="stable")
    number, texts = pd.factorize(every["text"])
    start, until, known = (every[name].to_numpy(np.int64) for name in ("start", "until", "known"))
    return Notes(list(texts), number, start, until, known, "".join(told))


# Cells of notes -> text, start, until, known; `told` gets the order of their dates. `sparse`: a row may have no text.
def _read(
    source: str, cells: pd.DataFrame, dayfirst: bool | None, first_row: int, zone: tzinfo | None, told: list[str],
    sparse: bool = False,
) -> pd.DataFrame:  # fmt: skip
    if not {"date", "text"} <= set(cells.columns):
        found, expected = [*map(str, cells.columns)], "date, text, and if need be until, known"
        raise input_error(source, f"the columns {found}"[:500], expected)
    text = cells["text"].fillna("").astype(str).str.strip().reset_index(drop=True)
    cells = cells.reset_index(drop=True).reindex(columns=["date", "until", "known"])
    # All at once: one order of day and month is that of all, with a time and without.
    given = pd.concat(
        [cells[name].where(cells[name].notna(), cells["date"]).astype(object) for name in cells], ignore_index=True
    ).map(lambda cell: f"{cell} 00:00" if DAY_ALONE.fullmatch(str(cell)) else cell)
    read, order = read_timestamps(given, source, first_row, dayfirst, [*cells.columns])
    read = read if read.tz is None or zone is None else read.tz_convert(zone)
    # In microseconds until the year 2255: nanoseconds end in 2262.
    start, until, known = 1000 * read.tz_localize(None).as_unit("us").asi8.clip(-9e15, 9e15).astype(int).reshape(3, -1)
    told.append(order)
    # A day is held to its end; one that is written with a time ends then.
    timed = cells["until"].map(lambda cell: isinstance(cell, str) and ":" in cell).to_numpy(bool) | (until % DAY > 0)
    until = np.where(cells["until"].isna(), NEVER, until + np.where(timed, 0, DAY - 1))
    for wrong, name, expected in (
        (~text.str.len().between(1 - sparse, LONGEST).to_numpy(), "text", f"1 to {LONGEST:,} characters"),
        (until < start, "until", "nothing, or no time before the note's date"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            raise input_error(
                f"{source}: row {row + first_row}, column {name!r}",
                f"{len(text[row]):,} characters" if name == "text" else repr(str(cells[name][row])),
                expected,
            )
    return pd.DataFrame({"text": text, "start": start, "until": until, "known": known})[text != ""]


def _holidays(code: str, years: Iterable[int]) -> pd.DataFrame:
    try:
        import holidays  # optional: requirements.txt does not ask for it
    except ImportError:
        raise input_error(
            "--holidays", "no package holidays", "an installed one", "install it with: pip install holidays"
        ) from None
    country, _, part = code.partition("-")
    try:
        found = holidays.country_holidays(country, subdiv=part or None, years=years)
    except NotImplementedError as error:
        raise input_error(
            "--holidays", repr(code), "a country such as DE, or a part of one such as DE-BY", str(error)
        ) from None
    start = wall_clock(pd.DatetimeIndex([*found]))
    return pd.DataFrame({"text": [*found.values()], "start": start, "until": start + DAY - 1, "known": ALWAYS})
