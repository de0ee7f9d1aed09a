"""A run: set up, then fitted, tested, and asked to predict."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from data_provider.splits import M4
from layers.errors import RunError, listed
from utils.flags import run_name
from utils.forecaster import Forecaster
from utils.results.bands import KEPT, Intervals, has_errors, name_of
from utils.results.forecast import leave_forecast, mean_forecast
from utils.results.metrics import lines_of
from utils.results.notes import control, verdict
from utils.results.test_pass import TestPass, open_pass, score_mean
from utils.saving.checkpoint import Checkpoint, add_intervals, write_torch
from utils.saving.files import LEGACY
from utils.saving.interrupt import Interrupted, Interrupts
from utils.saving.state import resume_command
from utils.setup import load_checkpoint, setup
from utils.training.context import Context
from utils.training.evaluate import Scores, all_intervals, score, score_and_calibrate
from utils.training.memory import free_memory
from utils.training.train import TestFound, train


def main(args: Namespace, interrupts: Interrupts | None = None) -> int:
    """Run the flags, `--itr` times over; return the exit code.

    Raises:
        InputError: something that the user can mend; raised before any weight is loaded.
        RunError: the disk, the numbers or the memory do not let the run go on.
        Interrupted: a signal has come, and what has to be saved is saved.
    """
    forecasts: list[pd.DataFrame] = []  # of the repeats
    for repeat in range(args.itr):
        context = setup(args, repeat, interrupts or Interrupts())
        try:
            run(context, repeat, forecasts)
        except (RunError, OSError) as error:
            context.log.note(f"error: {error}")  # the entry prints it, but the terminal may be gone
            raise
        context.close()
        device, again = context.device, settings_of_a_refit(context) if args.refit else None
        intervals, share = context.intervals, context.model.head_share
        del context
        free_memory(device)  # the next repeat loads its model into the memory of this one's
        if again is not None:
            refit(again, repeat, interrupts or Interrupts(), intervals, share)
    return 0


def settings_of_a_refit(context: Context) -> Namespace:
    # All rows train, for as many steps as the best epoch had.
    best = load_checkpoint(context).record["epoch"]
    steps = {"train_epochs": best, "patience": best, "max_iters": context.steps_per_epoch, "test_every": 0, "intervals": ()}
    return Namespace(**vars(context.args) | steps | {"all_rows": True})


def refit(
    args: Namespace, repeat: int, interrupts: Interrupts, intervals: Intervals | None, share: torch.Tensor | None
) -> None:
    """Train on all rows, in the folder refit of the run's, and forecast with that model; its forecasts lie there, too.

    Args:
        intervals, share: bands and `head_share` of the model before: no row is left to calibrate or choose on.

    Raises:
        InputError, RunError, Interrupted: see `main`.
    """
    context = setup(args, repeat, interrupts)
    context.log(f"Refit on all rows for {args.train_epochs} x {context.steps_per_epoch} steps: Vali Loss is the training's")
    if share is not None:
        context.model.head_share.copy_(share)  # type: ignore[union-attr]  # the same model has one
    fit(context)
    if intervals is not None:
        context.intervals = intervals
        if context.accelerator.is_main_process:
            add_intervals(load_checkpoint(context), intervals)
    predict(context)
    context.close()


def run(context: Context, repeat: int, forecasts: list[pd.DataFrame]) -> None:
    """One repeat, which adds its forecast to those of the repeats before; after the last one comes their mean."""
    args = context.args
    found = fit(context) if args.is_training else None
    if args.is_training or not args.do_predict:
        test(context, found)
    if args.do_predict and not args.refit:
        forecasts.append(predict(context))
    # With --checkpoint all repeats are of one; a test on other data than the training's lies in another folder.
    own = context.folder == Path(args.checkpoints) / run_name(args, repeat) and not args.checkpoint
    if not own or args.itr == 1 or repeat < args.itr - 1 or args.data == M4:
        return
    repeats = [Path(args.checkpoints) / run_name(args, number) for number in range(args.itr)]
    folder = Path(args.checkpoints) / run_name(args, "mean")
    if args.is_training or not args.do_predict:
        means = score_mean(context, repeats, folder)
        if means:
            draw(context, *means)
    if args.do_predict:
        mean = mean_forecast(forecasts, context.series, args.seq_len, all_intervals(context, repeats, context.levels))
        context.log(f"Mean of {len(repeats)} repeats:")
        leave_forecast(replace(context, folder=folder), mean)


def fit(context: Context) -> TestFound | None:
    """Train, unless the run is finished already; the best weights lie in the run's folder then.

    Returns:
        What the best epoch's test pass has found, where there was one.

    Raises:
        Interrupted, RunError: see `train`.
    """
    args, progress = context.args, context.training.progress
    found = None if progress.finished(args.train_epochs, args.patience) else train(context)
    if args.plots and context.accelerator.is_main_process:
        from utils.results.plots import draw_losses  # only now: matplotlib takes a second to load

        losses = {"loss": args.loss} if args.data == M4 or args.loss != "MSE" else {}
        draw_losses(context.folder, progress.history, **losses)
    context.log(f"Checkpoints saved at: {context.folder}")
    context.accelerator.wait_for_everyone()
    load_checkpoint(context)
    if args.torch_checkpoint and context.accelerator.is_main_process:
        with context.training.saver.explained():
            write_torch(context.folder / LEGACY, {name: tensor.cpu() for name, tensor in context.model.state_dict().items()})
    return found


def test(context: Context, found: TestFound | None = None) -> Scores:
    """Score the checkpoint on the test split; print the figures and keep them, with pictures.

    Args:
        found: what the best epoch's test pass has found already; it is not computed again.

    Raises:
        Interrupted: a signal has come; nothing is lost.
    """
    checkpoint = load_checkpoint(context)
    if found is not None:
        results, scores = found
    else:
        calibrate(context, checkpoint)
        results = open_pass(context)
        try:
            scores = score(context, "test", results.consume)
        except Interrupted as signal:
            context.log(f"{signal}: the test has not ended; {checkpoint.file} is unharmed")
            context.log(f"To resume: {resume_command(context.args)}")
            raise
    checkpoint = keep_intervals(context, checkpoint)
    context.log(results.headline(scores))
    figures = {"mse": scores.mse, "mae": scores.mae}
    note = context.record["backbone"].get("note")
    model: dict[str, Any] = {"model": context.args.model} | ({"language_model": note} if note else {})
    if "pretrain" in checkpoint.record or not checkpoint.trained_on(context.series, context.args):
        model |= {"trained_on": checkpoint.trained_data} if checkpoint.trained_data else {}
    if isinstance(results, TestPass) and results.by_row is not None:
        model["control"] = control(context, results.by_row, context.args.pred_len)
        context.log(verdict(model["control"]))
    metrics = results.finish({"test": figures, "checkpoint": str(checkpoint.file), "data": context.record["data"]} | model)
    if "intervals" in metrics:
        context.log(*lines_of(metrics["intervals"]))
    draw(context, results, metrics)
    return scores


def draw(context: Context, results: Any, metrics: dict[str, Any]) -> None:
    """The pictures of a test, unless `--plots 0`."""
    if context.args.plots and context.accelerator.is_main_process:
        from utils.results.plots import draw_test  # only now: matplotlib takes a second to load

        draw_test(results, metrics)


def calibrate(context: Context, checkpoint: Checkpoint) -> None:
    """Give the run its prediction intervals, unless it has them: one pass over the validation windows.

    Raises:
        Interrupted: a signal has come; nothing is lost.
    """
    held = context.intervals
    whole = held is not None and held.newest is not None and context.args.itr == 1  # the repeats' mean needs their errors
    if not context.levels or (held is not None and (whole or has_errors(context.folder, context.series))):
        return
    score_and_calibrate(context, _levels_to_keep(context, checkpoint))
    if context.intervals is not None:
        found, context.intervals = context.intervals, context.intervals.only(context.levels)
        named = " and ".join(f"{name_of(level)} %" for level in context.levels)
        context.log(f"Prediction intervals of {named} calibrated on {found.windows} validation windows")


# The run's levels and those that the checkpoint of these data has: what it had is not taken from it.
def _levels_to_keep(context: Context, checkpoint: Checkpoint) -> tuple[float, ...]:
    before = checkpoint.intervals if checkpoint.belongs_to(context.series, context.args) else None
    return tuple(sorted({*context.levels, *(before.levels if before else ())}))


def keep_intervals(context: Context, checkpoint: Checkpoint) -> Checkpoint:
    """After a test, add those that were calibrated on its windows, too, for forecasts of the future; a checkpoint of these
    data keeps both. Returns it as it is then."""
    context.accelerator.wait_for_everyone()  # all have written their errors
    found = all_intervals(context, [context.folder], _levels_to_keep(context, checkpoint))
    if found is None:
        return checkpoint
    context.intervals = found.only(context.levels)
    still = [name for n, name in enumerate(context.series.forecast_columns) if (found.offsets[-2:, n] != 0).any()]
    if still:
        context.log(
            f"WARNING: {listed(still)} hardly ever changed: bands there reach to the mean error instead of having no width"
        )
    context.accelerator.wait_for_everyone()  # all have read them
    if context.accelerator.is_main_process:
        if checkpoint.belongs_to(context.series, context.args):
            if Checkpoint.open(checkpoint.file) != checkpoint:  # a training has written it anew meanwhile
                context.log(f"They are not kept: {checkpoint.file} is no longer the one that was tested")
            else:
                context.checkpoint = checkpoint = add_intervals(checkpoint, found)
        if context.args.itr == 1:
            (context.folder / KEPT).unlink()
    context.accelerator.wait_for_everyone()
    return checkpoint


def predict(context: Context) -> pd.DataFrame:
    """Forecast what follows the last row of the data, and write it.

    Raises:
        InputError: `--append`, and the history cannot take the forecast.
    """
    load_checkpoint(context)
    if not context.loaders:
        context.log(*context.remarks)
    (forecast,) = Forecaster(context).forecast([context.series], context.args.predict_steps, context.intervals)
    leave_forecast(context, forecast)
    return forecast
