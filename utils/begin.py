"""The beginning of a training: optimizer, guard, journal and saver, and the state or the values that it begins with."""

import time

import torch

from layers.errors import input_error
from layers.ranks import from_first
from utils.results.baselines import doubts, fit_ridge
from utils.results.journal import Journal, tensorboard_writer
from utils.saving.asks import Asks
from utils.saving.folder import Start
from utils.saving.record import TENSORS
from utils.saving.saver import Saver
from utils.saving.state import Progress, SavedState, part_random, restore
from utils.training.memory import advice, explain_out_of_memory
from utils.training.optimizer import build_optimizer
from utils.training.session import Job, Training


def begin(job: Job, start: Start) -> Training:
    """What a job needs to train, brought to where it begins: the state found in its folder, or the first iteration.

    Raises:
        InputError: it is finished, but its checkpoint is gone.
        RunError: no memory for the state.
    """
    args, model, log, accelerator = job.args, job.model, job.log, job.accelerator
    optimizer = build_optimizer(args.optimizer, model, args.learning_rate)
    journal = None
    if accelerator.is_main_process:
        events = tensorboard_writer(job.folder, log) if args.tensorboard else None
        journal = Journal(job.folder, job.steps_per_epoch, events)
    for line in start.lines:
        log(line)
    last = start.state.path if start.state else None
    asks = Asks(job.interrupts)
    saver = Saver(job.folder, args, model, optimizer, accelerator, asks, start.identity, job.record, last)
    progress = Progress()
    if start.state is not None:
        with explain_out_of_memory("restoring the state", lambda: advice(args, model)):
            progress = restore(start.state, model, optimizer, job.device)
        saver.mark_saved(progress)
        if args.max_sequences is None:  # else what is free today would decide
            job.step_limit.sequences = progress.max_sequences
            job.evaluation_limit.sequences = progress.evaluation_sequences
        _resume(job, start.state, progress)
    else:
        if model.linear_map is not None:
            _fit_linear_map(job, model.linear_map)
        from_first([*model.parameters(), *model.buffers()])
        part_random(job.loaders["train"].batch_sampler.seed)  # type: ignore[union-attr]
    return Training(optimizer, saver, progress, journal, start.lock)


def _fit_linear_map(job: Job, linear_map: torch.Tensor) -> None:
    """Ridge regression into the model's map `[T, H]`."""
    began = time.perf_counter()
    (train, _), (_, val) = job.trained_series.windows_for_a_map(), job.windows.windows_for_a_map()
    weights, penalty = fit_ridge(train, val)
    with torch.no_grad():
        linear_map.copy_(torch.from_numpy(weights))
    job.log(f"Linear map in closed form: relative penalty {penalty:.2g}, {time.perf_counter() - began:.1f} s")
    if against := doubts(weights, penalty, val):
        without = ", --skip none does without it" if job.model.uses_llm else ""
        job.log(f"WARNING: the linear map is a poor one: {against}; {len(train)} training windows made it{without}")


def _resume(job: Job, state: SavedState, progress: Progress) -> None:
    """Say where the run stands, and see to a checkpoint that the state knows of and that is gone."""
    args, log = job.args, job.log
    finished = progress.finished(args.train_epochs, args.patience)
    lost = progress.best_vali_loss < float("inf") and not (job.folder / TENSORS).is_file()
    if finished and lost:
        raise input_error(f"--resume: {job.folder}", f"a finished run without {TENSORS}", "that file; bring it back")
    if finished:
        log(f"This run is finished ({len(progress.history)} epochs); only the test is left")
        return
    if lost:
        log(f"WARNING: found no {TENSORS}; that of the next epoch is kept, whatever its validation loss")
        progress.best_vali_loss = float("inf")
    log(f"Resuming from {state.path.name}: {state.where()}")
