"""Table of flags: one row a flag, whose role says what becomes of it.

Only the standard library is imported here, so that ``--help`` and a wrong flag answer before torch is loaded.
Names, meanings and defaults are those of the Time-LLM family of scripts.
"""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from data_provider.splits import DATASETS, M4, PATTERNS
from layers.errors import input_error
from models import MODELS
from utils.kinds import (
    BOOL,
    COUNT,
    COUNT_OR_0,
    FILE,
    FOLDER,
    FREQUENCY,
    LEVELS,
    SWITCH,
    TEXT,
    Kind,
    one_of,
    path_of,
    real,
    whole,
)
from utils.saving.record import read_record


@dataclass(frozen=True)
class Role:
    """What becomes of a flag's value, besides being read."""

    group: str  # its heading in --help
    recorded: bool = True  # a checkpoint's record has it
    inherited: bool = False  # a command line that names a checkpoint may leave it out
    about_data: bool = False  # it is inherited only where the data are those of the training
    resumed: bool = False  # it must be the same for a run to resume
    fixed: bool = False  # it must be as in training for a checkpoint to be used, though no tensor's shape tells
    baselines: bool = False  # models without a language model alone read it
    tried: bool = True  # it says what was tried, so a table of runs shows it where they differ
    about_llm: bool = False  # it says which language model runs, and nothing of a run in which none does


NAME = Role("run", inherited=True, resumed=True)
RUN = Role("run")
DATA = Role("data", inherited=True, about_data=True, resumed=True)
FILE_READ = replace(DATA, resumed=False)  # a run that resumes compares what was read
PLACE = replace(FILE_READ, tried=False)
TASK = Role("task", inherited=True, resumed=True)
FIXED_TASK = replace(TASK, fixed=True)
BASELINE_TASK = replace(FIXED_TASK, baselines=True)
MODEL = Role("model", inherited=True, resumed=True)
FIXED_MODEL = replace(MODEL, fixed=True)
BASELINE = replace(FIXED_MODEL, baselines=True)
LLM = Role("language model", inherited=True, resumed=True)
FIXED_LLM = replace(LLM, fixed=True)
LLM_ITSELF = replace(LLM, about_llm=True)
LLM_LAYERS = replace(LLM_ITSELF, fixed=True)
LLM_PLACE = replace(LLM_ITSELF, resumed=False)  # a run that resumes compares the weights themselves
TRAINING = Role("training", resumed=True)
FIXED_TRAINING = replace(TRAINING, inherited=True, fixed=True)
LENGTH = Role("training")  # a run may resume with more epochs or more patience
PACE = replace(LENGTH, tried=False)
MACHINE = Role("machine", tried=False)
KIND_OF_MACHINE = replace(MACHINE, tried=True)
LOADING = replace(MACHINE, inherited=True)
OUTPUT = Role("output", recorded=False, tried=False)
UNUSED = Role("accepted, unused")


@dataclass(frozen=True)
class Flag:
    """A row of the table. A default of None is explained by the help text itself."""

    name: str
    role: Role
    kind: Kind
    default: Any
    help: str
    tag: str = ""  # its part of the run's name, a format of the value (and of the number of the repeat)
    required: bool = False


def _required(name: str, kind: Kind, help: str, role: Role = NAME, tag: str = "") -> Flag:
    return Flag(name, role, kind, None, help, tag, required=True)


# fmt: off
# Parts of the run's name stand in the order of these rows.
FLAGS = [
    _required("task_name", one_of("long_term_forecast", "short_term_forecast"), "long_term_forecast; short_term_forecast: "
              "the M4 competition, with --data m4", tag="{}"),
    _required("is_training", SWITCH, "1: train, test, keep the best; 0: test what was kept", RUN),
    _required("model_id", TEXT, "name of the experiment, e.g. ETTh1_512_96", tag="{}"),
    _required("model", one_of(*MODELS), ", ".join(MODELS), tag="{}"),
    Flag("seed", NAME, whole(0, 2**32 - 1), 2021, "seed of weights, shuffling and dropout"),
    Flag("itr", RUN, COUNT, 1, "how often the experiment is repeated; each repeat has its own folder"),

    _required("data", one_of(*DATASETS), f"{', '.join(DATASETS)}; custom: any CSV with a date column; m4: the competition's "
              "files", DATA, "{}"),
    Flag("root_path", PLACE, FOLDER, "./dataset", "folder of the data"),
    Flag("data_path", FILE_READ, FILE, None, "CSV file in that folder (default: that of --data, e.g. ETTh1.csv)"),
    Flag("data_pretrain", DATA, one_of(*DATASETS), None, "transfer: train on the training rows of this data set; --data "
         "validates, tests and is forecast (run_pretrain.py asks for it)"),
    Flag("data_path_pretrain", FILE_READ, FILE, None, "its CSV file in --root_path (default: that of --data_pretrain)"),
    Flag("target", DATA, TEXT, "OT", "target column for S and MS; custom files without OT: their last column"),
    Flag("freq", FILE_READ, FREQUENCY, "h", "step of the data, for the time marks, which Autoformer alone reads; custom "
         "files: read off their timestamps"),
    Flag("fill_missing", FILE_READ, one_of("linear", "ffill"), None, "fill empty cells: linear between the values around "
         "them, ffill with the value before (default: they are an error)"),
    Flag("percent", DATA, whole(1, 100), 100, "few-shot: train on the first %% of the training windows"),
    Flag("enc_in", DATA, COUNT, None, "number of channels (default: read off the data)"),
    Flag("prompt_text", PLACE, TEXT, None, "describe the data set in these words (default: the text that --prompt_domain "
         "chooses; custom files: their text in dataset/prompt_bank, else one made from the file)"),

    Flag("features", TASK, one_of("M", "S", "MS"), "M", "M: every column predicts itself; S: only --target; MS: all are "
         "read, --target is scored", "ft{}"),
    Flag("seasonal_patterns", TASK, one_of(*PATTERNS), "Monthly", "which of the M4 competition's series; the pattern sets "
         "the lengths below"),
    # Fewer than 5 rows have no 5 lags to name in the prompt.
    Flag("seq_len", FIXED_TASK, whole(5), 96, "rows of history in a window, at least --patch_len", "sl{}"),
    Flag("label_len", BASELINE_TASK, COUNT_OR_0, None, "rows before the target, which Autoformer alone reads "
         "(default: 48, or --seq_len); of the others more than --seq_len are taken for --seq_len", "ll{}"),
    Flag("pred_len", TASK, COUNT, 96, "rows to forecast", "pl{}"),

    Flag("d_model", MODEL, COUNT, 16, "width of a patch token", "dm{}"),
    Flag("n_heads", FIXED_MODEL, COUNT, 8, "heads of the reprogramming attention", "nh{}"),
    Flag("e_layers", MODEL, COUNT, 2, "encoder layers of PatchTST and Autoformer", "el{}"),
    Flag("d_layers", MODEL, COUNT, 1, "decoder layers of Autoformer", "dl{}"),
    Flag("d_ff", FIXED_MODEL, COUNT, 32, "width of a head, and features of the backbone's output that are used; of "
         "PatchTST and Autoformer the feed-forward block's", "df{}"),
    Flag("factor", BASELINE, COUNT, 1, "Autoformer looks at factor x log T delays", "fc{}"),
    Flag("moving_avg", BASELINE, COUNT, 25, "rows of DLinear's and Autoformer's moving average, an odd number"),
    Flag("activation", BASELINE, one_of("gelu", "relu"), "gelu", "of Autoformer's feed-forward blocks"),
    Flag("embed", TASK, one_of("timeF", "fixed", "learned"), "timeF", "kind of the time marks, which Autoformer alone "
         "reads", "eb{}"),
    Flag("dropout", MODEL, real(lambda v: 0 <= v < 1, "a number from 0 to below 1"), 0.1, "dropout rate"),
    Flag("patch_len", FIXED_MODEL, COUNT, 16, "rows in a patch"),
    Flag("stride", FIXED_MODEL, COUNT, 8, "rows from one patch to the next"),
    Flag("skip", FIXED_MODEL, one_of("none", "ridge", "linear"), "none", "TimeLLM's forecast is a linear map of the window, "
         "and what the head adds to it; ridge: in closed form, not trained, poor where training windows are few (the log "
         "warns then); linear: trained from there on (ours, not the paper's)"),
    Flag("use_reprogramming", MODEL, SWITCH, 1, "0: w/o reprogramming, a linear map of the patches in its place"),
    Flag("prompt_domain", MODEL, SWITCH, 0, "1: describe the data set by its text in dataset/prompt_bank"),

    Flag("llm_model", LLM_ITSELF, one_of("QWEN", "LLAMA", "GPT2", "BERT", "AUTO"), "QWEN", "family of the backbone: QWEN, "
         "LLAMA, GPT2, BERT; AUTO: what its folder says"),
    Flag("llm_model_path", LLM_PLACE, path_of("a folder or a hub id"), None, "folder or hub id of the weights (default for "
         "QWEN: base_models/Qwen2.5-3B, else Qwen/Qwen2.5-3B; the others have none)"),
    Flag("llm_dim", LLM_ITSELF, COUNT, None, "hidden size (default: read off the backbone; Qwen2.5-3B has 2048)"),
    Flag("llm_layers", LLM_LAYERS, COUNT, 6, "the backbone's first X layers are loaded and used"),
    Flag("load_in_4bit", LLM_ITSELF, BOOL, False, "hold the backbone in 4 bits (bitsandbytes NF4)"),
    Flag("prototypes", LLM, one_of("vocab", "direct"), "vocab", "vocab: mapped from the vocabulary, as published; direct: "
         "trained as they are, far smaller"),
    Flag("llm_ablation", FIXED_LLM, one_of("off", "none", "attention", "transformer", "random"), "off", "in the language "
         "model's place none (w/o LLM), one attention layer (LLM2Attn), one Transformer block (LLM2Trsf); random: its "
         "architecture, weights drawn from --seed"),
    Flag("use_prompt", FIXED_LLM, SWITCH, 1, "0: w/o prompt, the patches alone go through the language model"),
    Flag("prompt_lags", FIXED_LLM, one_of("paper", "peaks"), "paper", "lags that the prompt names; peaks: the largest peaks "
         "of the autocorrelation, such as a day and a week"),
    Flag("prompt_decimals", FIXED_LLM, whole(0, 17), None, "decimals of the prompt's figures (default: all)"),

    Flag("train_epochs", LENGTH, COUNT, 10, "epochs at most"),
    Flag("batch_size", TRAINING, COUNT, 32, "windows in a training step, each with all its channels"),
    Flag("test_every", PACE, COUNT_OR_0, 1, "epochs between two test passes; 0: only the best epoch's, at the end"),
    Flag("patience", LENGTH, COUNT, 10, "epochs without a better validation loss before training stops"),
    Flag("learning_rate", TRAINING, real(lambda v: v > 0, "a number above 0"), 1e-4, "rate, used as it stands"),
    Flag("optimizer", TRAINING, one_of("adam", "adamw", "adamw8bit"), "adam", "adam, adamw or adamw8bit (bitsandbytes)"),
    Flag("loss", TRAINING, one_of("MSE", "SMAPE", "MASE", "MAPE"), "MSE", "training loss (with --data m4 left out: "
         "SMAPE); SMAPE, MASE and MAPE, which do not depend on a series' scale, with --data m4 alone"),
    Flag("lradj", TRAINING, one_of("type1", "type3", "COS", "TST", "constant"), "type1", "type1: halved each epoch; type3: "
         "3 epochs, then x0.9; COS: cosine; TST: one cycle; constant"),
    Flag("pct_start", TRAINING, real(lambda v: 0 < v < 1, "a number between 0 and 1"), 0.2, "TST's rising part"),
    Flag("use_amp", FIXED_TRAINING, BOOL, False, "mixed precision on the CPU too; a GPU always uses it"),
    Flag("max_iters", TRAINING, COUNT_OR_0, 0, "end each epoch after X iterations, to try things out; 0: off"),

    Flag("device", KIND_OF_MACHINE, one_of("auto", "cpu", "cuda"), "auto", "auto: the GPU where there is one"),
    Flag("amp_dtype", MACHINE, one_of("auto", "bf16", "fp16", "fp32"), "auto", "type of products; auto: bf16 on a GPU, fp16 "
         "where it has none; on the CPU fp32, with --use_amp bf16"),
    Flag("num_workers", LOADING, COUNT_OR_0, 2, "processes that prepare batches; 0: none"),
    Flag("eval_batch_size", LOADING, COUNT, 8, "windows in a validation or test step"),
    Flag("max_sequences", MACHINE, COUNT_OR_0, None, "windows x channels run at once, larger batches in parts (default: "
         "what fits; 0: no limit)"),
    Flag("grad_checkpoint", MACHINE, BOOL, False, "recompute the backbone's layers: slower, less memory"),
    Flag("fast_path", KIND_OF_MACHINE, one_of("auto", "plain"), "auto", "auto: the prompt runs without gradients where the "
         "backbone is causal; plain: never"),

    Flag("checkpoints", OUTPUT, FOLDER, "./checkpoints/", "folder for the runs' folders"),
    Flag("checkpoint", OUTPUT, path_of("a run's folder or a checkpoint file"), None, "with --is_training 0: the run folder "
         "or file to use (default: this run's folder); flags left out then hold what they held in its training"),
    Flag("torch_checkpoint", OUTPUT, SWITCH, 1, "1: a trained run also leaves its best weights in a file `checkpoint` for "
         "torch.load"),
    Flag("do_predict", OUTPUT, BOOL, False, "forecast what follows the last row of the data, into forecast.csv; with "
         "--is_training 0 nothing else is done"),
    Flag("predict_path", OUTPUT, FILE, None, "forecast what follows this CSV, which has the columns of training"),
    Flag("predict_steps", OUTPUT, COUNT, None, "rows to forecast; more than --pred_len go on from the forecast itself "
         "(default: --pred_len)"),
    Flag("append", OUTPUT, BOOL, False, "with --do_predict: keep the forecast in forecasts.csv, too, the history of all "
         "forecasts by the last date that they knew"),
    Flag("intervals", OUTPUT, LEVELS, None, "per cent of the truths that each prediction interval is to hold; none: no "
         "intervals (default: 80 95; of a forecast, what its checkpoint has)"),
    Flag("save_predictions", OUTPUT, SWITCH, 1, "1: each test leaves its forecasts in predictions.npz"),
    Flag("plots", OUTPUT, SWITCH, 1, "1: draw the results as PNG files"),
    Flag("tensorboard", OUTPUT, BOOL, False, "write events for TensorBoard, where it is installed"),
    Flag("resume", OUTPUT, BOOL, False, "resume from the state saved last, or start where there is none"),
    Flag("save_steps", OUTPUT, COUNT_OR_0, None, "save the state every X iterations (default: about every 10 minutes; 0: at "
         "epoch ends)"),
    Flag("log_every", OUTPUT, COUNT, 100, "iterations between two lines with the loss"),

    *(Flag(name, UNUSED, COUNT, default, "a number") for name, default in
      (("dec_in", 7), ("c_out", 7), ("align_epochs", 10))),
    *(Flag(name, UNUSED, TEXT, default, "a word") for name, default in
      (("loader", "modal"),)),
    Flag("output_attention", UNUSED, BOOL, False, "a switch"),

    Flag("des", NAME, TEXT, "test", "description, part of the run's name", "{}"),
    _required("model_comment", TEXT, "remark at the end of the run's name", tag="{repeat}-{}"),
]
# fmt: on
REQUIRED = [flag.name for flag in FLAGS if flag.required]
# Where the published script of that name differs from run_main.py: defaults, and what a training cannot do without.
DEFAULTS_OF: dict[str, dict[str, Any]] = {"run_pretrain.py": {"patience": 5}}
REQUIRED_BY = {"run_pretrain.py": ["data_pretrain"]}


class FinalFlags(argparse.Namespace):
    """Flags that are complete: from here on they can be read, and no longer set."""

    def __init__(self, args: argparse.Namespace):
        self.__dict__.update(vars(args))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"--{name} is set after the run's set-up")


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that a checkpoint's record has."""
    return {flag.name: getattr(args, flag.name) for flag in FLAGS if flag.role.recorded}


def resumed(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that must be the same for a run to resume, by name in alphabetical order."""
    return {f.name: getattr(args, f.name) for f in sorted(FLAGS, key=lambda flag: flag.name) if f.role.resumed}


def resumed_defaults() -> dict[str, Any]:
    """The defaults of these flags: what a run had that was saved before a flag came to be."""
    return {flag.name: flag.default for flag in FLAGS if flag.role.resumed}


def default_of(name: str) -> Any:
    """The default of a flag."""
    return next(flag.default for flag in FLAGS if flag.name == name)


def same_experiment(args: argparse.Namespace, held: dict[str, Any]) -> bool:
    """Whether the user's own words in a run's name are those of `held`, the flags of a record."""
    return all(held.get(f.name) == getattr(args, f.name) for f in FLAGS if f.tag and f.kind is TEXT)


def check_fixed(args: argparse.Namespace, held: dict[str, Any], checkpoint: Path) -> None:
    """Set the flags that change forecasts, but no tensor's shape, against those of a checkpoint's training.

    Args:
        held: the record's flags; one of older code may lack some, or all.

    Raises:
        InputError: at the first that differs.
    """
    for flag in FLAGS:
        name = flag.name
        if flag.role.baselines and args.model == "TimeLLM":
            continue
        if flag.role.fixed and name in held and getattr(args, name) != held[name]:
            raise input_error(f"--{name}", getattr(args, name), f"{held[name]}, with which {checkpoint} was trained")


def inherited(checkpoint: Path, given: set[str]) -> dict[str, str]:
    """Values, as the words of a command line, for the flags that one with ``--checkpoint`` leaves out.

    As words they go through the same checks as a user's own: the checkpoint may be anyone's.

    Args:
        given: names of the flags on the command line. One that names other data leaves the training's
            data out of account; the kind of data, --data, is kept where only a file is named.

    Raises:
        InputError: a value that is no text, number or switch.
    """
    held = read_record(checkpoint).get("flags", {})
    other_data = bool(given & {"data", "root_path", "data_path"})
    values = {}
    for flag in FLAGS:
        kept = flag.role.inherited and not (other_data and flag.role.about_data)
        kept = kept or (flag.name == "data" and held.get("data") in ("custom", M4))
        value = held.get(flag.name)
        if flag.name in given or not kept or value is None:
            continue
        if not isinstance(value, (str, int, float)):
            got = f"--{flag.name} {str(value)[:40]!r} in its record"
            raise input_error(f"--checkpoint {checkpoint}", got, "text or a number")
        values[flag.name] = str(value)
    return values


# What the machines of a group may have each in its own way.
OF_A_MACHINE = {"root_path", "llm_model_path", "predict_path", "device", "num_workers"}


def differing(args: argparse.Namespace, first: argparse.Namespace) -> str | None:
    """The name of a flag that this process of a group has otherwise than the first one; None where all is alike."""
    names = [flag.name for flag in FLAGS if flag.name not in OF_A_MACHINE]
    return next((name for name in names if getattr(args, name) != getattr(first, name)), None)


def clean_name(text: str) -> str:
    """``text`` as part of a folder's name: letters, digits, ``.``, ``_`` and ``-``; no leading dot."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"


def run_name(args: argparse.Namespace, repeat: int | str) -> str:
    """The run's name, which is its folder under ``--checkpoints``; ``repeat`` counts from 0, "mean" is that of all."""
    # Every part is cleaned, for the whole must be one folder's name whatever a flag comes to hold.
    tagged = [(flag.tag, clean_name(str(getattr(args, flag.name)))) for flag in FLAGS if flag.tag]
    return clean_name("_".join(tag.format(value, repeat=repeat) for tag, value in tagged))
