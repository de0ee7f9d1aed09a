"""The door to the data: from a run's flags to its series, datasets and loaders."""

import inspect
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data_provider.batches import WindowCollate
from data_provider.data_loader import ChannelItems, SplitSeries, load_series
from data_provider.m4 import load_m4
from data_provider.splits import M4
from layers.errors import LoaderError, input_error
from layers.prompt import PromptEncoder

DRAWS = 2**31  # numbers that a random cut is drawn from


def data_provider(args: Namespace, flag: str) -> tuple[Any, DataLoader]:
    """Dataset and loader of "train", "val" or "test", as the Time-Series-Library has them: the loader yields batch_x
    `[B, T, N]`, batch_y `[B, label_len + H, N]`, batch_x_mark `[B, T, F]` and batch_y_mark `[B, label_len + H, F]`,
    float32, the values standardised.

    Raises:
        InputError: see `load_series` and `epoch_batches`.
    """
    return batch_loader(args, flag, series_from_args(args), collate=_four_tensors)


def items(args: Namespace, series: SplitSeries, flag: str) -> Any:
    """The dataset of "train", "val" or "test": windows with all their channels, but in training by `--recipe published`
    those of one channel each."""
    dataset, channels = series.windows(flag), len(series.forecast_columns)
    alone = flag == "train" and getattr(args, "recipe", "own") == "published" and channels > 1
    return ChannelItems(dataset, channels) if alone else dataset


def _four_tensors(items: list[dict]) -> tuple[torch.Tensor, ...]:
    held = default_collate(items)
    return held["x"], held["y"], held["x_mark"], held["y_mark"]


def batch_loader(
    args: Namespace,
    flag: str,
    series: SplitSeries,
    encoder: PromptEncoder | None = None,
    rank: int = 0,
    world: int = 1,
    seed: int | None = None,
    pin: bool = False,
    whole: bool = False,
    collate: Callable | None = None,
) -> tuple[Any, DataLoader]:
    """Dataset and loader of "train", "val" or "test" of a series; the loader yields `data_provider.batches.Batch`.

    Args:
        encoder: makes the prompts in the loader's workers; None: the batches have none.
        rank, world, seed: see `epoch_batches`.
        pin: give the batches page-locked memory, from which they go to a GPU faster.
        whole: the model reads whole windows and their marks.
        collate: makes other batches of the dataset's items.

    Raises:
        InputError: see `epoch_batches`.
    """
    dataset = items(args, series, flag)
    batches = epoch_batches(args, dataset, flag, rank, world, seed)
    collate = collate or WindowCollate(series.pred_len, series.target_index, encoder, whole)
    return dataset, make_loader(dataset, batches, args.num_workers, collate, pin)


def series_from_args(args: Namespace) -> Any:
    """The series that the flags describe, a `FileSeries` or an `M4Series`.

    Raises:
        InputError: see `load_series` and `load_m4`.
    """
    if args.data == M4:
        return load_m4(args.root_path, args.seasonal_patterns, args.seq_len, args.label_len, args.pred_len)
    return load_series(**series_flags(args))


def series_flags(args: Namespace, function: Callable = load_series) -> dict[str, Any]:
    """The flags that `load_series` takes, which are its parameters, or another function such as `read_table`.

    An older run's record, and a caller's own namespace, may lack a newer flag: that is left at its default.
    """
    return {name: getattr(args, name) for name in inspect.signature(function).parameters if hasattr(args, name)}


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


def epoch_batches(
    args: Namespace, dataset: Any, flag: str, rank: int = 0, world: int = 1, seed: int | None = None
) -> EpochBatches:
    """Training: shuffled with the seed, short last batch dropped. Otherwise in order, nothing dropped.

    Args:
        rank, world: the share of process `rank` among `world` processes, see `EpochBatches`.
        seed: of the order; None: `--seed`.

    Raises:
        InputError: fewer training windows than one batch, or a batch that has no window for each process.
    """
    train = flag == "train"
    size = args.batch_size if train else args.eval_batch_size
    if train and getattr(args, "recipe", "own") == "published":  # where --batch_size is each process's
        size *= world
    if train and len(dataset) < size:
        raise input_error("--batch_size", size, f"at most {len(dataset)}, for {len(dataset)} training windows")
    if train and size < world:
        raise input_error("--batch_size", size, f"at least {world}, a window of each step for each process")
    seed = args.seed if seed is None else seed
    return EpochBatches(len(dataset), size, seed, train, rank, world, draws=train and getattr(dataset, "drawn", False))


# One that could not be started has nothing to shut down; its end would print a traceback for lack of this attribute.
_MultiProcessingDataLoaderIter._shutdown = True


class Loader(DataLoader):
    """A DataLoader; where its workers are killed, cannot be started or find no shared memory, that is a `LoaderError`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            batches = super().__iter__()
            # PyTorch's handler raises its error in the middle of a step; its loader finds out by itself, some seconds later.
            if self.num_workers:  # else a handler is the caller's own
                with suppress(AttributeError, ValueError):  # Windows, or another thread than the main one: there is none
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except (OSError, RuntimeError) as error:
            reason, about = str(error).strip().splitlines()[-1], ("DataLoader worker (pid", "shared memory", "the workers")
            if isinstance(error, RuntimeError) and not any(words in reason for words in about):
                raise
            raise LoaderError(
                f"the loader's workers cannot go on ({reason}); where memory is short, --num_workers 0 takes the least "
                "(a container's /dev/shm grows with --shm-size)"
            ) from error


def make_loader(
    dataset: Dataset,
    batches: EpochBatches,
    num_workers: int,
    collate: Callable | None = None,
    pin: bool = False,
) -> DataLoader:
    """A loader over `batches`; its workers end some seconds after this process, however it ends.

    It draws from a generator of its own, so that iterating leaves the global
    random state, and with it a resumed run's dropout, as it was.
    """
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
        # A forked worker shares the memory of the data, which another way of starting would copy.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(0),
    )


def _leave_signals_to_the_parent(_worker_id: int) -> None:
    # A closed terminal or a shutdown signals all processes; a worker that went first would end the parent
    # with an error before it has saved.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
