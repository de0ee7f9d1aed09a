"""Batches: the sequences, prompts and windows that the models take."""

import pytest
import torch

from data_provider.batches import Batch, WindowCollate
from layers.prompt import Prompts

T, LABEL_LEN, H = 3, 1, 2


def window(number: int, channels: int) -> dict:
    """A window of consecutive rows whose values tell window, channel and row: 100 b + 10 n + t."""
    rows = torch.arange(T + H, dtype=torch.float32)[:, None]
    values = 100 * number + 10 * torch.arange(channels) + rows
    marks = rows / 10
    x, y = slice(0, T), slice(T - LABEL_LEN, T + H)
    return {"x": values[x], "y": values[y], "x_mark": marks[x], "y_mark": marks[y], "index": number}


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
