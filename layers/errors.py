"""The one exception for what a user can mend: a flag, a file, a folder."""


class InputError(ValueError):
    """A flag, file or folder that cannot be used; the message is one line.

    The line names the flag or file, what was found and what is needed.
    ``run_main.py`` prints it without a traceback and exits with code 2.
    """
