"""Pictures of a run: PNG files, in the data's own units, readable without the text beside them."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import dates as mdates
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from utils.results.test_pass import TestPass, Window
from utils.saving.files import write_atomic, writing

PLOTS = "plots"  # the folder in the run's folder
PANELS = 7  # channels on a page
HISTORY, TRUTH, FORECAST = "#7f7f7f", "#1f77b4", "#d95f02"
SHOWN_HORIZONS, SHOWN_ROWS = 2, 24  # history in a picture: so many horizons, and at least so many rows
# Column names in Chinese need a font that has them; those that are installed stand behind the usual one.
CJK = ("Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "WenQuanYi Zen Hei")


def draw_test(results: TestPass, metrics: dict) -> None:
    """The pictures of a test pass, in its folder."""
    step = results.series.step_words
    windows = [results.windows[number] for number in sorted(results.windows)]
    draw_windows(results.folder, results.columns, windows, step)
    draw_steps(results.folder, metrics["standardised"], step)


def draw_windows(folder: Path, columns: list[str], windows: list[Window], step: str) -> list[Path]:
    """Forecast against truth with history: a row a channel, a column a window, `PANELS` channels a page."""
    pages = _pages(columns)
    return [
        _save(folder, _name("test_windows", page, len(pages)),
              partial(_windows, columns=columns, shown=shown, windows=windows, step=step), 5.2 * len(windows), len(shown))
        for page, shown in enumerate(pages)
    ]  # fmt: skip


def draw_forecast(
    folder: Path, columns: list[str], history: tuple[pd.DatetimeIndex, np.ndarray],
    future: tuple[pd.DatetimeIndex, np.ndarray], step: str,
) -> list[Path]:  # fmt: skip
    """The forecast of the future behind its history.

    Args:
        history, future: dates `[rows]` and values `[rows, N]` in own units.
    """
    shown = max(SHOWN_HORIZONS * len(future[0]), SHOWN_ROWS)
    history = (history[0][-shown:], history[1][-shown:])
    pages = _pages(columns)
    return [
        _save(folder, _name("forecast", page, len(pages)),
              partial(_future, columns=columns, shown=part, history=history, future=future, step=step), 11, len(part))
        for page, part in enumerate(pages)
    ]  # fmt: skip


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


def draw_losses(folder: Path, history: list[dict]) -> Path:
    """Training, validation and test loss by epoch; the epoch whose weights are kept is marked.

    Args:
        history: a row an epoch with epoch, train_loss, vali_loss, test_loss.
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
        axes.set(title="Loss by epoch", xlabel="epoch", ylabel="MSE, standardised scale")
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        dress(axes)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)

    return _save(folder, "loss_by_epoch", paint, 9, 2)


def _windows(figure: Figure, columns: list[str], shown: list[int], windows: list[Window], step: str) -> None:
    grid = figure.subplots(len(shown), len(windows), squeeze=False)
    for row, channel in enumerate(shown):
        for axes, window in zip(grid[row], windows, strict=True):
            T, H = len(window.history), len(window.true)
            first = max(T - max(SHOWN_HORIZONS * H, SHOWN_ROWS), 0)
            dates = window.dates
            # The last row of history joins the lines.
            last = window.history[-1:, channel]
            axes.plot(dates[first:T], window.history[first:, channel], color=HISTORY, label="history")
            axes.plot(dates[T - 1 :], np.append(last, window.true[:, channel]), color=TRUTH, label="truth")
            axes.plot(dates[T - 1 :], np.append(last, window.pred[:, channel]), color=FORECAST, label="forecast",
                      marker="o" if H == 1 else None)  # fmt: skip
            axes.axvline(dates[T - 1], color="black", linewidth=0.7, linestyle=":")
            dress(axes, dated=True, labelled=row == len(shown) - 1)
            if row == 0:
                axes.set_title(f"forecast from {day_of(dates[T])}", fontsize=10)
        _label(grid[row][0], columns, channel)
    figure.align_ylabels(grid[:, 0])
    figure.suptitle(f"Test windows, first, middle and last by date (1 row: {step}; units of the file)")
    _legend(figure, grid[0][0])


def _future(figure: Figure, columns: list[str], shown: list[int], history: tuple, future: tuple, step: str) -> None:
    grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, channel in zip(grid, shown, strict=True):
        axes.plot(history[0], history[1][:, channel], color=HISTORY, label="history")
        dates, values = history[0][-1:].append(future[0]), np.append(history[1][-1, channel], future[1][:, channel])
        axes.plot(dates, values, color=FORECAST, label="forecast", marker="o" if len(values) < 4 else None)
        axes.axvline(history[0][-1], color="black", linewidth=0.7, linestyle=":")
        _label(axes, columns, channel)
        dress(axes, dated=True, labelled=axes is grid[-1])
    figure.align_ylabels(grid)
    rows = f"{len(future[0])} row{'s' if len(future[0]) > 1 else ''}"
    figure.suptitle(f"{rows} ahead from {day_of(future[0][0])} (1 row: {step}; units of the file)")
    _legend(figure, grid[0])


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
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"font.family": fonts(), "axes.unicode_minus": False}):
        figure = Figure(figsize=(width, 1.3 + 1.55 * panels), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        paint(figure)
        write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=100))
    return path


def fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK if name in installed)]


def _pages(columns: list[str]) -> list[list[int]]:
    """Channel numbers, page by page, evenly spread."""
    count = -(-len(columns) // PANELS)
    return [part.tolist() for part in np.array_split(np.arange(len(columns)), count)]


def _name(kind: str, page: int, pages: int) -> str:
    return kind if pages == 1 else f"{kind}_{page + 1}"


def _label(axes: Axes, columns: list[str], channel: int) -> None:
    """A column's name beside its panel: no mathematics, not longer than the panel is high.

    A name that no installed font can draw becomes the column's number.
    """
    name = columns[channel]
    if not set(map(ord, name)) <= glyphs():
        name = f"column {channel + 1}"
    short = name if len(name) <= 20 else name[:19] + "…"
    axes.set_ylabel(short.replace("$", r"\$"), fontsize=10 if len(short) <= 12 else 8)


@cache
def glyphs() -> frozenset[int]:
    """The characters that the fonts in use can draw."""
    paths = [font_manager.findfont(name) for name in fonts()]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def day_of(date: pd.Timestamp) -> str:
    return f"{date:%Y-%m-%d}" if date == date.normalize() else f"{date:%Y-%m-%d %H:%M}"
