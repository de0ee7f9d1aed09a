"""What ends a run that had started: one line for the user, exit code 1, never a traceback."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one line that says what is kept and what to do."""


class StorageError(RunError):
    """A file could not be written; what lay there before is what it was.

    Attributes:
        errno: the operating system's number for the reason.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno
