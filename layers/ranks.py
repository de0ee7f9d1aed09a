"""Processes of a group that train one model: which rows each holds of what is split, and sums over all of them.

Where there is no group, a sum is that of one process, so that a layer need not ask.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.nn import functional as F

Value = TypeVar("Value")
# Each has two names: torch 2.13 calls the second one deprecated, and earlier versions have it alone. A torch that is built
# without torch.distributed has neither, and runs one process as ever.
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Rows(NamedTuple):
    """The rows that one process holds of a tensor that is split over the group."""

    start: int
    stop: int
    total: int  # of all processes
    size: int  # of a process, but for the last ones, which have what is left


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


def rows_of(total: int, rank: int, world: int, multiple: int = 1) -> Rows:
    """The rows of process `rank` of `world`: as many for each, a multiple of `multiple`, but for the last ones."""
    size = math.ceil(math.ceil(total / world) / multiple) * multiple
    return Rows(min(rank * size, total), min((rank + 1) * size, total), total, size)


def gather_rows(part: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The parts `[rows, F]` of all processes, one below the other: `[total, F]`.

    Backward, each process comes with the gradient of its own windows' error with respect to all rows, and leaves with
    the gradient of the whole batch's error with respect to its own rows. So what leads to the rows is computed once
    in the group.
    """
    return _GatherRows.apply(part, rows)


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over all processes. Gradients come back to it from all of them."""
    return x if processes() == 1 else _Sum.apply(x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        whole = part.new_empty(rows.size * processes(), part.shape[1])  # collectives want parts of one size
        _gather(whole, F.pad(part, (0, 0, 0, rows.size - len(part))))
        return whole[: rows.total]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        rows = ctx.rows
        whole = gradient.float().contiguous()  # half precision is no type to add up in
        if dist.get_backend() == "gloo":  # which would send as much for the rows of one process alone
            whole = whole.clone() if whole is gradient else whole
            dist.all_reduce(whole)
            return whole[rows.start : rows.stop].to(gradient.dtype), None
        whole = F.pad(whole, (0, 0, 0, rows.size * processes() - rows.total))
        own = whole.new_empty(rows.size, whole.shape[1])
        _reduce_scatter(own, whole)
        return own[: rows.stop - rows.start].to(gradient.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
