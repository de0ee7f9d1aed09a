"""Auto-correlation: what attention is to single steps, for whole shifted series (Autoformer, NeurIPS 2021, section 3.2)."""

import math

import torch
from torch import nn

from layers.ranks import sum_over_processes


def delay_count(length: int, factor: int) -> int:
    """How many delays are followed in a series of `length` steps: floor(factor * ln(length)), at least 1, at most all."""
    return min(max(int(factor * math.log(length)), 1), length)


def correlation(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """R(τ) = Σ_t q(t + τ)·k(t), time being a circle, for all delays τ at once (Wiener-Khinchin; section 3.2, equation 8).

    Args:
        queries, keys: `[B, L, d]`.

    Returns:
        `[B, L]` for τ = 0 .. L - 1, the mean over the d features; float32 for half precision.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)  # transforms of half precision are not to be had everywhere
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

        The source is cut to its first L steps, or continued by zeros.
        """
        L = x.shape[1]
        queries = self.query_projection(x)  # (B, L, d)
        keys = _resize(self.key_projection(source), L)  # (B, L, d)
        values = _resize(self.value_projection(source), L)  # (B, L, d)
        scores = correlation(queries, keys)  # (B, L)
        # A delay's rank needs no mean: the sum over the batch, of all processes, has the same.
        ranked = sum_over_processes(scores.detach().sum(dim=0, keepdim=True)) if self.training else scores  # (1 or B, L)
        delays = ranked.topk(delay_count(L, self.factor), dim=1).indices.expand(len(x), -1)  # (B, k)
        return self.out_projection(aggregate(values, scores, delays))


def _resize(x: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, S, d]` -> `[B, length, d]`."""
    missing = max(length - x.shape[1], 0)
    return torch.cat([x[:, :length], x.new_zeros(x.shape[0], missing, x.shape[2])], dim=1)
