"""The fast path as an object: what it shares with its backbone, what it leaves alone, what it keeps."""

import gc
import weakref

import pytest
import torch

from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.fast.attention import ATTENTION
from layers.fast.linear import REORDER, FrozenLinear

NAMES = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2"}
OPENING, LENGTH = [1, 2], torch.tensor([4, 3])


def backbone_of(backbones, family: str, **options) -> Backbone:
    return Backbone(find_backbone(NAMES[family], str(backbones[family])), 2, **options)


def run(language_model, backbone: Backbone, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of two sequences, and the gradient that comes back to their patches."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 5, backbone.hidden_size, generator=generator).requires_grad_()
    out = language_model(OPENING, torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), LENGTH, patches)
    out.square().sum().backward()
    return out.detach(), patches.grad


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"four_bit": True}], ids=["dense", "recomputed", "4 bit"])
@pytest.mark.parametrize("family", NAMES)
def test_the_backbone_is_left_alone(backbones, family: str, options: dict) -> None:
    """Neither making nor running a fast path shows in the backbone's modules, or in the attention they use."""
    backbone = backbone_of(backbones, family, **options)
    kinds = [type(module) for module in backbone.model.modules()]
    expected = run(backbone.plain, backbone)
    fast = FastPath(backbone)
    seen = []
    fast.model.get_submodule("h" if family == "gpt2" else "layers")[0].register_forward_pre_hook(
        lambda *_: seen.append(backbone.model.config._attn_implementation)
    )
    run(fast, backbone)
    assert seen and set(seen) == {"sdpa"}
    assert fast.model.config._attn_implementation == ATTENTION
    assert [type(module) for module in backbone.model.modules()] == kinds
    assert not [kind for kind in kinds if kind.__module__.startswith("layers.fast")]
    assert not any("forward" in vars(module) for module in (*backbone.model.modules(), *fast.model.modules()))
    assert all(map(torch.equal, run(backbone.plain, backbone), expected))


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"four_bit": True}], ids=["dense", "recomputed", "4 bit"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_nothing_outlives_its_last_reference(backbones, family: str, options: dict) -> None:
    """No cycles: memory is free at once, not when the garbage collector comes."""
    backbone = backbone_of(backbones, family, **options)
    fast = FastPath(backbone)
    run(fast, backbone), run(backbone.plain, backbone)
    watched = [weakref.ref(held) for held in (fast, fast.model, fast._cache)]
    gc.collect()
    gc.disable()
    try:
        del fast
        assert [ref() for ref in watched] == [None] * 3
        watched = [weakref.ref(held) for held in (backbone, backbone.model, *backbone.model.parameters())]
        del backbone
        assert not [ref() for ref in watched if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.skipif(REORDER is None, reason="this PyTorch has no oneDNN layouts")
@pytest.mark.parametrize("recompute", [False, True])
def test_the_fast_path_keeps_layouts_unless_it_recomputes(backbones, recompute: bool) -> None:
    backbone = backbone_of(backbones, "qwen2", recompute=recompute)
    fast = FastPath(backbone)

    def layouts(fast: FastPath) -> int:
        return sum(len(m._layouts) for m in fast.model.modules() if isinstance(m, FrozenLinear))

    for language_model, expected in ((backbone.plain, 0), (fast, 0 if recompute else 2 * 2 * 7)):
        run(language_model, backbone)
        assert layouts(fast) == expected
    assert layouts(FastPath(backbone.to(torch.device("cpu")))) == 0
