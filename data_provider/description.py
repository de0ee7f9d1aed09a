"""The prompt's description of a data set: the user's words, the bank's text, or what can be read off the file."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

from data_provider.timestamps import infer_step
from layers.errors import input_error

PROMPT_BANK = Path(__file__).resolve().parents[1] / "dataset" / "prompt_bank"
DEFAULT_DESCRIPTION = "Each value of the series was measured at a regular interval of time."
LISTED = 8  # names or ranges in a description; the prompt has room for a few dozen words
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


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
    names = [args.data, Path(args.data_path).stem]
    if args.data.startswith("ETT"):
        names.append("ETT")
    files = [PROMPT_BANK / f"{name}.txt" for name in names if len(name) < 200]  # a record may hold any name
    return next((file for file in files if file.is_file()), None)


def make_description(dates: pd.DatetimeIndex, columns: list[str], low: np.ndarray, high: np.ndarray) -> str:
    """A description of a file that nobody has described: names, ranges, step, length.

    Args:
        low, high: `[N]` smallest and largest value of each column, in its own units.
    """
    shown = [f"{name} from {a:.4g} to {b:.4g}" for name, a, b in zip(columns, low, high, strict=True)]
    more = f" and {len(columns) - LISTED} more" if len(columns) > LISTED else ""
    step = step_words(dates)
    measured = "at irregular times" if step == "irregular" else f"every {step.removeprefix('1 ')}"
    series = "one series" if len(columns) == 1 else f"{len(columns)} series"
    return (
        f"The data hold {series}, measured {measured}, {len(dates)} rows from {dates[0]} to {dates[-1]}: "
        f"{', '.join(shown[:LISTED])}{more}."
    )


def step_words(step: pd.offsets.BaseOffset | pd.DatetimeIndex | None) -> str:
    """A step between rows for people: "15 minutes", "1 hour", "1 business day", "1 month"; "irregular".

    Args:
        step: as `infer_step` returns it, or the dates `[rows]` to infer it from.
    """
    step = _as_step(step)
    if step is None:
        return "irregular"
    if isinstance(step, pd.offsets.BDay):
        return _count(step.n, "business day")
    months = _months(step)
    if months:
        return _count(months // 12, "year") if months % 12 == 0 else _count(months, "month")
    seconds = _seconds(step)
    if seconds % 604800 == 0:
        return _count(int(seconds // 604800), "week")
    for unit, length in _UNITS:
        if seconds >= length and seconds % length == 0:
            return _count(int(seconds // length), unit)
    return f"{seconds:g} seconds"


def frequency(step: pd.offsets.BaseOffset | pd.DatetimeIndex | None) -> str:
    """The `--freq` of a step (see `step_words`): s, t, h, d, b, w, m; h where the rows have no common step."""
    step = _as_step(step)
    if step is None:
        return "h"
    if isinstance(step, pd.offsets.BDay):
        return "b"
    if _months(step):
        return "m"
    seconds = _seconds(step)
    for freq, length in (("w", 604800), ("d", 86400), ("h", 3600), ("t", 60)):
        if seconds >= length and seconds % length == 0:
            return freq
    return "t" if seconds > 60 else "s"


def _as_step(step: pd.offsets.BaseOffset | pd.DatetimeIndex | None) -> pd.offsets.BaseOffset | None:
    return infer_step(step) if isinstance(step, pd.DatetimeIndex) else step


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _months(step: pd.offsets.BaseOffset) -> int:
    """Whole months of a step; 0 for a step of fixed length."""
    kinds = (pd.offsets.MonthBegin, pd.offsets.MonthEnd, pd.offsets.BMonthBegin, pd.offsets.BMonthEnd)
    if isinstance(step, kinds):
        return step.n
    return step.kwds.get("months", 0)


def _seconds(step: pd.offsets.BaseOffset) -> float:
    start = pd.Timestamp("2001-01-01")
    return (start + step - start).total_seconds()
