"""Autoformer against the paper's equations, written here with sums and matrices."""

from argparse import Namespace

import pandas as pd
import torch
from torch.nn import functional as F

from data_provider.timestamps import time_marks
from layers.autoformer import AutoCorrelation, SeasonalNorm
from models.Autoformer import Model
from tests.small_run import defaults

T, LABEL, H, N, KERNEL = 20, 8, 6, 3, 5


def configs(**flags: object) -> Namespace:
    """The flags' defaults, for a small window."""
    small = {
        "seq_len": T, "label_len": LABEL, "pred_len": H, "enc_in": N, "moving_avg": KERNEL, "d_model": 8, "d_ff": 12,
        "e_layers": 2, "d_layers": 2,
    }  # fmt: skip
    return defaults(**small | flags)


def batch(windows: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random windows `[B, T, N]` in float64, their marks and those of the decoder."""
    x = torch.randn(windows, T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    marks = torch.from_numpy(
        time_marks(pd.date_range("2020-02-27", periods=T + H + windows, freq="h"), "h", "timeF")
    ).double()
    history = torch.stack([marks[i : i + T] for i in range(windows)])
    ahead = torch.stack([marks[i + T - LABEL : i + T + H] for i in range(windows)])
    return x, history, ahead


def random_model(**flags: object) -> Model:
    torch.manual_seed(0)
    model = Model(configs(**flags)).double()
    for module in model.modules():
        if isinstance(module, SeasonalNorm):
            torch.nn.init.normal_(module.norm.weight)
    return model


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 1, step by step."""
    steps = x.shape[1]
    near = [[min(max(t + o, 0), steps - 1) for o in range(-(KERNEL // 2), KERNEL // 2 + 1)] for t in range(steps)]
    trend = torch.stack([x[:, places].mean(dim=1) for places in near], dim=1)
    return x - trend, trend


def circular(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A convolution of width 3 over `[B, T, C]`, time being a circle; weight `[out, C, 3]`."""
    return sum(torch.roll(x, 1 - tap, dims=1) @ weight[:, :, tap].T for tap in range(3))


def mixed(layer: AutoCorrelation, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Equations 5 and 6 in inference, window by window."""
    L = x.shape[1]
    source = F.pad(source[:, :L], (0, 0, 0, max(L - source.shape[1], 0)))
    queries, keys, values = layer.query_projection(x), layer.key_projection(source), layer.value_projection(source)
    out = []
    for q, k, v in zip(queries, keys, values, strict=True):
        scores = torch.stack([(torch.roll(q, -delay, dims=0) * k).mean(dim=1).sum() for delay in range(L)])
        best = scores.topk(int(torch.tensor(float(L)).log())).indices
        weights = scores[best].softmax(0)
        out.append(sum(w * torch.roll(v, -int(delay), dims=0) for w, delay in zip(weights, best, strict=True)))
    return torch.stack(out) @ layer.out_projection.weight.T


def seasonal_norm(norm: SeasonalNorm, x: torch.Tensor) -> torch.Tensor:
    z = F.layer_norm(x, x.shape[-1:], norm.norm.weight)
    return z - z.mean(dim=1, keepdim=True)


def forecast(model: Model, x: torch.Tensor, history: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
    """Section 3.1 from top to bottom."""

    def embed(embedding, values, marks):
        return circular(values, embedding.value_embedding.tokenConv.weight) + marks @ embedding.time_embedding.weight.T

    def feed_forward(layer, x):
        return F.gelu(x @ layer.feed_forward[0].weight.T) @ layer.feed_forward[3].weight.T

    *layers, norm = model.encoder
    encoded = embed(model.enc_embedding, x, history)
    for layer in layers:
        encoded = split(encoded + mixed(layer.attention, encoded, encoded))[0]
        encoded = split(encoded + feed_forward(layer, encoded))[0]
    encoded = seasonal_norm(norm, encoded)

    season, trend = (part[:, T - LABEL :] for part in split(x))
    season, trend = F.pad(season, (0, 0, 0, H)), torch.cat([trend, x.mean(dim=1)[:, None].repeat(1, H, 1)], dim=1)
    hidden = embed(model.dec_embedding, season, ahead)
    for layer in model.decoder:
        hidden, first = split(hidden + mixed(layer.self_attention, hidden, hidden))
        hidden, second = split(hidden + mixed(layer.cross_attention, hidden, encoded))
        hidden, third = split(hidden + feed_forward(layer, hidden))
        trend = trend + circular(first + second + third, layer.trend_projection.weight)
    out = seasonal_norm(model.decoder_norm, hidden) @ model.projection.weight.T + model.projection.bias + trend
    return out[:, -H:]


def test_forecast_against_the_equations() -> None:
    model = random_model().eval()
    x, history, ahead = batch()
    with torch.no_grad():
        torch.testing.assert_close(model(x, history, None, ahead), forecast(model, x, history, ahead))
        ignored = torch.randn(3, LABEL + H, N)
        assert torch.equal(model(x, history, ignored, ahead), model(x, history, None, ahead))
