"""Normalisation: of each series (RevIN, Kim et al., ICLR 2022, without affine parameters), and of a batch of patches."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

EPSILON = 1e-5


def instance_norm(x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each series over its time axis, which is the last one.

    Args:
        x: `[..., T]` values.
        mask: `[..., T]` 1 for values that count, 0 for padding, which becomes 0 in z; at least one counts. None: all do.

    Returns:
        z `[..., T]`, mean `[..., 1]` and std `[..., 1]`, with
        ``z = (x - mean) / std``, ``std = sqrt(var + 1e-5)`` and var with divisor T, or the values that count.
    """
    if mask is None:
        mean = x.mean(dim=-1, keepdim=True)  # (..., 1)
        centred = x - mean
        std = torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + EPSILON)  # (..., 1)
    else:
        count = mask.sum(dim=-1, keepdim=True)  # (..., 1)
        mean = (x * mask).sum(dim=-1, keepdim=True) / count
        centred = (x - mean) * mask
        std = torch.sqrt(centred.square().sum(dim=-1, keepdim=True) / count + EPSILON)
    return centred / std, mean, std


class BatchNorm(nn.BatchNorm1d):
    """PyTorch's, over the batch of all processes; and a batch whose mean or variance is NaN or infinite leaves no trace.

    The loop skips the step of such a batch. With it in the running mean that evaluation normalises with, every later
    forecast would be NaN.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[M, d, L]` -> `[M, d, L]`."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()  # autograd keeps what it is given
        if not (dist.is_available() and dist.is_initialized()):
            out = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
        else:  # nn.SyncBatchNorm runs on GPUs alone
            wide = x.float()  # half precision is no type to add up in
            count = sum_over_processes(wide.new_full((), len(x) * x.shape[2]))
            centre = sum_over_processes(wide.sum((0, 2))) / count  # (d)
            centred = wide - centre[:, None]
            spread = sum_over_processes(centred.square().sum((0, 2))) / count  # (d)
            out = centred * ((spread + self.eps).rsqrt() * self.weight)[:, None] + self.bias[:, None]
            out = out.to(x.dtype)
            with torch.no_grad():
                mean.lerp_(centre, self.momentum or 0.0)
                var.lerp_(spread * count / (count - 1), self.momentum or 0.0)
        with torch.no_grad():  # nothing waits for the device
            finite = mean.isfinite().all() & var.isfinite().all()
            self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
            self.running_var.copy_(torch.where(finite, var, self.running_var))
            self.num_batches_tracked.add_(finite)
        return out


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over all processes of a group, from all of which gradients come back; of one, `x` itself."""
    return _Sum.apply(x) if dist.is_available() and dist.is_initialized() else x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)
