"""Set-up of a run: flags made complete and checked, then folder, log, model, loaders and what training needs."""

import os
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from data_provider.data_factory import batch_loader, epoch_batches, pretraining_series, series_from_args
from data_provider.data_loader import Series, SplitSeries
from data_provider.description import frequency
from data_provider.splits import SPLITS
from layers.backbone import Backbone, BackboneInfo
from layers.errors import input_error
from models import model_class
from models.base import ForecastModel
from models.TimeLLM import embeddings_on_host, layers_of
from utils import checks
from utils.begin import begin
from utils.flags import FinalFlags, recorded, run_name
from utils.results.forecast import no_rows_yet, read_history
from utils.results.log import RunLog, SilentLog
from utils.saving.checkpoint import Checkpoint, shapes_of, value_count
from utils.saving.files import writing
from utils.saving.folder import Start, open_folder, refuse_links, results_folder
from utils.saving.interrupt import Interrupts
from utils.saving.shares import whole_shapes
from utils.saving.state import identity
from utils.training.memory import cap_memory, explain_out_of_memory, fitting_sequences, free_memory, loading_advice
from utils.training.precision import Precision, choose_precision
from utils.training.session import Job, Limit


@dataclass(frozen=True)
class Plan:
    """A run whose flags are complete and checked; no weight is loaded yet."""

    args: FinalFlags
    folder: Path  # of its results
    series: Series  # a SplitSeries, but for a run that only forecasts
    info: BackboneInfo | None  # the language model's, where there is one
    outline: ForecastModel  # on the meta device
    checkpoint: Checkpoint | None  # to test or forecast with; a run that trains makes one
    intervals: checks.IntervalPlan
    notes: list[str]  # to be said with a forecast
    accelerator: Accelerator
    device: torch.device
    precision: Precision
    pretrain: SplitSeries | None = None  # trained on in the series' place

    def random_seed(self, repeat: int) -> int | None:
        """What a language model of `--llm_ablation random` is drawn from: the training's seed; None: it is read."""
        if self.args.llm_ablation != "random":
            return None
        held = self.checkpoint.backbone.get("random_seed") if self.checkpoint else None
        usable = type(held) is int and 0 <= held < 2**32  # the checkpoint may be anyone's
        return held if usable else (self.args.seed + repeat) % 2**32

    @property
    def splits(self) -> list[tuple[str, SplitSeries]]:
        """The splits that the run goes through, with the series; a history that is gone on from has none."""
        if not isinstance(self.series, SplitSeries):
            return []
        calibrates = bool(self.intervals.levels) and self.intervals.kept is None
        first = 0 if self.args.is_training else 1 if calibrates else 2
        series = {"train": self.pretrain or self.series}
        return [(split, series.get(split, self.series)) for split in SPLITS[first:]]


def setup(args: Namespace, repeat: int, interrupts: Interrupts) -> Job:
    """Make all that a run needs; from here on its flags are final.

    Args:
        args: the parsed flags; what follows from the data and the backbone is filled in in a copy of them.

    Raises:
        InputError: at the first contradiction, before a weight is loaded.
        RunError: no memory for the model, or the folder cannot be written.
    """
    plan = make_plan(args, repeat)
    record = describe_run(plan.args, plan.series, plan.info, plan.random_seed(repeat), plan.pretrain)
    start = _claim_folder(plan, record)
    job = make_job(plan, repeat, record, _open_log(plan), interrupts)
    if start is not None:
        job.training = begin(job, start)
    if isinstance(plan.series, SplitSeries):  # a forecast alone has nothing to lose
        interrupts.defer()
    return job


def make_job(plan: Plan, repeat: int, record: dict[str, Any], log: RunLog, interrupts: Interrupts) -> Job:
    """Load the model of a plan, with untrained weights, and all that does not belong to training.

    Raises:
        RunError: no memory for it.
    """
    model = _load_model(plan, repeat, log)
    at_once = fitting_sequences(model, plan.args) if plan.args.max_sequences is None else plan.args.max_sequences
    return Job(
        args=plan.args,
        folder=plan.folder,
        log=log,
        accelerator=plan.accelerator,
        device=plan.device,
        precision=plan.precision,
        model=model,
        series=plan.series,
        loaders=_loaders(plan, model, repeat, log),
        record=record,
        interrupts=interrupts,
        step_limit=Limit(at_once),
        evaluation_limit=Limit(at_once),
        checkpoint=plan.checkpoint,
        levels=plan.intervals.levels,
        intervals=plan.intervals.kept,
        notes=plan.notes,
        pretrain=plan.pretrain,
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
    checks.check_device(args)
    accelerator, device = find_device(args)
    folder = Path(args.checkpoints) / run_name(args, repeat)
    checkpoint = None if trains else Checkpoint.open(Path(args.checkpoint or folder))
    if in_program and checkpoint is not None:
        series, same_data, notes = no_rows_yet(args, checkpoint)
    else:
        series, same_data, notes = _read_series(args, checkpoint, forecasts_only)
    if args.do_predict and not in_program:
        series.future_dates(1)
    info = checks.check_model(args)
    if not model_class(args.model).channel_independent and args.freq is None:
        args.freq = frequency(series.step)  # tells how many time marks there are
    pretrain = pretraining_series(args) if trains and args.data_pretrain else None
    checks.check_pretraining(args, series, pretrain, checkpoint)
    outline = checks.outline(args, info)
    if checkpoint is not None:
        checks.check_checkpoint(args, checkpoint, outline, same_data)
        folder = results_folder(args, folder, checkpoint, None if forecasts_only and same_data else series)
        if folder.is_dir() and not in_program:
            refuse_links(folder)
    intervals = checks.plan_intervals(args, series, checkpoint, same_data)
    notes += intervals.notes if forecasts_only else []
    if trains and isinstance(series, SplitSeries):
        checks.check_linear_map(args, pretrain or series, outline)
        checks.fit_batch(args, pretrain or series, outline)
    precision = choose_precision(args, device, uses_llm=info is not None)
    final = FinalFlags(args)
    plan = Plan(final, folder, series, info, outline, checkpoint, intervals, notes, accelerator, device, precision, pretrain)
    for split, split_series in plan.splits:
        epoch_batches(args, split_series.windows(split), split, world=accelerator.num_processes)
    return plan


def find_device(args: Namespace) -> tuple[Accelerator, torch.device]:
    """The process's accelerator, in the group of processes that its launcher has started, and the device of the run.

    Accelerate chooses a device once for a process; `--device cpu` holds for one run or one loaded ForecastModel alone.

    Raises:
        InputError: fewer GPUs than processes on this machine.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if args.device != "cpu" and torch.cuda.is_available() and here > torch.cuda.device_count():
        found = f"{here} processes on this machine, which has {torch.cuda.device_count()} GPUs"
        raise input_error(f"--device {args.device}", found, "a GPU for each process", "start fewer, or give --device cpu")
    in_group = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # While one process measures and writes alone, the others may wait long.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=in_group and args.device == "cpu", kwargs_handlers=[waiting])
    device = torch.device("cpu") if args.device == "cpu" else accelerator.device
    if device == torch.device("cuda"):  # with its number, which some of PyTorch's functions ask for
        device = torch.device("cuda", torch.cuda.current_device())
    return accelerator, device


def load_checkpoint(job: Job) -> Checkpoint:
    """Give the model the tensors to test or forecast with, unless it has them.

    Raises:
        InputError: see `Checkpoint`.
    """
    checkpoint = job.checkpoint or Checkpoint.open(job.folder)  # the latter is what a training has just left
    if job.has_checkpoint:
        return checkpoint
    tensors, trained = checkpoint.tensors(whole_shapes(job.model)), checkpoint.backbone
    if trained.get("fingerprint") not in (None, job.record["backbone"].get("fingerprint")):
        job.log("WARNING: the checkpoint was trained on a language model with other weights than this one")
    if trained.get("load_in_4bit") not in (None, job.args.load_in_4bit):
        four_bit = trained["load_in_4bit"]
        job.log(f"WARNING: --load_in_4bit: got {job.args.load_in_4bit}, the checkpoint was trained with {four_bit}")
    job.model.load_state_dict(tensors)
    job.checkpoint, job.has_checkpoint = checkpoint, True
    if job.args.is_training:  # of the best epoch, and of a run that was finished before
        held = checkpoint.intervals if job.levels else None
        job.intervals = held.only(job.levels) if held and held.has(job.levels) else None
    return checkpoint


def describe_run(
    args: Namespace,
    series: Series,
    info: BackboneInfo | None,
    random_seed: int | None = None,
    pretrain: SplitSeries | None = None,
) -> dict[str, Any]:
    """What a checkpoint says of its run; data, columns and scaler are those of what it forecasts, and under "pretrain" those
    of what it trained on, where that is another series."""
    backbone: dict[str, Any] = {}
    if info is not None:
        backbone = info.identity | {"layers": args.llm_layers, "load_in_4bit": args.load_in_4bit}
        backbone |= {} if random_seed is None else {"random_seed": random_seed}
        backbone |= {"note": info.note} if info.note else {}
    record: dict[str, Any] = {"flags": recorded(args), "backbone": backbone}
    if not isinstance(series, SplitSeries):
        return record
    return record | series.as_record() | ({"pretrain": pretrain.as_record()} if pretrain else {})


def _read_series(args: Namespace, checkpoint: Checkpoint | None, forecasts_only: bool) -> tuple[Series, bool, list[str]]:
    """The data; whether they are those of the checkpoint's training; and what is to be said of a forecast's history.

    Fills in `enc_in` and `prompt_text`.
    """
    if forecasts_only and checkpoint is not None:
        return read_history(args, checkpoint)
    series = series_from_args(args)
    checks.check_channels(args, series)
    checks.fill_in_prompt(args, series, checkpoint)
    same = checkpoint is not None and bool(checkpoint.record) and checkpoint.trained_on(series, args.fill_missing)
    return series, same, []


def _claim_folder(plan: Plan, record: dict[str, Any]) -> Start | None:
    """The folder of a run that trains, locked, and what it finds there; None for one that does not."""
    if not (plan.args.is_training and isinstance(plan.series, SplitSeries)):
        return None
    ours = identity(plan.args, plan.series, record["backbone"], plan.pretrain)
    return open_folder(plan.args, plan.folder, ours, value_count(shapes_of(plan.outline)), plan.accelerator)


def _open_log(plan: Plan) -> RunLog:
    """The run's log, with its first lines."""
    args, series = plan.args, plan.series
    with writing(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    name = "train.log" if args.is_training else "test.log" if plan.splits else "forecast.log"
    log = RunLog(plan.folder / name) if plan.accelerator.is_main_process else SilentLog()
    log(f"Using device: {plan.device}")
    for line in checks.shares(args, plan.accelerator.num_processes):
        log(line)
    for each in (series, plan.pretrain):
        if each is not None and each.synthetic:
            log(f"SYNTHETIC DATA: {each.path} was generated, not measured; results on it say nothing about real series")
    if plan.pretrain is not None:
        for line in checks.transfer(series, plan.pretrain):
            log(line)
    for line in checks.overview(args, series) if isinstance(series, SplitSeries) else ():
        log(line)
    for line in plan.intervals.notes if isinstance(series, SplitSeries) else ():
        log(line)
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
    set_seed((args.seed + repeat) % 2**32)  # NumPy takes no larger one
    cap_memory(device)
    with explain_out_of_memory("loading the model", lambda: loading_advice(args)):
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
                embeddings_on_host(args),
            )
            model = model_class(args.model)(args, backbone, plan.outline.prompts)
            model.to(device)
    free_memory(device)  # what loading took for a while would lie between the parts of a step
    path = f"; {model.path()}" if model.path() else ""
    log(f"Trained values: {value_count(shapes_of(plan.outline)):,}{path}")
    if plan.info is not None and plan.info.note:
        log(f"Language model: {plan.info.note}")
    return model


def _loaders(plan: Plan, model: ForecastModel, repeat: int, log: RunLog) -> dict[str, Any]:
    """The loaders of the splits that the run goes through."""
    loaders, accelerator = {}, plan.accelerator
    for split, series in plan.splits:
        data, loaders[split] = batch_loader(
            plan.args,
            split,
            series,
            model.prompts,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            seed=plan.args.seed + repeat,
            pin=plan.device.type == "cuda",
            whole=not model.channel_independent,
        )
        log(f"{split} {len(data)}")
    return loaders
