"""Names as they can be shown: those of classes, files and folders may hold what a terminal obeys or a font lacks."""

import unicodedata
from pathlib import Path

from capsnet.errors import InputError

__all__ = ["check_utf8", "visible"]

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidirectional too), surrogate, line and paragraph separator
_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need, without effect on what stands around them


def visible(text: str) -> str:
    r"""One line of valid Unicode: `text` with its control, format and surrogate characters written as escapes (`\x1b`).

    Surrogates stand for the bytes of a file name that is not UTF-8, see `os.fsdecode`. What is visible stays as it is,
    a backslash too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def check_utf8(out: Path, reader: str) -> None:
    """Raise InputError unless `reader`, which takes names in UTF-8 only, can open `out`."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise InputError(f"out must be a name in UTF-8 for {reader}; got {out}") from None


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
