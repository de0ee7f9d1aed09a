"""The prompt: its exact text, its figures, its tokens."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layers.errors import InputError
from layers.norm import instance_norm
from layers.prompt import PromptEncoder, PromptTemplate, describe_series, top_peaks

TEMPLATE = PromptTemplate("Hourly load of a town.", seq_len=8, pred_len=24)
# As model.md has it; the lags by hand: correlations 9.25 at 0, 3.55 at 3 and 5, 2.0 at 2 and 6.
SERIES = np.array([0.1, 2.0, -0.3, 1.5, 0.7, -1.2, 0.4, 0.9], dtype=np.float32)
TEXT = (
    "<|start_prompt|>Dataset description: Hourly load of a town.Task description: forecast the next 24 steps "
    "given the previous 8 steps information; Input statistics: min value -1.2000000476837158, "
    "max value 2.0, median value 0.4000000059604645, the trend of input is upward, "
    "top 5 lags are : [0, 3, 5, 2, 6]<|<end_prompt>|>"
)
NUMBERS = re.compile(
    r" min value (\S+), max value (\S+), median value (\S+), the trend of input is (upward|downward), "
    r"top 5 lags are : \[(\d+), (\d+), (\d+), (\d+), (\d+)\]<\|<end_prompt>\|>"
)
LONG = " ".join(f"word{i} of a description." for i in range(900))


def tokenizer_of(backbones, family: str):
    return AutoTokenizer.from_pretrained(backbones[family])


def random_series(count: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, steps)).cumsum(1).astype(np.float32)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert", "joining"])
def test_ids_are_those_of_the_whole_text(backbones, family: str) -> None:
    tokenizer = joining_tokenizer() if family == "joining" else tokenizer_of(backbones, family)
    encoder = PromptEncoder(tokenizer, TEMPLATE, max_tokens=2048)
    # BERT closes every text with a token of its own; the joining tokenizer does not split the text at the prefix's end.
    assert bool(encoder.prefix_ids) == (family not in ("bert", "joining"))
    texts = describe_series(np.concatenate([SERIES[None], random_series(20, 8) * 1e-4]), TEMPLATE)
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert encoder.prefix_ids + ids == tokenizer(TEMPLATE.prompt_prefix() + text)["input_ids"]


def test_no_room_for_the_statistics(backbones) -> None:
    with pytest.raises(InputError, match="--seq_len 512: got 60 positions") as caught:
        PromptEncoder(tokenizer_of(backbones, "bert"), PromptTemplate("d", 512, 96), 60)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [5, 6, 9, 32, 33, 96, 336])
def test_peaks_against_every_lag(steps: int) -> None:
    """Random walks, whose peaks are far apart in size: no rounding decides."""
    walks = np.random.default_rng(steps).standard_normal((30, steps)).cumsum(1)
    walks -= walks.mean(1, keepdims=True)
    found = top_peaks(walks)
    for walk, lags in zip(walks, found, strict=True):
        c = [float(walk @ np.roll(walk, lag)) for lag in range(steps)]  # circular, lag by lag
        inner = range(2, steps // 2)
        peaks = [lag for lag in inner if c[lag] > c[lag - 1] and c[lag] >= c[lag + 1] and c[lag] > 0]
        assert lags == sorted(peaks, key=lambda lag: -c[lag])[:5]
    assert steps < 32 or len({len(lags) for lags in found}) > 1


def test_the_prompt_names_peaks_or_says_that_there_are_none(backbones) -> None:
    template = replace(TEMPLATE, seq_len=96, lags="peaks")
    encoder = PromptEncoder(tokenizer_of(backbones, "qwen2"), template, max_tokens=400)
    wave = torch.sin(2 * torch.pi * torch.arange(96) / 24)
    window = torch.stack([wave, torch.full((96,), 3.0)], dim=1)  # (T, N)
    first, second = ("".join(encoder.tokenizer.decode(ids)) for ids in encoder.for_windows([window]))
    assert "top 1 lags are : [24]<|<end_prompt>|>" in first or "lags are : [24, " in first
    assert second.endswith("the trend of input is downward, top 0 lags are : []<|<end_prompt>|>")


@pytest.mark.parametrize("decimals", [None, 3])
@pytest.mark.parametrize("lags", ["paper", "peaks"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
def test_no_prompt_is_longer_than_the_longest(backbones, family: str, lags: str, decimals: int | None) -> None:
    """`longest` decides whether a sliding window holds all, and whether all fit into the positions."""
    rng = np.random.default_rng(0)
    for steps in (8, 97, 512):
        template = PromptTemplate(" ".join(["words"] * 40), steps, 96, decimals, lags)
        encoder = PromptEncoder(tokenizer_of(backbones, family), template, max_tokens=2048)
        noise = rng.standard_normal((40, steps)).astype(np.float32)
        spikes = noise * 1e-4
        spikes[:, 0], spikes[:, -1] = 20, -20  # the median is near 0, and has all of its digits
        windows = np.concatenate([noise, noise.cumsum(1), spikes, spikes * 1e-3, noise * 1e-6, np.zeros_like(noise[:1])])
        prompts = encoder.for_windows([torch.from_numpy(windows).T])
        lengths = [len(encoder.prefix_ids) + len(ids) for ids in prompts]
        assert max(lengths) <= encoder.longest, (max(lengths), encoder.longest)


def letters_with(parts: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Letters, and some longer tokens."""
    letters = sorted({chr(code) for code in range(32, 127)})
    vocabulary = {token: i for i, token in enumerate(letters + parts)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and one token that reaches over the end of the prefix: ": min"."""
    return letters_with([": ", ": m", ": mi", ": min"], [(":", " "), (": ", "m"), (": m", "i"), (": mi", "n")])


def test_a_period_and_its_multiples_are_peaks_and_a_constant_has_none() -> None:
    for period in (7, 12, 24, 48):  # all multiples are as high, and the shortest comes first
        repeated = np.tile(np.random.default_rng(period).standard_normal(period), 12).astype(np.float32)
        assert top_peaks(repeated[None])[0][:3] == [period, 2 * period, 3 * period]
    for value in (0.0, 0.1, -7.77, 1e4):
        assert top_peaks(instance_norm(torch.full((1, 512), value))[0].numpy()) == [[]]


def test_exact_text() -> None:
    texts = describe_series(np.stack([SERIES, np.zeros_like(SERIES)]), TEMPLATE)
    assert TEMPLATE.prompt_prefix() + texts[0] == TEXT and TEMPLATE.prompt_prefix().endswith("Input statistics:")
    assert texts[1] == (
        " min value 0.0, max value 0.0, median value 0.0, the trend of input is downward, "
        "top 5 lags are : [0, 1, 2, 3, 4]<|<end_prompt>|>"
    )


@pytest.mark.parametrize("steps", [5, 12, 31, 96])
def test_statistics_against_torch_and_lags_against_a_sum_written_out(steps: int) -> None:
    z = random_series(20, steps)
    for series, text in zip(torch.from_numpy(z), describe_series(z, TEMPLATE), strict=True):
        low, high, median, trend, *named = NUMBERS.fullmatch(text).groups()
        # printed as Python prints the float32 value converted to float, not a digit less or more
        assert [low, high, median] == [str(value.item()) for value in (series.min(), series.max(), series.median())]
        assert trend == ("upward" if series[-1] > series[0] else "downward")
        lags, values = [int(lag) for lag in named], series.double().tolist()
        correlation = [sum(values[i] * values[(i + lag) % steps] for i in range(steps)) for lag in range(steps)]
        assert len(set(lags)) == 5
        np.testing.assert_allclose([correlation[lag] for lag in lags], sorted(correlation)[:-6:-1], rtol=1e-9)
        # equal by symmetry: rounding must not order them
        assert all(first < second for first, second in itertools.pairwise(lags) if first + second == steps)


@pytest.mark.parametrize(("family", "limit"), [("bert", 512 - 64), ("gpt2", 1024 - 64), ("qwen2", 2048), ("qwen2", 10**9)])
def test_the_description_is_cut_and_never_the_statistics(backbones, family: str, limit: int) -> None:
    tokenizer, template = tokenizer_of(backbones, family), PromptTemplate(LONG, seq_len=512, pred_len=96)
    encoder = PromptEncoder(tokenizer, template, max_tokens=limit)
    kept, lengths = encoder.template.description, []
    assert kept and LONG.startswith(kept) and len(kept) < len(LONG)
    texts = describe_series(np.concatenate([random_series(20, 512), random_series(20, 512) * 1e-5]), template)
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        whole = encoder.prefix_ids + ids
        cut = PromptTemplate(kept, 512, 96).prompt_prefix() + text
        assert tokenizer.decode(whole, skip_special_tokens=True) == cut
        lengths.append(len(whole))
    most = min(limit, 2048)  # model.md: at most 2048 prompt tokens
    assert most - 40 < max(lengths) <= most  # no more is cut than has to be


def test_no_number_has_more_tokens_than_the_samples_where_exponents_are_one_token() -> None:
    """A number of the kind "-0.000123..." has as many characters as "-1.23...e-05", which a vocabulary may shorten."""
    tokenizer = letters_with(["e-", "e-0"], [("e", "-"), ("e-", "0")])
    template = PromptTemplate("words", 96, 24)
    value = float(np.float32(-0.00012345868162810802))  # as long as a float32 gets without an exponent
    text = template.prompt_prefix() + template.statistics(value, value, value, False, [95, 94, 93, 92, 91])
    assert len(str(value)) == 23 and len(tokenizer(text)["input_ids"]) <= PromptEncoder(tokenizer, template, 2048).longest
