"""Decoded images: in memory where they are few, else in a file of the cache that is mapped into memory.

An entry is one file, `KEY-NxCxHxW.images` in the folder `images` of the cache directory: the pixels of N images, one
after the other. It is written under a hidden name that ends in `.partial`, flushed to the disk, and renamed when it is
whole. Locks (flock) say who uses what, and go with the process, however that ends: a shared one on an entry is held as
long as it is mapped, an exclusive one on a partial file by the process that writes it. Windows has no such locks: there
each process writes a file of its own, and the system refuses to remove one that is mapped.
"""

import errno
import math
import mmap
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from capsnet.errors import InputError
from capsnet.files import Unbroken, cache_dir, locked

__all__ = ["Entry", "clear", "cores", "decoded", "entries", "limit"]

PATIENCE = 2.0
"""Seconds before anything is said of decoding."""
LOG_INTERVAL = 30.0
"""Seconds between what is said of it where there is no terminal."""
IN_MEMORY = 256 * 2**20
"""Bytes of images that are held in memory; more are mapped."""
LIMIT_GIB = 20.0
"""GiB that all entries may take together, unless CAPSNET_CACHE_LIMIT says otherwise."""
_NAME = re.compile(r"(?P<key>[0-9a-f]+)-(?P<shape>[0-9]+(x[0-9]+){3})\.images")
_POLL = 0.1  # seconds

Decode = Callable[[int], Tensor | np.ndarray]


@dataclass(frozen=True)
class Entry:
    """A file of decoded images in the cache."""

    path: Path
    shape: tuple[int, ...]  # number of images, channels, height and width
    size: int  # in bytes
    used: float  # when it was mapped last, in seconds since the epoch


def decoded(
    count: int, shape: tuple[int, int, int], decode: Decode, *, key: str, tell: Callable[[str], object] | None = None
) -> UInt8[Tensor, "count channels height width"]:
    """`count` images of one shape, decoded on all cores; those of more than `IN_MEMORY` bytes once and for all.

    `decode` makes image `i`, `uint8 [*shape]`, in several threads. `key`, hexadecimal digits, stands for the content:
    other images or another preprocessing, another key. `tell` is given a line where the images are mapped: the file,
    and why there is a wait.

    Returns:
        A tensor of its own, or one that is mapped from the file: what is written to it stays in this process.

    Raises:
        InputError: the cache cannot be written, its disk or its limit has too little room; nothing is left behind.
        Exception: what `decode` raises for an image, by which all ends; nothing is left behind.
    """
    size = count * math.prod(shape)
    if size <= IN_MEMORY:
        images = np.empty((count, *shape), dtype=np.uint8)
        _fill(count, shape, decode, images.__setitem__)
        return torch.from_numpy(images)
    tell = tell or (lambda line: None)
    folder = _folder()
    path = folder / f"{key}-{'x'.join(map(str, (count, *shape)))}.images"
    with _writable(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        while (mapped := _mapped(path, size)) is None:
            _write(path, count, shape, decode, tell)
    tell(f"images mapped from {path}")
    return torch.frombuffer(mapped, dtype=torch.uint8).view(count, *shape)


def entries() -> list[Entry]:
    """What the cache holds, the longest unused first."""
    found = list[Entry]()
    for path in _folder().glob("*.images"):
        if name := _NAME.fullmatch(path.name):
            with suppress(FileNotFoundError):
                about = path.stat()
                shape = tuple(map(int, name["shape"].split("x")))
                found.append(Entry(path, shape, about.st_size, about.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def clear() -> tuple[list[Entry], list[Entry]]:
    """Remove every entry that no process uses, and what killed processes left.

    Returns:
        The removed entries, and those that are in use.
    """
    _remove_partial()
    kept, removed = list[Entry](), list[Entry]()
    for entry in entries():
        (removed if _removed(entry.path) else kept).append(entry)
    return removed, kept


def limit() -> int:
    """Bytes that all entries may take together.

    Raises:
        InputError: CAPSNET_CACHE_LIMIT is not a number of GiB.
    """
    given = os.environ.get("CAPSNET_CACHE_LIMIT") or str(LIMIT_GIB)
    with suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return int(float(given) * 2**30)
    raise InputError(f"CAPSNET_CACHE_LIMIT must be a number of GiB above 0; got {given!r}")


def _folder() -> Path:
    return cache_dir() / "images"


def _mapped(path: Path, size: int) -> mmap.mmap | None:
    """The entry, which is then in use as long as the map is alive; None where there is none that is whole."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        locked(file.fileno(), exclusive=False)
        if os.fstat(file.fileno()).st_size == size:
            with suppress(OSError):  # the files of another user, or of a read-only disk
                os.utime(path)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # keeps the lock: it duplicates the handle
        path.unlink()
    return None


def _write(path: Path, count: int, shape: tuple[int, int, int], decode: Decode, tell: Callable[[str], object]) -> None:
    """Make the entry, or wait for the process that makes it."""
    each = math.prod(shape)
    size = count * each
    partial = path.with_name(f".{path.name}.{os.getpid() if sys.platform == 'win32' else ''}.partial")
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if not locked(handle, exclusive=True, wait=False):
            tell(f"waiting for another process that decodes these images to {path}")
            while _is(partial, handle) and not locked(handle, exclusive=True, wait=False):
                time.sleep(_POLL)  # and not in flock: once renamed, the file is locked as long as it is mapped
        if not _is(partial, handle):  # renamed or removed by the process that had it
            return
        if path.exists():  # made between our look for it and our lock
            partial.unlink()
            return
        _make_room(size)
        os.ftruncate(handle, 0)
        _reserve(handle, size)
        tell(f"decoding {count:,} images to {path}, {_gib(size)}, once for all runs")
        put = _positioned(handle)
        _fill(count, shape, decode, lambda index, image: put(image.tobytes(), index * each))
        os.fsync(handle)
        partial.replace(path)
    except BaseException:
        if _is(partial, handle):
            partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _reserve(handle: int, size: int) -> None:
    """Have the disk set the room aside, so that a full one is known before hours of decoding; where it can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _positioned(handle: int) -> Callable[[bytes, int], None]:
    """Write all bytes at an offset, from any thread."""
    lock = threading.Lock()

    def put(content: bytes, offset: int) -> None:
        if sys.platform == "win32":
            with lock:
                os.lseek(handle, offset, os.SEEK_SET)
                while content:
                    content = content[os.write(handle, content) :]
            return
        while content:
            written = os.pwrite(handle, content, offset)
            content, offset = content[written:], offset + written

    return put


def _fill(count: int, shape: tuple[int, int, int], decode: Decode, put: Callable[[int, np.ndarray], object]) -> None:
    """Decode all images on all cores, a few at a time, and `put` each; the first error ends it."""
    numbers, lock, stopped = iter(range(count)), threading.Lock(), threading.Event()
    done = 0

    def work() -> None:
        nonlocal done
        try:
            while not stopped.is_set():
                with lock:
                    index = next(numbers, None)
                if index is None:
                    return
                image = np.asarray(decode(index))
                if image.shape != shape or image.dtype != np.uint8:
                    raise ValueError(
                        f"image {index} must be uint8 {list(shape)}; got {image.dtype} {list(image.shape)}"
                    )
                put(index, image)
                with lock:
                    done += 1
        except BaseException:
            stopped.set()
            raise

    from tqdm import tqdm

    shown: dict[str, Any] = {"desc": "decoding images", "unit": " images", "delay": PATIENCE, "leave": False}
    shown |= {} if sys.stderr.isatty() else {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL}
    shown |= {"disable": os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"}
    with tqdm(total=count, file=Unbroken(), **shown) as bar, ThreadPoolExecutor(cores()) as pool:
        tasks = [pool.submit(work) for _ in range(min(count, cores()))]
        try:
            while wait(tasks, _POLL, FIRST_EXCEPTION).not_done and not stopped.is_set():
                bar.update(done - bar.n)
        finally:  # also after Ctrl-C, which comes here
            stopped.set()
    for task in tasks:
        task.result()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_room(size: int) -> None:
    """Remove entries, the longest unused first, until `size` bytes are within the limit and the disk's free space.

    Raises:
        InputError: there would be too little room with all gone, and then none is; or with all gone that can go.
    """
    _remove_partial()
    folder, most, found = _folder(), limit(), entries()
    held = sum(entry.size for entry in found)

    def lacking(held: int, free: int) -> str | None:
        if held + size > most:
            used = f", of which {_gib(held)} are in use" if held else ""
            return f"its limit is {_gib(most)}{used} (set CAPSNET_CACHE_LIMIT to more GiB)"
        if size > free:
            return f"its disk has {_gib(free)} free (set CAPSNET_CACHE to a folder on another disk)"
        return None

    reason = lacking(0, shutil.disk_usage(folder).free + held)
    if reason is None:
        while (reason := lacking(held, shutil.disk_usage(folder).free)) and found:
            entry = found.pop(0)
            held -= entry.size * _removed(entry.path)
    if reason:
        raise InputError(f"images need {_gib(size)} in the cache {folder}; {reason}")


def _remove_partial() -> None:
    """Remove what killed processes left half-written."""
    for path in _folder().glob(".*.images.*partial"):
        _removed(path)


def _removed(path: Path) -> bool:
    """Remove a file unless a process uses it."""
    try:
        with path.open("rb") as file:
            if not locked(file.fileno(), exclusive=True, wait=False):
                return False
            if sys.platform != "win32":
                path.unlink()
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:  # mapped, on Windows; or not ours
        return False
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def _writable(folder: Path, size: int) -> Iterator[None]:
    """Raise InputError in place of what the system says of a cache that cannot be written to."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise InputError(f"images need {_gib(size)} of address space to be mapped; got: {error.strerror}") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"images need {_gib(size)} in the cache {folder}; got: {error.strerror} "
                "(set CAPSNET_CACHE to a folder on another disk)"
            ) from None
        if error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder.parent):
            raise InputError(
                f"cache {folder} must be writable; got: {error.strerror} (set CAPSNET_CACHE to another folder)"
            ) from None
        raise


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
