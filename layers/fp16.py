"""Half precision (fp16), for GPUs without bfloat16: what keeps its short range, 65,504, from being left.

The frozen layers' matrices are fp16, and so are the products with them. What runs between the layers, the residual
stream, and the norms are float32: a language model's stream reaches ten thousands at its first tokens. The product in
the middle of a gated feed-forward block goes beyond the range as well; it is brought to size row by row.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# Class names of transformers' modules with exactly the formula (act(x·Gᵀ) * x·Uᵀ)·Dᵀ.
GATED_MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}


def shrink(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 `[..., k]` -> rows of fp16 below 1, and their sizes `[..., 1]`, float32 powers of two. No gradient."""
    # A norm takes no memory of its own. A row of zeros stays one.
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).clamp(min=1e-30)
    size = largest / torch.frexp(largest).mantissa
    return (x / size).half(), size


def make_safe(model: PreTrainedModel) -> None:
    """Let a model that was read in fp16 take a float32 residual stream, and values of any size in its layers."""
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.float()
    child: Any
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            is_gated = type(child).__name__ in GATED_MLPS and model.config.hidden_act == "silu"
            if is_gated and child.down_proj.bias is None:
                setattr(parent, name, HalfMLP(child))


class HalfMLP(nn.Module):
    """The gated feed-forward block (silu(x·Gᵀ) * x·Uᵀ)·Dᵀ, products in fp16, what lies between them in float32."""

    def __init__(self, mlp: Any):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    # `[..., D]` -> float32 `[..., D]`.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.half()
        inner, size = _ShrunkGate.apply(self.gate_proj(x), self.up_proj(x))
        return _Grown.apply(self.down_proj(inner), size)


# Of the chain of derivatives, `_ShrunkGate` would divide by the rows' sizes and `_Grown` multiply by them. Between the
# two there is but a product with a matrix, so both leave it out: the gradient needs no larger range than it has.


# silu(gate) * up, shrunk; keeps the two inputs alone.
class _ShrunkGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(gate, up)
        inner, size = shrink(F.silu(gate.float()).mul_(up))
        ctx.mark_non_differentiable(size)
        return inner, size

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _):
        gate, up = ctx.saved_tensors
        wide, gradient = gate.float(), gradient.float()
        into_gate = torch.ops.aten.silu_backward(gradient * up, wide)
        return into_gate.half(), F.silu(wide).mul_(gradient).half()


# What a product with shrunken rows stands for, float32.
class _Grown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, product: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return product.float().mul_(size)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.half(), None
