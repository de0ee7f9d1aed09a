"""Trend and season against loops over the steps; auto-correlation against direct sums and rolled series."""

import numpy as np
import pytest
import torch

from layers.autoformer import AutoCorrelation, decompose


def direct_correlation(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Every delay by itself: `[B, L, d]` twice -> `[B, L]`."""
    delays = range(queries.shape[1])
    return torch.stack([(torch.roll(queries, -delay, dims=1) * keys).mean(2).sum(1) for delay in delays], dim=1)


def rolled_sum(values: torch.Tensor, scores: torch.Tensor, delays: list[list[int]]) -> torch.Tensor:
    """Series by series, delay by delay."""
    out = torch.zeros_like(values)
    for b, chosen in enumerate(delays):
        weights = scores[b, chosen].softmax(0)
        for weight, delay in zip(weights, chosen, strict=True):
            out[b] += weight * torch.roll(values[b], -delay, dims=0)
    return out


def series(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("source_length", [10, 16, 6], ids=["as long", "longer", "shorter"])
@pytest.mark.parametrize("factor", [1, 9], ids=["some delays", "all delays"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_layer_against_loops(training: bool, source_length: int, factor: int) -> None:
    torch.manual_seed(0)
    layer = AutoCorrelation(4, factor).double().train(training)
    x, source = series(3, 10, 4), series(3, source_length, 4, seed=1)
    padded = torch.zeros(3, 10, 4, dtype=torch.float64)
    padded[:, : min(source_length, 10)] = source[:, :10]
    W = {name.removesuffix("_projection.weight"): weight.detach() for name, weight in layer.named_parameters()}
    queries, keys, values = x @ W["query"].T, padded @ W["key"].T, padded @ W["value"].T
    scores = direct_correlation(queries, keys)
    ranked = scores.mean(dim=0).expand(3, -1) if training else scores
    delays = [
        sorted(range(10), key=lambda delay, row=row: -float(row[delay]))[: 2 * factor] for row in ranked
    ]  # floor(ln 10) = 2
    torch.testing.assert_close(layer(x, source), rolled_sum(values, scores, delays) @ W["out"].T)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    layer = AutoCorrelation(2, factor=1).double()
    x = series(2, 8, 2).requires_grad_()
    source = series(2, 8, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, source))
    layer(x, source).square().sum().backward()  # the plain sum does not see a roll
    assert all(weight.grad is not None and weight.grad.abs().max() > 1e-6 for weight in layer.parameters())


@pytest.mark.parametrize(("steps", "kernel"), [(20, 5), (20, 1), (7, 25), (12, 4), (1, 3)])
def test_moving_average_by_hand(steps: int, kernel: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, steps, 3))
    expected = np.zeros_like(x)
    for t in range(steps):
        for offset in range(-((kernel - 1) // 2), kernel // 2 + 1):
            expected[:, t] += x[:, min(max(t + offset, 0), steps - 1)] / kernel
    np.testing.assert_allclose(decompose(torch.from_numpy(x), kernel)[1].numpy(), expected, atol=1e-12)
