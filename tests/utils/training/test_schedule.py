"""Learning rates by formula, and TST against PyTorch's own one-cycle schedule."""

import math

import pytest
import torch

from utils.training.optimizer import learning_rate


def rates(schedule: str, steps: int = 5, epochs: int = 6, base: float = 2e-3, pct_start: float = 0.2) -> list[float]:
    return [learning_rate(schedule, base, step, steps, epochs, pct_start) for step in range(steps * epochs)]


def test_constant() -> None:
    assert rates("constant") == [2e-3] * 30


def test_type1_halves_each_epoch() -> None:
    assert rates("type1") == pytest.approx([2e-3 / 2 ** (step // 5) for step in range(30)])


def test_type3_keeps_three_epochs_then_nine_tenths_each() -> None:
    by_epoch = [2e-3, 2e-3, 2e-3, 2e-3 * 0.9, 2e-3 * 0.9**2, 2e-3 * 0.9**3]
    assert rates("type3") == pytest.approx([by_epoch[step // 5] for step in range(30)])


def test_cos_is_a_half_cosine_over_the_run() -> None:
    assert rates("COS") == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 30)) for step in range(30)])


@pytest.mark.parametrize(
    ("steps", "epochs", "pct_start"), [(5, 6, 0.2), (2008, 1, 0.2), (7, 3, 0.3), (10, 2, 0.9), (3, 1, 0.2)]
)
def test_tst_is_pytorchs_one_cycle(steps: int, epochs: int, pct_start: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, steps_per_epoch=steps, epochs=epochs, pct_start=pct_start
    )
    for rate in rates("TST", steps, epochs, pct_start=pct_start):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if cycle.last_epoch < steps * epochs - 1:
            cycle.step()
