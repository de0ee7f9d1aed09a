"""Gradients of a group of processes, added up in buckets while the backward pass still runs.

Every process has the gradient of its windows' part of the whole batch's loss, so the gradient is the sum. What of the
mapping layer's is split over the processes is no business of this module: it comes back as a sum (`layers.ranks`).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 2**22


class Bucket:
    """Parameters whose gradients travel together."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.sent: tuple[torch.Tensor, dist.Work] | None = None  # the gradients, end to end, on their way
        self.ready = 0

    @property
    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def send(self) -> None:
        """Start adding up; a parameter that no gradient came to has zeros."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sent = flat, work

    def arrive(self) -> None:
        """Wait for the sums, and give them to the parameters."""
        assert self.sent is not None
        flat, work = self.sent
        work.wait()
        for parameter, total in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = total.view_as(parameter)
        self.sent, self.ready = None, 0


class GradientReducer:
    """Adds up the gradients of all processes, in buckets, each as soon as the backward pass has left its last gradient.

    A step calls `begin` before it starts, `expect_last` before the backward pass of its last micro-batch, after which
    gradients are complete as they come, and `finish`. The processes' steps are of one form, so they send the same buckets
    in the same order: that in which autograd comes to the parameters, from the head backwards. A step that is tried again
    with smaller micro-batches does not send again what it has sent: that was complete.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], split: Iterable[nn.Parameter] = ()):
        """Args:
        parameters: the model's, in its order.
        split: those among them that each process has other rows of.
        """
        own = {id(parameter) for parameter in split}
        self.buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._last = False
        for parameter in reversed([p for p in parameters if p.requires_grad and id(p) not in own]):
            if not self.buckets or self.buckets[-1].bytes + parameter.nbytes > BUCKET_BYTES:
                self.buckets.append(Bucket())
            self.buckets[-1].parameters.append(parameter)
            self._bucket_of[id(parameter)] = self.buckets[-1]
            parameter.register_post_accumulate_grad_hook(self._came)

    def begin(self) -> None:
        """A step begins; what a step that failed has left is forgotten."""
        self._last = False
        for bucket in self.buckets:
            bucket.sent, bucket.ready = None, 0

    def expect_last(self, last: bool) -> None:
        """Whether gradients are complete when they come now."""
        self._last = last
        for bucket in self.buckets:
            bucket.ready = 0

    def finish(self) -> None:
        """Send what has not gone yet, and wait for all sums; afterwards every process has the same gradients."""
        for bucket in self.buckets:
            if bucket.sent is None:
                bucket.send()
        for bucket in self.buckets:
            bucket.arrive()
        self._last = False

    def _came(self, parameter: nn.Parameter) -> None:
        if not self._last:
            return
        bucket = self._bucket_of[id(parameter)]
        bucket.ready += 1
        if bucket.ready == len(bucket.parameters) and bucket.sent is None:
            bucket.send()
