"""Frozen layers in fp16 against float32: within its precision, also where numbers leave its range."""

from pathlib import Path

import pytest
import torch

from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.mapping import MappingLayer
from tests.conftest import NAMES

M, N, L = 3, 5, 4
# Of the largest value; fp16 rounds by 0.05 %, and a gradient has gone through some thirty products.
FORWARD, BACKWARD = 3e-3, 2e-2


@pytest.fixture(scope="module")
def read(backbones: dict[str, Path]):
    """`read(family, dtype, four_bit)`: a backbone of two layers."""

    def backbone(family: str, dtype: torch.dtype, four_bit: bool = False) -> Backbone:
        return Backbone(find_backbone(NAMES[family], str(backbones[family])), 2, four_bit=four_bit, dtype=dtype)

    return backbone


def run(path, dtype: torch.dtype, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states `[M, L, D]` of a path, and the gradient of its patches."""
    torch.manual_seed(0)
    patches = (0.1 * torch.randn(M, L, width)).requires_grad_()
    weight = torch.randn(M, L, width)
    ids, length = torch.arange(M * N).view(M, N) + 20, torch.tensor([N, 2, N - 1])
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        out = path([3, 4, 5], ids, length, patches)
    (out * weight).sum().backward()  # after autocast, as a training step has it
    return out.detach(), patches.grad


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_fp16_equals_float32_within_its_precision(read, family: str, fast: bool) -> None:
    if fast and family == "bert":
        pytest.skip("not causal")
    found, expected = (
        run(FastPath(backbone) if fast else backbone.plain, dtype, backbone.hidden_size)
        for dtype in (torch.float16, torch.float32)
        for backbone in [read(family, dtype)]
    )
    assert error(found[0], expected[0]) < FORWARD and error(found[1], expected[1]) < BACKWARD


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_four_bit_layers_compute_in_fp16(read, family: str) -> None:
    import bitsandbytes

    half = read(family, torch.float16, four_bit=True)
    layers = [module for module in half.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers and {layer.compute_dtype for layer in layers} == {half.dtype} == {torch.float16}
    (fast, gradient), (plain, plain_gradient) = (
        run(path, torch.float16, half.hidden_size) for path in (FastPath(half), half.plain)
    )
    assert error(fast, plain) < FORWARD and error(gradient, plain_gradient) < BACKWARD
    wide, _ = run(FastPath(read(family, torch.float32, four_bit=True)), torch.float32, half.hidden_size)
    assert error(fast, wide) < 0.15  # a weight between two of the sixteen levels may go either way


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_activations_beyond_the_range_of_fp16(read, fast: bool, four_bit: bool) -> None:
    """The feed-forward block's inner product and the residual stream reach 1e5 and more."""
    half, wide = (read("qwen2", dtype, four_bit) for dtype in (torch.float16, torch.float32))
    peaks: list[float] = []
    for backbone in (half, wide):
        for layer in backbone.model.layers:
            gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
            gate.register_forward_hook(lambda _, __, out: out * 32)
            up.register_forward_hook(lambda _, __, out: out * 2**12)
    for layer in wide.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: peaks.append(inputs[0].abs().max().item()))
    width = half.hidden_size
    reference = run(wide.plain, torch.float32, width)
    assert max(peaks) > 1e5
    out, gradient = run(FastPath(half) if fast else half.plain, torch.float16, width)
    assert torch.isfinite(out).all() and torch.isfinite(gradient).all()
    if not four_bit:  # whose rounding is coarser
        assert error(out, reference[0]) < FORWARD and error(gradient, reference[1]) < BACKWARD


def test_the_mapping_layers_gradient_may_leave_the_range_of_fp16() -> None:
    """A step's guard looks at G; what is formed of it must be finite whenever G is."""
    torch.manual_seed(0)
    words = torch.randn(50, 16).half()
    layer = MappingLayer(50, 20)
    layer.factored = True
    G = torch.randn(20, 16) * torch.logspace(-12, 12, 20)[:, None]
    (layer(words) * G).sum().backward()
    formed = torch.cat([block for _, block in layer.gradient_blocks(layer.gradient_factor)]).t()
    expected = G @ words.float().t()
    largest = expected.abs().amax(1, keepdim=True)
    assert ((formed - expected).abs() / largest).max() < 3e-3


def test_weights_and_caches_are_fp16_and_norms_float32(read) -> None:
    half = read("qwen2", torch.float16)
    for name, parameter in half.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.float16)
    fast, kept = FastPath(half), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(fast, torch.float16, half.hidden_size)
    assert {buffer.dtype for layer in fast._cache._layers for buffer in layer.buffers} == {torch.float16}
    inner = {t.dtype for t in kept if t.shape[-1:] == (half.inner_size,)}
    assert inner == {torch.float16}  # gate and up, the largest that a layer keeps
