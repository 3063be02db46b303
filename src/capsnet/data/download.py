"""Finding the files of a published data set on this machine, and downloading those that are not here.

With the argument `data_dir`, that directory alone is looked in, and nothing is downloaded. Without it, the directory
that the environment variable CAPSNET_DATA names, then the cache (CAPSNET_CACHE, or the system's cache directory for
capsnet), and then the mirrors; CAPSNET_OFFLINE=1 forbids downloads. In each directory the set's own folder comes first,
then the directory itself.

Any sound copy in a directory will do. Where there is none, but a file of the name, that is an error, and never a reason
to look further on: a damaged file is to be seen. The one exception is a file of another set that is known here, for
sets share names of files (those of mnist, fashion-mnist and kmnist are the same): it counts as absent. What is
downloaded enters the cache only when its checksum is right.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from capsnet.errors import InputError
from capsnet.files import LARGEST_UNPACKED, cache_dir, unpacked

__all__ = ["DataDir", "Source", "contents", "from_mirrors", "here", "locate", "places", "roots", "sha256_of"]

DataDir = str | os.PathLike[str] | None
"""What the argument `data_dir` may be."""
T = TypeVar("T")

_ATTEMPTS = 2
_WAIT_S = 1.0
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what its files must be."""

    name: str  # also of its folder, which may be called `<name>-test` where it has the test split only
    files: Mapping[str, str | None]  # name of each, unpacked, to the SHA-256 of its content; None where not known
    mirrors: tuple[str, ...]  # addresses that end in a slash, tried in turn
    packed: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the published `.gz` where that is not known
    most: int = LARGEST_UNPACKED  # bytes of its largest file, unpacked


def roots(source: Source, data_dir: DataDir) -> list[list[Path]]:
    """The directories to look in for the files of a set, each as its folders of the set's own name, and itself.

    Raises:
        InputError: `data_dir` is given and is not a directory.
    """
    if data_dir is not None:
        if not Path(data_dir).expanduser().is_dir():
            raise InputError(f"data_dir must be an existing directory; got {data_dir}")
        found = [Path(data_dir).expanduser()]
    else:
        named = os.environ.get("CAPSNET_DATA")
        found = [*([Path(named).expanduser()] if named else []), cache_dir()]
    return [[root / source.name, root / f"{source.name}-test", root] for root in found]


def places(source: Source, data_dir: DataDir) -> list[Path]:
    """All folders of `roots`, in order."""
    return [folder for folders in roots(source, data_dir) for folder in folders]


def locate(folders: Iterable[Path], names: Iterable[str]) -> list[Path]:
    """Every existing file of one of the `names` in one of the `folders`, in the order of the folders."""
    wanted = list(names)
    return [folder / name for folder in folders for name in wanted if (folder / name).is_file()]


def here(
    source: Source, data_dir: DataDir, *, files: Iterable[str] | None = None, packing: str = ".gz"
) -> dict[str, list[Path]]:
    """The files of a set as they are published, packed or not, each with the first copy on this machine, unverified.

    Raises:
        InputError: see `roots`.
    """
    folders, wanted = places(source, data_dir), source.files if files is None else files
    return {f"{file}{packing}": locate(folders, (f"{file}.gz", file))[:1] for file in wanted}


def contents(
    source: Source, files: Sequence[str], data_dir: DataDir, *, known: Mapping[str, str] | None = None
) -> dict[str, tuple[Path, bytes]]:
    """The path and the verified, unpacked content of each of the `files`, downloaded where need be.

    `known` tells, by the SHA-256 of a file, unpacked or as published, the name of the set it belongs to.

    Raises:
        InputError: a file here has a wrong checksum and no sound copy is beside it, or a file is neither here nor
            to be had from any mirror.
    """
    found: dict[str, tuple[Path, bytes]] = {}
    for file in files:
        if sound := _first_sound(source, file, data_dir, known or {}):
            found[file] = sound
    missing = [file for file in files if file not in found]
    absent = [name for name, paths in here(source, data_dir).items() if not paths]  # also of the other split
    for file in missing:

        def keep(path: Path, file: str = file) -> tuple[Path, bytes]:
            content = _verified(source, file, path, {})
            kept = cache_dir() / source.name / path.name
            path.replace(kept)
            return kept, content

        wanted = [*dict.fromkeys((*(f"{file}.gz" for file in missing), *absent))]
        found[file] = from_mirrors(source, f"{file}.gz", keep, wanted=wanted, data_dir=data_dir)
    return found


def _first_sound(source: Source, file: str, data_dir: DataDir, known: Mapping[str, str]) -> tuple[Path, bytes] | None:
    """A copy of a file on this machine, and its content; None where there is none, sound or not."""
    foreign: InputError | None = None
    for folders in roots(source, data_dir):
        fault: InputError | None = None
        for path in locate(folders, (f"{file}.gz", file)):
            try:
                return path, _verified(source, file, path, known)
            except _OfAnotherSet as error:
                foreign = foreign or error
            except InputError as error:
                fault = fault or error
        if fault is not None:
            raise fault
    if data_dir is not None and foreign is not None:
        raise foreign
    return None


def from_mirrors(
    source: Source, name: str, accept: Callable[[Path], T], *, wanted: Sequence[str], data_dir: DataDir
) -> T:
    """Download the file `name` from the first mirror whose copy is accepted.

    `accept` is given the downloaded file, in a temporary folder inside the cache; it verifies it, moves it to where it
    shall stay, and returns what this function returns. Its InputError means: a bad copy, try the next. `wanted` are all
    files that are missing, for the message.

    Raises:
        InputError: a `data_dir` was given, or downloads are switched off; no mirror has a sound copy, or the cache
            cannot be written.
    """

    def unavailable(*reasons: str) -> InputError:
        return InputError(
            f"data set {source.name} must be on this machine or downloadable; missing: {', '.join(wanted)}; "
            f"looked in: {', '.join(map(str, places(source, data_dir)))}; {'; '.join(reasons)}; put the files into a "
            "directory and name it with --data-dir or CAPSNET_DATA, or use --data strokes, which needs no download"
        )

    if data_dir is not None:
        raise unavailable("with --data-dir nothing is downloaded")
    if os.environ.get("CAPSNET_OFFLINE", "0") not in ("", "0"):
        raise unavailable("downloads are off (CAPSNET_OFFLINE)")
    folder, failures = cache_dir() / source.name, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".download-", dir=folder)
    except OSError as error:
        raise InputError(
            f"cache directory {folder} must be writable, or another named with CAPSNET_CACHE; got: {error.strerror}"
        ) from error
    with temporary as directory:
        for mirror in source.mirrors:
            try:
                return accept(_retrieve(mirror + name, Path(directory) / name))
            except (OSError, InputError) as error:
                failures.append(f"{mirror}: {_reason(error)}")
    raise unavailable(*failures)


def _retrieve(url: str, path: Path) -> Path:
    """Download `url` to `path`, over what is there; a failure that may pass is tried again."""
    import pooch
    from tqdm import tqdm

    pooch.get_logger().setLevel(logging.WARNING)  # its log says what the bar and our errors say
    for attempt in range(1, _ATTEMPTS + 1):
        path.unlink(missing_ok=True)
        try:
            # silent where stderr is no terminal; pooch asks for its truth, which is total > 0, and then sets the total
            with tqdm(desc=path.name, total=1, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                downloader = pooch.HTTPDownloader(progressbar=bar, timeout=_TIMEOUT_S)
                pooch.retrieve(url, None, fname=path.name, path=path.parent, downloader=downloader)
            return path
        except OSError as error:
            if attempt == _ATTEMPTS or _status(error) in range(400, 500):
                raise
            time.sleep(_WAIT_S)
    raise AssertionError("the last attempt returns or raises")


class _OfAnotherSet(InputError):
    """A file of the right name that is known to be of another data set."""


def _verified(source: Source, file: str, path: Path, known: Mapping[str, str]) -> bytes:
    """The unpacked content of `path`, which must be the `file` of the data set.

    Raises:
        _OfAnotherSet: it is that of another set, of those whose checksums are `known`.
        InputError: it is damaged, or of a wrong checksum.
    """
    content = unpacked(path, most=source.most)
    expected, actual = source.files[file], hashlib.sha256(content).hexdigest()
    of, packed = f"unpacked, as {file} of {source.name}", ""
    if path.suffix == ".gz" and (expected is None or known):
        packed = sha256_of(path)
    other = known.get(actual) or known.get(packed)
    if expected is None and packed:
        expected, actual = source.packed[file], packed
        of = f"as the published {file}.gz of {source.name}"
    if other not in (None, source.name):
        expected = expected or "of its own"
        raise _OfAnotherSet(f"{path} must have the SHA-256 {expected} {of}; got {actual}, that of {other}: move it")
    if expected is not None and actual != expected:
        raise InputError(f"{path} must have the SHA-256 {expected} {of}; got {actual}: delete or move it")
    return content


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as it is, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _status(error: Exception) -> int | None:
    """The HTTP status, where a server answered with an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"HTTP status {status}"
    if isinstance(error, InputError):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
