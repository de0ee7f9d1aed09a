"""The command line: every flag, what it may hold, and the run's name.

Only the standard library is imported here, so that ``--help`` and a wrong flag answer before torch is loaded.
Names, meanings and defaults are those of the Time-LLM family of scripts.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layers.errors import InputError
from utils.recorded import inherited_flags

REQUIRED = ("task_name", "is_training", "model_id", "model_comment", "model", "data")
UNUSED = "accepted, unused by TimeLLM"
NAMED = f"{UNUSED}; part of the run's name"
READ_AS_CUSTOM = ("ECL", "Traffic", "Weather")  # names that published scripts pass; no borders of their own
MAX_NAME_BYTES = 240  # file systems allow 255; the rest is for the number of a folder moved aside


@dataclass(frozen=True)
class Kind:
    """What a flag's value must be: how it is read (ValueError: it is not) and the words for a message."""

    read: Callable[[str], Any]
    need: str

    def __call__(self, text: str) -> Any:
        try:
            return self.read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {text!r}, need {self.need}") from None


def _whole(low: int, high: int | None = None) -> Kind:
    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return Kind(read, f"a whole number {limits}")


def _real(inside: Callable[[float], bool], need: str) -> Kind:
    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and inside(value)):
            raise ValueError
        return value

    return Kind(read, need)


def _one_of(*names: str) -> Kind:
    known = {name.lower(): name for name in names}

    def read(text: str) -> str:
        if text.lower() not in known:
            raise ValueError
        return known[text.lower()]

    return Kind(read, names[0] if len(names) == 1 else "one of " + ", ".join(names))


def _text(need: str, pattern: str = r"(?s).*\S.*") -> Kind:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Kind(read, need)


def _yes_or_no(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


COUNT, COUNT_OR_0, SWITCH = _whole(1), _whole(0), _whole(0, 1)
TEXT, FOLDER, FILE = _text("some text"), _text("a folder"), _text("a file name")
BOOL = Kind(_yes_or_no, "nothing, or True or False")


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2, without a dump of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Group:
    """One heading of ``--help``, to which flags are added a line each."""

    def __init__(self, parser: FlagParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def add(self, name: str, kind: Kind, default: Any, text: str) -> None:
        """Add ``--name``; a default of None is explained by ``text`` itself."""
        shown = "required" if name in REQUIRED else f"default: {default}"
        if default is not None or name in REQUIRED:
            text += f" ({shown})"
        extra: dict[str, Any] = {"nargs": "?", "const": True} if kind is BOOL else {}
        self.group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text, **extra)


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
    _add_run(_Group(parser, "run"))
    _add_data(_Group(parser, "data"))
    _add_task(_Group(parser, "task"))
    _add_model(_Group(parser, "model"))
    _add_language_model(_Group(parser, "language model"))
    _add_training(_Group(parser, "training"))
    _add_output(_Group(parser, "output"))
    return parser


def _add_run(group: _Group) -> None:
    group.add("task_name", _one_of("long_term_forecast"), None, "long_term_forecast")
    group.add("is_training", SWITCH, None, "1: train, test, keep the best; 0: test what was kept")
    group.add("model_id", TEXT, None, "name of the experiment, e.g. ETTh1_512_96, in the run's name")
    group.add("model_comment", TEXT, None, "remark at the end of the run's name")
    group.add("model", _one_of("TimeLLM"), None, "TimeLLM")
    group.add("seed", _whole(0, 2**32 - 1), 2021, "seed of weights, shuffling and dropout")
    group.add("itr", COUNT, 1, "how often the experiment is repeated; each repeat has its own folder")
    group.add("des", TEXT, "test", "description, part of the run's name")
    group.add("device", _one_of("auto", "cpu", "cuda"), "auto", "auto: the GPU where there is one")


def _add_data(group: _Group) -> None:
    names = _one_of("ETTh1", "ETTh2", "ETTm1", "ETTm2", "custom", *READ_AS_CUSTOM)
    group.add("data", names, None, f"{names.need}; custom: any CSV with a date column; the last three are read as that")
    group.add("root_path", FOLDER, "./dataset", "folder of the data")
    group.add("data_path", FILE, None, "CSV file in that folder (default: that of --data, e.g. ETTh1.csv)")
    group.add(
        "features", _one_of("M", "S", "MS"), "M",
        "M: every column predicts itself; S: only --target; MS: all are read, --target is scored",
    )
    group.add("target", TEXT, "OT", "target column for S and MS; custom files without OT: their last column")
    freq = _text("a pandas frequency such as h, t, d or 15min", r"\d*[A-Za-z][0-9A-Za-z]*(-[0-9A-Za-z]+)*")
    group.add("freq", freq, "h", "step of the data, for the time marks, which TimeLLM does not read; "
              "custom files: read off their timestamps")
    group.add("fill_missing", _one_of("linear", "ffill"), None,
              "fill empty cells: linear between the values around them, ffill with the value before "
              "(default: they are an error)")
    group.add("percent", _whole(1, 100), 100, "few-shot: train on the first %% of the training windows")
    group.add("num_workers", COUNT_OR_0, 2, "processes that prepare batches; 0: none")
    group.add("embed", _one_of("timeF", "fixed", "learned"), "timeF", NAMED)
    group.add("loader", TEXT, "modal", UNUSED)
    group.add("seasonal_patterns", TEXT, "Monthly", UNUSED)


def _add_task(group: _Group) -> None:
    # Fewer than 5 rows have no 5 lags to name in the prompt.
    group.add("seq_len", _whole(5), 96, "rows of history in a window, at least --patch_len")
    group.add("label_len", COUNT_OR_0, None, "rows of history before the target (default: 48, or --seq_len)")
    group.add("pred_len", COUNT, 96, "rows to forecast")


def _add_model(group: _Group) -> None:
    group.add("enc_in", COUNT, None, "number of channels (default: read off the data)")
    group.add("dec_in", COUNT, 7, UNUSED)
    group.add("c_out", COUNT, 7, UNUSED)
    group.add("d_model", COUNT, 16, "width of a patch token")
    group.add("n_heads", COUNT, 8, "heads of the reprogramming attention")
    group.add("d_ff", COUNT, 32, "width of a head, and features of the backbone's output that are used")
    group.add("e_layers", COUNT, 2, NAMED)
    group.add("d_layers", COUNT, 1, NAMED)
    group.add("factor", COUNT, 1, NAMED)
    group.add("moving_avg", COUNT, 25, UNUSED)
    group.add("dropout", _real(lambda v: 0 <= v < 1, "a number from 0 to below 1"), 0.1, "dropout rate")
    group.add("activation", TEXT, "gelu", UNUSED)
    group.add("patch_len", COUNT, 16, "rows in a patch")
    group.add("stride", COUNT, 8, "rows from one patch to the next")
    group.add("prompt_domain", SWITCH, 0, "1: describe the data set by its text in dataset/prompt_bank")
    group.add("prompt_text", TEXT, None, "describe the data set in these words (default: the text that "
              "--prompt_domain chooses; custom files: their text in dataset/prompt_bank, else one made from the file)")
    group.add("output_attention", BOOL, False, UNUSED)


def _add_language_model(group: _Group) -> None:
    group.add(
        "llm_model", _one_of("QWEN", "LLAMA", "GPT2", "BERT", "AUTO"), "QWEN",
        "family of the backbone: QWEN, LLAMA, GPT2, BERT; AUTO: what its folder says",
    )
    group.add(
        "llm_model_path", _text("a folder or a hub id"), None,
        "folder or hub id of the weights (default for QWEN: base_models/Qwen2.5-3B, else Qwen/Qwen2.5-3B; "
        "needed for the others)",
    )
    group.add("llm_dim", COUNT, None, "hidden size (default: read off the backbone; Qwen2.5-3B has 2048)")
    group.add("llm_layers", COUNT, 6, "the backbone's first X layers are loaded and used")
    group.add("load_in_4bit", BOOL, False, "hold the backbone in 4 bits (bitsandbytes NF4)")
    group.add("prototypes", _one_of("vocab", "direct"), "vocab",
              "vocab: mapped from the vocabulary, as published; direct: trained as they are, far smaller")
    group.add("prompt_decimals", _whole(0, 17), None, "decimals of the prompt's figures (default: all)")
    group.add("fast_path", _one_of("auto", "plain"), "auto",
              "auto: the prompt runs without gradients where the backbone is causal; plain: never")


def _add_training(group: _Group) -> None:
    group.add("train_epochs", COUNT, 10, "epochs at most")
    group.add("batch_size", COUNT, 32, "windows in a training step, each with all its channels")
    group.add("eval_batch_size", COUNT, 8, "windows in a validation or test step")
    group.add("patience", COUNT, 10, "epochs without a better validation loss before training stops")
    group.add("learning_rate", _real(lambda v: v > 0, "a number above 0"), 1e-4, "rate, used as it stands")
    optimizers = _one_of("adam", "adamw", "adamw8bit")
    group.add("optimizer", optimizers, "adam", "adam, adamw or adamw8bit (bitsandbytes)")
    group.add("loss", _one_of("MSE"), "MSE", "training loss")
    group.add("lradj", _one_of("type1", "type3", "COS", "TST", "constant"), "type1",
              "type1: halved each epoch; type3: 3 epochs, then x0.9; COS: cosine; TST: one cycle; constant")
    group.add("pct_start", _real(lambda v: 0 < v < 1, "a number between 0 and 1"), 0.2, "TST's rising part")
    group.add("use_amp", BOOL, False, "mixed precision on the CPU too; a GPU always uses it")
    group.add("align_epochs", COUNT, 10, UNUSED)
    group.add("max_sequences", COUNT_OR_0, None,
              "windows x channels run at once, larger batches in parts (default: what fits; 0: no limit)")
    group.add("grad_checkpoint", BOOL, False, "recompute the backbone's layers: slower, less memory")
    group.add("max_iters", COUNT_OR_0, 0, "end each epoch after X iterations, to try things out; 0: off")


def _add_output(group: _Group) -> None:
    group.add("checkpoints", FOLDER, "./checkpoints/", "folder for the runs' folders")
    group.add("checkpoint", _text("a run's folder or a checkpoint file"), None,
              "with --is_training 0: the run folder or file to use (default: this run's folder); "
              "flags left out then hold what they held in its training")
    group.add("do_predict", BOOL, False, "forecast what follows the last row of the data, into forecast.csv; "
              "with --is_training 0 nothing else is done")
    group.add("predict_path", FILE, None, "forecast what follows this CSV, which has the columns of training")
    group.add("predict_steps", COUNT, None, "rows to forecast; more than --pred_len go on from the forecast "
              "itself (default: --pred_len)")
    group.add("save_predictions", SWITCH, 1, "1: each test leaves its forecasts in predictions.npz")
    group.add("plots", SWITCH, 1, "1: draw the results as PNG files")
    group.add("tensorboard", BOOL, False, "write events for TensorBoard, where it is installed")
    group.add("resume", BOOL, False, "go on from the state saved last, or start where there is none")
    group.add("save_steps", COUNT_OR_0, None,
              "save the state every X iterations (default: about every 10 minutes; 0: at epoch ends)")
    group.add("log_every", COUNT, 100, "iterations between two lines with the loss")


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check a command line; an error prints one line naming the flag and exits with code 2."""
    parser = build_parser()
    given = {word.split("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    try:
        args, unknown = parser.parse_known_args(list(argv))
        if not unknown and args.checkpoint is not None and args.is_training in (None, 0):
            inherited = inherited_flags(args.checkpoint, given)
            parser.set_defaults(**inherited)  # a default that is text is checked like a word of the user's
            given |= inherited.keys()
            args, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        parser.error(_reason(parser, error))
    except InputError as error:
        parser.error(str(error))
    if unknown:
        parser.error(_stray(parser, unknown[0]))
    missing = [f"--{name}" for name in REQUIRED if getattr(args, name) is None]
    if missing and args.checkpoint and not Path(args.checkpoint).exists():
        # The flags would have come from it.
        parser.error(f"--checkpoint {args.checkpoint}: found no such file or folder, need a run's folder or its checkpoint")
    if missing:
        others = f" (missing too: {', '.join(missing[1:])})" if missing[1:] else ""
        parser.error(f"{missing[0]}: found nothing, need a value{others}")
    contradiction = _complete(args, given)
    if contradiction:
        parser.error(contradiction)
    return args


def _reason(parser: FlagParser, error: argparse.ArgumentError) -> str:
    """The line for a flag whose value is missing or wrong."""
    message = error.message
    if not message.startswith("found "):  # argparse's own: the flag stands without its value
        kind = next(action.type for action in parser._actions if error.argument_name in action.option_strings)
        message = f"found no value right after it, need {kind.need}"
    return f"{error.argument_name}: {message}"


def _stray(parser: FlagParser, text: str) -> str:
    """The line for a word that belongs to no flag."""
    if not text.startswith("-"):
        return f"{text!r}: found a value without a flag, need every value right after its flag"
    flag = text.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    return f"{flag}: found an unknown flag, need {f'perhaps {near[0]}' if near else 'one that --help lists'}"


def _complete(args: argparse.Namespace, given: set[str]) -> str | None:
    """Fill in defaults that follow from other flags; return the line for a contradiction, if any."""
    if args.label_len is None:
        args.label_len = min(48, args.seq_len)
    if args.data in READ_AS_CUSTOM:
        args.data = "custom"
    if args.data == "custom":  # None: read off the file
        args.target = args.target if "target" in given else None
        args.freq = args.freq if "freq" in given else None
    if args.data_path is None and args.data != "custom":
        args.data_path = f"{args.data}.csv"
    longest = max((args.model_id, args.model_comment, args.des), key=len)
    length = len(run_name(args, args.itr - 1).encode())
    too_long = f"found {longest[:20]!r}... in a run name of {length} bytes, need at most {MAX_NAME_BYTES}"
    checks = [
        (args.seq_len < args.patch_len,
         f"--seq_len: found {args.seq_len}, shorter than a patch, need --patch_len {args.patch_len} or more"),
        (args.label_len > args.seq_len,
         f"--label_len: found {args.label_len}, need at most --seq_len {args.seq_len}"),
        (args.data_path is None, "--data_path: found nothing, need the CSV's name with --data custom"),
        (args.llm_model_path is None and args.llm_model != "QWEN",
         f"--llm_model_path: found nothing, need the folder or hub id of the {args.llm_model} weights"),
        (args.checkpoint is not None and args.is_training == 1,
         "--checkpoint: found with --is_training 1, need --is_training 0"),
        (args.predict_path is not None and args.is_training == 1,
         "--predict_path: found with --is_training 1, need --is_training 0"),
        (args.predict_path is not None and not args.do_predict,
         "--predict_path: found without --do_predict, need both"),
        (args.predict_steps is not None and not args.do_predict,
         "--predict_steps: found without --do_predict, need both"),
        (length > MAX_NAME_BYTES, f"--model_id, --model_comment, --des: {too_long}"),
    ]
    return next((line for wrong, line in checks if wrong), None)


def clean_name(text: str) -> str:
    """``text`` as part of a folder's name: letters, digits, ``.``, ``_`` and ``-``; no leading dot."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"


def run_name(args: argparse.Namespace, itr: int) -> str:
    """The run's name, which is its folder under ``--checkpoints``; ``itr`` counts the repeats from 0."""
    # Every part is cleaned, for the whole must be one folder's name whatever a flag comes to hold.
    return clean_name(
        f"{args.task_name}_{clean_name(args.model_id)}_{args.model}_{args.data}_ft{args.features}"
        f"_sl{args.seq_len}_ll{args.label_len}_pl{args.pred_len}_dm{args.d_model}_nh{args.n_heads}"
        f"_el{args.e_layers}_dl{args.d_layers}_df{args.d_ff}_fc{args.factor}_eb{args.embed}"
        f"_{clean_name(args.des)}_{itr}-{clean_name(args.model_comment)}"
    )
