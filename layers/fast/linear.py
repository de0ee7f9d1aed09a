"""Products with a matrix that is not trained: no copy of their input is kept for a gradient that nobody asks for."""

import platform
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# oneDNN's operations, where this PyTorch has them for an x86 processor.
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _IS_X86 else None
REORDER: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _IS_X86 else None

# oneDNN multiplies with a matrix in its own layout, which costs a copy of the matrix for each direction.
# A language model whose linear layers take at most so many bytes is given these copies.
PACKED_BYTES, PACKED_ROWS = 128 * 2**20, 1024


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x `[..., k]` times the transpose of weight `[n, k]`, plus bias `[n]` -> `[..., n]`. No gradient.

    PyTorch's own float32 product on x86 is MKL's. Measured on AMD Zen 4 and Zen 5, oneDNN's is 10 to 120 %
    faster; on Intel's processors it was not measured. `weight` may be a transposed view and is not copied.
    """
    if _is_onednn(x, weight):
        return ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _is_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    is_float = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return is_float and ONEDNN is not None and bool(torch.backends.mkldnn.enabled)


def is_recast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether autocast would turn weights of this number type into another one; then PyTorch's own operations run."""
    return torch.is_autocast_enabled(device.type) and dtype != torch.get_autocast_dtype(device.type)


class FrozenLinear(nn.Module):
    """A linear layer that is not trained, around the weight `[n, k]` and bias of an `nn.Linear`.

    With `prepacked`, it keeps oneDNN's layouts of the weight from its first products on.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.prepacked = layer.weight, layer.bias, False
        self._layouts: dict[bool, torch.Tensor] = {}  # whether transposed -> the layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., k]` -> x·Wᵀ + bias `[..., n]`."""
        if is_recast(self.weight.dtype, x.device):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)
        return self.times(x)

    def times(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """x·Wᵀ + bias; or `transposed`, of a gradient `[..., n]`, x·W `[..., k]`. No gradient."""
        weight, bias = (self.weight.t(), None) if transposed else (self.weight, self.bias)
        if not (self.prepacked and REORDER and _is_onednn(x, weight)) or self.weight.is_inference():
            return product(x, weight, bias)
        if transposed not in self._layouts:
            # They outlive an evaluation, so they are no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._layouts[transposed] = REORDER(weight.detach().contiguous(), PACKED_ROWS)
        return ONEDNN(x, self._layouts[transposed], bias, "none", [], "")


# A frozen layer with the gradient of x; the weight has none, so x itself is not kept.
class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.times(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.layer.times(gradient, transposed=True), None


def freeze(module: nn.Module) -> nn.Module:
    """A plain linear layer in its frozen form; another one (a 4-bit one is a subclass) as it is."""
    return FrozenLinear(module) if type(module) is nn.Linear else module
