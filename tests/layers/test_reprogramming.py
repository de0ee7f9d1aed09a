"""Reprogramming against softmax attention written out."""

import pytest
import torch
from torch.nn import functional as F

from layers.fast import cross_attention
from layers.reprogramming import ATTENTION_DROPOUT, ReprogrammingLayer, attend

M, L, D, K, HEADS, WIDTH, MODEL = 2, 3, 10, 7, 4, 5, 6


@pytest.fixture(params=[attend, cross_attention], ids=["plain", "fast"])
def built(request) -> tuple[ReprogrammingLayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = ReprogrammingLayer(MODEL, HEADS, WIDTH, D, request.param).double().eval()
    tokens = torch.randn(M, L, MODEL, dtype=torch.float64)
    return layer, tokens, torch.randn(K, D, dtype=torch.float64)


def written_out(layer: ReprogrammingLayer, tokens: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Head by head; head i owns rows i*f to (i+1)*f of each projection."""
    q, k, v, out = (getattr(layer, f"{n}_projection") for n in ("query", "key", "value", "out"))
    heads = []
    for i in range(HEADS):
        rows = slice(i * WIDTH, (i + 1) * WIDTH)
        queries = tokens @ q.weight[rows].T + q.bias[rows]  # (M, L, f)
        keys = prototypes @ k.weight[rows].T + k.bias[rows]  # (K, f)
        values = prototypes @ v.weight[rows].T + v.bias[rows]
        scores = (queries @ keys.T / WIDTH**0.5).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ values)
    return torch.cat(heads, dim=-1) @ out.weight.T + out.bias


def test_against_softmax_attention(built) -> None:
    layer, tokens, prototypes = built
    torch.testing.assert_close(layer(tokens, *layer.keys_values(prototypes)), written_out(layer, tokens, prototypes))


def test_gradients_and_the_exact_zero(built) -> None:
    """Softmax takes the keys' bias out again, so its gradient is zero, exactly; the others are those of
    automatic differentiation over the written-out form."""
    layer, tokens, prototypes = built
    found = torch.autograd.grad(layer(tokens, *layer.keys_values(prototypes)).square().sum(), layer.parameters())
    expected = torch.autograd.grad(written_out(layer, tokens, prototypes).square().sum(), layer.parameters())
    for (name, _), a, b in zip(layer.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-9, atol=1e-12)
        if name == "key_projection.bias":
            assert (a == 0).all()


def test_attention_dropout_in_training_only(built) -> None:
    layer, tokens, prototypes = built
    made = layer.keys_values(prototypes)
    calm = layer(tokens, *made)
    torch.testing.assert_close(layer(tokens, *made), calm)
    layer.train()
    assert ATTENTION_DROPOUT == 0.1 and not torch.allclose(layer(tokens, *made), calm)


def test_the_formula_is_scaled_dot_product_attention() -> None:
    torch.manual_seed(1)
    operands = [torch.randn(1, HEADS, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (M * L, K, K)]
    found, expected = attend(*operands, 0.0), F.scaled_dot_product_attention(*operands)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), operands) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_dropout_of_the_formula_drops_weights_and_scales_the_rest() -> None:
    """Equal scores and unit vectors as values: what comes out is the weights, 0 or 1/K / (1 - rate)."""
    torch.manual_seed(2)
    values = torch.eye(8, dtype=torch.float64)[None, None]
    weights = attend(torch.zeros(1, 1, 5000, 8, dtype=torch.float64), torch.zeros_like(values), values, 0.25)
    kept = weights != 0
    torch.testing.assert_close(weights, kept.double() / 8 / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.01
