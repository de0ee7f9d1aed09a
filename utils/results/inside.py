"""A look inside a trained TimeLLM: the text prototypes that its patches attend to, the words near to them, and what its
prompt does to its forecasts.

Shapes: B windows, N forecast channels, M = B*N sequences, T = seq_len, H = pred_len, L patches, h heads, K text prototypes,
V words of the tokenizer, D the language model's width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.nn import functional as F

from data_provider.batches import Batch, WindowCollate
from data_provider.data_loader import SplitSeries
from layers.norm import instance_norm
from layers.prompt import PromptEncoder, Prompts, pad_prompts
from layers.reprogramming import ReprogrammingLayer
from models.TimeLLM import Model
from utils.training.evaluate import Shared, forecast_within_memory
from utils.training.session import Job

NEAREST = 5  # words of a prototype
BLOCK = 2**13  # words at once
DRAWN = 100  # prototypes and mixtures of words, for a yardstick
SEQUENCES = 64  # run at once at most
NUDGE = 0.01  # of a window's deviation: what its last value is moved by, for scale
SMALL = 0.01  # a change of less is called none
ENOUGH = 20  # windows, from which on a verdict speaks for the run


class Word(NamedTuple):
    """A word of the vocabulary, and how near to a prototype it is."""

    text: str
    cosine: float


@dataclass(frozen=True)
class Neighbours:
    """The words nearest to some prototypes, and yardsticks for how near they are.

    Attributes:
        words: for each prototype `NEAREST` of them, nearest first.
        random: the nearest word's cosine of random mixtures of all words: mean, and largest.
        others: the same of the run's own prototypes, drawn at random.
        mean: the nearest word's cosine of the words' own mean, were nothing centred.
    """

    words: list[list[Word]]
    random: tuple[float, float]
    others: tuple[float, float]
    mean: float


@dataclass(frozen=True)
class Trial:
    """Forecasts of the same windows with something changed.

    Attributes:
        change: root mean square change of the forecasts, relative to their own deviation over the horizon (which is
            pooled over the windows); None where they have none, as with one row ahead.
        mse: against the truth, standardised scale; of the forecasts as they are it is `mse_before`.
    """

    name: str
    change: float | None
    mse_before: float
    mse: float

    @property
    def mse_change(self) -> float:
        """Relative to that before."""
        return self.mse / self.mse_before - 1 if self.mse_before else 0.0


def spread(series: SplitSeries, count: int) -> list[int]:
    """Numbers of at most `count` test windows, spread evenly from the first to the last."""
    windows = len(series.windows("test"))
    return np.unique(np.linspace(0, windows - 1, min(count, windows)).round().astype(int)).tolist()


def read_windows(job: Job, windows: list[int], encoder: PromptEncoder | None) -> Batch:
    """Test windows as M = B*N sequences on the job's device, window by window, with the prompts that `encoder` writes."""
    data, series = job.windows.windows("test"), job.windows
    collate = WindowCollate(series.pred_len, series.target_index, encoder)
    return collate([data[number] for number in windows]).to(job.device)


@torch.inference_mode()
def forecast(job: Job, sequences: Batch, shared: Shared | None = None) -> torch.Tensor:
    """Forecasts `[M, H]` float32, standardised, as a test makes them."""
    model = job.model.eval()
    return forecast_within_memory(job, sequences, model.prototype_kv() if shared is None else shared, SEQUENCES)


@torch.inference_mode()
def attention(model: Model, x: torch.Tensor) -> torch.Tensor:
    """How much each patch of one series `[1, T]` takes of each text prototype: weights `[h, L, K]` that sum to 1 over K,
    in the trained tensors' own number type."""
    layer = cast(ReprogrammingLayer, model.eval().reprogramming_layer)
    (keys, _) = model.prototype_kv()  # (1, h, K, f)
    queries = layer.query_projection(model.patch_embedding(instance_norm(x)[0])[0])  # (L, h*f)
    queries = queries.view(len(queries), layer.n_heads, -1).transpose(0, 1)  # (h, L, f)
    return (queries @ keys[0].transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(-1)


def strongest_head(weights: torch.Tensor) -> int:
    """Of weights `[h, L, K]` the head that chooses most: that of the least entropy, averaged over the patches."""
    return int(_entropy(weights).mean(1).argmin())


def most_used(weights: torch.Tensor, count: int) -> list[int]:
    """The prototypes that take most of weights `[..., L, K]`, first the one that takes most."""
    total = weights.flatten(0, -2).mean(0)  # (K,)
    return total.topk(min(count, len(total))).indices.tolist()


def spread_of(weights: torch.Tensor) -> dict[str, Any]:
    """What weights `[h, L, K]` come to in a few figures.

    `effective`: e to the entropy, the number of prototypes were they used equally (K: no choice at all), averaged over
    heads and patches; `effective_strongest` of the strongest head alone. `between_patches`: the share of its attention
    that a patch puts elsewhere than the mean patch, averaged over heads and patches (0: all patches read the same).
    """
    head = strongest_head(weights)
    effective = _entropy(weights).exp()  # (h, L)
    elsewhere = (weights - weights.mean(1, keepdim=True)).abs().sum(-1) / 2  # (h, L)
    return {
        "prototypes": weights.shape[-1],
        "heads": len(weights),
        "strongest_head": head,
        "effective": effective.mean().item(),
        "effective_strongest": effective[head].mean().item(),
        "between_patches": elsewhere.mean().item(),
    }


def _entropy(weights: torch.Tensor) -> torch.Tensor:
    """Of weights `[..., K]`: `[...]`, in nats."""
    return torch.special.entr(weights).sum(-1)


@torch.inference_mode()
def nearest_words(model: Model, prototypes: list[int]) -> Neighbours:
    """The words with the largest cosine to some text prototypes, both centred: of a prototype the mean of all prototypes
    is taken off, of a word the mean of all words.

    What all prototypes share adds the same to every score of a patch, and softmax takes it out again: it chooses nothing.
    What all words share makes every word near to every other, and hides which of them is meant. Rows of the embeddings
    that the tokenizer has no word for are left out.
    """
    tokenizer, scale = model.backbone.tokenizer, model.backbone.embedding_scale
    held = model.text_prototypes().float()  # (K, D)
    device = held.device
    parts = model.backbone.embeddings[: len(tokenizer)].split(BLOCK)

    def blocks() -> Iterator[torch.Tensor]:  # (BLOCK, D), one after the other: the whole may be larger than what is free
        return (part.to(device, torch.float32) * scale for part in parts)

    count = sum(map(len, parts))
    mean = torch.stack([block.sum(0, dtype=torch.float64) for block in blocks()]).sum(0).div(count).float()  # (D,)
    generator = torch.Generator().manual_seed(0)
    random = torch.zeros(DRAWN, len(mean), device=device)
    for block in blocks():
        random += torch.randn(DRAWN, len(block), generator=generator).to(device) @ (block - mean)
    drawn = torch.randperm(len(held), generator=generator)[:DRAWN].tolist()
    asked = F.normalize(torch.cat([held[prototypes + drawn] - held.mean(0), random]), dim=1)  # (n + 2 * DRAWN, D)
    near = torch.empty(len(asked), 0, device=device)
    ids = torch.empty(len(asked), 0, dtype=torch.long, device=device)
    start, nearest_mean = 0, -1.0
    for block in blocks():
        cosines = asked @ F.normalize(block - mean, dim=1).t()  # (n + 2 * DRAWN, BLOCK)
        found = cosines.topk(min(NEAREST, len(block)), dim=1)
        near, ids = torch.cat([near, found.values], dim=1), torch.cat([ids, found.indices + start], dim=1)
        near, places = near.topk(min(NEAREST, near.shape[1]), dim=1)
        ids = ids.gather(1, places)
        nearest_mean = max(nearest_mean, (F.normalize(block, dim=1) @ F.normalize(mean, dim=0)).max().item())
        start += len(block)
    n = len(prototypes)
    words = [
        [Word(readable(tokenizer, word), cosine) for word, cosine in zip(*row, strict=True)]
        for row in zip(ids[:n].tolist(), near[:n].tolist(), strict=True)
    ]
    others, mixtures = ((part[:, 0].mean().item(), part[:, 0].max().item()) for part in near[n:].split([len(drawn), DRAWN]))
    return Neighbours(words, mixtures, others, nearest_mean)


def readable(tokenizer: Any, number: int) -> str:
    """A token for people: its marks of spaces are spaces, bytes that are no whole character and what cannot be printed
    are escaped."""
    token = str(tokenizer.convert_ids_to_tokens(number))
    if _has_token(tokenizer, "Ġ"):  # bytes, written as letters
        table = _bytes_of_letters()
        if all(letter in table for letter in token):  # but added tokens, which are text
            token = bytes(table[letter] for letter in token).decode("utf-8", errors="backslashreplace")
    elif _has_token(tokenizer, "▁"):  # SentencePiece
        token = token.replace("▁", " ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)


def _has_token(tokenizer: Any, token: str) -> bool:
    """Whether a token of its own stands for it (one that is unknown has the unknown token's id, or none)."""
    number = tokenizer.convert_tokens_to_ids(token)
    return number is not None and tokenizer.convert_ids_to_tokens(number) == token


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers (GPT-2's and its heirs') write bytes as: those that Latin-1 prints as
    themselves, the others as the letters from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


def why_no_attention(model: Model) -> str:
    """Why there are no text prototypes to look at; empty where there are."""
    if isinstance(model.reprogramming_layer, ReprogrammingLayer):
        return ""
    return "No attention to show: this run has no text prototypes (--use_reprogramming 0)."


def why_no_trials(job: Job, windows: list[int]) -> str:
    """Why the prompt cannot be tried out on these windows; empty where it can."""
    if job.model.prompts is None:
        why = "--use_prompt 0" if not job.args.use_prompt else f"--llm_ablation {job.args.llm_ablation}"
        return f"No prompt to try out: this run has none ({why})."
    return "" if len(windows) > 1 else "The prompt is not tried out: there is one test window, and nothing to exchange."


@torch.inference_mode()
def try_prompts(job: Job, windows: list[int], description: str) -> dict[str, Trial]:
    """Forecast test windows with their prompts, and with others; the trials by key.

    rounding: nothing changed, but the order of the sequences, and with it their padding; left_out: no word in front of the
    patches, as with `--use_prompt 0`; shuffled: each window has the statistics of another one of them, channel by channel;
    one_window: all have those of the one in the middle; description: the data set is described in other words;
    nudged: the prompt as it is, the window's last value moved by `NUDGE` of the window's deviation.

    Args:
        windows: numbers of two test windows or more.
        description: another data set's.
    """
    model, B = cast(Model, job.model.eval()), len(windows)
    sequences, shared, ours = read_windows(job, windows, model.prompts), model.prototype_kv(), model.prefix_ids
    prompts, y = cast(Prompts, sequences.prompts), sequences.y
    M = len(sequences)
    places = torch.arange(M).view(B, M // B)  # (B, N)

    def forecast_with(prompts: Prompts, opening: list[int], x: torch.Tensor = sequences.x) -> torch.Tensor:
        with other_opening(model, opening):
            return forecast(job, Batch(x, y, prompts), shared).double()  # (M, H)

    # A cycle through the windows in random order: none keeps its own statistics.
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    another = torch.empty_like(order).scatter_(0, order, order.roll(1))
    middle = places[B // 2].expand(B, -1).flatten()
    described = _other_encoder(model, description)
    theirs = cast(Prompts, read_windows(job, windows, described).prompts)
    empty = pad_prompts([[]] * M).to(job.device)
    back = torch.arange(M - 1, -1, -1)
    before = forecast_with(prompts, ours)
    step = NUDGE * sequences.x.std(1, correction=0)  # (M,)
    nudged = torch.cat([sequences.x[:, :-1], sequences.x[:, -1:] + step[:, None]], dim=1)
    after = {
        "rounding": ("nothing (rounding)", forecast_with(_rows(prompts, back), ours, sequences.x.flip(0)).flip(0)),
        "left_out": ("prompt left out", forecast_with(empty, [])),
        "shuffled": ("statistics of another window each", forecast_with(_rows(prompts, places[another].flatten()), ours)),
        "one_window": ("statistics of one window for all", forecast_with(_rows(prompts, middle), ours)),
        "description": ("another data set's description", forecast_with(theirs, described.prefix_ids)),
        "nudged": (f"last value moved by {100 * NUDGE:g} % of the deviation", forecast_with(prompts, ours, nudged)),
    }
    deviation = before.var(1, correction=0).mean().sqrt().item()
    mse = (before - y).square().mean().item()
    return {
        key: Trial(
            name=name,
            change=(then - before).square().mean().sqrt().item() / deviation if deviation > 0 else None,
            mse_before=mse,
            mse=(then - y).square().mean().item(),
        )
        for key, (name, then) in after.items()
    }


@contextmanager
def other_opening(model: Model, opening: list[int]) -> Iterator[None]:
    """Within it every prompt begins with these token ids."""
    usual = model.language_model
    model.language_model = lambda _, ids, length, patches: usual(opening, ids, length, patches)
    try:
        yield
    finally:
        model.language_model = usual


def _rows(prompts: Prompts, rows: torch.Tensor) -> Prompts:
    """The prompts of sequences `rows` `[M]`, in this order."""
    return Prompts(prompts.ids[rows.to(prompts.ids.device)], prompts.length[rows.to(prompts.length.device)])


def _other_encoder(model: Model, description: str) -> PromptEncoder:
    """The run's encoder of prompts, but for the description."""
    ours, backbone = cast(PromptEncoder, model.prompts), model.backbone
    positions = backbone.max_positions
    if model.fast_path and backbone.window is not None:  # what is longer than its window the fast path would get wrong
        positions = min(positions, backbone.window)
    patches = model.output_projection.linear.in_features // model.d_ff
    return PromptEncoder(backbone.tokenizer, replace(ours.template, description=description), positions - patches)


def conclusion(trials: dict[str, Trial], windows: int) -> str:
    """One sentence on what the prompt does, with the numbers that say so; of few windows it says that they are few."""
    shown = {"other statistics": _statistics(trials), "another description": trials["description"]}
    shown["no prompt at all"] = trials["left_out"]
    moves = all(trial.change is not None for trial in shown.values())
    means = " the forecast moves by {} of its deviation and" * moves + " the error changes by {}"
    parts = []
    for what, trial in shown.items():
        parts.append(f"with {what}{means.format(*[percent(trial.change or 0)] * moves, percent(trial.mse_change, True))}")
        means = f" by {' and '.join(['{}'] * (1 + moves))}"
    few = f"on these {windows} windows, fewer than the {ENOUGH} that would speak for others, " * (windows < ENOUGH)
    sentence = f"{', '.join(parts)}: {few}{_verdict(trials)}."
    return sentence[0].upper() + sentence[1:]


def _statistics(trials: dict[str, Trial]) -> Trial:
    """Of the two trials with other statistics the one that matters more."""
    return max(trials["shuffled"], trials["one_window"], key=lambda trial: (trial.change or 0, abs(trial.mse_change)))


def _verdict(trials: dict[str, Trial]) -> str:
    # Rounding, which in bf16 is not small, must not pass for an effect.
    least = max(SMALL, 2 * (trials["rounding"].change or 0))
    least_error = max(SMALL, 2 * abs(trials["rounding"].mse_change))

    def errs(trial: Trial) -> str:
        if abs(trial.mse_change) < least_error:
            return "errs as much"
        return "errs more" if trial.mse_change > 0 else "errs less"

    def matters(trial: Trial) -> bool:
        return (trial.change or 0) >= least or abs(trial.mse_change) >= least_error

    said = {"statistics": _statistics(trials), "description": trials["description"]}
    moving = [f"{name} (with another's it {errs(trial)})" for name, trial in said.items() if matters(trial)]
    without = trials["left_out"]
    if moving:
        return f"this run's forecast depends on its prompt's {' and '.join(moving)}; with none it {errs(without)}"
    if matters(without):
        return f"what its prompt says does not matter to this run, that there is one does: with none it {errs(without)}"
    return "this run does not use its prompt"


def percent(share: float, signed: bool = False) -> str:
    """A share for people: 0.4 %, +12 %; what is not zero is not printed as zero."""
    value = 100 * share
    text = f"{value:{'+' if signed else ''}.{0 if abs(value) >= 10 else 1 if abs(value) >= 1 else 2}f}"
    if float(text) == 0:
        return "0 %" if value == 0 else "less than 0.01 %"
    return f"{text} %"
