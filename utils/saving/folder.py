"""A run's folder: locked while a run trains in it, never overwritten; and the state that a run resumes from there."""

import errno
import itertools
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data_provider.data_loader import Series
from layers.errors import input_error
from utils.flags import DEFAULTS, same_experiment
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import LEGACY, PARTIAL, TENSORS, free_bytes, read_record, size_text, writing
from utils.saving.state import SECONDS, compare, find_state, read_state, state_bytes, state_files

try:
    import fcntl
except ImportError:  # Windows without WSL: nothing there keeps two runs apart
    fcntl = None  # type: ignore[assignment]

MARGIN = 2**24  # bytes for logs and figures
SOURCE = "source.txt"  # in a folder of results on another file: that file


class FolderLock:
    """The folder is this process's until it ends, however it ends.

    A record lock dies with its process and, unlike flock, does not live on in the loader's workers.

    Attributes:
        warning: a line where the file system has no locks; else empty.
    """

    def __init__(self, folder: Path):
        """Make the folder if need be, lock it, and remove what killed runs left unfinished.

        Raises:
            InputError: it cannot be made or written, or another run is in it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            got, expected = f"no writing ({error.strerror})", "a folder that can be written"
            raise input_error(f"--checkpoints {folder}", got, expected) from error
        self.warning = ""
        try:
            if fcntl is not None:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                got = "another run that trains in it"
                raise input_error(f"--checkpoints {folder}", got, "none", "wait for it or end it") from error
            self.warning = f"WARNING: {folder} cannot be locked ({error.strerror}): start no second run in it"
        with suppress(OSError):  # a file too many does no harm
            for partial in folder.glob(f".*{PARTIAL}"):
                partial.unlink(missing_ok=True)

    def release(self) -> None:
        os.close(self._handle)


def move_aside(folder: Path, release: Callable[[], None] = lambda: None) -> Path:
    """Give the folder the next free number; nothing of it is lost.

    Args:
        release: lets go of the file that the caller has open in it.

    Raises:
        StorageError: the file system refused.
    """
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    try:
        folder.rename(aside)
    except OSError:  # a Windows drive renames no folder in which a file is open, such as the lock's
        release()
        with writing(aside):
            folder.rename(aside)
    return aside


@dataclass
class Start:
    """Where a training run begins.

    Attributes:
        identity: what the run is, see `utils.saving.state.identity`.
        lock: None in the processes beside the first.
        state: what `read_state` found to resume from; None: the run starts anew.
        lines: for the log.
    """

    identity: dict[str, Any]
    lock: FolderLock | None = None
    state: dict[str, Any] | None = None
    lines: list[str] = field(default_factory=list)


def open_folder(
    args: Namespace, folder: Path, identity: dict[str, Any], trained_values: int, accelerator: Accelerator
) -> Start:
    """Lock the run's folder; find the state to resume from, or move aside what is there.

    Raises:
        InputError: the folder cannot be used, is in use or is too small, or its state is another run's.
    """
    start = Start(identity)
    if accelerator.is_main_process:
        start.lock = FolderLock(folder)
        if args.resume:
            start.state, start.lines = find_state(folder)
        if start.state is not None:
            compare(start.state, identity)
        elif any(folder.glob("state.*")) or (folder / TENSORS).is_file() or (folder / LEGACY).is_file():
            if start.lines:
                start.lines.append("WARNING: no sound state is left: starting anew")
            start.lines.append(f"The folder held an earlier run, now in: {move_aside(folder, start.lock.release)}")
            start.lock = FolderLock(folder)  # the first one stays with what was moved, whoever still waits for it
        start.lines += [start.lock.warning] if start.lock.warning else []
        start.lines.append(_check_room(args, folder, trained_values))
    if accelerator.num_processes > 1:
        (name,) = broadcast_object_list([start.state["path"].name if start.state else None])
        if name and start.lock is None:
            if not (folder / name).is_file():
                hint = "one that all machines share, under the same name"
                raise input_error(f"--checkpoints {folder.parent}", "a folder without the first process's files", hint)
            start.state = read_state(folder / name)
    return start


# The line that says when states are saved; InputError where two of them and the checkpoints do not fit.
def _check_room(args: Namespace, folder: Path, trained_values: int) -> str:
    state, checkpoint = state_bytes(args.optimizer, trained_values), 4 * trained_values
    copies = 2 + args.torch_checkpoint
    held = [path for path in (*state_files(folder)[:1], folder / TENSORS) if path.is_file()]
    size = 2 * state + copies * checkpoint + MARGIN - sum(path.stat().st_size for path in held)
    free = free_bytes(folder)
    if free < size:
        many = {2: "two", 3: "three"}[copies]
        need = f"two states of {size_text(state)} and {many} checkpoints of {size_text(checkpoint)}"
        hint = f"free {size_text(size - free)} there, or name a folder on another disk"
        raise input_error(f"--checkpoints {folder.parent}", f"{size_text(free)} free", f"{size_text(size)} for {need}", hint)
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
    if args.checkpoint and same_experiment(args, checkpoint.flags) and Path(args.checkpoints).resolve() in usual:
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
