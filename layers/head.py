"""The linear head that reads a forecast off the patch positions (Time-LLM, section 3.1)."""

import torch
from torch import nn


class FlattenHead(nn.Module):
    """Flatten the first `d_ff` features of all patches, feature-major, and map them to the horizon."""

    def __init__(self, d_ff: int, patches: int, pred_len: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(d_ff * patches, pred_len)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[M, L, f]` hidden states -> `[M, H]` forecast on the normalised scale."""
        return self.dropout(self.linear(hidden.transpose(1, 2).flatten(1)))
