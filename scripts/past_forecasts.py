"""Past forecasts of a run, scored against what has come true since, beside the last value that was known.

    python scripts/past_forecasts.py checkpoints/<run name> [--data FILE]
    python scripts/past_forecasts.py checkpoints/<run name> --recalibrate adaptive    # bands learn from what has come true

They are those of forecasts.csv, which `run_main.py --do_predict --append` keeps. A row of a forecast has come true once
the data file has a row of its date.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from data_provider.data_factory import series_flags  # noqa: E402
from data_provider.splits import find_csv  # noqa: E402
from data_provider.table import FIRST_ROW_LINE, read_table  # noqa: E402
from data_provider.timestamps import read_timestamps  # noqa: E402
from layers.errors import NAMED, input_error  # noqa: E402
from utils.flags import inherited  # noqa: E402
from utils.results.bands import fewest_windows, follow, name_of, recalibrated, stds  # noqa: E402
from utils.results.forecast import HISTORY, ORIGIN, band_columns, bands_of  # noqa: E402
from utils.saving.checkpoint import Checkpoint, add_intervals  # noqa: E402
from utils.saving.files import LEGACY, TENSORS  # noqa: E402

ENDS = 5  # columns of very many that have a line: so many at each end
ARGUMENTS = {
    "folder": dict(type=Path, nargs="?", default=Path(), help="the run's folder, which has a forecasts.csv"),
    "--data": dict(type=Path, help="the CSV as it is now (default: the file of the training)"),
    "--recalibrate": dict(
        choices=("plain", "adaptive"),
        help="give the checkpoint's next forecasts bands from the errors of these; adaptive: whose level follows the misses",
    ),
}


def main(argv: list[str]) -> int:
    args = script_parser("past_forecasts.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)
    return exit_code("past_forecasts.py", lambda: print(score_forecasts(args.folder, args.data, args.recalibrate)))


def score_forecasts(folder: Path, data: Path | None = None, kind: str | None = None) -> str:
    """The table of a run's past forecasts, as text: by origin and in all, and by column.

    Args:
        folder: of the run, or `on_<file>` in it, or whatever folder holds a forecasts.csv.
        data: the CSV to score against, as it is now; None: the file of the training.
        kind: "plain" or "adaptive", to recalibrate the checkpoint's bands; None: they stay.

    Raises:
        InputError: no history, no data, or other columns in them.
    """
    path, flags = folder / HISTORY, {}
    if not path.is_file() or any((folder / name).is_file() for name in (TENSORS, LEGACY)):
        checkpoint = Checkpoint.open(folder)  # a folder of forecasts on other data has none
        flags = checkpoint.flags | inherited(checkpoint.file, {})  # paths as they are found from here
    if data is None and not {"root_path", "data_path"} <= flags.keys():
        raise input_error("--data", "nothing", f"the CSV to score against, for {folder} has no checkpoint that names one")
    data = data or find_csv(flags["root_path"], flags["data_path"])
    table = read_table(data, **series_flags(Namespace(**flags), read_table))
    known, _, std = checkpoint.scaler() if flags else (table.columns, None, table.values.std(axis=0))
    forecasts, columns = read_forecasts(path, known)
    if missing := [name for name in columns if name not in table.columns]:
        raise input_error(data, f"no column {missing[0]!r}", f"the columns of {path}")

    truths, N = pd.DataFrame(table.only(columns).values, table.dates, columns), len(columns)
    truths = truths[~truths.index.duplicated(keep="last")]
    truth, last = (truths.reindex(forecasts[name]).to_numpy() for name in ("date", ORIGIN))  # (R, N); NaN: no such row
    cells = pd.DataFrame({"origin": forecasts[ORIGIN].repeat(N).astype(str), "column": np.tile(columns, len(forecasts))})
    cells["error"], cells["last"] = (forecasts[columns].to_numpy() - truth).ravel(), (last - truth).ravel()
    for level, (low, high) in (bands := bands_of(forecasts, columns)).items():
        cells[f"{name_of(level)} %"] = ((truth >= low) & (truth <= high)).ravel()
    unit = np.ones(1) if N == 1 else std[[known.index(name) for name in columns]]
    unit = np.tile(np.where(unit > 0, unit, 1.0), len(forecasts))
    scaled = cells.assign(error=cells["error"] / unit, last=cells["last"] / unit)

    def text(parts: dict[str, pd.DataFrame], title: str, columns: int) -> str:
        lines = pd.DataFrame({name: figures(part, columns) for name, part in parts.items()}).reindex(whole.index).T
        return lines.rename_axis(columns=title).to_string(na_rep="-", float_format="{:.4g}".format)

    whole = figures(scaled, N)
    scale = (
        f"units of {columns[0]}" if N == 1 else f"deviations of {'the training' if flags else f'all rows of {data.name}'}"
    )
    lines = [f"Past forecasts of {folder}, against {data.name} up to {table.dates[-1]}; errors in {scale}", ""]
    lines += [text(dict(list(scaled.groupby("origin", sort=False))) | {"all": scaled}, "origin", N), ""]
    if "MAE" not in whole:
        return "\n".join([*lines, "No row has come true yet: the data file ends before their dates, or is another one."])
    if N > 1:
        ranked = scaled["error"].abs().groupby(scaled["column"], sort=False).mean().sort_values(kind="stable").index
        shown = columns if N <= NAMED else [*ranked[:ENDS], *ranked[-ENDS:]]
        lines.append(text({name: cells[cells["column"] == name] for name in shown}, "column, own units", 1))
        if N > NAMED:
            lines.append(
                f"  {N} columns: the {ENDS} columns with the lowest MAE in deviations, and the {ENDS} with the highest"
            )
        lines.append("")
    if not np.isnan(before := whole["last value: MAE"]):
        lines.append(
            "Over all rows that have come true, the forecasts' MAE "
            f"{'was lower' if whole['MAE'] < before else 'was not lower'} than that of the last value: "
            f"{whole['MAE']:.4g} against {before:.4g}."
        )
    if bands:
        named = name_of(min(bands))
        lines.append(f"Under {named} % stands how many of the truths lay in that band: it should be about {named} %.")
    if kind is not None:
        if not flags:
            raise input_error("--recalibrate", f"{folder}, which has no checkpoint", "a run's folder")
        lines += ["", recalibrate(checkpoint, forecasts, truths, kind)]
    return "\n".join(lines)


def recalibrate(checkpoint: Checkpoint, forecasts: pd.DataFrame, truths: pd.DataFrame, kind: str) -> str:
    """Give a checkpoint bands from the errors of its past forecasts; return what is to be said.

    Args:
        forecasts, truths: as `read_forecasts` and the file have them.
        kind: "plain": their quantiles; "adaptive": see `bands.follow`.

    Raises:
        InputError: too few of them have come true, or the checkpoint has no bands.
        StorageError: the file system refused.
    """
    held, columns, flags = checkpoint.intervals, checkpoint.forecast_columns, checkpoint.flags
    T, H = flags["seq_len"], flags["pred_len"]
    names, mean, std = checkpoint.scaler()
    if held is None or list(truths.columns) != columns:
        raise input_error(
            "--recalibrate", f"{checkpoint.file} without bands of these columns", "one that was tested with them"
        )
    mean, std = (of[[names.index(name) for name in columns]] for of in (mean, std))
    values, errors, origins, dates = (truths.to_numpy() - mean) / std, [], [], []
    for origin, rows in forecasts.groupby(ORIGIN):
        place = truths.index.get_indexer([origin])[0] + 1
        if place >= T and len(rows) >= H:
            error = (truths.reindex(rows["date"][:H]).to_numpy() - rows[columns][:H].to_numpy()) / std
            errors.append(error.T / stds(values[place - T : place].T))  # (N, H)
            origins.append(origin.tz_localize(None))
            dates.append(pd.DatetimeIndex(rows["date"][:H]).tz_localize(None))
    least = max(map(fewest_windows, held.levels))
    if (found := sum(np.isfinite(error).all() for error in errors)) < least:
        raise input_error("--recalibrate", f"{found} forecasts whose rows have all come true", f"at least {least}")
    made, times = np.array(errors), (np.array(origins, "datetime64[ns]"), np.array(dates, "datetime64[ns]"))
    beyond, said = {}, []
    for level in held.levels if kind == "adaptive" else ():
        beyond[level], inside = follow(made, *times, level)
        if np.isfinite(inside).any():
            said.append(f"such bands of {name_of(level)} % would have held {100 * np.nanmean(inside):.1f} %")
    add_intervals(checkpoint, replace(held, newest=recalibrated(made, held.levels, beyond)))
    return "; ".join([f"The next forecasts of {checkpoint.file} have {kind} bands from {len(made)} forecasts", *said])


def figures(cells: pd.DataFrame, columns: int) -> pd.Series:
    # Of the cells that have come true; of the last value where the file still has all origins.
    found = cells[cells["error"].notna()]
    line: dict[str, object] = {"come true": f"{len(found) // columns} of {len(cells) // columns}"}
    for title, errors in {"": found["error"], "last value: ": found["last"]}.items() if len(found) else ():
        line |= {f"{title}MAE": errors.abs().mean(skipna=False), f"{title}RMSE": errors.pow(2).mean(skipna=False) ** 0.5}
        if not title:
            line |= {name: f"{100 * found[name].mean():.1f} %" for name in cells.columns if name.endswith(" %")}
    return pd.Series(line, dtype=object)


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
    dates, names = list(frame.columns[:2]), list(frame.columns[2:])
    if dates != [ORIGIN, "date"] or frame.empty:
        raise input_error(path, f"the columns {', '.join(frame.columns)[:200]}" if len(frame) else "no rows", expected)
    heads = (names[:count] for count in range(len(names), 0, -1) if set(names[:count]) <= set(known))
    columns = next((head for head in heads if head + band_columns(head, [*bands_of(frame, head)]) == names), None)
    if columns is None:
        raise input_error(
            path, f"the columns {', '.join(names)[:200]}", f"columns of the data such as {known[0]}, and bands"
        )
    frame[names] = frame[names].apply(pd.to_numeric, errors="coerce")
    if len(wrong := np.argwhere(~np.isfinite(frame[columns].to_numpy()))):
        row, column = wrong[0]
        raise input_error(f"{path}: row {row + FIRST_ROW_LINE}, column {columns[column]!r}", "no number", "a forecast")
    frame[dates] = frame[dates].apply(lambda cells: read_timestamps(cells, str(path), FIRST_ROW_LINE)[0])
    return frame, columns


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
