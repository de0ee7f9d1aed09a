"""The context of a run that is set up; the verbs fit, test and predict work on it."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from data_provider.batches import Batch
from data_provider.data_loader import Series, SplitSeries
from models.base import ForecastModel
from utils.results.bands import Intervals
from utils.results.log import Journal, RunLog
from utils.saving.checkpoint import Checkpoint
from utils.saving.folder import FolderLock
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
    lock: FolderLock | None  # one process has it


@dataclass
class Limit:
    """How many sequences (windows x channels) run at once; 0: no limit. Less, once memory was short."""

    sequences: int
    was_short: bool = False


@dataclass
class Context:
    """A run that is set up; its flags are complete and final.

    Attributes:
        series: what is forecast; of a run that only forecasts, the history that it goes on from.
        pretrain: what it trains on, or its checkpoint was trained on, where that is another series.
        loaders: of the splits that the run goes through: "train", "val", "test".
        record: what a checkpoint says of the run.
        checkpoint: what is tested or forecast with; None until a run that trains has one.
        step_limit, evaluation_limit: what of a training step, or of an evaluation and a forecast, runs at once.
    """

    args: Namespace
    folder: Path
    log: RunLog
    accelerator: Accelerator
    device: torch.device
    precision: Precision
    model: ForecastModel
    series: Series
    loaders: "dict[str, DataLoader[Batch]]"
    record: dict[str, Any]
    interrupts: Interrupts
    step_limit: Limit
    evaluation_limit: Limit
    checkpoint: Checkpoint | None = None
    has_checkpoint: bool = False  # the model has its tensors
    levels: tuple[float, ...] = ()  # of the prediction intervals, per cent
    intervals: Intervals | None = None  # of the tensors that the model has, once they are calibrated
    notes: list[str] = field(default_factory=list)  # to be said with a forecast, or with a test's figures
    pretrain: SplitSeries | None = None
    sequences_per_step: int = 0  # of a training step, in all processes
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
                self.training.lock.release()
