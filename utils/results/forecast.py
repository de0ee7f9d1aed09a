"""Forecasts of the future: the rows they go on from, the rows that follow, and the files that hold these.

A forecast is a pandas frame in the columns' own units: `date`, a column a channel, then of each channel the ends of
its prediction intervals, `OT_lo80`, `OT_hi80`, ... forecast.csv holds the latest one, forecasts.csv those that were
kept with `--append`. Neither loses one silently: what forecast.csv held is moved aside, and forecasts.csv only grows.
"""

import io
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.data_factory import series_flags
from data_provider.data_loader import Series, bounds_of, check_size, own_scale
from data_provider.description import bank_file, make_description
from data_provider.splits import csv_places, find_csv
from data_provider.synthetic import is_synthetic
from data_provider.table import FRAME, Table, read_table
from data_provider.timestamps import gaps_in, step_words
from layers.errors import input_error, listed
from utils.flags import longest_window
from utils.results.bands import Intervals, continued, name_of, stds
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import write_text, writing
from utils.saving.folder import move_aside
from utils.training.context import Context

FORECAST, HISTORY = "forecast.csv", "forecasts.csv"
ORIGIN = "origin"  # first column of forecasts.csv: the last date that was known


def read_history(args: Namespace, checkpoint: Checkpoint, in_program: bool = False) -> tuple[Series, bool, list[str]]:
    """The rows to forecast from: those of `--predict_path`, else of `--data_path`. Fills in `prompt_text` and `enc_in`.

    Scaler and columns are the checkpoint's. With a checkpoint of other data (`--checkpoint` with a data set of its own,
    or an old file without a record) they are the file's own.

    Args:
        in_program: the rows come later, as frames of a program; the series has the training's columns and no rows.

    Returns:
        The series; whether scaler and columns are the checkpoint's; lines for the user.

    Raises:
        InputError: fewer than seq_len rows, columns of the training missing, or an unreadable file.
    """
    if not checkpoint.record and (in_program or args.predict_path):
        raise input_error(
            f"--checkpoint {checkpoint.file}",
            "a file of older code, which does not say its columns",
            "one with a record; or forecast the file of --data_path",
        )
    if in_program:
        names = checkpoint.scaler()[0]
        series = on_the_trainings_scale(
            Table(FRAME, pd.DatetimeIndex([]), names, np.empty((0, len(names)))), checkpoint, args
        )
        args.prompt_text, args.enc_in = args.prompt_text or checkpoint.flags.get("prompt_text"), len(series.columns)
        return series, True, []
    if args.predict_path is None:
        path = find_csv(args.root_path, args.data_path)
    else:
        places = list(dict.fromkeys([Path(args.predict_path), *csv_places(args.root_path, args.predict_path)]))
        path = next((place for place in places if place.is_file()), places[0])
        if not path.is_file():
            raise input_error("--predict_path", f"no file {path}", f"a CSV in one of {', '.join(map(str, places))}")
    table = read_table(path, **series_flags(args, read_table))
    if len(table.dates) < (rows := longest_window(args)):
        raise input_error(
            table.path,
            f"{len(table.dates)} rows",
            f"at least {f'{rows}, the longest of --stack_windows' if rows > args.seq_len else f'--seq_len {rows}'}",
        )
    trained = bool(checkpoint.record) and (bool(args.predict_path) or checkpoint.trained_on(table))
    remarks: list[str] = []
    if trained:
        series = on_the_trainings_scale(table, checkpoint, args)
        args.prompt_text = args.prompt_text or checkpoint.flags.get("prompt_text")
        extra = [name for name in table.columns if name not in checkpoint.record["columns"]]
        if extra and checkpoint.flags.get("features") == "M":
            remarks.append(f"not forecast, for the training did not have them: {listed(extra)}")
        step = checkpoint.record["data"].get("step")
        if step not in (None, series.step_words):
            remarks.append(f"WARNING: the rows are {series.step_words} apart, those of the training were {step}")
    else:
        series = own_scale(table, args.features, args.target, args.bounds)
        remarks.append(
            f"zero-shot: {table.path.name} is not the data of the checkpoint; its own mean and deviation are used"
        )
        if args.data == "custom" and not args.prompt_text and not bank_file(args):
            low, high = series.own.min(axis=0), series.own.max(axis=0)
            args.prompt_text = make_description(series.dates, series.columns, low, high)
    remarks += [f"{series.filled} empty cells filled (--fill_missing {args.fill_missing})"] * (series.filled > 0)
    gaps = gaps_in(series.dates, series.step, rows)
    if gaps:
        more = f", and {len(gaps) - 1} more gaps" if len(gaps) > 1 else ""
        remarks.append(
            f"WARNING: rows are missing between {gaps[0][0]} and {gaps[0][1]}{more}, where the forecast goes on from; fill "
            "them first (gaps that recur, as at night, show in two weeks of rows)"
        )
    args.enc_in = len(series.columns)
    return series, trained, remarks


def on_the_trainings_scale(table: Table, checkpoint: Checkpoint, args: Namespace) -> Series:
    """The columns that the training forecast, with its mean and deviation.

    Raises:
        InputError: the table lacks one of them, or has values too large to compute with.
    """
    names, mean, std = checkpoint.scaler()
    bounds = bounds_of(args.bounds, names)
    target = checkpoint.record.get("target") or args.target
    if args.features == "MS":
        place = names.index(target)
        names, mean, std = [target], mean[[place]], std[[place]]
        bounds = None if bounds is None else bounds[:, [place]]
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise input_error(table.path, f"no column {missing[0]!r}", f"the columns of the training: {listed(names)}")
    own = (table := table.only(names)).values
    check_size(table.path, names, own, mean, std)
    return Series(
        path=table.path,
        dates=table.dates,
        columns=names,
        own=own,
        mean=mean,
        std=std,
        target=target,
        target_index=None,  # where there is one, it is the only column
        synthetic=is_synthetic(table.path),
        filled=table.filled,
        read_as=table.read_as,
        bounds=bounds,
    )


def forecast_frame(
    series: Series, dates: pd.DatetimeIndex, values: np.ndarray, window: np.ndarray, intervals: Intervals | None
) -> pd.DataFrame:
    """A forecast of a series.

    Args:
        dates: `[steps]`.
        values: `[steps, N]` of the forecast columns, standardised.
        window: `[T, N]`, the rows that the forecast goes on from, standardised.
        intervals: all levels of the newest become bands; None: no bands.
    """
    intervals = intervals and (intervals.newest or intervals)
    columns, levels = series.forecast_columns, () if intervals is None else intervals.levels
    parts = {"date": dates} | dict(zip(columns, series.within_bounds(series.to_own_units(values)).T, strict=True))
    unit = stds(window.T)  # (N, 1)
    ends = [
        series.within_bounds(series.to_own_units(values + (unit * continued(offsets, len(values))).T)).T  # (N, steps)
        for level in levels
        for offsets in intervals.band(level)  # type: ignore[union-attr]  # without intervals there are no levels
    ]
    by_column = [end[n] for n in range(len(columns)) for end in ends]
    return pd.DataFrame(parts | dict(zip(band_columns(columns, levels), by_column, strict=True)))


def mean_forecast(
    forecasts: Sequence[pd.DataFrame], series: Series, seq_len: int, intervals: Intervals | None
) -> pd.DataFrame:
    """The mean of several models' forecasts of one series, with prediction intervals of its own."""
    kept = series.forecast_slice
    own = np.mean([forecast[series.forecast_columns].to_numpy() for forecast in forecasts], axis=0)
    values = (own - series.mean[kept]) / series.std[kept]
    return forecast_frame(series, pd.DatetimeIndex(forecasts[0]["date"]), values, series.values[-seq_len:, kept], intervals)


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


def bands_of(forecast: pd.DataFrame, columns: Sequence[str]) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """The bands of a forecast of `columns`: level in per cent -> lower and upper ends, each `[steps, N]`."""
    names = [str(name) for name in forecast.columns if name not in columns]
    found = (re.fullmatch(re.escape(columns[0]) + r"_lo(\d+(?:\.\d+)?)_*", name) for name in names)
    bands = {}
    for level in dict.fromkeys(float(match[1]) for match in found if match):
        ends = band_columns(columns, [level])
        if set(ends) <= set(names):
            bands[level] = forecast[ends[::2]].to_numpy(np.float64), forecast[ends[1::2]].to_numpy(np.float64)
    return bands


def leave_forecast(context: Context, forecast: pd.DataFrame) -> None:
    """Write a forecast of the run's series, and its picture, to the run's folder, and say so.

    Raises:
        InputError: `--append`, and the history has another forecast from the same row, or other columns.
        StorageError: the file system refused.
    """
    args, log, series = context.args, context.log, context.series
    rows, horizon = len(forecast), args.pred_len
    log(f"Forecast of the {rows} rows after {series.dates[-1]}, step: {step_words(series.step, series.dates)}")
    learned = context.checkpoint.trained_data.get("learned_until") if context.checkpoint else None
    if learned:
        log(f"The model has learned from rows up to {learned}")
    columns, bands = series.forecast_columns, bands_of(forecast, series.forecast_columns)
    lowest = np.min([forecast[columns].to_numpy(), *(low for low, _ in bands.values())], axis=(0, 1))
    below = (series.own[:, series.forecast_slice].min(axis=0) >= 0) & (lowest < 0)
    if below.any() and series.bounds is None:
        log(
            f"No value of {listed(np.array(columns)[below].tolist())} is below 0, but its forecast or a band is: "
            "--bounds 0 none keeps them at 0 or above"
        )
    if rows > horizon:
        times = (rows - 1) // horizon
        log(
            f"--predict_steps {rows} is more than --pred_len {horizon}: the forecast was continued "
            f"from itself {times} time{'s' if times > 1 else ''}, so its errors add up"
        )
        if bands:
            log(
                f"Prediction intervals: from row {horizon + 1}, {forecast['date'][horizon]}, on they are not calibrated, "
                "only widened"
            )
    if context.accelerator.is_main_process:
        with writing(context.folder / FORECAST):
            context.folder.mkdir(parents=True, exist_ok=True)
        log(*write_forecast(context.folder, forecast, series.dates[-1], args.append))
        if args.plots:
            from utils.results.plots import draw_forecast  # only now: matplotlib takes a second to load

            draw_forecast(context, forecast)
    log(f"Forecast saved at: {context.folder / FORECAST}")


def write_forecast(folder: Path, forecast: pd.DataFrame, origin: pd.Timestamp, append: bool = False) -> list[str]:
    """Write forecast.csv; with `append` forecasts.csv, too.

    Another forecast that lies there as forecast.csv is moved aside, unless forecasts.csv has it.

    Args:
        origin: the last date that was known.

    Returns:
        Lines for the log.

    Raises:
        InputError: forecasts.csv has another forecast from this origin, or other columns; nothing is written then.
        StorageError: the file system refused.
    """
    path, lines = folder / FORECAST, []
    text = forecast.to_csv(index=False, float_format="%.8g", lineterminator="\n")
    history, earlier = _text(folder / HISTORY), _text(path)
    if append:
        history = _with_forecast(folder / HISTORY, history, text, str(origin))
        write_text(folder / HISTORY, history)
        lines.append(f"History of forecasts: {folder / HISTORY}")
    held = {line.partition(",")[2] for line in history.splitlines()}
    if earlier != text and path.is_file() and (not earlier or not set(earlier.splitlines()) <= held):
        lines.append(f"An earlier forecast is now in: {move_aside(path)}")
    if earlier != text:
        write_text(path, text)
    return lines


# The text of forecasts.csv with one more forecast; as it is where it has this forecast already.
def _with_forecast(path: Path, history: str, forecast: str, origin: str) -> str:
    header, *rows = (f"{origin},{line}\n" for line in forecast.splitlines())
    header = ORIGIN + header.removeprefix(origin)
    history = history or header
    if not history.startswith(header):
        raise input_error(
            path,
            f"the columns {history.partition(chr(10))[0][:200]}",
            f"those of this forecast, {header.strip()}"[:300],
            "move it away, or forecast with the columns and --intervals that it has",
        )
    same = [line for line in history.splitlines(keepends=True) if line.startswith(f"{origin},")]
    if not same:
        return history.rstrip("\n") + "\n" + "".join(rows)
    held, new = (pd.read_csv(io.StringIO(header + "".join(lines)), index_col=[0, 1]) for lines in (same, rows))
    # A GPU's sums differ a little from one run to the next.
    if not held.index.equals(new.index) or not np.allclose(held, new, rtol=1e-4, atol=0, equal_nan=True):
        raise input_error(
            path,
            f"another forecast from {origin} than the one to append ({len(same)} and {len(rows)} rows)",
            "the same one, or none",
            "nothing was written; leave --append out to have this one in forecast.csv alone",
        )
    return history


# The text of a file; empty where there is none.
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
