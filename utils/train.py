"""The training loop: epochs, their lines, the best checkpoint, early stopping."""

import itertools
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from models.TimeLLM import Model
from utils.errors import RunError
from utils.evaluate import Scores, evaluate
from utils.guard import Guard
from utils.interrupt import Interrupted, Interrupts
from utils.journal import Journal
from utils.memory import advice, out_of_memory_told, within_memory
from utils.progress import Progress
from utils.run_log import memory_line, peak_memory_gib, progress_bar
from utils.saver import Saver
from utils.schedule import learning_rate
from utils.step import gradients

EVALUATION_SHARE = 0.7  # a sequence's evaluation over its training step, until one has been timed


@dataclass
class Run:
    """A run that is set up: what `fit` and `test` work on."""

    args: object  # the flags
    folder: Path
    log: object  # prints a line
    accelerator: Accelerator
    model: Model
    loaders: dict[str, DataLoader]  # "train", "val", "test"
    record: dict  # what the checkpoint says of the run
    max_sequences: int
    optimizer: torch.optim.Optimizer | None = None
    progress: Progress = field(default_factory=Progress)
    interrupts: Interrupts = field(default_factory=Interrupts)
    saver: Saver | None = None  # where the run trains
    memory_was_short: bool = False
    journal: Journal | None = None  # history.csv and what goes with it; one process has it

    def __post_init__(self):
        self.guard = Guard(self)

    @property
    def steps_per_epoch(self) -> int:
        whole = self.loaders["train"].batch_sampler.batches_per_epoch
        return min(whole, self.args.max_iters or whole)

    def evaluate(self, split: str, consume=None) -> Scores:
        """Score a split; raises Interrupted between two batches if a signal has come."""
        batches = self.loaders[split]
        if self.accelerator.num_processes == 1:  # of several, one alone must not leave
            batches = self.interrupts.between(batches)
        with out_of_memory_told("an evaluation", lambda: advice(self)):  # beside the parts, the prototypes
            return evaluate(self.model, batches, self.accelerator, consume, partial(within_memory, self))


class Clock:
    """Speed of the steps since the last line, and the time that the whole run still takes."""

    def __init__(self, run: Run):
        self.run = run
        self.since, self.steps = time.perf_counter(), 0
        self.evaluation: float | None = None  # seconds of validation and test together

    def line(self) -> str:
        """Speed and left time; starts the next interval."""
        now = time.perf_counter()
        speed = (now - self.since) / self.steps
        self.since, self.steps = now, 0
        run, progress, epochs = self.run, self.run.progress, self.run.args.train_epochs
        windows = sum(len(run.loaders[split].dataset) for split in ("val", "test"))
        evaluation = self.evaluation or EVALUATION_SHARE * speed * windows / run.args.batch_size
        steps = (epochs - progress.epoch + 1) * run.steps_per_epoch - progress.iteration
        evaluations = epochs - progress.epoch + 1 + 0.5  # the last one is the final test alone
        return f"speed: {speed:.4f}s/iter; left time: {steps * speed + evaluations * evaluation:.4f}s"


def fit(run: Run) -> Progress:
    """Train until the epochs or the patience are used up; the best checkpoint lies in the run's folder.

    Raises:
        Interrupted: a signal has come; the state is saved.
        RunError: the disk, the numbers or the memory do not let the run go on; the last state is kept.
    """
    args, progress, log = run.args, run.progress, run.log
    clock = Clock(run)
    if run.journal:
        run.journal.start(progress.epoch, progress.iteration)
    try:
        while not progress.finished(args.train_epochs, args.patience):
            began = time.perf_counter()
            train_loss = train_epoch(run, clock)
            seconds = time.perf_counter() - began
            log(f"Epoch: {progress.epoch} cost time: {seconds:.1f}")
            began = time.perf_counter()
            vali, test = run.evaluate("val"), run.evaluate("test")
            clock.evaluation = time.perf_counter() - began
            end_epoch(run, train_loss, vali, test)
            if run.journal:
                costs = {"seconds": seconds, "evaluation_seconds": clock.evaluation,
                         "peak_memory_gib": peak_memory_gib(run.accelerator.device)}  # fmt: skip
                run.journal.epoch(progress.history, costs)
            run.saver.after_iteration()
    except Interrupted as signal:
        run.saver.interrupted(signal)
        raise
    if progress.worse >= args.patience:
        log("Early stopping")
    if progress.best == float("inf"):
        raise RunError("no epoch reached a finite validation loss, so there is no checkpoint; try a lower --learning_rate")
    return progress


def train_epoch(run: Run, clock: Clock) -> float:
    """Run the rest of the epoch that `run.progress` is in; return its mean training loss."""
    args, progress, model = run.args, run.progress, run.model
    loader, total = run.loaders["train"], run.steps_per_epoch
    loader.batch_sampler.set_epoch(progress.epoch, skip=progress.iteration)
    model.train()
    clock.since, clock.steps = time.perf_counter(), 0
    with progress_bar(total, progress.iteration) as bar:
        # A state saved at the epoch's end leaves nothing to run, also where --max_iters ended it early.
        for batch in itertools.islice(loader, total - progress.iteration):
            step = (progress.epoch - 1) * total + progress.iteration
            rate = learning_rate(args.lradj, args.learning_rate, step, total, args.train_epochs, args.pct_start)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.zero_grad(set_to_none=True)
            loss = within_memory(
                run, len(batch.x), partial(gradients, model, batch.to(run.accelerator.device), run.accelerator)
            )
            progress.loss_sum = progress.loss_sum + run.guard.step(batch, loss)
            progress.iteration += 1
            clock.steps += 1
            if run.journal:
                run.journal.step(progress.epoch, progress.iteration, loss, rate)
            bar.update()
            if progress.iteration % args.log_every == 0:
                run.log(f"\titers: {progress.iteration}, epoch: {progress.epoch} | loss: {loss.item():.7f}")
                run.log(f"\t{clock.line()}")
                if run.journal:
                    run.journal.flush()
            run.saver.after_iteration()
    run.guard.settle()
    loss_sum = run.accelerator.reduce(progress.loss_sum.to(run.accelerator.device), reduction="mean")
    return float(loss_sum) / (total - progress.skipped) if total > progress.skipped else float("nan")


def end_epoch(run: Run, train_loss: float, vali: Scores, test: Scores) -> None:
    """Print the epoch's line; keep its checkpoint if it is the best so far; save the state."""
    progress, log = run.progress, run.log
    log(
        f"Epoch: {progress.epoch} | Train Loss: {train_loss:.4f} Vali Loss: {vali.mse:.4f} "
        f"Test Loss: {test.mse:.4f} MAE Loss: {test.mae:.4f}"
    )
    log(memory_line(run.accelerator.device))
    progress.history.append(
        {"epoch": progress.epoch, "train_loss": train_loss, "vali_loss": vali.mse, "test_loss": test.mse,
         "test_mae": test.mae}
    )
    keep_best(run, vali.mse)
    progress.next_epoch()
    run.saver.save()


def keep_best(run: Run, vali_loss: float) -> None:
    """Save the checkpoint if the validation loss is the lowest so far.

    The checkpoint comes before the state that knows of it: a run that ends between the two goes on
    from an earlier state and writes the same checkpoint once more.
    """
    progress, args = run.progress, run.args
    improved = vali_loss < progress.best
    progress.worse = 0 if improved else progress.worse + 1
    run.log(f"EarlyStopping counter: {progress.worse} out of {args.patience}")
    if improved:
        run.log(f"Validation loss decreased ({progress.best:.6f} --> {vali_loss:.6f}). Saving model ...")
        progress.best = vali_loss
        run.saver.save_checkpoint()
