"""Patches by hand, and their embedding against a convolution written out."""

import pytest
import torch

from layers.patch import PatchEmbedding, TokenEmbedding, patch_count


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


def test_embedding_starts_kaiming_normal_without_bias() -> None:
    torch.manual_seed(0)
    embedding = TokenEmbedding(patch_len=16, d_model=512)
    assert [name for name, _ in embedding.named_parameters()] == ["tokenConv.weight"]
    gain = (2 / (1 + 0.01**2)) ** 0.5  # leaky ReLU with PyTorch's slope of 0.01
    assert embedding.tokenConv.weight.std().item() == pytest.approx(gain / (16 * 3) ** 0.5, rel=0.02)


def test_dropout_in_training_only() -> None:
    embedding = PatchEmbedding(4, 2, d_model=64, dropout=0.5)
    z = torch.randn(1, 20)
    assert 0.3 < (embedding.train()(z) == 0).float().mean() < 0.7
    assert not (embedding.eval()(z) == 0).any()
