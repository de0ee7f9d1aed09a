"""Products with a matrix that is not trained."""

import platform

import torch
from torch import nn
from torch.nn import functional as F


def _find_onednn():
    """oneDNN's product, where this PyTorch has it for an x86 processor."""
    if platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None


ONEDNN = _find_onednn()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x `[..., k]` times the transpose of weight `[n, k]`, plus bias `[n]` -> `[..., n]`. No gradient.

    PyTorch's own float32 product on x86 is MKL's. Measured on an AMD Zen 4, oneDNN's is 10 to 20 %
    faster; on Intel's processors it was not measured. `weight` may be a transposed view and is not copied.
    """
    if _is_onednn(x, weight):
        return ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _is_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    is_float = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return is_float and ONEDNN is not None and torch.backends.mkldnn.enabled


def is_recast(tensor: torch.Tensor) -> bool:
    """Whether autocast would turn this tensor into another number type; then modules run as they are."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and tensor.dtype != torch.get_autocast_dtype(kind)


class _FrozenLinear(torch.autograd.Function):
    """`product` with the gradient of x; the matrix has none, so x itself is not kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t()), None, None


def is_dense(*modules: nn.Module) -> bool:
    """Whether these are plain linear layers (a 4-bit one is a subclass) in the type they compute in."""
    return all(type(module) is nn.Linear and not is_recast(module.weight) for module in modules)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the frozen `module` makes of x `[..., k]`; one that is no plain linear layer runs as it is."""
    if not is_dense(module):
        return module(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, module.weight, module.bias)
    return product(x, module.weight, module.bias)
