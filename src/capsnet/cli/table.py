"""The verb `table`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from capsnet.cli.parsing import parse
from capsnet.cli.printing import say, show
from capsnet.errors import InputError

__all__ = ["run"]

PAGES = ("README.md", "docs/experiments.md")


@dataclass(frozen=True)
class _Table:
    """Write the tables of README and docs anew from the records of `capsnet reproduce`; nothing is typed by hand.

    A table stands between the marks `<!-- capsnet table NAME -->` and `<!-- end of table -->`.

    Examples:
      capsnet table
      capsnet table --check
    """

    pages: Positional[tuple[str, ...]] = PAGES
    """Markdown files with marks."""
    results: str = "results/experiments"
    """Folder of the records."""
    check: bool = False
    """Change nothing; exit code 1 if a table is not that of the records."""


def run(arguments: list[str]) -> int:
    """Rewrite the tables, print which pages changed."""
    command = parse(_Table, arguments, prog="capsnet table")
    from capsnet.experiments.tables import rewritten
    from capsnet.runs import write_atomically

    if not Path(command.results).is_dir():  # else every row would become "not run"
        raise InputError(f"--results must be a folder of records; got {command.results}")
    fresh: dict[Path, str] = {}
    for page in map(Path, command.pages):
        try:
            text = page.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InputError(f"page {page} must be a readable Markdown file; got: {reason}") from None
        made = rewritten(text, Path(command.results), source=str(page))
        if made != text:
            fresh[page] = made
    for page, made in fresh.items():
        if command.check:
            say(f"capsnet table: {page} is not that of the records; capsnet table writes it anew")
            continue
        write_atomically(page, partial(Path.write_text, data=made, encoding="utf-8"))
        show(f"written: {page}")
    if not fresh:
        show("all tables are those of the records")
    return 1 if fresh and command.check else 0
