"""Pictures of a run: PNG files, in the data's own units, readable without the text beside them."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import dates as mdates
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from utils.results.bands import name_of
from utils.results.forecast import bands_of
from utils.results.test_pass import M4Pass
from utils.saving.files import write_atomic, writing
from utils.training.context import Context

PLOTS = "plots"  # the folder in the run's folder
PANELS = 7  # channels on a page
MOST_DRAWN = 28  # channels of which all are drawn; of more, a page of them is chosen
HISTORY, TRUTH, FORECAST, NOTE = "#7f7f7f", "#1f77b4", "#d95f02", "#e6ab02"
MARKS = 6  # notes that a picture of a forecast shows at most
SHADES = (0.3, 0.16)  # of the narrowest band, and of the widest
SIMPLE = {"ridge": "#2ca02c", "last season": "#9467bd"}  # colours of the simple forecasts' errors
SHOWN_HORIZONS, SHOWN_ROWS = 2, 24  # history in a picture: so many horizons, and at least so many rows
# Column names in Chinese need a font that has them; those that are installed stand behind the usual one.
CJK = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "WenQuanYi Zen Hei")


class Panel(NamedTuple):
    """One column of one series in its own units, by date (or by step ahead)."""

    name: str
    otherwise: str  # where no font has the name's characters
    history: pd.Series  # as many rows as a picture shows; of a forecast alone, none
    forecast: pd.Series  # [steps]
    bands: dict[float, tuple[np.ndarray, np.ndarray]]  # level in per cent -> lower and upper ends [steps]
    calibrated: int  # steps whose bands are calibrated; those of later ones are only widened
    truth: pd.Series | None = None  # [steps]

    @property
    def label(self) -> str:
        """The name, or what stands for it, not longer than a panel is high."""
        name = self.name if set(map(ord, self.name)) <= glyphs() else self.otherwise
        return name if len(name) <= 20 else name[:19] + "…"


def draw_test(results: Any, metrics: dict) -> None:
    """The pictures of a test pass, in its folder; of many channels some are chosen by their errors, and named in the log."""
    step, H = results.series.step_words, results.series.pred_len
    if isinstance(results, M4Pass):
        row, ids, ahead = [], results.series.ids, range(1, H + 1)
        places = np.unique(np.linspace(0, len(ids) - 1, 3).round().astype(int)).tolist()
        for place in places:
            history = pd.DataFrame({"": results.series.known[place]})
            history.index -= len(history) - 1
            forecast, truth = (pd.DataFrame({"": v[place]}, ahead) for v in (results.forecasts, results.series.future))
            row += panels_of(history, forecast, {}, 0, truth)
        title = f"{results.series.pattern}: first, middle and last series, in their units (1 step: {step})"
        _draw_panels(results.folder / PLOTS / "test_windows.png", [row], title, [ids[place] for place in places])
        return
    scale, columns, about = metrics["standardised"], results.columns, f"{metrics['model']} on {results.series.path.name}"
    places, note = choose(columns, [scale["channels"][name]["mse"] for name in columns])
    if note:
        results.context.log(f"Pictures of test windows: {note}: {', '.join(columns[place] for place in places)}")
    if not results.windows:
        results.context.log("No pictures of test windows: they are made from predictions.npz")
    panels = []
    for window in results.windows.values():
        history = pd.DataFrame(window.history, window.dates[:-H], columns)
        forecast, truth = (pd.DataFrame(values, window.dates[-H:], columns) for values in (window.pred, window.true))
        bands = {
            float(name[2:]): (low, window.bands[f"hi{name[2:]}"])
            for name, low in window.bands.items()
            if name.startswith("lo")
        }
        panels.append(panels_of(history, forecast, bands, H, truth))
    grid = [[of_window[place] for of_window in panels] for place in places] if panels else []
    title = f"{about}: test windows (1 row: {step}; units of the file)"
    for path, part in _pages(results.folder, "test_windows", len(grid)):
        heads = [f"{name}, from {day_of(window.dates[-H])}" for name, window in results.windows.items()]
        _draw_panels(path, grid[part], f"{title}\n{note}".rstrip(), heads)

    first, last = (day_of(pd.Timestamp(day)) for day in metrics["first_forecast_row"])
    label, title = f"rows ahead (1 row: {step})", f"{about}, forecasts from {first} to {last}"
    path, marker = results.folder / PLOTS / "error_by_step.png", "." if H < 30 else None
    with _lines(path, H, f"{title}: error by row ahead", label, "error, standardised scale") as axes:
        simple = [row for row in metrics["baselines"]["rows"] if row["name"] in SIMPLE]
        drawn = [("", FORECAST, scale), *((f" of {row['title']}", SIMPLE[row["name"]], row) for row in simple)]
        for (figure, width), (of, colour, row) in itertools.product((("mse", 1.6), ("mae", 0.9)), drawn):
            values, label = row["steps"][figure], f"{figure.upper()}{of}"
            axes.plot(range(1, H + 1), values, color=colour, linewidth=width, marker=marker, label=label)
        axes.set_ylim(bottom=0)
    if "intervals" in metrics:
        path = path.with_name("coverage_by_step.png")
        with _lines(path, H, f"{title}: truths in the bands", label, "per cent") as axes:
            for name, level in metrics["intervals"]["levels"].items():
                values = 100 * np.array(level["steps"]["coverage"])
                (line,) = axes.plot(range(1, H + 1), values, marker=marker, label=f"in the {name} % band")
                axes.axhline(float(name), color=line.get_color(), linestyle=":", linewidth=1)


def draw_losses(folder: Path, history: list[dict], loss: str = "MSE, standardised scale") -> None:
    """Training, validation and test loss by epoch; the epoch whose weights are kept is marked.

    Args:
        history: a row an epoch with epoch, train_loss, vali_loss, test_loss.
        loss: what they are, for people.
    """
    table = pd.DataFrame(history).set_index("epoch").astype(float)
    with _lines(folder / PLOTS / "loss_by_epoch.png", len(table), "Loss by epoch", "epoch", loss) as axes:
        axes.set_prop_cycle(color=[HISTORY, FORECAST, TRUTH])
        losses = ["train_loss", "vali_loss", "test_loss"]
        axes.plot(table.index, table[losses], marker="o", label=["training", "validation", "test"])
        finite = table["vali_loss"][np.isfinite(table["vali_loss"])]  # no other epoch is kept
        if len(finite):
            best = finite.idxmin()
            axes.axvline(best, color="black", linestyle=":", linewidth=1, label=f"kept: epoch {best}")


def draw_forecast(context: Context, forecast: pd.DataFrame) -> None:
    """The pictures of a forecast behind its history, in the run's folder; of many columns some, named in the log."""
    series = context.series
    columns = series.forecast_columns
    places, note = choose(columns)
    if note:
        context.log(f"Pictures of the forecast: {note}: {', '.join(columns[place] for place in places)}")
    history = pd.DataFrame(series.own[:, series.forecast_slice], series.dates, columns)
    bands = bands_of(forecast, columns)
    panels = panels_of(history, forecast.set_index("date")[columns], bands, context.args.pred_len)
    for path, part in _pages(context.folder, "forecast", len(places)):
        about = f"{context.args.model} on {series.path.name}: "
        drawn = [panels[place] for place in places[part]]
        marks = series.notes.latest(series.dates[-1], MARKS) if series.notes else []
        forecast_figure(drawn, series.step_words, path, note, about, marks)


def panels_of(
    history: pd.DataFrame | None,
    forecast: pd.DataFrame,
    bands: dict[float, tuple[np.ndarray, np.ndarray]],
    calibrated: int,
    truth: pd.DataFrame | None = None,
    prefix: str = "",
) -> list[Panel]:
    """A panel a column.

    Args:
        history: the rows before the forecast, by date; None: it is drawn alone.
        forecast, truth: by date.
        bands: level in per cent -> lower and upper ends, each `[steps, N]`.
        calibrated: rows whose bands are calibrated.
        prefix: in front of the columns' names.
    """
    known = (forecast[:0] if history is None else history)[-max(SHOWN_HORIZONS * len(forecast), SHOWN_ROWS) :]
    return [
        Panel(
            f"{prefix}{name}",
            f"column {n + 1}",
            known[name],
            forecast[name],
            {level: (low[:, n], high[:, n]) for level, (low, high) in bands.items()},
            min(calibrated, len(forecast)),
            None if truth is None else truth[name],
        )
        for n, name in enumerate(forecast.columns)
    ]


def forecast_figure(
    panels: list[Panel],
    step: str,
    path: Path | None = None,
    note: str = "",
    about: str = "",
    marks: Sequence[tuple[pd.Timestamp, pd.Timestamp, str]] = (),
) -> Figure:
    """A figure of forecasts, one below the other, written to `path` where one is given.

    Args:
        about: begins its title.
        marks: notes, with their first and last moment.

    Raises:
        StorageError: the file system refused.
    """
    days = panels[0].forecast.index
    apart = any(panel.forecast.index[0] != days[0] for panel in panels)  # series that end on different dates
    title = f"{about}{len(days)} row{'s' if len(days) > 1 else ''} ahead{'' if apart else f' from {day_of(days[0])}'}"
    title = f"{title} (1 row: {step}; units of the file)\n{note}".rstrip()
    return _draw_panels(path, [[panel] for panel in panels], title, marks=marks)


def choose(columns: Sequence[str], errors: Sequence[float] | None = None) -> tuple[list[int], str]:
    """The places of all channels, or of more than `MOST_DRAWN` a page of them, evenly spread; and how they were chosen.

    Args:
        errors: one a channel: the lowest, the highest and those between by rank; None: from the first column to the last.
    """
    N = len(columns)
    if N <= MOST_DRAWN:
        return list(range(N)), ""
    ranked = np.arange(N) if errors is None else np.argsort(errors, kind="stable")
    kind = "from the first to the last" if errors is None else "from the lowest test MSE to the highest"
    return ranked[np.linspace(0, N - 1, PANELS).round().astype(int)].tolist(), (
        f"{PANELS} of {N} channels, {kind}, evenly spread"
    )


def _pages(folder: Path, kind: str, count: int) -> Iterator[tuple[Path, slice]]:
    pages = np.array_split(np.arange(count), -(-count // PANELS)) if count else []
    for number, rows in enumerate(pages, 1):
        name = f"{kind}.png" if len(pages) == 1 else f"{kind}_{number}.png"
        yield folder / PLOTS / name, slice(rows[0], rows[-1] + 1)


# Panels in rows that have a name each; `heads` stand above the first one.
def _draw_panels(
    path: Path | None, grid: list[list[Panel]], title: str, heads: Sequence[str] = (), marks: Sequence[tuple] = ()
) -> Figure:
    with drawing(path, 5.2 * len(heads) or 11, len(grid)) as figure:
        places = figure.subplots(len(grid), len(grid[0]), squeeze=False)
        apart = any(row[0].forecast.index[0] != grid[0][0].forecast.index[0] for row in grid)
        for number, row in enumerate(grid):
            for axes, panel in zip(places[number], row, strict=True):
                paint(axes, panel)
                dated = isinstance(panel.forecast.index, pd.DatetimeIndex)
                dress(axes, dated, labelled=apart or number == len(grid) - 1)
            size = 10 if len(row[0].label) <= 12 else 8
            places[number][0].set_ylabel(row[0].label, fontsize=size, parse_math=False)
        top = places[0][0]
        for height, (start, end, text) in zip(itertools.cycle((0.98, 0.9, 0.82)), marks, strict=False):
            begin, last = grid[0][0].history.index[0], grid[0][0].forecast.index[-1]
            if start <= last and end >= begin:
                for axes in places[:, 0]:
                    axes.axvspan(max(start, begin), min(end, last), color=NOTE, alpha=0.2)
                top.text(max(start, begin), height, text[:60], transform=top.get_xaxis_transform(), fontsize=7, va="top",
                         parse_math=False)  # fmt: skip
        for axes, head in zip(places[0], heads, strict=False):
            axes.set_title(head, fontsize=10)
        figure.align_ylabels(places[:, 0])
        figure.suptitle(title)
        handles, labels = places[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def paint(axes: Axes, panel: Panel) -> None:
    """History, bands, truth and forecast. Bands that are only widened are lighter, behind a dotted line."""
    last = panel.history[-1:]  # joins the lines, and the bands open from it
    if len(last):
        axes.plot(panel.history.index, panel.history, color=HISTORY, label="history")
        axes.axvline(last.index[0], color="black", linewidth=0.7, linestyle=":")
    days, end = last.index.append(panel.forecast.index), len(last) + panel.calibrated
    shades = np.linspace(*SHADES, len(panel.bands))
    for (level, ends), alpha in reversed([*zip(sorted(panel.bands.items()), shades, strict=True)]):  # the widest lies below
        low, high = (np.append(last, each) for each in ends)
        label = f"{name_of(level)} %"
        axes.fill_between(days[:end], low[:end], high[:end], color=FORECAST, alpha=alpha, linewidth=0, label=label)
        axes.fill_between(days[end - 1 :], low[end - 1 :], high[end - 1 :], color=FORECAST, alpha=alpha / 2, linewidth=0)
    if panel.bands and panel.calibrated < len(panel.forecast):
        axes.axvline(days[end - 1], color=FORECAST, linewidth=1, linestyle=":", label="bands calibrated up to here")
    for values, colour, label in ((panel.truth, TRUTH, "truth"), (panel.forecast, FORECAST, "forecast")):
        if values is not None:
            axes.plot(days, np.append(last, values), color=colour, label=label, marker="o" if len(days) < 4 else None)


def dress(axes: Axes, dated: bool = False, labelled: bool = True) -> None:
    """Light grid, no box; dates on the lowest row of panels only."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if dated:
        locator = mdates.AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.01)
        axes.tick_params(labelbottom=labelled, labelsize=8)


@contextmanager
def _lines(path: Path, count: int, title: str, xlabel: str, ylabel: str) -> Iterator[Axes]:
    with drawing(path, 9, 2) as figure:
        axes = figure.subplots()
        yield axes
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(0.5, count + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        dress(axes)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


@contextmanager
def drawing(path: Path | None, width: float, panels: float) -> Iterator[Figure]:
    """A figure, `panels` rows of panels high, that is written to `path` at the end of the `with`.

    Raises:
        StorageError: the file system refused.
    """
    with rc_context({"font.family": fonts(), "axes.unicode_minus": False}):
        figure = Figure(figsize=(width, 1.3 + 1.55 * panels), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        yield figure
        if path is not None:
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


# The families to draw with: the usual one, and those installed that have Chinese characters.
def fonts() -> list[str]:
    return ["DejaVu Sans", *(name for name in CJK if name in font_manager.get_font_names())]


# The characters that the fonts in use can draw.
@cache
def glyphs() -> frozenset[int]:
    paths = [font_manager.findfont(name) for name in fonts()]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


# A date without the time where that is midnight.
def day_of(date: pd.Timestamp) -> str:
    return f"{date:%Y-%m-%d %H:%M}".removesuffix(" 00:00")
