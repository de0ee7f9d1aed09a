"""A stack of linear maps: each reads a window of its own, longer ones than `--seq_len` too, and the forecast is their mean
with weights of each channel.

Nothing in it is trained step by step: all is fitted before the first iteration (`utils.results.baselines.fit_stack`).
Shapes: M sequences of N channels, L rows in the longest window, H = pred_len, K maps.
"""

from argparse import Namespace

import torch
from torch import nn

from data_provider.batches import Batch
from models.base import ForecastModel

DECAY = 0.5  # q of the maps whose penalty grows with the lag
DEVIATING = range(400, 600), range(1200, 1800)  # lengths of the windows from whose maps each channel deviates
MOST_DEVIATIONS = 25_000_000  # values that the channels' own maps may take: 100 MB; beyond, all channels share theirs


class Model(ForecastModel):
    """x -> the sum over k of weights[n, k] (x - level)·maps[k], and x·deviations[n], for a sequence x of channel n.

    A map that each channel deviates from is a member of the stack of its own: its weight is in that of the shared map, too,
    and the deviation has it already.

    Attributes:
        members: of each map the rows of its window, and q: the penalty of a lag grows with (1 + lag in days)^2q.
        deviating: places of those members from which each channel deviates.
    """

    is_trained = False

    def __init__(self, configs: Namespace):
        super().__init__()
        T, H, windows = configs.seq_len, configs.pred_len, configs.stack_windows
        channels = 1 if configs.features == "MS" else configs.enc_in
        self.members = [(rows, DECAY) for rows in windows] + [(T, 0.0)]
        self.title = f"linear stack, windows of {' '.join(str(rows) for rows, _ in self.members)} rows"
        self.history = max([T, *windows]) - T
        self.deviating = [place for place, rows in enumerate(windows) if any(rows in lengths for lengths in DEVIATING)]
        rows = max((windows[place] for place in self.deviating), default=0)
        if channels * rows * H > MOST_DEVIATIONS:
            self.deviating, rows = [], 0
        self.maps = nn.Parameter(torch.zeros(len(self.members), self.history + T, H), requires_grad=False)
        self.weights = nn.Parameter(torch.zeros(channels, len(self.members)), requires_grad=False)
        self.deviations = nn.Parameter(torch.zeros(channels, rows, H), requires_grad=False)

    # M sequences -> forecasts `[M, H]`.
    def forward(self, batch: Batch, prototype_kv=None) -> torch.Tensor:
        x = batch.x if batch.history is None else torch.cat([batch.history, batch.x], dim=1)  # (M, L)
        level = batch.x.mean(dim=1, keepdim=True)  # any will do: each column of a map has the sum 1
        z, out = x - level, x.new_empty(len(x), self.maps.shape[2])
        with torch.autocast(x.device.type, enabled=False):
            for channel in batch.channel.unique().tolist():
                of = torch.einsum("k,klh->lh", self.weights[channel], self.maps)
                of[len(of) - self.deviations.shape[1] :] += self.deviations[channel]
                own = batch.channel == channel
                out[own] = z[own] @ of
        return out + level
