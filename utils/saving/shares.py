"""Tensors of which each process of a group has a share: put together for a file, and cut out of one again.

A file holds whole tensors, so it does not tell how many processes have written it, and any number can read it.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from layers.mapping import QUANTISED
from layers.ranks import Rows, processes
from models.forecaster import Forecaster

PIECE = 2**26  # bytes that travel at once: what the first process's device holds beside its own share
WHOLE = ("step", "qmap")  # what an optimizer has of a tensor that is no share of it: the steps, the levels of 8 bits


class Shares:
    """Which tensors of a model and its optimizer are split over the processes, by their names in a state file.

    These are `model.<name>` and `optimizer.<number of the parameter>.<name>`.
    """

    def __init__(self, model: Forecaster):
        self._split: dict[str, tuple[Rows, int]] = {}  # the rows, and the values in one
        numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
        for name, rows in model.rows.items():
            width = model.get_parameter(name)[:1].numel() or model.get_parameter(name).shape[1]
            self._split[f"model.{name}"] = self._split[f"optimizer.{numbers[name]}"] = rows, width

    def range(self, name: str, rank: int | None = None) -> tuple[int, int] | None:
        """From where to where process `rank` (None: this one) has a tensor, along its first dimension; None: all of it."""
        kind, number, *_ = name.split(".", 2)
        found = self._split.get(name if kind == "model" else f"{kind}.{number}")
        what = name.rpartition(".")[2] if kind == "optimizer" else ""
        if found is None or what.startswith(WHOLE):
            return None
        rows, width = found
        place = dist.get_rank() if rank is None else rank
        start, stop = (min(number * rows.size, rows.total) for number in (place, place + 1))
        if what.startswith("absmax"):  # one for each block of 8-bit values
            return start * width // QUANTISED, -(-stop * width // QUANTISED)
        return start, stop

    def collect(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole tensors, in the first process, there on the CPU where they were split; in the others what they have.

        All processes must call it, with the same names.
        """
        return {name: self._whole(name, tensor) if self.range(name) else tensor for name, tensor in tensors.items()}

    def _whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        rank = dist.get_rank()
        ranges = [self.range(name, other) or (0, 0) for other in range(processes())]
        if rank > 0:
            for piece in _pieces(part.detach()):
                dist.send(piece.contiguous(), 0)
            return part
        whole = torch.empty(ranges[-1][1], *part.shape[1:], dtype=part.dtype)
        whole[slice(*ranges[0])] = part.detach()
        for other, (start, stop) in enumerate(ranges[1:], 1):
            for piece in _pieces(whole[start:stop]):
                arrived = torch.empty(piece.shape, dtype=part.dtype, device=part.device)
                dist.recv(arrived, other)
                piece.copy_(arrived)
        return whole


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows after the other, each a view."""
    size = max(1, PIECE // max(1, tensor[:1].nbytes))
    yield from (tensor[start : start + size] for start in range(0, len(tensor), size))


def whole_state(model: Forecaster) -> dict[str, torch.Tensor]:
    """The state dict, in the first process of whole tensors; all processes must call it."""
    if processes() == 1:
        return model.state_dict()
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {name.removeprefix("model."): tensor for name, tensor in Shares(model).collect(named).items()}


def whole_shapes(model: Forecaster) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the state dict, as files have it."""
    split = model.rows
    return {
        name: (split[name].total, *tensor.shape[1:]) if name in split else tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
