"""The exceptions of the package. Every other one that is raised is a fault of ours and shows its traceback.

An `InputError` is what a user can put right: an argument, a file, a directory. Its text follows one grammar: which
argument, of what, must be what, got what. The command line prints each as a single line.
"""

__all__ = ["Diverged", "InputError", "Interrupted"]


class InputError(ValueError):
    """A wrong argument or file, in one line that names it, the rule, and what was given. Exit code 2.

    Examples:
        >>> create("capsnet", image_shape=(1, 28, 28), num_classes=0)
        Traceback (most recent call last):
            ...
        capsnet.errors.InputError: num_classes must be at least 1 and the number of names in classes; got 0
    """


class Diverged(Exception):
    """The loss became NaN or infinite; the last good checkpoint is kept. Exit code 1.

    Examples:
        >>> str(Diverged("the loss is nan in epoch 2"))
        'the loss is nan in epoch 2'
    """


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP: the run was saved and can be resumed. Exit code 128 + `signal_number`.

    Examples:
        >>> Interrupted("stopped in epoch 1", 15).signal_number
        15
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
