"""Ridge regression: one linear map of the normalised window for all channels, in closed form.

Nothing in it is trained step by step: the map is fitted before the first iteration (`utils.results.baselines.fit_ridge`).
"""

from argparse import Namespace

import torch
from torch import nn

from data_provider.batches import Sequences
from layers.norm import instance_norm
from models.forecaster import Forecaster


class Model(Forecaster):
    """x -> z·W on the scale of x, where z is the normalised window."""

    is_trained = False
    reads_masks = True

    def __init__(self, configs: Namespace):
        super().__init__()
        self.linear_map = nn.Parameter(torch.zeros(configs.seq_len, configs.pred_len), requires_grad=False)

    def forward(self, x_enc: torch.Tensor, x_mark_enc=None, x_dec=None, x_mark_dec=None) -> torch.Tensor:
        """Windows `[B, T, N]` of any N -> forecasts `[B, H, N]`; marks and decoder input are not used."""
        assert self.linear_map is not None
        z, mean, deviation = instance_norm(x_enc.transpose(1, 2))  # (B, N, T), (B, N, 1), (B, N, 1)
        return (z @ self.linear_map * deviation + mean).transpose(1, 2)

    def forecast_part(self, part: Sequences, shared: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See `Forecaster`."""
        if part.x_mask is None:
            return super().forecast_part(part, shared)
        assert self.linear_map is not None
        z, mean, deviation = instance_norm(part.x, part.x_mask)  # (M, T), (M, 1), (M, 1)
        return z @ self.linear_map * deviation + mean
