"""Instance normalisation is RevIN without affine parameters."""

import numpy as np
import torch

from layers.norm import instance_norm


def test_against_numpy() -> None:
    x = np.random.default_rng(0).normal(3, 7, (4, 50))
    z, mean, deviation = instance_norm(torch.from_numpy(x))
    spread = np.sqrt(x.var(axis=1, ddof=0, keepdims=True) + 1e-5)
    np.testing.assert_allclose(mean.numpy(), x.mean(axis=1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(deviation.numpy(), spread, rtol=1e-12)
    np.testing.assert_allclose(z.numpy(), (x - x.mean(axis=1, keepdims=True)) / spread, rtol=1e-10, atol=1e-12)


def test_a_constant_series_becomes_zeros() -> None:
    z, mean, deviation = instance_norm(torch.full((2, 32), 7.25))
    assert (z == 0).all() and (mean == 7.25).all()
    torch.testing.assert_close(deviation, torch.full((2, 1), 1e-5**0.5))


def test_undone_by_mean_and_deviation() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 100 - 20
    z, mean, deviation = instance_norm(x)
    torch.testing.assert_close(z * deviation + mean, x)
