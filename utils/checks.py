"""Checks: flags set against each other, the device, the data, the backbone and the checkpoint, before a weight is loaded."""

import shlex
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from data_provider.data_loader import Series, SplitSeries
from data_provider.description import LISTED, bank_file, dataset_description, make_description
from data_provider.timestamps import gaps_in
from layers.backbone import BackboneInfo, find_backbone, require_bitsandbytes
from layers.errors import input_error, listed
from models import model_class
from models.base import ForecastModel
from utils.flags import check_fixed, resumed_defaults
from utils.inputs import check_model_flags
from utils.intervals import LEVELS, MOST_OFFSETS, Intervals, fewest_windows, name_of, probabilities, supported
from utils.saving.checkpoint import Checkpoint, shapes_of

OLDEST_DRIVER = {"13": "580", "12": "525"}  # by the CUDA that PyTorch was built for


def check_device(args: Namespace) -> None:
    """Set `--device` against the machine; a job that is meant for a GPU never runs silently on the CPU.

    Raises:
        InputError: a GPU is asked for, there or needed, and PyTorch cannot use one.
    """
    if args.device == "cpu" or torch.cuda.is_available():
        return
    driver = nvidia_driver()
    if driver is not None:
        got = f"an NVIDIA GPU (driver {driver}) that PyTorch {torch.__version__} cannot use"
        raise input_error(f"--device {args.device}", got, *_mend(torch.version.cuda))
    if args.device == "cuda":
        got = "no usable CUDA GPU (torch.cuda.is_available() is False)"
        raise input_error("--device cuda", got, "one; use auto or cpu")
    if args.load_in_4bit:
        hint = "or leave --load_in_4bit out"
        raise input_error("--load_in_4bit", "no GPU that PyTorch can use", "--device cpu, to run it slowly on purpose", hint)


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver; None where there is none, or no GPU that it sees."""
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")  # the latter is WSL2's
    if program is None:
        return None
    try:
        words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _mend(built_for: str | None) -> tuple[str, str]:
    """What was expected of a machine with a GPU that PyTorch cannot use, and what to do."""
    if built_for is None:
        return "a PyTorch with CUDA", "remove .venv and run bash scripts/setup_env.sh, or give --device cpu"
    oldest = OLDEST_DRIVER.get(built_for.split(".")[0], "a newer one")
    hint = "update the driver (under WSL2 the one of Windows), install an older build (TORCH_INDEX_URL=https://download."
    hint += "pytorch.org/whl/cu126 bash scripts/setup_env.sh), or give --device cpu"
    return f"driver {oldest} or newer, which CUDA {built_for} asks for", hint


def check_channels(args: Namespace, series: SplitSeries) -> None:
    """Fill in `enc_in`; raises InputError where it contradicts the data."""
    args.enc_in = _agree("enc_in", args.enc_in, len(series.columns), f"channels read from {series.path}")


def fit_batch(args: Namespace, series: SplitSeries, model: ForecastModel) -> None:
    """Let a `--batch_size` beyond the training windows be all of them for a model that nothing is trained of: batches are
    how its fit is scored, and no step is made of one."""
    if not model.is_trained:
        args.batch_size = min(args.batch_size, max(1, len(series.windows("train"))))


def check_linear_map(args: Namespace, series: SplitSeries, model: ForecastModel) -> None:
    """Raises InputError where no training window is whole, and the model's linear map can be fitted to none."""
    if model.linear_map is None or series.windows("train").sequence_count > 0:
        return
    flag = f"--skip {args.skip}" if model.uses_llm else f"--model {args.model}"
    expected = f"a shorter --seq_len, or series of {args.seq_len + 2 * args.pred_len} values"
    raise input_error(flag, f"--seq_len {args.seq_len}, with which no training series has a whole window", expected)


def shares(args: Namespace, processes: int) -> list[str]:
    """Lines that say what each of several processes has of a batch."""
    if processes == 1:
        return []
    if not args.is_training:
        return [f"{processes} processes: --eval_batch_size {args.eval_batch_size} and --max_sequences are of each"]
    fewest, most = args.batch_size // processes, -(-args.batch_size // processes)
    each = f"{most}" if fewest == most else f"{fewest} or {most}"
    step = f"--batch_size {args.batch_size} is what a training step sees in all, {each} in each process"
    return [f"{processes} processes: {step}; --eval_batch_size {args.eval_batch_size} and --max_sequences are of each"]


def check_pretraining(args: Namespace, series: Series, pretrain: SplitSeries | None, checkpoint: Checkpoint | None) -> None:
    """Set `--data_pretrain` against the data that are forecast, and of a test against what its checkpoint was trained on.

    Args:
        pretrain: the series that it names; None where nothing is trained on it.

    Raises:
        InputError: at the first contradiction.
    """
    if pretrain is not None and not model_class(args.model).channel_independent and pretrain.columns != series.columns:
        got = f"the columns {', '.join(pretrain.columns[:LISTED])} of {pretrain.path}"
        reason = f"for --model {args.model} forecasts each from all"
        raise input_error("--data_pretrain", got, f"those of {series.path}, {', '.join(series.columns[:LISTED])}, {reason}")
    trained = checkpoint.trained_data.get("file") if checkpoint else None
    if args.data_pretrain and trained not in (None, Path(args.data_path_pretrain).name) and checkpoint:
        got = f"{args.data_pretrain}, file {args.data_path_pretrain}"
        raise input_error("--data_pretrain", got, f"{trained}, on which {checkpoint.file} was trained", "or leave it out")


def check_model(args: Namespace) -> BackboneInfo | None:
    """Set the flags against the model, the prompt bank and the backbone; fills in `llm_dim`.

    Returns:
        The language model; None where `--model` has none.

    Raises:
        InputError: at the first contradiction.
    """
    kind = model_class(args.model)
    if args.optimizer == "adamw8bit":
        require_bitsandbytes("optimizer adamw8bit")
    check_model_flags(args)
    if not kind.uses_llm:
        if not kind.is_trained:
            args.train_epochs = 1  # there is nothing to repeat
        return None
    dataset_description(args)
    info = find_backbone(args.llm_model, args.llm_model_path)
    args.llm_dim = _agree("llm_dim", args.llm_dim, info.hidden_size, f"hidden size of {info.folder}")
    if args.llm_layers > info.layers:
        raise input_error("--llm_layers", args.llm_layers, f"at most {info.layers}, all that {info.folder} has")
    if args.d_ff > info.hidden_size:
        raise input_error("--d_ff", args.d_ff, f"at most {info.hidden_size}, the hidden size of {info.folder}")
    if args.load_in_4bit:
        require_bitsandbytes("load_in_4bit")
    if args.llm_ablation in ("attention", "transformer") and info.hidden_size % info.heads:
        raise input_error(
            f"--llm_ablation {args.llm_ablation}", f"width {info.hidden_size} of {info.heads} heads", "a multiple"
        )
    return info


def _agree(flag: str, given: int | None, true: int, what: str) -> int:
    if given not in (None, true):
        raise input_error(f"--{flag}", given, f"{true}, the {what}", "or leave the flag out")
    return true


def outline(args: Namespace, info: BackboneInfo | None) -> ForecastModel:
    """The model on the meta device: its shapes and its prompts, without a value.

    Raises:
        InputError: the prompt does not fit in front of the patches.
    """
    with torch.device("meta"):
        return model_class(args.model)(args, info) if info else model_class(args.model)(args)


def check_checkpoint(args: Namespace, checkpoint: Checkpoint, model: ForecastModel, same_data: bool) -> None:
    """Set a checkpoint against the model that the flags describe, and the flags against its training's.

    A checkpoint of older code has no record, and its flags are taken to be these.

    Args:
        model: of which the shapes count.
        same_data: on other data than the training's another description of them is no contradiction.

    Raises:
        InputError: at the first contradiction.
    """
    flags = checkpoint.flags
    if flags.get("model", args.model) != args.model:
        raise input_error("--model", args.model, f"{flags['model']}, which {checkpoint.file} holds")
    checkpoint.check(shapes_of(model))
    # A flag that came to be after the checkpoint was written had its default then.
    check_fixed(args, resumed_defaults() | flags if flags else {}, checkpoint.file)
    words = [flags.get("data"), flags.get("data_path"), flags.get("prompt_text") or ""]
    if not (model.prompts and same_data and "prompt_domain" in flags and all(isinstance(word, str) for word in words)):
        return
    now, then = dataset_description(args), dataset_description(Namespace(**flags))
    if now != then:
        flag = "--prompt_text" if args.prompt_text or flags.get("prompt_text") else "--prompt_domain"
        got, expected = f"the description {now[:60]!r}", f"{then[:60]!r}, with which {checkpoint.file} was trained"
        raise input_error(flag, got, expected)


def fill_in_prompt(args: Namespace, series: SplitSeries, checkpoint: Checkpoint | None) -> None:
    """Give `--data custom` a `--prompt_text`, where the user and the prompt bank have none.

    A test takes the text of the training, whatever has come to the file since. Only the columns that
    are forecast are described, with ranges of the training rows: the prompt says nothing of later rows.
    """
    asked = args.prompt_domain and not args.checkpoint  # else it may be the training's
    if args.data != "custom" or args.prompt_text or asked or bank_file(args):
        return
    text = checkpoint.prompt_text if checkpoint else None
    if checkpoint and text and checkpoint.trained_on(series, args.fill_missing):
        args.prompt_text = text
        return
    # From float32 values, as ever: states of earlier runs hold the text that these make.
    rows = series.to_own_units(series.values[: series.splits.train, series.forecast_slice])
    args.prompt_text = make_description(series.dates, series.forecast_columns, rows.min(axis=0), rows.max(axis=0))


def overview(args: Namespace, series: SplitSeries) -> list[str]:
    """Lines that say what was read off the file of `--data custom`; none for the named data sets."""
    if args.data != "custom":
        return []
    dates, splits = series.dates, series.splits
    forecast = {"M": "all columns are forecast"}.get(args.features, f"{series.target} is forecast")
    lines = [
        f"{series.path}: {len(dates)} rows from {dates[0]} to {dates[-1]}, step: {series.step_words}",
        f"{len(series.columns)} channels: {listed(series.columns)}; {forecast} (target: {series.target})",
        f"rows: train {splits.train}, val {splits.val}, test {splits.test} (70 %, 10 %, 20 %)",
    ]
    lines += _gaps(series, "")
    if model_class(args.model).uses_llm:
        lines.append(f"prompt: {dataset_description(args)}")
    if series.filled:
        cells = "1 empty cell" if series.filled == 1 else f"{series.filled} empty cells"
        lines.append(f"{cells} filled (--fill_missing {args.fill_missing})")
    return lines


def transfer(series: Series, pretrain: SplitSeries) -> list[str]:
    """Lines that say what trains, in place of the series that is validated, tested and forecast."""
    trains = f"{pretrain.splits.few_shot} rows of {pretrain.path} train (step: {pretrain.step_words})"
    line = f"Transfer: {trains}; {series.path} validates and tests (step: {series.step_words})"
    return [line, *_gaps(pretrain, f" in {pretrain.path}")]


def _gaps(series: SplitSeries, where: str) -> list[str]:
    gaps = gaps_in(series.dates, series.step)
    if not gaps:
        return []
    between = "between {} and {}".format(*gaps[0])
    count = "1 gap" if len(gaps) == 1 else f"{len(gaps)} gaps, the first"
    return [f"WARNING: rows are missing{where}: {count} {between}; windows go over it as if nothing were"]


class IntervalPlan(NamedTuple):
    """Which prediction intervals a run has."""

    levels: tuple[float, ...]  # per cent
    kept: Intervals | None  # those of the checkpoint, where they are of these data; else they are calibrated
    notes: list[str]  # lines for the user


def plan_intervals(args: Namespace, series: Series, checkpoint: Checkpoint | None, same_data: bool) -> IntervalPlan:
    """Set `--intervals` against the validation windows; of a forecast alone, against what its checkpoint has.

    Args:
        same_data: whether the series is of the data that the checkpoint was trained on.

    Raises:
        InputError: levels that were asked for and cannot be had, or a checkpoint whose intervals cannot be used.
    """
    if args.intervals == ():
        return IntervalPlan((), None, [])
    kept = checkpoint.intervals if checkpoint is not None and same_data else None
    if kept is not None and checkpoint is not None:
        kept = _of_columns(kept, checkpoint, series, args.pred_len)
    if isinstance(series, SplitSeries):
        return _from_windows(args, series, kept)
    assert checkpoint is not None, "a forecast alone has a checkpoint"
    return _from_checkpoint(args, checkpoint, kept, same_data)


def _of_columns(kept: Intervals, checkpoint: Checkpoint, series: Series, steps: int) -> Intervals | None:
    """Those of the columns that are forecast: fewer than the training's with `--features MS` of a checkpoint of M."""
    names, wanted = checkpoint.forecast_columns, series.forecast_columns
    if kept.offsets.shape[1:] != (len(names), steps) or any(name not in names for name in wanted):
        return None
    return kept.of([names.index(name) for name in wanted])


def _from_windows(args: Namespace, series: SplitSeries, kept: Intervals | None) -> IntervalPlan:
    asked, windows = LEVELS if args.intervals is None else args.intervals, len(series.windows("val"))
    size = len(probabilities(asked)) * len(series.forecast_columns) * args.pred_len
    if size > MOST_OFFSETS:  # more would not fit into a checkpoint's header
        got = f"{size:,} numbers for {len(series.forecast_columns)} columns and {args.pred_len} rows ahead"
        if args.intervals is not None:
            raise input_error("--intervals", got, f"at most {MOST_OFFSETS:,}", "ask for fewer levels, or for none")
        return IntervalPlan((), None, [f"No prediction intervals: {got}, a checkpoint holds {MOST_OFFSETS:,}"])
    levels = supported(asked, windows)
    few = [level for level in asked if level not in levels]
    notes = []
    if few:
        least = max(map(fewest_windows, few))
        got = f"{name_of(few[-1])} with {windows} validation windows"
        if args.intervals is not None:
            raise input_error("--intervals", got, f"at least {least} of them, for an error beyond each end")
        names = " and ".join(f"{name_of(level)} %" for level in few)
        notes = [f"No prediction intervals of {names}: {windows} validation windows, {least} are the fewest"]
    return IntervalPlan(levels, kept.only(levels) if kept and kept.has(levels) else None, notes)


def _from_checkpoint(args: Namespace, checkpoint: Checkpoint, kept: Intervals | None, same_data: bool) -> IntervalPlan:
    if not same_data:
        return IntervalPlan((), None, ["No prediction intervals: they would be those of other data, the checkpoint's"])
    command = f"python run_main.py --is_training 0 --checkpoint {shlex.quote(str(checkpoint.file))}"
    how = f"to calibrate them on the validation windows, without training: {command}"
    if kept is None:
        if args.intervals:
            raise input_error("--intervals", f"a checkpoint without any, {checkpoint.file}", "one that has them", how)
        return IntervalPlan((), None, [f"No prediction intervals: the checkpoint has none; {how}"])
    levels = kept.levels if args.intervals is None else args.intervals
    if not kept.has(levels):
        wrong = next(level for level in levels if not kept.has([level]))
        how += f" --intervals {' '.join(map(name_of, levels))}"
        had = " ".join(map(name_of, kept.levels))
        raise input_error("--intervals", name_of(wrong), f"those that {checkpoint.file} has, {had}", how)
    return IntervalPlan(levels, kept.only(levels), [])
