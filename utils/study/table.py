"""Tables of a study: results.csv with a row a cell, and results.md, .tex and .txt with means over seeds."""

import csv
import io
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.saving.files import write_text
from utils.study.cells import DONE, Place
from utils.study.grid import Grid
from utils.study.queue import Queue, time_text
from utils.study.statistics import (
    ERRORS,
    MEAN,
    PAIRS,
    Column,
    Difference,
    Figure,
    Fixed,
    Row,
    Section,
    differences,
    reference_of,
    sections,
)

CSV, MARKDOWN, LATEX, TEXT = "results.csv", "results.md", "results.tex", "results.txt"
FIGURES = ["trained_values", "epochs", "best_epoch", "validation_loss"]  # of results.csv, besides errors, windows, seconds
DROPPED = 0  # the test split is evaluated whole: data_factory drops an epoch's last short batch in training alone
NONE = "-"


@dataclass(frozen=True)
class Text:
    """A cell of a table."""

    text: str
    best: bool = False


Line = list[Text]


@dataclass(frozen=True)
class Table:
    """A table as text: heads, and blocks of lines that a rule parts."""

    title: str
    heads: list[str]
    blocks: list[list[Line]]


def write_csv(study: Path, grid: Grid, places: list[Place]) -> None:
    """Write results.csv: all cells of the grid, with what is known of each."""
    columns = [*grid.axes, *ERRORS, "windows", "windows_dropped", *FIGURES, "seconds", "state", "cell"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for place in places:
        row: dict[str, object] = dict(place.cell.values)
        if found := place.measured():
            row |= {name: getattr(found, name) for name in (*ERRORS, "windows", *FIGURES)}
            row |= {"windows_dropped": DROPPED, "seconds": f"{found.seconds:.1f}"}
        writer.writerow(row | {"state": DONE if found else place.state(), "cell": place.cell.id})
    write_text(study / CSV, text.getvalue())


def write_tables(study: Path, grid: Grid, places: list[Place], published: list[dict]) -> list[Section]:
    """Write results.csv, results.md, results.tex and results.txt from what is done; the tables' contents."""
    write_csv(study, grid, places)
    found = [(place.cell, result) for place in places if (result := place.measured())]
    made = sections(grid, found, published)
    tables = [
        table for section in made for table in (_errors(section), _intervals(section), _differences(grid, section)) if table
    ]
    facts = [*_facts(places), *(fact for section in made for fact in _windows(section)), *_notes(made)]
    facts += _few_pairs(grid, made)
    commands = [(place.cell.id, _command(place)) for place in places]
    write_text(study / TEXT, _as_text(grid.title, tables, facts))
    write_text(study / MARKDOWN, _as_markdown(study, grid.title, tables, facts, commands))
    write_text(study / LATEX, _as_latex(grid.title, tables, facts))
    return made


def _command(place: Place) -> str:
    """A cell's command as one would type it in the repository's folder."""
    _, program, *words = Queue.command(place)
    here = f"{Path.cwd()}/"
    return shlex.join(["python", Path(program).name, *(word.removeprefix(here) for word in words)])


def _facts(places: list[Place]) -> list[str]:
    """How much is done, on what machine, in what time."""
    found = [result for place in places if (result := place.measured())]
    machines, spent = sorted({result.machine for result in found}), time_text(sum(result.seconds for result in found))
    return [
        f"{len(found)} of {len(places)} cells done, {spent} of computing in all.",
        *(f"Machine: {name}." for name in machines),
        "Errors on the standardised scale, lower is better; mean ± sample standard deviation over the seeds; best of a "
        "column among what was measured here: bold (in results.txt: *).",
    ]


def _windows(section: Section) -> list[str]:
    counts = [f"{' or '.join(map(str, numbers))} (horizon {h})" for h, numbers in section.windows.items()]
    line = f"{section.title}: test windows scored: {', '.join(counts)}; {'none' if not DROPPED else DROPPED} dropped."
    differ = any(len(numbers) > 1 for numbers in section.windows.values())
    return [line] + (["WARNING: not all rows were scored on the same windows."] if differ else [])


def _notes(made: list[Section]) -> list[str]:
    by_note: dict[str, dict[str, None]] = {}
    for fixed in (fixed for section in made for fixed in section.published):
        by_note.setdefault(fixed.note, {})[fixed.label.removesuffix(" (published)")] = None
    return [f"Published, not measured here: {', '.join(labels)}: {note}." for note, labels in by_note.items()]


def _few_pairs(grid: Grid, made: list[Section]) -> list[str]:
    """Why a mean difference of two seeds has no interval, where there is one."""
    pairs = (pair for section in made for *_, by_column in differences(grid, section) for pair in by_column.values())
    if not any(1 < pair.number < PAIRS for pair in pairs):
        return []
    return [f"A difference over fewer than {PAIRS} seeds has no interval: Student's t of two is 12.7, of three 4.3."]


def _errors(section: Section) -> Table:
    """Rows of runs, of simple forecasts on the same windows, and of what was published."""
    best: dict[Column, str] = {}
    for column in section.columns:
        means = [figure.mean for row in section.rows if (figure := row.figure(column))]
        means += [fixed.values[column] for fixed in section.baselines if column in fixed.values]
        if means:
            best[column] = f"{min(means):.4f}"  # as printed: what looks level is level
    runs = [
        [Text(row.label), Text(_seeds(row, section)), *(_mean(row, c, best) for c in section.columns)]
        for row in section.rows
    ]
    simple = [[Text(f.label), Text(NONE), *(_fixed(f, c, best) for c in section.columns)] for f in section.baselines]
    others = [[Text(f.label), Text(NONE), *(_fixed(f, c, {}) for c in section.columns)] for f in section.published]
    blocks = [block for block in (runs, simple, others) if block]
    return Table(section.title, ["", "seeds", *(_head(column) for column in section.columns)], blocks)


def _intervals(section: Section) -> Table | None:
    """Coverage and width of prediction intervals, and the quantile loss: of the runs, and of the simple forecasts."""
    columns = [Column(horizon, name) for horizon in section.horizons for name in section.intervals]
    runs = [
        [Text(row.label), *(_interval(column, row.figure(column)) for column in columns)]
        for row in section.rows
        if any(row.figure(column) for column in columns)
    ]
    simple = [
        [Text(f.label), *(_interval(c, Figure(f.values[c], None, 1) if c in f.values else None) for c in columns)]
        for f in section.baselines
        if any(column in f.values for column in columns)
    ]
    if not runs:
        return None
    several = len(section.horizons) > 1
    heads = ["", *(f"{column.horizon}: {column.error}" if several else column.error for column in columns)]
    return Table(f"Prediction intervals ({section.title})", heads, [block for block in (runs, simple) if block])


def _interval(column: Column, figure: Figure | None) -> Text:
    """A coverage in per cent, a width or a loss; mean over the seeds."""
    if figure is None:
        return Text(NONE)
    return Text(f"{100 * figure.mean:.1f} %" if column.error.startswith("in ") else f"{figure.mean:.4g}")


def _head(column: Column) -> str:
    return f"{'mean' if column.horizon == MEAN else column.horizon} {column.error.upper()}"


def _seeds(row: Row, section: Section) -> str:
    """How many; of each horizon where they differ."""
    numbers = [len(row.by_seed.get(Column(horizon, "mse"), {})) for horizon in section.horizons]
    return str(numbers[0]) if len(set(numbers)) == 1 else ", ".join(map(str, numbers))


def _mean(row: Row, column: Column, best: dict[Column, str]) -> Text:
    figure = row.figure(column)
    return Text(NONE) if figure is None else Text(figure_text(figure), f"{figure.mean:.4f}" == best[column])


def figure_text(figure: Figure) -> str:
    """Mean ± deviation; the mean alone of one seed."""
    return f"{figure.mean:.4f}" + ("" if figure.deviation is None else f" ± {figure.deviation:.4f}")


def _fixed(fixed: Fixed, column: Column, best: dict[Column, str]) -> Text:
    if column not in fixed.values:
        return Text(NONE)
    text = f"{fixed.values[column]:.4f}"
    return Text(text if best else text.removesuffix("0"), text == best.get(column))  # papers print three decimals


def _differences(grid: Grid, section: Section) -> Table | None:
    """Each row minus the reference, paired over seeds."""
    blocks = []
    for row, other, by_column in differences(grid, section):
        lines = []
        for horizon in dict.fromkeys(column.horizon for column in section.columns):
            pairs = [by_column.get(Column(horizon, error)) for error in ERRORS]
            if pairs[0] is not None:
                name = "mean" if horizon == MEAN else str(horizon)
                texts = [text for pair in pairs if pair for text in difference_texts(pair)]
                lines.append([Text(text) for text in (f"{row.label} - {other.label}", name, str(pairs[0].number), *texts)])
        blocks.append(lines)
    blocks = [block for block in blocks if block]
    compared = reference_of(grid)
    if not blocks or compared is None:
        return None
    heads = ["", "horizon", "pairs", *(head for error in ERRORS for head in (error.upper(), "95 % interval"))]
    return Table(
        f"Differences from {compared[1]}, paired over the same seed, data and horizon ({section.title})", heads, blocks
    )


def difference_texts(pair: Difference) -> tuple[str, str]:
    """The mean difference, and the interval of Student's t, or of how few seeds there is none."""
    if pair.low is None or pair.high is None:
        return f"{pair.mean:+.4f}", f"{pair.number} seed{'s' * (pair.number > 1)}: no interval"
    return f"{pair.mean:+.4f}", f"{pair.low:+.4f} to {pair.high:+.4f}"


def _as_text(title: str, tables: list[Table], facts: list[str]) -> str:
    lines = [title, "=" * len(title), ""]
    for table in tables:
        body = [[cell.text + ("*" if cell.best else "") for cell in line] for block in table.blocks for line in block]
        widths = [max(map(len, column)) for column in zip(table.heads, *body, strict=True)]
        rule = "  ".join("-" * width for width in widths)
        lines += [table.title, "", _aligned(table.heads, widths)]
        ends = iter(body)
        for block in table.blocks:
            lines += [rule, *(_aligned(next(ends), widths) for _ in block)]
        lines.append("")
    return "\n".join([*lines, *facts, ""])


def _aligned(cells: list[str], widths: list[int]) -> str:
    parts = [
        cell.ljust(w) if number == 0 else cell.rjust(w) for number, (cell, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(parts).rstrip()


def _as_markdown(study: Path, title: str, tables: list[Table], facts: list[str], commands: list[tuple[str, str]]) -> str:
    escape: Callable[[str], str] = lambda text: re.sub(r"([|*_<`])", r"\\\1", text)  # noqa: E731
    lines = [f"# {escape(title)}", ""]
    for table in tables:
        lines += [f"## {escape(table.title)}", "", f"| {' | '.join(table.heads)} |"]
        lines.append("|---|" + "---:|" * (len(table.heads) - 1))
        for line in [line for block in table.blocks for line in block]:
            cells = [f"**{escape(cell.text)}**" if cell.best else escape(cell.text) for cell in line]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {escape(fact)}" for fact in facts]
    lines += [f"\n![{name}]({name})" for name in sorted(path.name for path in study.glob("*.png"))]
    lines += ["", "<details><summary>The command of every cell</summary>", ""]
    lines += [f"{name}:\n\n```bash\n{command}\n```\n" for name, command in commands]
    return "\n".join([*lines, "</details>", ""])


def _as_latex(title: str, tables: list[Table], facts: list[str]) -> str:
    lines = [f"% {title}", r"% \usepackage{booktabs}"]
    for table in tables:
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}", r"\toprule"]
        lines.append(" & ".join(map(_tex, table.heads)) + r" \\")
        for block in table.blocks:
            lines.append(r"\midrule")
            for line in block:
                cells = [rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text) for cell in line]
                lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*lines, *(f"% {fact}" for fact in facts), ""])


def _tex(text: str) -> str:
    """Text as LaTeX prints it."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "<": "$<$",
        ">": "$>$",
    }
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    plain = "".join(special.get(sign, sign) for sign in text)
    return re.sub(r"(?<!\S)([+-])(?=\d)", r"$\1$", plain)
