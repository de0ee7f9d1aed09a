"""Command line of the program: read by the table of flags, completed and checked.

Only the standard library is imported here, so that ``--help`` and a wrong flag answer before torch is loaded.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_provider.splits import DATASETS
from layers.errors import InputError, input_error
from models import model_class
from utils.flags import DEFAULTS_OF, FLAGS, REQUIRED, REQUIRED_BY, inherited, run_name
from utils.kinds import BOOL, LEVELS
from utils.m4_flags import complete_m4
from utils.saving.record import read_record

MAX_NAME_BYTES = 240  # file systems allow 255; the rest is for the number of a folder moved aside


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2, without a dump of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(prog: str = "run_main.py") -> FlagParser:
    """All flags in the groups of ``--help``; whether required ones are there, ``parse_flags`` checks."""
    parser = FlagParser(
        prog=prog,
        usage=f"python {prog} " + " ".join(f"--{name} X" for name in required_by(prog)) + " [more flags]",
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
        default = DEFAULTS_OF.get(prog, {}).get(flag.name, flag.default)
        shown = " (required)" if flag.name in required_by(prog) else "" if default is None else f" (default: {default})"
        extra: dict[str, Any] = (
            {"nargs": "?", "const": True} if flag.kind is BOOL else {"nargs": "+"} if flag.kind is LEVELS else {}
        )
        groups[heading].add_argument(
            f"--{flag.name}", type=flag.kind, default=default, metavar="X", help=flag.help + shown, **extra
        )
    return parser


def required_by(prog: str) -> list[str]:
    """Names of the flags that a training with the script `prog` cannot do without."""
    return [*REQUIRED, *REQUIRED_BY.get(prog, [])]


def parse_flags(argv: Sequence[str], prog: str = "run_main.py") -> argparse.Namespace:
    """Read and check a command line; an error prints one line naming the flag and exits with code 2.

    Args:
        prog: the script that the user has started, with which that line begins.
    """
    parser = build_parser(prog)
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
    # What was trained on matters no more to a test, whose checkpoint knows it.
    _refuse_missing(args, REQUIRED if args.is_training == 0 else required_by(parser.prog))
    _complete(args, given)
    return args


def flags_for(checkpoint: str | Path, **given: object) -> argparse.Namespace:
    """The flags of a program that forecasts with a checkpoint: those of the command line
    `--is_training 0 --do_predict --checkpoint X`, read by the same table, without a command line.

    Args:
        given: other flags by their names; None leaves one out.

    Raises:
        InputError: at the first that is unknown, wrong or missing.
    """
    given |= dict(checkpoint=checkpoint, is_training=0, do_predict=True)
    words = {name: str(value) for name, value in given.items() if value is not None}
    kinds = {flag.name: flag.kind for flag in FLAGS if flag.kind is not LEVELS}  # of several words; a call says its own
    unknown = sorted(words.keys() - kinds.keys())
    if unknown:
        raise input_error(f"--{unknown[0]}", "an unknown flag", "one that python run_main.py --help lists")
    args = argparse.Namespace(**{flag.name: flag.default for flag in FLAGS})
    # The checkpoint's name first: the file is opened for what the others are.
    args.checkpoint = _value("checkpoint", words["checkpoint"])
    words = inherited(Path(checkpoint), set(words)) | words
    for name, text in words.items():
        setattr(args, name, _value(name, text))
    _refuse_missing(args, REQUIRED)
    _complete(args, set(words))
    return args


def _value(name: str, text: str) -> Any:
    """A flag's value from its word, as the parser reads it."""
    kind = next(flag.kind for flag in FLAGS if flag.name == name)
    try:
        return kind.read(text)
    except ValueError:
        raise input_error(f"--{name}", repr(text), kind.expected) from None


def _refuse_missing(args: argparse.Namespace, required: list[str]) -> None:
    """Raise InputError for a required flag that neither the user nor a checkpoint has given."""
    missing = [f"--{name}" for name in required if getattr(args, name) is None]
    if missing and args.checkpoint and not read_record(Path(args.checkpoint)):
        # The flags would have come from it.
        got = "no record of a training in it" if Path(args.checkpoint).exists() else "no such file or folder"
        raise input_error(f"--checkpoint {args.checkpoint}", got, "a run's folder or its checkpoint")
    if missing:
        others = f"missing too: {', '.join(missing[1:])}" if missing[1:] else ""
        raise input_error(missing[0], "nothing", "a value", others)


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
    if args.intervals is not None:
        if 0 in args.intervals and len(args.intervals) > 1:
            raise input_error("--intervals", "none beside numbers", LEVELS.expected)
        args.intervals = tuple(sorted({level for level in args.intervals if level}))
    complete_m4(args, given)
    if args.label_len is None:
        args.label_len = min(48, args.seq_len)
    if DATASETS[args.data].borders is None:  # None: read off the file
        args.target = args.target if "target" in given else None
        args.freq = args.freq if "freq" in given else None
    if args.data_path is None and args.data != "custom":
        args.data_path = DATASETS[args.data].file or f"{args.data}.csv"
    _complete_pretraining(args)
    if args.seq_len < args.patch_len:
        raise input_error("--seq_len", f"{args.seq_len}, shorter than a patch", f"--patch_len {args.patch_len} or more")
    if args.label_len > args.seq_len and model_class(args.model).channel_independent:
        args.label_len = args.seq_len  # nothing reads it; published command lines have such a one
    if args.label_len > args.seq_len:
        raise input_error("--label_len", args.label_len, f"at most --seq_len {args.seq_len}")
    if args.data_path is None:
        raise input_error("--data_path", "nothing", "the CSV's name with --data custom")
    if args.llm_model_path is None and args.llm_model != "QWEN":
        raise input_error("--llm_model_path", "nothing", f"the folder or hub id of the {args.llm_model} weights")
    if args.is_training == 1 and args.checkpoint is not None:
        raise input_error("--checkpoint", "it with --is_training 1", "--is_training 0")
    if args.is_training == 1 and args.predict_path is not None:
        raise input_error("--predict_path", "it with --is_training 1", "--is_training 0")
    if not args.do_predict and args.predict_path is not None:
        raise input_error("--predict_path", "it without --do_predict", "both")
    if not args.do_predict and args.predict_steps is not None:
        raise input_error("--predict_steps", "it without --do_predict", "both")
    if not args.do_predict and args.append:
        raise input_error("--append", "it without --do_predict", "both")
    length = len(run_name(args, args.itr - 1).encode())
    if length > MAX_NAME_BYTES:
        longest = max((args.model_id, args.model_comment, args.des), key=len)
        got = f"{longest[:20]!r}... in a run name of {length} bytes"
        raise input_error("--model_id, --model_comment, --des", got, f"at most {MAX_NAME_BYTES}")


def _complete_pretraining(args: argparse.Namespace) -> None:
    """Fill in the file of `--data_pretrain`.

    Raises:
        InputError: one of the two flags lacks the other.
    """
    name = args.data_pretrain
    if name is None:
        if args.data_path_pretrain is not None:
            raise input_error("--data_path_pretrain", "it without --data_pretrain", "both")
        return
    if args.data_path_pretrain is None:
        if name == "custom":
            raise input_error("--data_path_pretrain", "nothing", "the CSV's name with --data_pretrain custom")
        args.data_path_pretrain = DATASETS[name].file or f"{name}.csv"
