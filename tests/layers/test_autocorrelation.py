"""Auto-correlation against direct sums, and its aggregation against rolled series."""

import pytest
import torch

from layers.autocorrelation import AutoCorrelation, aggregate, correlation, delay_count


def direct_correlation(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Every delay and every step by itself: `[B, L, d]` twice -> `[B, L]`."""
    B, L, _ = queries.shape
    out = torch.zeros(B, L, dtype=queries.dtype)
    for delay in range(L):
        for t in range(L):
            out[:, delay] += (queries[:, (t + delay) % L] * keys[:, t]).mean(dim=1)
    return out


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


@pytest.mark.parametrize("length", [2, 11, 12])
def test_correlation_is_the_direct_sum(length: int) -> None:
    queries, keys = series(3, length, 4), series(3, length, 4, seed=1)
    torch.testing.assert_close(correlation(queries, keys), direct_correlation(queries, keys))


def test_correlation_peaks_at_the_period() -> None:
    wave = torch.sin(2 * torch.pi * torch.arange(48) / 12)[None, :, None]
    best = correlation(wave, wave)[0].topk(4).indices
    assert set(best.tolist()) == {0, 12, 24, 36}


def test_correlation_of_half_precision_is_computed_in_float32() -> None:
    x = series(1, 10, 3).bfloat16()
    assert correlation(x, x).dtype == torch.float32
    torch.testing.assert_close(correlation(x, x), correlation(x.float(), x.float()))


def test_aggregate_is_a_weighted_sum_of_rolled_values() -> None:
    values, scores = series(3, 9, 2), series(3, 9, seed=1)
    delays = [[0, 8, 3], [5, 2, 1], [7, 4, 6]]
    torch.testing.assert_close(aggregate(values, scores, torch.tensor(delays)), rolled_sum(values, scores, delays))


@pytest.mark.parametrize(
    ("length", "factor", "count"), [(96, 1, 4), (96, 3, 13), (144, 1, 4), (144, 3, 14), (2, 1, 1), (1, 1, 1), (3, 9, 3)]
)
def test_delay_count(length: int, factor: int, count: int) -> None:
    assert delay_count(length, factor) == count


@pytest.mark.parametrize("source_length", [10, 16, 6], ids=["as long", "longer", "shorter"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_layer_against_loops(training: bool, source_length: int) -> None:
    torch.manual_seed(0)
    layer = AutoCorrelation(4, factor=1).double().train(training)
    x, source = series(3, 10, 4), series(3, source_length, 4, seed=1)
    padded = torch.zeros(3, 10, 4, dtype=torch.float64)
    padded[:, : min(source_length, 10)] = source[:, :10]
    W = {name.removesuffix("_projection.weight"): weight.detach() for name, weight in layer.named_parameters()}
    queries, keys, values = x @ W["query"].T, padded @ W["key"].T, padded @ W["value"].T
    scores = direct_correlation(queries, keys)
    ranked = scores.mean(dim=0).expand(3, -1) if training else scores
    delays = [sorted(range(10), key=lambda delay, row=row: -float(row[delay]))[:2] for row in ranked]  # floor(ln 10) = 2
    torch.testing.assert_close(layer(x, source), rolled_sum(values, scores, delays) @ W["out"].T)


def test_a_series_has_its_own_delays_in_inference_and_shares_them_in_training() -> None:
    torch.manual_seed(0)
    layer = AutoCorrelation(4, factor=1).double()
    x = series(4, 24, 4)
    alone = torch.cat([layer.eval()(row, row) for row in x.split(1)])
    torch.testing.assert_close(layer(x, x), alone)
    assert not torch.allclose(layer.train()(x, x), alone)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    layer = AutoCorrelation(2, factor=1).double()
    x = series(2, 8, 2).requires_grad_()
    source = series(2, 8, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, source))
    layer(x, source).square().sum().backward()  # the plain sum does not see a roll
    assert all(weight.grad is not None and weight.grad.abs().max() > 1e-6 for weight in layer.parameters())


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors on the meta device have no values: to ask for one is an error."""
    layer = AutoCorrelation(4, factor=2).to("meta").train()
    out = layer(torch.randn(2, 12, 4, device="meta"), torch.randn(2, 9, 4, device="meta"))
    out.sum().backward()
    assert out.shape == (2, 12, 4)
