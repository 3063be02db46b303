"""Look for habits of language that make readers stop, and for long sentences, in README and docs.

python -m tools.words            all pages
python -m tools.words docs/*.md  these
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from capsnet.errors import InputError
from capsnet.files import read_text

__all__ = ["HABITS", "LONGEST", "Finding", "findings", "main", "sentences"]

LONGEST = 30
"""Words of a sentence above which it is reported."""
THING = r"(?:batch|capsule|class|epoch|example|file|image|layer|row|run|seed|side|step)"
HABITS = {
    r"(?:is|are|was|were|be) told|tells? (?:of|how|what|that|whether|which)": "say, report, log",
    rf"(?:a|one) \w+ (?:a|an) {THING}\b(?! of)": "one ... per ...",
    r"(?:go|goes|gone) on (?:with|from)": "resume, continue",
    r"for want of|for lack of": "because ... is missing",
    r"in whole|in silence|as it is\b": "without change; silently",
    r"strangers?": "out-of-distribution",
    r"nobody may|may not be": "must not",
    r"what there is|what surrounds|what is to be": "the noun",
    r"die[sd]? of": "stop, end",
}
"""Patterns, and what to write instead."""


class Finding(NamedTuple):
    """A place to look at: line, the words, and what to write instead."""

    line: int
    words: str
    instead: str


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Each sentence of the prose of a page, with the line on which its paragraph begins.

    Code, tables, headings, quoted output and addresses are no prose.
    """
    plain = re.sub(r"^```.*?^```$", lambda code: "\n" * code[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    plain = re.sub(r"<!--.*?-->", lambda note: "\n" * note[0].count("\n"), plain, flags=re.DOTALL)
    plain = re.sub(r"\]\([^)]*\)", "]", plain)
    plain = re.sub(r"`[^`]*`", "`code`", plain)
    start, paragraph = 1, list[str]()
    for number, line in enumerate([*plain.splitlines(), ""], 1):
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        ends = not line.strip() or line.startswith(("#", "|", "    ", ":::"))
        if (ends or item) and paragraph:
            for sentence in re.split(r"(?<=[.!?:;])\s+(?=[\"'*\[`(]*[A-Z`0-9\[])", " ".join(paragraph)):
                yield start, sentence
            paragraph = []
        if not ends:
            start = start if paragraph else number
            paragraph.append(line.strip())


def findings(text: str) -> list[Finding]:
    """The habits and the long sentences of a page."""
    found = []
    for line, sentence in sentences(text):
        for pattern, instead in HABITS.items():
            found += [Finding(line, match[0], instead) for match in re.finditer(rf"\b(?:{pattern})", sentence, re.I)]
        if (count := len(re.findall(r"[\w'%]+(?:[-.,/]\w+)*", sentence))) > LONGEST:
            found.append(Finding(line, f"{sentence[:60]}...", f"{count} words: shorter sentences"))
    return found


def main(arguments: Sequence[str]) -> int:
    """Print what was found; returns the exit code, 1 if there is anything."""
    parser = argparse.ArgumentParser(prog="python -m tools.words", description=str(__doc__).splitlines()[0])
    default = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
    parser.add_argument("pages", nargs="*", type=Path, default=default, help="Markdown files")
    count = 0
    try:
        for page in parser.parse_args(arguments).pages:
            for one in findings(read_text(page, what="page")):
                print(f"{page}:{one.line}: {one.words} ({one.instead})")
                count += 1
    except InputError as error:
        print(f"tools.words: error: {error}", file=sys.stderr)
        return 2
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
