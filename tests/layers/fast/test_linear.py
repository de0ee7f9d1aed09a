"""Products with a frozen matrix against PyTorch's linear layers."""

import pytest
import torch
from torch import nn

import layers.fast.linear as linear
from layers.fast.linear import FrozenLinear


def test_a_frozen_layer_keeps_no_input() -> None:
    layer, kept = FrozenLinear(nn.Linear(40, 24).requires_grad_(False)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 40, requires_grad=True)).sum().backward()
    assert not kept


@pytest.mark.parametrize("prepacked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_layer_from_both_sides(prepacked: bool, bias: bool) -> None:
    """First used in inference mode, then with gradients; rows that are a slice, and no row at all."""
    torch.manual_seed(4)
    layer = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    frozen, rows = FrozenLinear(layer), torch.randn(9, 70)[:, 5:45]
    frozen.prepacked = prepacked
    with torch.inference_mode():
        torch.testing.assert_close(frozen(rows), layer(rows))
        torch.testing.assert_close(frozen.times(layer(rows), transposed=True), layer(rows) @ layer.weight)
    assert len(frozen._layouts) == (2 if prepacked and linear.REORDER else 0)
    assert frozen(rows[:0]).shape == (0, 24) and frozen.times(layer(rows)[:0], transposed=True).shape == (0, 40)
    x = rows.clone().requires_grad_()
    frozen(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer(rows) @ layer.weight)
