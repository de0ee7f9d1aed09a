"""What a training run finds in its folder, and where it therefore begins."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from layers.errors import InputError
from utils.checkpoint import LEGACY, TENSORS
from utils.claim import Claim, check_space, move_aside
from utils.files import size_text
from utils.saver import SECONDS, Saver
from utils.state import SavedState, compare, find_state, restore, state_bytes, state_files


@dataclass
class Start:
    """Where a run begins."""

    identity: dict  # see utils.state.identity
    claim: Claim | None = None  # None in the processes beside the first
    state: SavedState | None = None  # to go on from
    lines: list[str] = field(default_factory=list)  # for the log


def open_folder(
    args: Namespace, folder: Path, identity: dict, trained_values: int, accelerator: Accelerator
) -> Start:
    """Claim the run's folder; find the state to go on from, or move aside what is there.

    Raises:
        InputError: the folder cannot be used, is in use or is too small, or its state is another run's.
    """
    start = Start(identity)
    if accelerator.is_main_process:
        start.claim = Claim(folder)
        if args.resume:
            start.state, start.lines = find_state(folder)
        if start.state is not None:
            compare(start.state, identity)
        elif _holds_work(folder):
            if start.lines:
                start.lines.append("WARNING: no sound state is left: starting anew")
            start.lines.append(f"The folder held an earlier run, now in: {move_aside(folder)}")
            start.claim.release()
            start.claim = Claim(folder)
        if start.claim.warning:
            start.lines.append(start.claim.warning)
        start.lines.append(_check_space(args, folder, trained_values))
    accelerator.wait_for_everyone()
    if args.resume and not accelerator.is_main_process:
        start.state, _ = find_state(folder)
    return start


def _holds_work(folder: Path) -> bool:
    return bool(state_files(folder)) or any((folder / name).is_file() for name in (TENSORS, LEGACY))


def _check_space(args: Namespace, folder: Path, trained_values: int) -> str:
    """Make sure of the room for a state beside the last one, and a checkpoint beside the last one."""
    state, checkpoint = state_bytes(args.optimizer, trained_values), 4 * trained_values
    held = [path for path in (*state_files(folder)[:1], folder / TENSORS) if path.is_file()]
    need = 2 * (state + checkpoint) - sum(path.stat().st_size for path in held)
    what = f"two states of {size_text(state)} and two checkpoints of {size_text(checkpoint)}"
    check_space(folder, need, what)
    every = {None: f"about every {SECONDS // 60} minutes", 0: "at the end of each epoch"}
    when = every.get(args.save_steps, f"every {args.save_steps} iterations")
    return f"A state of {size_text(state)} is saved {when}, the last two are kept"


def begin(run, start: Start) -> bool:
    """Bring a run that is set up to where it begins; False: it is finished already.

    Raises:
        InputError: it is finished, but its checkpoint is gone.
    """
    for line in start.lines:
        run.log(line)
    run.saver = Saver(run, start.identity, run.interrupts, start.state.path if start.state else None)
    if start.state is None:
        return True
    run.progress = restore(start.state, run.model, run.optimizer, run.accelerator.device)
    run.saver.mark_saved()
    if run.args.max_sequences is None:  # else what is free today would decide
        run.max_sequences = run.progress.max_sequences
    finished = run.progress.finished(run.args.train_epochs, run.args.patience)
    lost = run.progress.best < float("inf") and not (run.folder / TENSORS).is_file()
    if finished:
        if lost:
            raise InputError(f"--resume: the run in {run.folder} is finished, but has no {TENSORS}; bring it back")
        run.log(f"This run is finished ({len(run.progress.history)} epochs); only the test is left")
        return False
    if lost:
        run.log(f"WARNING: found no {TENSORS}; that of the next epoch is kept, whatever its validation loss")
        run.progress.best = float("inf")
    run.log(f"Going on from {start.state.path.name}: {start.state.where()}")
    return True
