"""DLinear: Are Transformers Effective for Time Series Forecasting? (Zeng et al., AAAI 2023).

Read beside section 4 of the paper. Shapes: B windows, N channels, T = seq_len, H = pred_len.
"""

from argparse import Namespace

import torch
from torch import nn

from layers.decomposition import decompose
from models.forecaster import Forecaster


class Model(Forecaster):
    """One linear map of the window for the season and one for the trend, the same two for all channels."""

    def __init__(self, configs: Namespace):
        super().__init__()
        self.kernel = configs.moving_avg
        self.seasonal = nn.Linear(configs.seq_len, configs.pred_len)
        self.trend = nn.Linear(configs.seq_len, configs.pred_len)

    def forward(self, x_enc: torch.Tensor, x_mark_enc=None, x_dec=None, x_mark_dec=None) -> torch.Tensor:
        """Windows `[B, T, N]` of any N -> forecasts `[B, H, N]`; marks and decoder input are not used."""
        seasonal, trend = decompose(x_enc, self.kernel)  # (B, T, N) each
        out = self.seasonal(seasonal.transpose(1, 2)) + self.trend(trend.transpose(1, 2))  # (B, N, H)
        return out.transpose(1, 2)
