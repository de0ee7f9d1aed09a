"""Batches of window indices, an epoch at a time, that can be taken up again midway."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batch sampler whose order depends on (seed, epoch) and on nothing else.

    So the order of epoch e is drawn without drawing earlier ones, and a run
    that stopped in it resumes at batch k with `set_epoch(e, skip=k)`.

    Of a process group, a batch that is shuffled is one step's, and each rank has
    its share of it: what the group sees in a step does not depend on how many they
    are. Batches in order are dealt out whole: each rank takes every `world`-th, so
    the windows of a batch are neighbours, nothing is dropped or repeated, and a
    rank may have one batch more than another.

    Args:
        length: number of windows.
        batch_size: windows in a batch; of a shuffled one, all ranks' shares together.
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
        if batch_size < (world if shuffle else 1) or not 0 <= rank < world:
            raise ValueError(
                f"EpochBatches: got batch_size {batch_size}, rank {rank}, world {world},"
                " expected at least a window for each rank, and 0 <= rank < world"
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
        return self._batches_of(self.rank)

    @property
    def most_batches(self) -> int:
        """Batches in a whole epoch of the rank that has the most, which is the first."""
        return self._batches_of(0)

    def _batches_of(self, rank: int) -> int:
        batches = self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)
        return batches if self.shuffle else len(range(rank, batches, self.world))

    def __len__(self) -> int:
        return max(self.batches_per_epoch - self.skip, 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for number in range(self.skip, self.batches_per_epoch):
            batch = number if self.shuffle else number * self.world + self.rank
            windows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.shuffle:
                cut = [len(windows) * rank // self.world for rank in (self.rank, self.rank + 1)]
                windows = windows[cut[0] : cut[1]]
            yield windows.tolist()

    def _order(self) -> torch.Tensor:
        """Window indices of the epoch, `[length]`."""
        if not self.shuffle:
            return torch.arange(self.length)
        # Hashing the pair keeps (seed 1, epoch 2) apart from (seed 2, epoch 1).
        state = np.random.SeedSequence([self.seed % 2**63, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return torch.randperm(self.length, generator=generator)
