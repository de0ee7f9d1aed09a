"""Batches of window indices, an epoch at a time, that can be taken up again midway."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

DRAWS = 2**31  # numbers that a random cut is drawn from


class EpochBatches(Sampler[list[int]]):
    """Batch sampler whose order depends on (seed, epoch) and on nothing else.

    So the order of epoch e is drawn without drawing earlier ones, and a run
    that stopped in it resumes at batch k with `set_epoch(e, skip=k)`.

    A batch that is shuffled is one step's, and each rank has its share of it: what
    a step sees does not depend on the world size; a short last batch is dropped.
    Batches in order are dealt out whole: each rank takes every `world`-th, so
    the windows of a batch are neighbours, nothing is dropped or repeated, and a
    rank may have one batch more than another.

    Args:
        length: number of windows.
        batch_size: windows in a batch; of a shuffled one, all ranks' shares together.
        draws: an item's number is drawn too, anew in each epoch, and says where `M4Windows` cuts its series:
            number % length is the series.
        skip: attribute; batches of this rank left out at the front. `set_epoch` resets it.
        batches_per_epoch: attribute; batches of this rank in a whole epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        draws: bool = False,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.rank, self.world, self.draws = shuffle, rank, world, draws
        batches = length // batch_size if shuffle else -(-length // batch_size)
        self.batches_per_epoch = batches if shuffle else len(range(rank, batches, world))
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch whose order is drawn, and the batch of this rank it starts at."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return max(self.batches_per_epoch - self.skip, 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.length)
        entropy = [self.seed % 2**63, self.epoch]  # hashing the pair keeps (seed 1, epoch 2) apart from (seed 2, epoch 1)
        if self.shuffle:
            state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))
        if self.draws:
            random = np.random.default_rng(np.random.SeedSequence([*entropy, 1]))
            order = order + self.length * torch.from_numpy(random.integers(DRAWS, size=self.length))[order]
        for number in range(self.skip, self.batches_per_epoch):
            batch = number if self.shuffle else number * self.world + self.rank
            windows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.shuffle:
                windows = windows[len(windows) * self.rank // self.world : len(windows) * (self.rank + 1) // self.world]
            yield windows.tolist()
