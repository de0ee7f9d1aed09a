"""The training loop: epochs, their lines, the best checkpoint, early stopping."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from models.TimeLLM import Model
from utils.checkpoint import save_checkpoint
from utils.evaluate import Scores, evaluate
from utils.journal import Journal
from utils.run_log import memory_line, peak_memory_gib, progress_bar
from utils.schedule import learning_rate
from utils.step import gradients

EVALUATION_SHARE = 0.7  # a sequence's evaluation over its training step, until one has been timed


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 1  # the one that runs
    iteration: int = 0  # iterations done in it
    loss_sum: float | torch.Tensor = 0.0  # of these iterations
    best: float = float("inf")  # validation loss
    worse: int = 0  # epochs since
    history: list[dict] = field(default_factory=list)  # a row an epoch


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
    journal: Journal | None = None  # history.csv and what goes with it; one process has it

    @property
    def steps_per_epoch(self) -> int:
        whole = self.loaders["train"].batch_sampler.batches_per_epoch
        return min(whole, self.args.max_iters or whole)

    def evaluate(self, split: str, consume=None) -> Scores:
        return evaluate(self.model, self.loaders[split], self.accelerator, self.max_sequences, consume)


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
    """Train until the epochs or the patience are used up; the best checkpoint lies in the run's folder."""
    args, progress, log = run.args, run.progress, run.log
    clock = Clock(run)
    if run.journal:
        run.journal.start(progress.epoch, progress.iteration)
    while progress.epoch <= args.train_epochs:
        began = time.perf_counter()
        train_loss = train_epoch(run, clock)
        seconds = time.perf_counter() - began
        log(f"Epoch: {progress.epoch} cost time: {seconds:.1f}")
        began = time.perf_counter()
        vali, test = run.evaluate("val"), run.evaluate("test")
        clock.evaluation = time.perf_counter() - began
        log(
            f"Epoch: {progress.epoch} | Train Loss: {train_loss:.4f} Vali Loss: {vali.mse:.4f} "
            f"Test Loss: {test.mse:.4f} MAE Loss: {test.mae:.4f}"
        )
        log(memory_line(run.accelerator.device))
        progress.history.append(
            {"epoch": progress.epoch, "train_loss": train_loss, "vali_loss": vali.mse, "test_loss": test.mse,
             "test_mae": test.mae, "learning_rate": run.optimizer.param_groups[0]["lr"], "seconds": seconds,
             "evaluation_seconds": clock.evaluation,
             "peak_memory_gib": peak_memory_gib(run.accelerator.device)}
        )
        if run.journal:
            run.journal.epoch(progress.history)
        if keep_best(run, vali.mse):
            log("Early stopping")
            break
        progress.epoch, progress.iteration, progress.loss_sum = progress.epoch + 1, 0, 0.0
    return progress


def train_epoch(run: Run, clock: Clock) -> float:
    """Run the rest of the epoch that `run.progress` is in; return its mean training loss."""
    args, progress, model = run.args, run.progress, run.model
    loader, total = run.loaders["train"], run.steps_per_epoch
    loader.batch_sampler.set_epoch(progress.epoch, skip=progress.iteration)
    model.train()
    clock.since, clock.steps = time.perf_counter(), 0
    with progress_bar(total, progress.iteration) as bar:
        for batch in loader:
            step = (progress.epoch - 1) * total + progress.iteration
            rate = learning_rate(args.lradj, args.learning_rate, step, total, args.train_epochs, args.pct_start)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.zero_grad(set_to_none=True)
            loss = gradients(model, batch.to(run.accelerator.device), run.accelerator, run.max_sequences)
            run.optimizer.step()
            progress.loss_sum = progress.loss_sum + loss.double()
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
            if progress.iteration == total:
                break
    return float(run.accelerator.reduce(progress.loss_sum, reduction="mean")) / total


def keep_best(run: Run, vali_loss: float) -> bool:
    """Save the checkpoint if the validation loss is the lowest so far; True when patience has run out."""
    progress, args = run.progress, run.args
    improved = vali_loss < progress.best
    progress.worse = 0 if improved else progress.worse + 1
    run.log(f"EarlyStopping counter: {progress.worse} out of {args.patience}")
    if improved:
        run.log(f"Validation loss decreased ({progress.best:.6f} --> {vali_loss:.6f}). Saving model ...")
        progress.best = vali_loss
        if run.accelerator.is_main_process:
            save_checkpoint(run.folder, run.model, run.record | progress.history[-1])
    return progress.worse >= args.patience
