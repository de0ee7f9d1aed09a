"""The table of flags: one row a flag, whose role says what becomes of it; and the command line read by it.

Only the standard library is imported here, so that ``--help`` and a wrong flag answer before torch is loaded.
Names, meanings and defaults are those of the Time-LLM family of scripts.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from data_provider.splits import DATASETS
from layers.errors import InputError, input_error
from models import MODELS
from utils.kinds import BOOL, COUNT, COUNT_OR_0, FILE, FOLDER, FREQUENCY, SWITCH, TEXT, Kind, one_of, path_of, real, whole
from utils.saving.record import read_record

MAX_NAME_BYTES = 240  # file systems allow 255; the rest is for the number of a folder moved aside


@dataclass(frozen=True)
class Role:
    """What becomes of a flag's value, besides being read."""

    group: str  # its heading in --help
    recorded: bool = True  # a checkpoint's record has it
    inherited: bool = False  # a command line that names a checkpoint may leave it out
    about_data: bool = False  # it is inherited only where the data are those of the training
    resumed: bool = False  # it must be the same for a run to resume
    fixed: bool = False  # it must be as in training for a checkpoint to be used, though no tensor's shape tells
    tried: bool = True  # it says what was tried, so a table of runs shows it where they differ


NAME = Role("run", inherited=True, resumed=True)
RUN = Role("run")
DATA = Role("data", inherited=True, about_data=True, resumed=True)
FILE_READ = replace(DATA, resumed=False)  # a run that resumes compares what was read
PLACE = replace(FILE_READ, tried=False)
TASK = Role("task", inherited=True, resumed=True)
FIXED_TASK = replace(TASK, fixed=True)
MODEL = Role("model", inherited=True, resumed=True)
FIXED_MODEL = replace(MODEL, fixed=True)
LLM = Role("language model", inherited=True, resumed=True)
FIXED_LLM = replace(LLM, fixed=True)
LLM_PLACE = replace(LLM, resumed=False)  # a run that resumes compares the weights themselves
TRAINING = Role("training", resumed=True)
FIXED_TRAINING = replace(TRAINING, inherited=True, fixed=True)
LENGTH = Role("training")  # a run may resume with more epochs or more patience
MACHINE = Role("machine", tried=False)
LOADING = replace(MACHINE, inherited=True)
OUTPUT = Role("output", recorded=False, tried=False)
UNUSED = Role("accepted, unused by TimeLLM")


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
    _required("task_name", one_of("long_term_forecast"), "long_term_forecast", tag="{}"),
    _required("is_training", SWITCH, "1: train, test, keep the best; 0: test what was kept", RUN),
    _required("model_id", TEXT, "name of the experiment, e.g. ETTh1_512_96", tag="{}"),
    _required("model", one_of(*MODELS), ", ".join(MODELS), tag="{}"),
    Flag("seed", NAME, whole(0, 2**32 - 1), 2021, "seed of weights, shuffling and dropout"),
    Flag("itr", RUN, COUNT, 1, "how often the experiment is repeated; each repeat has its own folder"),

    _required("data", one_of(*DATASETS), f"{', '.join(DATASETS)}; custom: any CSV with a date column; read as that: "
              f"{', '.join(name for name in DATASETS if DATASETS[name].read_as)}", DATA, "{}"),
    Flag("root_path", PLACE, FOLDER, "./dataset", "folder of the data"),
    Flag("data_path", FILE_READ, FILE, None, "CSV file in that folder (default: that of --data, e.g. ETTh1.csv)"),
    Flag("target", DATA, TEXT, "OT", "target column for S and MS; custom files without OT: their last column"),
    Flag("freq", FILE_READ, FREQUENCY, "h", "step of the data, for the time marks, which TimeLLM does not read; custom "
         "files: read off their timestamps"),
    Flag("fill_missing", FILE_READ, one_of("linear", "ffill"), None, "fill empty cells: linear between the values around "
         "them, ffill with the value before (default: they are an error)"),
    Flag("percent", DATA, whole(1, 100), 100, "few-shot: train on the first %% of the training windows"),
    Flag("enc_in", DATA, COUNT, None, "number of channels (default: read off the data)"),
    Flag("prompt_text", PLACE, TEXT, None, "describe the data set in these words (default: the text that --prompt_domain "
         "chooses; custom files: their text in dataset/prompt_bank, else one made from the file)"),

    Flag("features", TASK, one_of("M", "S", "MS"), "M", "M: every column predicts itself; S: only --target; MS: all are "
         "read, --target is scored", "ft{}"),
    # Fewer than 5 rows have no 5 lags to name in the prompt.
    Flag("seq_len", FIXED_TASK, whole(5), 96, "rows of history in a window, at least --patch_len", "sl{}"),
    Flag("label_len", TASK, COUNT_OR_0, None, "rows of history before the target (default: 48, or --seq_len)", "ll{}"),
    Flag("pred_len", TASK, COUNT, 96, "rows to forecast", "pl{}"),

    Flag("d_model", MODEL, COUNT, 16, "width of a patch token", "dm{}"),
    Flag("n_heads", FIXED_MODEL, COUNT, 8, "heads of the reprogramming attention", "nh{}"),
    Flag("e_layers", MODEL, COUNT, 2, "unused by TimeLLM; part of the run's name", "el{}"),
    Flag("d_layers", MODEL, COUNT, 1, "unused by TimeLLM; part of the run's name", "dl{}"),
    Flag("d_ff", FIXED_MODEL, COUNT, 32, "width of a head, and features of the backbone's output that are used", "df{}"),
    Flag("factor", MODEL, COUNT, 1, "unused by TimeLLM; part of the run's name", "fc{}"),
    Flag("embed", TASK, one_of("timeF", "fixed", "learned"), "timeF", "kind of the time marks, which TimeLLM does not read; "
         "part of the run's name", "eb{}"),
    Flag("dropout", MODEL, real(lambda v: 0 <= v < 1, "a number from 0 to below 1"), 0.1, "dropout rate"),
    Flag("patch_len", FIXED_MODEL, COUNT, 16, "rows in a patch"),
    Flag("stride", FIXED_MODEL, COUNT, 8, "rows from one patch to the next"),
    Flag("prompt_domain", MODEL, SWITCH, 0, "1: describe the data set by its text in dataset/prompt_bank"),

    Flag("llm_model", LLM, one_of("QWEN", "LLAMA", "GPT2", "BERT", "AUTO"), "QWEN", "family of the backbone: QWEN, LLAMA, "
         "GPT2, BERT; AUTO: what its folder says"),
    Flag("llm_model_path", LLM_PLACE, path_of("a folder or a hub id"), None, "folder or hub id of the weights (default for "
         "QWEN: base_models/Qwen2.5-3B, else Qwen/Qwen2.5-3B; the others have none)"),
    Flag("llm_dim", LLM, COUNT, None, "hidden size (default: read off the backbone; Qwen2.5-3B has 2048)"),
    Flag("llm_layers", FIXED_LLM, COUNT, 6, "the backbone's first X layers are loaded and used"),
    Flag("load_in_4bit", LLM, BOOL, False, "hold the backbone in 4 bits (bitsandbytes NF4)"),
    Flag("prototypes", LLM, one_of("vocab", "direct"), "vocab", "vocab: mapped from the vocabulary, as published; direct: "
         "trained as they are, far smaller"),
    Flag("prompt_decimals", FIXED_LLM, whole(0, 17), None, "decimals of the prompt's figures (default: all)"),

    Flag("train_epochs", LENGTH, COUNT, 10, "epochs at most"),
    Flag("batch_size", TRAINING, COUNT, 32, "windows in a training step, each with all its channels"),
    Flag("test_every", LENGTH, COUNT_OR_0, 1, "epochs between two test passes; 0: only the best epoch's, at the end"),
    Flag("patience", LENGTH, COUNT, 10, "epochs without a better validation loss before training stops"),
    Flag("learning_rate", TRAINING, real(lambda v: v > 0, "a number above 0"), 1e-4, "rate, used as it stands"),
    Flag("optimizer", TRAINING, one_of("adam", "adamw", "adamw8bit"), "adam", "adam, adamw or adamw8bit (bitsandbytes)"),
    Flag("loss", TRAINING, one_of("MSE"), "MSE", "training loss"),
    Flag("lradj", TRAINING, one_of("type1", "type3", "COS", "TST", "constant"), "type1", "type1: halved each epoch; type3: "
         "3 epochs, then x0.9; COS: cosine; TST: one cycle; constant"),
    Flag("pct_start", TRAINING, real(lambda v: 0 < v < 1, "a number between 0 and 1"), 0.2, "TST's rising part"),
    Flag("use_amp", FIXED_TRAINING, BOOL, False, "mixed precision on the CPU too; a GPU always uses it"),
    Flag("max_iters", TRAINING, COUNT_OR_0, 0, "end each epoch after X iterations, to try things out; 0: off"),

    Flag("device", MACHINE, one_of("auto", "cpu", "cuda"), "auto", "auto: the GPU where there is one"),
    Flag("amp_dtype", MACHINE, one_of("auto", "bf16", "fp16", "fp32"), "auto", "number type of products; auto: bf16 on a GPU, "
         "fp16 where it has none; on the CPU fp32, with --use_amp bf16"),
    Flag("num_workers", LOADING, COUNT_OR_0, 2, "processes that prepare batches; 0: none"),
    Flag("eval_batch_size", LOADING, COUNT, 8, "windows in a validation or test step"),
    Flag("max_sequences", MACHINE, COUNT_OR_0, None, "windows x channels run at once, larger batches in parts (default: "
         "what fits; 0: no limit)"),
    Flag("grad_checkpoint", MACHINE, BOOL, False, "recompute the backbone's layers: slower, less memory"),
    Flag("fast_path", MACHINE, one_of("auto", "plain"), "auto", "auto: the prompt runs without gradients where the backbone "
         "is causal; plain: never"),

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
    Flag("save_predictions", OUTPUT, SWITCH, 1, "1: each test leaves its forecasts in predictions.npz"),
    Flag("plots", OUTPUT, SWITCH, 1, "1: draw the results as PNG files"),
    Flag("tensorboard", OUTPUT, BOOL, False, "write events for TensorBoard, where it is installed"),
    Flag("resume", OUTPUT, BOOL, False, "resume from the state saved last, or start where there is none"),
    Flag("save_steps", OUTPUT, COUNT_OR_0, None, "save the state every X iterations (default: about every 10 minutes; 0: at "
         "epoch ends)"),
    Flag("log_every", OUTPUT, COUNT, 100, "iterations between two lines with the loss"),

    *(Flag(name, UNUSED, COUNT, default, "a number") for name, default in
      (("dec_in", 7), ("c_out", 7), ("moving_avg", 25), ("align_epochs", 10))),
    *(Flag(name, UNUSED, TEXT, default, "a word") for name, default in
      (("loader", "modal"), ("seasonal_patterns", "Monthly"), ("activation", "gelu"))),
    Flag("output_attention", UNUSED, BOOL, False, "a switch"),

    Flag("des", NAME, TEXT, "test", "description, part of the run's name", "{}"),
    _required("model_comment", TEXT, "remark at the end of the run's name", tag="{repeat}-{}"),
]
# fmt: on
REQUIRED = [flag.name for flag in FLAGS if flag.required]


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
        kept = kept or (flag.name == "data" and held.get("data") == "custom")
        value = held.get(flag.name)
        if flag.name in given or not kept or value is None:
            continue
        if not isinstance(value, (str, int, float)):
            got = f"--{flag.name} {str(value)[:40]!r} in its record"
            raise input_error(f"--checkpoint {checkpoint}", got, "text or a number")
        values[flag.name] = str(value)
    return values


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2, without a dump of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> FlagParser:
    """All flags in the groups of ``--help``; whether required ones are there, ``parse_flags`` checks."""
    parser = FlagParser(
        prog="run_main.py",
        usage="python run_main.py " + " ".join(f"--{name} X" for name in REQUIRED) + " [more flags]",
        description="Time-LLM: train (--is_training 1) or test (--is_training 0) a time series forecaster "
        "around a frozen language model. Flags go in any order.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        heading = flag.role.group
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        shown = " (required)" if flag.required else "" if flag.default is None else f" (default: {flag.default})"
        extra: dict[str, Any] = {"nargs": "?", "const": True} if flag.kind is BOOL else {}
        groups[heading].add_argument(
            f"--{flag.name}", type=flag.kind, default=flag.default, metavar="X", help=flag.help + shown, **extra
        )
    return parser


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check a command line; an error prints one line naming the flag and exits with code 2."""
    parser = build_parser()
    try:
        return _parse(parser, list(argv))
    except argparse.ArgumentError as error:
        parser.error(_reason(error))
    except InputError as error:
        parser.error(str(error))


def _parse(parser: FlagParser, argv: list[str]) -> argparse.Namespace:
    given = {word.split("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    _refuse_bare_dashes(argv)
    args, unknown = parser.parse_known_args(argv)
    if not unknown and args.checkpoint is not None and args.is_training in (None, 0):
        values = inherited(Path(args.checkpoint), given)
        parser.set_defaults(**values)  # a default that is text is checked like a word of the user's
        given |= values.keys()
        args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _stray(parser, unknown[0])
    missing = [f"--{name}" for name in REQUIRED if getattr(args, name) is None]
    if missing and args.checkpoint and not Path(args.checkpoint).exists():
        # The flags would have come from it.
        raise input_error(f"--checkpoint {args.checkpoint}", "no such file or folder", "a run's folder or its checkpoint")
    if missing:
        others = f"missing too: {', '.join(missing[1:])}" if missing[1:] else ""
        raise input_error(missing[0], "nothing", "a value", others)
    _complete(args, given)
    return args


def _refuse_bare_dashes(argv: list[str]) -> None:
    """argparse takes the dashes of ``--seed=--`` for the end of the flags, wherever they stand."""
    kinds = {f"--{flag.name}": flag.kind for flag in FLAGS}
    for word in argv:
        name, _, value = word.partition("=")
        if value == "--" and name in kinds:
            raise input_error(name, repr(value), kinds[name].expected)


def _reason(error: argparse.ArgumentError) -> str:
    """The line for a flag whose value is missing or wrong."""
    if error.message.startswith("got "):
        return f"{error.argument_name}: {error.message}"
    kinds = {f"--{flag.name}": flag.kind.expected for flag in FLAGS}
    if error.argument_name in kinds:  # the flag stands without its value
        return str(input_error(error.argument_name, "no value right after it", kinds[error.argument_name]))
    return str(input_error("--help", "a value", "none"))


def _stray(parser: FlagParser, text: str) -> InputError:
    """The error for a word that belongs to no flag."""
    if not text.startswith("-"):
        return input_error(repr(text), "a value without a flag", "every value right after its flag")
    flag = text.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    return input_error(flag, "an unknown flag", f"perhaps {near[0]}" if near else "one that --help lists")


def _complete(args: argparse.Namespace, given: set[str]) -> None:
    """Fill in defaults that follow from other flags.

    Raises:
        InputError: at the first flag that contradicts another.
    """
    if args.label_len is None:
        args.label_len = min(48, args.seq_len)
    args.data = DATASETS[args.data].read_as or args.data
    if args.data == "custom":  # None: read off the file
        args.target = args.target if "target" in given else None
        args.freq = args.freq if "freq" in given else None
    if args.data_path is None and args.data != "custom":
        args.data_path = f"{args.data}.csv"
    if args.seq_len < args.patch_len:
        raise input_error("--seq_len", f"{args.seq_len}, shorter than a patch", f"--patch_len {args.patch_len} or more")
    if args.label_len > args.seq_len:
        raise input_error("--label_len", args.label_len, f"at most --seq_len {args.seq_len}")
    if args.data_path is None:
        raise input_error("--data_path", "nothing", "the CSV's name with --data custom")
    if args.llm_model_path is None and args.llm_model != "QWEN":
        raise input_error("--llm_model_path", "nothing", f"the folder or hub id of the {args.llm_model} weights")
    for name in ("checkpoint", "predict_path"):
        if getattr(args, name) is not None and args.is_training == 1:
            raise input_error(f"--{name}", "it with --is_training 1", "--is_training 0")
    for name in ("predict_path", "predict_steps"):
        if getattr(args, name) is not None and not args.do_predict:
            raise input_error(f"--{name}", "it without --do_predict", "both")
    length = len(run_name(args, args.itr - 1).encode())
    if length > MAX_NAME_BYTES:
        longest = max((args.model_id, args.model_comment, args.des), key=len)
        got = f"{longest[:20]!r}... in a run name of {length} bytes"
        raise input_error("--model_id, --model_comment, --des", got, f"at most {MAX_NAME_BYTES}")


def clean_name(text: str) -> str:
    """``text`` as part of a folder's name: letters, digits, ``.``, ``_`` and ``-``; no leading dot."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"


def run_name(args: argparse.Namespace, repeat: int) -> str:
    """The run's name, which is its folder under ``--checkpoints``; ``repeat`` counts from 0."""
    # Every part is cleaned, for the whole must be one folder's name whatever a flag comes to hold.
    tagged = [(flag.tag, clean_name(str(getattr(args, flag.name)))) for flag in FLAGS if flag.tag]
    return clean_name("_".join(tag.format(value, repeat=repeat) for tag, value in tagged))
