"""The layer that maps the vocabulary onto the text prototypes (Time-LLM, section 3.1).

Its weight W has a row a prototype and a column a word: for Qwen2.5-3B 1000 x 151,936, nearly all that is trained.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from layers.half import shrink
from layers.ranks import Rows, rows_of

QUANTISED = 256  # values that 8-bit AdamW's moments have a common scale for
BLOCK_BYTES = 2**26  # of a block of rows of W's gradient


class MappingLayer(nn.Linear):
    """W·E + b `[K, D]` of frozen word embeddings E `[V, D]`, whose weight's gradient may be kept in two factors.

    dW = G·Eᵀ, where G `[K, D]` is the gradient of W·E: V / D times smaller. With `factored`, which an optimizer sets
    that works on rows, a backward pass leaves G in `row_gradient` and None in `weight.grad`, and that optimizer asks
    for one block of dW after the other (`gradient_blocks`). Without it the layer is as any other.

    In a group of processes each may hold some rows of W (`split`), and then W·E + b has these rows alone.

    Attributes:
        row_gradient: G, summed over the backward passes since it was last None; in W's type.
        rows: those that this process holds of W, where it is split; b is whole in every process.
    """

    def __init__(self, vocabulary: int, prototypes: int):
        super().__init__(vocabulary, prototypes)
        self.factored = False
        self.row_gradient: torch.Tensor | None = None
        self.rows: Rows | None = None
        self._embeddings: list[torch.Tensor] = []  # those of the last forward pass; in a list, where nn.Module does not look

    def split(self, rank: int, world: int, quantised: bool = False) -> None:
        """Keep the rows of process `rank` alone. A state dict that is loaded may have all rows, or these.

        Args:
            quantised: moments are in 8 bits. Their blocks must not go over a border between processes, where they would
                have other scales than one process gives them.
        """
        K, V = self.weight.shape
        self.rows = rows_of(K, rank, world, rows_together(V) if quantised else 1)
        self.weight = nn.Parameter(self.weight.detach()[self.rows.start : self.rows.stop].clone())

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        held = state_dict.get(f"{prefix}weight")
        if self.rows is not None and held is not None and len(held) == self.rows.total:
            state_dict[f"{prefix}weight"] = held[self.rows.start : self.rows.stop]  # load_state_dict works on a copy
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, embeddings: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """E `[V, D]` -> scale·W·E + b `[K, D]`, multiplied in E's type, in W's type."""
        self._embeddings[:] = [embeddings]
        product = _Mapped.apply(self.weight, embeddings, self)
        if scale != 1:
            product = product * scale
        bias = self.bias if self.rows is None else self.bias[self.rows.start : self.rows.stop]
        return product + bias.to(embeddings.device)[:, None]

    @torch.no_grad()
    def once(self, embeddings: torch.Tensor, scale: float, device: torch.device) -> torch.Tensor:
        """What `forward` gives, where it is asked for once: E may lie elsewhere than the device that can multiply.

        In half precision the device is given a block of words at a time. No gradient; the result is on some device.
        """
        product = _multiply(self.weight, embeddings, device) * scale
        return product + self.bias.to(product.device)[:, None]

    def gradient_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of W and their gradient `[rows, V]`, block after block."""
        G = self.row_gradient
        if G is None:
            return
        (E,) = self._embeddings
        K, V = self.weight.shape
        # Whole multiples of 16 rows, so that every block begins where the processor's vectors do; of a GPU's tiles 128.
        multiple = 128 if E.device.type == "cuda" else 16
        rows = max(multiple, BLOCK_BYTES // (V * self.weight.element_size()) // multiple * multiple)
        for start in range(0, K, rows):
            block = slice(start, min(start + rows, K))
            yield block, _gradient_times(G[block], E.t()).to(self.weight.dtype)


def rows_together(vocabulary: int) -> int:
    """How many rows of W, or a multiple, make whole blocks of 8-bit moments."""
    return QUANTISED // math.gcd(vocabulary, QUANTISED)


def _multiply(weight: torch.Tensor, embeddings: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """W·E `[K, D]`, multiplied in E's type, in W's type; on a GPU in half precision, else where E is."""
    device = device or embeddings.device
    if not _gives_float32(device, embeddings.dtype):
        return _times(weight, embeddings).to(weight.dtype)
    # Some words at a time: a copy of W in E's type never exists as a whole, and the sums over them are float32.
    words = max(1, BLOCK_BYTES // (len(weight) * embeddings.element_size()))
    out = torch.zeros(len(weight), embeddings.shape[1], device=device)
    for some, E in zip(weight.split(words, dim=1), embeddings.split(words), strict=True):
        out += _times(some, E.to(device))
    return out.to(weight.dtype)


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a `[m, k]` times b `[k, n]`, multiplied in b's type, where b is; in float32 where a kernel gives that."""
    a = a.to(b.device, b.dtype)
    return torch.mm(a, b, out_dtype=torch.float32) if _gives_float32(b.device, b.dtype) else a @ b


def _gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of such matrices come as the float32 sums that they are made of."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _gradient_times(gradient: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`_times`; in fp16, whose range a gradient may leave, its rows are brought to size before."""
    if words.dtype != torch.float16:
        return _times(gradient, words)
    rows = shrink(gradient)
    return _times(rows.values, words).float().mul_(rows.size)


class _Mapped(torch.autograd.Function):
    """W·E `[K, D]`, whose backward pass leaves the gradient of the product with the layer, where that is factored."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, embeddings: torch.Tensor, layer: MappingLayer) -> torch.Tensor:
        ctx.layer, ctx.embeddings = layer, embeddings
        return _multiply(weight, embeddings)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        layer = ctx.layer
        if not layer.factored:
            return _gradient_times(gradient, ctx.embeddings.t()).to(layer.weight.dtype), None, None
        held = layer.row_gradient
        layer.row_gradient = gradient if held is None else held + gradient
        return None, None, None
