"""Kernels of the frozen layers: their CUDA sources, compiled for the processor, against automatic differentiation."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from layers.fast import kernels

COUNT = 601
HARNESS = """
#include <cmath>
using std::exp;
{sources}
extern "C" void run(
    int n, const float* gate, const float* up, const float* gradient, float* out, float* into_gate, float* into_up) {{
  for (int i = 0; i < n; i++) {{
    out[i] = gated_silu(gate[i], up[i]);
    gated_silu_gradients(gate[i], up[i], gradient[i], into_gate[i], into_up[i]);
  }}
}}"""


def expected(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """silu(gate) * up and its two gradients, by automatic differentiation in float64."""
    gate, up = (t.double().requires_grad_() for t in (gate, up))
    out = gate * torch.sigmoid(gate) * up
    return [out.detach(), *torch.autograd.grad(out, (gate, up), gradient.double())]


def operands() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.linspace(-60, 60, COUNT), torch.randn(COUNT) * 5, torch.randn(COUNT)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels' sources with")
def test_sources_compute_the_formula(tmp_path: Path) -> None:
    source, library = tmp_path / "kernels.cpp", tmp_path / "kernels.so"
    source.write_text(HARNESS.format(sources=kernels.GATED_SILU + kernels.GATED_SILU_GRADIENTS))
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    values, found = operands(), [torch.empty(COUNT) for _ in range(3)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in [*values, *found]]
    ctypes.CDLL(str(library)).run(COUNT, *pointers)
    for ours, theirs in zip(found, expected(*values), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_operations_compute_the_formula() -> None:
    gate, up, gradient = operands()
    out, into_gate, into_up = expected(gate, up, gradient)
    torch.testing.assert_close(kernels.gated_silu(gate, up).double(), out, rtol=1e-5, atol=1e-5)
    found = kernels.gated_silu_gradients(gate, up, gradient)
    torch.testing.assert_close([t.double() for t in found], [into_gate, into_up], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.gated_silu(gate.clone(), up, reuse=True).double(), out, rtol=1e-5, atol=1e-5)


class Compiler:
    """Stands for PyTorch's: what it makes runs on the processor, and may be wrong or missing."""

    def __init__(self, error: float = 0.0, fails: bool = False):
        self.error, self.fails = error, fails

    def _create_jit_fn(self, source: str):
        return lambda gate, up: self._run(F.silu(gate) * up)

    def _create_multi_output_jit_fn(self, source: str, num_outputs: int):
        def run(gate, up, gradient):
            slope = torch.ops.aten.silu_backward(gradient * up, gate)
            return self._run(slope), self._run(F.silu(gate) * gradient)

        return run

    def _run(self, values: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture")
        return values * (1 + self.error)


@pytest.mark.parametrize(
    ("compiler", "is_used"), [(Compiler(), True), (Compiler(error=0.1), False), (Compiler(fails=True), False)]
)
def test_a_kernel_that_fails_or_differs_is_not_used(monkeypatch, compiler: Compiler, is_used: bool) -> None:
    monkeypatch.setattr(torch.cuda, "jiterator", compiler)
    found = kernels._gate_kernels.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert (found is not None) is is_used


def check_norm(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor | None, tolerance: float) -> None:
    wide = x.double().requires_grad_()
    out = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    found, scale = kernels.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(found.double(), out.detach(), rtol=tolerance, atol=tolerance)
    if gradient is not None:
        (expected,) = torch.autograd.grad(out, wide, gradient.double())
        ours = kernels.rms_norm_gradient(gradient, x, scale, weight)
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_computes_what_the_module_does() -> None:
    """The operation that CUDA has as one kernel, on the processor, which has none for its gradient."""
    torch.manual_seed(0)
    check_norm(torch.randn(5, 7, 24), torch.rand(24) + 0.5, None, 1e-5)


def gradient_by_hand(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm's gradient, which the processor has no kernel for, by automatic differentiation in float64."""
    eps = (scale.double().pow(-2) - x.double().square().mean(-1, keepdim=True)).mean()
    wide = x.double().requires_grad_()
    out = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return torch.autograd.grad(out, wide, gradient.double())[0].to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("into_out", "into_gradient", "is_used"), [(1, 1, True), (1.1, 1, False), (1, 1.1, False), (float("nan"), 1, False)]
)
def test_a_norm_that_differs_is_not_used(
    monkeypatch, dtype: torch.dtype, into_out: float, into_gradient: float, is_used: bool
) -> None:
    norm = kernels.rms_norm

    def forward(x, weight, eps):
        out, scale = norm(x, weight, eps)
        return out * into_out, scale

    def backward(gradient, x, scale, weight):
        with torch.enable_grad():
            return gradient_by_hand(gradient, x, scale, weight) * into_gradient

    monkeypatch.setattr(kernels, "rms_norm", forward)
    monkeypatch.setattr(kernels, "rms_norm_gradient", backward)
    before = torch.get_rng_state()
    for width in (24, 130):
        assert kernels._norm_agrees.__wrapped__(torch.device("cpu"), dtype, width) is is_used
    assert torch.equal(torch.get_rng_state(), before)


def test_a_norm_without_a_kernel_is_not_used() -> None:
    """The processor has none for the gradient."""
    assert kernels._norm_agrees.__wrapped__(torch.device("cpu"), torch.float32, 24) is False


def test_out_of_memory_says_nothing_of_a_kernel(monkeypatch) -> None:
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "rms_norm", short)
    with pytest.raises(torch.OutOfMemoryError):
        kernels._norm_agrees.__wrapped__(torch.device("cpu"), torch.float32, 24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    values = [t.clamp(-20, 20).to("cuda", dtype) for t in operands()]
    assert kernels._gate_kernels(values[0].device, dtype) is not None
    found = [kernels.gated_silu(*values[:2]), *kernels.gated_silu_gradients(*values)]
    for ours, theirs in zip(found, expected(*values), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=1e-2)
    x, gradient = (torch.randn(5, 7, 64, device="cuda", dtype=dtype) for _ in range(2))
    assert all(kernels._norm_agrees(x.device, dtype, width) for width in (64, 130, 2048))
    check_norm(x, torch.rand(64, device="cuda", dtype=dtype) + 0.5, gradient, 2e-2)
