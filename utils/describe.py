"""What is read off a user's own file: the prompt's description, and the lines that say what was found."""

from argparse import Namespace
from pathlib import Path

from data_provider.data_loader import Series
from data_provider.describe import make_description, step_words
from models.TimeLLM import bank_file, describe
from utils.forecast import history_of
from utils.recorded import recorded
from utils.same_data import trained_on


def fill_in_prompt(args: Namespace, series: Series, folder: Path) -> None:
    """Give `--data custom` a `--prompt_text`, where the user and the prompt bank have none.

    A test takes the text of the training, whatever has come to the file since. Only the columns that
    are forecast are described, with ranges of the training rows: the prompt says nothing of later rows.
    """
    asked = args.prompt_domain and not args.checkpoint  # else it may be the training's
    if args.data != "custom" or args.prompt_text or asked or bank_file(args):
        return
    if not args.is_training:
        record = recorded(Path(args.checkpoint) if args.checkpoint else folder)
        text = record.get("flags", {}).get("prompt_text")
        if isinstance(text, str) and trained_on(record, series.path, series, args.fill_missing):
            args.prompt_text = text
            return
    history = history_of(series)
    rows = history.values[: series.splits.train]
    low, high = rows.min(axis=0), rows.max(axis=0)
    args.prompt_text = make_description(series.dates, history.columns, low, high)


def overview(args: Namespace, series: Series) -> list[str]:
    """Lines that say what was read off the file of `--data custom`; none for the named data sets."""
    if args.data != "custom":
        return []
    dates, splits = series.dates, series.splits
    forecast = {"M": "all columns are forecast"}.get(args.features, f"{series.target} is forecast")
    lines = [
        f"{series.path}: {len(dates)} rows from {dates[0]} to {dates[-1]}, step: {step_words(dates)}",
        f"{len(series.columns)} channels: {', '.join(series.columns)}; {forecast} (target: {series.target})",
        f"rows: train {splits.train}, val {splits.val}, test {splits.test} (70 %, 10 %, 20 %)",
        f"prompt: {describe(args)}",
    ]
    if series.filled:
        cells = "1 empty cell" if series.filled == 1 else f"{series.filled} empty cells"
        lines.append(f"{cells} filled (--fill_missing {args.fill_missing})")
    return lines
