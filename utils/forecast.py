"""Forecasts of the future: the last rows of a file -> forecast.csv, with its timestamps and units."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data_provider.data_loader import Series
from data_provider.describe import make_description, step_words
from data_provider.splits import find_csv
from data_provider.synthetic import is_synthetic
from data_provider.table import Table, read_table
from data_provider.timestamps import future_dates
from layers.errors import InputError
from models.TimeLLM import bank_file
from utils.files import write_text
from utils.memory import within_memory
from utils.recorded import recorded
from utils.same_data import trained_on

FORECAST = "forecast.csv"
SEQUENCES = 64  # run at once at most


@dataclass(frozen=True)
class History:
    """What a forecast goes on from; own units."""

    path: Path
    dates: pd.DatetimeIndex  # [rows] of the whole file
    columns: list[str]  # [N], those that are forecast
    values: np.ndarray  # [rows, N] float64
    mean: np.ndarray  # [N]
    deviation: np.ndarray  # [N]
    trained: bool  # scaler and columns are those of the checkpoint; else the file's own
    synthetic: bool
    notes: list[str]  # lines for the user


def read_history(args: Namespace, checkpoint: Path) -> History:
    """The rows to go on from: those of `--predict_path`, else of `--data_path`.

    Scaler and columns are the checkpoint's. With a checkpoint of other data (`--checkpoint` with a
    data set of its own, or an old file without a record) they are the file's own. Fills in
    `prompt_text` and `enc_in`.

    Raises:
        InputError: fewer than seq_len rows, columns of the training missing, or an unreadable file.
    """
    record = recorded(checkpoint)
    _check_record(record, checkpoint)
    path = _find(args)
    table = read_table(path, args.fill_missing)
    if len(table.dates) < args.seq_len:
        raise InputError(f"--seq_len {args.seq_len}: {path} has {len(table.dates)} rows, needed are {args.seq_len}")
    trained = bool(record) and (bool(args.predict_path) or trained_on(record, path, table))
    if args.predict_path and not record:
        raise InputError(f"--predict_path: {checkpoint} is of older code and does not say its columns; use --data_path")
    notes = [f"{table.filled} empty cells filled (--fill_missing {args.fill_missing})"] if table.filled else []
    columns, mean, deviation = _trained(table, record, args) if trained else _own(table, args)
    values = table.values[:, [table.columns.index(name) for name in columns]]
    if trained:
        args.prompt_text = args.prompt_text or record["flags"].get("prompt_text")
        notes += _differences(table, record)
    else:
        notes.append(f"zero-shot: {path.name} is not the data of the checkpoint; its own mean and deviation are used")
        if args.data == "custom" and not args.prompt_text and not bank_file(args):
            low, high = values.min(axis=0), values.max(axis=0)
            args.prompt_text = make_description(table.dates, columns, low, high)
    args.enc_in = len(columns)
    synthetic = is_synthetic(table.path)
    return History(path, table.dates, columns, values, mean, deviation, trained, synthetic, notes)


def _check_record(record: dict, checkpoint: Path) -> None:
    """Raise InputError where a record lacks what a forecast reads of it; the file may be anyone's."""
    names, scaler = record.get("columns"), record.get("scaler", {})
    lists = [names, scaler.get("mean"), scaler.get("deviation")]
    sound = all(isinstance(part, list) and len(part) == len(names or []) > 0 for part in lists)
    sound = sound and all(isinstance(name, str) for name in names)
    sound = sound and all(type(value) in (int, float) for part in lists[1:] for value in part)
    if record and not (sound and {"flags", "data"} <= record.keys()):
        raise InputError(
            f"--checkpoint {checkpoint}: found a record without flags, data, columns or their scaler, "
            "need the one that training wrote"
        )


def _find(args: Namespace) -> Path:
    if args.predict_path is None:
        return find_csv(args.root_path, args.data_path)
    path = Path(args.predict_path)
    if path.is_file():
        return path
    try:
        return find_csv(args.root_path, args.predict_path)
    except InputError as error:
        looked = str(error).partition("(looked for ")[2].partition(")")[0]
        raise InputError(
            f"--predict_path: found no file {path}, need a CSV there or in --root_path (looked for {path}, {looked})"
        ) from None


def _trained(table: Table, record: dict, args: Namespace) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Columns, mean and deviation `[N]` of the training."""
    names, scaler = record["columns"], record["scaler"]
    mean, deviation = np.array(scaler["mean"]), np.array(scaler["deviation"])
    if args.features == "MS":
        target = record.get("target") or args.target
        if target not in names:
            raise InputError(f"--target: found {target!r}, need one of the training's columns: {', '.join(names)}")
        place = names.index(target)
        names, mean, deviation = [target], mean[[place]], deviation[[place]]
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(
            f"{table.path}: found no column {missing[0]!r}, need the columns of the training: {', '.join(names)}"
        )
    return names, mean, deviation


def _own(table: Table, args: Namespace) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Columns, mean and deviation `[N]` of the file itself, over all its rows."""
    columns = table.columns
    if args.features != "M":
        target = args.target or ("OT" if "OT" in columns else columns[-1])
        if target not in columns:
            raise InputError(f"--target {target}: no such column in {table.path}; needed is one of {', '.join(columns)}")
        columns = [target]
    values = table.values[:, [table.columns.index(name) for name in columns]]
    deviation = values.std(axis=0)
    return columns, values.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def _differences(table: Table, record: dict) -> list[str]:
    """Lines about what the file has otherwise than the training had."""
    notes = []
    extra = [name for name in table.columns if name not in record["columns"]]
    if extra and record["flags"].get("features") == "M":
        notes.append(f"not forecast, for the training did not have them: {', '.join(extra)}")
    step, trained = step_words(table.dates), record["data"].get("step")
    if trained not in (None, step):
        notes.append(f"WARNING: the rows are {step} apart, those of the training were {trained}")
    return notes


def history_of(series: Series) -> History:
    """The history of a series that has just been trained on."""
    kept = slice(None) if series.target_index is None else slice(series.target_index, series.target_index + 1)
    mean, deviation = series.scaler.mean_[kept], series.scaler.scale_[kept]
    values = series.values[:, kept].astype(np.float64) * deviation + mean
    return History(
        series.path, series.dates, series.columns[kept], values, mean, deviation, True, series.synthetic, []
    )


@torch.inference_mode()
def roll(
    forecast: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, steps: int
) -> torch.Tensor:
    """Forecast `steps` rows `[steps, N]` after `x` `[T, N]`, going on from the forecast where it ends.

    Args:
        forecast: windows `[T, N]` -> `[H, N]`.
    """
    T, rows = len(x), []
    while sum(map(len, rows)) < steps:
        rows.append(forecast(x))
        x = torch.cat([x, rows[-1]])[-T:]
    return torch.cat(rows)[:steps]


def predict(run, history: History, steps: int | None) -> tuple[pd.DatetimeIndex, np.ndarray]:
    """Dates `[steps]` and values `[steps, N]` in own units that follow the history (default: pred_len rows).

    Args:
        run: a `utils.train.Run` with the trained model.
    """
    args, model = run.args, run.model
    steps = steps or args.pred_len
    dates = future_dates(history.dates, steps)
    device = run.accelerator.device

    def forecast(x: torch.Tensor) -> torch.Tensor:
        def parts(size: int) -> torch.Tensor:  # channels do not depend on each other
            with run.accelerator.autocast():
                cut = x.split(min(size or SEQUENCES, SEQUENCES), dim=1)
                return torch.cat([model(part[None].to(device))[0].float().cpu() for part in cut], dim=1)

        return within_memory(run, min(x.shape[1], SEQUENCES), parts)  # (H, N)

    model.eval()
    scaled = (history.values[-args.seq_len :] - history.mean) / history.deviation
    found = roll(forecast, torch.from_numpy(scaled.astype(np.float32)), steps)
    return dates, found.double().numpy() * history.deviation + history.mean


def write_forecast(folder: Path, columns: list[str], dates: pd.DatetimeIndex, values: np.ndarray) -> Path:
    """Write forecast.csv: `date` and a column a channel, own units."""
    frame = pd.DataFrame(values, columns=columns)
    frame.insert(0, "date", dates)
    path = folder / FORECAST
    write_text(path, frame.to_csv(index=False, float_format="%.8g", lineterminator="\n"))
    return path


def forecast_future(run, history: History, folder: Path) -> Path:
    """Forecast what follows the history, write it (and its picture) to `folder`, say so; the CSV's path."""
    args, log = run.args, run.log
    for note in history.notes:
        log(note)
    dates, values = predict(run, history, args.predict_steps)
    rounds = -(-len(dates) // args.pred_len)
    log(f"Forecast of the {len(dates)} rows after {history.dates[-1]}, step: {step_words(history.dates)}")
    if rounds > 1:
        log(
            f"--predict_steps {len(dates)} is more than --pred_len {args.pred_len}: the forecast was continued "
            f"from itself {rounds - 1} time{'s' if rounds > 2 else ''}, so its errors add up"
        )
    path = folder / FORECAST
    if run.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_forecast(folder, history.columns, dates, values)
        if args.plots:
            from utils.plots import draw_forecast

            past = (history.dates, history.values)
            draw_forecast(folder, history.columns, past, (dates, values), step_words(history.dates))
    log(f"Forecast saved at: {path}")
    return path
