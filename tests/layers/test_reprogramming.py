"""Reprogramming against softmax attention written out."""

import pytest
import torch

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


def test_dropout_of_the_formula_drops_weights_and_scales_the_rest() -> None:
    """Equal scores and unit vectors as values: what comes out is the weights, 0 or 1/K / (1 - rate)."""
    torch.manual_seed(2)
    values = torch.eye(8, dtype=torch.float64)[None, None]
    weights = attend(torch.zeros(1, 1, 5000, 8, dtype=torch.float64), torch.zeros_like(values), values, 0.25)
    kept = weights != 0
    torch.testing.assert_close(weights, kept.double() / 8 / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.01


def test_outputs_gradients_and_the_exact_zero(built) -> None:
    """Softmax takes the keys' bias out again, so its gradient is zero, exactly; the others are those of
    automatic differentiation over the written-out form."""
    layer, tokens, prototypes = built
    found, expected = layer(tokens, *layer.keys_values(prototypes)), written_out(layer, tokens, prototypes)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), layer.parameters()) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = dict(zip(dict(layer.named_parameters()), ours, strict=True))
    assert (gradients["key_projection.bias"] == 0).all()


def test_attention_dropout_in_training_only(built) -> None:
    layer, tokens, prototypes = built
    made = layer.keys_values(prototypes)
    calm, again, dropped = layer(tokens, *made), layer(tokens, *made), layer.train()(tokens, *made)
    torch.testing.assert_close(again, calm)
    assert ATTENTION_DROPOUT == 0.1 and not torch.allclose(dropped, calm)
