"""The training loop: epochs, their lines, the best checkpoint, early stopping."""

import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F

from data_provider.batches import Batch
from layers.ranks import from_all, processes
from models.base import ForecastModel
from utils.errors import RunError
from utils.results.calibration import Calibration
from utils.results.log import memory_line, peak_memory_gib, progress_bar
from utils.results.m4_pass import open_pass
from utils.results.test_pass import TestPass
from utils.saving.interrupt import Interrupted
from utils.saving.saver import resume_command
from utils.training.evaluate import Scores, forecast_in_parts, score
from utils.training.losses import Loss, loss_of, mean_squared
from utils.training.memory import advice, explain_out_of_memory, halve_on_out_of_memory, is_out_of_memory
from utils.training.precision import Autocast
from utils.training.reduction import GradientReducer
from utils.training.schedule import learning_rate
from utils.training.session import Job
from utils.training.step import TooManySkips
from utils.training.trial import trial

TestFound = tuple[TestPass, Scores]
Parts = tuple[torch.Tensor, list[torch.Tensor | None]]  # the loss [], and the gradients of what sequences share
EVALUATION_SHARE = 0.7  # a sequence's evaluation over its training step, until one has been timed


def train(job: Job) -> TestFound | None:
    """Train until the epochs or the patience are used up; the best checkpoint lies in the run's folder.

    Returns:
        What the test pass of the best epoch found; None where that epoch had none, or ran before a resume.

    Raises:
        Interrupted: a signal has come; the state is saved.
        RunError: the disk, the numbers or the memory do not let the run go on; the last state is kept.
    """
    args, progress = job.args, job.training.progress
    try:
        best_test = _run_epochs(job)
    except TooManySkips as skips:
        raise RunError(
            f"{skips}; the last is of {_culprits(job, skips.batch)}; try a lower --learning_rate; "
            f"{job.training.saver.kept()}"
        ) from None
    if progress.epochs_without_improvement >= args.patience:
        job.log("Early stopping")
    if progress.best_vali_loss == float("inf"):
        raise RunError("no epoch reached a finite validation loss, so there is no checkpoint; try a lower --learning_rate")
    return best_test


def _run_epochs(job: Job) -> TestFound | None:
    args, progress, journal = job.args, job.training.progress, job.training.journal
    clock = Clock(job)
    best_test: TestFound | None = None
    if journal:
        journal.start(progress.epoch, progress.iteration)
    if job.model.is_trained:
        trial(job, lambda batch: leave_gradients(job, batch), clock.left)
    train_one = train_epoch if job.model.is_trained else score_epoch
    try:
        while not progress.finished(args.train_epochs, args.patience):
            began = time.perf_counter()
            train_loss = train_one(job, clock)
            seconds = time.perf_counter() - began
            job.log(f"Epoch: {progress.epoch} cost time: {seconds:.1f}")
            began = time.perf_counter()
            vali = validate(job)
            improved = vali.loss < progress.best_vali_loss
            with job.training.saver.explained():  # it writes predictions
                results, test = test_epoch(job, improved)
            if improved:
                best_test = (results, test) if results and test else None
            evaluation = time.perf_counter() - began
            clock.take(evaluation, tested=test is not None)
            end_epoch(job, train_loss, vali, test)
            if journal:
                costs = {"seconds": seconds, "evaluation_seconds": evaluation,
                         "peak_memory_gib": peak_memory_gib(job.device)}  # fmt: skip
                journal.epoch(progress.history, costs)
            save_if_due(job)
    except Interrupted as signal:
        save(job)
        at = f"epoch {progress.epoch}, iteration {progress.iteration}"
        job.log(f"{signal}: the state of {at} is saved in {job.folder}")
        job.log(f"To resume: {resume_command(args)}")
        raise
    return best_test


def train_epoch(job: Job, clock: "Clock") -> float:
    """Run the rest of the epoch that the run is in; return its mean training loss."""
    args, model, optimizer, progress = job.args, job.model, job.training.optimizer, job.training.progress
    loader, total, guard, journal = job.loaders["train"], job.steps_per_epoch, job.training.guard, job.training.journal
    loader.batch_sampler.set_epoch(progress.epoch, skip=progress.iteration)  # type: ignore[union-attr]
    model.train()
    clock.restart()
    with progress_bar(total, progress.iteration) as bar:
        # A state saved at the epoch's end leaves nothing to run, also where --max_iters ended it early.
        for batch in itertools.islice(loader, total - progress.iteration):
            step = (progress.epoch - 1) * total + progress.iteration
            rate = learning_rate(args.lradj, args.learning_rate, step, total, args.train_epochs, args.pct_start)
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss = guard.whole(leave_gradients(job, batch.to(job.device)))
            # The first step makes the optimizer's moments, which are larger than the trained values.
            with explain_out_of_memory("the optimizer's step", lambda: advice(args, model)):
                if guard.allows_step():
                    optimizer.step()
            progress.loss_sum = progress.loss_sum + guard.count(batch, loss, progress)
            model.zero_grad(set_to_none=True)  # here, so that no gradient lies in memory while the run saves or evaluates

            progress.iteration += 1
            clock.steps += 1
            if journal:
                journal.step(progress.epoch, progress.iteration, loss, rate)
            bar.update()
            if progress.iteration % args.log_every == 0:
                job.log(f"\titers: {progress.iteration}, epoch: {progress.epoch} | loss: {loss.item():.7f}")
                job.log(f"\t{clock.line()}")
                if journal:
                    journal.flush()
            save_if_due(job)
    guard.settle(progress)
    return float(progress.loss_sum) / (total - progress.skipped) if total > progress.skipped else float("nan")


def validate(job: Job) -> Scores:
    """Score the validation split; of the best epoch so far, the errors become the job's prediction intervals."""
    if not job.levels:
        return score(job, "val")
    with job.training.saver.explained(), Calibration(job) as calibration:  # it writes the errors
        vali = score(job, "val", calibration.consume)
        if vali.loss < job.training.progress.best_vali_loss:
            calibration.end()
    return vali


def score_epoch(job: Job, clock: "Clock") -> float:
    """The training loss of a model that is fitted in closed form, and has nothing to train step by step."""
    job.training.progress.iteration = job.steps_per_epoch
    return score(job, "train").loss


def leave_gradients(job: Job, batch: Batch) -> torch.Tensor:
    """Leave the gradients of this process's sequences, those of all processes added up; return its part of the loss.

    Raises:
        RunError: not even one sequence fits into the GPU's memory.
    """
    guard, reducer = job.training.guard, job.training.reducer
    scale = guard.scale.value if guard.scale else None
    passes = partial(forward_backward, job.model, batch, job.precision, loss=loss_of(job.args))
    smaller = partial(halve_on_out_of_memory, job, job.step_limit, len(batch))
    if reducer is None:
        return smaller(lambda size: passes(size, scale=scale))
    # One of several processes must not come back alone to what all do together.
    total = job.args.batch_size * len(job.trained_series.forecast_columns)
    with explain_out_of_memory("a step", lambda: advice(job.args, job.model)):
        return passes(scale=scale, total=total, reducer=reducer, within=smaller)


def forward_backward(
    model: ForecastModel,
    batch: Batch,
    precision: Autocast,
    max_sequences: int = 0,
    scale: torch.Tensor | None = None,
    loss: Loss = mean_squared,
    total: int | None = None,
    reducer: GradientReducer | None = None,
    within: Callable[[Callable[[int], Parts]], Parts] | None = None,
) -> torch.Tensor:
    """Leave the batch's gradients in the trained tensors; return its loss, detached.

    The prototypes' keys and values are made once. The sequences run in micro-batches of at most
    `max_sequences` (0: one), whose gradients add up at the keys and values, and flow on from there once.
    All gradients are `scale` (None: 1) times too large.

    Args:
        total: sequences of the whole batch, of which this process has some: loss and gradients are then its part of
            the whole batch's. None: it has all.
        reducer: adds the gradients of all processes up; None: there is one.
        within: calls the work on the micro-batches with their size, again where it was too large; None: `max_sequences`.
    """
    with precision.autocast():
        shared = model.prototype_kv()
    if reducer is not None:
        reducer.begin()

    def work(size: int) -> Parts:
        leaves = [tensor.detach().requires_grad_() for tensor in shared]
        found = torch.zeros((), device=batch.x.device)
        parts = batch.split(size)
        for number, part in enumerate(parts, 1):
            if reducer is not None:
                reducer.expect_last(number == len(parts))
            with precision.autocast():
                forecast = model(part, tuple(leaves))
            share = loss(forecast.float(), part) * (len(part) / (total or len(batch)))
            (share if scale is None else share * scale).backward()
            found += share.detach()
        return found, [leaf.grad for leaf in leaves]

    found, gradients = within(work) if within else work(max_sequences)
    if shared:
        torch.autograd.backward(shared, gradients)
    if reducer is not None:
        reducer.finish()
        mapping = model.mapping_layer
        if mapping is not None and mapping.gradient_factor is not None:
            dist.all_reduce(mapping.gradient_factor)
    return found


def test_epoch(job: Job, improved: bool) -> tuple[TestPass | None, Scores | None]:
    """Score the test split where `--test_every` has it; of the best epoch so far, keep all that a test leaves."""
    every = job.args.test_every
    if not every or job.training.progress.epoch % every:
        return None, None
    results = open_pass(job) if improved else None
    return results, score(job, "test", results.consume if results else None)


def end_epoch(job: Job, train_loss: float, vali: Scores, test: Scores | None) -> None:
    """Print the epoch's line; keep its checkpoint if it is the best so far; save the state.

    The checkpoint comes before the state that knows of it: a run that ends between the two resumes
    from an earlier state and writes the same checkpoint once more.
    """
    progress, patience = job.training.progress, job.args.patience
    tested = f" Test Loss: {test.loss:.4f} MAE Loss: {test.mae:.4f}" if test else ""
    job.log(f"Epoch: {progress.epoch} | Train Loss: {train_loss:.4f} Vali Loss: {vali.loss:.4f}{tested}")
    job.log(memory_line(job.device))
    progress.history.append(
        {"epoch": progress.epoch, "train_loss": train_loss, "vali_loss": vali.loss,
         "test_loss": test.loss if test else None, "test_mae": test.mae if test else None}
    )  # fmt: skip
    improved = vali.loss < progress.best_vali_loss
    progress.epochs_without_improvement = 0 if improved else progress.epochs_without_improvement + 1
    job.log(f"EarlyStopping counter: {progress.epochs_without_improvement} out of {patience}")
    if improved:
        job.log(f"Validation loss decreased ({progress.best_vali_loss:.6f} --> {vali.loss:.6f}). Saving model ...")
        progress.best_vali_loss = vali.loss
        with _explained(job):
            job.training.saver.save_checkpoint(progress.history[-1], job.intervals)
    progress.next_epoch()
    save(job)


def save_if_due(job: Job) -> None:
    """Save the state if it is time.

    Raises:
        Interrupted: a signal has come.
    """
    job.training.saver.asks.check_signal()
    if job.training.saver.due(job.training.progress):
        save(job)


def save(job: Job) -> None:
    """Save the state of the run as it stands between two iterations."""
    progress = job.training.progress
    job.training.guard.settle(progress)
    if scale := job.training.guard.scale:
        progress.loss_scale, progress.good_steps = float(scale.value), int(scale.good_steps)
    progress.max_sequences = job.step_limit.sequences
    progress.evaluation_sequences = job.evaluation_limit.sequences
    with _explained(job):
        job.training.saver.save(progress)


def _explained(job: Job) -> AbstractContextManager[None]:
    """For work that saves: no memory inside is one line, with what the run can resume from."""
    return explain_out_of_memory("saving", lambda: f"{advice(job.args, job.model)}; {job.training.saver.kept()}")


class Clock:
    """Speed of the steps since the last line, and the time that the whole run still takes."""

    def __init__(self, job: Job):
        self.job = job
        self.windows = {split: len(job.windows.windows(split)) for split in ("val", "test")}
        self.evaluation: float | None = None  # seconds a window, once an evaluation has been timed
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self.since, self.steps = time.perf_counter(), 0

    def take(self, seconds: float, tested: bool) -> None:
        """Take in what the evaluation of an epoch took: validation, and the test where it was `tested`."""
        self.evaluation = seconds / (self.windows["val"] + tested * self.windows["test"])

    def line(self) -> str:
        """Speed and left time; starts the next interval."""
        speed = (time.perf_counter() - self.since) / self.steps
        self.restart()
        return f"speed: {speed:.4f}s/iter; left time: {self.left(speed):.4f}s"

    def left(self, speed: float) -> float:
        """Seconds that the whole run still takes at `speed` seconds an iteration, evaluations included."""
        args, progress = self.job.args, self.job.training.progress
        epochs = range(progress.epoch, args.train_epochs + 1)
        steps = len(epochs) * self.job.steps_per_epoch - progress.iteration
        tests = sum(1 for epoch in epochs if args.test_every and epoch % args.test_every == 0)
        tests += args.test_every != 1  # the best epoch is tested at the end, unless all were
        windows = len(epochs) * self.windows["val"] + tests * self.windows["test"]
        each = EVALUATION_SHARE * speed / args.batch_size if self.evaluation is None else self.evaluation
        return steps * speed + windows * each


def _culprits(job: Job, batch: Batch) -> str:
    """Dates of the whole batch's windows, and the columns that go wrong in them."""
    found = from_all(_wrong_windows(job, batch))
    found = [some for some in found if some.columns] or found
    windows = [window for some in found for window in some.windows]
    columns = [name for name in job.trained_series.forecast_columns if any(name in some.columns for some in found)]
    return f"the windows that start at {_some(windows)}" + (f", columns {_some(columns)}" if columns else "")


class _Wrong(NamedTuple):
    """Windows, those that go wrong where there are such, and the columns that do."""

    windows: list[str]
    columns: list[str]


@torch.no_grad()
def _wrong_windows(job: Job, batch: Batch) -> _Wrong:
    data = job.loaders["train"].dataset
    dates = [str(data.window_dates(int(index))[0]) for index in batch.index]  # type: ignore[attr-defined]
    columns = job.trained_series.forecast_columns
    batch = batch.to(job.device)
    shared = None
    try:
        with job.precision.autocast():
            shared = job.model.prototype_kv()
        forecast = forecast_in_parts(job.model, job.precision, batch, shared, job.step_limit.sequences)
    except RuntimeError as error:
        # One of several processes must not go on alone from what all do together.
        if not is_out_of_memory(error) or (shared is None and processes() > 1):
            raise
        # The numbers end the run; that they cannot be looked at more closely must not hide it.
        return _Wrong(dates, [])
    errors = F.mse_loss(forecast, batch.y, reduction="none").mean(1).view(len(dates), -1).cpu()  # (B, N)
    bad = ~torch.isfinite(errors)
    if not bad.any():
        return _Wrong(dates, columns if processes() == 1 else [])
    windows = [date for date, row in zip(dates, bad, strict=True) if row.any()]
    return _Wrong(windows, [name for name, column in zip(columns, bad.T, strict=True) if column.any()])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
