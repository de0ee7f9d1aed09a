"""The parts of a decoder layer, rewritten to do and keep only what a frozen layer's gradient needs.

A weight that is not trained needs no copy of its input. Automatic differentiation of transformers'
modules keeps, for a patch token, three widths of RMSNorm intermediates and three of the feed-forward
block; here it is the norm's input (which lies in the residual stream anyway) and two of the block.
Queries and keys are rotated on their way into the order in which attention reads them. The results are
those of the modules replaced; the plain path goes on using these.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from layers.frozen_linear import Matrix, is_dense, is_recast, linear, matrix
from layers.prefix_attention import BlockedAttention, group, prefix_attention

# Class names of transformers' modules with exactly these formulas; others run as they are.
RMS_NORMS = {"Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm"}
GATED_MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}
ROTARY_ATTENTIONS = {"Qwen2Attention", "LlamaAttention", "MistralAttention"}

# On the CPU a feed-forward block runs a few rows at a time, so that what lies between its products
# stays in the processor's cache.
CACHED_BYTES, FEWEST_ROWS = 16 * 2**20, 256


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


def _gate_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor):
    """Gradients of gate and up, from that of silu(gate) * up."""
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, keeping the two inputs alone."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _gate_gradients(*ctx.saved_tensors, gradient)


class _DenseMLP(torch.autograd.Function):
    """(silu(x·Gᵀ) * x·Uᵀ)·Dᵀ a few rows at a time, keeping x·Gᵀ and x·Uᵀ."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, G: Matrix, U: Matrix, D: Matrix) -> torch.Tensor:
        kept, out = [], []
        for rows in _row_blocks(x.flatten(0, -2), G.weight):
            gate, up = G.forward(rows), U.forward(rows)
            if ctx.needs_input_grad[0]:
                kept += gate, up
                out.append(D.forward(F.silu(gate).mul_(up)))
            else:
                out.append(D.forward(F.silu(gate, inplace=True).mul_(up)))
        ctx.save_for_backward(*kept)
        ctx.matrices = G, U, D
        return _joined(out, x.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        kept, (G, U, D) = ctx.saved_tensors, ctx.matrices
        out = []
        for i, rows in enumerate(_row_blocks(gradient.flatten(0, -2), G.weight)):
            gate, up = _gate_gradients(*kept[2 * i : 2 * i + 2], D.backward(rows))
            out.append(G.backward(gate).add_(U.backward(up)))
        return _joined(out, gradient.shape), None, None, None


def _row_blocks(x: torch.Tensor, G: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut `[R, D]` into blocks of rows; on other devices than the CPU, one block."""
    if x.device.type != "cpu":
        return iter([x])
    rows = max(FEWEST_ROWS, CACHED_BYTES // (G.shape[0] * G.element_size()))
    blocks = max(1, round(len(x) / rows))
    return iter(x.chunk(blocks))


def _joined(blocks: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    return (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).view(shape)


class _Rotate(torch.autograd.Function):
    """Rotary position embedding, and the order that attention reads: `[M, n, h, e]` -> `[M, h, n, e]`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """cos, sin: `[M or 1, n, e]`, whose halves along the last axis are equal. The result is contiguous."""
        ctx.save_for_backward(cos, sin)
        M, n, h, e = x.shape
        return _turn(x.transpose(1, 2), cos, sin, out=x.new_empty(M, h, n, e))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        cos, sin = ctx.saved_tensors
        M, h, n, e = gradient.shape
        out = gradient.new_empty(M, n, h, e)
        _turn(gradient, cos, -sin, out=out.transpose(1, 2))
        return out, None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + e/2) of x `[M, h, n, e]` by its angle, into `out`."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    (a, b), (left, right) = x.split(half, -1), out.split(half, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


def make_lean(model: nn.Module, active: Callable[[], bool]) -> None:
    """Give the modules of `model` that have a lean form a forward that uses it while `active()` holds."""
    for module in model.modules():
        name = type(module).__name__
        if name in RMS_NORMS:
            lean = _norm_forward(module)
        elif name in GATED_MLPS and model.config.hidden_act == "silu":
            lean = _mlp_forward(module)
        elif name in ROTARY_ATTENTIONS:
            lean = _attention_forward(module, module.forward)
        else:
            continue
        module.forward = _switched(module.forward, lean, active)


def _switched(own: Callable, lean: Callable, active: Callable[[], bool]) -> Callable:
    return lambda *args, **kwargs: (lean if active() else own)(*args, **kwargs)


def _norm_forward(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def _mlp_forward(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    no_bias = gate.bias is None and up.bias is None and down.bias is None

    def forward(x: torch.Tensor) -> torch.Tensor:
        if no_bias and is_dense(gate, up, down):
            return _DenseMLP.apply(x, matrix(gate), matrix(up), matrix(down))
        return down(_GatedSiLU.apply(gate(x), up(x)))

    return forward


def _attention_forward(attention: nn.Module, own: Callable) -> Callable:
    width, layer = attention.head_dim, attention.layer_idx

    def forward(hidden_states, position_embeddings, attention_mask, past_key_values, **rest):
        if is_recast(hidden_states):
            return own(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **rest,
            )
        heads = (*hidden_states.shape[:-1], -1, width)  # M, n, heads, e
        key = _Rotate.apply(linear(attention.k_proj, hidden_states).view(heads), *position_embeddings)
        value = linear(attention.v_proj, hidden_states).view(heads).transpose(1, 2)
        # The last layer's prefix leaves here, before its queries.
        keys, values = past_key_values.update(key, value, layer)
        query = _Rotate.apply(linear(attention.q_proj, hidden_states).view(heads), *position_embeddings)
        if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
            grouped, held = group(query, key.shape[1]), (keys.detach(), values.detach())
            mixed = BlockedAttention.apply(grouped, key, value, *held, attention_mask, attention.scaling)
            mixed = mixed.view(query.shape).transpose(1, 2)  # (M, n, h, e)
        else:
            mixed, _ = prefix_attention(attention, query, keys, values, attention_mask, attention.scaling)
        return linear(attention.o_proj, mixed.flatten(2)), None

    return forward
