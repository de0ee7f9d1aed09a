"""Pictures of a run: PNG files, in the data's own units, readable without the text beside them."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import dates as mdates
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from utils.results.bands import name_of
from utils.results.forecast import Forecast
from utils.results.test_pass import SHOWN_WINDOWS, M4Pass, TestPass, Window
from utils.saving.files import write_atomic, writing

PLOTS = "plots"  # the folder in the run's folder
PANELS = 7  # channels on a page
MOST_DRAWN = 28  # channels of which all are drawn; of more, a page of them is chosen
HISTORY, TRUTH, FORECAST = "#7f7f7f", "#1f77b4", "#d95f02"
SHADES = (0.16, 0.3)  # of the widest band, and of the narrowest
SHOWN_HORIZONS, SHOWN_ROWS = 2, 24  # history in a picture: so many horizons, and at least so many rows
# Column names in Chinese need a font that has them; those that are installed stand behind the usual one.
CJK = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "WenQuanYi Zen Hei")


Bands = list[tuple[float, np.ndarray, np.ndarray]]  # level in per cent, lower and upper ends [rows]


def draw_test(results: TestPass, metrics: dict) -> None:
    """The pictures of a test pass, in its folder; of many channels some are chosen by their errors, and named in the log."""
    if isinstance(results, M4Pass):
        draw_ends(results)
        return
    step, by_name = results.series.step_words, metrics["standardised"]["channels"]
    windows = [results.windows[number] for number in sorted(results.windows)]
    choice = choose(results.columns, [by_name[name]["mse"] for name in results.columns])
    if choice.note:
        results.job.log(f"Pictures of test windows: {choice.line}")
    draw_windows(results.folder, results.columns, windows, step, choice)
    draw_steps(results.folder, metrics["standardised"], step)


def draw_ends(results: M4Pass) -> Path:
    """Forecasts of some series of a collection against the truth, behind as much history as a picture shows."""
    series = results.series
    chosen = np.unique(np.linspace(0, len(series.ids) - 1, SHOWN_WINDOWS).round().astype(int))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(chosen), squeeze=False)[0]
        for axes, number in zip(panels, chosen, strict=True):
            history = series.known[number][-max(SHOWN_HORIZONS * series.pred_len, SHOWN_ROWS) :]
            axes.plot(np.arange(1 - len(history), 1), history, color=HISTORY, label="history")
            for values, colour, label in (
                (series.future[number], TRUTH, "truth"),
                (results.forecasts[number], FORECAST, "forecast"),
            ):
                axes.plot(np.arange(series.pred_len + 1), np.append(history[-1:], values), color=colour, label=label)
            axes.axvline(0, color="black", linewidth=0.7, linestyle=":")
            axes.set(title=series.ids[number], xlabel=f"steps ahead (1 step: {series.step_words})")
            dress(axes)
        figure.suptitle(f"{series.pattern}: first, middle and last series of the file, in its units")
        _legend(figure, panels[0])

    return _save(results.folder, "test_windows", paint, 5.2 * len(chosen), 2)


class Choice(NamedTuple):
    """The channels that pictures show."""

    places: list[int]
    note: str  # how they were chosen, for the title; empty: all are shown
    line: str  # the same with their names, for the log


def choose(columns: list[str], errors: list[float] | None = None) -> Choice:
    """All channels, or of more than `MOST_DRAWN` a page of them, evenly spread.

    Args:
        errors: one a channel: the lowest, the highest and those between by rank; None: from the first column to the last.
    """
    N = len(columns)
    if N <= MOST_DRAWN:
        return Choice(list(range(N)), "", "")
    ranked = np.arange(N) if errors is None else np.argsort(errors, kind="stable")
    places = ranked[np.linspace(0, N - 1, PANELS).round().astype(int)].tolist()
    kind = "from the first to the last" if errors is None else "from the lowest test MSE to the highest"
    note = f"{PANELS} of {N} channels, {kind}, evenly spread"
    return Choice(places, note, f"{note}: {', '.join(columns[place] for place in places)}")


def draw_windows(
    folder: Path, columns: list[str], windows: list[Window], step: str, choice: Choice | None = None
) -> list[Path]:
    """Forecast against truth with history: a row a channel, a column a window, `PANELS` channels a page.

    Args:
        choice: the channels; None: as `choose` does without errors.
    """
    choice = choice or choose(columns)
    pages = _pages(choice.places)
    paint = partial(_windows, columns=columns, windows=windows, step=step, note=choice.note)
    return [
        _save(folder, _name("test_windows", page, len(pages)), partial(paint, shown=shown), 5.2 * len(windows), len(shown))
        for page, shown in enumerate(pages)
    ]  # fmt: skip


class Panel(NamedTuple):
    """A panel of a forecast's picture: one column of one series, in its own units."""

    name: str
    otherwise: str  # where no font has the name's characters
    history: tuple[pd.DatetimeIndex, np.ndarray]  # [rows]; of a forecast alone, no rows
    dates: pd.DatetimeIndex  # [steps]
    values: np.ndarray  # [steps]
    bands: Bands
    calibrated: int  # rows whose bands are


def panels_of(history: tuple[pd.DatetimeIndex, np.ndarray], forecast: Forecast, prefix: str = "") -> list[Panel]:
    """A panel a column.

    Args:
        history: dates `[rows]` and values `[rows, N]` in own units, of which as many are kept as a picture shows.
        prefix: in front of the columns' names.
    """
    shown = max(SHOWN_HORIZONS * len(forecast.dates), SHOWN_ROWS)
    dates, values = history[0][-shown:], history[1][-shown:]
    return [
        Panel(
            prefix + name,
            f"column {n + 1}",
            (dates, values[:, n]),
            forecast.dates,
            forecast.values[:, n],
            [(level, low[:, n], high[:, n]) for level, (low, high) in forecast.bands.items()],
            forecast.calibrated,
        )
        for n, name in enumerate(forecast.columns)
    ]


def draw_forecast(
    folder: Path, history: tuple[pd.DatetimeIndex, np.ndarray], forecast: Forecast, step: str
) -> list[Path]:  # fmt: skip
    """The forecast of the future behind its history, `PANELS` columns a page; arguments as those of `panels_of`.

    Of many columns those are shown that `choose` names.
    """
    panels, choice = panels_of(history, forecast), choose(forecast.columns)
    pages = _pages(choice.places)
    return [
        _save(folder, _name("forecast", page, len(pages)),
              partial(_future, panels=[panels[n] for n in part], step=step, note=choice.note), 11, len(part))
        for page, part in enumerate(pages)
    ]  # fmt: skip


def forecast_figure(panels: list[Panel], step: str, path: Path | None = None) -> Figure:
    """A figure of `panels`, one below the other, written to `path` where one is given.

    Raises:
        StorageError: the file system refused.
    """
    return _figure(partial(_future, panels=panels, step=step), 11, len(panels), path)


def draw_steps(folder: Path, scale: dict, step: str) -> Path:
    """Error by horizon step on the standardised scale.

    Args:
        scale: "all" and "steps" of metrics.json's standardised figures.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for name, colour in (("mse", FORECAST), ("mae", TRUTH)):
            values, mean = scale["steps"][name], scale["all"][name]
            ahead = np.arange(1, len(values) + 1)
            axes.plot(ahead, values, color=colour, marker="o" if len(values) < 30 else None, label=name.upper())
            label = f"{name.upper()} over all steps: {mean:.3f}"
            axes.axhline(mean, color=colour, linestyle=":", linewidth=1, label=label)
        axes.set(title="Test error by horizon step", ylabel="error, standardised scale")
        top = max(*scale["steps"]["mse"], *scale["steps"]["mae"])
        axes.set_ylim(0, 1.1 * top if np.isfinite(top) and top > 0 else 1)
        axes.set_xlim(0.5, len(ahead) + 0.5)
        axes.set_xlabel(f"rows ahead (1 row: {step})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        dress(axes)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)

    return _save(folder, "error_by_step", paint, 9, 2)


def draw_losses(folder: Path, history: list[dict], loss: str = "MSE, standardised scale") -> Path:
    """Training, validation and test loss by epoch; the epoch whose weights are kept is marked.

    Args:
        history: a row an epoch with epoch, train_loss, vali_loss, test_loss.
        loss: what they are, for people.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        epochs = [row["epoch"] for row in history]
        lines = (("train_loss", "training", HISTORY), ("vali_loss", "validation", FORECAST), ("test_loss", "test", TRUTH))
        for key, label, colour in lines:
            axes.plot(epochs, [row[key] for row in history], marker="o", color=colour, label=label)
        finite = [row for row in history if np.isfinite(row["vali_loss"])]  # no other epoch is kept
        if finite:
            best = min(finite, key=lambda row: row["vali_loss"])["epoch"]
            axes.axvline(best, color="black", linestyle=":", linewidth=1, label=f"kept: epoch {best}")
        axes.set(title="Loss by epoch", xlabel="epoch", ylabel=loss)
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        dress(axes)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)

    return _save(folder, "loss_by_epoch", paint, 9, 2)


def _windows(figure: Figure, columns: list[str], shown: list[int], windows: list[Window], step: str, note: str) -> None:
    grid = figure.subplots(len(shown), len(windows), squeeze=False)
    for row, channel in enumerate(shown):
        for axes, window in zip(grid[row], windows, strict=True):
            T, H = len(window.history), len(window.true)
            first = max(T - max(SHOWN_HORIZONS * H, SHOWN_ROWS), 0)
            dates = window.dates
            # The last row of history joins the lines.
            last = window.history[-1:, channel]
            axes.plot(dates[first:T], window.history[first:, channel], color=HISTORY, label="history")
            bands = [
                (float(name[2:]), low[:, channel], window.bands[f"hi{name[2:]}"][:, channel])
                for name, low in window.bands.items()
                if name.startswith("lo")
            ]
            _shade(axes, (dates[T - 1 : T], last), dates[T:], bands, H)
            axes.plot(dates[T - 1 :], np.append(last, window.true[:, channel]), color=TRUTH, label="truth")
            axes.plot(dates[T - 1 :], np.append(last, window.pred[:, channel]), color=FORECAST, label="forecast",
                      marker="o" if H == 1 else None)  # fmt: skip
            axes.axvline(dates[T - 1], color="black", linewidth=0.7, linestyle=":")
            dress(axes, dated=True, labelled=row == len(shown) - 1)
            if row == 0:
                axes.set_title(f"forecast from {day_of(dates[T])}", fontsize=10)
        _label(grid[row][0], columns[channel], f"column {channel + 1}")
    figure.align_ylabels(grid[:, 0])
    figure.suptitle(_title(f"Test windows, first, middle and last by date (1 row: {step}; units of the file)", note))
    _legend(figure, grid[0][0])


def _title(words: str, note: str) -> str:
    return f"{words}\n{note}" if note else words


def _future(figure: Figure, panels: list[Panel], step: str, note: str = "") -> None:
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    apart = any(panel.dates[0] != panels[0].dates[0] for panel in panels)  # series that end on different dates
    for axes, panel in zip(grid, panels, strict=True):
        known, values = panel.history
        if len(known):
            axes.plot(known, values, color=HISTORY, label="history")
            axes.axvline(known[-1], color="black", linewidth=0.7, linestyle=":")
        _shade(axes, (known[-1:], values[-1:]), panel.dates, panel.bands, panel.calibrated)
        dates, joined = known[-1:].append(panel.dates), np.append(values[-1:], panel.values)
        axes.plot(dates, joined, color=FORECAST, label="forecast", marker="o" if len(joined) < 4 else None)
        _label(axes, panel.name, panel.otherwise)
        dress(axes, dated=True, labelled=apart or axes is grid[-1])
    figure.align_ylabels(grid)
    first = panels[0].dates
    rows = f"{len(first)} row{'s' if len(first) > 1 else ''}"
    start = "" if apart else f" from {day_of(first[0])}"
    figure.suptitle(_title(f"{rows} ahead{start} (1 row: {step}; units of the file)", note))
    _legend(figure, grid[0])


def _shade(
    axes: Axes, last: tuple[pd.DatetimeIndex, np.ndarray], dates: pd.DatetimeIndex, bands: Bands, calibrated: int
) -> None:
    """Shade bands, the widest first and lightest; those that are only widened are lighter still, behind a dotted line.

    Args:
        last: date and value `[1]` of the last known row, from which the bands open; or none.
    """
    if not bands:
        return
    start = len(last[0])
    days = last[0].append(dates)
    ordered = sorted(bands, key=lambda band: -band[0])
    for (level, low, high), alpha in zip(
        ordered, np.linspace(*SHADES, len(ordered)) if bands[1:] else SHADES[1:], strict=True
    ):
        low, high = (np.append(last[1], end) for end in (low, high))
        end = start + calibrated
        axes.fill_between(
            days[:end], low[:end], high[:end], color=FORECAST, alpha=alpha, linewidth=0, label=f"{name_of(level)} %"
        )
        axes.fill_between(days[end - 1 :], low[end - 1 :], high[end - 1 :], color=FORECAST, alpha=alpha / 2, linewidth=0)
    if calibrated < len(dates):
        label = "bands calibrated up to here"
        axes.axvline(mdates.date2num(dates[calibrated - 1]), color=FORECAST, linewidth=1, linestyle=":", label=label)


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


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _save(folder: Path, name: str, paint: Callable[[Figure], None], width: float, panels: int) -> Path:
    """Paint a figure of `panels` rows and write it to `folder`/plots."""
    path = folder / PLOTS / f"{name}.png"
    _figure(paint, width, panels, path)
    return path


def _figure(paint: Callable[[Figure], None], width: float, panels: int, path: Path | None) -> Figure:
    """Paint a figure of `panels` rows, and write it to `path` where one is given."""
    with rc_context({"font.family": fonts(), "axes.unicode_minus": False}):
        figure = Figure(figsize=(width, 1.3 + 1.55 * panels), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        paint(figure)
        if path is not None:
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=100))
    return figure


def fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK if name in installed)]


def _pages(places: list[int]) -> list[list[int]]:
    """Channel numbers, page by page, evenly spread."""
    count = -(-len(places) // PANELS)
    return [part.tolist() for part in np.array_split(places, count)]


def _name(kind: str, page: int, pages: int) -> str:
    return kind if pages == 1 else f"{kind}_{page + 1}"


def _label(axes: Axes, name: str, otherwise: str = "column") -> None:
    """A column's name beside its panel: no mathematics, not longer than the panel is high.

    A name that no installed font can draw becomes the words `otherwise`.
    """
    if not set(map(ord, name)) <= glyphs():
        name = otherwise
    short = name if len(name) <= 20 else name[:19] + "…"
    axes.set_ylabel(short.replace("$", r"\$"), fontsize=10 if len(short) <= 12 else 8)


@cache
def glyphs() -> frozenset[int]:
    """The characters that the fonts in use can draw."""
    paths = [font_manager.findfont(name) for name in fonts()]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def day_of(date: pd.Timestamp) -> str:
    return f"{date:%Y-%m-%d}" if date == date.normalize() else f"{date:%Y-%m-%d %H:%M}"
