"""All that the verbs print goes through here, so that no name from a file is markup or moves the cursor."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from capsnet.names import visible

__all__ = ["say", "show", "show_json", "show_table"]

_LONGEST = 2_000  # characters of an error: more than any of ours has


def show(*lines: str) -> None:
    """Print lines to stdout at once; a line break inside of one is printed as its escape."""
    for line in lines:
        print(visible(line), flush=True)


def show_json(value: Any) -> None:
    """Print JSON to stdout, names exactly as they are: JSON has escapes of its own."""
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
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False).print(table)


def say(text: str) -> None:
    """Print one line to stderr at once, cut where a value in it is endless."""
    line = visible(text[:_LONGEST])
    print(line if len(text) <= _LONGEST else f"{line}...", file=sys.stderr, flush=True)
