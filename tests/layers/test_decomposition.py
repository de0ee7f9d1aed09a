"""Trend and season against loops over the steps."""

import numpy as np
import pytest
import torch

from layers.decomposition import SeasonalNorm, decompose, moving_average


@pytest.mark.parametrize(("steps", "kernel"), [(20, 5), (20, 1), (7, 25), (12, 4), (1, 3)])
def test_moving_average_by_hand(steps: int, kernel: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, steps, 3))
    expected = np.zeros_like(x)
    for t in range(steps):
        for offset in range(-((kernel - 1) // 2), kernel // 2 + 1):
            expected[:, t] += x[:, min(max(t + offset, 0), steps - 1)] / kernel
    np.testing.assert_allclose(moving_average(torch.from_numpy(x), kernel).numpy(), expected, atol=1e-12)


def test_an_average_over_a_period_leaves_the_line_below_it() -> None:
    t = torch.arange(60, dtype=torch.float64)
    line, wave = 0.5 * t + 3, torch.sin(2 * torch.pi * t / 5)
    season, trend = decompose((line + wave)[None, :, None], 5)
    torch.testing.assert_close(trend[0, 2:-2, 0], line[2:-2])  # the ends see repeated values
    torch.testing.assert_close(season[0, 2:-2, 0], wave[2:-2])


def test_season_and_trend_add_up() -> None:
    x = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    season, trend = decompose(x, 7)
    torch.testing.assert_close(season + trend, x)
    season, trend = decompose(torch.full((1, 9, 1), 4.0), 3)
    assert (season == 0).all() and (trend == 4).all()


def test_seasonal_norm_by_hand() -> None:
    torch.manual_seed(0)
    norm = SeasonalNorm(6).double()
    torch.nn.init.normal_(norm.norm.weight)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    values = x.numpy()
    z = (values - values.mean(2, keepdims=True)) / np.sqrt(values.var(2, keepdims=True) + 1e-5)
    z = z * norm.norm.weight.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), z - z.mean(1, keepdims=True), atol=1e-12)
    assert [name for name, _ in norm.named_parameters()] == ["norm.weight"]
