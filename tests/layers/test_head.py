"""The head flattens feature-major."""

import torch

from layers.head import FlattenHead


def test_feature_major_by_hand() -> None:
    head = FlattenHead(d_ff=2, patches=3, pred_len=6, dropout=0.0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(6))
        head.linear.bias.copy_(torch.arange(6.0) * 100)
    hidden = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])  # (1, L, f)
    # feature 0 of all patches, then feature 1 of all patches
    assert head(hidden).tolist() == [[1, 102, 203, 310, 420, 530]]


def test_dropout_in_training_only() -> None:
    head = FlattenHead(2, 3, pred_len=400, dropout=0.5)
    hidden = torch.randn(1, 3, 2)
    assert 0.3 < (head.train()(hidden) == 0).float().mean() < 0.7
    assert not (head.eval()(hidden) == 0).any()
