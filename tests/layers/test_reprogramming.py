"""Reprogramming against softmax attention written out."""

import torch

from layers.reprogramming import ATTENTION_DROPOUT, ReprogrammingLayer

M, L, D, K, HEADS, WIDTH, MODEL = 2, 3, 10, 7, 4, 5, 6


def build() -> tuple[ReprogrammingLayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = ReprogrammingLayer(MODEL, HEADS, WIDTH, D).double().eval()
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


def test_against_softmax_attention() -> None:
    layer, tokens, prototypes = build()
    torch.testing.assert_close(
        layer(tokens, *layer.keys_values(prototypes)), written_out(layer, tokens, prototypes)
    )


def test_gradients_and_the_exact_zero() -> None:
    """Softmax takes the keys' bias out again, so its gradient is zero, exactly; the others are those of
    automatic differentiation over the written-out form."""
    layer, tokens, prototypes = build()
    found = torch.autograd.grad(
        layer(tokens, *layer.keys_values(prototypes)).square().sum(), layer.parameters()
    )
    expected = torch.autograd.grad(written_out(layer, tokens, prototypes).square().sum(), layer.parameters())
    for (name, _), a, b in zip(layer.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-9, atol=1e-12)
        if name == "key_projection.bias":
            assert (a == 0).all()


def test_attention_dropout_in_training_only() -> None:
    layer, tokens, prototypes = build()
    made = layer.keys_values(prototypes)
    calm = layer(tokens, *made)
    torch.testing.assert_close(layer(tokens, *made), calm)
    layer.train()
    assert ATTENTION_DROPOUT == 0.1 and not torch.allclose(layer(tokens, *made), calm)
