"""DLinear: Are Transformers Effective for Time Series Forecasting? (Zeng et al., AAAI 2023).

Read beside section 4 of the paper. Shapes: M sequences, T = seq_len, H = pred_len.
"""

from argparse import Namespace

import torch
from torch import nn

from data_provider.batches import Batch
from layers.autoformer import decompose
from models.base import ForecastModel


class Model(ForecastModel):
    """One linear map of the window for the season and one for the trend, the same two for all channels."""

    def __init__(self, configs: Namespace):
        super().__init__()
        self.kernel = configs.moving_avg
        self.seasonal = nn.Linear(configs.seq_len, configs.pred_len)
        self.trend = nn.Linear(configs.seq_len, configs.pred_len)

    # M sequences -> forecasts `[M, H]`.
    def forward(self, batch: Batch, prototype_kv=None) -> torch.Tensor:
        seasonal, trend = decompose(batch.x[:, :, None], self.kernel)  # (M, T, 1) each
        return self.seasonal(seasonal[..., 0]) + self.trend(trend[..., 0])
