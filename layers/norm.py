"""Instance normalisation: RevIN (Kim et al., ICLR 2022) without affine parameters."""

import torch

EPSILON = 1e-5


def instance_norm(x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each series over its time axis, which is the last one.

    Args:
        x: `[..., T]` values.
        mask: `[..., T]` 1 for values that count, 0 for padding, which becomes 0 in z; at least one counts. None: all do.

    Returns:
        z `[..., T]`, mean `[..., 1]` and deviation `[..., 1]`, with
        ``z = (x - mean) / deviation``, ``deviation = sqrt(var + 1e-5)`` and var with divisor T, or the values that count.
    """
    if mask is not None:
        count = mask.sum(dim=-1, keepdim=True)  # (..., 1)
        mean = (x * mask).sum(dim=-1, keepdim=True) / count
        centred = (x - mean) * mask
        deviation = torch.sqrt(centred.square().sum(dim=-1, keepdim=True) / count + EPSILON)
        return centred / deviation, mean, deviation
    mean = x.mean(dim=-1, keepdim=True)  # (..., 1)
    centred = x - mean
    deviation = torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + EPSILON)  # (..., 1)
    return centred / deviation, mean, deviation
