"""Attention over a frozen prefix and over the prototypes, against PyTorch's and against the formula."""

import pytest
import torch
from torch.nn import functional as F

import layers.fast.attention as attention
from layers.fast.attention import BlockedAttention, DropoutAttention

M, N, L, HEADS, KV = 5, 4, 6, 4, 2


@pytest.mark.parametrize("each", [True, False], ids=["a mask each", "one mask"])
@pytest.mark.parametrize("score_bytes", [1, 5000, 10**9])
def test_blocked_attention_equals_pytorch(each: bool, score_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    torch.manual_seed(1)
    e, slots, rows = 8, N + L, HEADS // KV * L
    query, key, value = (torch.randn(M, KV, n, e, dtype=torch.float64) for n in (rows, slots, slots))
    mask = torch.zeros(M if each else 1, 1, rows, slots, dtype=torch.float64)
    mask.masked_fill_(torch.rand_like(mask) < 0.3, float("-inf"))[..., 0] = 0.0
    roomy = [torch.full((M + 1, KV, slots + 3, e), torch.nan, dtype=torch.float64) for _ in range(2)]
    held = [buffer[:M, :, :slots] for buffer in roomy]  # as the cache holds them: in a larger buffer
    for buffer, tensor in zip(held, (key, value), strict=True):
        buffer.copy_(tensor)
    new = [tensor[:, :, N:].clone().requires_grad_() for tensor in (key, value)]
    query.requires_grad_()
    found = BlockedAttention.apply(query, *new, *held, mask, 0.4)
    whole = [torch.cat([tensor[:, :, :N], part], dim=2) for tensor, part in zip((key, value), new, strict=True)]
    expected = F.scaled_dot_product_attention(query, *whole, attn_mask=mask, scale=0.4)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found).transpose(1, 2).contiguous().transpose(1, 2)
    ours = torch.autograd.grad((found * weight).sum(), [query, *new])
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), [query, *new]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_dropout_attention_against_its_own_mask(dtype: torch.dtype, close: float) -> None:
    """With values that are unit vectors the result is the weights that are left; so the mask can be read
    off it, and forward and backward checked against the formula with that mask."""
    torch.manual_seed(4)
    h, rows, keys, f, rate = 2, 600, 8, 8, 0.3
    q, k = (torch.randn(h, n, f, dtype=dtype) for n in (rows, keys))
    unit = torch.eye(keys, dtype=dtype).expand(h, -1, -1).contiguous()
    torch.manual_seed(5)
    kept = DropoutAttention.apply(q, k, unit, rate) != 0
    shares = kept.double()
    assert abs(shares.mean().item() - (1 - rate)) < 0.02  # 4 standard deviations
    for one, other in ((shares[..., 1:], shares[..., :-1]), (shares[:, 1:], shares[:, :-1])):  # neighbours are independent
        assert abs((one * other).mean().item() - (1 - rate) ** 2) < 0.03
    v = torch.randn(h, keys, f, dtype=dtype)
    operands = [t.requires_grad_() for t in (q, k, v)]
    torch.manual_seed(5)
    found = DropoutAttention.apply(*operands, rate)
    expected = torch.softmax(q @ k.mT * f**-0.5, -1) * kept / (1 - rate) @ v
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), operands) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close * b.abs().max().item())
