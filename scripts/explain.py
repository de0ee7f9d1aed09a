"""A look inside a trained TimeLLM: which text prototypes its patches attend to, which words those are near, and whether
its forecasts depend on the prompt.

    python scripts/explain.py checkpoints/<run name> --window 2018-01-31 --channel OT

It leaves explain.png in the run's folder and changes nothing else there. Flags of run_main.py
(--device cpu, --data ETTh1 --root_path DIR, ...) may follow; those left out are what they were in the run's training.

Shapes: B windows, N forecast channels, M = B*N sequences, T = seq_len, H = pred_len, L patches, h heads, K text prototypes,
V words of the tokenizer, D the language model's width.
"""

import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from data_provider.batches import Batch, WindowCollate  # noqa: E402
from data_provider.description import PROMPT_BANK  # noqa: E402
from layers.errors import input_error  # noqa: E402
from layers.norm import instance_norm  # noqa: E402
from layers.prompt import PromptEncoder, Prompts  # noqa: E402
from layers.reprogramming import ReprogrammingLayer, attend  # noqa: E402
from models.TimeLLM import Model  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.results.log import Progress  # noqa: E402
from utils.results.plots import HISTORY, drawing, dress  # noqa: E402
from utils.saving.folder import results_folder  # noqa: E402
from utils.saving.interrupt import Interrupts  # noqa: E402
from utils.setup import load_checkpoint, setup  # noqa: E402
from utils.training.context import Context  # noqa: E402
from utils.training.evaluate import forecast_within_memory  # noqa: E402

SHOWN = 12  # prototypes in a heat map
NEAREST = 5  # words of a prototype
BLOCK = 2**13  # words at once
SEQUENCES = 64  # run at once at most
ARGUMENTS = {
    "run": dict(type=Path, help="the run's folder, which run_main.py prints at its end"),
    "--window": dict(metavar="DATE", help="test window whose forecast begins then (default: the middle one)"),
    "--channel": dict(metavar="NAME", help="column to look at (default: the target)"),
    "--windows": dict(type=int, default=64, metavar="N", help="windows to try the prompt on (default: 64)"),
    "--description": dict(metavar="TEXT", help="another data set's, to try (default: one of the prompt bank)"),
    "--out": dict(type=Path, metavar="DIR", help="folder for explain.png (default: the run's)"),
}


def main(argv: list[str]) -> int:
    parser = script_parser("explain.py", str(__doc__).split("\n\n")[0], ARGUMENTS,
                           epilog="All other flags, after these, are those of run_main.py.")  # fmt: skip
    args, others = parser.parse_known_args(argv)
    flags = parse_flags([*others, "--is_training", "0", "--checkpoint", str(args.run)], parser.prog)

    def work() -> None:
        if flags.model != "TimeLLM" or flags.data == "m4" or flags.do_predict:
            raise input_error(
                args.run,
                f"{flags.model} on {flags.data}" + " with --do_predict" * bool(flags.do_predict),
                "a run of TimeLLM on a file of rows with dates, to look at its test windows",
            )
        if args.windows < 2:
            raise input_error("--windows", args.windows, "a whole number of at least 2")
        with tempfile.TemporaryDirectory() as elsewhere:  # a test leaves its log in a folder: not in the run's
            flags.checkpoints = elsewhere
            context = setup(flags, 0, Interrupts())
            checkpoint = load_checkpoint(context)
        explain(
            args,
            context,
            args.out
            or results_folder(context.args, checkpoint.file.parent, checkpoint, context.series, context.accelerator),
        )

    return exit_code(parser.prog, work)


def explain(args: Namespace, context: Context, folder: Path) -> None:
    """Print what there is to see in a run, and draw explain.png into a folder.

    Raises:
        InputError: no such window or channel.
        StorageError: a file cannot be written.
    """
    model, series = cast(Model, context.model), context.windows
    data, columns, T = series.windows("test"), series.forecast_columns, series.seq_len
    starts, number = data.dates[T : T + len(data)], (len(data) - 1) // 2
    if args.window is not None:  # the window whose forecast begins at this date, or last before it
        at = pd.to_datetime(args.window, errors="coerce")
        if at.tz != starts.tz or not starts[0] <= at <= starts[-1]:  # NaT is in no range
            raise input_error(
                "--window", args.window, f"a date from {starts[0]} to {starts[-1]}, at which test forecasts begin"
            )
        number = int(starts.searchsorted(at, side="right")) - 1
    name = args.channel or (series.target if series.target in columns else columns[-1])
    if name not in columns:
        raise input_error("--channel", repr(name), f"one that is forecast: {', '.join(columns)}")
    channel, dates = columns.index(name), data.dates[number : number + T + series.pred_len]
    print(f"Window: {dates[0]} to {dates[T - 1]}, forecast from {dates[T]}; channel: {name}")

    if isinstance(model.reprogramming_layer, ReprogrammingLayer):
        batch = read_windows(context, [number], model.prompts)
        weights = attention(model, batch.x[channel : channel + 1])  # (h, L, K)
        K, entropy = weights.shape[-1], torch.special.entr(weights).sum(-1)  # (h, L)
        head = int(entropy.mean(1).argmin())  # it chooses most
        maps = {"mean of the heads": weights.mean(0), f"strongest head ({head + 1} of {len(weights)})": weights[head]}
        print(f"\nAttention of {weights.shape[1]} patches over {K} text prototypes: each is spread as over "
              f"{entropy.exp().mean():.0f} of them (strongest head: {entropy[head].exp().mean():.0f})")  # fmt: skip
        panels = []
        for title, weight in maps.items():
            chosen = weight.mean(0).topk(SHOWN).indices.tolist()
            words = nearest_words(model, chosen)
            table = pd.DataFrame(
                {
                    "prototype": chosen,
                    "times an equal share": (weight.mean(0)[chosen] * K).tolist(),
                    "nearest words, cosine": [", ".join(f"{word!r} {cosine:.2f}" for word, cosine in row) for row in words],
                }
            )
            print(f"\nUsed most, {title}\n{table.to_string(index=False, float_format='{:.2f}'.format)}")
            names = [f"{ascii(row[0][0])} {prototype}" for prototype, row in zip(chosen, words, strict=True)]
            panels.append((title, weight[:, chosen] * K, names))
        history = pd.Series(series.to_own_units(batch.x.t().cpu().numpy())[:, channel], dates[:T])
        with drawing(folder / "explain.png", 15, 4) as figure:
            draw(figure, name, history, panels, context.args.patch_len, context.args.stride)
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
        other = args.description or next(text for text in bank if not text.startswith(own))
        trials = try_prompts(context, windows, other)
        print(f"\nForecasts of {len(windows)} test windows, {len(columns)} channels, with another prompt")
        shown = trials.set_axis(["changed", "forecast moves by", "MSE", "MSE changes by"], axis=1)
        formats = {"forecast moves by": "{:.2%}".format, "MSE": "{:.5f}".format, "MSE changes by": "{:+.2%}".format}
        print(shown.to_string(index=False, formatters=formats, justify="right"))
        print("(the move: root mean square, over the forecasts' own deviation along the horizon)")


def draw(figure: Figure, name: str, history: pd.Series, maps: list[tuple], patch: int, stride: int) -> None:
    """A window's series, downwards, beside what its patches attend to.

    Args:
        maps: title, attention `[L, columns]` as multiples of an equal share, names of the columns.
    """
    T = len(history)
    left, *places = figure.subplots(1, 1 + len(maps), sharey=True, width_ratios=[0.35] + [1] * len(maps))
    # Row of the series at which a patch has its middle; the last patch ends after the series does.
    edges = np.arange(len(maps[0][1]) + 1) * stride + (patch - 1 - stride) / 2
    left.plot(history, np.arange(T), color=HISTORY)
    left.set_ylim(edges[-1], min(edges[0], 0))  # time runs downwards
    ticks = np.linspace(0, T - 1, 8).round().astype(int)
    left.set_yticks(ticks, [f"{history.index[row]:%Y-%m-%d %H:%M}" for row in ticks], fontsize=8)
    left.set_title(name, fontsize=10, parse_math=False)
    dress(left)
    for axes, (title, shares, names) in zip(places, maps, strict=True):
        mesh = axes.pcolormesh(np.arange(len(names) + 1), edges, shares.numpy(), cmap="viridis")
        axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right", fontsize=9, parse_math=False)
        axes.set_title(title, fontsize=10)
        figure.colorbar(mesh, ax=axes, shrink=0.8, pad=0.01, label="attention, times an equal share")
    figure.supxlabel("text prototypes used most: the nearest word of the vocabulary, and the prototype's number", fontsize=9)


def read_windows(context: Context, windows: list[int], encoder: PromptEncoder | None) -> Batch:
    """Test windows on the run's device, with the prompts that `encoder` writes."""
    data, series = context.windows.windows("test"), context.windows
    collate = WindowCollate(series.pred_len, series.target_index, encoder)
    return collate([data[number] for number in windows]).to(context.device)


@torch.inference_mode()
def attention(model: Model, x: torch.Tensor) -> torch.Tensor:
    """The weights `[h, L, K]` with which the patches of one series `[1, T]` attend to the text prototypes (sum 1 over K)."""
    layer = cast(ReprogrammingLayer, model.eval().reprogramming_layer)
    keys, _ = model.prototype_kv()  # (1, h, K, f)
    queries = layer.query_projection(model.patch_embedding(instance_norm(x)[0])[0])  # (L, h*f)
    queries = queries.view(len(queries), layer.n_heads, -1).transpose(0, 1)  # (h, L, f)
    # Values of which each is one prototype alone: what is mixed of them are the weights.
    return attend(queries[None], keys, torch.eye(keys.shape[2]).to(keys), 0.0)[0].float().cpu()


@torch.inference_mode()
def nearest_words(model: Model, prototypes: list[int]) -> list[list[tuple[str, float]]]:
    """The `NEAREST` words of some prototypes, by cosine.

    Both are centred. What all prototypes share adds the same to every score of a patch, and softmax takes it out again;
    what all words share would make every word near to every other.
    """
    tokenizer, held = model.backbone.tokenizer, model.text_prototypes().float()  # (K, D)
    words = model.backbone.embeddings[: len(tokenizer)]  # rows without a word are left out
    mean = words.mean(0, dtype=torch.float32).to(held.device)
    asked = F.normalize(held[prototypes] - held.mean(0), dim=1)
    # In blocks: a float32 copy of all embeddings may be larger than the free memory.
    blocks = (block.to(held.device, torch.float32) - mean for block in words.split(BLOCK))
    found = torch.cat([asked @ F.normalize(block, dim=1).t() for block in blocks], dim=1).topk(NEAREST, dim=1)
    return [
        [(readable(tokenizer, word), cosine) for word, cosine in zip(*row, strict=True)]
        for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def readable(tokenizer: Any, word: int) -> str:
    """A token as text with its space in front; one that is a part of a character as the tokenizer writes it."""
    text = tokenizer.decode([word], clean_up_tokenization_spaces=False)
    return str(tokenizer.convert_ids_to_tokens(word)) if "\ufffd" in text else text


@torch.inference_mode()
def try_prompts(context: Context, windows: list[int], description: str) -> pd.DataFrame:
    """Forecasts of two or more test windows with their prompts, and with others.

    Args:
        description: another data set's.

    Returns:
        A row for what was changed: "moves" is the root mean square change of the forecasts over their standard deviation
        along the horizon (NaN where that is 0, as with one row ahead), "mse" against the truth, standardised,
        "mse_change" relative to that of the prompts as they are.
    """
    model, B = cast(Model, context.model.eval()), len(windows)
    ours = cast(PromptEncoder, model.prompts)
    # At most as long as the run's own, so that it fits where that did.
    other = PromptEncoder(ours.tokenizer, replace(ours.template, description=description), ours.longest)
    batch, shared = read_windows(context, windows, ours), model.prototype_kv()

    def forecast(encoder: PromptEncoder | None, prompts: Prompts | None, batch: Batch = batch) -> torch.Tensor:
        model.prompts = encoder  # its opening is every prompt's
        try:
            parts = Progress(replace(batch, prompts=prompts).split(SEQUENCES), desc="parts of a forecast")
            return torch.cat([forecast_within_memory(context, part, shared) for part in parts]).double()
        finally:
            model.prompts = ours

    # A cycle through the windows in random order: none keeps its own statistics.
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    another = torch.empty_like(order).scatter_(0, order, order.roll(1))
    rows = torch.arange(len(batch)).view(B, -1)[another].flatten()  # (B*N,)
    exchanged = Prompts(*(held[rows] for held in cast(Prompts, batch.prompts)))
    backwards = batch.mapped(lambda rows: rows.flip(0))
    forecasts = {
        "as it is": forecast(ours, batch.prompts),
        "nothing (rounding)": forecast(ours, backwards.prompts, backwards).flip(0),
        "prompt left out": forecast(None, None),
        "statistics of another window each": forecast(ours, exchanged),
        "another data set's description": forecast(other, read_windows(context, windows, other).prompts),
    }
    before = forecasts["as it is"]
    std = before.var(1, correction=0).mean().sqrt()
    table = pd.DataFrame(
        [
            {"changed": name, "moves": ((then - before).square().mean().sqrt() / std).item(),
             "mse": (then - batch.y).square().mean().item()}
            for name, then in forecasts.items()
        ]
    )  # fmt: skip
    return table.assign(mse_change=table["mse"] / table["mse"][0] - 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
