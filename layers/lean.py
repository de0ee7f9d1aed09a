"""Two parts of a decoder layer, rewritten to keep only what a frozen layer's gradient needs.

A weight that is not trained needs no copy of its input. Automatic differentiation of transformers'
modules keeps, for a patch token, three widths of RMSNorm intermediates and three of the feed-forward
block; here it is the norm's input (which lies in the residual stream anyway) and two of the block.
The results are those of the modules replaced; the plain path goes on using these.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

# Class names of transformers' modules with exactly these formulas; others run as they are.
RMS_NORMS = {"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm"}
GATED_MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
        scale = torch.rsqrt(square / x.shape[-1] + eps)  # (..., 1)
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, scale, weight = ctx.saved_tensors
        wide = x.float()
        inner = (gradient * weight).float()
        along = torch.linalg.vecdot(inner, wide).unsqueeze(-1) * scale.pow(3) / -x.shape[-1]  # (..., 1)
        return (inner * scale).addcmul_(wide, along).to(x.dtype), None, None


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, keeping the two inputs alone."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def make_lean(model: nn.Module, active: Callable[[], bool]) -> None:
    """Give the modules of `model` that have a lean form a forward that uses it while `active()` holds."""
    for module in model.modules():
        name = type(module).__name__
        if name in RMS_NORMS:
            lean = _norm_forward(module)
        elif name in GATED_MLPS and model.config.hidden_act == "silu":
            lean = _mlp_forward(module)
        else:
            continue
        module.forward = _switched(module.forward, lean, active)


def _switched(own: Callable, lean: Callable, active: Callable[[], bool]) -> Callable:
    return lambda x: lean(x) if active() else own(x)


def _norm_forward(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def _mlp_forward(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: mlp.down_proj(_GatedSiLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))
