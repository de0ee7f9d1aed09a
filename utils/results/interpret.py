"""What a trained TimeLLM attends to, which words its text prototypes are near, and what its prompt does to its forecasts.

Shapes: B windows, N forecast channels, M = B*N sequences, T = seq_len, H = pred_len, L patches, h heads, K text prototypes,
V words of the tokenizer, D the language model's width.
"""

from dataclasses import replace
from typing import Any, cast

import pandas as pd
import torch
from torch.nn import functional as F

from data_provider.batches import Batch, WindowCollate
from layers.norm import instance_norm
from layers.prompt import PromptEncoder, Prompts
from layers.reprogramming import ReprogrammingLayer
from models.TimeLLM import Model
from utils.results.log import Progress
from utils.training.context import Context
from utils.training.evaluate import forecast_within_memory

NEAREST = 5  # words of a prototype
BLOCK = 2**13  # words at once
MIXTURES = 100  # random ones of all words, to compare with
SEQUENCES = 64  # run at once at most
NUDGE = 0.01  # standard deviations of a window by which its last value is moved, for scale


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
    scores = queries @ keys[0].transpose(-2, -1) / queries.shape[-1] ** 0.5
    return scores.softmax(-1).float().cpu()


@torch.inference_mode()
def nearest_words(model: Model, prototypes: list[int]) -> tuple[list[list[tuple[str, float]]], float]:
    """The `NEAREST` words of some prototypes by cosine; and the nearest word's mean cosine of random mixtures of all words,
    which is what a prototype is before any training.

    Both are centred. What all prototypes share adds the same to every score of a patch, and softmax takes it out again;
    what all words share would make every word near to every other.
    """
    tokenizer, held = model.backbone.tokenizer, model.text_prototypes().float()  # (K, D)
    # In blocks: a float32 copy of all embeddings may be larger than the free memory. Rows without a word are left out.
    blocks = model.backbone.embeddings[: len(tokenizer)].split(BLOCK)
    generator = torch.Generator().manual_seed(0)
    total, mixed, drawn = torch.zeros_like(held[0]), held.new_zeros(MIXTURES, held.shape[1]), held.new_zeros(())
    for block in blocks:
        weights = torch.randn(MIXTURES, len(block), generator=generator).to(held.device)
        words = block.to(held.device, torch.float32)  # (BLOCK, D)
        total, mixed, drawn = total + words.sum(0), mixed + weights @ words, drawn + weights.sum(1)[:, None]
    mean = total / len(tokenizer)  # of all words
    asked = F.normalize(torch.cat([held[prototypes] - held.mean(0), mixed - drawn * mean]), dim=1)
    cosines = [asked @ F.normalize(block.to(held.device, torch.float32) - mean, dim=1).t() for block in blocks]
    found = torch.cat(cosines, dim=1).topk(NEAREST, dim=1)  # (n + MIXTURES, NEAREST)
    nearest = [
        [(readable(tokenizer, word), cosine) for word, cosine in zip(*row, strict=True)]
        for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
    return nearest[: len(prototypes)], found.values[len(prototypes) :, 0].mean().item()


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

    def forecast(encoder: PromptEncoder | None, prompts: Prompts | None, x: torch.Tensor = batch.x) -> torch.Tensor:
        model.prompts = encoder  # its opening is every prompt's
        try:
            parts = Progress(replace(batch, x=x, prompts=prompts).split(SEQUENCES), desc="parts of a forecast")
            return torch.cat([forecast_within_memory(context, part, shared) for part in parts]).double()
        finally:
            model.prompts = ours

    def exchanged(rows: torch.Tensor) -> Prompts:
        return Prompts(*(held[rows] for held in cast(Prompts, batch.prompts)))

    # A cycle through the windows in random order: none keeps its own statistics.
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    another = torch.empty_like(order).scatter_(0, order, order.roll(1))
    places = torch.arange(len(batch)).view(B, -1)  # (B, N)
    nudged = batch.x.clone()
    nudged[:, -1] += NUDGE * batch.x.std(1, correction=0)
    forecasts = {
        "as it is": forecast(ours, batch.prompts),
        "nothing (rounding)": forecast(ours, exchanged(places.flatten().flip(0)), batch.x.flip(0)).flip(0),
        "prompt left out": forecast(None, None),
        "statistics of another window each": forecast(ours, exchanged(places[another].flatten())),
        "another data set's description": forecast(other, read_windows(context, windows, other).prompts),
        f"last value moved by {100 * NUDGE:g} % of the deviation": forecast(ours, batch.prompts, nudged),
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
