"""Pictures of a study: errors by row, with a point a seed, and errors by horizon; PNG files."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.saving.files import write_atomic
from utils.study.statistics import Column, Section

ROWS, HORIZONS = "error_by_row.png", "error_by_horizon.png"
RIDGE, LINE = "ridge", "#7f7f7f"
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#e6ab02")
LONGEST = 42  # characters of a row's name


def draw(study: Path, sections: list[Section]) -> list[Path]:
    """The pictures of what is done; the second where there is more than one horizon."""
    if not sections:
        return []
    made = [_draw_rows(study / ROWS, sections)]
    if any(len(section.horizons) > 1 for section in sections):
        made.append(_draw_horizons(study / HORIZONS, [section for section in sections if len(section.horizons) > 1]))
    return made


def _draw_rows(path: Path, sections: list[Section]) -> Path:
    """A panel a horizon, a line of it a row: points are seeds, the bar is their mean, dotted is the ridge regression."""
    columns = max(len(section.horizons) for section in sections)
    lines = sum(len(section.rows) for section in sections)
    figure = Figure(figsize=(3 + 3.6 * columns, 1.2 + 0.9 * len(sections) + 0.42 * lines), layout="constrained")
    heights = [len(section.rows) + 1 for section in sections]
    panels = figure.subplots(len(sections), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for section, line in zip(sections, panels, strict=True):
        for place, axes in enumerate(line):
            if place >= len(section.horizons):
                axes.set_visible(False)
                continue
            _rows(axes, section, section.horizons[place], named=place == 0)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return _save(figure, path)


def _rows(axes: Axes, section: Section, horizon: int, named: bool) -> None:
    column = Column(horizon, "mse")
    for number, row in enumerate(section.rows):
        values, mean = list(row.by_seed.get(column, {}).values()), row.figure(column)
        if mean is None:
            continue
        colour = COLOURS[number % len(COLOURS)]
        axes.scatter(values, [number] * len(values), color=colour, s=28, zorder=3, alpha=0.75)
        axes.plot([mean.mean] * 2, [number - 0.3, number + 0.3], color=colour, linewidth=3, zorder=2)
        if mean.deviation is not None:
            axes.barh(number, 2 * mean.deviation, 0.3, left=mean.mean - mean.deviation, color=colour, alpha=0.2, zorder=1)
    axes.scatter([], [], color="black", s=28, label="a seed")
    axes.plot([], [], color="black", linewidth=3, label="mean (band: ± deviation)")
    for fixed in section.baselines:
        if fixed.label.startswith(RIDGE) and column in fixed.values:
            axes.axvline(fixed.values[column], color=LINE, linestyle=":", label="ridge regression")
    axes.set_ylim(len(section.rows) - 0.4, -0.6)  # the first row on top
    names = [_short(row.label) for row in section.rows] if named else []
    axes.set_yticks(range(len(section.rows)) if named else [], names)
    axes.set_title(f"{section.title}, horizon {horizon}", fontsize=10)
    axes.set_xlabel("test MSE, standardised scale")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _dress(axes)


def _draw_horizons(path: Path, sections: list[Section]) -> Path:
    """A panel a data set, a line a row; points are seeds."""
    longest = max(len(section.rows) for section in sections)
    figure = Figure(figsize=(5.5 * len(sections), 4.2 + 0.22 * longest), layout="constrained")
    for axes, section in zip(figure.subplots(1, len(sections), squeeze=False)[0], sections, strict=True):
        places = {horizon: number for number, horizon in enumerate(section.horizons)}
        for number, row in enumerate(section.rows):
            colour = COLOURS[number % len(COLOURS)]
            means = [(h, figure_.mean) for h in section.horizons if (figure_ := row.figure(Column(h, "mse")))]
            points = [(places[h], v) for h in section.horizons for v in row.by_seed.get(Column(h, "mse"), {}).values()]
            shift = 0.06 * (number - (len(section.rows) - 1) / 2)  # so that rows do not hide each other
            axes.plot([places[h] + shift for h, _ in means], [v for _, v in means], color=colour, label=_short(row.label))
            axes.scatter([x + shift for x, _ in points], [v for _, v in points], color=colour, s=18, alpha=0.7, zorder=3)
        for fixed in section.baselines:
            if fixed.label.startswith(RIDGE):
                known = [
                    (places[h], fixed.values[Column(h, "mse")]) for h in section.horizons if Column(h, "mse") in fixed.values
                ]
                axes.plot(*zip(*known, strict=True), color=LINE, linestyle=":", marker="x", label=_short(fixed.label))
        axes.set_xticks(range(len(places)), [str(horizon) for horizon in places])
        axes.set(xlabel="horizon, rows", ylabel="test MSE, standardised scale")
        axes.set_title(section.title, fontsize=10)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize=9)
        _dress(axes)
    return _save(figure, path)


def _short(label: str) -> str:
    return (label if len(label) <= LONGEST else label[: LONGEST - 1] + "…").replace("$", r"\$")


def _dress(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
    return path
