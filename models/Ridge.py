"""Ridge regression: one linear map of the normalised window for all channels, in closed form.

Nothing in it is trained step by step: the map is fitted before the first iteration (`utils.results.baselines.fit_ridge`).
"""

from argparse import Namespace

import torch
from torch import nn

from data_provider.batches import Batch
from models.base import ForecastModel


class Model(ForecastModel):
    """x -> z·W on the scale of x, where z is the normalised window."""

    is_trained = False
    reads_masks = True

    def __init__(self, configs: Namespace):
        super().__init__()
        self.linear_map = nn.Parameter(torch.zeros(configs.seq_len, configs.pred_len), requires_grad=False)

    # M sequences -> forecasts `[M, H]`.
    def forward(self, batch: Batch, prototype_kv=None) -> torch.Tensor:
        return self.linear_forecast(batch)
