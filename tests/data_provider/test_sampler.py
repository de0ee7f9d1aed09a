"""The order of batches: complete, reproducible, and resumable midway."""

import pytest

from data_provider.sampler import EpochBatches


def test_an_epoch_has_every_window_at_most_once():
    batches = list(EpochBatches(103, 10, seed=1))
    seen = [index for batch in batches for index in batch]
    assert len(batches) == 10 and all(len(batch) == 10 for batch in batches)
    assert len(set(seen)) == 100 and set(seen) <= set(range(103))


def test_in_order_nothing_dropped():
    sampler = EpochBatches(25, 10, seed=1, shuffle=False, drop_last=False)
    assert list(sampler) == [list(range(10)), list(range(10, 20)), list(range(20, 25))] and len(sampler) == 3


def test_resuming_gives_the_tail_of_the_full_order():
    played = EpochBatches(103, 10, seed=5)
    for epoch in range(3):
        played.set_epoch(epoch)
        full = list(played)
    resumed = EpochBatches(103, 10, seed=5)
    resumed.set_epoch(2, skip=4)
    assert list(resumed) == full[4:] and len(resumed) == 6
    resumed.set_epoch(3)
    assert len(resumed) == 10 and list(resumed) != full
    resumed.skip = 99
    assert len(resumed) == 0 and list(resumed) == []


def test_order_depends_on_seed_and_epoch_both():
    def order(seed, epoch):
        sampler = EpochBatches(50, 50, seed)
        sampler.set_epoch(epoch)
        return tuple(next(iter(sampler)))

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16
    assert order(2, 1) == order(2, 1)
    order(-1, 0)  # any seed will do


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_each_training_batch(world):
    def make(rank, world):
        return EpochBatches(103, 10, 3, rank=rank, world=world)

    alone, ranks = list(make(0, 1)), [list(make(rank, world)) for rank in range(world)]
    assert all(len(batches) == len(alone) == len(make(0, world)) for batches in ranks)
    for number, batch in enumerate(alone):
        shares = [batches[number] for batches in ranks]
        assert sum(shares, []) == batch  # each window once
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_take_batches_in_order_in_turn():
    def make(rank, world):
        return EpochBatches(103, 10, 3, shuffle=False, drop_last=False, rank=rank, world=world)

    alone, ranks = list(make(0, 1)), [list(make(rank, 3)) for rank in range(3)]
    for rank, batches in enumerate(ranks):
        assert batches == alone[rank::3]
        assert len(batches) == len(make(rank, 3)) <= make(rank, 3).most_batches == 4
    assert sum(len(batch) for batches in ranks for batch in batches) == 103


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size"):
        EpochBatches(10, 0, seed=0)
    with pytest.raises(ValueError, match="a window for each rank"):
        EpochBatches(10, 2, seed=0, world=3)
