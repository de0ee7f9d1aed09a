"""What a model's files hold: whole tensors, of which every process of a group has a copy."""

from collections.abc import Mapping

import torch

from models.base import ForecastModel


class Shares:
    """No tensor is split over the processes of a group."""

    def __init__(self, model: ForecastModel):
        pass

    def range(self, name: str) -> None:
        """From where to where a tensor is here; None: all of it."""

    def collect(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole tensors."""
        return dict(tensors)


def whole_state(model: ForecastModel) -> dict[str, torch.Tensor]:
    """The state dict."""
    return model.state_dict()


def whole_shapes(model: ForecastModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
