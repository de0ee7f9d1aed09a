"""The prompt in front of the patches: its words, its statistics, its tokens (Time-LLM, section 3.1).

A prompt is a fixed *prefix* (description and task, the same for all series of a run) followed by the
*statistics* of one series. The prefix ends at "Input statistics:", so that the backbone can run over
it once a run. Everything here happens on the CPU, in the data loader's workers.
"""

import bisect
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from layers.errors import input_error
from layers.norm import instance_norm

MAX_PROMPT_TOKENS = 2048
TOP_LAGS = 5
NOTE_TOKENS = 64  # of the sentence about the notes that are known


class Prompts(NamedTuple):
    """The prompts of M sequences, behind the prefix that they share."""

    ids: torch.Tensor  # (M, n) token ids, right-padded
    length: torch.Tensor  # (M,) how many of them count

    # Move the lengths; the ids go where the words are looked up.
    def to(self, device: torch.device) -> "Prompts":
        return Prompts(self.ids, self.length.to(device, non_blocking=True))


def pad_prompts(ids: list[list[int]]) -> Prompts:
    """Token id lists -> right-padded ids `[M, longest]` and lengths `[M]`, both int64."""
    rows = [torch.tensor(row, dtype=torch.long) for row in ids]
    return Prompts(pad_sequence(rows, batch_first=True), torch.tensor(list(map(len, ids))))


@dataclass(frozen=True)
class PromptTemplate:
    """The fixed words of a run's prompts. `decimals` rounds the statistics; None prints them in full. `lags` are the
    paper's top ones ("paper"), or the top peaks ("peaks")."""

    description: str
    seq_len: int
    pred_len: int
    decimals: int | None = None
    lags: str = "paper"

    def prompt_prefix(self) -> str:
        """The part that is the same for every series of the run."""
        return (
            f"<|start_prompt|>Dataset description: {self.description}"
            f"Task description: forecast the next {self.pred_len} steps "
            f"given the previous {self.seq_len} steps information; Input statistics:"
        )

    def statistics(self, minimum: float, maximum: float, median: float, upward: bool, lags: list[int]) -> str:
        """The part that describes one series."""
        values = minimum, maximum, median
        low, high, middle = values if self.decimals is None else (round(value, self.decimals) for value in values)
        return (
            f" min value {low}, max value {high}, median value {middle}, "
            f"the trend of input is {'upward' if upward else 'downward'}, "
            f"top {len(lags)} lags are : [{', '.join(map(str, lags))}]<|<end_prompt>|>"
        )


# Circular autocorrelation irfft(|rfft(z)|^2) of `[N, T]`, the same for l and T - l to the last bit.
def _autocorrelation(z: np.ndarray) -> np.ndarray:
    T = z.shape[-1]
    spectrum = np.fft.rfft(z.astype(np.float64), axis=-1)  # (N, T//2 + 1)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2, n=T, axis=-1)  # (N, T)
    lag = np.arange(T)
    return correlation[:, np.minimum(lag, T - lag)]


def top_peaks(z: np.ndarray) -> list[list[int]]:
    """The lags from 2 to T/2 - 1 at which the circular autocorrelation has its largest local maxima, largest first.

    The paper's top lags are 0 and its neighbours for nearly every series; a day and a week show as peaks. A series
    may have fewer than TOP_LAGS, or none.

    Args:
        z: `[N, T]` series.
    """
    correlation = _autocorrelation(z)
    # Of a series that repeats itself all multiples of its period are as high: rounding must not choose.
    correlation = np.round(correlation / np.maximum(correlation[:, :1], 1e-30), 6)
    correlation = correlation[:, 1 : z.shape[-1] // 2 + 1]  # lags 1 to T/2
    inner = correlation[:, 1:-1]
    peaks = (inner > correlation[:, :-2]) & (inner >= correlation[:, 2:]) & (inner > 0)
    ranked = np.argsort(np.where(peaks, -inner, np.inf), axis=-1, kind="stable")[:, :TOP_LAGS] + 2
    return [lags[:found].tolist() for lags, found in zip(ranked, peaks.sum(axis=-1), strict=True)]


def describe_series(z: np.ndarray, template: PromptTemplate) -> list[str]:
    """One statistics text for each of the normalised series `[N, T]` (float32)."""
    T = z.shape[-1]
    ordered = np.sort(z, axis=-1)
    medians = ordered[:, (T - 1) // 2]  # the lower median for even T, as torch.median
    rising = z[:, -1] - z[:, 0] > 0
    if template.lags == "peaks":
        lags = top_peaks(z)
    else:  # stable: of l and T - l, whose values are the same, the smaller comes first on every machine
        lags = np.argsort(-_autocorrelation(z), axis=-1, kind="stable")[:, :TOP_LAGS].tolist()
    return [
        template.statistics(float(ordered[i, 0]), float(ordered[i, -1]), float(medians[i]), bool(rising[i]), lags[i])
        for i in range(len(z))
    ]


class PromptEncoder:
    """Turns series into prompt tokens: `prefix_ids` once, then the statistics' ids of each series.

    Where the tokenizer does not split the text at the end of the prefix (or closes every text with a
    token of its own, as BERT's does), `prefix_ids` is empty and each series carries its whole prompt.

    Attributes:
        longest: tokens of the longest prompt, prefix, statistics and notes.
        texts: those that notes name by number.
    """

    def __init__(self, tokenizer, template: PromptTemplate, max_tokens: int, says_notes: bool = False):
        """Args:
            tokenizer: a transformers tokenizer.
            template: the run's words.
            max_tokens: prompt tokens that fit in front of the patches. A longer description is cut.
            says_notes: the notes that a window knows stand behind its statistics, in one sentence of NOTE_TOKENS at most.

        Raises:
            InputError: the statistics alone do not fit.
        """
        self.tokenizer, self.says_notes, more = tokenizer, says_notes, says_notes * NOTE_TOKENS
        self.texts: list[str] = []
        self.template = self._fit(template, min(max_tokens, MAX_PROMPT_TOKENS) - more)
        prompt_prefix, samples = self.template.prompt_prefix(), self._samples(self.template)
        whole = self._ids([prompt_prefix + text for text in samples], special=True)
        shared = self._ids([prompt_prefix], special=True)[0]
        splits = whole == [shared + ids for ids in self._ids(samples, special=False)]
        self.prefix_ids: list[int] = shared if splits else []
        self.longest = max(map(len, whole)) + more

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids that follow `prefix_ids`, for each statistics text."""
        if self.prefix_ids:
            return self._ids(texts, special=False)
        return self._ids([self.template.prompt_prefix() + text for text in texts], special=True)

    def for_windows(self, windows: Iterable[torch.Tensor], notes: torch.Tensor | None = None) -> list[list[int]]:
        """Token ids for every channel of windows `[T, N]`, window by window and channel by channel.

        Args:
            notes: `[B, k, 4]` of the windows, see `data_provider.notes`.
        """
        texts: list[str] = []
        sentences: list[str] = []
        said = itertools.repeat([]) if notes is None or not self.says_notes else notes[:, :, 0].tolist()
        for x, numbers in zip(windows, said, strict=False):
            z, _, _ = instance_norm(x.t().contiguous())  # (N, T)
            texts += describe_series(z.numpy(), self.template)
            known = "; ".join(self.texts[number] for number in numbers if number >= 0)
            sentences += [f"Notes: {known}" if known else ""] * len(z)
        ids = self.encode(texts)  # all at once: the tokenizer takes as long to start as a few series take
        if not any(sentences):
            return ids
        return [own + more[:NOTE_TOKENS] for own, more in zip(ids, self._ids(sentences, special=False), strict=True)]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        # verbose=False: the tokenizer would warn about lengths that `_fit` has dealt with.
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    # Statistics that stand for all others: ordinary, whole, tiny and as long as they can get.
    def _samples(self, template: PromptTemplate) -> list[str]:
        T = template.seq_len
        # No float32 prints longer than the first two; rounded, none longer than the largest that a normalised series has.
        largest = -0.98765432109876543 * 10 ** len(str(math.isqrt(T)))
        longest = -1.2345678806304932e-05, -0.00012345678104996681, largest
        values = [(0.0, 0.0, 0.0), (-1.5, 2.25, 1e-05), (1e20, -3.0, 0.1), *((value,) * 3 for value in longest)]
        lags = [max(T - 1 - i, 0) for i in range(TOP_LAGS)]
        return [template.statistics(*v, upward, lags) for v in values for upward in (False, True)]

    # Cut words off the description's end until the longest prompt has at most `limit` tokens.
    def _fit(self, template: PromptTemplate, limit: int) -> PromptTemplate:
        def tokens(words: list[str]) -> int:
            cut = replace(template, description=" ".join(words))
            return max(map(len, self._ids([cut.prompt_prefix() + text for text in self._samples(cut)], special=True)))

        words = template.description.split()
        if tokens(words) <= limit:
            return template
        if tokens([]) > limit:
            raise input_error(
                f"--seq_len {template.seq_len}",
                f"{limit} positions of the language model that are left for the prompt",
                f"at least {tokens([])}, which its statistics alone take",
                "choose a shorter --seq_len, a larger --stride or a language model with more positions",
            )
        # The first so many words that are too many, less one.
        keep = bisect.bisect(range(len(words)), limit, key=lambda count: tokens(words[:count])) - 1
        return replace(template, description=" ".join(words[:keep]))
