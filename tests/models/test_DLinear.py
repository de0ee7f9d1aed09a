"""DLinear is an affine map of the window, written out here with matrices."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from models.DLinear import Model
from tests.small_run import defaults


def configs(**flags: object) -> Namespace:
    """The flags' defaults, for a small window."""
    small = {"seq_len": 24, "label_len": 12, "pred_len": 8, "enc_in": 3, "moving_avg": 5}
    return defaults(**small | flags)


def averaging_matrix(steps: int, kernel: int) -> np.ndarray:
    """`[T, T]`: row t has the weights of the steps in the moving average at t, those beyond an end at that end."""
    matrix = np.zeros((steps, steps))
    for t in range(steps):
        for offset in range(-(kernel // 2), kernel // 2 + 1):
            matrix[t, np.clip(t + offset, 0, steps - 1)] += 1 / kernel
    return matrix


@pytest.mark.parametrize("kernel", [5, 25])
def test_the_forecast_is_an_affine_map_of_the_window(kernel: int) -> None:
    torch.manual_seed(0)
    model = Model(configs(moving_avg=kernel)).double()
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    A = averaging_matrix(24, kernel)
    M = weights["seasonal.weight"] @ (np.eye(24) - A) + weights["trend.weight"] @ A  # (H, T)
    c = weights["seasonal.bias"] + weights["trend.bias"]  # (H)
    x = np.random.default_rng(0).normal(3, 5, (2, 24, 3))
    expected = np.einsum("ht,btn->bhn", M, x) + c[None, :, None]
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-10)
