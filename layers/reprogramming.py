"""The cross-attention that reprograms patches into the language model's space (Time-LLM, section 3.1)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

ATTENTION_DROPOUT = 0.1

# queries [1, h, R, f], keys and values [1, h, K, f], rate of dropout -> [1, h, R, f]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dropout: float) -> torch.Tensor:
    """softmax(Q·Kᵀ / sqrt(f))·V, the paper's equation, with dropout of the attention weights.

    Args:
        queries: `[1, h, R, f]`, one for each of R patches; keys, values: `[1, h, K, f]`.
        dropout: the rate; 0 outside of training.

    Returns:
        `[1, h, R, f]`.
    """
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5  # (1, h, R, K)
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights @ values


class ReprogrammingLayer(nn.Module):
    """Multi-head cross-attention: patches ask, text prototypes answer, in the backbone's space.

    Each of the `n_heads` heads is `d_keys` wide. The prototypes are the same for every patch of
    every series, so their keys and values are made once (`keys_values`) and used for all.

    Attributes:
        attend: the attention itself, `attend` or what computes the same faster.
    """

    def __init__(self, d_model: int, n_heads: int, d_keys: int, d_llm: int, attend: Attend = attend):
        super().__init__()
        self.n_heads, self.attend = n_heads, attend
        self.query_projection = nn.Linear(d_model, n_heads * d_keys)
        self.key_projection = nn.Linear(d_llm, n_heads * d_keys)
        self.value_projection = nn.Linear(d_llm, n_heads * d_keys)
        self.out_projection = nn.Linear(n_heads * d_keys, d_llm)

    def keys_values(self, prototypes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prototypes `[K, D]` -> keys and values, each `[1, h, K, f]`."""
        # The keys' bias adds the same number to all scores of a query, which softmax takes out again: its true gradient
        # is zero. What automatic differentiation finds is rounding, which Adam would blow up to full steps.
        bias = self.key_projection.bias.detach() + 0 * self.key_projection.bias
        keys = F.linear(prototypes, self.key_projection.weight, bias)  # (K, h*f)
        values = self.value_projection(prototypes)  # (K, h*f)
        return self._heads(keys), self._heads(values)

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Patch tokens `[M, L, d]` -> reprogrammed patches `[M, L, D]`."""
        M, L, _ = tokens.shape
        # All patches of all series are queries of one attention over the shared prototypes.
        queries = self._heads(self.query_projection(tokens).flatten(0, 1))  # (1, h, M*L, f)
        mixed = self.attend(queries, keys, values, ATTENTION_DROPOUT if self.training else 0.0)  # (1, h, M*L, f)
        return self.out_projection(mixed.transpose(1, 2).reshape(M, L, -1))

    # `[rows, h*f]` -> `[1, h, rows, f]`.
    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(1, x.shape[0], self.n_heads, -1).transpose(1, 2)
