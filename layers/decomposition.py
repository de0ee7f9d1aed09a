"""A series as trend and season (Autoformer, Wu et al., NeurIPS 2021, section 3.1; DLinear has the same)."""

import torch
from torch import nn
from torch.nn import functional as F


def moving_average(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """Mean of `kernel` neighbouring steps, of a series whose first and last values go on beyond its ends.

    Args:
        x: `[B, T, C]`.
        kernel: steps in a mean, centred where the number is odd; an even one reaches one step further ahead than back.

    Returns:
        `[B, T, C]`.
    """
    before, after = (kernel - 1) // 2, kernel // 2
    # By hand: the gradient of PyTorch's own replication padding is not deterministic on a GPU.
    padded = torch.cat(
        [x[:, :1].expand(-1, before, -1), x, x[:, -1:].expand(-1, after, -1)], dim=1
    )  # (B, T + kernel - 1, C)
    return F.avg_pool1d(padded.transpose(1, 2), kernel, stride=1).transpose(1, 2)  # (B, T, C)


def decompose(x: torch.Tensor, kernel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Series `[B, T, C]` -> its season and its trend, each `[B, T, C]`, whose sum it is; the trend is the moving average."""
    trend = moving_average(x, kernel)
    return x - trend, trend


class SeasonalNorm(nn.Module):
    """Layer normalisation of a seasonal part, which is left with mean 0 over time (from the authors' program).

    It has no bias: the mean over time would take it out again.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        normed = self.norm(x)
        return normed - normed.mean(dim=1, keepdim=True)
