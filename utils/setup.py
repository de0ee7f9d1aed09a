"""Set-up of a run: flags made complete and checked, then folder, log, model, loaders and what training needs."""

import os
import time
import warnings
from argparse import Namespace
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast

from data_provider.data_factory import batch_loader, epoch_batches, items, series_flags, series_from_args
from data_provider.data_loader import FileSeries, Series, SplitSeries, load_series
from data_provider.notes import notes_from_args, wall_clock
from layers.backbone import Backbone
from layers.errors import InputError, input_error
from models import model_class
from models.base import ForecastModel
from models.LinearStack import Model as LinearStack
from models.TimeLLM import layers_of
from utils import validate
from utils.flags import DEFAULTS, inherited, recorded, run_name
from utils.results.baselines import SOURCE, doubts, fit_ridge, fit_stack
from utils.results.forecast import read_history
from utils.results.log import Journal, RunLog, tensorboard_writer
from utils.results.notes import read_notes
from utils.saving.checkpoint import Checkpoint, shapes_of, value_count
from utils.saving.files import writing
from utils.saving.folder import open_folder, results_folder
from utils.saving.interrupt import Interrupts
from utils.saving.state import Progress, Saver, identity, part_random
from utils.training.context import Context, Limit, Plan, Training
from utils.training.memory import advice, cap_memory, explain_out_of_memory, fitting_sequences, free_memory
from utils.training.optimizer import Average, build_optimizer, build_scheduler
from utils.training.precision import choose_precision


def setup(args: Namespace, repeat: int, interrupts: Interrupts) -> Context:
    """Make all that a run needs; from here on its flags are final.

    Args:
        args: the parsed flags; what follows from the data and the backbone is filled in in a copy of them.

    Raises:
        InputError: at the first contradiction, before a weight is loaded.
        RunError: no memory for the model, or the folder cannot be written.
    """
    plan = make_plan(args, repeat)
    record = describe_run(plan, repeat)
    ours, start = {}, None
    if plan.args.is_training and isinstance(plan.series, SplitSeries):
        ours = identity(plan.args, plan.series, record["backbone"], plan.pretrain)
        if plan.args.recipe == "published":  # whose steps depend on it
            ours["the number of processes"] = plan.accelerator.num_processes
        start = open_folder(plan.args, plan.folder, ours, value_count(shapes_of(plan.outline)), plan.accelerator)
    context = make_context(plan, repeat, record, _open_log(plan), interrupts)
    if start is not None:
        context.training = start_or_resume(context, ours, *start)
    if isinstance(plan.series, SplitSeries):  # a forecast alone has nothing to lose
        interrupts.defer()
    return context


def make_context(plan: Plan, repeat: int, record: dict[str, Any], log: RunLog, interrupts: Interrupts) -> Context:
    """Load the model of a plan, with untrained weights, and all that does not belong to training.

    Raises:
        RunError: no memory for it.
    """
    model = _load_model(plan, repeat, log)
    if plan.series.notes is not None:
        began, texts = time.perf_counter(), len(plan.series.notes.texts)
        with plan.precision.autocast():
            read_notes(model, plan.series, plan.args, record["backbone"])
        log(
            f"{len(plan.series.notes.text)} notes, {texts} different texts, read in {time.perf_counter() - began:.1f} s",
            *filter(None, [plan.series.notes.read_as]),
        )
    at_once = fitting_sequences(model, plan.args) if plan.args.max_sequences is None else plan.args.max_sequences
    loaders: dict[str, Any] = {}
    rank, world = plan.accelerator.process_index, plan.accelerator.num_processes
    for split, series in plan.splits:
        data, loaders[split] = batch_loader(
            plan.args, split, series, model.prompts, rank, world, plan.args.seed + repeat,
            pin=plan.device.type == "cuda", whole=not model.channel_independent,
        )  # fmt: skip
        log(f"{split} {len(data)}")
    return Context(
        **vars(plan),
        log=log,
        model=model,
        loaders=loaders,
        record=record,
        interrupts=interrupts,
        step_limit=Limit(at_once),
        evaluation_limit=Limit(at_once),
        sequences_per_step=plan.args.batch_size
        * (world if plan.args.recipe == "published" else len((plan.pretrain or plan.series).forecast_columns)),
    )


def make_plan(args: Namespace, repeat: int, in_program: bool = False) -> Plan:
    """Complete the flags and set them against device, data, language model and checkpoint.

    Args:
        in_program: the rows come later, from a program: the plan's series has none, its device is its own, and
            nothing will be written.

    Raises:
        InputError: at the first contradiction.
    """
    args = Namespace(**vars(args))
    trains, forecasts_only = bool(args.is_training), bool(args.do_predict and not args.is_training)
    validate.check_flags(args)
    accelerator, device = find_device(args)
    info = validate.complete_from_model(args)
    folder = Path(args.checkpoints) / run_name(args, repeat) / ("refit" if args.all_rows else "")
    checkpoint = None if trains else Checkpoint.open(Path(args.checkpoint or folder))
    args.stack_windows = args.stack_windows or (checkpoint and checkpoint.flags.get("stack_windows")) or args.stack_windows
    series: Series
    if checkpoint is not None and forecasts_only:
        series, same_data, remarks = read_history(args, checkpoint, in_program)
    else:
        series, remarks = series_from_args(args), []
        same_data = checkpoint is not None and bool(checkpoint.record) and checkpoint.trained_on(series, args)
    if args.do_predict and not in_program:
        series.future_dates(1)
    validate.complete_from_data(args, series, checkpoint, same_data)
    pretrain = source_series(args) if trains and args.data_pretrain else None
    if checkpoint is not None:
        asked, args.reads_notes = args.reads_notes, any(name.startswith("notes.") for name in checkpoint.shapes or ())
        if asked and not args.reads_notes:
            remarks.append(f"{checkpoint.file} was trained without notes: they are not read")
    with torch.device("meta"):
        outline = model_class(args.model)(args, info) if info else model_class(args.model)(args)
    if args.reads_notes and not in_program:
        series = replace(series, notes=notes_from_args(args, series.path, series.dates))
    if isinstance(series, FileSeries):
        series = replace(series, history=outline.history, all_rows=args.all_rows)
    validate.check_training_data(args, series, pretrain, outline)
    if checkpoint is not None:
        validate.check_checkpoint(args, checkpoint, outline, same_data)
        if isinstance(series, FileSeries):
            pretrain, lines = source_of(checkpoint, series, args)
            remarks += lines
            rows, held = len(series.dates), checkpoint.record["data"].get("rows") if same_data else None
            if held not in (None, rows):
                remarks.append(
                    f"{series.path} has {rows} rows, {held} in the training: the figures are of other test windows"
                )
    levels, intervals, of_intervals = validate.plan_intervals(args, series, checkpoint, same_data)
    precision = choose_precision(args, device, uses_llm=info is not None)
    if checkpoint is not None:  # last of all, for it may make a folder
        folder = results_folder(args, folder, checkpoint, None if forecasts_only and same_data else series, accelerator)
    plan = Plan(
        args=args, folder=folder, series=series, pretrain=pretrain, info=info, outline=outline, checkpoint=checkpoint,
        levels=levels, intervals=intervals, remarks=remarks + of_intervals, accelerator=accelerator, device=device,
        precision=precision,
    )  # fmt: skip
    for split, split_series in plan.splits:
        epoch_batches(args, items(args, split_series, split), split, world=accelerator.num_processes)
    return plan


def source_series(args: Namespace) -> FileSeries:
    """What the flags train on, on a scale of its own.

    Raises:
        InputError: see `load_series`.
    """
    own = {"data": args.data_pretrain or args.data, "data_path": args.data_path_pretrain or args.data_path, "bounds": None}
    return load_series(**series_flags(args) | own)


def source_of(checkpoint: Checkpoint, series: FileSeries, args: Namespace) -> tuple[FileSeries | None, list[str]]:
    """What a checkpoint was trained on, where that is another series than the one to test; a line if it cannot be read."""
    origin = replace(checkpoint, record=checkpoint.record.get("pretrain", checkpoint.record))
    if not origin.record or origin.trained_on(series, args):
        return None, []
    flags = Namespace(**DEFAULTS | checkpoint.flags | inherited(checkpoint.file, {}))  # paths as they are found from here
    said = f"No {SOURCE}, which is {origin.trained_data.get('file')}, among the simple forecasts:"
    try:
        source = source_series(flags)
    except InputError as error:
        return None, [f"{said} {error}"]
    return (source, []) if origin.trained_on(source, flags) else (None, [f"{said} {source.path} has other values now"])


def find_device(args: Namespace) -> tuple[Accelerator, torch.device]:
    """The process's accelerator, in the group of processes that its launcher has started, and the device of the run.

    Accelerate chooses a device once for a process; `--device cpu` holds for one run or one loaded Forecaster alone.

    Raises:
        InputError: fewer GPUs than processes on this machine, or `accelerate config` has left an engine that cuts models up.
    """
    for engine in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(engine, "0").lower() not in ("", "0", "false", "no"):
            raise input_error(engine, os.environ[engine], "no such variable, for nothing here uses it", f"unset {engine}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if args.device != "cpu" and torch.cuda.is_available() and here > torch.cuda.device_count():
        found = f"{here} processes on this machine, which has {torch.cuda.device_count()} GPUs"
        raise input_error(f"--device {args.device}", found, "a GPU for each process", "start fewer, or give --device cpu")
    in_group = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # While one process measures and writes alone, the others may wait long.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    # Without cpu=True each process of a group on a machine without a GPU would believe that it is alone. The run has its own
    # number types: those of `accelerate config` may need what is not installed.
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=in_group and on_cpu, mixed_precision="no", kwargs_handlers=[waiting])
    device = torch.device("cpu") if args.device == "cpu" else accelerator.device
    if device == torch.device("cuda"):  # with its number, which some of PyTorch's functions ask for
        device = torch.device("cuda", torch.cuda.current_device())
    return accelerator, device


def load_checkpoint(context: Context) -> Checkpoint:
    """Give the model the tensors to test or forecast with, unless it has them.

    Raises:
        InputError: see `Checkpoint`.
    """
    checkpoint = context.checkpoint or Checkpoint.open(context.folder)  # the latter is what a training has just left
    if context.has_checkpoint:
        return checkpoint
    tensors, trained = checkpoint.tensors(shapes_of(context.model)), checkpoint.backbone
    if trained.get("fingerprint") not in (None, context.record["backbone"].get("fingerprint")):
        context.log("WARNING: the checkpoint was trained on a language model with other weights than this one")
    if trained.get("load_in_4bit") not in (None, context.args.load_in_4bit):
        context.log(
            f"WARNING: --load_in_4bit: got {context.args.load_in_4bit}, "
            f"the checkpoint was trained with {trained['load_in_4bit']}"
        )
    context.model.load_state_dict(tensors)
    context.checkpoint, context.has_checkpoint = checkpoint, True
    if context.args.is_training:  # of the best epoch, and of a run that was finished before
        held = checkpoint.intervals if context.levels else None
        context.intervals = held.only(context.levels) if held and held.has(context.levels) else None
    return checkpoint


def describe_run(plan: Plan, repeat: int) -> dict[str, Any]:
    """What a checkpoint says of its run; data, columns and scaler are those of what it forecasts, and under "pretrain" those
    of what it trained on, where that is another series."""
    args, info, seed, backbone = plan.args, plan.info, plan.random_seed(repeat), {}
    if info is not None:
        backbone = info.identity | {"layers": args.llm_layers, "load_in_4bit": args.load_in_4bit}
        backbone |= {} if seed is None else {"random_seed": seed}
        backbone |= {"note": info.note} if info.note else {}
    output = {name: getattr(args, name) for name in ("intervals", "do_predict", "predict_steps", "refit")}
    record: dict[str, Any] = {"flags": recorded(args), "output": output, "backbone": backbone}
    if not isinstance(plan.series, SplitSeries):
        return record
    return record | plan.series.as_record() | ({"pretrain": plan.pretrain.as_record()} if plan.pretrain else {})


# The run's log, with its first lines.
def _open_log(plan: Plan) -> RunLog:
    args, series = plan.args, plan.series
    with writing(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    if not os.access(plan.folder, os.W_OK):  # else a test would find it at its end, and lose its figures
        raise input_error(f"--checkpoints {plan.folder}", "no writing", "a folder that can be written", "name another")
    name = "train.log" if args.is_training else "test.log" if plan.splits else "forecast.log"
    log = RunLog(plan.folder / name) if plan.accelerator.is_main_process else RunLog(terminal=False)
    log(f"Using device: {plan.device}")
    world = plan.accelerator.num_processes
    if world > 1 and args.recipe == "own":
        each = " or ".join(map(str, sorted({args.batch_size // world, -(-args.batch_size // world)})))
        step = f"--batch_size {args.batch_size} is what a training step sees in all, {each} in each process; "
        own = f"--eval_batch_size {args.eval_batch_size} and --max_sequences are of each"
        log(f"{world} processes: {step if args.is_training else ''}{own}")
    log(*validate.overview(args, series, plan.pretrain), *(plan.remarks if isinstance(series, SplitSeries) else ()))
    if plan.precision.note:
        log(plan.precision.note)
    return log


def _load_model(plan: Plan, repeat: int, log: RunLog) -> ForecastModel:
    """The model on the run's device, its trained weights drawn from the seed.

    Raises:
        RunError: no memory for it.
    """
    args, device = plan.args, plan.device
    # Fast tokenizers run in the loader's workers, one thread each; this silences their warning of forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # partial sums could overflow
    torch.manual_seed((args.seed + repeat) % 2**32)
    cap_memory(device)
    with explain_out_of_memory("loading the model", lambda: advice(args)):
        if plan.info is None:
            model = model_class(args.model)(args).to(device)
        else:
            backbone = Backbone(
                plan.info,
                layers_of(args),
                device,
                args.load_in_4bit,
                args.grad_checkpoint,
                plan.precision.weights_dtype,
                plan.random_seed(repeat),
            )
            model = model_class(args.model)(args, backbone, plan.outline.prompts)
            model.to(device)
    free_memory(device)  # what loading took for a while would lie between the parts of a step
    log(f"Trained values: {value_count(shapes_of(plan.outline)):,}" + (f"; {model.path()}" if model.path() else ""))
    if plan.info is not None and plan.info.note:
        log(f"Language model: {plan.info.note}")
    return model


def start_or_resume(
    context: Context, ours: dict[str, Any], lock: int | None, state: dict[str, Any] | None, lines: list[str]
) -> Training:
    """What a run needs to train, brought to where it begins: the state found in its folder, or the first iteration.

    Args:
        ours: what the run is, see `identity`.
        lock, state, lines: see `open_folder`.

    Raises:
        RunError: no memory for the state.
    """
    args, model, log, accelerator = context.args, context.model, context.log, context.accelerator
    optimizer = build_optimizer(args.optimizer, model, args.learning_rate)
    scheduler, scheduler_steps = build_scheduler(args, optimizer, context.steps_per_epoch, accelerator.num_processes)
    journal = None
    if accelerator.is_main_process:
        events = tensorboard_writer(context.folder, log) if args.tensorboard else None
        journal = Journal(context.folder, context.steps_per_epoch, events)
    log(*lines)
    average = Average(model, args.ema)
    saver = Saver(
        context.folder, args, model, optimizer, accelerator, context.device, ours, context.record, average.tensors
    )  # fmt: skip
    progress = Progress()
    if state is not None:
        with explain_out_of_memory("restoring the state", lambda: advice(args, model)):
            progress = saver.resume(state, log)
        if args.max_sequences is None:  # else what is free today would decide
            context.step_limit.sequences = progress.max_sequences
            context.evaluation_limit.sequences = progress.evaluation_sequences
    else:
        if model.linear_map is not None:
            began = time.perf_counter()
            (train, _), (_, val) = context.trained_series.windows_for_a_map(), context.windows.windows_for_a_map()
            weights, penalty = fit_ridge(train, val, context.windows.windows("train") if args.all_rows else None)
            model.linear_map.detach().copy_(torch.from_numpy(weights))
            log(f"Linear map in closed form: relative penalty {penalty:.2g}, {time.perf_counter() - began:.1f} s")
            if against := doubts(weights, penalty, val):
                without = ", --skip none does without it" if model.uses_llm else ""
                log(f"WARNING: the linear map is a poor one: {against}; {len(train)} training windows made it{without}")
        if model.notes is not None and context.series.notes is not None:
            notes, until = context.series.notes, wall_clock([context.windows.trained_until])[0]
            model.notes.fit(sorted(set(notes.text[notes.known <= until].tolist())))
        for stack in (part for part in model.modules() if isinstance(part, LinearStack)):
            began = time.perf_counter()
            stack.load_state_dict(fit_stack(context.windows, stack.members, stack.deviating))
            log(f"{stack.title.capitalize()}, in closed form: {time.perf_counter() - began:.1f} s")
        broadcast([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])  # the first process's, in place
        average.step(1)  # where the first epoch makes no step, these are validated
        part_random(accelerator.process_index, context.loaders["train"].batch_sampler.seed)  # type: ignore[union-attr]
    done = min(progress.epoch - 1, args.train_epochs)
    if scheduler_steps:
        done = scheduler_steps * min(
            done * context.steps_per_epoch + progress.iteration, args.train_epochs * context.steps_per_epoch
        )
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # after a resume, or where a step was skipped
    for _ in range(done):
        scheduler.step()
    if args.loss.startswith("MAE"):
        log(f"Train, Vali and Test Loss are {args.loss}; the test's own figures are MSE and MAE")
    group = optimizer.param_groups[0]
    if args.recipe == "published":
        seen = f"{args.batch_size} windows of one channel a step in each process"
        log(f"recipe published: learning rate {group['lr']:g}, Adam's betas {group['betas']}, {seen}")
    elif args.names_rate and model.is_trained:
        others = {"COS": "lower it along a cosine of 20 epochs", "TST": "cycle Adam's first beta, too"}
        would = others.get(args.lradj, f"train at {args.learning_rate / 25:g}")
        log(f"learning rate {args.learning_rate:g} as it stands; the published code would {would} (--recipe published)")
    return Training(optimizer, scheduler, scheduler_steps, average, saver, progress, journal, lock)
