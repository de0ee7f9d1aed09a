"""The decoder's twin against transformers' own modules, whose tensors it shares."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel, PreTrainedModel, Qwen2Config, Qwen2Model

import layers.fast.attention as attention
import layers.fast.decoder as decoder
import layers.fast.linear as linear
from layers.fast.attention import additive_mask
from layers.fast.decoder import LeanAttention, LeanMLP, make_twin
from layers.fast.prefix import PrefixCache, PrefixStored

M, N, L, D, HEADS, KV = 5, 4, 6, 32, 4, 2
MODELS = {"qwen2": (Qwen2Config, Qwen2Model), "llama": (LlamaConfig, LlamaModel), "mistral": (MistralConfig, MistralModel)}


def original(family: str, dtype: torch.dtype = torch.float32, **options) -> PreTrainedModel:
    """A small language model of transformers, whose biases and norm weights are not trivial either."""
    config, kind = MODELS[family]
    shape = dict(hidden_size=D, intermediate_size=48, num_attention_heads=HEADS, num_key_value_heads=KV)
    torch.manual_seed(0)
    model = kind(config(vocab_size=11, num_hidden_layers=2, attn_implementation="eager", **shape, **options)).to(dtype)
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.3)
        tensor.requires_grad_(False)
    return model.eval()


@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", MODELS)
def test_twin_equals_transformers(family: str, dtype: torch.dtype, blocks: str, monkeypatch) -> None:
    """Two passes through the cache, the last with gradients, against one pass of transformers' modules.
    (These compute norms and softmax in float32 whatever the type, so float64 agrees no better.)"""
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    if blocks == "many blocks":
        monkeypatch.setattr(decoder, "CACHED_BYTES", 1)
        monkeypatch.setattr(decoder, "FEWEST_ROWS", 7)
        monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    own = original(family, dtype)
    twin = make_twin(own)
    assert all(type(layer.self_attn) is LeanAttention for layer in twin.layers)
    kinds = {type(module).__name__ for module in twin.modules()}
    assert not kinds & (decoder.RMS_NORMS | decoder.GATED_MLPS)  # the lean forms run
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
        return twin(
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


def test_a_feed_forward_block_that_is_none_of_these_runs_as_it_is() -> None:
    assert not isinstance(make_twin(original("llama", hidden_act="gelu")).layers[0].mlp, LeanMLP)
    biased = make_twin(original("llama", mlp_bias=True)).layers[0].mlp
    assert isinstance(biased, LeanMLP) and not biased.is_dense and type(biased.projections[0]) is nn.Linear
    own, x = original("llama", mlp_bias=True).layers[0].mlp, torch.randn(3, D)
    torch.testing.assert_close(biased(x), own(x))


@pytest.mark.parametrize("with_onednn", [True, False])
@pytest.mark.parametrize("recast", [True, False])
def test_autocast_is_heeded(recast: bool, with_onednn: bool, monkeypatch) -> None:
    """Under autocast to bfloat16 a float32 matrix is multiplied in bfloat16, forward and backward."""
    if not with_onednn:
        monkeypatch.setattr(linear, "ONEDNN", None)
    block = make_twin(original("qwen2")).layers[0].mlp
    x = torch.randn(3, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=recast):
        assert block.projections[0](x).dtype == (torch.bfloat16 if recast else torch.float32)
        out = block(x)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().max() > 0
