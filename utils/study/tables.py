"""Tables and pictures of a study: results.csv with a row a cell; means over seeds, prediction intervals and paired
differences in results.txt, .md and .tex."""

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from utils.saving.files import write_atomic, write_text
from utils.study.cells import DONE, measure, time_text
from utils.study.grid import VARIANT, Cell, Study

PUBLISHED = Path(__file__).resolve().parents[2] / "scripts" / "published.toml"
ERRORS = ["mse", "mae"]
COLUMNS = [*ERRORS, "windows", "windows_dropped", "trained_values", "epochs", "best_epoch", "validation_loss", "seconds"]
NOT_IN_LABEL = ("seed", "pred_len", "data", "percent")  # means are over seeds, columns horizons, tables data and share
PAIRS = 3  # seeds from which on a difference has an interval: of two, Student's t is 12.7 (of three 4.3)
RUN, SIMPLE, OTHERS = "run", "simple forecast", "published"  # kinds of rows
NONE = "-"
Table = tuple[str, pd.DataFrame]  # title and texts, by the names of the rows


@dataclass
class Section:
    """What is known of one data set at one share of its training windows.

    Attributes:
        errors: rows by kind, name and seed (0 without one); columns (horizon, MSE, MAE or a figure of prediction
            intervals), and MSE and MAE over all horizons as ("mean", error) where there are several.
        notes: what the published rows say of themselves, by their sources.
        windows: horizon -> numbers of test windows scored; more than one: rows differ.
    """

    title: str
    errors: pd.DataFrame
    notes: dict[str, str]
    windows: dict[int, list[int]]


def write_csv(study: Study) -> None:
    """Write results.csv: all cells of the grid, with what is known of each."""
    rows = [cell.values | measure(cell) | {"cell": cell.name} for cell in study.cells]
    frame = pd.DataFrame(rows, columns=[*study.axes, *COLUMNS, "state", "cell"], dtype=object)
    frame["seconds"] = frame["seconds"].map("{:.1f}".format, na_action="ignore")
    write_text(study.folder / "results.csv", frame.to_csv(index=False, lineterminator="\n"))


def write_results(study: Study) -> list[str]:
    """Write results.csv, and the tables and pictures of what is done; the names of the files."""
    write_csv(study)
    groups: dict[tuple[str, int], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in study.cells:
        if (found := measure(cell))["state"] == DONE:
            groups.setdefault((cell.args.data, cell.args.percent), []).append((cell, found))
    sections = [read_section(group) for group in groups.values()]
    tables = [table for section in sections for table in tables_of(study, section)]
    facts = facts_of(study, [found for group in groups.values() for _, found in group], sections)
    pictures = draw(study, sections)
    write_text(study.folder / "results.txt", as_text(study.title, tables, facts))
    write_text(study.folder / "results.md", as_markdown(study, tables, facts, pictures))
    write_text(study.folder / "results.tex", as_latex(study.title, tables, facts))
    return ["results.csv", "results.md", "results.tex", "results.txt", *pictures]


def label_of(values: dict[str, str], otherwise: str) -> str:
    """A row's name: the variant and the model by their values alone."""
    parts = [(axis, value) for axis, value in values.items() if axis not in NOT_IN_LABEL]
    return ", ".join(value if axis in (VARIANT, "model") else f"{axis} {value}" for axis, value in parts) or otherwise


def read_section(group: list[tuple[Cell, dict[str, Any]]]) -> Section:
    """The figures of the cells of one data set and share, of the simple forecasts beside them, and of others."""
    rows: list[dict[str, Any]] = []
    simple: list[dict[str, Any]] = []
    for cell, found in group:
        place = {"horizon": cell.args.pred_len, "seed": cell.args.seed, "row": label_of(cell.values, cell.args.model)}
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
    errors = frame.set_index([*index, "horizon"]).unstack("horizon").swaplevel(axis="columns")
    errors = errors.reindex(pd.MultiIndex.from_frame(frame[index].drop_duplicates()))
    for error in ERRORS if len(horizons) > 1 else []:
        errors["mean", error] = errors.xs(error, axis="columns", level=1).mean(axis="columns", skipna=False)
    share = f", {cell.args.percent} % of training" if cell.args.percent < 100 else ""
    return Section(first["data"] + share, errors.rename_axis(columns=["horizon", "figure"]), notes, windows)


def tables_of(study: Study, section: Section) -> list[Table]:
    """Means ± deviations over seeds with the best marked *, prediction intervals where there are some, paired differences."""
    by_row = section.errors.groupby(level=["kind", "row"], sort=False)
    means, horizons = by_row.mean(), section.errors.columns.unique("horizon")
    columns, kinds = [(horizon, error) for horizon in horizons for error in ERRORS], means.index.get_level_values("kind")
    texts = means[columns].map(lambda value: NONE if pd.isna(value) else f"{value:.4f}")
    best = texts.eq(means.loc[kinds != OTHERS, columns].min().map("{:.4f}".format))  # as printed: what looks level is level
    best.loc[kinds == OTHERS] = False
    texts.loc[kinds == OTHERS] = texts[kinds == OTHERS].map(lambda text: text.removesuffix("0"))  # papers print three decimals
    texts += by_row.std()[columns].map(lambda value: "" if pd.isna(value) else f" ± {value:.4f}")
    texts += best.map(lambda is_best: "*" if is_best else "")
    texts.columns = [f"{horizon} {error.upper()}" for horizon, error in columns]
    counts = by_row.count()[[(horizon, "mse") for horizon in section.windows]].to_numpy()
    seeds = [", ".join(map(str, row if len(set(row)) > 1 else row[:1])) for row in counts]
    texts.insert(0, "seeds", [seed if kind == RUN else NONE for seed, kind in zip(seeds, kinds, strict=True)])
    tables = [(section.title, texts.droplevel("kind"))]

    intervals = means.drop(columns=columns).dropna(how="all")
    if RUN in intervals.index:
        held = {
            f"{horizon}: {name}" if len(section.windows) > 1 else name: [
                NONE if pd.isna(value) else f"{100 * value:.1f} %" if name.startswith("in ") else f"{value:.4g}"
                for value in intervals[horizon, name]
            ]
            for horizon, name in sorted(intervals.columns, key=lambda column: column[0])
        }
        frame = pd.DataFrame(held, intervals.index.droplevel("kind"))
        tables.append((f"Prediction intervals ({section.title})", frame))

    axes = {axis: values for axis, values in study.axes.items() if axis not in NOT_IN_LABEL and len(values) > 1}
    for axis, values in sorted(axes.items(), key=lambda item: study.reference not in item[1])[:1]:
        reference = study.reference if study.reference in values else values[0]
        pairs = {label_of(cell.values, ""): label_of(cell.values | {axis: reference}, "") for cell in study.cells}
        if lines := [line for pair in pairs.items() for line in paired(section, *pair)]:
            title = f"Differences from {reference}, paired over the same seed, data and horizon ({section.title})"
            tables.append((title, pd.DataFrame(lines).set_index("row")))
    return tables


def paired(section: Section, row: str, other: str) -> list[dict[str, str]]:
    """One row's mean difference from another over the seeds that both have, with Student's 95 % interval: a line a horizon."""
    runs, lines = section.errors.loc[RUN], []
    if row == other or not {row, other} <= set(runs.index.unique("row")):
        return []
    differences = runs.loc[row] - runs.loc[other]
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


def facts_of(study: Study, found: list[dict[str, Any]], sections: list[Section]) -> list[str]:
    """What stands below the tables: how much is done, where, on which windows, and what others did otherwise."""
    spent = time_text(sum(result["seconds"] for result in found))
    facts = [
        f"{len(found)} of {len(study.cells)} cells done, {spent} of computing in all.",
        *(f"Machine: {name}." for name in sorted({result["machine"] for result in found})),
        "Errors on the standardised scale, lower is better; mean ± sample standard deviation over the seeds; best of a "
        "column among what was measured here: bold (in results.txt: *).",
    ]
    for section in sections:
        counts = [f"{' or '.join(map(str, numbers))} (horizon {h})" for h, numbers in section.windows.items()]
        facts.append(f"{section.title}: test windows scored: {', '.join(counts)}; none dropped.")
        if any(len(numbers) > 1 for numbers in section.windows.values()):
            facts.append("WARNING: not all rows were scored on the same windows.")
    notes = pd.Series({name: note for section in sections for name, note in section.notes.items()}, dtype=str)
    by_note = notes.groupby(notes, sort=False)
    return facts + [f"Published, not measured here: {', '.join(held.index)}: {note}." for note, held in by_note]


def as_text(title: str, tables: list[Table], facts: list[str]) -> str:
    """The tables for a terminal."""
    parts = [f"{head}\n\n{frame.rename_axis(None).to_string()}\n" for head, frame in tables]
    return "\n".join([title, "=" * len(title), "", *parts, *facts, ""])


def as_markdown(study: Study, tables: list[Table], facts: list[str], pictures: list[str]) -> str:
    """The tables, the pictures and every cell's command, for a page."""

    def escape(text: str) -> str:
        plain = re.sub(r"([|*_<`])", r"\\\1", text.removesuffix("*"))
        return f"**{plain}**" if text.endswith("*") else plain

    lines = [f"# {escape(study.title)}", ""]
    for title, frame in tables:
        rows = [["", *frame], ["---", *["---:"] * frame.shape[1]], *(map(escape, row) for row in frame.itertuples())]
        lines += [f"## {escape(title)}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- {escape(fact)}" for fact in facts]
    lines += [f"\n![{name}]({name})" for name in pictures]
    lines += ["", "<details><summary>The command of every cell</summary>", ""]
    for cell in study.cells:
        words = [word.removeprefix(f"{Path.cwd()}/") for word in cell.command[2:]]
        lines.append(f"{cell.name}:\n\n```bash\n{shlex.join(['python', 'run_main.py', *words])}\n```\n")
    return "\n".join([*lines, "</details>", ""])


def as_latex(title: str, tables: list[Table], facts: list[str]) -> str:
    """The tables for a paper."""
    parts = [f"% {title}", r"% \usepackage{booktabs}"]
    for head, frame in tables:
        caption = re.sub(r"([&%$#_{}])", r"\\\1", head)
        text = frame.rename_axis(None).to_latex(escape=True, caption=caption, column_format="l" + "r" * frame.shape[1])
        text = re.sub(r"(\S+(?: ± \S+)?)\* ", r"\\textbf{\1} ", text)
        parts.append(re.sub(r"(?<= )([+-])(?=\d)", r"$\1$", text).replace("±", r"$\pm$"))
    return "\n".join([*parts, *(f"% {fact}" for fact in facts), ""])


def draw(study: Study, sections: list[Section]) -> list[str]:
    """Write the pictures: errors by row with a point a seed, and by horizon where there are several; their names."""
    from matplotlib.figure import Figure  # only now: it takes a second to load

    several = [section for section in sections if len(section.windows) > 1]
    columns = max(len(section.windows) for section in sections)
    by_row, by_horizon = Figure(layout="constrained"), Figure(figsize=(8, 5 * len(several)), layout="constrained")
    by_row.set_size_inches(3 + 3.6 * columns, sum(1.2 + 0.2 * len(section.errors) for section in sections))
    for number, section in enumerate(sections):
        errors = section.errors.xs("mse", axis="columns", level="figure")
        runs = errors.loc[RUN].groupby(level="row", sort=False)
        ridge = errors[errors.index.get_level_values("row").str.startswith("ridge regression")]
        for place, horizon in enumerate(section.windows):
            axes = by_row.add_subplot(len(sections), columns, number * columns + place + 1)
            for value in ridge[horizon]:
                axes.axvline(value, color="gray", linestyle=":", label="ridge regression")
            axes.scatter(errors.loc[RUN][horizon], errors.loc[RUN].index.get_level_values("row"), alpha=0.6, label="a seed")
            axes.errorbar(
                runs.mean()[horizon], list(runs.groups), xerr=runs.std()[horizon], fmt="|", ms=16, label="mean ± deviation"
            )
            axes.invert_yaxis()  # the first row on top
            axes.set_title(f"{section.title}, horizon {horizon}")
            axes.set_xlabel("test MSE, standardised scale")
        if section in several:
            axes = by_horizon.add_subplot(len(several), 1, several.index(section) + 1)
            lines = pd.concat([runs.mean(), ridge.droplevel(["kind", "seed"])])[list(section.windows)]
            lines.T.plot(ax=axes, marker="o", title=section.title, xlabel="horizon", xticks=list(section.windows))
            axes.set_ylabel("test MSE, standardised scale")
    handles, labels = by_row.axes[0].get_legend_handles_labels()
    by_row.legend(dict(zip(labels, handles, strict=True)).values(), dict.fromkeys(labels), loc="outside lower center", ncols=4)
    pictures = {"error_by_row.png": by_row} | ({"error_by_horizon.png": by_horizon} if several else {})
    for name, picture in pictures.items():
        write_atomic(study.folder / name, lambda partial, picture=picture: picture.savefig(partial, format="png", dpi=110))
    return list(pictures)
