"""Batches: the sequences, prompts and windows that the models take."""

import pytest
import torch
from transformers import AutoTokenizer

from data_provider.batches import Batch, WindowCollate
from layers.prompt import PromptEncoder, Prompts, PromptTemplate

T, LABEL_LEN, H = 3, 1, 2


def window(number: int, channels: int) -> dict:
    """A window of consecutive rows whose values tell window, channel and row: 100 b + 10 n + t."""
    rows = torch.arange(T + H, dtype=torch.float32)[:, None]
    values = 100 * number + 10 * torch.arange(channels) + rows
    marks = rows / 10
    x, y = slice(0, T), slice(T - LABEL_LEN, T + H)
    return {"x": values[x], "y": values[y], "x_mark": marks[x], "y_mark": marks[y], "index": number}


def test_windows_keep_all_columns_and_the_marks_for_a_model_that_reads_them() -> None:
    batch = WindowCollate(H, 1, whole=True)([window(7, 2), window(3, 2)])
    x, x_mark, y_mark, channels = batch.windows
    assert x.tolist() == [[[700, 710], [701, 711], [702, 712]], [[300, 310], [301, 311], [302, 312]]]
    assert x_mark.shape == (2, T, 1) and y_mark[0, :, 0].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert batch.index.tolist() == [7, 3] and batch.prompts is None and channels == slice(1, 2)
    assert batch.y.tolist() == [[713, 714], [313, 314]] and batch.split(1) == [batch]


@pytest.mark.parametrize(
    ("channels", "target_index", "x", "y"),
    [
        (2, None, [[0, 1, 2], [10, 11, 12], [100, 101, 102], [110, 111, 112]], [[3, 4], [13, 14], [103, 104], [113, 114]]),
        (1, None, [[0, 1, 2], [100, 101, 102]], [[3, 4], [103, 104]]),
        (3, 1, [[10, 11, 12], [110, 111, 112]], [[13, 14], [113, 114]]),
    ],
    ids=["M", "S", "MS"],
)
def test_sequences_are_the_forecast_channels_window_by_window(channels, target_index, x, y) -> None:
    sequences = WindowCollate(H, target_index)([window(0, channels), window(1, channels)])
    assert sequences.x.tolist() == x and sequences.y.tolist() == y and len(sequences) == len(x)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(("channels", "target_index"), [(4, None), (1, None), (4, 2)], ids=["M", "S", "MS"])
def test_sequences_lie_in_memory_one_after_the_other(windows, channels, target_index) -> None:
    """Else a sum over a sequence may round in another order, and a forecast differ in its last bit."""
    items = [window(number, channels) for number in range(windows)]
    kept = slice(None) if target_index is None else slice(target_index, target_index + 1)
    x = torch.stack([item["x"][:, kept] for item in items]).transpose(1, 2).flatten(0, 1)
    y = torch.stack([item["y"][-H:, kept] for item in items]).transpose(1, 2).flatten(0, 1)
    sequences = WindowCollate(H, target_index)(items)
    for made, expected in ((sequences.x, x), (sequences.y, y)):
        assert torch.equal(made, expected) and made.is_contiguous()


def test_micro_batches_are_the_sequences_in_order() -> None:
    prompts = Prompts(torch.arange(10).view(5, 2), torch.tensor([2, 1, 2, 1, 2]))
    whole = Batch(torch.arange(15.0).view(5, 3), torch.arange(10.0).view(5, 2), prompts)
    for size, lengths in ((0, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])):
        parts = whole.split(size)
        assert [len(part) for part in parts] == lengths
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
        assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
        assert torch.equal(torch.cat([part.prompts.ids for part in parts]), prompts.ids)
        assert torch.equal(torch.cat([part.prompts.length for part in parts]), prompts.length)
    assert Batch(whole.x, whole.y).split(3)[1].prompts is None


@pytest.fixture(scope="module")
def encoder(backbones) -> PromptEncoder:
    tokenizer = AutoTokenizer.from_pretrained(backbones["qwen2"])
    return PromptEncoder(tokenizer, PromptTemplate("Made-up rows.", 8, H), 1000)


@pytest.mark.parametrize("target_index", [None, 1], ids=["M", "MS"])
def test_each_sequence_has_its_prompt(encoder, target_index) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 2, generator=generator).cumsum(1)
    items = [{"x": x[i], "y": x[i, :H], "x_mark": x[i, :, :1], "y_mark": x[i, :H, :1], "index": i} for i in range(len(x))]
    prompts = WindowCollate(H, target_index, encoder)(items).prompts
    forecast = [0, 1] if target_index is None else [target_index]
    expected = [encoder.for_windows([x[i, :, n : n + 1]])[0] for i in range(3) for n in forecast]
    made = [ids[:length].tolist() for ids, length in zip(prompts.ids, prompts.length.tolist(), strict=True)]
    assert made == expected


def batch_with_prompts() -> Batch:
    batch = WindowCollate(H)([window(0, 2), window(1, 2)])
    batch.prompts = Prompts(torch.ones(4, 3, dtype=torch.long), torch.full((4,), 3))
    return batch


def test_what_the_model_reads_moves() -> None:
    moved = batch_with_prompts().to(torch.device("meta"))
    assert moved.x.is_meta and moved.y.is_meta and moved.prompts.length.is_meta and len(moved) == 4
    assert not (moved.prompts.ids.is_meta or moved.index.is_meta)  # ids go where the token embeddings are
    assert all(part.is_meta for part in WindowCollate(H, whole=True)([window(0, 2)]).to(torch.device("meta")).windows[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory is a GPU driver's")
def test_pinned_memory() -> None:
    pinned = batch_with_prompts().pin_memory()
    assert all(t.is_pinned() for t in (pinned.x, pinned.y, *pinned.prompts))
    assert torch.equal(pinned.x, batch_with_prompts().x)
