"""Forecasts of the future: what goes before them, and the rows and bands that follow it."""

import itertools
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data_provider.batches import Batch, Windows
from data_provider.data_loader import Series, check_size, own_scale
from data_provider.description import bank_file, make_description
from data_provider.splits import csv_places, find_csv
from data_provider.synthetic import is_synthetic
from data_provider.table import FRAME, Table, read_table
from data_provider.timestamps import gaps_in, time_marks
from layers.errors import input_error, listed
from utils.results.bands import Intervals, continued, deviations, name_of
from utils.saving.checkpoint import Checkpoint
from utils.training.evaluate import Shared, forecast_within_memory
from utils.training.session import Job

SEQUENCES = 64  # run at once at most


class History(NamedTuple):
    """What a forecast goes on from."""

    series: Series
    trained: bool  # scaler and columns are those of the checkpoint; else the file's own
    notes: list[str]  # lines for the user


def read_history(args: Namespace, checkpoint: Checkpoint) -> History:
    """The rows to go on from: those of `--predict_path`, else of `--data_path`.

    Scaler and columns are the checkpoint's. With a checkpoint of other data (`--checkpoint` with a
    data set of its own, or an old file without a record) they are the file's own. Fills in
    `prompt_text` and `enc_in`.

    Raises:
        InputError: fewer than seq_len rows, columns of the training missing, or an unreadable file.
    """
    if checkpoint.record:
        checkpoint.scaler()  # refused here, before a file is read
    elif args.predict_path:
        got = "a file of older code, which does not say its columns"
        raise input_error(f"--checkpoint {checkpoint.file}", got, "one with a record for --predict_path; use --data_path")
    table = read_table(_find(args), args.fill_missing)
    if len(table.dates) < args.seq_len:
        raise input_error(table.path, f"{len(table.dates)} rows", f"at least --seq_len {args.seq_len}")
    trained = bool(checkpoint.record) and (bool(args.predict_path) or checkpoint.trained_on(table))
    notes = [f"{table.filled} empty cells filled (--fill_missing {args.fill_missing})"] if table.filled else []
    if trained:
        series = on_the_trainings_scale(table, checkpoint, args)
        args.prompt_text = args.prompt_text or checkpoint.prompt_text
        notes += _differences(table, series, checkpoint)
    else:
        series = own_scale(table, args.features, args.target)
        notes.append(f"zero-shot: {table.path.name} is not the data of the checkpoint; its own mean and deviation are used")
        if args.data == "custom" and not args.prompt_text and not bank_file(args):
            low, high = series.own.min(axis=0), series.own.max(axis=0)
            args.prompt_text = make_description(series.dates, series.columns, low, high)
    gaps = gaps_in(series.dates[-args.seq_len :], series.step)
    if gaps:
        between = "between {} and {}".format(*gaps[0])
        more = f", and {len(gaps) - 1} more gaps" if len(gaps) > 1 else ""
        notes.append(f"WARNING: rows are missing {between}{more}, where the forecast goes on from; fill them first")
    args.enc_in = len(series.columns)
    return History(series, trained, notes)


def _find(args: Namespace) -> Path:
    if args.predict_path is None:
        return find_csv(args.root_path, args.data_path)
    path = Path(args.predict_path)
    places = list(dict.fromkeys([path, *csv_places(args.root_path, args.predict_path)]))
    found = [place for place in places if place.is_file()]
    if not found:
        raise input_error("--predict_path", f"no file {path}", f"a CSV in one of {', '.join(map(str, places))}")
    return found[0]


def no_rows_yet(args: Namespace, checkpoint: Checkpoint) -> History:
    """The columns and the scale of a training, for rows that come later, from a program. Fills in as `read_history`.

    Raises:
        InputError: the checkpoint is one of older code, which has no record.
    """
    if not checkpoint.record:
        got = "a file of older code, which does not say its columns"
        raise input_error(f"--checkpoint {checkpoint.file}", got, "one with a record")
    names = checkpoint.scaler()[0]
    empty = Table(FRAME, pd.DatetimeIndex([]), names, np.empty((0, len(names))))
    series = on_the_trainings_scale(empty, checkpoint, args)
    args.prompt_text = args.prompt_text or checkpoint.prompt_text
    args.enc_in = len(series.columns)
    return History(series, True, [])


def on_the_trainings_scale(table: Table, checkpoint: Checkpoint, args: Namespace) -> Series:
    """The columns that the training forecast, with its mean and deviation.

    Raises:
        InputError: the table lacks one of them, or has values too large to compute with.
    """
    names, mean, deviation = checkpoint.scaler()
    target = checkpoint.record.get("target") or args.target
    if args.features == "MS":
        if target not in names:
            raise input_error("--target", repr(target), f"one of the training's columns: {listed(names)}")
        place = names.index(target)
        names, mean, deviation = [target], mean[[place]], deviation[[place]]
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise input_error(table.path, f"no column {missing[0]!r}", f"the columns of the training: {listed(names)}")
    own = table.values[:, [table.columns.index(name) for name in names]]
    check_size(table.path, names, own, mean, deviation)
    return Series(
        path=table.path,
        dates=table.dates,
        columns=names,
        own=own,
        mean=mean,
        deviation=deviation,
        target=target,
        target_index=None,  # where there is one, it is the only column
        synthetic=is_synthetic(table.path),
        filled=table.filled,
    )


def _differences(table: Table, series: Series, checkpoint: Checkpoint) -> list[str]:
    """Lines about what the file has otherwise than the training had."""
    notes = []
    extra = [name for name in table.columns if name not in checkpoint.record["columns"]]
    if extra and checkpoint.flags.get("features") == "M":
        notes.append(f"not forecast, for the training did not have them: {listed(extra)}")
    trained = checkpoint.record["data"].get("step")
    if trained not in (None, series.step_words):
        notes.append(f"WARNING: the rows are {series.step_words} apart, those of the training were {trained}")
    return notes


@torch.inference_mode()
def roll(forecast: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, steps: int) -> torch.Tensor:
    """Forecast `steps` rows `[steps, N]` after `x` `[T, N]`, going on from the forecast where it ends.

    Args:
        forecast: a window `[T, N]` -> `[H, N]`.
    """
    rows: list[torch.Tensor] = []
    T = len(x)
    while sum(len(row) for row in rows) < steps:
        rows.append(forecast(x))
        x = torch.cat([x, rows[-1]])[-T:]
    return torch.cat(rows)[:steps]


@dataclass(frozen=True)
class Forecast:
    """The rows that follow a series, its forecast columns in their own units.

    Attributes:
        dates: `[steps]`.
        values: `[steps, N]`.
        bands: level in per cent -> lower and upper ends, each `[steps, N]`.
        calibrated: how many of the rows have bands that were calibrated; those of later ones are only widened.
    """

    columns: list[str]
    dates: pd.DatetimeIndex
    values: np.ndarray
    bands: dict[float, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    calibrated: int = 0

    def frame(self) -> pd.DataFrame:
        """`date`, a column a channel, then of each channel the ends of its bands: `OT_lo80`, `OT_hi80`, ..."""
        parts = {"date": self.dates} | dict(zip(self.columns, self.values.T, strict=True))
        ends = [end[:, n] for n in range(len(self.columns)) for band in self.bands.values() for end in band]
        return pd.DataFrame(parts | dict(zip(band_columns(self.columns, list(self.bands)), ends, strict=True)))

    @classmethod
    def of(cls, frame: pd.DataFrame, columns: list[str], pred_len: int) -> "Forecast":
        """What `frame` made, read again; other columns are left alone.

        Args:
            columns: those that are forecast.
            pred_len: of the run, up to which bands are calibrated.

        Raises:
            InputError: it is no forecast of these columns.
        """
        missing = [name for name in ["date", *columns] if name not in frame.columns]
        if missing or frame.empty:
            got = f"no column {missing[0]!r}" if missing else "no rows"
            raise input_error("forecast", got, "what predict has returned")
        levels = levels_of([str(name) for name in frame.columns], columns)
        names = iter(band_columns(columns, levels))
        ends = np.array([frame[name].to_numpy(np.float64) for name in names]).reshape(
            len(columns), len(levels), 2, len(frame)
        )
        bands = {level: (ends[:, i, 0].T, ends[:, i, 1].T) for i, level in enumerate(levels)}
        dates = pd.DatetimeIndex(pd.to_datetime(frame["date"]), name=None)
        return cls(columns, dates, frame[columns].to_numpy(np.float64), bands, min(len(frame), pred_len) if bands else 0)


def band_columns(columns: Sequence[str], levels: Sequence[float]) -> list[str]:
    """The names of the bands' ends, by column and then by level. One that a column of the data has gets a `_` behind it.

    `columns` "OT", `levels` 80: `OT_lo80`, `OT_hi80`.
    """
    names, taken = [], set(columns)
    for column in columns:
        for name in (f"{column}_{side}{name_of(level)}" for level in levels for side in ("lo", "hi")):
            while name in taken:
                name += "_"
            names.append(name)
            taken.add(name)
    return names


def levels_of(names: Sequence[str], columns: Sequence[str]) -> list[float]:
    """The levels of which all bands of `columns` are among `names`, in the order of the names."""
    found = (re.fullmatch(re.escape(columns[0]) + r"_lo(\d+(?:\.\d+)?)_*", name) for name in names if name not in columns)
    levels = list(dict.fromkeys(float(match[1]) for match in found if match))
    return [level for level in levels if set(band_columns(columns, [level])) <= set(names)]


def forecast_rows(
    job: Job, histories: Sequence[Series], steps: int, shared: Shared, intervals: Intervals | None
) -> list[Forecast]:
    """Forecast the `steps` rows that follow each of the series, all of them at once.

    Args:
        histories: series of the same columns on the same scale, each of seq_len rows or more.
        shared: what the model's `shared` gave.
        intervals: of which all levels become bands; None: no bands.

    Raises:
        InputError: rows without a common step.
    """
    T, H, S = job.args.seq_len, job.args.pred_len, len(histories)
    model, kept = job.model.eval(), histories[0].forecast_slice
    dates = [series.future_dates(steps) for series in histories]
    marks = None if model.channel_independent else _marks(job, histories, -(-steps // H) * H)
    starts = itertools.count(0, H)  # of the windows, in rows after the first one's

    def forecast(x: torch.Tensor) -> torch.Tensor:
        x = x.to(job.device)  # (T, S*N)
        if marks is None:
            return forecast_within_memory(job, _sequences(x.t()), shared, SEQUENCES).t().cpu()  # (H, S*N)
        start = next(starts)
        windows = x.unflatten(1, (S, -1)).transpose(0, 1)  # (S, T, N)
        known, ahead = marks[:, start : start + T], marks[:, start + T - job.args.label_len : start + T + H]
        rows = []
        for first in range(0, S, job.args.eval_batch_size):  # whole windows are not cut any smaller
            part = slice(first, first + job.args.eval_batch_size)
            sequences = _sequences(windows[part].transpose(1, 2).flatten(0, 1))
            sequences.windows = Windows(windows[part], known[part], ahead[part], slice(None))
            rows.append(forecast_within_memory(job, sequences, shared))
        return torch.cat(rows).t().cpu()

    # The series lie side by side, so that the sums of each are those that it has alone.
    window = np.concatenate([series.values[-T:, kept] for series in histories], axis=1)  # (T, S*N)
    rows = np.split(roll(forecast, torch.from_numpy(window), steps).numpy(), S, axis=1)  # S of (steps, N)
    units = np.split(deviations(window.T), S)  # S of (N, 1)
    found = []
    for series, days, values, unit in zip(histories, dates, rows, units, strict=True):
        bands = {} if intervals is None else _bands(series, values, unit, intervals)
        columns = series.forecast_columns
        found.append(Forecast(columns, days, series.to_own_units(values), bands, min(steps, H) if bands else 0))
    return found


def mean_forecast(
    forecasts: Sequence[Forecast], series: Series, seq_len: int, pred_len: int, intervals: Intervals | None
) -> Forecast:
    """The mean of several models' forecasts of one series, with bands of its own."""
    first, kept = forecasts[0], series.forecast_slice
    own = np.mean([each.values for each in forecasts], axis=0)
    if intervals is None:
        return replace(first, values=own, bands={}, calibrated=0)
    standardised = (own - series.mean[kept]) / series.deviation[kept]
    bands = _bands(series, standardised, deviations(series.values[-seq_len:, kept].T), intervals)
    return replace(first, values=own, bands=bands, calibrated=min(len(own), pred_len))


def _bands(
    series: Series, values: np.ndarray, unit: np.ndarray, intervals: Intervals
) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Bands in own units around standardised forecasts `[steps, N]`; unit `[N, 1]`: deviation of the last known window."""
    found = {}
    for level in intervals.levels:
        low, high = (values + (unit * continued(offsets, len(values))).T for offsets in intervals.band(level))
        found[level] = series.to_own_units(low), series.to_own_units(high)
    return found


def _sequences(x: torch.Tensor) -> Batch:
    """Sequences `[M, T]` whose truth is not known."""
    return Batch(x, x.new_empty(len(x), 0))


def _marks(job: Job, histories: Sequence[Series], ahead: int) -> torch.Tensor:
    """Time marks `[S, T + ahead, F]` of the last T rows of each series, and of those that follow them."""
    rows = [series.dates[-job.args.seq_len :].append(series.future_dates(ahead)) for series in histories]
    marks = [time_marks(pd.DatetimeIndex(dates), job.args.freq, job.args.embed) for dates in rows]
    return torch.from_numpy(np.stack(marks)).to(job.device)
