"""How good prediction intervals were on a test split: coverage, width, quantile losses; gathered batch by batch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from utils.intervals import DECILES, Intervals, name_of
from utils.results.metrics import channels_at_once


class IntervalMetrics:
    """Sums over windows; memory depends on channels and horizon, not on the number of windows.

    For truth y, quantile q at probability p, and a band from low to high:

    - coverage: the part of the truths that lie in the band; width: mean of high - low.
    - pinball: mean of max(p (y - q), (p - 1) (y - q)).
    - wql: the weighted quantile loss, twice the sum of the pinball losses over the sum of |y|, averaged over the
      deciles (Park et al., AISTATS 2022; GluonTS's mean_weighted_sum_quantile_loss). In own units, whose |y| is that of the
      data; over all channels it adds up different units.

    Shapes: B windows, N channels, H steps, Q probabilities, L levels.
    """

    def __init__(self, intervals: Intervals, mean: np.ndarray, deviation: np.ndarray, device: torch.device | str = "cpu"):
        """Args:
        mean, deviation: `[N]`, from standardised values to own units.
        """
        self.intervals = intervals
        self.mean, self.deviation = (
            torch.as_tensor(v, dtype=torch.float32, device=device)[:, None] for v in (mean, deviation)
        )
        self.offsets = torch.from_numpy(intervals.offsets).to(device)  # (Q, N, H)
        Q, N, H = self.offsets.shape
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.pinball = zeros(Q, N, H)
        self.inside, self.width = zeros(len(intervals.levels), N, H), zeros(len(intervals.levels), N, H)
        self.size = zeros(N, H)  # |y| in own units
        self.windows = zeros(())

    def add(self, forecast: torch.Tensor, truth: torch.Tensor, deviation: torch.Tensor) -> None:
        """Count standardised forecasts and truths `[B, N, H]`, and the deviations of their histories `[B, N, 1]`."""
        for part in channels_at_once(forecast):
            self._add(part, forecast[:, part].float(), truth[:, part].float(), deviation[:, part].float())
        self.windows += len(truth)

    def _add(self, part: slice, forecast: torch.Tensor, truth: torch.Tensor, deviation: torch.Tensor) -> None:
        """As `add`, of some of the channels."""
        error = truth - forecast
        all_error, all_deviation = _sum(error), _sum(deviation)  # (n, H), (n, 1)
        for total, probability, offset in zip(
            self.pinball[:, part], self.intervals.probabilities, self.offsets[:, part], strict=True
        ):
            # p u where u > 0, else (p - 1) u: that is p u less its negative part.
            below = _sum(torch.addcmul(error, deviation, offset, value=-1).clamp_(max=0))
            total += probability * (all_error - all_deviation * offset) - below
        for level, inside, width in zip(self.intervals.levels, self.inside[:, part], self.width[:, part], strict=True):
            low, high = (torch.from_numpy(end[part]).to(error.device) for end in self.intervals.band(level))
            inside += ((error >= deviation * low) & (error <= deviation * high)).sum(dim=0)
            width += all_deviation * (high - low)
        self.size[part] += _sum((truth * self.deviation[part] + self.mean[part]).abs())

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        for name in ("pinball", "inside", "width", "size", "windows"):
            setattr(self, name, accelerator.reduce(getattr(self, name)))

    def result(self, columns: Sequence[str]) -> dict[str, Any]:
        """The figures as JSON takes them; widths are standardised where nothing else is said."""
        windows = float(self.windows)
        deviation = self.deviation[:, 0].cpu().double().numpy()
        inside, width, pinball, size = (v.cpu().numpy() for v in (self.inside, self.width, self.pinball, self.size))
        levels = {}
        for level, hits, wide in zip(self.intervals.levels, inside / windows, width / windows, strict=True):  # (N, H)
            levels[name_of(level)] = {
                "coverage": float(hits.mean()),
                "width": float(wide.mean()),
                "channels": {
                    name: {
                        "coverage": float(hits[n].mean()),
                        "width": float(wide[n].mean()),
                        "width_own_units": float(wide[n].mean() * deviation[n]),
                    }
                    for n, name in enumerate(columns)
                },
                "steps": {"coverage": hits.mean(axis=0).tolist(), "width": wide.mean(axis=0).tolist()},
            }
        found = {"calibration_windows": self.intervals.windows, "levels": levels}
        return found | self._losses(columns, pinball, size, deviation)

    def _losses(
        self, columns: Sequence[str], pinball: np.ndarray, size: np.ndarray, deviation: np.ndarray
    ) -> dict[str, Any]:
        """Pinball by probability; wql, where the deciles were calibrated."""
        elements = float(self.windows) * size.size
        by_probability = dict(
            zip(map(name_of, self.intervals.probabilities), pinball.sum(axis=(1, 2)) / elements, strict=True)
        )
        losses: dict[str, Any] = {"pinball": {name: float(v) for name, v in by_probability.items() if np.isfinite(v)}}
        deciles = [self.intervals.probabilities.index(decile) for decile in DECILES]
        own = 2 * pinball[deciles].mean(axis=0) * deviation[:, None]  # (N, H)
        if not np.isfinite(own).all():
            return losses | {"wql": None}
        by_channel = {name: _ratio(own[n].sum(), size[n].sum()) for n, name in enumerate(columns)}
        return losses | {"wql": _ratio(own.sum(), size.sum()), "wql_channels": by_channel}


def _ratio(loss: float, size: float) -> float | None:
    return float(loss / size) if size > 0 else None


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Over the windows, in float64."""
    return values.sum(dim=0, dtype=torch.float64)


def line_of(found: dict[str, Any]) -> str:
    """What `IntervalMetrics.result` has found, in a line for the log."""
    levels = [f"{name} %: coverage {100 * level['coverage']:.1f} %, width {level['width']:.3f}"
              for name, level in found["levels"].items()]  # fmt: skip
    wql = "" if found["wql"] is None else f"; weighted quantile loss: {found['wql']:.4f}"
    return f"Prediction intervals: {'; '.join(levels)}{wql}"
