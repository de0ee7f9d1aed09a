"""Losses against their formulas, written out."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from data_provider.batches import Batch
from data_provider.splits import PATTERNS, Pattern
from utils.training.losses import loss_of


def part(masked: bool, M: int = 4, T: int = 10, H: int = 3) -> tuple[torch.Tensor, Batch]:
    """Forecasts and sequences; masked ones have 3 values of padding in row 0, 9 in row 1, and a truth that ends early."""
    generator = torch.Generator().manual_seed(0)
    x, y, forecast = (torch.rand(shape, generator=generator) * 9 + 1 for shape in ((M, T), (M, H), (M, H)))
    y[2, 1] = 0
    if not masked:
        return forecast, Batch(x, y)
    x_mask, y_mask = torch.ones(M, T), torch.ones(M, H)
    x_mask[0, :3], x_mask[1, :9], y_mask[3, 1:] = 0, 0, 0
    return forecast, Batch(x * x_mask, y * y_mask, x_mask=x_mask, y_mask=y_mask)


def by_hand(name: str, forecast: torch.Tensor, sequences: Batch, season: int = 2) -> float:
    rows = []
    for m in range(len(sequences)):
        errors = []
        history = sequences.x[m].tolist()
        if sequences.x_mask is not None:
            history = [v for v, exists in zip(history, sequences.x_mask[m], strict=True) if exists]
        steps = (
            [abs(a - b) for a, b in zip(history[season:], history[:-season], strict=True)] if season < len(history) else []
        )
        for h in range(forecast.shape[1]):
            if sequences.y_mask is not None and not sequences.y_mask[m, h]:
                continue
            f, y = float(forecast[m, h]), float(sequences.y[m, h])
            size = {"MAPE": abs(y), "SMAPE": (abs(f) + abs(y)) / 2, "MASE": sum(steps) / max(len(steps), 1) * 100}.get(name)
            errors.append((f - y) ** 2 if size is None else 100 * abs(f - y) / size if size else 0.0)
        rows.append(sum(errors) / len(errors))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["MSE", "SMAPE", "MAPE", "MASE"])
def test_losses_are_their_formulas(name: str, masked: bool, monkeypatch) -> None:
    monkeypatch.setitem(PATTERNS, "Quarterly", Pattern(3, 2, 1.5, "1 quarter", "Quarterly"))
    forecast, sequences = part(masked)
    loss = loss_of(Namespace(loss=name, seasonal_patterns="Quarterly", fft_weight=0.5))
    found = loss(forecast, sequences)
    assert float(found) == pytest.approx(by_hand(name, forecast, sequences), rel=1e-5)
    pieces = [loss(forecast[i : i + 1], piece) for i, piece in enumerate(sequences.split(1))]
    assert float(sum(pieces) / len(pieces)) == pytest.approx(float(found), rel=1e-5)  # parts add up to the whole
    leaf = forecast.clone().requires_grad_()
    loss(leaf, sequences).backward()
    assert torch.isfinite(leaf.grad).all()
    if masked:
        assert not leaf.grad[3, 1:].any() and leaf.grad[3, 0]


def test_absolute_errors_in_time_and_frequency() -> None:
    """The Fourier transform written out as a sum over the horizon, a frequency after the other."""
    forecast, sequences = part(False, H=7)
    forecast[0, 2] = sequences.y[0, 2]
    error = (forecast - sequences.y).double().numpy()
    waves = np.exp(-2j * np.pi * np.outer(np.arange(7), np.arange(4)) / 7) / 7**0.5  # (H, H // 2 + 1)
    in_time, in_frequency = np.abs(error).mean(), np.abs(error @ waves).mean()
    for name, weight in (("MAE", 0.5), ("MAE+FFT", 0.0), ("MAE+FFT", 0.3), ("MAE+FFT", 1.0)):
        loss, share = loss_of(Namespace(loss=name, seasonal_patterns="Monthly", fft_weight=weight)), weight * (name != "MAE")
        found = loss(leaf := forecast.clone().requires_grad_(), sequences)
        assert float(found.detach()) == pytest.approx((1 - share) * in_time + share * in_frequency, rel=1e-5)
        pieces = [loss(forecast[i : i + 1], piece) for i, piece in enumerate(sequences.split(1))]
        assert float(sum(pieces) / len(pieces)) == pytest.approx(float(found.detach()), rel=1e-5)
        found.backward()
        assert torch.isfinite(leaf.grad).all()
    exact = sequences.y.clone().requires_grad_()
    loss(exact, sequences).backward()
    assert not exact.grad.any()  # and no NaN


def test_smape_does_not_reward_a_forecast_for_its_size() -> None:
    sequences = Batch(torch.ones(1, 4), torch.ones(1, 1))
    forecast = torch.full((1, 1), 3.0, requires_grad=True)
    loss_of(Namespace(loss="SMAPE", seasonal_patterns="Monthly", fft_weight=0.5))(forecast, sequences).backward()
    assert float(forecast.grad) == pytest.approx(200 / (3 + 1))
