"""The one exception for what a user can put right: an argument, a file, a directory.

Its text follows one grammar: which argument, of what, must be what, got what. The command line prints it as a
single line and exits with 2; everything else that is raised is a fault of ours and shows its traceback.
"""

__all__ = ["InputError"]


class InputError(ValueError):
    """A wrong argument or file, told in one line that names it, the rule, and what was given."""
