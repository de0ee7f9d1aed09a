"""Comparison of a run's test error with what simple forecasts reach on the same windows.

The simple forecasts are measured once, with the run's own data and lengths, and kept in its metrics.json.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from data_provider.data_factory import series_from_args
from layers.errors import input_error
from utils.results.baselines import RIDGE
from utils.results.m4 import methods_of, warnings_of
from utils.results.m4 import table as table_of_m4
from utils.results.metrics import METRICS
from utils.saving.checkpoint import RECORD

BANDS = (
    "in 80 %: truths inside the 80 % prediction interval; width: its mean width, standardised; WQL: weighted quantile loss.",
    "",
)
ALIKE = 0.005  # relative difference of two errors below which neither is called the winner


def report(folder: Path) -> str:
    """The table and what it says, as text; writes the baselines into the run's metrics.json.

    Raises:
        InputError: the folder lacks a record or test figures, or its data are gone.
    """
    # A test on other data lies in a folder in the run's, whose record is the checkpoint's.
    inside = folder.resolve().name.startswith("on_") and not (folder / RECORD).is_file()
    record, metrics = _read((folder.resolve().parent if inside else folder) / RECORD), _read(folder / METRICS)
    # Baselines are for the data of the figures, which are not those of training in a zero-shot test.
    if not isinstance(record.get("flags"), dict):
        raise input_error(folder / RECORD, "no flags", "the record that training wrote")
    if not isinstance(metrics.get("test"), dict):
        raise input_error(folder / METRICS, "no test figures", "what a test wrote")
    if "m4" in metrics:
        return table_of_m4(methods_of(metrics), warnings_of(metrics))
    series = series_from_args(Namespace(**record["flags"] | metrics.get("flags", {})))
    found = metrics["baselines"]
    model, backbone = record["flags"].get("model", "TimeLLM"), record.get("backbone", {})
    name = "Time-LLM" if model == "TimeLLM" else model
    other = metrics.get("trained_on", {})  # than the data of the figures
    synthetic = series.synthetic or bool(other.get("synthetic"))
    test, source = metrics["test"] | {"intervals": metrics.get("intervals")}, str(other.get("file", ""))
    return table(test, found, synthetic, name, note_of(backbone), source)


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        expected = "the folder of a run that was trained and tested (run_main.py prints it at its end)"
        raise input_error(path.parent, f"no {path.name}", expected) from None
    except ValueError as error:
        raise input_error(path, f"a damaged file ({error})", "JSON") from None
    return held if isinstance(held, dict) else {}


def note_of(backbone: object) -> str:
    """What a record says of where its language model's weights come from; empty where it says nothing."""
    note = backbone.get("note", "") if isinstance(backbone, dict) else ""
    return note if isinstance(note, str) else ""


def table(test: dict, found: dict, synthetic: bool, name: str = "Time-LLM", note: str = "", source: str = "") -> str:
    """An aligned table, best first, and a sentence about who won.

    Args:
        test: {"mse", "mae"} of the run on the standardised scale; and "intervals", where it has any.
        found: as `measured` returns it.
        name: of the run's model.
        note: on its language model.
        source: the file that it was trained on, where that is not the one of its test.
    """
    rows = [{"title": f"{name} (this run)"} | test, *found["rows"]]
    rows.sort(key=lambda row: row["mse"])
    width = max(len(row["title"]) for row in rows)
    levels = list((test.get("intervals") or {}).get("levels", {}))
    heads = "".join(f"  {f'in {level} %':>8}  {'width':>6}" for level in levels) + (f"  {'WQL':>7}" if levels else "")
    of, trained = found["of"], f" after training on {source}" if source else ""
    lines = [
        "",
        f"Test windows of {of['file']}{trained}, {of['seq_len']} rows -> {of['pred_len']} rows, standardised scale "
        "(lower is better):",
        "",
        f"  {'':{width}}  {'MSE':>9}  {'MAE':>9}{heads}",
        *(f"  {row['title']:{width}}  {row['mse']:9.4f}  {row['mae']:9.4f}{_bands(row, levels)}" for row in rows),
        "",
        *(BANDS if levels else ()),
        *verdict(test, found["rows"]),
    ]
    if note:
        lines += ["", f"Language model: {note}"]
    if synthetic:
        warning = "SYNTHETIC DATA: this series was generated, not measured."
        lines += ["", f"*** {warning} ***", "*** The figures say nothing about real data or about the paper's. ***"]
    return "\n".join(lines)


def _bands(row: dict, levels: list[str]) -> str:
    """What a row's intervals came to: of each level the part of the truths inside and the width; the quantile loss."""
    held = row.get("intervals")
    if not levels or not held:
        return ""
    bands = [held["levels"][level] for level in levels]
    wql = "-" if held["wql"] is None else f"{held['wql']:.4f}"
    return "".join(f"  {100 * b['coverage']:7.1f}%  {b['width']:6.3f}" for b in bands) + f"  {wql:>7}"


def verdict(test: dict, rows: list[dict]) -> list[str]:
    """Plain sentences: which simple forecasts beat the run, and which it beats."""
    mse = test["mse"]
    better = [row for row in rows if row["mse"] < mse * (1 - ALIKE)]
    worse = [row for row in rows if row["mse"] > mse * (1 + ALIKE)]
    equal = [row for row in rows if row not in better and row not in worse]
    lines = []
    for row in sorted(better, key=lambda row: row["mse"]):
        advantage = 100 * (1 - row["mse"] / mse)
        cost = f", fitted and tested in {row['seconds']:.0f} s," if row["name"] == RIDGE else ""
        lines.append(
            f"{_sentence(row['title'])}{cost} beats this run: its MSE is {advantage:.1f} % lower "
            f"({row['mse']:.4f} against {mse:.4f})."
        )
    lines += [f"This run and {_named(row)} are level (MSE {mse:.4f} and {row['mse']:.4f})." for row in equal]
    lines += [
        f"This run beats {_named(row)}: its MSE is {100 * (1 - mse / row['mse']):.1f} % lower "
        f"({mse:.4f} against {row['mse']:.4f})."
        for row in sorted(worse, key=lambda row: row["mse"])
    ]
    if any(row["name"] == RIDGE for row in better):
        lines.append("A forecaster that a linear map beats has more training ahead of it, or is not needed here.")
    return lines


def _named(row: dict) -> str:
    return row["title"].replace("repeat ", "repeating ", 1)


def _sentence(title: str) -> str:
    named = _named({"title": title})
    return named[0].upper() + named[1:]
