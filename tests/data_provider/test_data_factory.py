"""Loaders made from flags, what they yield, and what becomes of their workers."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from data_provider.data_factory import batch_loader, data_provider, epoch_batches, series_flags, series_from_args
from data_provider.sampler import EpochBatches
from data_provider.synthetic import write_synthetic
from layers.errors import InputError
from layers.prompt import PromptEncoder, PromptTemplate
from tests.realdata import ROOT

# A process that starts two loader workers, tells their ids, and waits.
PARENT = """
import sys, time, torch
from data_provider.data_factory import make_loader
from data_provider.sampler import EpochBatches

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index): return index

batches = iter(make_loader(Numbers(), EpochBatches(1000, 2, 0), 2))
next(batches), next(batches)  # one of each worker: both have begun
print(*(worker.pid for worker in batches._workers), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = write_synthetic("ETTh1", tmp_path_factory.mktemp("data"))
    return Namespace(
        data="ETTh1", root_path=str(path.parent), data_path=path.name, features="M", target="OT",
        freq="h", embed="timeF", percent=100, seq_len=96, label_len=48, pred_len=24, batch_size=32,
        eval_batch_size=500, num_workers=0, seed=7,
    )  # fmt: skip


@pytest.mark.parametrize(("features", "channels"), [("M", 7), ("S", 1), ("MS", 7)])
def test_the_loader_yields_the_four_tensors_of_the_field(flags, features, channels):
    args = Namespace(**vars(flags) | {"features": features})
    data, loader = data_provider(args, "test")
    windows = 0
    for batch_x, batch_y, batch_x_mark, batch_y_mark in loader:
        B = len(batch_x)
        assert batch_x.shape == (B, 96, channels) and batch_y.shape == (B, 48 + 24, channels)
        assert batch_x_mark.shape == (B, 96, 4) and batch_y_mark.shape == (B, 48 + 24, 4)
        assert {t.dtype for t in (batch_x, batch_y, batch_x_mark, batch_y_mark)} == {torch.float32}
        torch.testing.assert_close(batch_y[:, :48], batch_x[:, -48:], rtol=0, atol=0)
        windows += B
    assert windows == len(data) == 2880 - 23


def test_a_series_and_an_encoder_are_taken_as_they_are(flags, backbones):
    series = series_from_args(Namespace(**vars(flags) | {"features": "MS"}))
    template = PromptTemplate("Made-up rows.", 96, 24)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(backbones["qwen2"]), template, 1000)
    data, loader = batch_loader(Namespace(**vars(flags) | {"eval_batch_size": 3}), "val", series, encoder)
    assert data.values.base is series.values
    sequences = next(iter(loader))
    assert sequences.x.shape == (3, 96) and sequences.y.shape == (3, 24)
    assert torch.equal(sequences.x[1], torch.from_numpy(series.values[8640 - 95 : 8641, 6]))
    ids, length = sequences.prompts
    assert ids[2, : length[2]].tolist() == encoder.for_windows([sequences.x[2][:, None]])[0]


def test_ranks_and_seeds(flags):
    series = series_from_args(flags)
    data, alone = batch_loader(flags, "train", series)
    shares = [batch_loader(flags, "train", series, rank=rank, world=2)[1].batch_sampler for rank in (0, 1)]
    halves = [[batch[:16] for batch in alone.batch_sampler], [batch[16:] for batch in alone.batch_sampler]]
    assert [list(share) for share in shares] == halves
    other = batch_loader(flags, "train", series, seed=8)[1].batch_sampler
    assert list(other) == list(EpochBatches(len(data), 32, 8)) != list(alone.batch_sampler)
    assert list(epoch_batches(flags, data, "train")) == list(EpochBatches(len(data), 32, 7))


def test_the_flags_of_a_series_are_the_parameters_of_its_loading(flags):
    with_others = Namespace(**vars(flags) | {"fill_missing": "linear", "learning_rate": 1e-3})
    assert series_flags(with_others) == {
        "data": "ETTh1", "root_path": flags.root_path, "data_path": flags.data_path, "features": "M", "target": "OT",
        "freq": "h", "embed": "timeF", "percent": 100, "seq_len": 96, "label_len": 48, "pred_len": 24,
        "fill_missing": "linear",
    }  # fmt: skip
    assert series_flags(Namespace(seq_len=8, model="TimeLLM")) == {"seq_len": 8}


def test_loaders(flags):
    series = series_from_args(flags)
    train, loader = batch_loader(flags, "train", series)
    assert len(loader) == len(train) // 32 == (8640 - 119) // 32
    batch = next(iter(loader))
    assert batch.x.shape == (32 * 7, 96) and batch.y.shape == (32 * 7, 24) and batch.index.shape == (32,)
    position = batch.index[5].item()
    assert torch.equal(batch.x[35:42], train[position]["x"].T)
    test, loader = batch_loader(flags, "test", series)
    assert torch.cat([batch.index for batch in loader]).tolist() == list(range(len(test)))


def test_workers_give_the_same_batches(flags):
    series = series_from_args(flags)
    _, plain = batch_loader(flags, "train", series)
    _, forked = batch_loader(Namespace(**vars(flags) | {"num_workers": 2}), "train", series)
    plain.batch_sampler.set_epoch(1, skip=260)
    forked.batch_sampler.set_epoch(1, skip=260)
    pairs = list(zip(plain, forked, strict=True))
    assert len(pairs) == 6
    for one, other in pairs:
        assert all(map(torch.equal, (one.x, one.y, one.index), (other.x, other.y, other.index)))


def test_iterating_leaves_the_global_random_state(flags):
    _, loader = data_provider(flags, "train")
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(state, torch.get_rng_state())


def test_batch_larger_than_the_training_set(flags):
    with pytest.raises(InputError, match="--batch_size: got 9000, expected at most 8521, for 8521 training windows"):
        data_provider(Namespace(**vars(flags) | {"batch_size": 9000}), "train")
    with pytest.raises(InputError, match="--batch_size: got 3, expected at least 4, a window of each step for each process"):
        batch_loader(Namespace(**vars(flags) | {"batch_size": 3}), "train", series_from_args(flags), world=4)
    with pytest.raises(InputError, match="--eval_batch_size: got 0, expected a whole number of at least 1"):
        data_provider(Namespace(**vars(flags) | {"eval_batch_size": 0}), "val")


def running(pid: int) -> bool:
    """Whether the process lives (one that ended and waits to be collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
def test_workers_die_with_a_killed_parent_and_ignore_ctrl_c():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert all(running(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 2  # PyTorch's own watchdog would take 5 s
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(running(pid) for pid in workers)
