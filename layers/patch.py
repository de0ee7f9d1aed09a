"""Patches of a series as tokens, and the head behind them (Time-LLM, section 3.1; PatchTST, Nie et al., ICLR 2023)."""

import torch
from torch import nn


def patch_count(seq_len: int, patch_len: int, stride: int) -> int:
    """Number of patches L of a series of `seq_len` steps, padded at its end by one stride."""
    return (seq_len - patch_len) // stride + 2


class TokenEmbedding(nn.Module):
    """Bias-free circular convolution of width 3 along the patches: patch_len -> d_model."""

    def __init__(self, patch_len: int, d_model: int):
        super().__init__()
        self.tokenConv = nn.Conv1d(patch_len, d_model, kernel_size=3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, mode="fan_in", nonlinearity="leaky_relu")

    # `[M, L, P]` patches -> `[M, L, d]` tokens.
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.tokenConv(patches.transpose(1, 2)).transpose(1, 2)


class PatchEmbedding(nn.Module):
    """Cut each series into overlapping patches and embed them.

    The last value is repeated `stride` times at the end, so that the last patch ends after the
    series does and no step is left out.
    """

    def __init__(self, patch_len: int, stride: int, d_model: int, dropout: float):
        super().__init__()
        self.patch_len, self.stride = patch_len, stride
        self.value_embedding = TokenEmbedding(patch_len, d_model)
        self.dropout = nn.Dropout(dropout)

    # `[M, T]` normalised series -> `[M, L, d]` patch tokens.
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([z, z[:, -1:].expand(-1, self.stride)], dim=1)  # (M, T + S)
        patches = padded.unfold(1, self.patch_len, self.stride)  # (M, L, P), a view
        return self.dropout(self.value_embedding(patches))


class FlattenHead(nn.Module):
    """Flatten the first `d_ff` features of all patches, feature-major, and map them to the horizon.

    Of the features `feature_dropout` drop out in training, of the forecast's values `dropout`, as in the published head.
    """

    def __init__(self, d_ff: int, patches: int, pred_len: int, dropout: float, feature_dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(d_ff * patches, pred_len)
        self.dropout, self.feature_dropout = nn.Dropout(dropout), nn.Dropout(feature_dropout)

    # `[M, L, f]` hidden states -> `[M, H]` forecast on the normalised scale.
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(self.feature_dropout(hidden.transpose(1, 2).flatten(1))))
