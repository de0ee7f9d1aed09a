"""What stands between the products of a frozen layer, in one kernel each on CUDA, and in PyTorch's operations elsewhere.

A kernel, PyTorch's own or one that is compiled for the GPU (by NVRTC, which comes with PyTorch), is compared with the
formula before its first use; where there is none, or it differs, the formula is used. Only these comparisons wait for the
GPU, once a process.
"""

import functools

import torch
from torch.nn import functional as F

# Computed in float32, whatever the tensors hold.
GATED_SILU = """
template <typename T> T gated_silu(T gate, T up) {
  return gate / (T(1) + ::exp(-gate)) * up;
}"""
GATED_SILU_GRADIENTS = """
template <typename T> void gated_silu_gradients(T gate, T up, T gradient, T& into_gate, T& into_up) {
  T s = T(1) / (T(1) + ::exp(-gate));
  into_gate = gradient * up * s * (T(1) + gate * (T(1) - s));
  into_up = gradient * gate * s;
}"""


def gated_silu(gate: torch.Tensor, up: torch.Tensor, reuse: bool = False) -> torch.Tensor:
    """silu(gate) * up. No gradient.

    Args:
        reuse: gate may be overwritten.
    """
    if gate.device.type == "cuda" and (kernels := _gate_kernels(gate.device, gate.dtype)):
        return kernels[0](gate, up)
    return F.silu(gate, inplace=reuse).mul_(up)


def gated_silu_gradients(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, from that of silu(gate) * up."""
    if gate.device.type == "cuda" and (kernels := _gate_kernels(gate.device, gate.dtype)):
        return tuple(kernels[1](gate, up, gradient))
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


@functools.cache
def _gate_kernels(device: torch.device, dtype: torch.dtype):
    """Kernels of silu(gate) * up and of its gradients; None where the GPU has none that agree with the formula."""
    compiler = torch.cuda.jiterator
    try:
        forward = compiler._create_jit_fn(GATED_SILU)
        backward = compiler._create_multi_output_jit_fn(GATED_SILU_GRADIENTS, num_outputs=2)
        with torch.inference_mode(False), torch.no_grad():
            values = torch.linspace(-30, 30, 999, device=device, dtype=dtype)
            gate, up, gradient = values, values.flip(0), values.roll(300)
            found = [forward(gate, up), *backward(gate, up, gradient)]
            wide = [t.double() for t in (gate, up, gradient)]
            expected = [
                F.silu(wide[0]) * wide[1],
                torch.ops.aten.silu_backward(wide[2] * wide[1], wide[0]),
                F.silu(wide[0]) * wide[2],
            ]
            return (forward, backward) if _agree(found, expected, 2e-2, 1e-3) else None
    except torch.OutOfMemoryError:  # says nothing of the kernels; the step is tried again
        raise
    except (RuntimeError, AssertionError, AttributeError):  # no NVRTC, an older driver; a PyTorch without the compiler
        return None


def _agree(found: list[torch.Tensor], expected: list[torch.Tensor], relative: float, absolute: float) -> bool:
    """Whether tensors are, but for rounding, the expected ones, which are float64."""
    wrong = [~((a.double() - b).abs() <= absolute + relative * b.abs()) for a, b in zip(found, expected, strict=True)]
    return int(torch.stack([values.sum() for values in wrong]).sum()) == 0


def has_norm_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rms_norm` may be called: PyTorch's kernel wants CUDA and one number type, and has to agree."""
    return x.device.type == "cuda" and x.dtype == weight.dtype and _norm_agrees(x.device, x.dtype, x.shape[-1])


@functools.cache
def _norm_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether `rms_norm` and `rms_norm_gradient` give what the formula does, for rows of this width.

    PyTorch chooses among its kernels by width; a language model has one or two of them.
    """
    rows, eps = 33, 0.125  # an odd number of rows; an eps that the results show
    try:
        with torch.inference_mode(False), torch.no_grad():
            # Not drawn: the generator stays where it is.
            steps = torch.arange(rows * width, device=device, dtype=torch.float32).view(rows, width)
            x, gradient, weight = (
                (2 * steps.sin()).to(dtype),
                (1.3 * steps).cos().to(dtype),
                (1 + steps[0].sin() / 2).to(dtype),
            )
            out, scale = rms_norm(x, weight, eps)
            found = [out, scale, rms_norm_gradient(gradient, x, scale, weight)]
            wide, inner = x.double(), gradient.double() * weight.double()
            factor = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
            slope = inner * factor - wide * factor.pow(3) * (inner * wide).mean(-1, keepdim=True)
            tolerance = max(4 * torch.finfo(dtype).eps, 1e-4)
            return _agree(found, [wide * factor * weight.double(), factor, slope], tolerance, tolerance)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError):  # no kernel for this device or type; a PyTorch without the operation
        return False


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis `[..., D]`, and 1 / sqrt(...) `[..., 1]` in float32."""
    return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)


def rms_norm_gradient(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of x, from that of `rms_norm`'s first result and its second."""
    shape = [x.shape[-1]]
    return torch.ops.aten._fused_rms_norm_backward(gradient.contiguous(), x, shape, scale, weight, [True, False])[0]
