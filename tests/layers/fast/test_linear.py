"""Products with a frozen matrix against PyTorch's linear layers."""

import pytest
import torch
from torch import nn

import layers.fast.linear as linear
from layers.fast.linear import FrozenLinear, FrozenWeight, prepack_weights, product


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear_equals_linear(bias: bool) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    frozen, x = FrozenLinear(layer), torch.randn(3, 5, 40, requires_grad=True)
    found, expected = frozen(x), layer(x)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), expected)
    assert frozen.weight is layer.weight and frozen.bias is layer.bias


def test_only_plain_linear_layers_have_a_frozen_form() -> None:
    class FourBit(nn.Linear):
        """As bitsandbytes has it: a subclass, whose weight is no matrix."""

    layer = FourBit(8, 8)
    assert FrozenLinear.of(layer) is layer
    assert isinstance(FrozenLinear.of(nn.Linear(8, 8)), FrozenLinear)


def test_a_frozen_layer_keeps_no_input() -> None:
    layer, kept = FrozenLinear(nn.Linear(40, 24).requires_grad_(False)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 40, requires_grad=True)).sum().backward()
    assert not kept


def test_products_with_views_and_without_rows() -> None:
    """A transposed matrix, rows that are a slice of something wider, and no row at all."""
    torch.manual_seed(3)
    wide, matrix = torch.randn(9, 70), torch.randn(40, 24)
    torch.testing.assert_close(product(wide[:, 5:45], matrix.t()), wide[:, 5:45] @ matrix)
    assert product(wide[:0, :40], matrix.t()).shape == (0, 24)


@pytest.mark.parametrize("prepacked", [True, False])
def test_frozen_weight_from_both_sides(prepacked: bool) -> None:
    """First used in inference mode, then with gradients; rows that are a slice, and no row at all."""
    torch.manual_seed(4)
    layer = nn.Linear(40, 24).requires_grad_(False)
    frozen = FrozenLinear(layer)
    weight, rows = frozen.frozen, torch.randn(9, 70)[:, 5:45]
    weight.prepacked = prepacked
    with torch.inference_mode():
        torch.testing.assert_close(weight.forward(rows, layer.bias), layer(rows))
        torch.testing.assert_close(weight.backward(layer(rows)), layer(rows) @ layer.weight)
    assert len(weight._layouts) == (2 if prepacked and linear.REORDER else 0)
    assert weight.forward(rows[:0]).shape == (0, 24) and weight.backward(layer(rows)[:0]).shape == (0, 40)
    x = rows.clone().requires_grad_()
    frozen(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer(rows) @ layer.weight)
    layer.weight.mul_(2)  # a weight that has changed is laid out anew
    torch.testing.assert_close(weight.forward(rows), rows @ layer.weight.t())
    layer.weight.copy_(torch.randn(24, 40))
    torch.testing.assert_close(weight.backward(rows[:, :24]), rows[:, :24] @ layer.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_types_keep_no_layouts(dtype: torch.dtype) -> None:
    layer = nn.Linear(40, 24, bias=False, dtype=dtype).requires_grad_(False)
    weight, x = FrozenWeight(layer.weight, prepacked=True), torch.randn(9, 40, dtype=dtype)
    torch.testing.assert_close(weight.forward(x), layer(x))
    assert not weight._layouts


def test_only_small_models_keep_layouts(monkeypatch) -> None:
    """What counts is all linear layers of the model, those included that have no frozen form in it."""
    plain = nn.Linear(8, 8).requires_grad_(False)
    model = nn.Sequential(FrozenLinear(nn.Linear(8, 8).requires_grad_(False)), plain)
    size = 2 * 64 * 4
    for limit, small in ((size, True), (size - 1, False)):
        monkeypatch.setattr(linear, "PACKED_BYTES", limit)
        prepack_weights(model)
        model[0].frozen._layouts.clear()
        model[0](torch.randn(5, 8))
        assert model[0].frozen.prepacked == small
        assert bool(model[0].frozen._layouts) == bool(small and linear.REORDER)
