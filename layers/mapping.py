"""The layer that maps the vocabulary onto the text prototypes (Time-LLM, section 3.1).

Its weight W has a value for each prototype and word: for Qwen2.5-3B 1000 x 151,936, nearly all that is trained.
Shapes: V words, D the language model's width, K text prototypes.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from layers.fast.linear import product
from layers.fp16 import shrink

# Of a block of words of W and of its gradient: on the CPU the gradient lies in the cache when the optimizer reads it.
CPU_BLOCK_BYTES, BLOCK_BYTES = 2**21, 2**26


class MappingLayer(nn.Module):
    """W·E + b `[K, D]` of frozen token embeddings E `[V, D]`, whose weight's gradient may be kept in two factors.

    dWᵀ = E·Gᵀ, where G `[K, D]` is the gradient of W·E: V / D times smaller. With `factored`, which an optimizer sets
    that steps blocks of words, a backward pass leaves G in `gradient_factor` and None in `weight.grad`, and that
    optimizer asks for one block of dWᵀ after the other (`gradient_blocks`). Without it the layer is as any other.

    Attributes:
        weight: Wᵀ `[V, K]`, where the rows of a block of words lie together; `[K, V]`, a view, in a state dict.
        gradient_factor: G, summed over the backward passes since it was last None; in W's type.
    """

    def __init__(self, vocabulary: int, prototypes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, prototypes))
        self.bias = nn.Parameter(torch.empty(prototypes))
        self.factored = False
        self.gradient_factor: torch.Tensor | None = None
        self._embeddings: list[torch.Tensor] = []  # those of the last forward pass; in a list, where nn.Module does not look
        with torch.no_grad():  # as nn.Linear(vocabulary, prototypes) draws them
            for some in self.weight.split(64, dim=1):
                some.copy_(nn.init.kaiming_uniform_(some.new_empty(some.shape[1], vocabulary), a=math.sqrt(5)).t())
            self.bias.uniform_(-(vocabulary**-0.5), vocabulary**-0.5)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if (held := state_dict.get(f"{prefix}weight")) is not None:
            state_dict[f"{prefix}weight"] = held.t()  # load_state_dict works on a copy
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, embeddings: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """E `[V, D]` -> scale·W·E + b `[K, D]`, multiplied in E's type, in W's type."""
        self._embeddings[:] = [embeddings]
        mapped = _Mapped.apply(self.weight, embeddings, self)
        if scale != 1:
            mapped = mapped * scale
        return mapped + self.bias.to(embeddings.device)[:, None]

    def gradient_blocks(self, G: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some words after the other, and their rows of E·Gᵀ `[words, K]`, multiplied in E's type, in W's type; the scale
        of `forward` is in G."""
        E, scale = self._embeddings[0], None
        if E.dtype == torch.float16:  # whose range a gradient may leave
            G, scale = shrink(G)  # (K, D), (K, 1)
        other = G.to(E.device, E.dtype).t()  # (D, K)
        size = _block_size(self.weight, E.device)
        for start in range(0, len(self.weight), size):
            words = slice(start, min(start + size, len(self.weight)))
            block = _times(E[words], other).to(self.weight.dtype)
            yield words, block if scale is None else block.mul_(scale.t())


# W·E `[K, D]`, multiplied in E's type, in W's type; its backward pass leaves the gradient of the product with the layer,
# where that is factored.
class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, embeddings: torch.Tensor, layer: MappingLayer) -> torch.Tensor:
        ctx.layer = layer
        # Some words at a time: a copy of W in E's type never exists as a whole, and the sums over them are as exact as W.
        size = _block_size(weight, embeddings.device)
        out = torch.zeros(weight.shape[1], embeddings.shape[1], dtype=weight.dtype, device=embeddings.device)
        for some, E in zip(weight.split(size), embeddings.split(size), strict=True):
            out += _times(some.t(), E)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        layer = ctx.layer
        if layer.factored:
            held = layer.gradient_factor
            layer.gradient_factor = gradient if held is None else held + gradient
            return None, None, None
        whole = torch.empty_like(layer.weight)
        for words, block in layer.gradient_blocks(gradient):
            whole[words] = block
        return whole, None, None


# Words of a block: some rows of `weight` `[V, K]`, where the processor's vectors and the GPU's tiles are full.
def _block_size(weight: torch.Tensor, device: torch.device) -> int:
    words = (CPU_BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES) // (weight.shape[1] * weight.element_size())
    return max(128, words // 128 * 128)


# a `[m, k]` times b `[k, n]`, where b is and in its type; on a GPU the float32 sums that half precision has there.
def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.to(b.device, b.dtype)
    if b.device.type == "cuda" and b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a, b.t())
