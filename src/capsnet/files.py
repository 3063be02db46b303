"""Files: the cache directory, names as they can be shown, bounded reading of what may be anything, atomic writing."""

import contextlib
import errno
import gzip
import json
import os
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from capsnet.errors import InputError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "TABLES",
    "Readable",
    "Unbroken",
    "cache_dir",
    "check_utf8",
    "is_directory",
    "is_own_images",
    "is_table",
    "locked",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_text",
    "read_up_to",
    "read_yaml",
    "unpacked",
    "visible",
    "write_atomically",
]

TABLES = (".csv", ".jsonl")
"""Suffixes of tables of images."""
LARGEST_TEXT = 64 * 2**20
"""Bytes of a text file; the results of a thousand classes, with their confusion matrices, take 25 MiB."""
LARGEST_YAML = 64 * 2**10
"""Bytes of a configuration; all options together take 2 KiB, and PyYAML reads about 100 KiB a second."""
LARGEST_UNPACKED = 2**31
"""Bytes of the largest file of a data set, affNIST's, are about a third of this."""
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 2**20
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidirectional too), surrogate, line and paragraph separator
_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need, without effect on what stands around them


@runtime_checkable
class Readable(Protocol):
    """A file opened for its bytes, or what unpacks one."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size`; none at the end."""


class Unbroken:
    """stderr as a file; that it is full, or its terminal closed, is no reason to stop."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As that of a file; what cannot be written is lost."""
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As that of a file."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def cache_dir() -> Path:
    """The directory for what can be had again: CAPSNET_CACHE, or the system's cache directory for capsnet."""
    if chosen := os.environ.get("CAPSNET_CACHE"):
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("capsnet"))


def is_directory(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a directory; False where it cannot be the name of anything, as it is too long."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def is_table(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a table of images, `.csv` or `.jsonl`, which exists."""
    try:
        path = Path(name).expanduser()
        return path.suffix.lower() in TABLES and path.is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def is_own_images(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of images of one's own: of their folder, or of a table of them."""
    return is_directory(name) or is_table(name)


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


def read_up_to(file: Readable, most: int, name: str) -> bytes:
    """All that a file holds; `name` says in errors which.

    Raises:
        InputError: it holds more than `most` bytes, which are not read.
    """
    parts, left = list[bytes](), most
    while part := file.read(min(left + 1, _CHUNK)):  # not all at once: for that, Python sets `most` bytes aside
        left -= len(part)
        if left < 0:
            raise InputError(f"{name} must hold at most {most:,} bytes; got more")
        parts.append(part)
    return b"".join(parts)


def unpacked(path: str | os.PathLike[str], *, most: int = LARGEST_UNPACKED) -> bytes:
    """The content of a file, unpacked where its first two bytes, not its name, say that it is gzip.

    Raises:
        InputError: the file cannot be read, is a gzip file cut short or damaged, or holds more than `most` bytes,
            which are not unpacked.
    """
    try:
        with Path(path).open("rb") as file:
            packed = file.peek(2).startswith(_GZIP_MAGIC)
            return read_up_to(gzip.GzipFile(fileobj=file) if packed else file, most, f"file {path}")
    except EOFError as error:
        size = Path(path).stat().st_size
        raise InputError(f"{path} must be a whole gzip file; got one cut short, at {size} bytes") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} must be a sound gzip file; got a damaged one ({error})") from error
    except OSError as error:
        raise InputError(f"{path} must be a readable file; got: {error.strerror}") from error


def read_bytes(path: Path, *, most: int, what: str = "file") -> bytes:
    """The content of a file; `what` is said of it in errors.

    Raises:
        InputError: it cannot be read, or holds more than `most` bytes.
    """
    try:
        with path.open("rb") as file:
            return read_up_to(file, most, f"{what} {path}")
    except OSError as error:
        raise InputError(f"{what} {path} must be readable; got: {error.strerror}") from None


def read_text(path: Path, *, most: int = LARGEST_TEXT, what: str = "file") -> str:
    """The text of a file; `what` is said of it in errors.

    Raises:
        InputError: it cannot be read, is larger than `most` bytes, or is not UTF-8.
    """
    try:
        return read_bytes(path, most=most, what=what).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{what} {path} must be UTF-8 text; it is not") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file; what it must be is for `schema.checked` to say.

    Raises:
        InputError: see `read_text`; or it is no JSON, or nested too deeply.
    """
    return parse_json(read_text(path), source=f"file {path}")


def parse_json(text: str, *, source: str) -> Any:
    """The value of a JSON text; `source` names it in errors.

    Raises:
        InputError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} must be JSON; got: {error}") from None


def read_yaml(path: Path, *, what: str = "file") -> Any:
    """The value in a YAML file; `what` is said of it in errors.

    Raises:
        InputError: see `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, most=LARGEST_YAML, what=what), source=f"{what} {path}")


def parse_yaml(text: str, *, source: str) -> Any:
    """The value of a YAML text without aliases: a few lines of them stand for any amount of memory.

    Raises:
        InputError: it is no YAML, has aliases, or is nested too deeply; `source` says which text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias, which is not allowed here")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except Exception as error:  # PyYAML answers wrong values of a type, as !!int "", with many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source} must be YAML; got: {reason[:200]}") from None


def locked(handle: int, *, exclusive: bool, wait: bool = True) -> bool:
    """Lock an open file (flock), which ends with the process, however that ends.

    Returns:
        False where another process holds it and there is no `wait`. True where there are no locks: on Windows, and on
        some network drives.
    """
    if sys.platform == "win32":
        return True
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # NFS locks for writing only what is open for writing: EBADF
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
            raise
    return True


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, flush it to the disk, and put it in place in one step.

    Raises:
        InputError: it could not be written; what was at `path` is untouched and nothing half-made is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        kept = "; what it held before is kept" if path.is_file() else ""
        raise InputError(f"file {path} must be writable; got: {error.strerror or error}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # where it did not get into place
