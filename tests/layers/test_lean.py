"""The rewritten parts of a decoder layer against transformers' own modules and PyTorch's functions."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model

import layers.frozen_linear as frozen_linear
import layers.lean as lean
import layers.prefix_attention as prefix_attention
from layers.dropout_attention import DropoutAttention
from layers.frozen_linear import Matrix, give_matrices, linear, product
from layers.prefix_attention import ATTENTION, BlockedAttention, additive_mask
from layers.prefix_cache import PrefixCache, PrefixStored

M, P0, N, L, D, HEADS, KV = 5, 3, 4, 6, 32, 4, 2
MODELS = {"qwen2": (Qwen2Config, Qwen2Model), "llama": (LlamaConfig, LlamaModel), "mistral": (MistralConfig, MistralModel)}


def pair(family: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The same language model twice: transformers' own, and one whose own modules must not run."""
    config, kind = MODELS[family]
    shape = dict(hidden_size=D, intermediate_size=48, num_attention_heads=HEADS, num_key_value_heads=KV)
    torch.manual_seed(0)
    own = kind(config(vocab_size=11, num_hidden_layers=2, attn_implementation="eager", **shape)).to(dtype).eval()
    for tensor in own.parameters():
        nn.init.normal_(tensor, std=0.3)  # biases and norm weights too
        tensor.requires_grad_(False)
    other = kind(config(vocab_size=11, num_hidden_layers=2, **shape)).to(dtype).eval()
    other.load_state_dict(own.state_dict())
    other.requires_grad_(False)
    other.config._attn_implementation = ATTENTION
    for module in other.modules():
        if type(module).__name__ in lean.RMS_NORMS | lean.GATED_MLPS | lean.ROTARY_ATTENTIONS:
            module.forward = must_not_run
    lean.make_lean(other, lambda: True)
    return own, other


def must_not_run(*_, **__):
    raise AssertionError("transformers' own module ran")


@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", MODELS)
def test_decoder_equals_transformers(family: str, dtype: torch.dtype, blocks: str, monkeypatch) -> None:
    """Two passes through the cache, the last with gradients, against one pass of transformers' modules.
    (These compute norms and softmax in float32 whatever the type, so float64 agrees no better.)"""
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    if blocks == "many blocks":
        monkeypatch.setattr(lean, "CACHED_BYTES", 1)
        monkeypatch.setattr(lean, "FEWEST_ROWS", 7)
        monkeypatch.setattr(prefix_attention, "SCORE_BYTES", 1)
    own, other = pair(family, dtype)
    x = torch.randn(M, N + L, D, dtype=dtype, requires_grad=True)
    causal = torch.ones(N + L, N + L, dtype=torch.bool).tril()[None]
    mask = additive_mask(causal, 1, dtype)
    expected = own(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state[:, N:]
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), x)

    cache = PrefixCache(2)
    cache.place(0, N + L)
    grouped = additive_mask(causal, HEADS // KV, dtype).unflatten(2, (HEADS // KV, N + L))

    def run(first: int, stop: int, inputs: torch.Tensor) -> torch.Tensor:
        return other(
            inputs_embeds=inputs,
            attention_mask=grouped[..., first:stop, :stop].flatten(2, 3),
            position_ids=torch.arange(first, stop)[None],
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    with torch.no_grad(), pytest.raises(PrefixStored):
        run(0, N, x[:, :N])
    cache.place(N, N + L)
    patches = x[:, N:].detach().requires_grad_()
    found = run(N, N + L, patches)
    close(found, expected)
    # Causal: what the prefix's tokens get from the loss does not concern the patches' own gradient.
    close(torch.autograd.grad((found * weight).sum(), patches)[0], gradient[:, N:])


@pytest.mark.parametrize("each", [True, False], ids=["a mask each", "one mask"])
@pytest.mark.parametrize("score_bytes", [1, 5000, 10**9])
def test_blocked_attention_equals_pytorch(each: bool, score_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(prefix_attention, "SCORE_BYTES", score_bytes)
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


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear_equals_linear(bias: bool) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    x = torch.randn(3, 5, 40, requires_grad=True)
    found, expected = linear(layer, x), layer(x)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.inference_mode():
        torch.testing.assert_close(linear(layer, x), expected)


def test_products_with_views_and_without_rows() -> None:
    """A transposed matrix, rows that are a slice of something wider, and no row at all."""
    torch.manual_seed(3)
    wide, matrix = torch.randn(9, 70), torch.randn(40, 24)
    torch.testing.assert_close(product(wide[:, 5:45], matrix.t()), wide[:, 5:45] @ matrix)
    assert product(wide[:0, :40], matrix.t()).shape == (0, 24)


@pytest.mark.parametrize("packs", [True, False])
def test_matrix_from_both_sides(packs: bool) -> None:
    """First used in inference mode, then with gradients; rows that are a slice, and no row at all."""
    torch.manual_seed(4)
    layer = nn.Linear(40, 24).requires_grad_(False)
    matrix, rows = Matrix(layer, packs), torch.randn(9, 70)[:, 5:45]
    with torch.inference_mode():
        torch.testing.assert_close(matrix.forward(rows, layer.bias), layer(rows))
        torch.testing.assert_close(matrix.backward(layer(rows)), layer(rows) @ layer.weight)
    assert len(matrix._packed) == (2 if packs and frozen_linear.REORDER else 0)
    assert matrix.forward(rows[:0]).shape == (0, 24) and matrix.backward(layer(rows)[:0]).shape == (0, 40)
    layer.frozen_matrix, x = matrix, rows.clone().requires_grad_()
    linear(layer, x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer(rows) @ layer.weight)
    layer.weight.mul_(2)
    torch.testing.assert_close(matrix.forward(rows), rows @ layer.weight.t())
    layer.weight = nn.Parameter(torch.randn(24, 40), requires_grad=False)
    torch.testing.assert_close(matrix.backward(rows[:, :24]), rows[:, :24] @ layer.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_types_keep_no_layouts(dtype: torch.dtype) -> None:
    layer = nn.Linear(40, 24, bias=False, dtype=dtype).requires_grad_(False)
    matrix, x = Matrix(layer, packs=True), torch.randn(9, 40, dtype=dtype)
    torch.testing.assert_close(matrix.forward(x), layer(x))
    assert not matrix._packed


def test_only_small_models_keep_layouts(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    size = 2 * 64 * 4
    for limit, packs in ((size, True), (size - 1, False)):
        monkeypatch.setattr(frozen_linear, "PACKED_BYTES", limit)
        give_matrices(model)
        linear(model[0], torch.randn(5, 8))
        assert bool(model[0].frozen_matrix._packed) == bool(packs and frozen_linear.REORDER)


@pytest.mark.parametrize("with_onednn", [True, False])
@pytest.mark.parametrize("recast", [True, False])
def test_autocast_is_heeded(recast: bool, with_onednn: bool, monkeypatch) -> None:
    """Under autocast to bfloat16 a float32 matrix is multiplied in bfloat16, forward and backward."""
    if not with_onednn:
        monkeypatch.setattr(frozen_linear, "ONEDNN", None)
    _, model = pair("qwen2", torch.float32)
    layer = model.layers[0].mlp
    x = torch.randn(3, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=recast):
        assert linear(layer.gate_proj, x).dtype == (torch.bfloat16 if recast else torch.float32)
        out = layer(x)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().max() > 0


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
