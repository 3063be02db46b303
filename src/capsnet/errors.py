"""The exceptions of the package. Every other one that is raised is a fault of ours and shows its traceback.

An `InputError` is what a user can put right: an argument, a file, a directory. Its text follows one grammar: which
argument, of what, must be what, got what. The command line prints each as a single line.
"""

__all__ = ["Diverged", "InputError", "Interrupted"]


class InputError(ValueError):
    """A wrong argument or file, in one line that names it, the rule, and what was given. Exit code 2."""


class Diverged(Exception):
    """The loss became NaN or infinite; the last good checkpoint is kept. Exit code 1."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP: the run was saved and can be resumed. Exit code 128 + `signal_number`."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
