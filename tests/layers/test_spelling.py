"""Spelling numbers character by character gives the ids that the tokenizer gives, or is not done."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layers.prompt import PromptEncoder, PromptTemplate, describe_series
from layers.spelling import Spelling


def windows(steps: int) -> np.ndarray:
    """Series `[300, steps]` whose numbers come in all lengths: whole, tiny with exponents, huge, zero."""
    random = np.random.default_rng(steps)
    noise = random.standard_normal((50, steps))
    made = [noise, noise.cumsum(1), noise * 1e-5, noise * 1e20, noise.round(), np.zeros_like(noise)]
    return np.concatenate(made).astype(np.float32)


@pytest.mark.parametrize("decimals", [None, 0, 3])
@pytest.mark.parametrize("lags", ["paper", "peaks"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
def test_ids_are_the_tokenizers(backbones, family: str, lags: str, decimals: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbones[family])
    for steps in (8, 97, 512):
        encoder = PromptEncoder(tokenizer, PromptTemplate("words", steps, 96, decimals, lags), 2048)
        texts = describe_series(windows(steps), encoder.template)
        if encoder.opening_ids:
            assert encoder.encode(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
        if family == "qwen2":
            assert encoder._spelling is not None  # the quick way is taken


def test_windows_at_once_are_those_one_by_one(backbones) -> None:
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(backbones["qwen2"]), PromptTemplate("words", 97, 24), 2048)
    x = torch.from_numpy(windows(97)).view(6, 50, 97).transpose(1, 2)  # (B, T, N)
    assert encoder.for_windows(x) == [ids for window in x for ids in encoder.for_window(window)]


def tokenizer_with(merge: str) -> PreTrainedTokenizerFast:
    """Characters as tokens, and one token of two of them; digits are not split off."""
    characters = [chr(code) for code in range(33, 127)] + ["\u0120"]  # the last stands for a space
    model = models.BPE(vocab={token: i for i, token in enumerate([*characters, merge])}, merges=[tuple(merge)])
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def spelling_with(merge: str) -> Spelling | None:
    tokenizer = tokenizer_with(merge)
    text = " min value {0}, max value {0}, lags : [{1}, {1}]<|".format
    return Spelling.of(lambda texts: tokenizer(texts)["input_ids"], text)


@pytest.mark.parametrize("merge", ["12", "9.", ".0", "5e", "e-", "\u01207", "-3", "4,", "8]", "[6"])
def test_one_token_of_two_characters_of_a_number_or_at_its_edge_is_found(merge: str) -> None:
    assert spelling_with(merge) is None


@pytest.mark.parametrize("merge", ["ma", "\u0120m", "<|", "--", "e0", "..", "]<"])
def test_tokens_within_words_or_that_no_number_has_do_not_matter(merge: str) -> None:
    spelling, tokenizer = spelling_with(merge), tokenizer_with(merge)
    assert spelling is not None
    values = (0.5, 1e-7, 1.25e20, 100.0)
    texts = [f" min value {v}, max value {-v}, lags : [{n}, {n + 1}]<|" for v in values for n in (0, 99)]
    assert spelling(texts) == tokenizer(texts)["input_ids"]
