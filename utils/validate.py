"""The flags set against the model, the machine, the data, the language model and the checkpoint, before a weight is loaded.

Each contradiction is an `InputError` of one line. `complete_from_data` and `complete_from_model` fill in what was left out.
"""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from data_provider.data_loader import FileSeries, Series, SplitSeries
from data_provider.description import LISTED, bank_file, dataset_description, make_description
from data_provider.splits import M4
from data_provider.timestamps import frequency, gaps_in, step_words
from layers.backbone import BackboneInfo, find_backbone, require_bitsandbytes
from layers.errors import input_error, listed
from models import model_class
from models.base import ForecastModel
from utils.flags import DEFAULTS, FLAGS, longest_window, refuse, resumed
from utils.results.bands import LEVELS, Intervals, fewest_windows, name_of
from utils.results.baselines import stack_windows
from utils.saving.checkpoint import Checkpoint, shapes_of
from utils.study.cells import nvidia_smi


def check_flags(args: Namespace) -> None:
    """Set the flags against what the model can do, and `--device` against the machine.

    Raises:
        InputError: at the first contradiction.
    """
    model, name = model_class(args.model), f"--model {args.model}"
    no_llm = f"for {name} has no language model"
    refuse(
        args,
        (args.moving_avg % 2 == 0, "moving_avg", "an odd number of rows"),
        (args.model == "PatchTST" and args.d_model % args.n_heads > 0, "n_heads", f"a divisor of --d_model {args.d_model}"),
        (model.whole_batches and args.max_sequences, "max_sequences", f"0, for {name} takes its batches whole"),
        (
            not model.channel_independent and args.features == "MS",
            "features",
            f"M or S, for {name} forecasts all that it reads",
        ),
        (
            args.data == M4 and not model.reads_masks,
            "model",
            f"TimeLLM or Ridge with --data {M4}, whose series may be shorter than a window",
        ),
        (
            not model.channel_independent and args.recipe == "published",
            "recipe",
            f"own, for {name} reads all channels at once",
        ),
        (
            not model.channel_independent and args.embed != "timeF",
            "embed",
            f"timeF, for {name} maps scaled time marks",
        ),
        (not model.uses_llm and args.llm_ablation != "off", "llm_ablation", f"off, {no_llm}"),
        (not model.uses_llm and args.skip != "none", "skip", f"none, {no_llm}"),
        (args.skip == "stack" and args.data == M4, "skip", f"none, ridge or linear with --data {M4}"),
        (
            args.stack_windows is not None and args.data_pretrain,
            "data_pretrain",
            "nothing with a linear stack, whose weights are those of --data (--skip ridge or none does without)",
        ),
        (not model.uses_llm and args.load_in_4bit, "load_in_4bit", f"False, {no_llm}"),
        (
            args.llm_ablation == "random" and args.load_in_4bit,
            "llm_ablation",
            "another with --load_in_4bit: drawn weights are not quantised",
        ),
    )
    if args.optimizer == "adamw8bit":
        require_bitsandbytes("optimizer adamw8bit")
    if args.load_in_4bit:
        require_bitsandbytes("load_in_4bit")
    check_device(args)


# A run that is meant for a GPU never runs silently on the CPU. (scripts/setup_env.sh asks, too.)
def check_device(args: Namespace) -> None:
    if args.device == "cpu" or torch.cuda.is_available():
        return
    if drivers := nvidia_smi("driver_version"):
        raise input_error(
            f"--device {args.device}",
            f"an NVIDIA GPU (driver {drivers[0]}) that PyTorch {torch.__version__} cannot use",
            "a PyTorch with CUDA" if torch.version.cuda is None else f"a driver for its CUDA {torch.version.cuda}",
            "update the driver (under WSL2 the one of Windows), install another build (TORCH_INDEX_URL="
            "https://download.pytorch.org/whl/cu126 bash scripts/setup_env.sh), or give --device cpu",
        )
    if args.device == "cuda":
        raise input_error("--device", "cuda, and PyTorch finds no GPU", "auto or cpu on this machine")
    if args.load_in_4bit:
        raise input_error(
            "--load_in_4bit",
            "no GPU that PyTorch can use",
            "one",
            "leave --load_in_4bit out, or give --device cpu to run it slowly on purpose",
        )


def complete_from_data(args: Namespace, series: Series, checkpoint: Checkpoint | None, same_data: bool) -> None:
    """Fill in `enc_in`, `freq` and, of custom data that nobody has described, `prompt_text`.

    A test takes the text of its training, whatever has come to the file since. Only the columns that are forecast are
    described, with ranges of the training rows: the prompt says nothing of later rows.

    Raises:
        InputError: `--enc_in` contradicts the data, or the prompt bank lacks the text that is asked for.
    """
    if isinstance(series, FileSeries):
        most = series.splits.train
        refuse(args, (args.season and args.season > most, "season", f"at most {most} rows, those that train"))
        learned = checkpoint.record.get("data", {}).get("learned_until", "") if checkpoint is not None and same_data else ""
        if learned > str(series.dates[most - 1]):
            got, expected = f"a model that has learned from rows up to {learned}", "one that has not seen the test's rows"
            raise input_error(f"--checkpoint {args.checkpoint}", got, expected, "with --do_predict it forecasts")
    channels = len(series.columns)
    wrong = args.enc_in not in (None, channels)
    refuse(args, (wrong, "enc_in", f"{channels}, the channels read from {series.path}; or leave the flag out"))
    args.enc_in = channels
    model = model_class(args.model)
    if not model.channel_independent and args.freq is None:
        args.freq = frequency(series.step)  # tells how many time marks there are
    if isinstance(series, FileSeries) and args.stack_windows is not None:
        args.stack_windows = args.stack_windows or stack_windows(series)
        most = series.splits.few_shot - args.pred_len
        refuse(args, (longest_window(args) > most, "stack_windows", f"at most {most} rows, with which {series.path} trains"))
    asked = args.prompt_domain and not args.checkpoint  # with a checkpoint the flag may be the training's
    if isinstance(series, FileSeries) and args.data == "custom" and not (args.prompt_text or asked or bank_file(args)):
        args.prompt_text = checkpoint.flags.get("prompt_text") if checkpoint is not None and same_data else None
        if not args.prompt_text:
            # From float32 values, as ever: states of earlier runs hold the text that these make.
            rows = series.to_own_units(series.values[: series.splits.train, series.forecast_slice])
            low, high = rows.min(axis=0), rows.max(axis=0)
            args.prompt_text = make_description(series.dates, series.forecast_columns, low, high)
    if model.uses_llm:
        dataset_description(args)


def complete_from_model(args: Namespace) -> BackboneInfo | None:
    """Fill in `llm_dim`.

    Returns:
        The language model; None where `--model` has none.

    Raises:
        InputError: its folder cannot be used, or contradicts the flags.
    """
    if not model_class(args.model).uses_llm:
        return None
    info = find_backbone(args.llm_model, args.llm_model_path)
    width, folder = info.hidden_size, info.folder
    refuse(
        args,
        (args.llm_dim not in (None, width), "llm_dim", f"{width}, the hidden size of {folder}; or leave the flag out"),
        (args.load_in_4bit and info.dequantised, "load_in_4bit", f"False, for {folder} is quantised already"),
        (args.llm_layers > info.layers, "llm_layers", f"at most {info.layers}, all that {folder} has"),
        (args.d_ff > width, "d_ff", f"at most {width}, the hidden size of {folder}"),
        (
            args.llm_ablation in ("attention", "transformer") and width % info.heads,
            "llm_ablation",
            f"none or off: the {info.heads} heads of {folder} do not divide its hidden size of {width}",
        ),
    )
    args.llm_dim = width
    return info


def check_training_data(args: Namespace, series: Series, pretrain: SplitSeries | None, model: ForecastModel) -> None:
    """Set the model against the series that it trains on: `pretrain`, where it is given, in the place of `series`.

    Of a model that is not trained step by step, `train_epochs` and `batch_size` are filled in.

    Raises:
        InputError: `--data_pretrain` has other columns, or no training window is whole and a linear map is to be fitted.
    """
    if pretrain is not None and not model.channel_independent and pretrain.columns != series.columns:
        raise input_error(
            "--data_pretrain",
            f"the columns {', '.join(pretrain.columns[:LISTED])} of {pretrain.path}",
            f"those of {series.path}, {', '.join(series.columns[:LISTED])}: --model {args.model} forecasts each from all",
        )
    trains_on = pretrain or series
    if not model.is_trained:
        args.train_epochs = 1  # there is nothing to repeat
        if args.is_training and isinstance(trains_on, SplitSeries):  # batches are how the fit is scored, not steps
            args.batch_size = min(args.batch_size, max(1, len(trains_on.windows("train"))))
    if not (args.is_training and isinstance(trains_on, SplitSeries)) or model.linear_map is None:
        return
    if trains_on.windows("train").sequence_count == 0:
        raise input_error(
            f"--skip {args.skip}" if model.uses_llm else f"--model {args.model}",
            f"--seq_len {args.seq_len}, with which no training series has a whole window",
            f"a shorter --seq_len, or series of {args.seq_len + 2 * args.pred_len} values",
        )


def check_checkpoint(args: Namespace, checkpoint: Checkpoint, model: ForecastModel, same_data: bool) -> None:
    """Set a checkpoint against the model that the flags describe, and the flags against its training's.

    A checkpoint of older code has no record, and its flags are taken to be these.

    Args:
        model: of which the shapes count.
        same_data: on other data than the training's another description of them is no contradiction.

    Raises:
        InputError: at the first contradiction.
    """
    flags, file = checkpoint.flags, checkpoint.file
    if flags.get("model", args.model) != args.model:
        raise input_error("--model", args.model, f"{flags['model']}, which {file} holds")
    trained_on = checkpoint.trained_data.get("file")
    if args.data_pretrain and trained_on not in (None, Path(args.data_path_pretrain).name):
        raise input_error(
            "--data_pretrain",
            f"{args.data_pretrain}, file {args.data_path_pretrain}",
            f"{trained_on}, on which {file} was trained",
            "or leave it out",
        )
    checkpoint.tensors(shapes_of(model))
    if not flags:
        return
    # A flag that came to be after the checkpoint was written had its default then.
    held = resumed(Namespace(**DEFAULTS)) | flags
    roles = {"fixed"} if args.model == "TimeLLM" else {"fixed", "baseline"}
    for name in (flag.name for flag in FLAGS if roles & set(flag.roles.split())):
        if name in held and getattr(args, name) != held[name]:
            raise input_error(f"--{name}", getattr(args, name), f"{held[name]}, with which {file} was trained")
    if model.prompts is None or not same_data:
        return
    now, then = dataset_description(args), dataset_description(Namespace(**flags))
    if now != then:
        flag = "--prompt_text" if args.prompt_text or flags.get("prompt_text") else "--prompt_domain"
        raise input_error(flag, f"the description {now[:60]!r}", f"{then[:60]!r}, with which {file} was trained")


def plan_intervals(
    args: Namespace, series: Series, checkpoint: Checkpoint | None, same_data: bool
) -> tuple[tuple[float, ...], Intervals | None, list[str]]:
    """Set `--intervals` against the validation windows; of a forecast alone, against what its checkpoint has.

    Args:
        same_data: whether the series is of the data that the checkpoint was trained on.

    Returns:
        The levels of the run's prediction intervals, per cent; those of the checkpoint, where they are of these data, else
        they are calibrated; lines for the user.

    Raises:
        InputError: levels that were asked for and cannot be had.
    """
    if args.intervals == ():
        return (), None, []
    kept = checkpoint.intervals if checkpoint is not None and same_data else None
    if kept is not None and checkpoint is not None:  # --features MS of a checkpoint of M forecasts one of its columns
        names, wanted = checkpoint.forecast_columns, series.forecast_columns
        fits = kept.offsets.shape[1:] == (len(names), args.pred_len) and set(wanted) <= set(names)
        kept = kept.of([names.index(name) for name in wanted]) if fits else None
    if isinstance(series, SplitSeries):
        trained = checkpoint.intervals.levels if checkpoint is not None and checkpoint.intervals is not None else LEVELS
        asked, windows = args.intervals or trained, len(series.windows("val"))
        levels = tuple(level for level in asked if windows >= fewest_windows(level))
        few = [level for level in asked if level not in levels]
        least = max(map(fewest_windows, few), default=0)
        if few and args.intervals:
            raise input_error(
                "--intervals",
                f"{name_of(few[-1])} with {windows} validation windows",
                f"at least {least} of them, for an error beyond each end",
            )
        named = " and ".join(f"{name_of(level)} %" for level in few)
        remarks = (
            [f"No prediction intervals of {named}: {windows} validation windows, {least} are the fewest"] if few else []
        )
        return levels, kept.only(levels) if kept and kept.has(levels) else None, remarks
    assert checkpoint is not None, "a forecast alone has a checkpoint"
    if not same_data:
        return (), None, ["No prediction intervals: they would be those of other data, the checkpoint's"]
    command = f"python run_main.py --is_training 0 --checkpoint {shlex.quote(str(checkpoint.file))}"
    how = f"to calibrate them on the validation windows, without training: {command}"
    if kept is None and args.intervals:
        raise input_error("--intervals", f"a checkpoint without any, {checkpoint.file}", "one that has them", how)
    if kept is None:
        return (), None, [f"No prediction intervals: the checkpoint has none; {how}"]
    levels = args.intervals or kept.levels
    wrong = [level for level in levels if not kept.has([level])]
    if wrong:
        had, how = " ".join(map(name_of, kept.levels)), f"{how} --intervals {' '.join(map(name_of, levels))}"
        raise input_error("--intervals", name_of(wrong[0]), f"those that {checkpoint.file} has, {had}", how)
    return levels, kept.only(levels), []


def overview(args: Namespace, series: Any, pretrain: FileSeries | None) -> list[str]:
    """Lines that say what was read: generated data, what trains in a transfer, missing rows, and all of a custom file."""
    sets: list[Any] = [each for each in (series, pretrain) if each is not None]
    lines = [
        f"SYNTHETIC DATA: {each.path} was generated, not measured; results on it say nothing about real series"
        for each in sets
        if each.synthetic
    ]
    lines += [each.read_as for each in sets if each.read_as]
    if args.set_by_preset:
        lines.append("--preset sets " + " ".join(f"--{name} {getattr(args, name)}" for name in args.set_by_preset))
    if pretrain is not None:
        verb = "train" if args.is_training else "trained"
        trains = f"{pretrain.splits.few_shot} rows of {pretrain.path} {verb} (step: {pretrain.step_words})"
        lines.append(f"Transfer: {trains}; {series.path} validates and tests (step: {series.step_words})")
    if isinstance(series, FileSeries) and series.bounds is not None:
        beyond = ((series.own < series.bounds[0]) | (series.own > series.bounds[1])).any(axis=0)
        if beyond.any():
            names = listed([series.columns[place] for place in beyond.nonzero()[0]])
            lines.append(f"WARNING: --bounds: the file has values of {names} beyond them, which no forecast can reach")
    custom = args.data == "custom" and isinstance(series, FileSeries)
    if isinstance(series, FileSeries) and custom:
        forecast = "all columns are forecast" if args.features == "M" else f"{series.target} is forecast"
        lines += [
            f"{series.path}: {len(series.dates)} rows from {series.dates[0]} to {series.dates[-1]}, "
            f"step: {step_words(series.step, series.dates)}",
            f"{len(series.columns)} channels: {listed(series.columns)}; {forecast} (target: {series.target})",
            f"rows: train {series.splits.train}, val {series.splits.val}, test {series.splits.test} (70 %, 10 %, 20 %)",
        ]
    for each in sets:
        gaps = gaps_in(each.dates, each.step) if each is pretrain or custom else []
        if gaps:
            where = "" if custom and each is series else f" in {each.path}"
            count = "1 gap" if len(gaps) == 1 else f"{len(gaps)} gaps, the first"
            between = f"{count} between {gaps[0][0]} and {gaps[0][1]}"
            lines.append(f"WARNING: rows are missing{where}: {between}; windows go over it as if nothing were")
    if custom and model_class(args.model).uses_llm:
        lines.append(f"prompt: {dataset_description(args)}")
    if custom and series.filled:
        cells = "1 empty cell" if series.filled == 1 else f"{series.filled} empty cells"
        lines.append(f"{cells} filled (--fill_missing {args.fill_missing})")
    return lines
