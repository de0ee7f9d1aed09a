"""A look inside a trained TimeLLM: which text prototypes its patches attend to, which words those are near, and whether
its forecasts depend on the prompt.

    python scripts/explain.py checkpoints/<run name> --window 2018-01-31 --channel OT

It leaves explain.png and explain.json in the run's folder and changes nothing else there. Flags of run_main.py
(--device cpu, --data ETTh1 --root_path DIR, ...) may follow; those left out are what they were in the run's training.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import dates as mdates
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from data_provider.data_factory import series_from_args  # noqa: E402
from data_provider.data_loader import SplitSeries  # noqa: E402
from data_provider.description import PROMPT_BANK  # noqa: E402
from data_provider.patterns import M4  # noqa: E402
from layers.errors import InputError, input_error  # noqa: E402
from layers.prompt import PromptEncoder  # noqa: E402
from models.TimeLLM import Model  # noqa: E402
from utils.command_line import FlagParser, parse_flags  # noqa: E402
from utils.errors import RunError  # noqa: E402
from utils.results import inside  # noqa: E402
from utils.results.plots import FORECAST, HISTORY, TRUTH, day_of, dress, fonts, glyphs  # noqa: E402
from utils.results.test_pass import Window  # noqa: E402
from utils.run import load_checkpoint  # noqa: E402
from utils.saving.files import write_atomic, write_json, writing  # noqa: E402
from utils.saving.folder import results_folder  # noqa: E402
from utils.saving.interrupt import Interrupts  # noqa: E402
from utils.setup import setup  # noqa: E402
from utils.training.session import Job  # noqa: E402

SHOWN = 12  # prototypes in a heat map
# For a run whose own description is the only one in the prompt bank.
OTHER = (
    "The Weather data hold 21 meteorological readings of a station in Germany, taken every 10 minutes over one year: air "
    "temperature, pressure, humidity, rain, wind and radiation."
)


def main(argv: list[str]) -> int:
    """Explain the run; return the exit code."""
    parser = FlagParser(prog="explain.py", description=str(__doc__).split("\n\n")[0], allow_abbrev=False,
                        epilog="All other flags, after these, are those of run_main.py.")  # fmt: skip
    parser.add_argument("run", type=Path, help="the run's folder, which run_main.py prints at its end")
    parser.add_argument("--window", metavar="DATE", help="test window whose forecast begins then (default: the middle one)")
    parser.add_argument("--channel", metavar="NAME", help="column to look at (default: the target)")
    parser.add_argument(
        "--windows",
        type=int,
        default=64,
        metavar="N",
        help=f"windows to try the prompt on (default: 64; fewer than {inside.ENOUGH} speak for themselves alone)",
    )
    parser.add_argument("--description", metavar="TEXT", help="another data set's, to try (default: one of the prompt bank)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for explain.png and .json (default: the run's)")
    args, others = parser.parse_known_args(argv)
    flags = parse_flags([*others, "--is_training", "0", "--checkpoint", str(args.run)], parser.prog)
    try:
        explain(args, flags)
    except (InputError, RunError) as error:
        print(f"explain.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def explain(args: argparse.Namespace, flags: argparse.Namespace) -> None:
    """Look into a run, print what there is to see, and write explain.png and explain.json.

    Args:
        args: of this script; flags: of the run.

    Raises:
        InputError: something that the user can mend; raised before any weight is loaded.
        RunError: no memory for the model, or a file cannot be written.
    """
    if flags.model != "TimeLLM":
        raise input_error("--model", f"{flags.model}, which has neither prototypes nor prompt", "a run of TimeLLM")
    if flags.data == M4:
        raise input_error("--data", f"{M4}, whose series have no dates to choose a window by", "a data set of one file")
    if flags.do_predict:
        raise input_error("--do_predict", "it", "none, for test windows are looked at")
    if args.windows < 2:
        raise input_error("--windows", args.windows, "a whole number of at least 2")
    series = series_from_args(flags)
    number, channel = find_window(series, args.window), find_channel(series, args.channel)
    windows = inside.spread(series, args.windows)
    with tempfile.TemporaryDirectory() as elsewhere:  # a test leaves its log in a folder: not in the run's
        flags.checkpoints = elsewhere
        job = setup(flags, 0, Interrupts())
        checkpoint = load_checkpoint(job)
    folder = args.out or results_folder(job.args, checkpoint.file.parent, checkpoint, job.series)

    window = shown_window(job, number)
    begin, T = window.dates[-len(window.true)], len(window.history)
    name = job.windows.forecast_columns[channel]
    print(f"Window: {window.dates[0]} to {window.dates[T - 1]}, forecast from {begin}; channel: {name}")
    if args.window is not None and pd.Timestamp(args.window) != begin:
        print(f"(the last test window whose forecast begins at {args.window} or before)")
    found: dict[str, Any] = {
        "checkpoint": str(checkpoint.file),
        "data": series.path.name,
        "window": {"number": number, "first_row": str(window.dates[0]), "first_forecast_row": str(begin)},
        "channel": name,
    }
    found["attention"], draw = look_at_attention(job, window, number, channel)
    found["prompt"] = look_at_prompt(job, windows, args.description)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if draw is not None:
        with rc_context({"font.family": fonts(), "axes.unicode_minus": False}):
            figure = draw(Figure(figsize=(15, 11), layout="constrained"))
            write_atomic(folder / "explain.png", lambda path: figure.savefig(path, format="png", dpi=100))
        print(f"Picture saved at: {folder / 'explain.png'}")
    write_json(folder / "explain.json", found)
    print(f"Figures saved at: {folder / 'explain.json'}")


def find_window(series: SplitSeries, date: str | None) -> int:
    """The number of the test window whose forecast begins at `date`, or last before it; None: the middle one.

    Raises:
        InputError: no date, or none within the test split.
    """
    data = series.windows("test")
    starts = data.dates[series.seq_len : series.seq_len + len(data)]
    if date is None:
        return (len(data) - 1) // 2
    try:
        at = pd.Timestamp(date)
        inside = starts[0] <= at <= starts[-1]  # False of a NaT; a TypeError where the one has a time zone
    except (ValueError, TypeError) as error:
        raise input_error("--window", repr(date), f"a date such as {starts[0]}") from error
    if not inside:
        raise input_error("--window", date, f"a date from {starts[0]} to {starts[-1]}, at which test forecasts begin")
    return int(starts.searchsorted(at, side="right")) - 1


def find_channel(series: SplitSeries, name: str | None) -> int:
    """The place of a channel among those that are forecast; None: the target's, else the last.

    Raises:
        InputError: it is not among them.
    """
    columns = series.forecast_columns
    if name is None:
        return columns.index(series.target) if series.target in columns else len(columns) - 1
    if name not in columns:
        raise input_error("--channel", repr(name), f"one that is forecast: {', '.join(columns)}")
    return columns.index(name)


def shown_window(job: Job, number: int) -> Window:
    """A test window with its forecast, in own units."""
    series, data = job.windows, job.windows.windows("test")
    sequences = inside.read_windows(job, [number], job.model.prompts)
    rows = (sequences.x, sequences.y, inside.forecast(job, sequences))
    history, true, pred = (series.to_own_units(values.t().cpu().numpy()) for values in rows)  # (rows, N)
    return Window(data.dates[number : number + len(history) + len(true)], history, true, pred)


def look_at_attention(job: Job, window: Window, number: int, channel: int) -> tuple[dict[str, Any] | str, Any]:
    """Print the prototypes used most and the words near to them; for the JSON file, and what paints the picture."""
    model = cast(Model, job.model)
    why = inside.why_no_attention(model)
    if why:
        print(why)
        return why, None
    x = inside.read_windows(job, [number], None).x[channel : channel + 1]  # (1, T)
    weights = inside.attention(model, x).float().cpu()  # (h, L, K)
    figures = inside.spread_of(weights)
    head, K = figures["strongest_head"], figures["prototypes"]
    maps = {"mean of the heads": weights.mean(0), f"strongest head ({head + 1} of {len(weights)})": weights[head]}
    chosen = [inside.most_used(map_, SHOWN) for map_ in maps.values()]
    asked = sorted({prototype for columns in chosen for prototype in columns})
    near = inside.nearest_words(model, asked)
    words = dict(zip(asked, near.words, strict=True))

    print(f"\nAttention of {weights.shape[1]} patches over {K} text prototypes")
    print(
        f"A patch spreads it as over {figures['effective']:.0f} prototypes (strongest head: "
        f"{figures['effective_strongest']:.0f}; no choice at all: {K}); {inside.percent(figures['between_patches'])} of it "
        f"differs from patch to patch"
    )
    for (title, map_), columns in zip(maps.items(), chosen, strict=True):
        print(f"\nUsed most, {title} (times an equal share; nearest words and their cosines)")
        for prototype in columns:
            shown = ", ".join(f"'{word.text}' {word.cosine:.2f}" for word in words[prototype])
            print(f"{prototype:>6} {map_[:, prototype].mean() * K:>7.2f}  {shown}")
    print(
        f"How near is near: the nearest word's cosine is {near.others[0]:.2f} on average ({near.others[1]:.2f} at most) for "
        f"{inside.DRAWN} of the run's prototypes at random, {near.random[0]:.2f} ({near.random[1]:.2f}) for random mixtures "
        f"of all words. Prototypes and words are centred: without that the mean of all words alone has {near.mean:.2f}."
    )
    figures["used_most"] = [
        {
            "of": title,
            "prototypes": [
                {"prototype": p, "share": map_[:, p].mean().item(), "words": [word._asdict() for word in words[p]]}
                for p in columns
            ],
        }
        for (title, map_), columns in zip(maps.items(), chosen, strict=True)
    ]
    figures["nearest_cosine"] = {
        name: dict(zip(("mean", "largest"), pair, strict=True))
        for name, pair in (("random_prototypes", near.others), ("random_mixtures", near.random))
    } | {"mean_of_words_uncentred": near.mean}
    panels = [
        (title, (map_[:, columns] * K).numpy(), [f"'{_drawable(words[p][0].text)}' {p}" for p in columns])
        for (title, map_), columns in zip(maps.items(), chosen, strict=True)
    ]
    return figures, partial(paint, job=job, window=window, channel=channel, panels=panels)


def look_at_prompt(job: Job, windows: list[int], text: str | None) -> dict[str, Any] | str:
    """Print what other prompts do to the forecasts; for the JSON file."""
    why = inside.why_no_trials(job, windows)
    if why:
        print(f"\n{why}")
        return why
    own = cast(PromptEncoder, job.model.prompts).template.description
    text = " ".join((text or other_description(own)).split())
    trials = inside.try_prompts(job, windows, text)
    before, columns = next(iter(trials.values())).mse_before, len(job.windows.forecast_columns)
    print(f"\nForecasts of {len(windows)} test windows, {columns} channel{'s' if columns > 1 else ''}: what changes them")
    width = max(len(trial.name) for trial in trials.values())
    print(f"{'changed':<{width}}  {'forecast moves by':>17}  {'MSE':>9}  {'MSE changes by':>16}")
    print(f"{'as it is':<{width}}  {'':>17}  {before:>9.5f}")
    for trial in trials.values():
        moved = "-" if trial.change is None else inside.percent(trial.change)
        print(f"{trial.name:<{width}}  {moved:>17}  {trial.mse:>9.5f}  {inside.percent(trial.mse_change, True):>16}")
    print("(the forecast's move: root mean square, in its own deviation over the horizon; in training the run saw one")
    print("description alone, so another one, or no prompt, also is what it was not trained for)")
    sentence = inside.conclusion(trials, len(windows))
    print(f"\n{sentence}")
    return {
        "windows": len(windows),
        "mse": before,
        "description": own,
        "other_description": text,
        "trials": {key: asdict(trial) | {"mse_change": trial.mse_change} for key, trial in trials.items()},
        "conclusion": sentence,
    }


def other_description(own: str) -> str:
    """A description of another data set than the run's: the first in the prompt bank, else `OTHER`."""
    files = [file for file in sorted(PROMPT_BANK.glob("*.txt")) if file.stem != M4]  # which describes no one data set
    texts = [" ".join(file.read_text(encoding="utf-8").split()) for file in files]
    # A description that did not fit was cut at its end.
    return next((text for text in texts if not text.startswith(own)), OTHER)


def paint(figure: Figure, job: Job, window: Window, channel: int, panels: list[tuple[str, np.ndarray, list[str]]]) -> Figure:
    """The series above; below it once more, downwards beside what its patches attend to.

    Args:
        panels: title, attention `[L, columns]` as multiples of an equal share, names of the columns.
    """
    args, T = job.args, len(window.history)
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 2.4])
    above, below = (figure.add_subfigure(grid[row]) for row in range(2))
    axes = above.subplots()
    _series(axes, window, channel)
    axes.set_ylabel(_drawable(job.windows.forecast_columns[channel])[:30])
    axes.set_title(f"Forecast from {day_of(window.dates[T])}, and what its patches attend to (units of the file)")
    left, *maps = below.subplots(1, 1 + len(panels), sharey=True, width_ratios=[0.35] + [1] * len(panels))
    # Row of the series at which a patch has its middle; the last patch ends after the series does.
    edges = np.arange(len(panels[0][1]) + 1) * args.stride + (args.patch_len - 1 - args.stride) / 2
    left.plot(window.history[:, channel], np.arange(T), color=HISTORY)
    left.set_ylim(edges[-1], min(edges[0], 0))  # time runs downwards
    ticks = np.linspace(0, T - 1, 8).round().astype(int)
    left.set_yticks(ticks, [day_of(window.dates[row]) for row in ticks], fontsize=8)
    left.set_title("the series, downwards", fontsize=10)
    left.xaxis.set_major_locator(MaxNLocator(3))
    left.tick_params(axis="x", labelsize=8)
    dress(left)
    for panel, (title, shares, names) in zip(maps, panels, strict=True):
        mesh = panel.pcolormesh(np.arange(len(names) + 1), edges, shares, cmap="viridis", vmin=0)
        panel.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
        panel.set_title(title, fontsize=10)
        bar = below.colorbar(mesh, ax=panel, shrink=0.8, pad=0.01)
        bar.set_label("attention, times an equal share", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    below.supxlabel("text prototypes used most: the nearest word of the vocabulary, and the prototype's number", fontsize=9)
    return figure


def _series(axes: Axes, window: Window, channel: int) -> None:
    T, last = len(window.history), window.history[-1:, channel]  # the last row of history joins the lines
    axes.plot(window.dates[:T], window.history[:, channel], color=HISTORY, label="history")
    for label, values, colour in (("truth", window.true, TRUTH), ("forecast", window.pred, FORECAST)):
        axes.plot(window.dates[T - 1 :], np.append(last, values[:, channel]), color=colour, label=label)
    axes.axvline(mdates.date2num(window.dates[T - 1]), color="black", linewidth=0.7, linestyle=":")
    axes.legend(loc="upper left", ncols=3, frameon=False)
    dress(axes, dated=True)


def _drawable(text: str) -> str:
    """No mathematics, and no letter that the installed fonts lack."""
    return "".join(c if ord(c) in glyphs() else c.encode("unicode_escape").decode() for c in text).replace("$", r"\$")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
