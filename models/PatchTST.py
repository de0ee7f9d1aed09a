"""PatchTST: A Time Series is Worth 64 Words (Nie et al., ICLR 2023), the supervised model.

Read beside section 3.1 of the paper. Shapes: M sequences, T = seq_len,
H = pred_len, P = patch_len, S = stride, L patches, d = d_model, h = n_heads.
"""

from argparse import Namespace

import torch
from torch import nn
from torch.nn import functional as F

from data_provider.batches import Batch
from layers.norm import BatchNorm, instance_norm
from layers.patch import FlattenHead, patch_count
from models.base import ForecastModel


class Model(ForecastModel):
    """A Transformer encoder over the patches of one channel, with the same weights for all channels."""

    whole_batches = True  # its batch normalisation sees all of them

    def __init__(self, configs: Namespace):
        super().__init__()
        self.patch_len, self.stride = configs.patch_len, configs.stride
        patches = patch_count(configs.seq_len, configs.patch_len, configs.stride)
        self.patch_embedding = nn.Linear(configs.patch_len, configs.d_model)
        self.position = nn.Parameter(torch.empty(patches, configs.d_model).uniform_(-0.02, 0.02))  # (L, d)
        self.dropout = nn.Dropout(configs.dropout)
        self.encoder = nn.Sequential(
            *(EncoderLayer(configs.d_model, configs.n_heads, configs.d_ff, configs.dropout) for _ in range(configs.e_layers))
        )
        self.head = FlattenHead(configs.d_model, patches, configs.pred_len, 0.0, configs.head_dropout)

    # M sequences -> forecasts `[M, H]`.
    def forward(self, batch: Batch, prototype_kv=None) -> torch.Tensor:
        z, mean, std = instance_norm(batch.x)  # (M, T), (M, 1), (M, 1)
        padded = torch.cat([z, z[:, -1:].expand(-1, self.stride)], dim=1)  # (M, T + S), the last value S times more
        tokens = self.patch_embedding(padded.unfold(1, self.patch_len, self.stride))  # (M, L, P) -> (M, L, d)
        hidden = self.encoder(self.dropout(tokens + self.position))  # (M, L, d)
        return self.head(hidden) * std + mean


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each added to its input and then batch-normalised.

    A bias stands only where it can do something: softmax takes that of the keys out again, and batch normalisation a
    constant that the values, the output or the feed-forward block's end would add.
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model, bias=False)
        self.value_projection = nn.Linear(d_model, d_model, bias=False)
        self.out_projection = nn.Linear(d_model, d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model, bias=False)
        )  # fmt: skip
        self.attention_norm = BatchNorm(d_model)
        self.feed_forward_norm = BatchNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    # `[M, L, d]` -> `[M, L, d]`.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A feature's mean and variance are those over all patches of all sequences.
        x = self.attention_norm((x + self.dropout(self.attention(x))).transpose(1, 2)).transpose(1, 2)
        return self.feed_forward_norm((x + self.dropout(self.feed_forward(x))).transpose(1, 2)).transpose(1, 2)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """softmax(Q·Kᵀ / sqrt(d / h))·V of each head, all patches of a sequence seeing all: `[M, L, d]` -> `[M, L, d]`."""
        queries, keys, values = (
            projection(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # (M, h, L, d / h)
            for projection in (self.query_projection, self.key_projection, self.value_projection)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # (M, h, L, d / h)
        return self.out_projection(mixed.transpose(1, 2).flatten(2))
