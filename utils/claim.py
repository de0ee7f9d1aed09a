"""A training run's folder: claimed for one process, cleared of links, never overwritten."""

import errno
import os
from pathlib import Path

from layers.errors import InputError
from utils.files import FULL, PARTIAL, free_bytes, remove_partials, size_text

try:
    import fcntl
except ImportError:  # Windows without WSL: nothing there keeps two runs apart
    fcntl = None

LOCK = ".lock"
MARGIN = 2**24  # for logs and figures
PIECE = 2**30  # of the space that is tried out; some file systems end files at 4 GiB
_HELD = (errno.EACCES, errno.EAGAIN)  # what lockf says of a lock that another process has
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_UNKNOWN_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Claim:
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
            raise InputError(f"--checkpoints: cannot write in {folder} ({error.strerror})") from error
        if fcntl is None:
            return
        if not self._lock(folder):
            os.close(self._handle)
            raise InputError(f"--checkpoints: another run is training in {folder}; wait for it or end it")
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
                raise InputError(f"--checkpoints: cannot lock {folder / LOCK} ({error.strerror})") from error
            self.warning = (
                f"WARNING: {folder} cannot be locked ({error.strerror}): let no other run train in it meanwhile"
            )
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
                raise InputError(f"{path}: found a symbolic link; a run's folder must hold none; remove it")


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
    size, probes = need + MARGIN, []
    fits = free_bytes(folder) >= size  # a disk that says it is too small is not filled to try
    try:
        for start in range(0, size if fits else 1, PIECE):
            probes.append(folder / f".space{len(probes)}.{os.getpid()}{PARTIAL}")
            with probes[-1].open("xb") as file:
                _fill(file, min(PIECE, size - start) if fits else 1)
    except OSError as error:
        fits = False
        if error.errno not in FULL:
            raise InputError(f"--checkpoints: cannot write in {folder} ({error.strerror})") from error
    finally:
        for probe in probes:
            probe.unlink(missing_ok=True)
    if not fits:
        free = free_bytes(folder)
        raise InputError(
            f"--checkpoints {folder.parent}: found {size_text(free)} free, need {size_text(size)} for {what}; "
            f"free {size_text(size - free)} there, or name a folder on another disk"
        )


def _fill(file, size: int) -> None:
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
