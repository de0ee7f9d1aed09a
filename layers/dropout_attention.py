"""Attention with dropout on the CPU, a block of queries at a time.

PyTorch's scaled_dot_product_attention has no fused CPU kernel for a dropout above zero: it writes out
all scores several times over, and draws a float for each. Here a block's scores stay in the cache, the
backward pass makes them anew, and what is kept for it is one byte a score: which ones were dropped.
"""

import torch

BLOCK = 512  # queries; with 1000 keys their scores are 2 MB of float32


class DropoutAttention(torch.autograd.Function):
    """softmax(q·k / sqrt(f)) with dropout, times v: what scaled_dot_product_attention computes.

    Dropout is drawn from PyTorch's global generator, 16 bits a score, so its rate is true to 1/65536.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rate: float) -> torch.Tensor:
        """q `[h, R, f]`, k and v `[h, K, f]` -> `[h, R, f]`, all contiguous."""
        ctx.scale, ctx.rescale = q.shape[-1] ** -0.5, 1 / (1 - rate)
        q = q * ctx.scale
        kept = _draw(rate, q.shape[0] * q.shape[1], k.shape[1])  # (h*R, K)
        kept = kept.view(q.shape[0], q.shape[1], k.shape[1])
        out = torch.empty_like(q)
        for head, rows in _blocks(q):
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
        for head, rows in _blocks(q):
            weights = _softmax(q[head, rows], k[head])  # (rows, K)
            used = _drop(weights, kept[head, rows], out=torch.empty_like(weights))
            inward = torch.mm(scaled[head, rows], v[head].t()).mul_(used)
            inward.addcmul_(weights, shift[head, rows], value=-1)  # gradient of the scores
            torch.mm(inward, k[head], out=dq[head, rows])
            dk[head].addmm_(inward.t(), q[head, rows])
            dv[head].addmm_(used.t(), scaled[head, rows])
        return dq.mul_(ctx.scale), dk, dv, None


def _blocks(q: torch.Tensor):
    """Head numbers and row slices that cover the queries `[h, R, f]`."""
    for head in range(q.shape[0]):
        for start in range(0, q.shape[1], BLOCK):
            yield head, slice(start, start + BLOCK)


def _softmax(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = torch.mm(q, k.t())
    return torch.softmax(scores, -1, out=scores)


def _drop(weights: torch.Tensor, kept: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Zero the weights that are not kept: their bits and those of the mask (five times faster than a fill)."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    torch.bitwise_and(weights.view(bits), kept.to(bits), out=out.view(bits))
    return out


def _draw(rate: float, rows: int, columns: int) -> torch.Tensor:
    """`[rows, columns]` int8: 0 with probability `rate`, else -1 (all bits set)."""
    count = rows * columns
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # four draws in each
    kept = bits.view(torch.int16)[:count] >= round(rate * 65536) - 32768
    return kept.view(torch.int8).neg_().view(rows, columns)
