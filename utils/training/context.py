"""The context of a run that is set up; the verbs fit, test and predict work on it."""

import os
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from data_provider.batches import Batch
from data_provider.data_loader import FileSeries, Series, SplitSeries
from data_provider.splits import SPLITS
from layers.backbone import BackboneInfo
from models.base import ForecastModel
from utils.results.bands import Intervals
from utils.results.log import Journal, RunLog
from utils.saving.checkpoint import Checkpoint
from utils.saving.interrupt import Interrupts
from utils.saving.state import Progress, Saver
from utils.training.optimizer import Average
from utils.training.precision import Precision


@dataclass
class Training:
    """What only a run that trains has."""

    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scheduler_steps: int  # after each iteration; 0: one an epoch
    average: Average
    saver: Saver
    progress: Progress
    journal: Journal | None  # history.csv and what goes with it; one process has it
    lock: int | None  # the handle of the folder's lock; one process has it


@dataclass
class Limit:
    """How many sequences (windows x channels) run at once; 0: no limit. Less, once memory was short."""

    sequences: int


@dataclass(kw_only=True)
class Plan:
    """A run whose flags are complete and checked; no weight is loaded yet.

    Attributes:
        series: what is forecast, a SplitSeries; of a run that only forecasts, the history that it goes on from.
        pretrain: what it trains on, or its checkpoint was trained on, where that is another series.
        outline: the model on the meta device.
        checkpoint: what is tested or forecast with; None until a run that trains has one.
        levels: of the prediction intervals, per cent.
        intervals: of the tensors that the model has, once they are calibrated.
        remarks: lines for the user, said at the start, or with the forecast of a run that only forecasts.
    """

    args: Namespace
    folder: Path  # of its results
    series: Series
    pretrain: FileSeries | None
    info: BackboneInfo | None  # the language model's, where there is one
    outline: ForecastModel
    checkpoint: Checkpoint | None
    levels: tuple[float, ...]
    intervals: Intervals | None
    remarks: list[str]
    accelerator: Accelerator
    device: torch.device
    precision: Precision

    def random_seed(self, repeat: int) -> int | None:
        """What a language model of `--llm_ablation random` is drawn from: the training's seed; None: it is read."""
        if self.args.llm_ablation != "random":
            return None
        held = self.checkpoint.backbone.get("random_seed") if self.checkpoint else None
        return (self.args.seed + repeat) % 2**32 if held is None else held

    @property
    def splits(self) -> list[tuple[str, SplitSeries]]:
        """The splits that the run goes through, with the series; a history that is gone on from has none."""
        if not isinstance(self.series, SplitSeries):
            return []
        if self.args.all_rows:
            return [("train", self.series)]
        kept = self.intervals  # the repeats' mean needs the errors of each once more
        calibrates = bool(self.levels) and (kept is None or kept.newest is None or self.args.itr > 1)
        first = 0 if self.args.is_training else 1 if calibrates else 2
        series = {"train": self.pretrain or self.series}
        return [(split, series.get(split, self.series)) for split in SPLITS[first:]]


@dataclass(kw_only=True)
class Context(Plan):
    """A run that is set up; its flags are final.

    Attributes:
        loaders: of the splits that the run goes through: "train", "val", "test".
        record: what a checkpoint says of the run.
        step_limit, evaluation_limit: what of a training step, or of an evaluation and a forecast, runs at once.
    """

    log: RunLog
    model: ForecastModel
    loaders: "dict[str, DataLoader[Batch]]"
    record: dict[str, Any]
    interrupts: Interrupts
    step_limit: Limit
    evaluation_limit: Limit
    has_checkpoint: bool = False  # the model has its tensors
    sequences_per_step: int  # of a training step, in all processes
    training: Training = field(init=False)  # of a run with --is_training 1 alone

    # The series, cut into windows; a run that only forecasts has none.
    @property
    def windows(self) -> Any:
        assert isinstance(self.series, SplitSeries), "this run only forecasts"
        return self.series

    # The series whose training windows train.
    @property
    def trained_series(self) -> SplitSeries:
        return self.pretrain or self.windows

    # Training steps of this process in an epoch.
    @property
    def steps_per_epoch(self) -> int:
        whole = self.loaders["train"].batch_sampler.batches_per_epoch  # type: ignore[union-attr]
        return min(whole, self.args.max_iters or whole)

    def close(self) -> None:
        """Close the run's files, and give its folder back to other runs."""
        if self.args.is_training:
            if self.training.journal is not None and self.training.journal.events is not None:
                self.training.journal.events.close()
            if self.training.lock is not None:
                os.close(self.training.lock)
