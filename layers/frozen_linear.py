"""Products with a matrix that is not trained."""

import platform

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
    return is_float and ONEDNN is not None and torch.backends.mkldnn.enabled


def is_recast(tensor: torch.Tensor) -> bool:
    """Whether autocast would turn this tensor into another number type; then modules run as they are."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and tensor.dtype != torch.get_autocast_dtype(kind)


class Matrix:
    """The frozen matrix of a linear layer, multiplied from both sides. No gradient.

    Made with `packs`, it keeps oneDNN's layouts from its first products on: a few per cent of the time
    of a small language model for its weights once more in each direction. A weight that has been
    changed or replaced since is laid out anew.
    """

    def __init__(self, layer: nn.Linear, packs: bool = False):
        self._layer, self._packs = layer, packs
        self._packed: dict[bool, torch.Tensor] = {}  # whether transposed -> the layout
        self._source: tuple[torch.Tensor, int] | None = None  # the weight laid out, and its version

    @property
    def weight(self) -> torch.Tensor:
        return self._layer.weight

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., k]` -> x·Wᵀ + bias `[..., n]`."""
        return self._product(x, self.weight, bias, transposed=False)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """`[..., n]` -> gradient·W `[..., k]`."""
        return self._product(gradient, self.weight.t(), None, transposed=True)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool):
        whole = self.weight
        if not (self._packs and REORDER and _is_onednn(x, weight)) or whole.is_inference():
            return product(x, weight, bias)
        if self._source is None or self._source[0] is not whole or self._source[1] != whole._version:
            self._packed, self._source = {}, (whole, whole._version)
        if transposed not in self._packed:
            # They outlive an evaluation, so they are no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                self._packed[transposed] = REORDER(weight.detach().contiguous(), PACKED_ROWS)
        return ONEDNN(x, self._packed[transposed], bias, "none", [], "")


def give_matrices(model: nn.Module) -> None:
    """Let the plain linear layers of a frozen model keep oneDNN's layouts, where they are small.

    Layouts made before are dropped.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    packs = sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES
    for layer in layers:
        layer.frozen_matrix = Matrix(layer, packs)


def matrix(layer: nn.Linear) -> Matrix:
    """The layer's `Matrix`: the one it was given, else a new one."""
    return getattr(layer, "frozen_matrix", None) or Matrix(layer)


class _FrozenLinear(torch.autograd.Function):
    """`Matrix.forward` with the gradient of x; the matrix has none, so x itself is not kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.forward(x, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.matrix.backward(gradient), None, None


def is_dense(*modules: nn.Module) -> bool:
    """Whether these are plain linear layers (a 4-bit one is a subclass) in the type they compute in."""
    return all(type(module) is nn.Linear and not is_recast(module.weight) for module in modules)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the frozen `module` makes of x `[..., k]`; one that is no plain linear layer runs as it is."""
    if not is_dense(module):
        return module(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, matrix(module), module.bias)
    return matrix(module).forward(x, module.bias)
