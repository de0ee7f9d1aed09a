"""A run's folder: locked for one process, free of links, never overwritten; and where a training run begins in it."""

import errno
import os
import secrets
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from accelerate import Accelerator

from data_provider.data_loader import Series
from layers.errors import InputError, input_error
from layers.ranks import from_all
from utils.flags import DEFAULTS, same_experiment
from utils.saving.asks import SECONDS
from utils.saving.checkpoint import LEGACY, Checkpoint, trained_on
from utils.saving.files import FULL, PARTIAL, free_bytes, remove_partials, size_text
from utils.saving.record import TENSORS, read_record
from utils.saving.state import SavedState, compare, find_state, read_state, state_bytes, state_files

try:
    import fcntl
except ImportError:  # Windows without WSL: nothing there keeps two runs apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
MARGIN = 2**24  # for logs and figures
PIECE = 2**30  # of the space that is tried out; some file systems end files at 4 GiB
_HELD = (errno.EACCES, errno.EAGAIN)  # what lockf says of a lock that another process has
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_UNKNOWN_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """The folder is this process's until it ends, however it ends.

    A record lock dies with its process and, unlike flock, does not live on in the loader's workers.
    """

    def __init__(self, folder: Path):
        """Make the folder if need be, and lock it.

        Raises:
            InputError: it cannot be made or locked, holds links, or another run is in it.
        """
        self.warning: str | None = None  # where the file system has no locks, and the run goes on without
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            self._handle = os.open(folder / LOCK, flags, 0o644)
        except OSError as error:
            raise _unwritable(folder, error) from error
        if fcntl is None:
            return
        if not self._lock(folder):
            os.close(self._handle)
            raise input_error(f"--checkpoints {folder}", "another run that trains in it", "none", "wait for it or end it")
        remove_partials(folder)

    def _lock(self, folder: Path) -> bool:
        """Take the lock; False: another process has it, or has moved the folder aside meanwhile."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                os.close(self._handle)
                raise input_error(
                    f"--checkpoints {folder}", f"{LOCK}, which cannot be locked ({error.strerror})", "a lock on it"
                ) from error
            self.warning = f"WARNING: {folder} cannot be locked ({error.strerror}): let no other run train in it meanwhile"
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(folder / LOCK))
        except OSError:
            return False

    def release(self) -> None:
        """Give the folder back."""
        os.close(self._handle)


def refuse_links(folder: Path) -> None:
    """A folder from elsewhere must not lead this program's writing out of it.

    Raises:
        InputError: something in the folder is a symbolic link.
    """
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(place, name)
            if path.is_symlink():
                raise input_error(path, "a symbolic link", "none in a run's folder", "remove it")


def move_aside(folder: Path) -> Path:
    """Give the folder the next free number; nothing of it is lost."""
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    folder.rename(aside)
    return aside


def check_space(folder: Path, need: int, what: str) -> None:
    """Write and remove files that are as large as what the run will write.

    Raises:
        InputError: no room for it, or no writing at all.
    """
    probes: list[Path] = []
    size = need + MARGIN
    fits = free_bytes(folder) >= size  # a disk that says it is too small is not filled to try
    try:
        for start in range(0, size if fits else 1, PIECE):
            probes.append(folder / f".space{len(probes)}.{os.getpid()}{PARTIAL}")
            with probes[-1].open("xb") as file:
                _fill(file, min(PIECE, size - start) if fits else 1)
    except OSError as error:
        fits = False
        if error.errno not in FULL:
            raise _unwritable(folder, error) from error
    finally:
        for probe in probes:
            probe.unlink(missing_ok=True)
    if not fits:
        free = free_bytes(folder)
        hint = f"free {size_text(size - free)} there, or name a folder on another disk"
        raise input_error(f"--checkpoints {folder.parent}", f"{size_text(free)} free", f"{size_text(size)} for {what}", hint)


def _unwritable(folder: Path, error: OSError) -> InputError:
    return input_error(f"--checkpoints {folder}", f"no writing ({error.strerror})", "a folder that can be written")


def _fill(file: BinaryIO, size: int) -> None:
    """Take `size` bytes of the disk for a file, by reserving them where the system can."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _UNKNOWN_CALL:
            raise
        block = bytes(2**20)
        for _ in range(-(-size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


@dataclass
class Start:
    """Where a training run begins."""

    identity: dict[str, Any]  # see utils.saving.state.identity
    lock: FolderLock | None = None  # None in the processes beside the first
    state: SavedState | None = None  # to resume from
    lines: list[str] = field(default_factory=list)  # for the log


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
        elif _holds_work(folder):
            if start.lines:
                start.lines.append("WARNING: no sound state is left: starting anew")
            start.lines.append(f"The folder held an earlier run, now in: {move_aside(folder)}")
            start.lock.release()
            start.lock = FolderLock(folder)
        if start.lock.warning:
            start.lines.append(start.lock.warning)
        start.lines.append(_check_room(args, folder, trained_values))
    if accelerator.num_processes > 1:
        _meet(folder, start)
        start.state = _same_state(folder, start)
    return start


def _same_state(folder: Path, start: Start) -> SavedState | None:
    """The state that the first process resumes from, in every process.

    Raises:
        InputError: this process finds another one under its name, or none.
    """
    chosen = from_all(start.state)[0]
    if chosen is None or start.lock is not None:
        return start.state
    try:
        found = read_state(folder / chosen.path.name)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise input_error(
            folder / chosen.path.name, f"no state ({error})", "the one that the first process reads"
        ) from error
    if found.progress != chosen.progress or found.identity != chosen.identity:
        raise input_error(
            found.path, f"a state of {found.where()}", f"that of {chosen.where()}, which the first process reads"
        )
    return found


def _meet(folder: Path, start: Start) -> None:
    """See to it that all processes of a group are of one run, and write to one folder.

    Raises:
        InputError: this process has other flags or other data than the first, or sees another folder.
    """
    sign = folder / f".group.{secrets.token_hex(8)}{PARTIAL}"
    if start.lock is not None:
        sign.touch()
    name, identity = from_all((sign.name, start.identity))[0]
    for what, value in start.identity.items():
        if identity.get(what) != value:
            raise input_error(what, str(value)[:80], f"{str(identity.get(what))[:80]}, as the first process has it")
    if not (folder / name).is_file():
        hint = "one that all machines share, under the same name"
        raise input_error(f"--checkpoints {folder.parent}", "a folder in which the first process's files are not", hint)
    from_all(None)  # all have looked
    if start.lock is not None:
        sign.unlink(missing_ok=True)


def _holds_work(folder: Path) -> bool:
    return bool(state_files(folder)) or any((folder / name).is_file() for name in (TENSORS, LEGACY))


def _check_room(args: Namespace, folder: Path, trained_values: int) -> str:
    """Make sure of the room for a state beside the last one, and a checkpoint beside the last one."""
    state, checkpoint = state_bytes(args.optimizer, trained_values), 4 * trained_values
    copies = 2 + args.torch_checkpoint
    held = [path for path in (*state_files(folder)[:1], folder / TENSORS) if path.is_file()]
    size = 2 * state + copies * checkpoint - sum(path.stat().st_size for path in held)
    many = {2: "two", 3: "three"}[copies]
    check_space(folder, size, f"two states of {size_text(state)} and {many} checkpoints of {size_text(checkpoint)}")
    every = {None: f"about every {SECONDS // 60} minutes", 0: "at the end of each epoch"}
    when = every.get(args.save_steps, f"every {args.save_steps} iterations")
    return f"A state of {size_text(state)} is saved {when}, the last two are kept"


def results_folder(args: Namespace, run_folder: Path, checkpoint: Checkpoint, data: Series | None) -> Path:
    """Where the results of a checkpoint go: the run's folder, or `on_<file>` in it where that run was trained on
    another file (a zero-shot test leaves the results of the training's own test alone).

    A command line that names its checkpoint and no experiment of its own means the checkpoint's folder.

    Args:
        run_folder: the folder that the flags name.
        data: None where they count as the training's.
    """
    home = checkpoint.file.parent
    usual = (Path(DEFAULTS["checkpoints"]).resolve(), home.parent.resolve())
    if args.checkpoint and same_experiment(args, checkpoint.flags) and Path(args.checkpoints).resolve() in usual:
        run_folder = home
    record = checkpoint.record if run_folder.resolve() == home.resolve() else read_record(run_folder)
    if data is None or not record.get("data") or trained_on(record, data, args.fill_missing):
        return run_folder
    return run_folder / f"on_{data.path.stem}"
