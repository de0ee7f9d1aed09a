"""Batches of window indices, an epoch at a time, that can be taken up again midway."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batch sampler whose order depends on (seed, epoch) and on nothing else.

    So the order of epoch e is drawn without drawing earlier ones, and a run
    that stopped in it resumes at batch k with `set_epoch(e, skip=k)`.

    Ranks of a process group take every `world`-th batch. With `drop_last` all
    have the same number of batches. Without it nothing is dropped or repeated,
    so a rank may have one batch more than another.

    Args:
        length: number of windows.
        skip: attribute; batches of this rank left out at the front. `set_epoch` resets it.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(
                f"EpochBatches: got batch_size {batch_size}, rank {rank}, world {world},"
                " expected batch_size >= 1 and 0 <= rank < world"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world = rank, world
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch whose order is drawn, and the batch of this rank it starts at."""
        self.epoch, self.skip = epoch, skip

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this rank in a whole epoch, whatever is skipped."""
        if self.drop_last:
            return self.length // self.batch_size // self.world
        batches = -(-self.length // self.batch_size)
        return len(range(self.rank, batches, self.world))

    def __len__(self) -> int:
        return max(self.batches_per_epoch - self.skip, 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for number in range(self.skip, self.batches_per_epoch):
            start = (number * self.world + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()

    def _order(self) -> torch.Tensor:
        """Window indices of the epoch, `[length]`."""
        if not self.shuffle:
            return torch.arange(self.length)
        # Hashing the pair keeps (seed 1, epoch 2) apart from (seed 2, epoch 1).
        state = np.random.SeedSequence([self.seed % 2**63, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return torch.randperm(self.length, generator=generator)
