"""Instance normalisation: RevIN (Kim et al., ICLR 2022) without affine parameters."""

import torch

EPSILON = 1e-5


def instance_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each series over its time axis, which is the last one.

    Args:
        x: `[..., T]` values.

    Returns:
        z `[..., T]`, mean `[..., 1]` and deviation `[..., 1]`, with
        ``z = (x - mean) / deviation``, ``deviation = sqrt(var + 1e-5)`` and var with divisor T.
    """
    mean = x.mean(dim=-1, keepdim=True)  # (..., 1)
    centred = x - mean
    deviation = torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + EPSILON)  # (..., 1)
    return centred / deviation, mean, deviation
