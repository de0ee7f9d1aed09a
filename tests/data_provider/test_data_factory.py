"""Loaders made from flags, and what becomes of their workers."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from data_provider.data_factory import data_provider, make_loader
from data_provider.sampler import EpochBatches
from data_provider.synthetic import write_synthetic
from layers.errors import InputError
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
next(batches)
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


def test_loaders(flags):
    train, loader = data_provider(flags, "train")
    assert len(loader) == len(train) // 32 == (8640 - 119) // 32
    batch = next(iter(loader))
    assert (
        batch["x"].shape == (32, 96, 7) and batch["y"].shape == (32, 72, 7) and batch["index"].shape == (32,)
    )
    position = batch["index"][5].item()
    assert torch.equal(batch["x"][5], train[position]["x"])
    test, loader = data_provider(flags, "test")
    assert torch.cat([batch["index"] for batch in loader]).tolist() == list(range(len(test)))


def test_workers_give_the_same_batches(flags):
    dataset, plain = data_provider(flags, "train")
    forked = make_loader(dataset, EpochBatches(len(dataset), 32, flags.seed), num_workers=2)
    plain.batch_sampler.set_epoch(1, skip=260)
    forked.batch_sampler.set_epoch(1, skip=260)
    pairs = list(zip(plain, forked, strict=True))
    assert len(pairs) == 6
    assert all(torch.equal(one["y"], other["y"]) for one, other in pairs)


def test_iterating_leaves_the_global_random_state(flags):
    _, loader = data_provider(flags, "train")
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(state, torch.get_rng_state())


def test_batch_larger_than_the_training_set(flags):
    with pytest.raises(InputError, match="--batch_size 9000: there are 8521 training windows"):
        data_provider(Namespace(**vars(flags) | {"batch_size": 9000}), "train")


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
