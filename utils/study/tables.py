"""Tables of a study: results.csv with a row a cell; means over seeds, prediction intervals and paired
differences in results.txt and .md."""

import re
import shlex
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats  # type: ignore[import-untyped]

from utils.saving.files import duration, write_text
from utils.study.cells import DONE, VARIANT, Cell, Study, measure

PUBLISHED = Path(__file__).resolve().parents[2] / "scripts" / "published.toml"
ERRORS = ["mse", "mae"]
COLUMNS = [*ERRORS, "windows", "windows_dropped", "trained_values", "epochs", "best_epoch", "validation_loss", "seconds"]
NOT_IN_LABEL = ("seed", "pred_len", "data", "percent")  # means are over seeds, columns horizons, tables data and share
PAIRS = 3  # seeds from which on a difference has an interval: of two, Student's t is 12.7 (of three 4.3)
RUN, SIMPLE, OTHERS = "run", "simple forecast", "published"  # kinds of rows
NONE = "-"  # no figure
Table = tuple[str, pd.DataFrame]  # title and texts, by the names of the rows


# What is known of one data set at one share of its training windows:
#
# - errors: rows by kind, name and seed (0 without one); columns (horizon, MSE, MAE or a figure of prediction intervals),
#   and MSE and MAE over all horizons as ("mean", error) where there are several.
# - notes: what the published rows say of themselves, by their sources.
# - windows: horizon -> numbers of test windows scored; more than one: rows differ.
Section = namedtuple("Section", "title errors notes windows")


def write_results(study: Study) -> list[str]:
    """Write results.csv with a row a cell, and the tables of what is done; the names of the files."""
    measured = [(cell, measure(cell)) for cell in study.cells]
    rows = [cell.values | found | {"cell": cell.name} for cell, found in measured]
    frame = pd.DataFrame(rows, columns=[*study.axes, *COLUMNS, "state", "cell"], dtype=object)
    frame["seconds"] = frame["seconds"].map("{:.1f}".format, na_action="ignore")
    groups: dict[tuple[str, int], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, found in measured:
        if found["state"] == DONE:
            groups.setdefault((cell.args.data, cell.args.percent), []).append((cell, found))
    sections = [_read_section(group) for group in groups.values()]
    tables = [table for section in sections for table in _tables_of(study, section)]
    facts = _facts(study, [found for group in groups.values() for _, found in group], sections)
    plain = [f"{head}\n\n{frame.rename_axis(None).to_string()}\n" for head, frame in tables]
    texts = {
        "results.csv": frame.to_csv(index=False, lineterminator="\n"),
        "results.md": _as_markdown(study, tables, facts),
        "results.txt": "\n".join([study.title, "=" * len(study.title), "", *plain, *facts, ""]),
    }
    for name, text in texts.items():
        write_text(study.folder / name, text)
    return [*texts]


def _label_of(values: dict[str, str], otherwise: str) -> str:
    # The variant and the model stand by their values alone.
    parts = [(axis, value) for axis, value in values.items() if axis not in NOT_IN_LABEL]
    return ", ".join(value if axis in (VARIANT, "model") else f"{axis} {value}" for axis, value in parts) or otherwise


def _read_section(group: list[tuple[Cell, dict[str, Any]]]) -> Section:
    # The figures of the cells of one data set and share, of the simple forecasts beside them, and of others.
    rows: list[dict[str, Any]] = []
    simple: list[dict[str, Any]] = []
    for cell, found in group:
        place = {"horizon": cell.args.pred_len, "seed": cell.args.seed, "row": _label_of(cell.values, cell.args.model)}
        figures = {name: found[name] for name in (*ERRORS, "windows")} | found["intervals"]
        rows.append(place | {"kind": RUN} | figures)
        simple += [place | {"kind": SIMPLE, "seed": 0, "beside": place["row"]} | row for row in found["simple"]]
    (cell, first), horizons = group[0], sorted({row["horizon"] for row in rows})
    windows = {horizon: sorted({row.pop("windows") for row in rows if row["horizon"] == horizon}) for horizon in horizons}
    published, notes = [], {}
    for source in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["source"]:
        alike = all(getattr(cell.args, name, None) == value for cell, _ in group for name, value in source["when"].items())
        for horizon in horizons if alike and first["data"] == f"{cell.args.data}.csv" else []:
            if figures := source.get(cell.args.data, {}).get(str(horizon)):  # some give no MAE
                place = {"kind": OTHERS, "seed": 0, "row": f"{source['name']} (published)", "horizon": horizon}
                published.append(place | dict(zip(ERRORS, figures, strict=False)))
                notes[source["name"]] = source["note"]
    others = pd.DataFrame(simple, columns=[*rows[0], "beside"])
    # A simple forecast is one row for all runs that had the same windows before them; else there is one beside each.
    differs = others.round(9).groupby(["row", "horizon"])[[*rows[0]]].transform("nunique").max(axis="columns").gt(1)
    differs = differs.groupby(others["row"]).transform("any")
    others["row"] += (" (beside " + others.pop("beside") + ")").where(differs, "")
    others = others.drop_duplicates(["row", "horizon"])
    frame = pd.concat([pd.DataFrame(rows), others, pd.DataFrame(published)])
    index = ["kind", "row", "seed"]
    errors = frame.pivot(index=index, columns="horizon").swaplevel(axis="columns")
    errors = errors.reindex(pd.MultiIndex.from_frame(frame[index].drop_duplicates()))
    for error in ERRORS if len(horizons) > 1 else []:
        errors["mean", error] = errors[[(horizon, error) for horizon in horizons]].mean(axis="columns", skipna=False)
    share = f", {cell.args.percent} % of training" if cell.args.percent < 100 else ""
    return Section(first["data"] + share, errors.rename_axis(columns=["horizon", "figure"]), notes, windows)


def _tables_of(study: Study, section: Section) -> list[Table]:
    # Means ± deviations over seeds, the best marked *; prediction intervals where there are some; paired differences.
    by_row = section.errors.groupby(level=["kind", "row"], sort=False)
    means, horizons = by_row.mean(), section.errors.columns.unique("horizon")
    columns, kinds = [(horizon, error) for horizon in horizons for error in ERRORS], means.index.get_level_values("kind")
    texts = means[columns].map(lambda value: NONE if pd.isna(value) else f"{value:.4f}")
    best = texts.eq(means.loc[kinds != OTHERS, columns].min().map("{:.4f}".format))  # as printed: what looks level is level
    best.loc[kinds == OTHERS] = False
    # Papers print three decimals.
    texts.loc[kinds == OTHERS] = texts[kinds == OTHERS].map(lambda text: text.removesuffix("0"))
    texts += by_row.std()[columns].map(lambda value: "" if pd.isna(value) else f" ± {value:.4f}")
    texts += best.map(lambda is_best: "*" if is_best else "")
    texts.columns = [f"{horizon} {error.upper()}" for horizon, error in columns]
    counts = by_row.count()[[(horizon, "mse") for horizon in section.windows]].to_numpy()
    seeds = [", ".join(map(str, row if len(set(row)) > 1 else row[:1])) for row in counts]
    texts.insert(0, "seeds", [seed if kind == RUN else NONE for seed, kind in zip(seeds, kinds, strict=True)])
    tables = [(section.title, texts.droplevel("kind"))]

    names = [name for name in section.errors.columns.unique("figure") if name not in ERRORS]
    intervals = means.drop(columns=columns).dropna(how="all")
    if RUN in intervals.index:
        held = {
            f"{horizon}: {name}" if len(section.windows) > 1 else name: [
                NONE if pd.isna(value) else f"{100 * value:.1f} %" if name.startswith("in ") else f"{value:.4g}"
                for value in intervals[horizon, name]
            ]
            for horizon in section.windows
            for name in names
        }
        frame = pd.DataFrame(held, index=intervals.index.get_level_values("row"))
        tables.append((f"Prediction intervals ({section.title})", frame))

    axes = {axis: values for axis, values in study.axes.items() if axis not in NOT_IN_LABEL and len(values) > 1}
    for axis, values in sorted(axes.items(), key=lambda item: study.reference not in item[1])[:1]:
        reference = study.reference if study.reference in values else values[0]
        pairs = {_label_of(cell.values, ""): _label_of(cell.values | {axis: reference}, "") for cell in study.cells}
        if lines := [line for pair in pairs.items() for line in _paired(section, *pair)]:
            title = f"Differences from {reference}, paired over the same seed, data and horizon ({section.title})"
            tables.append((title, pd.DataFrame(lines).set_index("row")))
    return tables


def _paired(section: Section, row: str, other: str) -> list[dict[str, str]]:
    # A row's mean difference from another over the seeds that both have, with Student's 95 % interval: a line a horizon.
    runs, lines = section.errors.loc[[RUN]].droplevel("kind"), []
    if row == other or not {row, other} <= set(runs.index.unique("row")):
        return []
    differences = runs.loc[[row]].droplevel("row") - runs.loc[[other]].droplevel("row")
    for horizon in section.errors.columns.unique("horizon"):
        line = {"row": f"{row} - {other}", "horizon": str(horizon)}
        for error in ERRORS:
            found = differences[horizon, error].dropna()
            number, mean = len(found), found.mean()
            interval = f"{number} seed{'s' * (number > 1)}: no interval"
            if number >= PAIRS:
                half = stats.t.ppf(0.975, number - 1) * stats.sem(found)
                interval = f"{mean - half:+.4f} to {mean + half:+.4f}"
            line |= {"pairs": str(number), error.upper(): f"{mean:+.4f}", f"95 % interval of {error.upper()}": interval}
        lines += [line] if number else []
    return lines


def _facts(study: Study, found: list[dict[str, Any]], sections: list[Section]) -> list[str]:
    # What stands below the tables: how much is done, where, on which windows, and what others did otherwise.
    spent = duration(sum(result["seconds"] for result in found))
    facts = [
        f"{len(found)} of {len(study.cells)} cells done, {spent} of computing in all.",
        *(f"Machine: {name}." for name in sorted({result["machine"] for result in found})),
        "Errors on the standardised scale, lower is better; mean ± sample standard deviation over the seeds; best of a "
        "column among what was measured here: bold (in results.txt: *).",
    ]
    for section in sections:
        counts = [f"{' or '.join(map(str, numbers))} (horizon {h})" for h, numbers in section.windows.items()]
        facts.append(f"{section.title}: test windows scored: {', '.join(counts)}; none dropped.")
    notes = pd.Series({name: note for section in sections for name, note in section.notes.items()}, dtype=str)
    by_note = notes.groupby(notes, sort=False)
    return facts + [f"Published, not measured here: {', '.join(held.index)}: {note}." for note, held in by_note]


def _as_markdown(study: Study, tables: list[Table], facts: list[str]) -> str:
    def escape(text: str) -> str:
        plain = re.sub(r"([|*_<`])", r"\\\1", text.removesuffix("*"))
        return f"**{plain}**" if text.endswith("*") else plain

    lines = [f"# {escape(study.title)}", ""]
    for title, frame in tables:
        rows = [["", *frame], ["---", *["---:"] * frame.shape[1]], *(map(escape, row) for row in frame.itertuples())]
        lines += [f"## {escape(title)}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [*(f"- {escape(fact)}" for fact in facts), "", "<details><summary>The command of every cell</summary>", ""]
    for cell in study.cells:
        words = [word.removeprefix(f"{Path.cwd()}/") for word in cell.command[2:]]
        lines.append(f"{cell.name}:\n\n```bash\n{shlex.join(['python', 'run_main.py', *words])}\n```\n")
    return "\n".join([*lines, "</details>", ""])
