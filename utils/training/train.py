"""The training loop: steps, epochs and their lines, the best checkpoint, early stopping."""

import itertools
import math
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator

from data_provider.batches import Batch
from layers.errors import LoaderError, RunError
from models.base import ForecastModel
from utils.results.log import Progress
from utils.results.test_pass import M4Pass, TestPass, open_pass
from utils.saving.files import duration
from utils.saving.interrupt import Interrupted
from utils.saving.state import random_state, resume_command, set_random_state
from utils.training.context import Context
from utils.training.evaluate import Scores, score, score_and_calibrate
from utils.training.losses import Loss, loss_of, mean_squared
from utils.training.memory import (
    OPTIMIZER_BYTES,
    advice,
    explain_out_of_memory,
    halve_on_out_of_memory,
    memory_limit,
    memory_line,
    peak_memory_gib,
)
from utils.training.precision import GOOD_STEPS, LARGEST_SCALE, Precision

TestFound = tuple[TestPass | M4Pass, Scores]
EVENNESS = 0.3  # how strongly the shares of a model and the linear map beside it are drawn towards one half
EVALUATION_SHARE = 0.7  # a sequence's evaluation over its training step, until one has been timed
FEWEST_STEPS = 20  # a shorter run is over before its dry run would be worth it
MAX_SKIPS = 10  # skipped steps in a row that a run survives


def train(context: Context) -> TestFound | None:
    """Train until the epochs or the patience are used up; the best checkpoint lies in the run's folder.

    Returns:
        What the best epoch's test pass found; None where that epoch had none, or ran before a resume.

    Raises:
        Interrupted: a signal has come; the state is saved.
        RunError: the disk, the numbers, the memory or the loader do not let the run go on; the last state is kept.
    """
    args, progress, journal = context.args, context.training.progress, context.training.journal
    clock = Clock(context)
    best_test: TestFound | None = None
    if journal:
        journal.start(progress.epoch, progress.iteration)
    if context.model.is_trained:
        dry_run(context, clock)
    try:
        while not progress.finished(args.train_epochs, args.patience):
            began = time.perf_counter()
            if context.model.is_trained:
                train_loss = train_epoch(context, clock)
                if context.accelerator.num_processes > 1:  # which do not stop in the evaluation that follows
                    save(context)
            else:  # fitted in closed form before
                progress.iteration, train_loss = context.steps_per_epoch, score(context, "train").loss
            seconds = time.perf_counter() - began
            context.log(f"Epoch: {progress.epoch} cost time: {seconds:.1f}")
            began = time.perf_counter()
            with context.training.saver.explained(), context.training.average.in_place():  # both write to the disk
                vali = Scores(train_loss, train_loss, train_loss) if args.all_rows else validate(context)
                tested = args.test_every and progress.epoch % args.test_every == 0
                best = tested and vali.loss < progress.best_vali_loss and not args.all_rows  # keep all that a test leaves
                results = open_pass(context) if best else None
                test = score(context, "test", results.consume if results else None) if tested else None
            if vali.loss < progress.best_vali_loss:
                best_test = (results, test) if results and test else None
            evaluation = time.perf_counter() - began
            clock.evaluation = evaluation / max(1, clock.windows["val"] + (test is not None) * clock.windows["test"])
            end_epoch(context, train_loss, vali, test)
            if journal:
                costs = {"seconds": seconds, "evaluation_seconds": evaluation,
                         "peak_memory_gib": peak_memory_gib(context.device)}  # fmt: skip
                journal.epoch(progress.history, costs)
            received = torch.tensor(float(context.interrupts.received > 0), device=context.device)
            save_if_asked(context, bool(context.accelerator.reduce(received) > 0), due=False)  # end_epoch has saved
    except Interrupted as signal:
        save(context)
        context.log(
            f"{signal}: the state of epoch {progress.epoch}, iteration {progress.iteration} is saved in {context.folder}"
        )
        context.log(f"To resume: {resume_command(args)}")
        raise
    except LoaderError as error:
        if context.accelerator.num_processes == 1:  # the others of a group are in the middle of a step
            save(context)
        raise RunError(f"{error}; {context.training.saver.kept()}") from error
    if progress.epochs_without_improvement >= args.patience:
        context.log("Early stopping")
    if progress.best_vali_loss == float("inf"):
        raise RunError("no epoch reached a finite validation loss, so there is no checkpoint; try a lower --learning_rate")
    return best_test


def dry_run(context: Context, clock: "Clock") -> None:
    """Tell what the run will take before it takes it: run the first batch forward and backward, twice; no step is made.

    A run that resumes has none, and neither has a very short one. Random generators, buffers and the loader are afterwards
    as they were. Where the GPU's memory is short, this finds how many sequences fit, as the first step would have.

    Raises:
        RunError: not even one sequence fits.
    """
    progress, epochs, model = context.training.progress, context.args.train_epochs, context.model
    if (progress.epoch, progress.iteration) != (1, 0) or epochs * context.steps_per_epoch < FEWEST_STEPS:
        return
    before = random_state(context.device)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a batch normalisation's
    model.train()
    # The batch is made beside the loader: no worker starts, and the loader draws nothing.
    loader = context.loaders["train"]
    loader.batch_sampler.set_epoch(1)  # type: ignore[union-attr]
    first = next(iter(loader.batch_sampler))  # type: ignore[arg-type]
    batch = loader.collate_fn([loader.dataset[index] for index in first]).to(context.device)
    for _ in range(2):  # the first one also makes caches and loads kernels
        began = now(context.device)
        leave_gradients(context, batch)
        model.zero_grad(set_to_none=True)
        seconds = now(context.device) - began
    for buffer, held in buffers:
        buffer.copy_(held)
    set_random_state(before, context.device)
    # The first step makes the moments.
    moments = sum(p.numel() for p in model.parameters() if p.requires_grad) * OPTIMIZER_BYTES[context.args.optimizer]
    kind = "GPU memory" if context.device.type == "cuda" else "memory"
    context.log(
        f"Dry run: {seconds:.4f}s/iter; about {duration(clock.left(seconds) / epochs)} an epoch with its evaluations, "
        f"{duration(clock.left(seconds))} in all; {kind} {peak_memory_gib(context.device) + moments / 2**30:.1f}GB at the "
        f"peak, of {memory_limit(context.device) / 2**30:.1f}GB"
    )


def now(device: torch.device) -> float:
    """The clock's seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_epoch(context: Context, clock: "Clock") -> float:
    """Run the rest of the epoch that the run is in; return its mean training loss."""
    args, training = context.args, context.training
    progress, journal = training.progress, training.journal
    loader, total = context.loaders["train"], context.steps_per_epoch
    loader.batch_sampler.set_epoch(progress.epoch, skip=progress.iteration)  # type: ignore[union-attr]
    context.model.train()
    clock.restart()
    with Progress(total=total, initial=progress.iteration, log=context.log, every=math.inf) as bar:
        # A state saved at the epoch's end leaves nothing to run, also where --max_iters ended it early.
        for batch in itertools.islice(loader, total - progress.iteration):
            lr = training.optimizer.param_groups[0]["lr"]
            loss, stop, due = train_step(context, batch.to(context.device), training.saver.due(progress, ahead=1))
            for _ in range(training.scheduler_steps):
                training.scheduler.step()
            clock.steps += 1
            if journal:
                journal.step(progress.epoch, progress.iteration, loss, lr)
            bar.update()
            if progress.iteration % args.log_every == 0:
                context.log(f"\titers: {progress.iteration}, epoch: {progress.epoch} | loss: {loss:.7f}")
                context.log(f"\t{clock.line()}")
            save_if_asked(context, stop, due)
    if not training.scheduler_steps:
        training.scheduler.step()
    return progress.loss_sum / (total - progress.skipped) if total > progress.skipped else float("nan")


def train_step(context: Context, batch: Batch, due: bool = False) -> tuple[float, bool, bool]:
    """One step: forward, loss, backward, and the optimizer's step unless a number is NaN or infinite.

    In a group of processes each has its share of the batch, and the gradients are added up.

    Args:
        due: whether this process wants the state saved after the step.

    Returns:
        The loss of the whole batch; whether any process was asked to stop; whether any wants the state saved.

    Raises:
        RunError: not even one sequence fits into the GPU's memory, or too many steps in a row were skipped.
    """
    model, optimizer, progress = context.model, context.training.optimizer, context.training.progress
    loss = leave_gradients(context, batch)
    progress.iteration += 1
    gradients = list(model.gradients())
    if context.accelerator.num_processes > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
    # A sum is finite only if every term is, and takes no memory of its own.
    numbers = torch.stack([loss, *(gradient.sum().float() for gradient in gradients)])
    asks = torch.tensor([context.interrupts.received > 0, due]).float()
    told = context.accelerator.reduce(torch.stack([loss.float(), *asks.to(context.device, non_blocking=True)]))
    wrong = ~torch.isfinite(numbers).all()
    value, stop, save_now, skip = torch.cat([told, wrong[None]]).tolist()  # the one place that waits for the device
    good = not skip and math.isfinite(value)
    if good:
        if context.precision.is_scaled:
            for gradient in gradients:
                gradient.div_(progress.loss_scale)
        # The first step makes the optimizer's moments, which are larger than the trained values.
        with explain_out_of_memory("the optimizer's step", lambda: advice(context.args, model)):
            optimizer.step()
        progress.steps += 1
        context.training.average.step(progress.steps)
        progress.loss_sum += value
        progress.skipped_in_a_row = 0
    else:
        skip_step(context, value)
    if context.precision.is_scaled:  # halved at each skip, doubled after enough good steps
        progress.good_steps = (progress.good_steps + 1) % GOOD_STEPS if good else 0
        factor = 0.5 if not good else 1.0 if progress.good_steps else 2.0
        progress.loss_scale = min(max(progress.loss_scale * factor, 1.0), LARGEST_SCALE)
    model.zero_grad(set_to_none=True)  # no gradient lies in memory while the run saves or evaluates
    return value, stop > 0, save_now > 0


def leave_gradients(context: Context, batch: Batch) -> torch.Tensor:
    """Leave the gradients of this process's sequences in the model, in parts that fit into memory; return its part of the
    loss.

    Raises:
        RunError: not even one sequence fits into the GPU's memory.
    """
    scale = context.training.progress.loss_scale if context.precision.is_scaled else 1.0

    def work(size: int) -> torch.Tensor:
        return forward_backward(
            context.model, batch, context.precision, size, scale, loss_of(context.args), context.sequences_per_step
        )

    return halve_on_out_of_memory(context, context.step_limit, len(batch), work)


def forward_backward(
    model: ForecastModel,
    batch: Batch,
    precision: Precision | Accelerator,
    max_sequences: int = 0,
    scale: float = 1.0,
    loss: Loss = mean_squared,
    total: int | None = None,
) -> torch.Tensor:
    """Leave the batch's gradients in the trained tensors; return its loss, detached.

    The prototypes' keys and values are made once. The sequences run in micro-batches of at most `max_sequences`
    (0: one), whose gradients add up at the keys and values, and flow on from there once.

    Args:
        scale: multiplies the gradients (loss scaling for fp16).
        total: sequences of the whole batch, where this is one process's share; loss and gradients are then its part.
    """
    with precision.autocast():
        prototype_kv = model.prototype_kv()
    leaves = tuple(tensor.detach().requires_grad_() for tensor in prototype_kv)
    found = torch.zeros((), device=batch.x.device)
    for part in batch.split(max_sequences):
        with precision.autocast():
            forecast = model(part, leaves)
        share = loss(forecast.float(), part) * (len(part) / (total or len(batch)))
        (share * scale).backward()
        found += share.detach()
    if prototype_kv:
        torch.autograd.backward(prototype_kv, [leaf.grad for leaf in leaves])
    return found


def skip_step(context: Context, loss: float) -> None:
    """Count a step without finite numbers, and say so.

    Raises:
        RunError: too many in a row.
    """
    progress = context.training.progress
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is NaN or infinite"
    scaled = f"; the loss was scaled by {progress.loss_scale:.0f}" if context.precision.is_scaled else ""
    context.log(
        f"WARNING: epoch {progress.epoch}, iteration {progress.iteration}: {what}; the step is skipped "
        f"({progress.skipped} in this epoch, {progress.skipped_in_a_row} in a row){scaled}"
    )
    # While the loss scale comes down, the next step may be a good one.
    if progress.skipped_in_a_row <= MAX_SKIPS or (context.precision.is_scaled and progress.loss_scale > 1):
        return
    raise RunError(
        f"{progress.skipped_in_a_row} steps in a row had no finite loss or gradient; try a lower --learning_rate; "
        f"{context.training.saver.kept()}"
    )


def validate(context: Context) -> Scores:
    """Score the validation split; the errors of the best epoch so far become the run's prediction intervals.

    A model that is trained beside a linear map is scored with half of each: so epochs compare. Of the best one so far the
    shares are chosen then, and its prediction intervals take a second pass.
    """
    best, share = context.training.progress.best_vali_loss, context.model.head_share
    found = None if share is None else choose_share(context, share)
    if not context.levels or (found is not None and not found.loss < best):
        return found or score(context, "val")
    vali = score_and_calibrate(context, context.levels, lambda vali: found is not None or vali.loss < best)
    return found or vali


def choose_share(context: Context, share: torch.Tensor) -> Scores:
    """Score the validation split with half the model's own forecast and half its linear map's; of the best epoch so far, set
    `share` to what validation says.

    That is the least squared error, with a penalty that draws it towards one half (as the weights of a linear stack are
    drawn, see `fit_stack`): validation by itself would often throw one of the two away that the test set needs.
    """
    share.fill_(0.5)
    sums = torch.zeros(3, dtype=torch.float64, device=context.device)  # squared errors: of map, mean, own

    def consume(batch: Batch, forecast: torch.Tensor) -> None:
        linear = context.model.with_notes(batch, context.model.linear_forecast(batch))  # (M, H)
        errors = torch.stack([linear, forecast, 2 * forecast - linear]).double() - batch.y
        sums.add_((errors if batch.y_mask is None else errors * batch.y_mask).square().sum(dim=(1, 2)))

    found = score(context, "val", consume, bounded=False)  # at a bound a forecast is no mean of the two
    if found.loss < context.training.progress.best_vali_loss:
        linear, mean, own = context.accelerator.reduce(sums)
        # The error is a parabola of the share: these three are its values at 0, 1/2 and 1.
        apart = 2 * (linear + own) - 4 * mean  # (sum of |own - linear|^2)
        share.fill_((0.5 + (linear - own) / (2 * (apart + EVENNESS * (linear + own)))).clamp(0, 1).nan_to_num(0.5))
        context.log(f"Share of the head, beside the linear map: {share.item():.3f}")
    return found


def end_epoch(context: Context, train_loss: float, vali: Scores, test: Scores | None) -> None:
    """Print the epoch's line; keep its checkpoint if it is the best so far; save the state.

    The checkpoint comes before the state that knows of it: a run that ends between the two resumes from an earlier state
    and writes the same checkpoint once more.
    """
    progress, patience = context.training.progress, context.args.patience
    tested = f" Test Loss: {test.loss:.4f} MAE Loss: {test.mae:.4f}" if test else ""
    context.log(f"Epoch: {progress.epoch} | Train Loss: {train_loss:.4f} Vali Loss: {vali.loss:.4f}{tested}")
    context.log(memory_line(context.device))
    progress.history.append(
        {"epoch": progress.epoch, "train_loss": train_loss, "vali_loss": vali.loss,
         "test_loss": test.loss if test else None, "test_mae": test.mae if test else None}
    )  # fmt: skip
    improved = vali.loss < progress.best_vali_loss or context.args.all_rows  # without rows to choose by the last is kept
    progress.epochs_without_improvement = 0 if improved else progress.epochs_without_improvement + 1
    context.log(f"EarlyStopping counter: {progress.epochs_without_improvement} out of {patience}")
    if improved:
        context.log(f"Validation loss decreased ({progress.best_vali_loss:.6f} --> {vali.loss:.6f}). Saving model ...")
        progress.best_vali_loss = vali.loss
        with context.training.average.in_place():
            context.training.saver.save_checkpoint(progress.history[-1], context.intervals)
    progress.next_epoch()
    save(context)


def save_if_asked(context: Context, stop: bool, due: bool) -> None:
    """Save the state if it is due.

    Raises:
        Interrupted: a signal has come to this process or another of the group.
    """
    if stop:
        received = torch.tensor([context.interrupts.received], device=context.device)
        raise Interrupted(int(context.accelerator.gather(received).max()))
    if due:
        save(context)


def save(context: Context) -> None:
    """Save the state of the run as it stands between two iterations."""
    progress = context.training.progress
    progress.max_sequences = context.step_limit.sequences
    progress.evaluation_sequences = context.evaluation_limit.sequences
    context.training.saver.save(progress)


class Clock:
    """Speed of the steps since the last line, and the time that the whole run still takes."""

    def __init__(self, context: Context):
        self.context = context
        evaluated = not context.args.all_rows
        self.windows = {split: evaluated * len(context.windows.windows(split)) for split in ("val", "test")}
        self.evaluation: float | None = None  # seconds a window, once an evaluation has been timed
        self.restart()

    def restart(self) -> None:
        self.since, self.steps = time.perf_counter(), 0

    def line(self) -> str:
        speed = (time.perf_counter() - self.since) / self.steps
        self.restart()
        return f"speed: {speed:.4f}s/iter; left time: {self.left(speed):.4f}s"

    def left(self, speed: float) -> float:
        """Seconds that the whole run still takes at `speed` seconds an iteration, evaluations included."""
        args, progress = self.context.args, self.context.training.progress
        epochs = range(progress.epoch, args.train_epochs + 1)
        steps = len(epochs) * self.context.steps_per_epoch - progress.iteration
        tests = sum(1 for epoch in epochs if args.test_every and epoch % args.test_every == 0)
        tests += args.test_every != 1  # the best epoch is tested at the end, unless all were
        windows = len(epochs) * self.windows["val"] + tests * self.windows["test"]
        in_a_step = self.context.sequences_per_step / len(self.context.windows.forecast_columns)
        each = EVALUATION_SHARE * speed / in_a_step if self.evaluation is None else self.evaluation
        return steps * speed + windows * each
