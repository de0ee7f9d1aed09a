"""Autoformer: Decomposition Transformers with Auto-Correlation (Wu et al., NeurIPS 2021).

Read beside section 3 of the paper. Shapes: B windows, N channels, T = seq_len, H = pred_len,
T' = label_len + H steps of the decoder, d = d_model, F time features.

Where the paper and its authors' program part, this is the program, of which the published figures are:
the window is decomposed whole and then cut, one map W serves the three trends of a decoder layer, and
all heads share their delays.
"""

from argparse import Namespace

import pandas as pd
import torch
from torch import nn

from data_provider.batches import Batch
from data_provider.timestamps import time_marks
from layers.autoformer import AutoCorrelation, DataEmbedding, SeasonalNorm, decompose
from models.base import ForecastModel

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Model(ForecastModel):
    """An encoder of the past's season, and a decoder that refines a first guess of season and trend."""

    channel_independent = False
    whole_batches = True  # in training all share their delays

    def __init__(self, configs: Namespace):
        super().__init__()
        self.pred_len, self.label_len, self.kernel = configs.pred_len, configs.label_len, configs.moving_avg
        marks = time_marks(pd.DatetimeIndex(["2000-01-01"]), configs.freq, "timeF").shape[1]  # their columns
        channels, d_model, dropout = configs.enc_in, configs.d_model, configs.dropout
        sizes = d_model, configs.d_ff, configs.factor, configs.moving_avg, dropout, configs.activation
        self.enc_embedding = DataEmbedding(channels, d_model, marks, dropout)
        self.dec_embedding = DataEmbedding(channels, d_model, marks, dropout)
        self.encoder = nn.Sequential(*(EncoderLayer(*sizes) for _ in range(configs.e_layers)), SeasonalNorm(d_model))
        self.decoder = nn.ModuleList(DecoderLayer(channels, *sizes) for _ in range(configs.d_layers))
        self.decoder_norm = SeasonalNorm(d_model)
        self.projection = nn.Linear(d_model, channels)

    def forward(self, batch: Batch, prototype_kv=None) -> torch.Tensor:
        """Whole windows of N channels with the marks of their rows and of the decoder's -> forecasts `[M, H]`.

        The decoder starts from the season and trend of the window's last `label_len` rows, and from zeros and the
        window's mean where the horizon is (equation 2).
        """
        assert batch.windows is not None, "the loader makes no windows for this model"
        x, x_mark, y_mark, channels = batch.windows
        encoded = self.encoder(self.enc_embedding(x, x_mark))  # (B, T, d)
        season, trend = (part[:, x.shape[1] - self.label_len :] for part in decompose(x, self.kernel))
        mean = x.mean(dim=1, keepdim=True).expand(-1, self.pred_len, -1)  # (B, H, N)
        season = torch.cat([season, torch.zeros_like(mean)], dim=1)  # (B, T', N)
        trend = torch.cat([trend, mean], dim=1)  # (B, T', N)
        hidden = self.dec_embedding(season, y_mark)  # (B, T', d)
        for layer in self.decoder:
            hidden, more = layer(hidden, encoded)  # (B, T', d), (B, T', N)
            trend = trend + more
        out = self.projection(self.decoder_norm(hidden)) + trend  # (B, T', N)
        return out[:, -self.pred_len :, channels].transpose(1, 2).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Auto-correlation and a feed-forward block; of what each makes, the season is kept (equation 3)."""

    def __init__(self, d_model: int, d_ff: int, factor: int, kernel: int, dropout: float, activation: str):
        super().__init__()
        self.kernel = kernel
        self.attention = AutoCorrelation(d_model, factor)
        self.feed_forward = _feed_forward(d_model, d_ff, dropout, activation)
        self.dropout = nn.Dropout(dropout)

    # `[B, T, d]` -> `[B, T, d]`.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = decompose(x + self.dropout(self.attention(x, x)), self.kernel)
        x, _ = decompose(x + self.feed_forward(x), self.kernel)
        return x


class DecoderLayer(nn.Module):
    """As the encoder's, with a look at the encoder's output between; the three trends that are split off go to the
    forecast (equation 4)."""

    def __init__(self, channels: int, d_model: int, d_ff: int, factor: int, kernel: int, dropout: float, activation: str):
        super().__init__()
        self.kernel = kernel
        self.self_attention = AutoCorrelation(d_model, factor)
        self.cross_attention = AutoCorrelation(d_model, factor)
        self.feed_forward = _feed_forward(d_model, d_ff, dropout, activation)
        self.trend_projection = nn.Conv1d(d_model, channels, 3, padding=1, padding_mode="circular", bias=False)
        self.dropout = nn.Dropout(dropout)

    # `[B, T', d]` and the encoder's output `[B, T, d]` -> season `[B, T', d]` and trend `[B, T', N]`.
    def forward(self, x: torch.Tensor, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, first = decompose(x + self.dropout(self.self_attention(x, x)), self.kernel)
        x, second = decompose(x + self.dropout(self.cross_attention(x, encoded)), self.kernel)
        x, third = decompose(x + self.feed_forward(x), self.kernel)
        trend = (first + second + third).transpose(1, 2)  # (B, d, T')
        return x, self.trend_projection(trend).transpose(1, 2)


# Two maps of each step on its own; without bias, as in the authors' program.
def _feed_forward(d_model: int, d_ff: int, dropout: float, activation: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_model, d_ff, bias=False), ACTIVATIONS[activation](), nn.Dropout(dropout),
        nn.Linear(d_ff, d_model, bias=False), nn.Dropout(dropout),
    )  # fmt: skip
