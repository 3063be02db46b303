"""All that the verbs print goes through here, so that no name from a file is markup or moves the cursor."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from capsnet.errors import InputError
from capsnet.files import visible

__all__ = ["begin", "end", "say", "show", "show_json", "show_table"]

_LONGEST = 2_000  # characters of an error: more than any of ours has


def begin() -> None:
    """Make stdout and stderr take any text: closed ones by dropping it, narrow encodings by writing escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def end() -> None:
    """Drop what could not be written, which Python would try again at its end and answer with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _written() -> Iterator[None]:
    """Raise InputError where stdout cannot take what is printed inside; a closed pipe stays a BrokenPipeError."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"standard output must be writable; got: {error.strerror}") from None


def show(*lines: str) -> None:
    """Print lines to stdout at once; a line break inside of one is printed as its escape."""
    for line in lines:
        with _written():
            print(visible(line))


def show_json(value: Any) -> None:
    """Print JSON to stdout, names exactly as they are: JSON has escapes of its own."""
    with _written():
        print(json.dumps(value, indent=2))


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: the first column to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for k, heading in enumerate(headings):
        table.add_column(visible(heading), justify="right" if k else "left")
    for row in rows:
        table.add_row(*map(visible, row))
    text = StringIO()  # rich ends the process where a pipe is closed
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    Console(file=text, width=width, highlight=False, markup=False, emoji=False).print(table)
    with _written():
        print(text.getvalue(), end="")


def say(text: str) -> None:
    """Print one line to stderr at once, cut where a value in it is endless; lost where stderr takes nothing."""
    line = visible(text[:_LONGEST])
    with suppress(OSError):
        print(line if len(text) <= _LONGEST else f"{line}...", file=sys.stderr, flush=True)
