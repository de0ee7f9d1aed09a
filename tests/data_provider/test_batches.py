"""Batches: the four tensors of the field, and the sequences and prompts that the model takes."""

import pytest
import torch
from transformers import AutoTokenizer

from data_provider.batches import Batch, Sequences, WindowCollate
from layers.prompt import PromptEncoder, Prompts, PromptTemplate

T, LABEL_LEN, H = 3, 1, 2


def window(number: int, channels: int) -> dict:
    """A window of consecutive rows whose values tell window, channel and row: 100 b + 10 n + t."""
    rows = torch.arange(T + H, dtype=torch.float32)[:, None]
    values = 100 * number + 10 * torch.arange(channels) + rows
    marks = rows / 10
    x, y = slice(0, T), slice(T - LABEL_LEN, T + H)
    return {"x": values[x], "y": values[y], "x_mark": marks[x], "y_mark": marks[y], "index": number}


def test_a_batch_unpacks_into_the_four_tensors_of_the_field() -> None:
    batch = WindowCollate(H)([window(7, 2), window(3, 2)])
    batch_x, batch_y, batch_x_mark, batch_y_mark = batch
    assert batch_x.tolist() == [[[700, 710], [701, 711], [702, 712]], [[300, 310], [301, 311], [302, 312]]]
    assert batch_y[1].tolist() == [[302, 312], [303, 313], [304, 314]]
    assert batch_x_mark.shape == (2, T, 1) and batch_y_mark.shape == (2, LABEL_LEN + H, 1)
    assert batch_y_mark[0, :, 0].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert batch.index.tolist() == [7, 3] and batch.prompts is None


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
    sequences = WindowCollate(H, target_index)([window(0, channels), window(1, channels)]).sequences()
    assert sequences.x.tolist() == x and sequences.y.tolist() == y and len(sequences) == len(x)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(("channels", "target_index"), [(4, None), (1, None), (4, 2)], ids=["M", "S", "MS"])
def test_sequences_lie_in_memory_as_their_own_channels_stacked(windows, channels, target_index) -> None:
    """Else a sum over a sequence may round in another order, and a forecast differ in its last bit."""
    items = [window(number, channels) for number in range(windows)]
    kept = slice(None) if target_index is None else slice(target_index, target_index + 1)
    x = torch.stack([item["x"][:, kept] for item in items]).transpose(1, 2).flatten(0, 1)
    y = torch.stack([item["y"][-H:, kept] for item in items]).transpose(1, 2).flatten(0, 1)
    sequences = WindowCollate(H, target_index)(items).sequences()
    for made, expected in ((sequences.x, x), (sequences.y, y)):
        assert torch.equal(made, expected) and made.stride() == expected.stride()


def test_micro_batches_are_the_sequences_in_order() -> None:
    prompts = Prompts(torch.arange(10).view(5, 2), torch.tensor([2, 1, 2, 1, 2]))
    whole = Sequences(torch.arange(15.0).view(5, 3), torch.arange(10.0).view(5, 2), prompts)
    for size, lengths in ((0, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])):
        parts = whole.micro_batches(size)
        assert [len(part) for part in parts] == lengths
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
        assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
        assert torch.equal(torch.cat([part.prompts.ids for part in parts]), prompts.ids)
        assert torch.equal(torch.cat([part.prompts.length for part in parts]), prompts.length)
    assert Sequences(whole.x, whole.y).micro_batches(3)[1].prompts is None


@pytest.fixture(scope="module")
def encoder(backbones) -> PromptEncoder:
    tokenizer = AutoTokenizer.from_pretrained(backbones["qwen2"])
    return PromptEncoder(tokenizer, PromptTemplate("Made-up rows.", 8, H), 1000)


@pytest.mark.parametrize("target_index", [None, 1], ids=["M", "MS"])
def test_each_sequence_has_its_prompt(encoder, target_index) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 2, generator=generator).cumsum(1)
    items = [{"x": x[i], "y": x[i, :H], "x_mark": x[i, :, :1], "y_mark": x[i, :H, :1], "index": i} for i in range(len(x))]
    prompts = WindowCollate(H, target_index, encoder)(items).sequences().prompts
    forecast = [0, 1] if target_index is None else [target_index]
    expected = [encoder.for_window(x[i, :, n : n + 1])[0] for i in range(3) for n in forecast]
    made = [ids[:length].tolist() for ids, length in zip(prompts.ids, prompts.length.tolist(), strict=True)]
    assert made == expected


def batch_with_prompts() -> Batch:
    batch = WindowCollate(H)([window(0, 2), window(1, 2)])
    batch.prompts = Prompts(torch.ones(4, 3, dtype=torch.long), torch.full((4,), 3))
    return batch


def test_what_the_model_reads_moves_and_the_marks_stay() -> None:
    moved = batch_with_prompts().to(torch.device("meta"))
    assert moved.x.is_meta and moved.y.is_meta and moved.prompts.length.is_meta
    assert not moved.prompts.ids.is_meta  # they go where the words are looked up
    assert not (moved.x_mark.is_meta or moved.y_mark.is_meta or moved.index.is_meta)
    assert moved.sequences().x.shape == (4, T) and moved.pred_len == H
    assert WindowCollate(H)([window(0, 2)]).to(torch.device("meta")).prompts is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory is a GPU driver's")
def test_pinned_memory() -> None:
    batch, pinned = batch_with_prompts(), batch_with_prompts().pin_memory()
    assert all(t.is_pinned() for t in (pinned.x, pinned.y, *pinned.prompts))
    assert all(torch.equal(one, other) for one, other in zip(batch, pinned, strict=True))
    assert WindowCollate(H)([window(0, 2)]).pin_memory().prompts is None
