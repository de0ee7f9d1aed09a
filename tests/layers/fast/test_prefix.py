"""The fast path as an object: what it shares with its backbone, what it leaves alone, what it keeps."""

import gc
import weakref

import pytest
import torch

import layers.fast.prefix as prefix
from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.fast.attention import ATTENTION
from layers.fast.linear import REORDER, FrozenLinear

NAMES = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2"}
PREFIX, LENGTH = [1, 2], torch.tensor([4, 3])


def backbone_of(backbones, family: str, **options) -> Backbone:
    return Backbone(find_backbone(NAMES[family], str(backbones[family])), 2, **options)


def run(language_model, backbone: Backbone, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of two sequences, and the gradient that comes back to their patches."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 5, backbone.hidden_size, generator=generator).requires_grad_()
    out = language_model(PREFIX, torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), LENGTH, patches)
    out.square().sum().backward()
    return out.detach(), patches.grad


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"four_bit": True}], ids=["dense", "recomputed", "4 bit"]
)


@OPTIONS
@pytest.mark.parametrize("family", NAMES)
def test_the_backbone_is_left_alone(backbones, family: str, options: dict) -> None:
    """Neither making nor running a fast path shows in the backbone's modules, or in the attention they use."""
    backbone = backbone_of(backbones, family, **options)
    kinds = [type(module) for module in backbone.model.modules()]
    expected = run(backbone.plain, backbone)
    fast = FastPath(backbone)
    run(fast, backbone)
    assert (fast.model.config._attn_implementation, backbone.model.config._attn_implementation) == (ATTENTION, "sdpa")
    assert [type(module) for module in backbone.model.modules()] == kinds
    assert all(map(torch.equal, run(backbone.plain, backbone), expected))


@OPTIONS
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_nothing_outlives_its_last_reference(backbones, family: str, options: dict) -> None:
    """No cycles: memory is free at once, not when the garbage collector comes."""
    backbone = backbone_of(backbones, family, **options)
    fast = FastPath(backbone)
    run(fast, backbone), run(backbone.plain, backbone)
    watched = [weakref.ref(held) for held in (fast, fast.model, fast._cache, backbone, *backbone.model.parameters())]
    gc.collect()
    gc.disable()
    try:
        del fast, backbone
        assert not [ref() for ref in watched if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.skipif(REORDER is None, reason="this PyTorch has no oneDNN layouts")
@pytest.mark.parametrize(("recompute", "limit", "count"), [(False, 2**27, 2 * 2 * 7), (True, 2**27, 0), (False, 1, 0)])
def test_small_models_keep_layouts_unless_they_recompute(backbones, monkeypatch, recompute, limit, count) -> None:
    monkeypatch.setattr(prefix, "PACKED_BYTES", limit)
    backbone = backbone_of(backbones, "qwen2", recompute=recompute)
    fast = FastPath(backbone)
    run(fast, backbone)
    assert sum(len(module._layouts) for module in fast.model.modules() if isinstance(module, FrozenLinear)) == count
