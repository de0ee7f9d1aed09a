"""Attention that knows what is frozen: of patches over a prompt's keys and values, and over the text prototypes.

Shapes: M sequences, h heads, kv key-value heads, g = h / kv, n tokens, S slots up to theirs, e head width;
in the cross-attention R = M*L patches, K prototypes, f head width.
"""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "prefix_sdpa"  # the name of `prefix_attention` among transformers' attention functions
SCORE_BYTES = 4 * 2**20  # of one block of `BlockedAttention`: what stays in a processor's cache
QUERY_BLOCK = 512  # queries of one block of `DropoutAttention`; with 1000 keys their scores are 2 MB of float32


def prefix_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Scaled dot-product attention with grouped queries, without copies of keys and values for them.

    The query heads that share a key-value head are laid one after the other along the query axis.

    Args:
        query: `[M, h, n, e]`; key, value: `[M, kv, S, e]`.
        attention_mask: `[M or 1, 1, g*n, S]`, already repeated for the heads of a group.

    Returns:
        `[M, n, h, e]` and None, as transformers' attention functions do.

    Raises:
        NotImplementedError: scores are to be capped (Gemma2) or to have sinks (GPT-OSS).
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with capped scores or sinks")
    grouped = group(query, key.shape[1])
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    # (M, kv, g*n, e), in whatever order the kernel left it: one copy into the order of the next product, not two.
    heads = mixed.unflatten(2, (-1, query.shape[2])).permute(0, 3, 1, 2, 4)  # (M, n, kv, g, e)
    return heads.flatten(2, 3), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, prefix_attention)


# `[M, h, n, e]` -> `[M, kv, g*n, e]`.
def group(query: torch.Tensor, kv: int) -> torch.Tensor:
    M, h, n, e = query.shape
    return query.reshape(M, kv, h // kv * n, e)


def additive_mask(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """`[M or 1, n, S]` booleans -> additive `[M or 1, 1, g*n, S]` mask for `prefix_attention`."""
    M, n, S = visible.shape
    # Rows begin at multiples of 8 numbers: the fused CUDA kernels would copy another mask in every layer.
    mask = torch.zeros(M, groups * n, -(-S // 8) * 8, dtype=dtype, device=visible.device)[..., :S]
    return mask.masked_fill_(~visible.repeat(1, groups, 1), float("-inf"))[:, None]


class BlockedAttention(torch.autograd.Function):
    """`prefix_attention` on the CPU, some sequences at a time, with gradients for the last n slots alone.

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
        for rows in _sequence_blocks(query, key):
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
        for rows in _sequence_blocks(query, key):
            weights = _weights(query, key, mask, ctx.scale, rows)  # (pairs, g*n, S)
            out, queries = _pairs(gradient[rows]), _pairs(query[rows])
            scores = torch.bmm(out, _pairs(value[rows]).transpose(1, 2))
            scores = torch._softmax_backward_data(scores, weights, -1, scores.dtype).mul_(ctx.scale)
            torch.bmm(scores, _pairs(key[rows]), out=_pairs(into_query[rows]))
            torch.bmm(scores[..., start:].transpose(1, 2), queries, out=_pairs(into_key[rows]))
            torch.bmm(weights[..., start:].transpose(1, 2), out, out=_pairs(into_value[rows]))
        return into_query, into_key, into_value, None, None, None, None


# Slices of sequences whose scores together take about `SCORE_BYTES`.
def _sequence_blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[slice]:
    M, kv, rows, _ = query.shape
    step = max(1, SCORE_BYTES // (kv * rows * key.shape[2] * query.element_size()))
    for first in range(0, M, step):
        yield slice(first, min(first + step, M))


# Sequences and key-value heads in one axis, as a view.
def _pairs(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, *x.shape[2:]) if x.is_contiguous() else x.flatten(0, 1)


# softmax(scale * q·k + mask) of a block, `[pairs, g*n, S]`.
def _weights(query, key, mask, scale: float, rows: slice) -> torch.Tensor:
    query, key = query[rows], key[rows]
    scores = query.new_empty(*query.shape[:3], key.shape[2])
    scores.copy_(mask[rows] if len(mask) > 1 else mask)
    scores = _pairs(scores).baddbmm_(_pairs(query), _pairs(key).transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


def cross_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dropout: float) -> torch.Tensor:
    """`layers.reprogramming.attend` without a copy of all scores.

    Args:
        queries: `[1, h, R, f]`; keys, values: `[1, h, K, f]`.
        dropout: rate at which attention weights are dropped.

    Returns:
        `[1, h, R, f]`.
    """
    if dropout and queries.device.type == "cpu":
        operands = (t[0].contiguous() for t in (queries, keys, values))
        return DropoutAttention.apply(*operands, dropout)[None]
    return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)


class DropoutAttention(torch.autograd.Function):
    """softmax(q·k / sqrt(f)) with dropout, times v, on the CPU, a block of queries at a time.

    PyTorch's scaled_dot_product_attention has no fused CPU kernel for a dropout above zero: it writes out
    all scores several times over, and draws a float for each. Here a block's scores stay in the cache, the
    backward pass makes them anew, and what is kept for it is one byte a score: which ones were dropped.
    Dropout is drawn from PyTorch's global generator, 16 bits a score, so its rate is true to 1/65536.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rate: float) -> torch.Tensor:
        """q `[h, R, f]`, k and v `[h, K, f]` -> `[h, R, f]`, all contiguous."""
        ctx.scale, ctx.rescale = q.shape[-1] ** -0.5, 1 / (1 - rate)
        q = q * ctx.scale
        shape = q.shape[0], q.shape[1], k.shape[1]  # h, R, K
        count = math.prod(shape)
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # four draws of 16 bits in each
        kept = bits.view(torch.int16)[:count] >= round(rate * 65536) - 32768
        kept = kept.view(torch.int8).neg_().view(shape)  # 0 with probability `rate`, else -1 (all bits set)
        out = torch.empty_like(q)
        for head, rows in _query_blocks(q):
            weights = _softmax(q[head, rows], k[head])
            torch.mm(_drop(weights, kept[head, rows], out=weights), v[head], out=out[head, rows])
        out *= ctx.rescale
        ctx.save_for_backward(q, k, v, out, kept)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        q, k, v, out, kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # softmax's backward needs sum(weight * its gradient), which is sum(gradient * out)
        shift = (gradient * out).sum(-1, keepdim=True)  # (h, R, 1)
        scaled = gradient * ctx.rescale
        for head, rows in _query_blocks(q):
            weights = _softmax(q[head, rows], k[head])  # (rows, K)
            used = _drop(weights, kept[head, rows], out=torch.empty_like(weights))
            inward = torch.mm(scaled[head, rows], v[head].t()).mul_(used)
            inward.addcmul_(weights, shift[head, rows], value=-1)  # gradient of the scores
            torch.mm(inward, k[head], out=dq[head, rows])
            dk[head].addmm_(inward.t(), q[head, rows])
            dv[head].addmm_(used.t(), scaled[head, rows])
        return dq.mul_(ctx.scale), dk, dv, None


# Head numbers and row slices that cover the queries `[h, R, f]`.
def _query_blocks(q: torch.Tensor) -> Iterator[tuple[int, slice]]:
    for head in range(q.shape[0]):
        for start in range(0, q.shape[1], QUERY_BLOCK):
            yield head, slice(start, start + QUERY_BLOCK)


def _softmax(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = torch.mm(q, k.t())
    return torch.softmax(scores, -1, out=scores)


# Zero the weights that are not kept: their bits and those of the mask (five times faster than a fill).
def _drop(weights: torch.Tensor, kept: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    torch.bitwise_and(weights.view(bits), kept.to(bits), out=out.view(bits))
    return out
