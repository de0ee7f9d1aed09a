"""Normalisation, patches and head by hand, and the embedding against a convolution written out."""

import numpy as np
import pytest
import torch

from layers.norm import instance_norm
from layers.patch import FlattenHead, PatchEmbedding, TokenEmbedding, patch_count


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


def test_patches_by_hand() -> None:
    embedding = PatchEmbedding(patch_len=4, stride=3, d_model=4, dropout=0.0)
    seen = []
    embedding.value_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedding(torch.arange(1.0, 11.0)[None])
    # 1..10, the last value three times more, and a patch of 4 every 3
    assert seen[0].tolist() == [[[1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9, 10], [10, 10, 10, 10]]]


def test_embedding_is_a_circular_convolution() -> None:
    torch.manual_seed(0)
    embedding = TokenEmbedding(patch_len=5, d_model=3).double()
    patches = torch.randn(2, 7, 5, dtype=torch.float64)  # (M, L, P)
    weight = embedding.tokenConv.weight  # (d, P, 3)
    expected = torch.zeros(2, 7, 3, dtype=torch.float64)
    for place in range(7):
        for tap in range(3):
            expected[:, place] += patches[:, (place + tap - 1) % 7] @ weight[:, :, tap].T
    torch.testing.assert_close(embedding(patches), expected)


def test_feature_major_by_hand() -> None:
    head = FlattenHead(d_ff=2, patches=3, pred_len=6, dropout=0.0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(6))
        head.linear.bias.copy_(torch.arange(6.0) * 100)
    hidden = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])  # (1, L, f)
    # feature 0 of all patches, then feature 1 of all patches
    assert head(hidden).tolist() == [[1, 102, 203, 310, 420, 530]]


def test_against_numpy() -> None:
    x = np.random.default_rng(0).normal(3, 7, (4, 50))
    z, mean, std = instance_norm(torch.from_numpy(x))
    spread = np.sqrt(x.var(axis=1, ddof=0, keepdims=True) + 1e-5)
    np.testing.assert_allclose(mean.numpy(), x.mean(axis=1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), spread, rtol=1e-12)
    np.testing.assert_allclose(z.numpy(), (x - x.mean(axis=1, keepdims=True)) / spread, rtol=1e-10, atol=1e-12)


def test_a_constant_series_becomes_zeros() -> None:
    z, mean, std = instance_norm(torch.full((2, 32), 7.25))
    assert (z == 0).all() and (mean == 7.25).all()
    torch.testing.assert_close(std, torch.full((2, 1), 1e-5**0.5))
