"""A run from its flags to its results: check, set up, train, test."""

import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from data_provider.data_factory import epoch_batches, make_loader, series_from_args
from data_provider.data_loader import Series
from data_provider.describe import step_words
from layers.backbone import Backbone, require_bitsandbytes
from layers.backbone_files import BackboneInfo, find_backbone
from layers.errors import InputError
from models.TimeLLM import Model, describe
from utils.batches import SequenceCollate
from utils.capacity import fitting_sequences
from utils.checkpoint import TENSORS, check_checkpoint, find_checkpoint, parameter_count, read_checkpoint
from utils.claim import refuse_links
from utils.describe import fill_in_prompt, overview
from utils.errors import RunError
from utils.evaluate import Scores
from utils.files import writing
from utils.flags import run_name
from utils.forecast import History, forecast_future, history_of, read_history
from utils.interrupt import Interrupted, Interrupts
from utils.journal import Journal, tensorboard_writer
from utils.memory import advice, loading_advice, out_of_memory_told
from utils.recorded import recorded, recorded_flags
from utils.results import TestPass, results_folder
from utils.run_log import RunLog, SilentLog
from utils.same_data import trained_on
from utils.saver import resume_command
from utils.start import begin, open_folder
from utils.state import identity
from utils.step import build_optimizer
from utils.train import Run, fit

SPLITS = ("train", "val", "test")
# Flags about how a run is saved: a run that was stopped and taken up again leaves the same checkpoint.
SAVING = {
    "resume", "save_steps", "log_every", "checkpoints", "checkpoint", "do_predict", "predict_path",
    "predict_steps", "save_predictions", "plots", "tensorboard",
}  # fmt: skip


# Flags that change forecasts and that a checkpoint's tensors may fit all the same.
FORECASTING = ("llm_layers", "prompt_decimals", "seq_len", "patch_len", "stride", "n_heads", "d_ff")


def main(args: Namespace, interrupts: Interrupts | None = None) -> int:
    """Run the flags, `--itr` times over; return the exit code.

    Raises:
        InputError: something that the user can mend; raised before any weight is loaded.
        RunError: the disk, the numbers or the memory do not let the run go on.
        Interrupted: a signal has come, and what has to be saved is saved.
    """
    interrupts = interrupts or Interrupts()
    for repeat in range(args.itr):
        folder = Path(args.checkpoints) / run_name(args, repeat)
        if args.do_predict and not args.is_training:
            forecast_only(args, repeat, folder, interrupts)
            continue
        series, info, checkpoint = check(args, folder)
        if checkpoint is not None:
            folder = results_folder(folder, checkpoint, args, series.path, series)
        accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=_precision(args))
        record = describe_run(args, series, info)
        start = None
        if args.is_training:
            ours = identity(args, series, record["backbone"], accelerator.num_processes)
            start = open_folder(args, folder, ours, parameter_count(trained_shapes(args, info)), accelerator)
        elif folder.is_dir():
            refuse_links(folder)
        run = set_up(args, repeat, folder, series, info, accelerator, record, interrupts)
        with out_of_memory_told("restoring the state", partial(advice, run)):
            going_on = begin(run, start) if start is not None else False
        interrupts.defer()
        try:
            if going_on:
                fit(run)
                draw_history(run)
            if start is not None:
                run.log(f"Checkpoints saved at: {folder}")
                run.accelerator.wait_for_everyone()
                checkpoint = folder / TENSORS
            test(run, series, checkpoint)
            if args.do_predict:
                forecast_future(run, history_of(series), folder)
        except RunError as error:
            run.log.note(f"error: {error}")  # the entry prints it, but the terminal may be gone
            raise
        if start is not None and start.claim is not None:
            start.claim.release()
    return 0


def forecast_only(args: Namespace, repeat: int, folder: Path, interrupts: Interrupts) -> None:
    """Forecast the future with a checkpoint; no other rows than the last `seq_len` are needed.

    Raises:
        InputError: see `find_checkpoint`, `read_history` and `check_model`.
    """
    checkpoint = find_checkpoint(Path(args.checkpoint) if args.checkpoint else folder)
    history = read_history(args, checkpoint)
    info = check_model(args)
    check_checkpoint(checkpoint, trained_shapes(args, info))
    check_flags(args, checkpoint, history.trained)
    folder = results_folder(folder, checkpoint, args, None if history.trained else history.path)
    if folder.is_dir():
        refuse_links(folder)
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=_precision(args))
    record = describe_run(args, history, info)
    run = set_up(args, repeat, folder, history, info, accelerator, record, interrupts)
    load_trained(run, checkpoint)
    forecast_future(run, history, folder)


def check(args: Namespace, folder: Path) -> tuple[Series, BackboneInfo, Path | None]:
    """Set the flags against the data, the backbone and the checkpoint, without loading a weight.

    Fills in `enc_in` and `llm_dim` where they were left out.

    Raises:
        InputError: at the first contradiction.
    """
    _check_device(args)
    series = series_from_args(args)
    args.enc_in = _agree("enc_in", args.enc_in, len(series.columns), f"channels read from {series.path}")
    fill_in_prompt(args, series, folder)
    info = check_model(args)
    shapes = trained_shapes(args, info)  # also finds out whether the prompt fits
    for split in SPLITS:
        epoch_batches(args, series.windows(split), split)
    checkpoint = None
    if not args.is_training:
        checkpoint = find_checkpoint(Path(args.checkpoint) if args.checkpoint else folder)
        check_checkpoint(checkpoint, shapes)
        record = recorded(checkpoint)
        check_flags(args, checkpoint, bool(record) and trained_on(record, series.path, series, args.fill_missing))
    return series, info, checkpoint


def check_flags(args: Namespace, checkpoint: Path, same_data: bool) -> None:
    """Set the flags that change forecasts, but no tensor's shape, against those of the training.

    A checkpoint of older code has no record, and everything is accepted.

    Args:
        same_data: on other data than the training's another description of them is no contradiction.

    Raises:
        InputError: at the first that differs.
    """
    flags = recorded_flags(checkpoint)
    for name in FORECASTING:
        if name in flags and getattr(args, name) != flags[name]:
            raise InputError(
                f"--{name}: found {getattr(args, name)}, need {flags[name]}, with which {checkpoint} was trained"
            )
    words = [flags.get("data"), flags.get("data_path"), flags.get("prompt_text") or ""]
    if not (same_data and "prompt_domain" in flags and all(isinstance(word, str) for word in words)):
        return
    found, need = describe(args), describe(Namespace(**flags))
    if found != need:
        flag = "prompt_text" if args.prompt_text or flags.get("prompt_text") else "prompt_domain"
        raise InputError(
            f"--{flag}: found the description {found[:60]!r}, need {need[:60]!r}, with which {checkpoint} was trained"
        )


def check_model(args: Namespace) -> BackboneInfo:
    """Set the flags against the device, the prompt bank and the backbone; fills in `llm_dim`.

    Raises:
        InputError: at the first contradiction.
    """
    _check_device(args)
    describe(args)
    info = find_backbone(args.llm_model, args.llm_model_path)
    args.llm_dim = _agree("llm_dim", args.llm_dim, info.hidden_size, f"hidden size of {info.folder}")
    if args.llm_layers > info.layers:
        raise InputError(f"--llm_layers: found {args.llm_layers}, need at most {info.layers}, all that {info.folder} has")
    if args.d_ff > info.hidden_size:
        raise InputError(f"--d_ff: found {args.d_ff}, need at most {info.hidden_size}, the hidden size of {info.folder}")
    if args.load_in_4bit:
        require_bitsandbytes("load_in_4bit")
    if args.optimizer == "adamw8bit":
        require_bitsandbytes("optimizer adamw8bit")
    return info


def _check_device(args: Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: found no usable CUDA GPU (torch.cuda.is_available() is False); use auto or cpu")


def _agree(flag: str, given: int | None, true: int, what: str) -> int:
    if given not in (None, true):
        raise InputError(f"--{flag}: found {given}, need {true}, the {what}; or leave the flag out")
    return true


def trained_shapes(args: Namespace, info: BackboneInfo) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained tensor, without making one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Model(args, info).state_dict().items()}


def set_up(
    args: Namespace,
    repeat: int,
    folder: Path,
    series: Series | History,
    info: BackboneInfo,
    accelerator: Accelerator,
    record: dict,
    interrupts: Interrupts,
) -> Run:
    """Load the backbone, build the model and the loaders (a history, to be gone on from, has none)."""
    # Fast tokenizers run in the loader's workers, one thread each; this silences their warning of forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    name = "train.log" if args.is_training else "test.log" if isinstance(series, Series) else "forecast.log"
    log = RunLog(folder / name) if accelerator.is_main_process else SilentLog()
    device = accelerator.device
    log(f"Using device: {device}")
    if series.synthetic:
        log(f"SYNTHETIC DATA: {series.path} was generated, not measured; results on it say nothing about real series")
    for line in overview(args, series) if isinstance(series, Series) else ():
        log(line)
    torch.backends.cuda.matmul.allow_tf32 = True
    set_seed((args.seed + repeat) % 2**32)  # NumPy takes no larger one
    with out_of_memory_told("loading the model", lambda: loading_advice(args)):
        backbone = Backbone(info, args.llm_layers, device, args.load_in_4bit, args.grad_checkpoint)
        model = Model(args, backbone).to(device)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    log(f"Trained values: {parameter_count(shapes):,}; {'fast' if model.fast_path else 'plain'} path")
    loaders = {}
    splits = SPLITS if args.is_training else SPLITS[2:]
    for split in splits if isinstance(series, Series) else ():
        data = series.windows(split)
        batches = epoch_batches(args, data, split, accelerator.process_index, accelerator.num_processes)
        batches.seed += repeat
        collate = SequenceCollate(model.prompts, args.pred_len, series.target_index)
        loaders[split] = make_loader(data, batches, args.num_workers, collate, pin=device.type == "cuda")
        log(f"{split} {len(data)}")
    run = Run(
        args=args,
        folder=folder,
        log=log,
        accelerator=accelerator,
        model=model,
        loaders=loaders,
        record=record,
        interrupts=interrupts,
        max_sequences=fitting_sequences(model, args) if args.max_sequences is None else args.max_sequences,
        optimizer=build_optimizer(args.optimizer, model, args.learning_rate) if args.is_training else None,
    )
    if args.is_training and accelerator.is_main_process:
        events = tensorboard_writer(folder, log) if args.tensorboard else None
        run.journal = Journal(folder, run.steps_per_epoch, events)
    return run


def _precision(args: Namespace) -> str:
    cuda = args.device != "cpu" and torch.cuda.is_available()
    return "bf16" if cuda or args.use_amp else "no"


def describe_run(args: Namespace, series: Series | History, info: BackboneInfo) -> dict:
    """What a checkpoint says of its run."""
    record = {
        "flags": {name: value for name, value in vars(args).items() if name not in SAVING},
        "backbone": info.identity | {"layers": args.llm_layers, "load_in_4bit": args.load_in_4bit},
    }
    if isinstance(series, History):
        return record
    return record | {
        "data": {
            "file": series.path.name,
            "rows": len(series.dates),
            "synthetic": series.synthetic,
            "step": step_words(series.dates),
            "mark": {"rows": series.splits.train, "sha256": series.mark},
        },
        "columns": series.columns,
        "target": series.target,
        "scaler": {"mean": series.scaler.mean_.tolist(), "deviation": series.scaler.scale_.tolist()},
    }


def load_trained(run: Run, checkpoint: Path) -> None:
    """Give the model the checkpoint's tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in run.model.state_dict().items()}
    tensors, record = read_checkpoint(checkpoint, shapes)
    trained_on = record.get("backbone", {}).get("fingerprint")
    if trained_on not in (None, run.record["backbone"]["fingerprint"]):
        run.log("WARNING: the checkpoint was trained on a language model with other weights than this one")
    four_bit = record.get("backbone", {}).get("load_in_4bit")
    if four_bit not in (None, run.args.load_in_4bit):
        run.log(f"WARNING: --load_in_4bit: found {run.args.load_in_4bit}, the checkpoint was trained with {four_bit}")
    run.model.load_state_dict(tensors)


def test(run: Run, series: Series, checkpoint: Path) -> Scores:
    """Score the checkpoint on the test split; print the figures and keep them, with pictures."""
    load_trained(run, checkpoint)
    results = TestPass(run, series, run.folder)
    try:
        scores = run.evaluate("test", results.consume)
    except Interrupted as signal:
        run.log(f"{signal}: the test has not ended; {checkpoint} is unharmed")
        run.log(f"To go on: {resume_command(run.args)}")
        raise
    run.log(f"Test MSE: {scores.mse:.7f} MAE: {scores.mae:.7f}")
    figures = {"mse": scores.mse, "mae": scores.mae}
    metrics = results.finish({"test": figures, "checkpoint": str(checkpoint), "data": run.record["data"]})
    if run.args.plots and run.accelerator.is_main_process:
        from utils.plots import draw_test  # only now: matplotlib takes a second to load

        draw_test(results, metrics)
    return scores


def draw_history(run: Run) -> None:
    """The picture of the losses by epoch."""
    if run.args.plots and run.accelerator.is_main_process:
        from utils.plots import draw_losses

        draw_losses(run.folder, run.progress.history)
