"""A run: set up, then fitted, tested, and asked to predict."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from data_provider.splits import M4
from layers.errors import RunError
from utils.flags import run_name
from utils.forecaster import Forecaster
from utils.results.bands import KEPT, Calibration, mean_intervals, name_of
from utils.results.forecast import leave_forecast, mean_forecast
from utils.results.metrics import line_of
from utils.results.test_pass import open_pass, score_mean
from utils.saving.checkpoint import Checkpoint, add_intervals, write_torch
from utils.saving.files import LEGACY
from utils.saving.interrupt import Interrupted, Interrupts
from utils.saving.state import resume_command
from utils.setup import load_checkpoint, setup
from utils.training.evaluate import Scores, score
from utils.training.memory import free_memory
from utils.training.session import Job
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
        job = setup(args, repeat, interrupts or Interrupts())
        try:
            run(job, repeat, forecasts)
        except RunError as error:
            job.log.note(f"error: {error}")  # the entry prints it, but the terminal may be gone
            raise
        job.close()
        device = job.device
        del job
        free_memory(device)  # the next repeat loads its model into the memory of this one's
    return 0


def run(job: Job, repeat: int, forecasts: list[pd.DataFrame]) -> None:
    """One repeat, which adds its forecast to those of the repeats before; after the last one comes their mean."""
    args = job.args
    found = fit(job) if args.is_training else None
    if args.is_training or not args.do_predict:
        test(job, found)
    if args.do_predict:
        forecasts.append(predict(job))
    # With --checkpoint all repeats are of one; a test on other data than the training's lies in another folder.
    own = job.folder == Path(args.checkpoints) / run_name(args, repeat) and not args.checkpoint
    if not own or args.itr == 1 or repeat < args.itr - 1 or args.data == M4:
        return
    repeats = [Path(args.checkpoints) / run_name(args, number) for number in range(args.itr)]
    folder = Path(args.checkpoints) / run_name(args, "mean")
    if args.is_training or not args.do_predict:
        means = score_mean(job, repeats, folder)
        if means:
            draw(job, *means)
    if args.do_predict:
        mean = mean_forecast(forecasts, job.series, args.seq_len, mean_intervals(job, repeats))
        job.log(f"Mean of {len(repeats)} repeats:")
        leave_forecast(replace(job, folder=folder), mean)


def fit(job: Job) -> TestFound | None:
    """Train, unless the run is finished already; the best weights lie in the run's folder then.

    Returns:
        What the best epoch's test pass has found, where there was one.

    Raises:
        Interrupted, RunError: see `train`.
    """
    args, progress = job.args, job.training.progress
    found = None if progress.finished(args.train_epochs, args.patience) else train(job)
    if args.plots and job.accelerator.is_main_process:
        from utils.results.plots import draw_losses  # only now: matplotlib takes a second to load

        losses = {"loss": args.loss} if args.data == M4 else {}
        draw_losses(job.folder, progress.history, **losses)
    job.log(f"Checkpoints saved at: {job.folder}")
    job.accelerator.wait_for_everyone()
    load_checkpoint(job)
    if args.torch_checkpoint and job.accelerator.is_main_process:
        with job.training.saver.explained():
            write_torch(job.folder / LEGACY, {name: tensor.cpu() for name, tensor in job.model.state_dict().items()})
    return found


def test(job: Job, found: TestFound | None = None) -> Scores:
    """Score the checkpoint on the test split; print the figures and keep them, with pictures.

    Args:
        found: what the best epoch's test pass has found already; it is not computed again.

    Raises:
        Interrupted: a signal has come; nothing is lost.
    """
    checkpoint = load_checkpoint(job)
    if found is not None:
        results, scores = found
    else:
        checkpoint = calibrate(job, checkpoint)
        results = open_pass(job)
        try:
            scores = score(job, "test", results.consume)
        except Interrupted as signal:
            job.log(f"{signal}: the test has not ended; {checkpoint.file} is unharmed")
            job.log(f"To resume: {resume_command(job.args)}")
            raise
    job.log(results.headline(scores))
    figures = {"mse": scores.mse, "mae": scores.mae}
    note = job.record["backbone"].get("note")
    model = {"model": job.args.model} | ({"language_model": note} if note else {})
    if "pretrain" in checkpoint.record or not checkpoint.trained_on(job.series, job.args.fill_missing):
        model |= {"trained_on": checkpoint.trained_data} if checkpoint.trained_data else {}
    metrics = results.finish({"test": figures, "checkpoint": str(checkpoint.file), "data": job.record["data"]} | model)
    if "intervals" in metrics:
        job.log(line_of(metrics["intervals"]))
    draw(job, results, metrics)
    return scores


def draw(job: Job, results: Any, metrics: dict[str, Any]) -> None:
    """The pictures of a test, unless `--plots 0`."""
    if job.args.plots and job.accelerator.is_main_process:
        from utils.results.plots import draw_test  # only now: matplotlib takes a second to load

        draw_test(results, metrics)


def calibrate(job: Job, checkpoint: Checkpoint) -> Checkpoint:
    """Give the job its prediction intervals, unless it has them: one pass over the validation windows.

    A checkpoint of these data keeps them. Returns it as it is then.

    Raises:
        Interrupted: a signal has come; nothing is lost.
    """
    kept = job.args.itr == 1 or not job.args.is_training or (job.folder / KEPT).is_file()  # for the repeats' mean
    if not job.levels or (job.intervals is not None and job.intervals.has(job.levels) and kept):
        return checkpoint
    held = checkpoint.intervals if checkpoint.belongs_to(job.series, job.args.fill_missing) else None
    levels = tuple(sorted({*job.levels, *(held.levels if held else ())}))  # what it had is not taken from it
    with Calibration(job, levels) as calibration:
        score(job, "val", calibration.consume)
        calibration.end()
    found = job.intervals
    if found is None:
        return checkpoint
    job.intervals = found.only(job.levels)
    named = " and ".join(f"{name_of(level)} %" for level in job.levels)
    job.log(f"Prediction intervals of {named} calibrated on {found.windows} validation windows")
    if not checkpoint.belongs_to(job.series, job.args.fill_missing):
        return checkpoint
    if job.accelerator.is_main_process:
        now = Checkpoint.open(checkpoint.file)  # a training may have written it anew meanwhile
        if now != checkpoint:
            job.log(f"They are not kept: {checkpoint.file} is no longer the one that was tested")
        else:
            checkpoint = add_intervals(checkpoint, found)
            job.log(f"They are kept in {checkpoint.file}, which has {' '.join(map(name_of, found.levels))} now")
    job.accelerator.wait_for_everyone()
    return checkpoint


def predict(job: Job) -> pd.DataFrame:
    """Forecast what follows the last row of the data, and write it.

    Raises:
        InputError: `--append`, and the history cannot take the forecast.
    """
    load_checkpoint(job)
    for note in job.notes:
        job.log(note)
    (forecast,) = Forecaster(job).forecast([job.series], job.args.predict_steps, job.intervals)
    leave_forecast(job, forecast)
    return forecast
