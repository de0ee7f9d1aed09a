"""Products with a matrix that is not trained: no copy of their input is kept for a gradient that nobody asks for."""

import platform
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def _find_onednn(name: str):
    """One of oneDNN's operations, where this PyTorch has it for an x86 processor."""
    if platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, name, None)
    return None


ONEDNN = _find_onednn("_linear_pointwise")
REORDER = _find_onednn("_reorder_linear_weight")

# oneDNN multiplies with a matrix in its own layout, which costs a copy of the matrix for each direction.
# A language model whose linear layers take at most so many bytes is given these copies.
PACKED_BYTES, PACKED_ROWS = 128 * 2**20, 1024


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
    return is_float and ONEDNN is not None and bool(torch.backends.mkldnn.enabled)


def is_recast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether autocast would turn weights of this number type into another one; then PyTorch's own operations run."""
    return torch.is_autocast_enabled(device.type) and dtype != torch.get_autocast_dtype(device.type)


class FrozenWeight:
    """A frozen matrix `[n, k]`, multiplied from both sides. No gradient.

    With `prepacked`, it keeps oneDNN's layouts from its first products on: a few per cent of the time
    of a small language model for its weights once more in each direction. A weight that has been
    changed since is laid out anew.
    """

    def __init__(self, weight: torch.Tensor, prepacked: bool = False):
        self.weight, self.prepacked = weight, prepacked
        self._layouts: dict[bool, torch.Tensor] = {}  # whether transposed -> the layout
        self._version: int | None = None  # of the weight that was laid out

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., k]` -> x·Wᵀ + bias `[..., n]`."""
        return self._product(x, self.weight, bias, transposed=False)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """`[..., n]` -> gradient·W `[..., k]`."""
        return self._product(gradient, self.weight.t(), None, transposed=True)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
        if not (self.prepacked and REORDER and _is_onednn(x, weight)) or self.weight.is_inference():
            return product(x, weight, bias)
        if self._version != self.weight._version:
            self._layouts, self._version = {}, self.weight._version
        if transposed not in self._layouts:
            # They outlive an evaluation, so they are no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._layouts[transposed] = REORDER(weight.detach().contiguous(), PACKED_ROWS)
        return ONEDNN(x, self._layouts[transposed], bias, "none", [], "")


class _FrozenProduct(torch.autograd.Function):
    """`FrozenWeight.forward` with the gradient of x; the weight has none, so x itself is not kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, frozen: FrozenWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.frozen = frozen
        return frozen.forward(x, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.frozen.backward(gradient), None, None


class FrozenLinear(nn.Module):
    """A linear layer that is not trained, around the weight and bias of an `nn.Linear`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.frozen = FrozenWeight(layer.weight)

    @classmethod
    def of(cls, layer: nn.Module) -> nn.Module:
        """`layer` in its frozen form; one that is no plain linear layer (a 4-bit one is a subclass) as it is."""
        return cls(layer) if type(layer) is nn.Linear else layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., k]` -> `[..., n]`."""
        if is_recast(self.weight.dtype, x.device):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self.frozen, self.bias)
        return self.frozen.forward(x, self.bias)


def prepack_weights(model: nn.Module) -> None:
    """Let the frozen linear layers of a model keep oneDNN's layouts, where its linear layers are small together."""
    layers: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, FrozenLinear)]
    small = sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES
    for layer in layers:
        if isinstance(layer, FrozenLinear):
            layer.frozen.prepacked = small
