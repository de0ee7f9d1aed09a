"""The layer that maps the vocabulary onto the text prototypes (Time-LLM, section 3.1).

Its weight W has a row a prototype and a column a word: for Qwen2.5-3B 1000 x 151,936, nearly all that is trained.
"""

from collections.abc import Iterator

import torch
from torch import nn

BLOCK_BYTES = 2**26  # of a block of rows of W's gradient


class MappingLayer(nn.Linear):
    """W·E + b `[K, D]` of frozen word embeddings E `[V, D]`; the gradient of W is kept in two factors.

    dW = G·Eᵀ, where G `[K, D]` is the gradient of W·E: V / D times smaller. A backward pass leaves G in
    `row_gradient`, and None in `weight.grad`. An optimizer that works on rows asks for one block of dW after
    the other (`gradient_blocks`), another one for all of it (`form_gradient`).

    Attributes:
        row_gradient: G, summed over the backward passes since it was last None; in W's type.
    """

    def __init__(self, vocabulary: int, prototypes: int):
        super().__init__(vocabulary, prototypes)
        self.row_gradient: torch.Tensor | None = None
        self._embeddings: list[torch.Tensor] = []  # those of the last forward pass; in a list, where nn.Module does not look

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """E `[V, D]` -> W·E + b `[K, D]`, multiplied in E's type, in W's type."""
        self._embeddings[:] = [embeddings]
        return _Mapped.apply(self.weight, embeddings, self) + self.bias.to(embeddings.device)[:, None]

    def gradient_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of W and their gradient `[rows, V]`, block after block."""
        G = self.row_gradient
        if G is None:
            return
        (E,) = self._embeddings
        K, V = self.weight.shape
        # Whole multiples of 16 rows, so that every block begins where the processor's vectors do.
        rows = max(16, BLOCK_BYTES // (V * self.weight.element_size()) // 16 * 16)
        for start in range(0, K, rows):
            block = slice(start, min(start + rows, K))
            yield block, (G[block].to(E.dtype) @ E.t()).to(self.weight.dtype)

    def form_gradient(self) -> None:
        """Give `weight.grad` its value, for who cannot work on blocks, and forget G."""
        if self.row_gradient is not None:
            self.weight.grad = torch.cat([block for _, block in self.gradient_blocks()])
            self.row_gradient = None


class _Mapped(torch.autograd.Function):
    """W·E `[K, D]`, whose backward pass leaves the gradient of the product with the layer."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, embeddings: torch.Tensor, layer: MappingLayer) -> torch.Tensor:
        ctx.layer = layer
        return (weight.to(embeddings.device, embeddings.dtype) @ embeddings).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        held = ctx.layer.row_gradient
        ctx.layer.row_gradient = gradient if held is None else held + gradient
        return None, None, None
