"""Past forecasts of a run, scored against what has come true since, beside the last value that was known.

    python scripts/past_forecasts.py checkpoints/<run name> [--data FILE]

They are those of forecasts.csv, which `run_main.py --do_predict --append` keeps. A row of a forecast has come true once
the data file has a row of its date.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from data_provider.splits import find_csv  # noqa: E402
from data_provider.table import FIRST_ROW_LINE, read_table  # noqa: E402
from data_provider.timestamps import read_timestamps  # noqa: E402
from layers.errors import NAMED, InputError, input_error  # noqa: E402
from utils.results.bands import name_of  # noqa: E402
from utils.results.forecast import HISTORY, ORIGIN, band_columns, bands_of  # noqa: E402
from utils.saving.checkpoint import Checkpoint  # noqa: E402
from utils.saving.files import LEGACY, TENSORS  # noqa: E402

ENDS = 5  # columns of very many that have a line: so many at each end


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="past_forecasts.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="the run's folder, which has a forecasts.csv")
    parser.add_argument("--data", type=Path, help="the CSV as it is now (default: the file of the training)")
    args = parser.parse_args(argv)
    try:
        print(score_forecasts(args.folder, args.data))
    except InputError as error:
        print(f"past_forecasts.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def score_forecasts(folder: Path, data: Path | None = None) -> str:
    """The table of a run's past forecasts, as text: by origin and in all, and by column.

    Args:
        folder: of the run, or `on_<file>` in it, or whatever folder holds a forecasts.csv.
        data: the CSV to score against, as it is now; None: the file of the training.

    Raises:
        InputError: no history, no data, or other columns in them.
    """
    path, flags, checkpoint = folder / HISTORY, {}, None
    if not path.is_file() or any((folder / name).is_file() for name in (TENSORS, LEGACY)):
        checkpoint = Checkpoint.open(folder)  # a folder of forecasts on other data has none
        flags = checkpoint.flags
    if data is None:
        if not {"root_path", "data_path"} <= flags.keys():
            expected = f"the CSV to score against, for {folder} has no checkpoint that names one"
            raise input_error("--data", "nothing", expected)
        data = find_csv(flags["root_path"], flags["data_path"])
    table = read_table(data, flags.get("fill_missing"))
    known, std, whose = table.columns, table.values.std(axis=0), f"all rows of {data.name}"
    if flags:
        (known, _, std), whose = checkpoint.scaler(), "the training"  # type: ignore[union-attr]  # the flags are its own
    forecasts, columns = read_forecasts(path, known)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise input_error(data, f"no column {missing[0]!r}", f"the columns of {path}")

    bands, N = bands_of(forecasts, columns), len(columns)
    truths = pd.DataFrame(table.values, table.dates, table.columns)[columns]
    truths = truths[~truths.index.duplicated(keep="last")]
    truth, last = (truths.reindex(forecasts[name]).to_numpy() for name in ("date", ORIGIN))  # (R, N); NaN: no such row
    scale = np.ones(1) if N == 1 else std[[known.index(name) for name in columns]]
    unit = np.tile(np.where(scale > 0, scale, 1.0), len(forecasts))
    cells = pd.DataFrame({"origin": forecasts[ORIGIN].repeat(N).astype(str), "column": np.tile(columns, len(forecasts))})
    cells["error"], cells["last"] = (forecasts[columns].to_numpy() - truth).ravel(), (last - truth).ravel()
    for level, (low, high) in bands.items():
        cells[f"{name_of(level)} %"] = ((truth >= low) & (truth <= high)).ravel()
    scaled = cells.assign(error=cells["error"] / unit, last=cells["last"] / unit)

    whole = _figures(scaled, N)
    by_origin = {origin: _figures(part, N) for origin, part in scaled.groupby("origin", sort=False)} | {"all": whole}
    what = f"in units of {columns[0]}" if N == 1 else f"in deviations of {whose}"
    title = f"Past forecasts of {folder}, against {data.name} up to {table.dates[-1]}; errors {what}"
    lines = [title, "", _text(by_origin, whole.index, "origin"), ""]
    if "MAE" not in whole:
        return "\n".join([*lines, "No row has come true yet: the data file ends before their dates, or is another one."])
    if N > 1:
        ranked = scaled["error"].abs().groupby(scaled["column"], sort=False).mean().sort_values(kind="stable").index
        shown = columns if N <= NAMED else [*ranked[:ENDS], *ranked[-ENDS:]]
        by_column = {name: _figures(cells[cells["column"] == name], 1) for name in shown}
        lines.append(_text(by_column, whole.index, "column, own units"))
        if N > NAMED:
            lines.append(
                f"  {N} columns: the {ENDS} columns with the lowest MAE in deviations, and the {ENDS} with the highest"
            )
        lines.append("")
    if not np.isnan(whole["last value: MAE"]):
        won = "was lower" if whole["MAE"] < whole["last value: MAE"] else "was not lower"
        figures = f"{whole['MAE']:.4g} against {whole['last value: MAE']:.4g}"
        lines.append(f"Over all rows that have come true, the forecasts' MAE {won} than that of the last value: {figures}.")
    if bands:
        named = name_of(min(bands))
        lines.append(f"Under {named} % stands how many of the truths lay in that band: it should be about {named} %.")
    return "\n".join(lines)


def read_forecasts(path: Path, known: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """A forecasts.csv, and which of its columns are forecast; the others are the ends of their bands.

    Args:
        known: names that columns of the data may have.

    Raises:
        InputError: no such file, or something else in it.
    """
    expected = "the history that run_main.py --do_predict --append keeps"
    try:
        frame = pd.read_csv(path, dtype={ORIGIN: str, "date": str})
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors, as UnicodeDecodeError is
        raise input_error(path, f"a file that cannot be read ({' '.join(str(error).split())[:200]})", expected) from None
    header = list(frame.columns)
    if header[:2] != [ORIGIN, "date"] or frame.empty:
        raise input_error(path, f"the columns {', '.join(header)[:200]}" if len(frame) else "no rows", expected)
    names = header[2:]
    for count in range(len(names), 0, -1):
        columns = names[:count]
        if set(columns) <= set(known) and band_columns(columns, [*bands_of(frame, columns)]) == names[count:]:
            break
    else:
        got = f"the columns {', '.join(names)[:200]}"
        raise input_error(path, got, f"columns of the data such as {known[0]}, and bands")
    frame[names] = frame[names].apply(pd.to_numeric, errors="coerce")
    wrong = np.argwhere(~np.isfinite(frame[columns].to_numpy()))
    if len(wrong):
        row, column = wrong[0]
        raise input_error(f"{path}: row {row + FIRST_ROW_LINE}, column {columns[column]!r}", "no number", "a forecast")
    for name in (ORIGIN, "date"):
        frame[name] = read_timestamps(frame[name], str(path), FIRST_ROW_LINE)
    return frame, columns


def _figures(cells: pd.DataFrame, columns: int) -> pd.Series:
    """Errors and coverage of the cells that have come true; of the last value where the file still has all origins."""
    found = cells[cells["error"].notna()]
    line: dict[str, object] = {"come true": f"{len(found) // columns} of {len(cells) // columns}"}
    if len(found):
        shares = {name: f"{100 * found[name].mean():.1f} %" for name in cells.columns if name.endswith(" %")}
        for title, errors, more in (("", found["error"], shares), ("last value: ", found["last"], {})):
            line[f"{title}MAE"] = errors.abs().mean(skipna=False)
            line[f"{title}RMSE"] = np.sqrt(errors.pow(2).mean(skipna=False))
            line |= more
    return pd.Series(line, dtype=object)


def _text(lines: dict[str, pd.Series], names: pd.Index, title: str) -> str:
    table = pd.DataFrame(lines, index=names).T.rename_axis(columns=title)
    return table.to_string(na_rep="-", float_format="{:.4g}".format)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
