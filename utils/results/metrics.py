"""Errors of a test pass: over all, by channel and by horizon step, gathered batch by batch."""

import math

import numpy as np
import torch
from accelerate import Accelerator

# Truths nearer to zero than this part of the channel's deviation say nothing in per cent.
NEAR_ZERO = 0.01
SCALES = ("standardised", "own_units")
AT_ONCE = 1 << 18  # values of a batch that are computed with at a time: 2 MB in float64


class Metrics:
    """Sums of errors `[N, H]`; memory depends on channels and horizon, not on the number of windows.

    For forecast p and truth y, on the standardised scale (as papers report) and in the data's own units:

    - mse, mae: mean of (p - y)^2 and of |p - y|; rmse: root of the mse beside it.
    - mape: 100 x mean of |p - y| / |y|, over the elements whose |y| is above 1 % of the channel's
      deviation in training: nearer to zero, a quotient measures the zero and not the forecast.
      mape_share is the part of the elements that were counted; with none, mape is null. A standardised
      series crosses zero all the time, so there mape says little.
    - smape: 100 x mean of 2 |p - y| / (|p| + |y|), from 0 to 200; an element with p = y = 0 counts as 0.

    In own units, figures over all channels add up different units; those by channel do not.
    """

    def __init__(self, mean: np.ndarray, deviation: np.ndarray, pred_len: int, device: torch.device):
        """Args:
        mean, deviation: `[N]`, from standardised values to own units.
        """
        channels = len(mean)
        self.mean = torch.as_tensor(mean, dtype=torch.float64, device=device).view(channels, 1)
        self.deviation = torch.as_tensor(deviation, dtype=torch.float64, device=device).view(channels, 1)
        # Per scale: squares, absolutes, relative errors, how many of these, symmetric errors.
        self.sums = torch.zeros(len(SCALES), 5, channels, pred_len, dtype=torch.float64, device=device)
        self.windows = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, forecast: torch.Tensor, truth: torch.Tensor) -> None:
        """Count standardised forecasts and truths `[B, N, H]`."""
        for part in channels_at_once(forecast):
            p, y = forecast[:, part].double(), truth[:, part].double()
            mean, deviation = self.mean[part], self.deviation[part]
            self.sums[0, :, part] += _sums(p, y, torch.ones_like(deviation))
            own_p, own_y = (v * deviation + mean for v in (p, y))
            self.sums[1, :, part] += _sums(own_p, own_y, deviation)
        self.windows += len(forecast)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        self.sums, self.windows = accelerator.reduce(self.sums), accelerator.reduce(self.windows)

    def result(self, columns: list[str]) -> dict:
        """For each scale: "all", "channels" by name and "steps" (lists `[H]`), as JSON takes them."""
        windows, sums = float(self.windows), self.sums.cpu().numpy()  # (2, 5, N, H)
        made = {}
        for scale, part in zip(SCALES, sums, strict=True):
            _, channels, steps = part.shape
            by_step = [_figures(part[:, :, step].sum(axis=1), windows * channels) for step in range(steps)]
            made[scale] = {
                "all": _figures(part.sum(axis=(1, 2)), windows * channels * steps),
                "channels": {
                    name: _figures(part[:, channel].sum(axis=1), windows * steps) for channel, name in enumerate(columns)
                },
                "steps": {key: [figures[key] for figures in by_step] for key in by_step[0]},
            }
        return made


def channels_at_once(values: torch.Tensor) -> list[slice]:
    """The channels of `[B, N, H]` in parts of at most AT_ONCE values, one channel at least: the memory of what is computed
    does not grow with their number."""
    B, N, H = values.shape
    step = max(1, AT_ONCE // (B * H))
    return [slice(start, start + step) for start in range(0, N, step)]


def _sums(p: torch.Tensor, y: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The five sums over windows `[5, N, H]` of `[B, N, H]`; unit `[N, 1]` is what near zero is measured by."""
    error = (p - y).abs()
    far = y.abs() > NEAR_ZERO * unit
    relative = torch.where(far, error / torch.where(far, y.abs(), 1.0), 0.0)
    size = p.abs() + y.abs()
    symmetric = torch.where(size > 0, 2 * error / torch.where(size > 0, size, 1.0), 0.0)
    return torch.stack([v.sum(dim=0) for v in (error.square(), error, relative, far.double(), symmetric)])


def _figures(sums: np.ndarray, count: float) -> dict[str, float | None]:
    squares, absolutes, relative, far, symmetric = sums.tolist()
    return {
        "mse": squares / count,
        "mae": absolutes / count,
        "rmse": math.sqrt(squares / count),
        "mape": 100 * relative / far if far else None,
        "mape_share": far / count,
        "smape": 100 * symmetric / count,
    }
