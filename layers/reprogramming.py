"""Text prototypes and the cross-attention that reprograms patches (Time-LLM, section 3.1)."""

import torch
from torch import nn
from torch.nn import functional as F

from layers.dropout_attention import DropoutAttention

ATTENTION_DROPOUT = 0.1


class ReprogrammingLayer(nn.Module):
    """Multi-head cross-attention: patches ask, text prototypes answer, in the backbone's space.

    Each of the `n_heads` heads is `d_keys` wide. The prototypes are the same for every patch of
    every series, so their keys and values are made once (`keys_values`) and used for all.
    """

    def __init__(self, d_model: int, n_heads: int, d_keys: int, d_llm: int):
        super().__init__()
        self.n_heads = n_heads
        self.query_projection = nn.Linear(d_model, n_heads * d_keys)
        self.key_projection = nn.Linear(d_llm, n_heads * d_keys)
        self.value_projection = nn.Linear(d_llm, n_heads * d_keys)
        self.out_projection = nn.Linear(n_heads * d_keys, d_llm)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, h*f]` -> `[1, h, rows, f]`."""
        return x.view(1, x.shape[0], self.n_heads, -1).transpose(1, 2)

    def keys_values(self, prototypes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prototypes `[K, D]` -> keys and values, each `[1, h, K, f]`.

        The keys' bias adds the same number to all scores of a query, which softmax takes out again: its
        true gradient is zero. What automatic differentiation finds is rounding, which Adam would blow up
        to full steps. So the gradient is made what it is, an exact zero.
        """
        bias = self.key_projection.bias
        keys = F.linear(prototypes, self.key_projection.weight, bias.detach() + 0 * bias)
        return self._heads(keys), self._heads(self.value_projection(prototypes))

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Patch tokens `[M, L, d]` -> reprogrammed patches `[M, L, D]`."""
        M, L, _ = tokens.shape
        # All patches of all series are queries of one attention over the shared prototypes.
        queries = self._heads(self.query_projection(tokens).flatten(0, 1))  # (1, h, M*L, f)
        mixed = self.attend(queries, keys, values, ATTENTION_DROPOUT if self.training else 0.0)
        return self.out_projection(mixed.transpose(1, 2).reshape(M, L, -1))

    @staticmethod
    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dropout: float) -> torch.Tensor:
        """Scaled dot-product attention: queries `[1, h, M*L, f]`, keys and values `[1, h, K, f]`."""
        if dropout and queries.device.type == "cpu":
            operands = (t[0].contiguous() for t in (queries, keys, values))
            return DropoutAttention.apply(*operands, dropout)[None]
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
