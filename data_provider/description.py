"""The prompt's description of a data set: the user's words, the bank's text, or what can be read off the file."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.timestamps import infer_step, step_words
from layers.errors import input_error

PROMPT_BANK = Path(__file__).resolve().parents[1] / "dataset" / "prompt_bank"
DEFAULT_DESCRIPTION = "Each value of the series was measured at a regular interval of time."
LISTED = 8  # names or ranges in a description; the prompt has room for a few dozen words


def dataset_description(args: Namespace) -> str:
    """The description in a run's prompts, on one line: `--prompt_text`, else the bank's text where it is
    asked for (custom files: where there is one), else `DEFAULT_DESCRIPTION`.

    Args:
        args: the run's flags, or those that a checkpoint has recorded; prompt_domain, data and data_path,
            and prompt_text and checkpoint where they are there.

    Raises:
        InputError: `--prompt_domain 1`, and the bank has no text for the data set.
    """
    text = getattr(args, "prompt_text", None)
    if text:
        return " ".join(text.split())
    file = bank_file(args)
    inherited = getattr(args, "checkpoint", None)  # then the flag may stand for the training's data
    if file is None and args.prompt_domain and not inherited:
        name = "ETT" if args.data.startswith("ETT") else Path(args.data_path).stem
        raise input_error("--prompt_domain", "1", f"a file {name}.txt in {PROMPT_BANK}", "write it or leave the flag out")
    if file is None or not (args.prompt_domain or args.data == "custom"):
        return DEFAULT_DESCRIPTION
    return " ".join(file.read_text(encoding="utf-8").split())


def bank_file(args: Namespace) -> Path | None:
    """The data set's text in `dataset/prompt_bank`, named after `--data` or after its file; None without one."""
    names = [args.data, Path(args.data_path).stem, *(["ETT"] if args.data.startswith("ETT") else [])]
    files = [PROMPT_BANK / f"{name}.txt" for name in names if len(name) < 200]  # a record may hold any name
    return next((file for file in files if file.is_file()), None)


def make_description(dates: pd.DatetimeIndex, columns: list[str], low: np.ndarray, high: np.ndarray) -> str:
    """A description of a file that nobody has described: names, ranges, step, length.

    Args:
        low, high: `[N]` smallest and largest value of each column, in its own units.
    """
    shown = [f"{name} from {a:.4g} to {b:.4g}" for name, a, b in zip(columns, low, high, strict=True)]
    more = f" and {len(columns) - LISTED} more" if len(columns) > LISTED else ""
    step = step_words(infer_step(dates))
    measured = "at irregular times" if step == "irregular" else f"every {step.removeprefix('1 ')}"
    series = "one series" if len(columns) == 1 else f"{len(columns)} series"
    return (
        f"The data hold {series}, measured {measured}, {len(dates)} rows from {dates[0]} to {dates[-1]}: "
        f"{', '.join(shown[:LISTED])}{more}."
    )
