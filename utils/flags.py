"""The table of flags, the command line that it makes, and the flags that follow from others.

Names, meanings and defaults are those of the Time-LLM family of scripts. Torch is not imported here: `--help` and a wrong
flag answer at once.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data_provider.splits import DATASETS, M4, PATTERNS, m4_file
from layers.errors import InputError, input_error
from models import MODELS


@dataclass(frozen=True)
class ArgType:
    """What a flag's value must be; called with a word of the command line, it returns the value."""

    convert: Callable[[str], Any]  # raises ValueError or LookupError
    expected: str  # for a message
    allowed: Callable[[Any], object] = lambda value: True
    choices: tuple[str, ...] = ()  # the names that it is one of, where it is

    def __call__(self, text: str) -> Any:
        with suppress(ValueError, LookupError):
            value = self.convert(text)
            if self.allowed(value):
                return value
        known = {name.lower(): name for name in self.choices}
        near = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.7)
        hint = f"; perhaps {known[near[0]]}" if near else ""
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {self.expected}{hint}")


def whole(low: int, high: float = math.inf) -> ArgType:
    """A whole number from `low` to `high`."""
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    return ArgType(int, f"a whole number {limits}", lambda number: low <= number <= high)


def one_of(*names: str) -> ArgType:
    """One of some names, in upper or lower case; the value is the name as it stands here."""
    known = {name.lower(): name for name in names}
    return ArgType(lambda text: known[text.lower()], f"one of {', '.join(names)}", choices=names)


COUNTS = whole(2, 100_000)  # several
COUNT, COUNT_OR_0, SWITCH = whole(1), whole(0), whole(0, 1)
TEXT, FOLDER, FILE = (ArgType(str, expected, str.strip) for expected in ("some text", "a folder", "a file name"))
WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
BOOL = ArgType(lambda text: WORDS[text.lower()], "nothing, or True or False")
FREQUENCY = ArgType(
    str, "a pandas frequency such as h, t, d or 15min", re.compile(r"\d*[A-Za-z][0-9A-Za-z]*(-[0-9A-Za-z]+)*").fullmatch
)
NAMES = ArgType(lambda text: text, "some text", str.strip)  # one or more
LEVEL = ArgType(
    lambda text: None if text.lower() == "none" else float(text),
    "numbers between 0 and 100 such as 80 95, or none",
    lambda level: level is None or (0 < level < 100 and round(level, 4) == level),
)


@dataclass(frozen=True)
class Flag:
    """A row of the table. A default of None is explained by the help text itself.

    `roles` says what becomes of the value, in these words:
    inherit: a command line with --checkpoint may leave it out; a flag of the group data then counts for the same data alone.
    resume: it must be the same for a run to resume.
    fixed: it must be as in training for a checkpoint to be used, though no tensor's shape tells.
    baseline: the same, but TimeLLM does not read it.
    unlisted: a table of runs does not show it, for it does not say what was tried.
    A checkpoint's record has all flags but those of the group output.
    """

    name: str
    group: str  # its heading in --help
    roles: str
    type: ArgType
    default: Any
    help: str


# fmt: off
FLAGS = [
    Flag("task_name", "run", "inherit resume", one_of("long_term_forecast", "short_term_forecast"), None,
         "long_term_forecast; short_term_forecast: the M4 competition, with --data m4"),
    Flag("is_training", "run", "", SWITCH, None, "1: train, test, keep the best; 0: test what was kept"),
    Flag("model_id", "run", "inherit resume", TEXT, None, "name of the experiment, e.g. ETTh1_512_96"),
    Flag("model_comment", "run", "inherit resume", TEXT, None, "remark at the end of the run's name"),
    Flag("des", "run", "inherit resume", TEXT, "test", "description, part of the run's name"),
    Flag("model", "run", "inherit resume", one_of(*MODELS), None, ", ".join(MODELS)),
    Flag("preset", "run", "unlisted", one_of("best"), None, "best: what has forecast best here (docs/measured.md), for the "
         "flags that are left out; the log lists them, and the run is known by them"),
    Flag("seed", "run", "inherit resume", whole(0, 2**32 - 1), 2021, "seed of weights, shuffling and dropout"),
    Flag("itr", "run", "", COUNT, 1, "how often the experiment is repeated; each repeat has its own folder"),

    Flag("data", "data", "inherit resume", one_of(*DATASETS), None,
         f"{', '.join(DATASETS)}; custom: any CSV with a date column; m4: the competition's files"),
    Flag("root_path", "data", "inherit unlisted", FOLDER, "./dataset", "folder of the data"),
    Flag("data_path", "data", "inherit", FILE, None, "CSV file in that folder (default: that of --data, e.g. ETTh1.csv)"),
    Flag("data_pretrain", "data", "inherit resume", one_of(*DATASETS), None, "transfer: train on the training rows of this "
         "data set; --data validates, tests and is forecast (run_pretrain.py asks for it)"),
    Flag("data_path_pretrain", "data", "inherit", FILE, None, "its CSV file in --root_path (default: that of "
         "--data_pretrain)"),
    Flag("target", "data", "inherit resume", TEXT, "OT", "target column for S and MS; custom files without OT: their last "
         "column"),
    Flag("freq", "data", "inherit", FREQUENCY, "h", "step of the data, for the time marks, which Autoformer alone reads; "
         "custom files: read off their timestamps"),
    Flag("fill_missing", "data", "inherit", one_of("linear", "ffill"), None, "fill empty cells: linear between the values "
         "around them, ffill with the value before (default: they are an error)"),
    Flag("encoding", "data", "inherit",
         ArgType(str, "an encoding that Python knows, such as gbk or utf-16", lambda v: "".encode(v) is not None), None,
         "of the CSV (default: UTF-8, else UTF-16, GB 18030 or Latin-1, as its bytes look; the log says which)"),
    Flag("date_column", "data", "inherit", TEXT, None, "column of the timestamps (default: date)"),
    Flag("id_column", "data", "inherit", TEXT, None, "column that names the series of each row, where a row has not all of "
         "them (long format); each series is read as a column"),
    Flag("drop_columns", "data", "inherit", NAMES, None, "columns that are not read"),
    Flag("dayfirst", "data", "inherit", BOOL, None, "True: 01/02/2020 is in February, False: in January, where dates can be "
         "read in both orders (default: the order with even steps, else month first)"),
    Flag("bounds", "data", "inherit resume", NAMES, None, "least and largest value of forecasts and their bands: 0 none for "
         "all columns, or for some rain:0:none,humidity:0:100"),
    Flag("season", "data", "inherit", whole(2), None, "rows of the season that a simple forecast repeats (default: the "
         "day, week or year that repeats itself best in the training rows)"),
    Flag("text_path", "data", "inherit", FILE, None, "notes: a CSV of date and text, and if need be until and known, here "
         "or in --root_path; a forecast reads those that are known at its last row (docs/notes.md; TimeLLM)"),
    Flag("text_column", "data", "inherit resume", TEXT, None, "notes: a column of texts in the data's own CSV, each known "
         "at its row"),
    Flag("holidays", "data", "inherit resume", TEXT, None, "notes: the public holidays of a country, such as DE, or of a "
         "part of one, such as DE-BY (package holidays), known beforehand"),
    Flag("percent", "data", "inherit resume", whole(1, 100), 100, "few-shot: train on the first %% of the training windows"),
    Flag("enc_in", "data", "inherit resume", COUNT, None, "number of channels (default: read off the data)"),
    Flag("prompt_text", "data", "inherit unlisted", TEXT, None, "describe the data set in these words (default: the text "
         "that --prompt_domain chooses; custom files: their text in dataset/prompt_bank, else one made from the file)"),

    Flag("features", "task", "inherit resume", one_of("M", "S", "MS"), "M", "M: every column predicts itself; S: only "
         "--target; MS: all are read, --target is scored"),
    Flag("seasonal_patterns", "task", "inherit resume", one_of(*PATTERNS), "Monthly", "which of the M4 competition's "
         "series; the pattern sets the lengths below"),
    # Fewer than 5 rows have no 5 lags to name in the prompt.
    Flag("seq_len", "task", "inherit resume fixed", whole(5), 96, "rows of history in a window, at least --patch_len"),
    Flag("label_len", "task", "inherit resume baseline", COUNT_OR_0, None, "rows before the target, which Autoformer alone "
         "reads (default: 48, or --seq_len); of the others more than --seq_len are taken for --seq_len"),
    Flag("pred_len", "task", "inherit resume", COUNT, 96, "rows to forecast"),

    Flag("d_model", "model", "inherit resume", COUNT, 16, "width of a patch token"),
    Flag("n_heads", "model", "inherit resume fixed", COUNT, 8, "heads of the reprogramming attention"),
    Flag("e_layers", "model", "inherit resume", COUNT, 2, "encoder layers of PatchTST and Autoformer"),
    Flag("d_layers", "model", "inherit resume", COUNT, 1, "decoder layers of Autoformer"),
    Flag("d_ff", "model", "inherit resume fixed", COUNT, 32, "width of a head, and features of the backbone's output that "
         "are used; of PatchTST and Autoformer the feed-forward block's"),
    Flag("factor", "model", "inherit resume baseline", COUNT, 1, "Autoformer looks at factor x log T delays"),
    Flag("moving_avg", "model", "inherit resume baseline", COUNT, 25, "rows of DLinear's and Autoformer's moving average, "
         "an odd number"),
    Flag("activation", "model", "inherit resume baseline", one_of("gelu", "relu"), "gelu", "of Autoformer's feed-forward "
         "blocks"),
    Flag("embed", "task", "inherit resume", one_of("timeF", "fixed", "learned"), "timeF", "kind of the time marks, which "
         "Autoformer alone reads"),
    Flag("dropout", "model", "inherit resume", ArgType(float, "a number from 0 to below 1", lambda v: 0 <= v < 1), 0.1,
         "dropout rate"),
    Flag("head_dropout", "model", "resume", ArgType(float, "a number from 0 to below 1", lambda v: 0 <= v < 1), 0.0,
         "dropout rate of the features that the last layer of TimeLLM and PatchTST maps to the forecast"),
    Flag("patch_len", "model", "inherit resume fixed", COUNT, 16, "rows in a patch"),
    Flag("stride", "model", "inherit resume fixed", COUNT, 8, "rows from one patch to the next"),
    Flag("skip", "model", "inherit resume fixed", one_of("none", "ridge", "stack", "linear"), "none",
         "TimeLLM's forecast is a linear map of the window, and what the head adds to it; ridge: in closed form, not "
         "trained, poor where training windows are few (the log warns then); stack: the maps of --model LinearStack; "
         "linear: ridge, trained from there on (ours, not the paper's)"),
    Flag("skip_mode", "model", "inherit resume fixed", one_of("residual", "beside"), "residual", "residual: as --skip says; "
         "beside: the head is trained by itself, and the forecast is a mean of its own and the map's, with weights that "
         "validation chooses, drawn towards half of each (with --skip ridge or stack)"),
    Flag("stack_windows", "model", "inherit resume fixed", COUNTS, None, "rows of the windows that the maps of "
         "LinearStack and --skip stack read, longer than --seq_len or shorter (default: the longest four of 5 to 42 days "
         "that the file allows)"),
    Flag("use_reprogramming", "model", "inherit resume", SWITCH, 1, "0: w/o reprogramming, a linear map of the patches in "
         "its place"),
    Flag("prompt_domain", "model", "inherit resume", SWITCH, 0, "1: describe the data set by its text in "
         "dataset/prompt_bank"),

    Flag("llm_model", "language model", "inherit resume", one_of("QWEN", "LLAMA", "GPT2", "BERT", "AUTO"), "QWEN",
         "family of the backbone: QWEN, LLAMA, GPT2, BERT; AUTO: what its folder says"),
    Flag("llm_model_path", "language model", "inherit", ArgType(str, "a folder or a hub id", str.strip), None,
         "folder or hub id of the weights (default for QWEN: base_models/Qwen2.5-3B, else Qwen/Qwen2.5-3B; the others have "
         "none)"),
    Flag("llm_dim", "language model", "inherit resume", COUNT, None, "hidden size (default: read off the backbone; "
         "Qwen2.5-3B has 2048)"),
    Flag("llm_layers", "language model", "inherit resume fixed", COUNT, 6, "the backbone's first X layers are loaded and "
         "used"),
    Flag("load_in_4bit", "language model", "inherit resume", BOOL, False, "hold the backbone in 4 bits (bitsandbytes NF4)"),
    Flag("prototypes", "language model", "inherit resume", one_of("vocab", "direct"), "vocab",
         "vocab: mapped from the vocabulary, as published; direct: trained as they are, far smaller"),
    Flag("llm_ablation", "language model", "inherit resume fixed",
         one_of("off", "none", "attention", "transformer", "random"), "off",
         "in the language model's place none (w/o LLM), one attention layer (LLM2Attn), one Transformer block (LLM2Trsf); "
         "random: its architecture, weights drawn from --seed"),
    Flag("use_prompt", "language model", "inherit resume fixed", SWITCH, 1, "0: w/o prompt, the patches alone go through "
         "the language model"),
    Flag("prompt_lags", "language model", "inherit resume fixed", one_of("paper", "peaks"), "paper",
         "lags that the prompt names; peaks: the largest peaks of the autocorrelation, such as a day and a week"),
    Flag("prompt_decimals", "language model", "inherit resume fixed", whole(0, 17), None, "decimals of the prompt's "
         "figures (default: all)"),

    Flag("text_encoder", "language model", "inherit resume fixed", one_of("llm", "words"), "llm", "what reads notes: llm, "
         "the layers that are used; words: no language model, a bag of hashed words"),
    Flag("text_prompt", "language model", "inherit resume fixed", SWITCH, 0, "1: the prompt says the notes, too"),

    Flag("train_epochs", "training", "", COUNT, 10, "epochs at most"),
    Flag("batch_size", "training", "resume", COUNT, 32, "windows in a training step, each with all its channels"),
    Flag("test_every", "training", "unlisted", COUNT_OR_0, 1, "epochs between two test passes; 0: only the best epoch's, "
         "at the end"),
    Flag("patience", "training", "", COUNT, 10, "epochs without a better validation loss before training stops"),
    Flag("recipe", "training", "resume", one_of("own", "published"), "own", "own: the flags as they stand; published: "
         "rates, betas and batches as the paper's code has them: --learning_rate / 25 (but for COS), --batch_size "
         "windows of one channel, for each process"),
    Flag("learning_rate", "training", "resume", ArgType(float, "a number above 0", lambda v: 0 < v < math.inf), 1e-4,
         "rate, used as it stands with --recipe own"),
    Flag("optimizer", "training", "resume", one_of("adam", "adamw", "adamw8bit"), "adam", "adam, adamw or adamw8bit "
         "(bitsandbytes)"),
    Flag("loss", "training", "resume", one_of("MSE", "MAE", "MAE+FFT", "SMAPE", "MASE", "MAPE"), "MSE", "training "
         "loss; MAE+FFT: the mean absolute error, and that of the forecast's Fourier transform; with --data m4 MSE, SMAPE "
         "(left out), MASE or MAPE, the last three, which do not depend on a series' scale, there alone"),
    Flag("fft_weight", "training", "resume", ArgType(float, "a number from 0 to 1", lambda v: 0 <= v <= 1), 0.5,
         "share of the Fourier transform in MAE+FFT"),
    Flag("ema", "training", "resume", ArgType(float, "a number from 0 to below 1", lambda v: 0 <= v < 1), 0.0, "keep, "
         "validate and test the exponential moving average of the trained weights, with this decay a step, such as 0.996; "
         "0: off"),
    Flag("lradj", "training", "resume", one_of("type1", "type2", "type3", "PEMS", "COS", "TST", "constant"), "type1",
         "type1: halved each epoch; type2: rates of its own, 5e-5 after 2 epochs, 1e-5 after 4, …; type3: 3 epochs, then "
         "x0.9 each; PEMS: x0.95 each epoch; COS: cosine; TST: one cycle; constant (published: see docs/differences.md)"),
    Flag("pct_start", "training", "resume", ArgType(float, "a number between 0 and 1", lambda v: 0 < v < 1), 0.2,
         "TST's rising part"),
    Flag("use_amp", "training", "inherit resume fixed", BOOL, False, "mixed precision on the CPU too; a GPU always uses it"),
    Flag("max_iters", "training", "resume", COUNT_OR_0, 0, "end each epoch after X iterations, to try things out; 0: off"),

    Flag("device", "machine", "", one_of("auto", "cpu", "cuda"), "auto", "auto: the GPU where there is one"),
    Flag("amp_dtype", "machine", "unlisted", one_of("auto", "bf16", "fp16", "fp32"), "auto",
         "type of products; auto: bf16 on a GPU, fp16 where it has none; on the CPU fp32, with --use_amp bf16"),
    Flag("num_workers", "machine", "inherit unlisted", COUNT_OR_0, 2, "processes that prepare batches; 0: none"),
    Flag("eval_batch_size", "machine", "inherit unlisted", COUNT, 8, "windows in a validation or test step"),
    Flag("max_sequences", "machine", "unlisted", COUNT_OR_0, None, "windows x channels run at once, larger batches in "
         "parts (default: what fits; 0: no limit)"),
    Flag("grad_checkpoint", "machine", "unlisted", BOOL, False, "recompute the backbone's layers: slower, less memory"),
    Flag("fast_path", "machine", "", one_of("auto", "plain"), "auto", "auto: the prompt runs without gradients where the "
         "backbone is causal; plain: never"),

    Flag("checkpoints", "output", "", FOLDER, "./checkpoints/", "folder for the runs' folders"),
    Flag("checkpoint", "output", "", ArgType(str, "a run's folder or a checkpoint file", str.strip), None,
         "with --is_training 0: the run folder or file to use (default: this run's folder); flags left out then hold what "
         "they held in its training"),
    Flag("torch_checkpoint", "output", "", SWITCH, 1, "1: a trained run also leaves its best weights in a file "
         "`checkpoint` for torch.load"),
    Flag("do_predict", "output", "", BOOL, False, "forecast what follows the last row of the data, into forecast.csv; with "
         "--is_training 0 nothing else is done"),
    Flag("predict_path", "output", "", FILE, None, "forecast what follows this CSV, which has the columns of training"),
    Flag("predict_steps", "output", "", COUNT, None, "rows to forecast; more than --pred_len go on from the forecast "
         "itself (default: --pred_len)"),
    Flag("append", "output", "", BOOL, False, "with --do_predict: keep the forecast in forecasts.csv, too, the history of "
         "all forecasts by the last date that they knew"),
    Flag("refit", "output", "", BOOL, False, "with --do_predict: before the forecast, train once more on all rows of the "
         "file, for as many steps as the best epoch had, in the folder refit of the run's; the test is of the model before"),
    Flag("intervals", "output", "", LEVEL, None, "per cent of the truths that each prediction interval is to hold; none: "
         "no intervals (default: what the checkpoint has; of a training 80 95)"),
    Flag("save_predictions", "output", "", SWITCH, 1, "1: each test leaves its forecasts in predictions.npz, of which some "
         "windows are drawn"),
    Flag("plots", "output", "", SWITCH, 1, "1: draw the results as PNG files"),
    Flag("tensorboard", "output", "", BOOL, False, "write events for TensorBoard, where it is installed"),
    Flag("resume", "output", "", BOOL, False, "resume from the state saved last, or start where there is none"),
    Flag("save_steps", "output", "", COUNT_OR_0, None, "save the state every X iterations (default: about every 10 "
         "minutes; 0: at epoch ends)"),
    Flag("log_every", "output", "", COUNT, 100, "iterations between two lines with the loss"),

    Flag("dec_in", "accepted, unused", "", COUNT, 7, "a number"),
    Flag("c_out", "accepted, unused", "", COUNT, 7, "a number"),
    Flag("align_epochs", "accepted, unused", "", COUNT, 10, "a number"),
    Flag("loader", "accepted, unused", "", TEXT, "modal", "a word"),
    Flag("output_attention", "accepted, unused", "", BOOL, False, "a switch"),
]
# fmt: on
BY_NAME = {flag.name: flag for flag in FLAGS}
DEFAULTS = {flag.name: flag.default for flag in FLAGS}
REQUIRED = ["task_name", "is_training", "model_id", "model_comment", "model", "data"]
# Where the published script of that name differs from run_main.py: defaults, and what a training cannot do without.
DEFAULTS_OF: dict[str, dict[str, Any]] = {"run_pretrain.py": {"patience": 5}}
REQUIRED_BY = {"run_pretrain.py": ["data_pretrain"]}
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "skip": "stack", "skip_mode": "beside", "d_model": 32, "d_ff": 32, "n_heads": 4, "stride": 16, "dropout": 0.0,
        "head_dropout": 0.7, "prototypes": "direct", "prompt_decimals": 4, "loss": "MAE+FFT", "ema": 0.996, "batch_size": 16,
        "train_epochs": 5, "patience": 2, "learning_rate": 2e-3, "lradj": "constant",
    },
}  # fmt: skip
RUN_NAME = (
    "{task_name}_{model_id}_{model}_{data}_ft{features}_sl{seq_len}_ll{label_len}_pl{pred_len}_dm{d_model}_nh{n_heads}_"
    "el{e_layers}_dl{d_layers}_df{d_ff}_fc{factor}_eb{embed}_{des}_{repeat}-{model_comment}"
)


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2, without a dump of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(prog: str = "run_main.py") -> FlagParser:
    """All flags in the groups of `--help`; it reads those that are given, and `complete_flags` adds the others."""
    required = [*REQUIRED, *REQUIRED_BY.get(prog, [])]
    parser = FlagParser(
        prog=prog,
        usage=f"python {prog} " + " ".join(f"--{name} X" for name in required) + " [more flags]",
        description="Time-LLM: train (--is_training 1) or test (--is_training 0) a time series forecaster "
        "around a frozen language model. Flags go in any order.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups = {flag.group: parser.add_argument_group(flag.group) for flag in {f.group: f for f in FLAGS}.values()}
    words: dict[ArgType, dict[str, Any]] = {
        BOOL: {"nargs": "?", "const": True},
        **dict.fromkeys((LEVEL, NAMES, COUNTS), {"nargs": "+"}),
    }
    for flag in FLAGS:
        default = DEFAULTS_OF.get(prog, {}).get(flag.name, flag.default)
        shown = " (required)" if flag.name in required else "" if default is None else f" (default: {default})"
        groups[flag.group].add_argument(
            f"--{flag.name}", type=flag.type, metavar="X", help=flag.help + shown, **words.get(flag.type, {})
        )
    return parser


def parse_flags(argv: Sequence[str], prog: str = "run_main.py") -> argparse.Namespace:
    """The flags of a command line, complete; a wrong one prints one line that names it and exits with code 2.

    Args:
        prog: the script that the user has started, with which that line begins.
    """
    try:
        return read_flags(argv, prog)
    except InputError as error:
        build_parser(prog).error(str(error))


def flags_for(checkpoint: str | Path, **given: object) -> argparse.Namespace:
    """The flags of a program that forecasts with a checkpoint: those of `--is_training 0 --do_predict --checkpoint X`.

    Args:
        given: other flags by their names; None leaves one out.

    Raises:
        InputError: at the first that is unknown, wrong or missing.
    """
    given.update(checkpoint=checkpoint, is_training=0, do_predict=True)
    return read_flags(
        [
            word
            for name, value in given.items()
            if value is not None
            for word in ([f"--{name}", *map(str, value)] if isinstance(value, list | tuple) else [f"--{name}={value}"])
        ]
    )


def read_flags(argv: Sequence[str], prog: str = "run_main.py") -> argparse.Namespace:
    """As `parse_flags`, for a program.

    Raises:
        InputError: at the first that is unknown, wrong or missing.
    """
    parser = build_parser(prog)
    try:
        found, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        got, _, expected = error.message.removeprefix("got ").partition(", expected ")
        if not expected:  # argparse's own: a flag stands without its value
            flag = BY_NAME.get(str(error.argument_name).removeprefix("--"))
            got, expected = "no value right after it", flag.type.expected if flag else "one"
        raise input_error(str(error.argument_name), got, expected) from None
    if unknown and not unknown[0].startswith("-"):
        raise input_error(repr(unknown[0]), "a value without a flag", "every value right after its flag")
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{flag.name}" for flag in FLAGS], n=1, cutoff=0.7)
        raise input_error(name, "an unknown flag", f"perhaps {near[0]}" if near else "one that --help lists")
    return complete_flags(vars(found), prog)


def inherited(checkpoint: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a checkpoint's training that a command line which names it may leave out; none where it has no record."""
    from utils.saving.files import read_record  # only now: most command lines name no checkpoint

    held = read_record(checkpoint).get("flags", {})
    other_data = bool(given.keys() & {"data", "root_path", "data_path"})
    names = [f.name for f in FLAGS if "inherit" in f.roles and not (other_data and f.group == "data")]
    if held.get("data") in ("custom", M4):  # the kind of data stays where only another file is named
        names.append("data")
    found = {name: held[name] for name in names if held.get(name) is not None}
    # A relative path began where the training ran: here, in a folder above the checkpoint, or in the program's.
    above, file = [*checkpoint.resolve().parents, Path(__file__).resolve().parents[1]], str(held.get("data_path") or "")
    inside = {"llm_model_path": [""], "root_path": [file, *(f"{sub}/{file}" for sub in (M4, "ETT-small", Path(file).stem))]}
    for name in inside.keys() & found.keys():
        places = [found[name], *(str(folder / found[name]) for folder in above)]
        found[name] = next(
            (place for place in places if any(Path(place, part).exists() for part in inside[name])), found[name]
        )
    return found


def complete_flags(given: dict[str, Any], prog: str = "run_main.py") -> argparse.Namespace:
    """All flags: those given, else as in the training of --checkpoint, as they follow from others, or by default.

    Raises:
        InputError: at the first that is missing or contradicts another.
    """
    held: dict[str, Any] = {}
    if "checkpoint" in given and not given.get("is_training"):
        held = inherited(Path(given["checkpoint"]), given)
        given = held | given
    # What was trained on no longer matters to a test: the checkpoint knows it.
    required = REQUIRED if given.get("is_training") == 0 else [*REQUIRED, *REQUIRED_BY.get(prog, [])]
    missing = [f"--{name}" for name in required if name not in given]
    if missing and "checkpoint" in given and not held:
        got = (
            "no record of a training in it (a damaged or unreadable file, the mean of repeats, or none of this program)"
            if Path(given["checkpoint"]).exists()
            else "no such file or folder"
        )
        raise input_error(f"--checkpoint {given['checkpoint']}", got, "a run's folder or its checkpoint")
    if missing:
        others = f"missing too: {', '.join(missing[1:])}" if missing[1:] else ""
        raise input_error(missing[0], "nothing", "a value", others)

    # Models without a language model take what it says of the training alone.
    preset = {
        name: value
        for name, value in PRESETS.get("" if held else given.get("preset", ""), {}).items()
        if name not in given
        and (given["model"] == "TimeLLM" or BY_NAME[name].group == "training")
        and (name != "skip_mode" or given.get("skip", "stack") in ("stack", "ridge"))
    }
    args = argparse.Namespace(**DEFAULTS | DEFAULTS_OF.get(prog, {}) | preset | given)
    args.preset, args.set_by_preset = None, list(preset)
    args.all_rows = False  # run.refit sets it
    args.names_rate = bool(given.keys() & {"learning_rate", "lradj"})
    if args.intervals is not None:
        args.intervals = tuple(sorted({level for level in args.intervals if level is not None}))
    named = [name for name in ("text_path", "text_column", "holidays") if getattr(args, name)]
    args.reads_notes = bool(named)  # of a checkpoint, whether its training did
    if args.text_column:  # no numbers
        args.drop_columns = [*(name for name in args.drop_columns or () if name != args.text_column), args.text_column]
    # A list, which the data complete, where there is a stack.
    args.stack_windows = (args.stack_windows or []) if args.model == "LinearStack" or args.skip == "stack" else None
    if DATASETS[args.data].borders is None:  # None: read off the file
        args.target, args.freq = given.get("target"), given.get("freq")
    if args.data == M4:
        _complete_m4(args, given, held)
    else:
        args.seasonal_patterns = "Monthly"  # nothing reads it: runs are alike whatever it says
    for data, path in (("data", "data_path"), ("data_pretrain", "data_path_pretrain")):
        name = getattr(args, data)
        if name not in (None, "custom") and getattr(args, path) is None:
            setattr(args, path, DATASETS[name].file or f"{name}.csv")
    if args.label_len is None:
        args.label_len = min(48, args.seq_len)
    if args.model != "Autoformer":  # nothing else reads it; published command lines have one that is too long
        args.label_len = min(args.label_len, args.seq_len)
    refuse(
        args,
        (
            (args.task_name == "short_term_forecast") != (args.data == M4),
            "task_name",
            f"short_term_forecast with --data {M4}, long_term_forecast with other data",
        ),
        (args.data_pretrain == M4, "data_pretrain", f"another data set, or --data {M4}, which trains on its own series"),
        (
            args.data != M4 and args.loss in ("SMAPE", "MASE", "MAPE"),
            "loss",
            f"MSE, MAE or MAE+FFT, or --data {M4}: standardised values cross zero",
        ),
        (args.data == M4 and args.loss.startswith("MAE"), "loss", f"SMAPE, MASE, MAPE or MSE with --data {M4}"),
        (
            args.skip_mode == "beside" and args.skip not in ("ridge", "stack"),
            "skip_mode",
            "residual, or --skip ridge or stack with it: a map that is not trained",
        ),
        (args.data_path is None, "data_path", "the CSV's name with --data custom"),
        (
            args.data_pretrain and args.data_path_pretrain is None,
            "data_path_pretrain",
            "the CSV's name with --data_pretrain custom",
        ),
        (args.data_path_pretrain and args.data_pretrain is None, "data_path_pretrain", "--data_pretrain with it"),
        (args.seq_len < args.patch_len, "seq_len", f"--patch_len {args.patch_len} or more"),
        (args.label_len > args.seq_len, "label_len", f"at most --seq_len {args.seq_len}"),
        (
            args.llm_model_path is None and args.llm_model != "QWEN",
            "llm_model_path",
            f"the folder or hub id of the {args.llm_model} weights",
        ),
        *(
            (args.is_training and getattr(args, name), name, "--is_training 0 with it")
            for name in ("checkpoint", "predict_path")
        ),
        *(
            (getattr(args, name) not in (None, False) and not args.do_predict, name, "--do_predict with it")
            for name in ("predict_path", "predict_steps", "append", "refit")
        ),
        (
            args.refit and not args.is_training,
            "refit",
            "--is_training 1 with it (later: --checkpoint RUN/refit)",
        ),
        *(
            (wrong, name, expected)
            for name in named
            for wrong, expected in (
                (args.model != "TimeLLM", "nothing: TimeLLM alone reads notes"),
                (args.data == M4, f"nothing with --data {M4}, whose series have no dates"),
                (args.data_pretrain, "nothing with --data_pretrain"),
                (name == "text_column" and args.id_column, "nothing with --id_column"),
            )
        ),
        (args.refit and args.itr > 1, "itr", "1 with --refit"),
        (args.refit and args.data_pretrain, "refit", "False with --data_pretrain"),
    )
    return args


def _complete_m4(args: argparse.Namespace, given: dict[str, Any], held: dict[str, Any]) -> None:
    """The lengths, files and loss that the competition sets, and what cannot be asked for with series that have no dates.

    Args:
        held: the flags of the checkpoint's training.
    """
    pattern, horizon = args.seasonal_patterns, PATTERNS[args.seasonal_patterns].horizon
    file, trained = m4_file(pattern, "train"), held.get("seasonal_patterns", pattern)
    alone = f"nothing with --data {M4}"
    refuse(
        args,
        (trained != pattern, "seasonal_patterns", f"{trained}, on whose series {args.checkpoint} was trained"),
        (args.pred_len != horizon and "pred_len" in given, "pred_len", f"{horizon}, the competition's for {pattern}"),
        (args.data_path not in (None, file), "data_path", f"{alone}: --seasonal_patterns names the files"),
        (args.intervals, "intervals", f"none with --data {M4}: each series has one validation window"),
        (
            args.do_predict,
            "do_predict",
            f"False with --data {M4}: a test leaves the forecasts after the training file",
        ),
        (args.features != "M", "features", f"M with --data {M4}"),
        (args.percent != 100, "percent", f"100 with --data {M4}"),
        *(
            (getattr(args, name), name, alone)
            for name in ("fill_missing", "encoding", "date_column", "id_column", "drop_columns", "bounds", "season")
        ),
        (args.dayfirst is not None, "dayfirst", alone),
        (args.data_pretrain, "data_pretrain", f"{alone}: it trains on its own series"),
    )
    args.pred_len, args.seq_len = horizon, given.get("seq_len", 2 * horizon)
    args.label_len = min(horizon, args.seq_len) if args.label_len is None else args.label_len
    args.loss = given.get("loss", "SMAPE")
    args.data_path, args.intervals = file, ()


def refuse(args: argparse.Namespace, *rows: tuple[object, str, str]) -> None:
    """Raise InputError for the first row that holds: whether the flag is wrong, its name, and what is expected."""
    for wrong, name, expected in rows:
        if wrong:
            value = getattr(args, name)
            found = " ".join(map("{:g}".format, value)) if isinstance(value, tuple) else value
            raise input_error(f"--{name}", "nothing" if value is None else found, expected)


def longest_window(args: argparse.Namespace) -> int:
    """Rows that a forecast reads: `seq_len`, or more with a linear stack."""
    return max([args.seq_len, *(args.stack_windows or ())])


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    return {flag.name: getattr(args, flag.name) for flag in FLAGS if flag.group != "output"}


def resumed(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that must be the same for a run to resume, by name in alphabetical order."""
    return {name: getattr(args, name) for name in sorted(DEFAULTS) if "resume" in BY_NAME[name].roles}


def clean_name(text: str) -> str:
    """`text` as part of a folder's name: letters, digits, `.`, `_` and `-`; no leading dot."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"


def run_name(args: argparse.Namespace, repeat: int | str) -> str:
    """The run's name, which is its folder under `--checkpoints`; `repeat` counts from 0, "mean" is that of all."""
    # Every part is cleaned, for the whole must be one folder's name whatever a flag comes to hold.
    return clean_name(RUN_NAME.format(repeat=repeat, **{name: clean_name(str(value)) for name, value in vars(args).items()}))
