"""Forecasts of the future: the last rows of a file -> forecast.csv, with its timestamps and units."""

import itertools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data_provider.batches import Sequences, Windows
from data_provider.data_loader import Series, own_scale
from data_provider.description import bank_file, make_description
from data_provider.splits import csv_places, find_csv
from data_provider.synthetic import is_synthetic
from data_provider.table import Table, read_table
from data_provider.timefeatures import time_marks
from layers.errors import input_error
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import write_text
from utils.training.evaluate import forecast_within_memory
from utils.training.session import Job

FORECAST = "forecast.csv"
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
        series = _on_the_trainings_scale(table, checkpoint, args)
        args.prompt_text = args.prompt_text or checkpoint.prompt_text
        notes += _differences(table, series, checkpoint)
    else:
        series = own_scale(table, args.features, args.target)
        notes.append(f"zero-shot: {table.path.name} is not the data of the checkpoint; its own mean and deviation are used")
        if args.data == "custom" and not args.prompt_text and not bank_file(args):
            low, high = series.own.min(axis=0), series.own.max(axis=0)
            args.prompt_text = make_description(series.dates, series.columns, low, high)
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


def _on_the_trainings_scale(table: Table, checkpoint: Checkpoint, args: Namespace) -> Series:
    """The columns that the training forecast, with its mean and deviation."""
    names, mean, deviation = checkpoint.scaler()
    target = checkpoint.record.get("target") or args.target
    if args.features == "MS":
        if target not in names:
            raise input_error("--target", repr(target), f"one of the training's columns: {', '.join(names)}")
        place = names.index(target)
        names, mean, deviation = [target], mean[[place]], deviation[[place]]
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise input_error(table.path, f"no column {missing[0]!r}", f"the columns of the training: {', '.join(names)}")
    return Series(
        path=table.path,
        dates=table.dates,
        columns=names,
        own=table.values[:, [table.columns.index(name) for name in names]],
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
        notes.append(f"not forecast, for the training did not have them: {', '.join(extra)}")
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


def predict_rows(job: Job, steps: int) -> tuple[pd.DatetimeIndex, np.ndarray]:
    """Dates `[steps]` and values `[steps, N]` in own units that follow the job's series."""
    model, series, T, H = job.model.eval(), job.series, job.args.seq_len, job.args.pred_len
    dates = series.future_dates(steps)
    marks = None
    if not model.channel_independent:
        rows = pd.DatetimeIndex(series.dates[-T:].append(series.future_dates(-(-steps // H) * H)))
        marks = torch.from_numpy(time_marks(rows, job.args.freq, job.args.embed)).to(job.device)  # (T + rounds * H, F)

    with torch.inference_mode():
        shared = model.shared()

    starts = itertools.count(0, H)  # of the windows, in rows after the first one's

    def forecast(x: torch.Tensor) -> torch.Tensor:
        x = x.to(job.device)
        sequences = Sequences(x.t(), x.new_empty(x.shape[1], 0))
        if marks is not None:
            start = next(starts)
            known, ahead = marks[start : start + T], marks[start + T - job.args.label_len : start + T + H]
            sequences.windows = Windows(x[None], known[None], ahead[None], slice(None))
        return forecast_within_memory(job, sequences, shared, SEQUENCES).t().cpu()  # (H, N)

    window = torch.from_numpy(series.values[-T:, series.forecast_slice])
    return dates, series.to_own_units(roll(forecast, window, steps).numpy())


def write_forecast(folder: Path, columns: list[str], dates: pd.DatetimeIndex, values: np.ndarray) -> Path:
    """Write forecast.csv: `date` and a column a channel, own units."""
    frame = pd.DataFrame(values, columns=columns)
    frame.insert(0, "date", dates)
    path = folder / FORECAST
    write_text(path, frame.to_csv(index=False, float_format="%.8g", lineterminator="\n"))
    return path


def forecast_future(job: Job) -> Path:
    """Forecast what follows the series, write it (and its picture) to the job's folder, say so; the CSV's path."""
    args, log, series = job.args, job.log, job.series
    dates, values = predict_rows(job, args.predict_steps or args.pred_len)
    rounds = -(-len(dates) // args.pred_len)
    log(f"Forecast of the {len(dates)} rows after {series.dates[-1]}, step: {series.step_words}")
    if rounds > 1:
        log(
            f"--predict_steps {len(dates)} is more than --pred_len {args.pred_len}: the forecast was continued "
            f"from itself {rounds - 1} time{'s' if rounds > 2 else ''}, so its errors add up"
        )
    path = job.folder / FORECAST
    if job.accelerator.is_main_process:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_forecast(job.folder, series.forecast_columns, dates, values)
        if args.plots:
            from utils.results.plots import draw_forecast  # only now: matplotlib takes a second to load

            past = (series.dates, series.own[:, series.forecast_slice])
            draw_forecast(job.folder, series.forecast_columns, past, (dates, values), series.step_words)
    log(f"Forecast saved at: {path}")
    return path
