"""Attention of tokens over themselves and over a frozen prefix, without copies for grouped queries.

The query heads that share a key-value head are laid one after the other along the query axis.
Shapes: M sequences, h heads, kv key-value heads, g = h / kv, n tokens, S slots up to theirs, e head width.
"""

import torch
from torch.nn import functional as F

ATTENTION = "prefix_sdpa"  # its name among transformers' attention functions
SCORE_BYTES = 4 * 2**20  # of one block: what stays in a processor's cache


def prefix_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Scaled dot-product attention with grouped queries.

    Args:
        query: `[M, h, n, e]`; key, value: `[M, kv, S, e]`.
        attention_mask: `[M or 1, 1, g*n, S]`, already repeated for the heads of a group.

    Returns:
        `[M, n, h, e]` and None, as transformers' attention functions do.
    """
    grouped = group(query, key.shape[1])
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(query.shape).transpose(1, 2), None


def group(query: torch.Tensor, kv: int) -> torch.Tensor:
    """`[M, h, n, e]` -> `[M, kv, g*n, e]`."""
    M, h, n, e = query.shape
    return query.reshape(M, kv, h // kv * n, e)


def additive_mask(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """`[M or 1, n, S]` booleans -> additive `[M or 1, 1, g*n, S]` mask for `prefix_attention`."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask.masked_fill_(~visible, float("-inf"))
    return mask.repeat(1, groups, 1)[:, None]


class BlockedAttention(torch.autograd.Function):
    """The same on the CPU, some sequences at a time, with gradients for the last n slots alone.

    PyTorch's fused CPU kernel cuts queries this few into pieces of 32 or 64 rows and reaches under half
    of the processor's rate; and it computes the gradients of all slots, of which a frozen prefix needs
    none. Here a block's scores are two batched products with a softmax between them; the backward pass
    makes them anew, so nothing is kept but what came in.
    """

    @staticmethod
    def forward(ctx, query, new_key, new_value, key, value, mask, scale: float) -> torch.Tensor:
        """Args:
            query: `[M, kv, g*n, e]`, contiguous.
            new_key, new_value: `[M, kv, n, e]`, what the last n slots of key and value hold; their
                gradients go here.
            key, value: `[M, kv, S, e]`, no gradient.
            mask: additive, `[M or 1, 1, g*n, S]`.

        Returns:
            `[M, kv, g*n, e]`.
        """
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.new = scale, new_key.shape[2]
        out = torch.empty_like(query)
        for rows in _blocks(query, key):
            weights = _weights(query, key, mask, scale, rows)
            torch.bmm(weights, _pairs(value[rows]), out=_pairs(out[rows]))
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        query, key, value, mask = ctx.saved_tensors
        M, kv, _, e = query.shape
        gradient, start = gradient.contiguous(), key.shape[2] - ctx.new
        into_query = torch.empty_like(query)
        into_key, into_value = (query.new_empty(M, kv, ctx.new, e) for _ in range(2))
        for rows in _blocks(query, key):
            weights = _weights(query, key, mask, ctx.scale, rows)  # (pairs, g*n, S)
            out, queries = _pairs(gradient[rows]), _pairs(query[rows])
            scores = torch.bmm(out, _pairs(value[rows]).transpose(1, 2))
            scores = torch._softmax_backward_data(scores, weights, -1, scores.dtype).mul_(ctx.scale)
            torch.bmm(scores, _pairs(key[rows]), out=_pairs(into_query[rows]))
            torch.bmm(scores[..., start:].transpose(1, 2), queries, out=_pairs(into_key[rows]))
            torch.bmm(weights[..., start:].transpose(1, 2), out, out=_pairs(into_value[rows]))
        return into_query, into_key, into_value, None, None, None, None


def _blocks(query: torch.Tensor, key: torch.Tensor):
    """Slices of sequences whose scores together take about `SCORE_BYTES`."""
    M, kv, rows, _ = query.shape
    step = max(1, SCORE_BYTES // (kv * rows * key.shape[2] * query.element_size()))
    for first in range(0, M, step):
        yield slice(first, min(first + step, M))


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Sequences and key-value heads in one axis, as a view."""
    return x.view(-1, *x.shape[2:]) if x.is_contiguous() else x.flatten(0, 1)


def _weights(query, key, mask, scale: float, rows: slice) -> torch.Tensor:
    """softmax(scale * q·k + mask) of a block, `[pairs, g*n, S]`."""
    query, key = query[rows], key[rows]
    scores = query.new_empty(*query.shape[:3], key.shape[2])
    scores.copy_(mask[rows] if len(mask) > 1 else mask)
    scores = _pairs(scores).baddbmm_(_pairs(query), _pairs(key).transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)
