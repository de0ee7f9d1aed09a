"""Processes of a group that train one model."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def processes() -> int:
    """How many there are in the group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_process() -> int:
    """Its number in the group; 0 where there is none."""
    return dist.get_rank() if processes() > 1 else 0


def from_all(value: Value) -> list[Value]:
    """What each process calls this with, in their order; something that can be pickled."""
    held: list[Any] = [None] * processes()
    if len(held) == 1:
        return [value]
    dist.all_gather_object(held, value)
    return held


def from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
