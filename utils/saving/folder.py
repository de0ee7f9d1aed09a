"""A run's folder: locked while a run trains in it, never overwritten; and the state that a run resumes from there."""

import errno
import itertools
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data_provider.data_loader import Series
from layers.errors import input_error
from utils.flags import DEFAULTS
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import LEGACY, PARTIAL, TENSORS, read_record, size_text, writing
from utils.saving.state import SECONDS, compare, find_state, read_state, state_files

try:
    import fcntl
except ImportError:  # Windows without WSL: nothing there keeps two runs apart
    fcntl = None  # type: ignore[assignment]

MARGIN = 2**24  # bytes for logs and figures
SOURCE = "source.txt"  # in a folder of results on another file: that file


def lock_folder(folder: Path) -> tuple[int, list[str]]:
    """Make the folder if need be, lock it, and remove what killed runs left unfinished: it is this process's until it ends,
    however it ends, or until the handle is closed.

    A record lock dies with its process and, unlike flock, does not live on in the loader's workers.

    Returns:
        The handle; a line where the file system has no locks.

    Raises:
        InputError: it cannot be made or written, or another run is in it.
    """
    warnings = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise input_error(
            f"--checkpoints {folder}", f"no writing ({error.strerror})", "a folder that can be written"
        ) from error
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise input_error(
                f"--checkpoints {folder}", "another run that trains in it", "none", "wait for it or end it"
            ) from error
        warnings = [f"WARNING: {folder} cannot be locked ({error.strerror}): start no second run in it"]
    with suppress(OSError):  # a file too many does no harm
        for unfinished in (*folder.glob(f".*{PARTIAL}"), *folder.glob(f"plots/.*{PARTIAL}")):
            unfinished.unlink(missing_ok=True)
    return handle, warnings


def move_aside(folder: Path, release: Callable[[], None] = lambda: None) -> Path:
    """Give the folder, or a file, the next free number; nothing of it is lost.

    Args:
        release: lets go of the file that the caller has open in it.

    Raises:
        StorageError: the file system refused.
    """
    name, ending = (folder.stem, folder.suffix) if folder.is_file() else (folder.name, "")  # a file keeps its ending
    numbered = (folder.with_name(f"{name}.{number}{ending}") for number in itertools.count(1))
    aside = next(path for path in numbered if not os.path.lexists(path))
    try:
        folder.rename(aside)
    except OSError:  # a Windows drive renames no folder in which a file is open, such as the lock's
        release()
        with writing(aside):
            folder.rename(aside)
    return aside


def open_folder(
    args: Namespace, folder: Path, identity: dict[str, Any], trained_values: int, accelerator: Accelerator
) -> tuple[int | None, dict[str, Any] | None, list[str]]:
    """Lock the run's folder; find the state to resume from, or move aside what is there.

    Args:
        identity: what the run is, see `utils.saving.state.identity`.

    Returns:
        The lock's handle, None in the processes beside the first; what `read_state` found to resume from, None where the run
        starts anew; lines for the log.

    Raises:
        InputError: the folder cannot be used, is in use or is too small, or its state is another run's.
    """
    lock: int | None = None
    state: dict[str, Any] | None = None
    lines: list[str] = []
    if accelerator.is_main_process:
        lock, warnings = lock_folder(folder)
        if args.resume:
            state, lines = find_state(folder)
        if state is not None:
            compare(state, identity)
        elif any(folder.glob("state.*")) or (folder / TENSORS).is_file() or (folder / LEGACY).is_file():
            if lines:
                lines.append("WARNING: no sound state is left: starting anew")
            lines.append(f"The folder held an earlier run, now in: {move_aside(folder, partial(os.close, lock))}")
            lock, _ = lock_folder(folder)  # the first one stays with what was moved, whoever still waits for it
        lines += [*warnings, _check_room(args, folder, trained_values)]
    if accelerator.num_processes > 1:
        (name,) = broadcast_object_list([state["path"].name if state else None])
        if name and lock is None:
            if not (folder / name).is_file():
                raise input_error(
                    f"--checkpoints {folder.parent}",
                    "a folder without the first process's files",
                    "one that all machines share, under the same name",
                )
            state = read_state(folder / name)
    return lock, state, lines


# The line that says when states are saved; InputError where two of them and the checkpoints do not fit.
def _check_room(args: Namespace, folder: Path, trained_values: int) -> str:
    # Each value, two moments of it, and its average.
    state = trained_values * ((6 if args.optimizer == "adamw8bit" else 12) + 4 * bool(args.ema)) + 2**18
    held = [path for path in (*state_files(folder)[:1], folder / TENSORS) if path.is_file()]
    size = 2 * state + 4 * trained_values * (2 + args.torch_checkpoint) + MARGIN - sum(path.stat().st_size for path in held)
    if (free := shutil.disk_usage(folder).free) < size:
        raise input_error(
            f"--checkpoints {folder.parent}",
            f"{size_text(free)} free",
            f"{size_text(size)} for two states and the checkpoints",
            f"free {size_text(size - free)} there, or name a folder on another disk",
        )
    every = {None: f"about every {SECONDS // 60} minutes", 0: "at the end of each epoch"}
    when = every.get(args.save_steps, f"every {args.save_steps} iterations")
    return f"A state of {size_text(state)} is saved {when}, the last two are kept"


def results_folder(
    args: Namespace, run_folder: Path, checkpoint: Checkpoint, data: Series | None, accelerator: Accelerator
) -> Path:
    """Where the results of a checkpoint go: the run's folder, or `on_<file>` in it where that run was trained on
    another file (a zero-shot test leaves the results of the training's own test alone).

    A command line that names its checkpoint and no experiment of its own means the checkpoint's folder. Of several files of
    one name each has its folder, `on_<file>`, `on_<file>.2` and so on, which is made here.

    Args:
        run_folder: the folder that the flags name.
        data: None where they count as the training's.

    Raises:
        StorageError: `on_<file>` cannot be made.
    """
    home = checkpoint.file.parent
    usual = (Path(DEFAULTS["checkpoints"]).resolve(), home.parent.resolve())
    own_words = ("model_id", "model_comment", "des")  # the user's own in a run's name
    same_experiment = all(checkpoint.flags.get(name) == getattr(args, name) for name in own_words)
    if args.checkpoint and same_experiment and Path(args.checkpoints).resolve() in usual:
        run_folder = home
    if run_folder.resolve() != home.resolve():  # what was trained there counts
        checkpoint = Checkpoint(run_folder / TENSORS, read_record(run_folder), None)
    if data is None or not checkpoint.record.get("data") or checkpoint.trained_on(data, args):
        return run_folder
    name, source = f"on_{Path(data.path.name.removesuffix('.gz')).stem}", str(data.path.resolve())
    folders = map(run_folder.joinpath, itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2))))
    if accelerator.is_main_process:
        run_folder = next(folder for folder in folders if _is_of(folder, source))
    return broadcast_object_list([run_folder])[0] if accelerator.num_processes > 1 else run_folder


# Whether a folder holds the results on the file `source`; it is made where there is none.
def _is_of(folder: Path, source: str) -> bool:
    with writing(folder), suppress(FileExistsError):
        folder.mkdir(parents=True)  # of two programs at once one succeeds, and the other goes on to the next number
        (folder / SOURCE).write_text(source, encoding="utf-8")
    return (folder / SOURCE).is_file() and (folder / SOURCE).read_text(encoding="utf-8") == source
