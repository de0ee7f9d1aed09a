"""Normalisation against numpy, and the count of patches; their embedding stands in the test of the whole model."""

import numpy as np
import pytest
import torch

from layers.norm import instance_norm
from layers.patch import PatchEmbedding, patch_count


@pytest.mark.parametrize(
    ("seq_len", "patch_len", "stride", "patches"),
    [
        (512, 16, 8, 64),
        (96, 16, 8, 12),
        (16, 16, 8, 2),
        (17, 16, 8, 2),
        (24, 16, 8, 3),
        (10, 4, 3, 4),
        (5, 5, 9, 2),
    ],
)
def test_patch_count(seq_len: int, patch_len: int, stride: int, patches: int) -> None:
    assert patch_count(seq_len, patch_len, stride) == patches
    embedding = PatchEmbedding(patch_len, stride, d_model=3, dropout=0.0)
    assert embedding(torch.randn(2, seq_len)).shape == (2, patches, 3)


def test_normalisation_against_numpy() -> None:
    """Also where values are missing, which must not count; a constant series becomes zeros."""
    x = np.random.default_rng(0).normal(3, 7, (4, 50))
    x[2] = 7.25
    for first in (0, 20):
        mask = torch.ones(4, 50)
        mask[:, :first] = 0
        z, mean, std = instance_norm(torch.from_numpy(x), mask if first else None)
        kept = x[:, first:]
        spread = np.sqrt(kept.var(axis=1, ddof=0, keepdims=True) + 1e-5)
        np.testing.assert_allclose(mean.numpy(), kept.mean(axis=1, keepdims=True), rtol=1e-12)
        np.testing.assert_allclose(std.numpy(), spread, rtol=1e-12)
        np.testing.assert_allclose(z.numpy()[:, first:], (kept - mean.numpy()) / spread, rtol=1e-10, atol=1e-12)
        assert (z[:, :first] == 0).all() and (z[2] == 0).all()
