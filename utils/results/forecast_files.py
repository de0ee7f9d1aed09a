"""Files of a forecast: forecast.csv, the pictures, and forecasts.csv, the history that `--append` keeps.

Neither ever loses a forecast silently: what forecast.csv held is moved aside, and forecasts.csv only grows.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from layers.errors import input_error
from utils.results.forecast import Forecast
from utils.saving.files import write_text, writing
from utils.training.session import Job

FORECAST, HISTORY = "forecast.csv", "forecasts.csv"
ORIGIN = "origin"  # the history's first column: the last date that was known


def leave_forecast(job: Job, forecast: Forecast) -> Path:
    """Write a forecast of the job's series (and its picture) to the job's folder, say so; the path of forecast.csv.

    Raises:
        InputError: `--append`, and the history has another forecast from the same row, or other columns.
        StorageError: the file system refused.
    """
    args, log, series = job.args, job.log, job.series
    rows = len(forecast.dates)
    rounds = -(-rows // args.pred_len)
    log(f"Forecast of the {rows} rows after {series.dates[-1]}, step: {series.step_words}")
    if rounds > 1:
        log(
            f"--predict_steps {rows} is more than --pred_len {args.pred_len}: the forecast was continued "
            f"from itself {rounds - 1} time{'s' if rounds > 2 else ''}, so its errors add up"
        )
    if 0 < forecast.calibrated < rows:
        first = forecast.calibrated
        log(f"Prediction intervals: from row {first + 1}, {forecast.dates[first]}, on they are not calibrated, only widened")
    path = job.folder / FORECAST
    if job.accelerator.is_main_process:
        with writing(path):
            job.folder.mkdir(parents=True, exist_ok=True)
        for line in write_forecast(job.folder, forecast, series.dates[-1], args.append):
            log(line)
        if args.plots:
            from utils.results.plots import choose, draw_forecast  # only now: matplotlib takes a second to load

            if line := choose(forecast.columns).line:
                log(f"Pictures of the forecast: {line}")
            past = (series.dates, series.own[:, series.forecast_slice])
            draw_forecast(job.folder, past, forecast, series.step_words)
    log(f"Forecast saved at: {path}")
    return path


def write_forecast(folder: Path, forecast: Forecast, origin: pd.Timestamp, append: bool = False) -> list[str]:
    """Write forecast.csv: `date`, a column a channel and its bands, own units; with `append` forecasts.csv, too.

    Another forecast that lies there as forecast.csv is moved aside, unless forecasts.csv has it.

    Args:
        origin: the last date that was known.

    Returns:
        Lines for the log.

    Raises:
        InputError: forecasts.csv has another forecast from this origin, or other columns; nothing is written then.
        StorageError: the file system refused.
    """
    frame = forecast.frame()
    text = frame.to_csv(index=False, float_format="%.8g", lineterminator="\n")
    header = frame.head(0).to_csv(index=False, lineterminator="\n")
    history = _read(folder / HISTORY)
    lines = []
    if append:
        longer = _appended(folder / HISTORY, history or "", header, text.removeprefix(header), str(origin))
        if longer != history:
            write_text(folder / HISTORY, longer)
        history = longer
        lines.append(f"History of forecasts: {folder / HISTORY}")
    earlier = _read(folder / FORECAST)
    if earlier is not None and earlier != text and not _holds(history, header, earlier):
        lines.append(f"An earlier forecast is now in: {_move_aside(folder / FORECAST, earlier)}")
    if earlier != text:
        write_text(folder / FORECAST, text)
    return lines


def _read(path: Path) -> str | None:
    """The text of a file; None where there is none.

    Raises:
        InputError: it cannot be read, or is no text of ours.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        got = f"a file that cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8'})"
        raise input_error(path, got, "a forecast", "move it away") from None


def _appended(path: Path, history: str, header: str, rows: str, origin: str) -> str:
    """The history with the rows of one more forecast; as it is where it has this forecast already."""
    if not history:
        history = f"{ORIGIN},{header}"
    if not history.startswith(f"{ORIGIN},{header}"):
        had, hint = history.partition("\n")[0], "move it away, or forecast with the columns and --intervals that it has"
        raise input_error(path, f"the columns {had[:200]}", f"those of this forecast, {ORIGIN},{header.strip()}"[:300], hint)
    held = history.removeprefix(f"{ORIGIN},{header}")
    if held and not held.endswith("\n"):
        raise input_error(path, "a last line that is cut short", "whole lines", "remove that line")
    new = [f"{origin},{line}" for line in rows.splitlines()]
    same = [line for line in held.splitlines() if line.startswith(f"{origin},")]
    if not same:
        return history + "".join(f"{line}\n" for line in new)
    if len(same) == len(new) and all(map(_alike, same, new)):
        return history
    got = f"another forecast from {origin} than the one to append ({len(same)} and {len(new)} rows)"
    hint = "nothing was written; leave --append out to have this one in forecast.csv alone"
    raise input_error(path, got, "the same one, or none", hint)


def _alike(held: str, new: str) -> bool:
    """Whether two lines say the same, up to what a GPU's sums differ by from one run to the next."""
    (*names, first), (*same, second) = (line.split(",", 2) for line in (held, new))
    try:
        a, b = (np.array(numbers.split(","), dtype=np.float64) for numbers in (first, second))
    except ValueError:
        return False
    return names == same and len(a) == len(b) and np.allclose(a, b, rtol=1e-4, atol=0, equal_nan=True)


def _holds(history: str | None, header: str, forecast: str) -> bool:
    """Whether a history has, from one origin, all rows of a forecast.csv."""
    if history is None or not history.startswith(f"{ORIGIN},{header}") or not forecast.startswith(header):
        return False
    lines = (line.partition(",") for line in history.removeprefix(f"{ORIGIN},{header}").splitlines())
    rows = forecast.removeprefix(header)
    by_origin = itertools.groupby(lines, key=lambda parts: parts[0])
    return any("".join(f"{parts[2]}\n" for parts in group) == rows for _, group in by_origin)


def _move_aside(path: Path, text: str) -> Path:
    """Rename a forecast.csv after its first date: forecast.2024-02-29T00-00-00.csv; numbered where that is taken."""
    cells = text.splitlines()[1].split(",")[0] if text.count("\n") > 1 else ""
    try:
        name = f".{pd.Timestamp(cells).strftime('%Y-%m-%dT%H-%M-%S')}"
    except ValueError:  # no forecast of ours
        name = ".earlier"
    for number in itertools.count():
        aside = path.with_name(f"{path.stem}{name}{f'.{number}' if number else ''}{path.suffix}")
        held = _read(aside)
        if held in (None, text):  # the same one once more needs no second copy
            break
    with writing(aside):
        path.replace(aside)
    return aside
