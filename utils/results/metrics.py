"""Figures of forecasts: errors, and how good their prediction intervals were; summed up batch by batch."""

from typing import Any

import numpy as np
import torch

from utils.results.bands import DECILES, Intervals, name_of, probabilities

METRICS = "metrics.json"
NEAR_ZERO = 0.01  # truths nearer to zero than this part of the channel's deviation say nothing in per cent
SHORT, SHORT_COLUMN = 3, 10  # points below its level at which a band missed its promise: in all, in one column
DRAWS, FEWEST = 2000, 4  # of the bootstrap, and the blocks that it takes at least
AT_ONCE = 1 << 18  # values of a batch that are computed with at a time: 2 MB in float64


class Metrics:
    """Sums over windows for each channel and step; memory does not depend on the number of windows.

    For forecast p and truth y, on the standardised scale (as papers report) and in the data's own units:

    - mse, mae: mean of (p - y)^2 and of |p - y|; rmse: root of the mse beside it.
    - mape: 100 x mean of |p - y| / |y|, over the elements whose |y| is above 1 % of the channel's
      deviation in training: nearer to zero, a quotient measures the zero and not the forecast.
      mape_share is the part of the elements that were counted; with none, mape is null. A standardised
      series crosses zero all the time, so there mape says little.
    - smape: 100 x mean of 2 |p - y| / (|p| + |y|), from 0 to 200; an element with p = y = 0 counts as 0.

    For quantile q at probability p, and a band from low to high, on the standardised scale:

    - coverage: the part of the truths that lie in the band; width: mean of high - low.
    - pinball: mean of max(p (y - q), (p - 1) (y - q)). With `bounds` band and quantiles end there, too.
    - wql: the weighted quantile loss, twice the sum of the pinball losses over the sum of |y|, averaged over the
      deciles (Park et al., AISTATS 2022; GluonTS's mean_weighted_sum_quantile_loss). In own units, whose |y| is that of the
      data.

    In own units, figures over all channels add up different units; those by channel do not.
    Shapes: B windows, N channels, H steps ahead, Q probabilities.

    Args:
        columns, mean, std: `[N]`, names, and from standardised values to own units.
        bounds: `[2, N]`, the least and the largest value that there can be, standardised; None: none.
        windows: how many are counted in all, for `by_window`.

    Attributes:
        by_window: `[3, windows]`, each window's mse and mae (standardised), and its weighted quantile loss, not yet divided
            by |y| (0 without intervals).
    """

    def __init__(
        self,
        columns: list[str],
        mean: np.ndarray,
        std: np.ndarray,
        pred_len: int,
        intervals: Intervals | None = None,
        device: torch.device | str = "cpu",
        bounds: np.ndarray | None = None,
        windows: int = 0,
    ):
        self.columns, self.intervals = columns, intervals
        self.bounds = None if bounds is None else torch.from_numpy(bounds).float().to(device)[..., None]  # (2, N, 1)
        self.by_window = torch.zeros(3, windows, dtype=torch.float64, device=device)
        self.probabilities = probabilities(intervals.levels) if intervals else ()
        bands = [intervals.band(level) for level in intervals.levels] if intervals else []
        self.bands = [torch.from_numpy(np.stack(ends)).to(device) for ends in bands]  # (2, N, H) each
        self.offsets = torch.from_numpy(intervals.offsets).to(device) if intervals else None  # (Q, N, H)
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float64, device=device)[:, None] for v in (mean, std))
        # The windows, squares, absolutes; on both scales relative errors, how many of these, symmetric errors; |y| in own
        # units; for each quantile its loss; for each level the truths inside and the widths.
        rows = 10 + (len(self.probabilities) + 2 * len(intervals.levels) if intervals else 0)
        self.sums = torch.zeros(rows, len(columns), pred_len, dtype=torch.float64, device=device)

    def add(
        self, forecast: torch.Tensor, truth: torch.Tensor, unit: torch.Tensor, index: torch.Tensor | None = None
    ) -> None:
        """Count standardised forecasts and truths `[B, N, H]`, the units of their bands `[B, N, 1]`, and with `windows` the
        windows' numbers `[B]`."""

        def total(values: torch.Tensor) -> torch.Tensor:
            return values.sum(dim=0, dtype=torch.float64)

        B, N, H = forecast.shape
        own = torch.zeros(3, B, dtype=torch.float64, device=forecast.device)
        step = max(1, AT_ONCE // (B * H))  # channels, so that the memory does not grow with their number
        for part in (slice(start, start + step) for start in range(0, N, step)):
            p, y, mean, spread = forecast[:, part].double(), truth[:, part].double(), self.mean[part], self.std[part]
            error, own_y = (p - y).abs(), y * spread + mean
            own[:2] += torch.stack([error.square().sum((1, 2)), error.sum((1, 2))]) / (N * H)
            sums = [torch.full_like(p[0], B), total(error.square()), total(error)]
            for distance, a, b, scale in ((error, p, y, 1), (error * spread, p * spread + mean, own_y, spread)):
                size, both = b.abs(), a.abs().add_(b.abs())
                near = size <= NEAR_ZERO * scale
                sums.append(total((distance / size).masked_fill_(near, 0)))
                sums += B - total(near), total((2 * distance).div_(both).masked_fill_(both == 0, 0))
            sums.append(total(own_y.abs()))
            if self.offsets is not None:
                p, y, units = forecast[:, part].float(), truth[:, part].float(), unit[:, part].float()
                deciles = torch.zeros_like(p)
                for probability, offset in zip(self.probabilities, self.offsets[:-2, part], strict=True):
                    error = y - self._bounded(torch.addcmul(p, units, offset), part)
                    loss = (error * probability).sub_(error.clamp_(max=0))  # p u where u > 0, else (p - 1) u
                    deciles += loss if probability in DECILES else 0
                    sums.append(total(loss))
                own[2] += (deciles * spread).sum((1, 2)) * 2 / len(DECILES)
                for low, high in self.bands:
                    low, high = (self._bounded(torch.addcmul(p, units, end[part]), part) for end in (low, high))
                    sums += [total((y >= low) & (y <= high)), total(high - low)]
            self.sums[:, part] += torch.stack(sums)
        if index is not None:
            self.by_window[:, index.to(self.by_window.device)] = own.to(self.by_window.device)

    # Values `[B, n, H]` of some channels, not beyond the bounds.
    def _bounded(self, values: torch.Tensor, part: slice) -> torch.Tensor:
        return values if self.bounds is None else values.clamp(self.bounds[0, part], self.bounds[1, part])

    def result(self) -> dict[str, Any]:
        """As metrics.json has them: for each scale "all", "channels" by name and "steps" (lists `[H]`); and "intervals",
        whose widths are standardised where nothing else is said."""
        sums, (_, N, H) = self.sums.cpu().numpy(), self.sums.shape
        windows, squares, absolutes = sums[0, 0, 0], sums[1], sums[2]
        size, rest, std = sums[9], sums[10:], self.std.cpu().numpy()  # (N, 1)

        def by_column(figures: dict[str, list]) -> dict[str, dict]:
            return {column: {name: values[n] for name, values in figures.items()} for n, column in enumerate(self.columns)}

        def ratio(losses: np.ndarray, sizes: np.ndarray) -> float | None:
            return float(losses.sum() / sizes.sum()) if sizes.sum() > 0 else None

        found: dict[str, Any] = {}
        for scale, unit, others in (("standardised", 1, sums[3:6]), ("own_units", std, sums[6:9])):
            part = np.stack([squares * unit**2, absolutes * unit, *others])
            of_all = _figures(part.sum(axis=(1, 2))[:, None], windows * N * H)
            found[scale] = {
                "all": {name: values[0] for name, values in of_all.items()},
                "channels": by_column(_figures(part.sum(axis=2), windows * H)),
                "steps": _figures(part.sum(axis=1), windows * N),
            }
        if self.intervals is None:
            return found
        pinball, bands = np.split(rest, [len(self.probabilities)])
        levels = {}
        for level, coverage, width in zip(self.intervals.levels, bands[::2] / windows, bands[1::2] / windows, strict=True):
            channels = {"coverage": coverage, "width": width, "width_own_units": width * std}
            levels[name_of(level)] = {
                "coverage": float(coverage.mean()),
                "width": float(width.mean()),
                "channels": by_column({name: values.mean(axis=1).tolist() for name, values in channels.items()}),
                "steps": {"coverage": coverage.mean(axis=0).tolist(), "width": width.mean(axis=0).tolist()},
            }
        means = zip(self.probabilities, pinball.mean(axis=(1, 2)) / windows, strict=True)
        losses = {name_of(probability): float(mean) for probability, mean in means if np.isfinite(mean)}
        made = {"calibration_windows": self.intervals.windows, "levels": levels, "pinball": losses, "wql": None}
        loss = 2 * pinball[[self.probabilities.index(decile) for decile in DECILES]].mean(axis=0) * std  # (N, H)
        if np.isfinite(loss).all():  # else the windows were too few for the deciles
            made |= {"wql": ratio(loss, size), "wql_channels": dict(zip(self.columns, map(ratio, loss, size), strict=True))}
        return found | {"intervals": made}


# The errors of sums `[5, n]`, each over `count` elements, by their names in metrics.json.
def _figures(sums: np.ndarray, count: float) -> dict[str, list[float | None]]:
    squares, absolutes, relative, far, symmetric = sums
    return {
        "mse": (squares / count).tolist(),
        "mae": (absolutes / count).tolist(),
        "rmse": np.sqrt(squares / count).tolist(),
        "mape": [100 * error / n if n else None for error, n in zip(relative.tolist(), far.tolist(), strict=True)],
        "mape_share": (far / count).tolist(),
        "smape": (100 * symmetric / count).tolist(),
    }


def lines_of(intervals: dict[str, Any]) -> list[str]:
    """The figures of prediction intervals, as metrics.json has them, for the log; and which of them missed their promise."""
    levels = [f"{name} %: coverage {100 * level['coverage']:.1f} %, width {level['width']:.3f}"
              for name, level in intervals["levels"].items()]  # fmt: skip
    wql = "" if intervals["wql"] is None else f"; weighted quantile loss: {intervals['wql']:.4f}"
    return [f"Prediction intervals: {'; '.join(levels)}{wql}", *missed(intervals)]


def missed(intervals: dict[str, Any]) -> list[str]:
    """A sentence for each band that held clearly fewer truths than promised, in all or in one column."""
    lines = []
    for name, level in intervals["levels"].items():
        column, worst = min(level["channels"].items(), key=lambda item: item[1]["coverage"])
        held, least, promised = 100 * level["coverage"], 100 * worst["coverage"], float(name)
        if held < promised - SHORT or least < promised - SHORT_COLUMN:
            lines.append(
                f"The {name} % band missed its promise: it held {held:.1f} % of the test's truths; of the worst column, "
                f"{column}, {least:.1f} %"
            )
    return lines


def difference(ours: np.ndarray, theirs: np.ndarray, block: int) -> tuple[float, float, float] | None:
    """The mean of `ours` less `theirs`, figures `[W]` of the same windows in the order of time, and its 95 % interval.

    By a moving-block bootstrap (Kuensch, Annals of Statistics 1989; blocks wrap around): neighbouring windows share most of
    their rows, so blocks of `block` windows are drawn, not windows. None where there are fewer than FEWEST blocks.
    """
    difference, W = ours - theirs, len(ours)
    if W < FEWEST * block or not np.isfinite(difference).all():
        return None
    sums = np.append(0, np.cumsum(np.append(difference, difference)))
    starts = np.random.default_rng(0).integers(0, W, (DRAWS, -(-W // block)))
    means = (sums[starts + block] - sums[starts]).mean(axis=1) / block
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)
