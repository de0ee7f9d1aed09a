"""A look inside a trained TimeLLM: which text prototypes its patches attend to, which words those are near, and whether
its forecasts depend on the prompt.

    python scripts/explain.py checkpoints/<run name> --window 2018-01-31 --channel OT

It leaves explain.png and explain.json in the run's folder and changes nothing else there. Flags of run_main.py
(--device cpu, --data ETTh1 --root_path DIR, ...) may follow; those left out are what they were in the run's training.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from data_provider.description import PROMPT_BANK  # noqa: E402
from layers.errors import input_error  # noqa: E402
from layers.reprogramming import ReprogrammingLayer  # noqa: E402
from models.TimeLLM import Model  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.results.interpret import attention, nearest_words, read_windows, try_prompts  # noqa: E402
from utils.results.plots import FORECAST, HISTORY, TRUTH, dress, fonts, glyphs  # noqa: E402
from utils.saving.files import write_atomic, write_json  # noqa: E402
from utils.saving.folder import results_folder  # noqa: E402
from utils.saving.interrupt import Interrupts  # noqa: E402
from utils.setup import load_checkpoint, setup  # noqa: E402
from utils.training.context import Context  # noqa: E402

SHOWN = 12  # prototypes in a heat map
ARGUMENTS = {
    "run": dict(type=Path, help="the run's folder, which run_main.py prints at its end"),
    "--window": dict(metavar="DATE", help="test window whose forecast begins then (default: the middle one)"),
    "--channel": dict(metavar="NAME", help="column to look at (default: the target)"),
    "--windows": dict(type=int, default=64, metavar="N", help="windows to try the prompt on (default: 64)"),
    "--description": dict(metavar="TEXT", help="another data set's, to try (default: one of the prompt bank)"),
    "--out": dict(type=Path, metavar="DIR", help="folder for explain.png and .json (default: the run's)"),
}
# For a run whose own description is the only one in the prompt bank.
OTHER = (
    "The Weather data hold 21 meteorological readings of a station in Germany, taken every 10 minutes over one year: air "
    "temperature, pressure, humidity, rain, wind and radiation."
)


def main(argv: list[str]) -> int:
    parser = script_parser("explain.py", str(__doc__).split("\n\n")[0], ARGUMENTS,
                           epilog="All other flags, after these, are those of run_main.py.")  # fmt: skip
    args, others = parser.parse_known_args(argv)
    flags = parse_flags([*others, "--is_training", "0", "--checkpoint", str(args.run)], parser.prog)

    def work() -> None:
        if flags.model != "TimeLLM" or flags.data == "m4" or flags.do_predict:
            got = f"{flags.model} on {flags.data}" + " with --do_predict" * bool(flags.do_predict)
            expected = "a run of TimeLLM on a file of rows with dates, to look at its test windows"
            raise input_error(args.run, got, expected)
        if args.windows < 2:
            raise input_error("--windows", args.windows, "a whole number of at least 2")
        with tempfile.TemporaryDirectory() as elsewhere:  # a test leaves its log in a folder: not in the run's
            flags.checkpoints = elsewhere
            context = setup(flags, 0, Interrupts())
            checkpoint = load_checkpoint(context)
        explain(args, context, args.out or results_folder(context.args, checkpoint.file.parent, checkpoint, context.series))

    return exit_code(parser.prog, work)


def explain(args: Namespace, context: Context, folder: Path) -> None:
    """Print what there is to see in a run, and write explain.png and explain.json into a folder.

    Raises:
        InputError: no such window or channel.
        StorageError: a file cannot be written.
    """
    model, series = cast(Model, context.model), context.windows
    data, columns, T = series.windows("test"), series.forecast_columns, series.seq_len
    starts, number = data.dates[T : T + len(data)], (len(data) - 1) // 2
    if args.window is not None:  # the window whose forecast begins at this date, or last before it
        try:
            at = pd.Timestamp(args.window)
            inside = starts[0] <= at <= starts[-1]  # False of a NaT; a TypeError where the one has a time zone
        except (ValueError, TypeError):
            inside = False
        if not inside:
            expected = f"a date from {starts[0]} to {starts[-1]}, at which test forecasts begin"
            raise input_error("--window", args.window, expected)
        number = int(starts.searchsorted(at, side="right")) - 1
    name = args.channel or (series.target if series.target in columns else columns[-1])
    if name not in columns:
        raise input_error("--channel", repr(name), f"one that is forecast: {', '.join(columns)}")
    channel, dates = columns.index(name), data.dates[number : number + T + series.pred_len]
    print(f"Window: {dates[0]} to {dates[T - 1]}, forecast from {dates[T]}; channel: {name}")
    if args.window is not None and pd.Timestamp(args.window) != dates[T]:
        print(f"(the last test window whose forecast begins at {args.window} or before)")
    found: dict[str, Any] = {
        "window": {"number": number, "first_row": str(dates[0]), "first_forecast_row": str(dates[T])},
        "channel": name,
    }
    folder.mkdir(parents=True, exist_ok=True)

    if isinstance(model.reprogramming_layer, ReprogrammingLayer):
        batch = read_windows(context, [number], model.prompts)
        with torch.inference_mode():
            pred = model.eval()(batch)
        weights = attention(model, batch.x[channel : channel + 1])  # (h, L, K)
        K, entropy = weights.shape[-1], torch.special.entr(weights).sum(-1)  # (h, L)
        head = int(entropy.mean(1).argmin())  # it chooses most
        maps = {"mean of the heads": weights.mean(0), f"strongest head ({head + 1} of {len(weights)})": weights[head]}
        found["attention"] = {"prototypes": K, "effective": entropy.exp().mean().item()}
        print(f"\nAttention of {weights.shape[1]} patches over {K} text prototypes: each is spread as over "
              f"{entropy.exp().mean():.0f} of them (strongest head: {entropy[head].exp().mean():.0f})")  # fmt: skip
        panels = []
        for title, weight in maps.items():
            chosen = weight.mean(0).topk(SHOWN).indices.tolist()
            words, mixtures = nearest_words(model, chosen)
            near = [", ".join(f"{word!r} {cosine:.2f}" for word, cosine in row) for row in words]
            shares = (weight.mean(0)[chosen] * K).tolist()
            table = pd.DataFrame({"prototype": chosen, "times an equal share": shares, "nearest words, cosine": near})
            print(f"\nUsed most, {title}\n{table.to_string(index=False, float_format='{:.2f}'.format)}")
            found["attention"][title] = table.assign(words=words).drop(columns="nearest words, cosine").to_dict("records")
            names = [f"{ascii(row[0][0])} {prototype}" for prototype, row in zip(chosen, words, strict=True)]
            panels.append((title, weight[:, chosen] * K, names))
        print(f"(a random mixture of all words has its nearest word at a cosine of {mixtures:.2f})")
        found["attention"]["nearest_cosine_of_random_mixtures"] = mixtures
        lines = [series.to_own_units(values.t().cpu().numpy())[:, channel] for values in (batch.x, batch.y, pred.float())]
        with rc_context({"font.family": fonts(), "axes.unicode_minus": False}):
            figure = paint(name, dates, lines, panels, context.args.patch_len, context.args.stride)
            write_atomic(folder / "explain.png", lambda path: figure.savefig(path, format="png", dpi=100))
        print(f"Picture saved at: {folder / 'explain.png'}")
    else:
        print("No attention to show: this run has no text prototypes (--use_reprogramming 0).")

    windows = np.unique(np.linspace(0, len(data) - 1, min(args.windows, len(data))).round().astype(int)).tolist()
    if model.prompts is None:
        print("No prompt to try out: this run has none (--use_prompt 0, or --llm_ablation).")
    elif len(windows) > 1:
        own = model.prompts.template.description
        bank = [" ".join(file.read_text(encoding="utf-8").split()) for file in sorted(PROMPT_BANK.glob("*.txt"))]
        # A description that did not fit was cut at its end.
        other = args.description or next((text for text in bank if not text.startswith(own)), OTHER)
        trials = try_prompts(context, windows, other)
        found["prompt"] = {"windows": len(windows), "description": own, "other_description": other}
        found["prompt"]["trials"] = trials.astype(object).where(trials.notna(), None).to_dict("records")
        percent = "{:+.2%}".format
        print(f"\nForecasts of {len(windows)} test windows, {len(columns)} channels, with another prompt")
        shown = trials.set_axis(["changed", "forecast moves by", "MSE", "MSE changes by"], axis=1)
        formats = {"forecast moves by": "{:.2%}".format, "MSE": "{:.5f}".format, "MSE changes by": percent}
        print(shown.to_string(index=False, formatters=formats, justify="right"))
        print("(the move: root mean square, over the forecasts' own deviation along the horizon)")
    write_json(folder / "explain.json", found)
    print(f"Figures saved at: {folder / 'explain.json'}")


def paint(
    name: str, dates: pd.DatetimeIndex, lines: list[np.ndarray], panels: list[tuple], patch: int, stride: int
) -> Figure:
    """The series above; below it once more, downwards beside what its patches attend to.

    Args:
        lines: history `[T]`, truth and forecast `[H]` in own units.
        panels: title, attention `[L, columns]` as multiples of an equal share, names of the columns.
    """
    (history, *ahead), T = lines, len(lines[0])
    figure = Figure(figsize=(15, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2.4])
    axes = above.subplots()
    axes.plot(dates[:T], history, color=HISTORY, label="history")
    for label, values, colour in zip(("truth", "forecast"), ahead, (TRUTH, FORECAST), strict=True):
        axes.plot(dates[T - 1 :], np.append(history[-1:], values), color=colour, label=label)
    axes.legend(loc="upper left", ncols=3, frameon=False)
    axes.set_ylabel((name if glyphs().issuperset(map(ord, name)) else ascii(name))[:30], parse_math=False)
    axes.set_title(f"Forecast from {dates[T]}, and what its patches attend to (units of the file)")
    dress(axes, dated=True)
    left, *maps = below.subplots(1, 1 + len(panels), sharey=True, width_ratios=[0.35] + [1] * len(panels))
    # Row of the series at which a patch has its middle; the last patch ends after the series does.
    edges = np.arange(len(panels[0][1]) + 1) * stride + (patch - 1 - stride) / 2
    left.plot(history, np.arange(T), color=HISTORY)
    left.set_ylim(edges[-1], min(edges[0], 0))  # time runs downwards
    ticks = np.linspace(0, T - 1, 8).round().astype(int)
    left.set_yticks(ticks, [f"{dates[row]:%Y-%m-%d %H:%M}" for row in ticks], fontsize=8)
    left.set_title("the series, downwards", fontsize=10)
    left.xaxis.set_major_locator(MaxNLocator(3))
    dress(left)
    for panel, (title, shares, names) in zip(maps, panels, strict=True):
        mesh = panel.pcolormesh(np.arange(len(names) + 1), edges, shares.numpy(), cmap="viridis", vmin=0)
        panel.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right", fontsize=9, parse_math=False)
        panel.set_title(title, fontsize=10)
        below.colorbar(mesh, ax=panel, shrink=0.8, pad=0.01, label="attention, times an equal share")
    below.supxlabel("text prototypes used most: the nearest word of the vocabulary, and the prototype's number", fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
