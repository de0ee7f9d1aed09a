"""Losses by the name of `--loss`: a function (forecast `[M, H]`, sequences) -> their mean, a number.

Where the sequences have a mask (of M4 alone, to which MAE and MAE+FFT are not given), a value that does not exist counts
nothing, and each sequence counts alike: so the parts of a batch add up to the whole. SMAPE, MASE and MAPE are those that
the M4 competition and its followers train with (Oreshkin et al., N-BEATS, ICLR 2020): they do not depend on a series' scale.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from data_provider.batches import Batch
from data_provider.splits import PATTERNS

Loss = Callable[[torch.Tensor, Batch], torch.Tensor]


def loss_of(args: Namespace) -> Loss:
    """The function that `--loss` names; its seasons, for MASE, are those of `--seasonal_patterns`."""
    losses: dict[str, Loss] = {
        "MSE": mean_squared,
        "MAE": lambda forecast, part: F.l1_loss(forecast, part.y),
        "MAE+FFT": partial(absolute_and_spectral, share=args.fft_weight),
        "SMAPE": smape,
        "MASE": partial(mase, season=PATTERNS[args.seasonal_patterns].season),
        "MAPE": lambda forecast, part: 100 * _mean(_ratio((forecast - part.y).abs(), part.y.abs()), part),
    }
    return losses[args.loss]


# Mean of (f - y)^2.
def mean_squared(forecast: torch.Tensor, part: Batch) -> torch.Tensor:
    if part.y_mask is None:
        return F.mse_loss(forecast, part.y)
    return _mean((forecast - part.y).square(), part)


def absolute_and_spectral(forecast: torch.Tensor, part: Batch, share: float) -> torch.Tensor:
    """(1 - share) times the mean of |f - y|, and share times that of |rfft(f - y)|.

    The error's Fourier transform runs along the horizon and is orthonormal: so the two are of one size, whatever the horizon
    (after Wang et al., FreDF, ICLR 2025).
    """
    spectrum = torch.fft.rfft(forecast - part.y, norm="ortho")  # (M, H // 2 + 1)
    return (1 - share) * F.l1_loss(forecast, part.y) + share * spectrum.abs().mean()


def smape(forecast: torch.Tensor, part: Batch) -> torch.Tensor:
    """Mean of 200 |f - y| / (|f| + |y|), an element with f = y = 0 as 0.

    The denominator is held: else a forecast could come down by growing, and not by being right.
    """
    return 200 * _mean(_ratio((forecast - part.y).abs(), forecast.detach().abs() + part.y.abs()), part)


def mase(forecast: torch.Tensor, part: Batch, season: int) -> torch.Tensor:
    """Mean of |f - y| in units of the history's mean |x_t - x_{t-season}|; a history without such steps counts as 0.

    The history is that of the window. The competition's score takes the whole series.
    """
    steps = (part.x[:, season:] - part.x[:, :-season]).abs()  # (M, T - season)
    exist = torch.ones_like(part.x) if part.x_mask is None else part.x_mask
    pairs = exist[:, season:] * exist[:, :-season]
    scale = (steps * pairs).sum(dim=1) / pairs.sum(dim=1).clamp(min=1)  # (M,)
    return _mean(_ratio((forecast - part.y).abs(), scale[:, None].expand_as(forecast)), part)


# error / size, 0 where the size is 0; no gradient comes of that.
def _ratio(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    there = size > 0
    return torch.where(there, error, 0.0) / torch.where(there, size, 1.0)


# The mean over sequences of each one's mean over the values that exist, `[M, H]` -> `[]`.
def _mean(errors: torch.Tensor, part: Batch) -> torch.Tensor:
    if part.y_mask is None:
        return errors.mean()
    return ((errors * part.y_mask).sum(dim=1) / part.y_mask.sum(dim=1).clamp(min=1)).mean()
