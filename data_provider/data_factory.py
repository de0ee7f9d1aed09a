"""From the command line's flags to datasets and batches."""

import ctypes
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader

from data_provider.data_loader import Series, WindowDataset, load_series
from data_provider.sampler import EpochBatches
from layers.errors import InputError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def series_from_args(args: Namespace) -> Series:
    """The series that the flags describe."""
    names = (
        "data",
        "root_path",
        "data_path",
        "features",
        "target",
        "freq",
        "embed",
        "percent",
        "seq_len",
        "label_len",
        "pred_len",
        "fill_missing",
    )
    # An older run's record, and a caller's own namespace, may lack a newer flag: that is its default.
    return load_series(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def epoch_batches(
    args: Namespace, dataset: WindowDataset, flag: str, rank: int = 0, world: int = 1
) -> EpochBatches:
    """Training: shuffled with the seed, short last batch dropped. Otherwise in order, nothing dropped.

    Raises:
        InputError: fewer training windows than one batch for each rank.
    """
    train = flag == "train"
    size = args.batch_size if train else args.eval_batch_size
    name = "batch_size" if train else "eval_batch_size"
    if size < 1:
        raise InputError(f"--{name} {size}: at least 1 is needed")
    if train and len(dataset) < size * world:
        ranks = f" on each of {world} processes" if world > 1 else ""
        raise InputError(
            f"--batch_size {size}{ranks}: there are {len(dataset)} training windows;"
            f" at most {len(dataset) // world} is needed"
        )
    return EpochBatches(len(dataset), size, args.seed, shuffle=train, drop_last=train, rank=rank, world=world)


def data_provider(args: Namespace, flag: str) -> tuple[WindowDataset, DataLoader]:
    """Dataset and loader of "train", "val" or "test" for the parsed flags.

    Raises:
        InputError: see `load_series` and `epoch_batches`.
    """
    dataset = series_from_args(args).windows(flag)
    return dataset, make_loader(dataset, epoch_batches(args, dataset, flag), args.num_workers)


def make_loader(
    dataset: WindowDataset,
    batches: EpochBatches,
    num_workers: int,
    collate: Callable | None = None,
    pin: bool = False,
) -> DataLoader:
    """A loader over `batches`; its workers end with this process.

    It draws from a generator of its own, so that iterating leaves the global
    random state, and with it a resumed run's dropout, as it was.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=start_worker,
        # Workers must be this process's own children to die with it: Python 3.14 forks them elsewhere.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(0),
    )


def start_worker(_worker_id: int) -> None:
    """Tie a loader worker to its parent: it dies with it, and leaves every signal to it.

    A closed terminal or a shutdown signals all processes; a worker that went first would end the parent
    with an error before it has saved.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform != "linux":
        return  # there PyTorch's own watchdog ends workers some seconds later
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above took effect
        os._exit(1)
