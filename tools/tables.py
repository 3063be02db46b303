"""Write the tables of README and docs from the records of `capsnet reproduce`; nothing in them is typed by hand.

A table stands between the marks `<!-- table NAME -->` and `<!-- end of table -->`, each on a line of its own. NAME is
an experiment, or `overview`: the first row of every experiment.

    python -m tools.tables            write them (make tables)
    python -m tools.tables --check    exit code 1 if one is not that of the records
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from capsnet.errors import InputError
from capsnet.experiments import available, experiment
from capsnet.experiments.tables import overview, render
from capsnet.files import read_text, write_atomically

__all__ = ["PAGES", "main", "rewritten"]

PAGES = ("README.md", "docs/experiments.md")
MARK = re.compile(r"(<!-- table (\S+) -->\n)((?:(?!<!-- table ).)*?)(<!-- end of table -->)", re.DOTALL)


def rewritten(text: str, folder: Path, *, source: str) -> str:
    """A page with the tables between its marks made anew from the records in `folder`; `source` names it in errors.

    Raises:
        InputError: a mark names no table, or lacks its other one, or there is none.
    """
    begun, ended, whole = (len(re.findall(mark, text)) for mark in ("<!-- table ", "<!-- end of table -->", MARK))
    if not begun == ended == whole or not whole:
        rule = "must have each table between <!-- table NAME --> and <!-- end of table -->"
        raise InputError(f"{source} {rule}; got {begun or 'none'} begun and {ended or 'none'} ended")

    def fresh(match: re.Match[str]) -> str:
        if match[2] not in (names := ("overview", *available())):
            raise InputError(f"{source}: a table must be one of {', '.join(names)}; got {match[2]}")
        table = overview(folder) if match[2] == "overview" else render(experiment(match[2]), folder)
        return f"{match[1]}{table}{match[4]}"

    return MARK.sub(fresh, text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.tables", description=str(__doc__).splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="Markdown files with marks")
    parser.add_argument("--results", type=Path, default=Path("results/experiments"), help="folder of the records")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table has to change")
    given = parser.parse_args(arguments)
    try:
        if not given.results.is_dir():  # else every row would become "not run"
            raise InputError(f"--results must be a folder of records; got {given.results}")
        texts = {page: read_text(page, what="page") for page in map(Path, given.pages)}
        fresh = {page: rewritten(text, given.results, source=f"page {page}") for page, text in texts.items()}
        changed = [page for page in fresh if fresh[page] != texts[page]]
        for page in changed:
            if not given.check:
                write_atomically(page, partial(Path.write_text, data=fresh[page], encoding="utf-8"))
            print(f"not that of the records: {page}" if given.check else f"written: {page}")
    except InputError as error:
        print(f"tools.tables: error: {error}", file=sys.stderr)
        return 2
    if not changed:
        print("all tables are those of the records")
    return 1 if changed and given.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
