"""Flags of a run on the M4 competition's series: what follows from the pattern, and what cannot be asked for.

Only the standard library is imported here.
"""

import argparse
from pathlib import Path

from data_provider.splits import M4, PATTERNS, m4_file
from layers.errors import input_error
from utils.saving.record import read_record

SHORT, LONG = "short_term_forecast", "long_term_forecast"


def complete_m4(args: argparse.Namespace, given: set[str]) -> None:
    """Fill in the lengths that the competition sets, and set the flags against each other.

    Args:
        given: names of the flags on the command line.

    Raises:
        InputError: at the first flag that contradicts `--data`.
    """
    if args.data == M4 and args.checkpoint is not None:
        _refuse_another_pattern(args)
    if (args.task_name == SHORT) != (args.data == M4):
        expected = f"--data {M4} with {SHORT}, other data with {LONG}"
        raise input_error(f"--task_name {args.task_name}", f"it with --data {args.data}", expected)
    if args.data_pretrain == M4:
        raise input_error("--data_pretrain", M4, f"another data set, or --data {M4} without it: it trains on its own series")
    if args.data != M4:
        args.seasonal_patterns = "Monthly"  # nothing reads it: runs are alike whatever it says
        if args.loss != "MSE":
            raise input_error("--loss", args.loss, f"MSE, or --data {M4}: standardised values cross zero")
        return
    horizon = PATTERNS[args.seasonal_patterns].horizon
    if "pred_len" in given and args.pred_len != horizon:
        raise input_error("--pred_len", args.pred_len, f"{horizon}, the competition's for {args.seasonal_patterns}")
    args.pred_len = horizon
    args.seq_len = args.seq_len if "seq_len" in given else 2 * horizon
    args.label_len = min(horizon, args.seq_len) if args.label_len is None else args.label_len
    args.loss = args.loss if "loss" in given else "SMAPE"
    _refuse(args)
    args.data_path, args.intervals = m4_file(args.seasonal_patterns, "train"), ()


def _refuse_another_pattern(args: argparse.Namespace) -> None:
    """Raise InputError where the checkpoint is of another pattern: its lengths, which come with it, say less."""
    held = read_record(Path(args.checkpoint)).get("flags", {})
    pattern = held.get("seasonal_patterns")
    if held.get("data") == M4 and isinstance(pattern, str) and pattern != args.seasonal_patterns:
        expected = f"{pattern[:20]}, on whose series {args.checkpoint} was trained"
        raise input_error("--seasonal_patterns", args.seasonal_patterns, expected)


def _refuse(args: argparse.Namespace) -> None:
    """Raise InputError for the first flag that has no meaning for series without dates and of different lengths."""
    file = m4_file(args.seasonal_patterns, "train")
    if args.data_path not in (None, file):
        raise input_error("--data_path", args.data_path, f"nothing with --data {M4}: --seasonal_patterns names the files")
    if args.intervals:
        raise input_error("--intervals", f"levels with --data {M4}", "none: each series has one validation window")
    if args.do_predict:
        expected = f"none with --data {M4}: a test leaves the forecasts of what follows the training file"
        raise input_error("--do_predict", "it", expected)
    off: tuple[tuple[str, object], ...] = (
        ("features", "M"),
        ("percent", 100),
        ("fill_missing", None),
        ("data_pretrain", None),
    )
    for name, value in off:
        if getattr(args, name) != value:
            what = "nothing" if value is None else value
            raise input_error(f"--{name}", getattr(args, name), f"{what} with --data {M4}")
