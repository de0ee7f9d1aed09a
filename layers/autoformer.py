"""What Autoformer is made of (Wu et al., NeurIPS 2021): decomposition, auto-correlation, embedding of values and calendar.

DLinear has the same decomposition. Shapes: B windows, T or L steps, N channels, F time marks, d = d_model.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from layers.norm import sum_over_processes
from layers.patch import TokenEmbedding


def decompose(x: torch.Tensor, kernel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Series `[B, T, N]` -> its season and its trend, each `[B, T, N]`, whose sum it is (section 3.1).

    The trend is the mean of `kernel` neighbouring steps, of a series whose first and last values go on beyond its ends;
    an even kernel reaches one step further ahead than back.
    """
    before, after = (kernel - 1) // 2, kernel // 2
    # By hand: the gradient of PyTorch's own replication padding is not deterministic on a GPU.
    first, last = x[:, :1].expand(-1, before, -1), x[:, -1:].expand(-1, after, -1)
    padded = torch.cat([first, x, last], dim=1)  # (B, T + kernel - 1, N)
    trend = F.avg_pool1d(padded.transpose(1, 2), kernel, stride=1).transpose(1, 2)  # (B, T, N)
    return x - trend, trend


class SeasonalNorm(nn.Module):
    """Layer normalisation of a seasonal part `[B, T, d]`, left with mean 0 over time (from the authors' program).

    It has no bias: the mean over time would take it out again.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return normed - normed.mean(dim=1, keepdim=True)


def correlation(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """R(τ) = Σ_t q(t + τ)·k(t), time being a circle, for all delays τ at once (Wiener-Khinchin; section 3.2, equation 8).

    Args:
        queries, keys: `[B, L, d]`.

    Returns:
        `[B, L]` for τ = 0 .. L - 1, the mean over the d features; float32 for half precision.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)  # not every device has transforms of half precision
    spectra = [torch.fft.rfft(x.to(dtype), dim=1) for x in (queries, keys)]  # (B, L // 2 + 1, d)
    # The mean is taken here, where one transform back is left of d.
    product = (spectra[0] * spectra[1].conj()).mean(dim=2)  # (B, L // 2 + 1)
    return torch.fft.irfft(product, n=queries.shape[1], dim=1)


def aggregate(values: torch.Tensor, scores: torch.Tensor, delays: torch.Tensor) -> torch.Tensor:
    """Σ_i softmax(R)(τ_i) · Roll(V, τ_i): the values ahead by each delay, the more alike the heavier (equation 6).

    Args:
        values: `[B, L, d]`.
        scores: `[B, L]` correlations, of which the softmax sees those at the delays alone.
        delays: `[B, k]` delays, a tensor from end to end: nothing waits for the GPU.

    Returns:
        `[B, L, d]`.
    """
    L = values.shape[1]
    weights = scores.gather(1, delays).softmax(dim=1).to(values.dtype)  # (B, k)
    place = torch.arange(L, device=values.device)  # (L)
    mixed = torch.zeros_like(values)
    for delay, weight in zip(delays.unbind(1), weights.unbind(1), strict=True):  # (B), (B)
        ahead = (place + delay[:, None]) % L  # (B, L)
        mixed = mixed + values.gather(1, ahead[:, :, None].expand_as(values)) * weight[:, None, None]  # (B, L, d)
    return mixed


class AutoCorrelation(nn.Module):
    """Queries, keys and values of two series, mixed along the delays at which queries and keys are most alike.

    In training a batch shares its delays, those that are best on average; otherwise each series has its own. Both are
    the authors' program's, as is that all heads share delays and weights: to split them would change nothing, so there
    are none. The maps have no bias: one of the queries or keys adds the same to all scores, which softmax takes out, and
    one of the values or the output is a constant over time, which the decomposition that follows puts into the trend,
    where the model's last bias does the same.
    """

    def __init__(self, d_model: int, factor: int):
        super().__init__()
        self.factor = factor
        self.query_projection = nn.Linear(d_model, d_model, bias=False)
        self.key_projection = nn.Linear(d_model, d_model, bias=False)
        self.value_projection = nn.Linear(d_model, d_model, bias=False)
        self.out_projection = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Queries from `x` `[B, L, d]`, keys and values from `source` `[B, S, d]` -> `[B, L, d]`.

        The source is cut to its first L steps, or continued by zeros. floor(factor * ln(L)) delays are followed.
        """
        L = x.shape[1]
        queries = self.query_projection(x)  # (B, L, d)
        source = F.pad(source[:, :L], (0, 0, 0, max(L - source.shape[1], 0)))  # (B, L, d); the maps leave zeros zeros
        keys, values = self.key_projection(source), self.value_projection(source)  # (B, L, d) each
        scores = correlation(queries, keys)  # (B, L)
        # A delay's rank needs no mean: the sum over the batch, of all processes, has the same.
        ranked = sum_over_processes(scores.detach().sum(dim=0, keepdim=True)) if self.training else scores  # (1 or B, L)
        count = min(max(int(self.factor * math.log(L)), 1), L)  # k
        delays = ranked.topk(count, dim=1).indices.expand(len(x), -1)  # (B, k)
        return self.out_projection(aggregate(values, scores, delays))


class DataEmbedding(nn.Module):
    """Values by a circular convolution over 3 steps, plus a linear map of the time marks; without positions (section 4)."""

    def __init__(self, channels: int, d_model: int, marks: int, dropout: float):
        """`channels` N and `marks` F: columns of the values and of the time marks."""
        super().__init__()
        self.value_embedding = TokenEmbedding(channels, d_model)
        self.time_embedding = nn.Linear(marks, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    # Values `[B, T, N]` and their marks `[B, T, F]` -> tokens `[B, T, d]`.
    def forward(self, x: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.value_embedding(x) + self.time_embedding(marks))
