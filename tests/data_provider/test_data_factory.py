"""Loaders made from flags, and what they yield."""

import signal
from argparse import Namespace

import pytest
import torch
from transformers import AutoTokenizer

from data_provider.data_factory import EpochBatches, batch_loader, data_provider, series_from_args
from data_provider.synthetic import write_synthetic
from layers.errors import InputError
from layers.prompt import PromptEncoder, PromptTemplate


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = write_synthetic("ETTh1", tmp_path_factory.mktemp("data"))
    return Namespace(
        data="ETTh1", root_path=str(path.parent), data_path=path.name, features="M", target="OT",
        freq="h", embed="timeF", percent=100, seq_len=96, label_len=48, pred_len=24, batch_size=32,
        eval_batch_size=500, num_workers=0, seed=7,
    )  # fmt: skip


def test_four_tensors_of_the_field_and_the_batch_that_models_take(flags, backbones):
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    args = Namespace(**vars(flags) | {"features": "MS", "eval_batch_size": 3})
    data, fields = data_provider(args, "val")
    batch_x, batch_y, batch_x_mark, batch_y_mark = next(iter(fields))
    assert batch_x.shape == (3, 96, 7) and batch_y.shape == (3, 48 + 24, 7)
    assert batch_x_mark.shape == (3, 96, 4) and batch_y_mark.shape == (3, 48 + 24, 4)
    assert {t.dtype for t in (batch_x, batch_y, batch_x_mark, batch_y_mark)} == {torch.float32}
    assert torch.equal(batch_y[:, :48], batch_x[:, -48:]) and torch.equal(batch_x[1], data[1]["x"])
    template = PromptTemplate("Made-up rows.", 96, 24)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(backbones["qwen2"]), template, 1000)
    _, loader = batch_loader(args, "val", series_from_args(args), encoder)
    batch = next(iter(loader))
    assert torch.equal(batch.x, batch_x[:, :, 6]) and torch.equal(batch.y, batch_y[:, 48:, 6])
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL  # without workers a program's own handler stays
    signal.signal(signal.SIGCHLD, before)
    ids, length = batch.prompts
    assert ids[2, : length[2]].tolist() == encoder.for_windows([batch_x[2, :, 6:]])[0]
    assert torch.cat([batch.index for batch in loader]).tolist() == list(range(len(data)))


def test_a_resumed_epoch_goes_on_with_the_same_batches_also_from_workers(flags):
    series = series_from_args(flags)
    state = torch.get_rng_state()
    _, whole = batch_loader(flags, "train", series)
    _, resumed = batch_loader(Namespace(**vars(flags) | {"num_workers": 2}), "train", series)
    whole.batch_sampler.set_epoch(1)
    resumed.batch_sampler.set_epoch(1, skip=260)
    assert len(whole) == (8640 - 119) // 32 == 266 and len(resumed) == 6
    pairs = list(zip(list(whole)[260:], resumed, strict=True))
    assert len(pairs) == 6
    for one, other in pairs:
        assert all(map(torch.equal, (one.x, one.y, one.index), (other.x, other.y, other.index)))
    assert torch.equal(state, torch.get_rng_state())  # iterating leaves the run's own draws alone


def test_a_shuffled_epoch_has_every_window_at_most_once_in_an_order_of_seed_and_epoch():
    def order(seed: int, epoch: int, skip: int = 0) -> list[list[int]]:
        sampler = EpochBatches(103, 10, seed)
        sampler.set_epoch(epoch, skip)
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    batches = order(-1, 2)  # any seed will do
    assert [len(batch) for batch in batches] == [10] * 10 and len(set(sum(batches, []))) == 100
    assert set(sum(batches, [])) <= set(range(103)) and order(-1, 2, skip=4) == batches[4:] and order(-1, 2, skip=99) == []
    assert len({str(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_each_training_batch_and_take_the_others_in_turn(world):
    def dealt(shuffle: bool, world: int) -> list[EpochBatches]:
        return [EpochBatches(103, 10, 3, shuffle, rank, world) for rank in range(world)]

    alone, *_ = dealt(True, 1)
    for batch, *shares in zip(alone, *dealt(True, world), strict=True):
        assert sum(shares, []) == batch and max(map(len, shares)) - min(map(len, shares)) <= 1
    in_order = [list(range(start, min(start + 10, 103))) for start in range(0, 103, 10)]
    for rank, sampler in enumerate(dealt(False, world)):
        assert list(sampler) == in_order[rank::world] and sampler.batches_per_epoch == len(in_order[rank::world])


def test_batches_that_the_data_cannot_fill(flags):
    with pytest.raises(InputError, match="--batch_size: got 9000, expected at most 8521, for 8521 training windows"):
        data_provider(Namespace(**vars(flags) | {"batch_size": 9000}), "train")
    with pytest.raises(InputError, match="--batch_size: got 3, expected at least 4, a window of each step for each process"):
        batch_loader(Namespace(**vars(flags) | {"batch_size": 3}), "train", series_from_args(flags), world=4)
