"""The decoder's twin: other modules around the same tensors, that do and keep only what a frozen layer's gradient needs.

A weight that is not trained needs no copy of its input. Automatic differentiation of transformers'
modules keeps, for a patch token, three widths of RMSNorm intermediates and three of the feed-forward
block; here it is the norm's input (which lies in the residual stream anyway) and two of the block.
Queries and keys are rotated on their way into the order in which attention reads them. The results are
those of the modules replaced.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from layers.fast.attention import ATTENTION, BlockedAttention, group, prefix_attention
from layers.fast.linear import FrozenLinear, freeze, is_recast
from layers.fp16 import GATED_MLPS

# Class names of transformers' modules with exactly these formulas; others run as they are.
RMS_NORMS = {"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm"}
ROTARY_ATTENTIONS = {"Qwen2Attention", "LlamaAttention", "MistralAttention"}

# On the CPU a feed-forward block runs a few rows at a time, so that what lies between its products
# stays in the processor's cache.
CACHED_BYTES, FEWEST_ROWS = 16 * 2**20, 256


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A decoder of the same tensors, whose attention is `prefix_attention` and whose modules are lean where they can be.

    Modules and configuration are copies, so nothing that is set or run here shows in `model`. Moving `model` to
    another device moves its parameters alone: then make another twin.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]  # bitsandbytes
    twin = copy.deepcopy(model, {id(kept): kept for kept in shared})
    twin.config._attn_implementation = ATTENTION
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in RMS_NORMS:
                setattr(parent, name, LeanRMSNorm(child))
            elif kind in GATED_MLPS and model.config.hidden_act == "silu":
                setattr(parent, name, LeanMLP(child))
            elif kind in ROTARY_ATTENTIONS:
                setattr(parent, name, LeanAttention(child, model.dtype))
    return twin.eval()


class LeanRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis `[..., D]`, computed in float32."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


# The norm, keeping its input alone.
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        with torch.autocast(x.device.type, enabled=False):  # which would give float32
            return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        wide, D = x.float(), x.shape[-1]
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
        scale = torch.rsqrt(square / D + ctx.eps)  # (..., 1)
        inner = (gradient * weight).float()
        along = torch.linalg.vecdot(inner, wide).unsqueeze(-1) * scale.pow(3) / -D  # (..., 1)
        return (inner * scale).addcmul_(wide, along).to(x.dtype), None, None


class LeanMLP(nn.Module):
    """The gated feed-forward block (silu(x·Gᵀ) * x·Uᵀ)·Dᵀ, `[..., D]` -> `[..., D]`."""

    def __init__(self, mlp: Any):
        super().__init__()
        self.projections = nn.ModuleList([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        # 4-bit layers, and such with a bias, run as they are.
        self.is_dense = all(type(layer) is nn.Linear and layer.bias is None for layer in self.projections)
        if self.is_dense:
            self.projections = nn.ModuleList(map(freeze, self.projections))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate: Any
        gate, up, down = self.projections
        if self.is_dense and not is_recast(gate.weight.dtype, x.device):
            return _DenseMLP.apply(x, gate, up, down)
        return down(_GatedSiLU.apply(gate(x), up(x)))


# silu(gate) * up, keeping the two inputs alone.
class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        gate, up = ctx.saved_tensors
        return _gated_silu_gradients(gate, up, gradient)


def _gated_silu_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


# The whole block, on the CPU a few rows at a time, keeping x·Gᵀ and x·Uᵀ.
class _DenseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, G: FrozenLinear, U: FrozenLinear, D: FrozenLinear) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        out = []
        for rows in _row_blocks(x, G.weight):
            gate, up = G.times(rows), U.times(rows)
            if ctx.needs_input_grad[0]:
                kept += gate, up
            out.append(D.times(F.silu(gate, inplace=not ctx.needs_input_grad[0]).mul_(up)))
        ctx.save_for_backward(*kept)
        ctx.layers = G, U, D
        return _join(out).view(x.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        kept, (G, U, D) = ctx.saved_tensors, ctx.layers
        out = []
        for i, rows in enumerate(_row_blocks(gradient, G.weight)):
            gate, up = _gated_silu_gradients(kept[2 * i], kept[2 * i + 1], D.times(rows, transposed=True))
            out.append(G.times(gate, transposed=True).add_(U.times(up, transposed=True)))
        return _join(out).view(gradient.shape), None, None, None


# `[..., D]` in blocks of rows `[R, D]`; on other devices than the CPU, in one.
def _row_blocks(x: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.flatten(0, -2)
    rows = max(FEWEST_ROWS, CACHED_BYTES // (G.shape[0] * G.element_size()))
    return x.chunk(max(1, round(len(x) / rows))) if x.device.type == "cpu" else (x,)


def _join(blocks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


class LeanAttention(nn.Module):
    """Rotary self-attention over the prompt's cached keys and values, with grouped queries."""

    def __init__(self, attention: Any, dtype: torch.dtype):
        """dtype: number type of the weights, with 4-bit ones of what is computed with them."""
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, freeze(getattr(attention, name)))
        self.own, self.dtype = attention, dtype  # transformers' module: the projections, and what runs under autocast

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **rest):
        """`[M, n, D]` -> `[M, n, D]` and None, as transformers' attention modules have it.

        Args:
            position_embeddings: cos and sin, each `[M or 1, n, e]`.
            attention_mask: additive, `[M or 1, 1, g*n, S]`.
            past_key_values: a `PrefixCache`.
        """
        own = self.own
        if is_recast(self.dtype, hidden_states.device):
            return own(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **rest,
            )
        # In fp16 the residual stream, and what is derived from its type, are float32.
        hidden_states, cos, sin = (t.to(self.dtype) for t in (hidden_states, *position_embeddings))
        heads = (*hidden_states.shape[:-1], -1, own.head_dim)  # M, n, heads, e
        key = _Rotate.apply(own.k_proj(hidden_states).view(heads), cos, sin)
        value = own.v_proj(hidden_states).view(heads).transpose(1, 2)
        # The last layer's prefix leaves here, before its queries.
        keys, values = past_key_values.update(key, value, own.layer_idx)
        query = _Rotate.apply(own.q_proj(hidden_states).view(heads), cos, sin)
        if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
            grouped, held = group(query, key.shape[1]), (keys.detach(), values.detach())
            mixed = BlockedAttention.apply(grouped, key, value, *held, attention_mask, own.scaling)
            mixed = mixed.view(query.shape).transpose(1, 2)  # (M, n, h, e)
        else:
            mixed, _ = prefix_attention(own, query, keys, values, attention_mask, own.scaling)
        return own.o_proj(mixed.flatten(2)), None


# Rotary position embedding, and the order that attention reads: `[M, n, h, e]` -> `[M, h, n, e]`.
class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """cos, sin: `[M or 1, n, e]`, whose halves along the last axis are equal. The result is contiguous."""
        ctx.save_for_backward(cos, sin)
        M, n, h, e = x.shape
        return apply_rotary(x.transpose(1, 2), cos, sin, out=x.new_empty(M, h, n, e))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        cos, sin = ctx.saved_tensors
        M, h, n, e = gradient.shape
        out = gradient.new_empty(M, n, h, e)
        apply_rotary(gradient, cos, -sin, out=out.transpose(1, 2))
        return out, None, None


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + e/2) of x `[M, h, n, e]` by its angle, into `out`."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    (a, b), (left, right) = x.split(half, -1), out.split(half, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out
