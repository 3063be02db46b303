"""CIFAR-10 in its binary version: the six batch files, and the archive they come in.

The python version is a pickle, which can run code when it is opened, and is refused. A record is 1 byte of
label and 3072 bytes of pixels: 1024 red, 1024 green, 1024 blue, each row by row. Source:
https://www.cs.toronto.edu/~kriz/cifar.html; Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009.
"""

import gzip
import hashlib
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from capsnet.data import download
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir, Source
from capsnet.data.registry import Entry
from capsnet.errors import InputError
from capsnet.files import Readable, cache_dir, read_bytes

__all__ = ["ARCHIVES", "ENTRY", "FOLDER", "SHA256", "SOURCE", "find_archive", "find_folder", "parse", "read", "unpack"]

FOLDER = "cifar-10-batches-bin"
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-binary.tar.xz")
# Of the files in the official archive, whose MD5s are those published in build scripts.
SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
SOURCE = Source(name="cifar10", files=SHA256, mirrors=("https://www.cs.toronto.edu/~kriz/",))
_OTHER_MEMBERS = ("batches.meta.txt", "readme.html")
_PYTHON_VERSION = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")
_CLASSES = 10
_RECORD_BYTES = 1 + 3 * 32 * 32
_BATCH_BYTES = 10_000 * _RECORD_BYTES
_TAR_BYTES = len(SHA256) * _BATCH_BYTES + 2**20  # with headers, and the two other members
_UNPACKERS: dict[bytes, Callable[[IO[bytes]], Readable]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\xfd7": lzma.LZMAFile,
}
_ORIGIN = ".unpacked-from"


def find_folder(places: Sequence[Path]) -> Path | None:
    """The first folder in or at `places` with batch files of the binary version, None if there is none."""
    candidates = (folder for place in places for folder in (place / FOLDER, place))
    return next((folder for folder in candidates if any((folder / name).is_file() for name in SHA256)), None)


def find_archive(places: Sequence[Path]) -> Path | None:
    """The first archive of the binary version in `places`, None if there is none.

    Raises:
        InputError: there is none, but a folder or an archive of the python version.
    """
    for wanted in (ARCHIVES, _PYTHON_VERSION):
        path = next((place / name for place in places for name in wanted if (place / name).exists()), None)
        if path is not None and wanted is _PYTHON_VERSION:
            raise InputError(
                f"CIFAR-10 must be the binary version, {ARCHIVES[0]} or {FOLDER}/; got the python version, {path}"
            )
        if path is not None:
            return path
    return None


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The split `train` or `test`, unpacked or downloaded where need be.

    Raises:
        InputError: the files are not here and not to be had, or one is missing, of a wrong size or checksum, or has a
            label above 9.
    """
    folder = _unpacked_folder(data_dir)
    names = [name for name in SHA256 if (name == "test_batch.bin") == (split == "test")]
    batches = []
    for name in names:
        path = folder / name
        content = read_bytes(path, most=_BATCH_BYTES)
        batches.append(parse(content, path))
        _check(content, name, path)
    images, labels = zip(*batches, strict=True)
    return Split(torch.cat(images), torch.cat(labels))


def parse(
    content: bytes, path: str | os.PathLike[str]
) -> tuple[UInt8[Tensor, "images 3 32 32"], Int64[Tensor, " images"]]:
    """Images (intensities 0..255) and labels (0..9) of one batch file; `path` only names it in errors.

    Raises:
        InputError: `content` is not a whole number of records, or has a label above 9.
    """
    if len(content) == 0 or len(content) % _RECORD_BYTES:
        raise InputError(
            f"{path} must be whole records of {_RECORD_BYTES} bytes (1 label, 3072 pixels); "
            f"got {len(content)} bytes, {len(content) % _RECORD_BYTES} of them left over"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
    highest = int(records[:, 0].max())
    if highest >= _CLASSES:
        raise InputError(f"{path} must have labels 0 to {_CLASSES - 1}; got {highest}")
    images = torch.from_numpy(records[:, 1:].copy()).view(-1, 3, 32, 32)
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def unpack(archive: Path, into: Path) -> Path:
    """Unpack the batch files of an archive, packed by gzip or xz, to `into / FOLDER`, whole or not at all.

    Only files of the expected names are written, below a temporary folder that is renamed when all of them
    have the right checksum. An archive that was unpacked there before, and is unchanged since, is not read again.

    Returns:
        The folder; where another process was faster, the one it made.

    Raises:
        InputError: the archive is damaged, is the python version, lacks a file, holds one that does not
            belong; or it cannot be read, or `into` not be written.
    """
    try:
        about, origin = archive.stat(), into / FOLDER / _ORIGIN
        told = f"{archive.resolve()} {about.st_size} {about.st_mtime_ns}"
        if not (origin.is_file() and origin.read_bytes() == os.fsencode(told)):
            into.mkdir(parents=True, exist_ok=True)
            _unpack(archive, into)
            origin.write_bytes(os.fsencode(told))
        return into / FOLDER
    except OSError as error:
        raise InputError(f"{archive} must be readable, and {into} writable to unpack it to; got: {error}") from error


def _unpacked_folder(data_dir: DataDir) -> Path:
    """Where CIFAR-10 is unpacked, after unpacking or downloading it if need be."""
    into, python_version = cache_dir() / SOURCE.name, list[InputError]()
    for folders in download.roots(SOURCE, data_dir):
        folder = find_folder(folders)
        if folder is not None:
            return folder
        try:
            archive = find_archive(folders)
        except InputError as error:
            python_version.append(error)
        else:
            if archive is not None:
                return unpack(archive, into)
    if python_version:
        raise python_version[0]
    name = ARCHIVES[0]
    return download.from_mirrors(SOURCE, name, lambda path: unpack(path, into), wanted=[name], data_dir=data_dir)


class _AtMost:
    """A file from which at most so many bytes are read, as those that an archive unpacks to."""

    def __init__(self, file: Readable, most: int, path: Path) -> None:
        self._file, self._most, self._path, self._read = file, most, path, 0

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._read += len(content)
        if self._read > self._most:
            raise InputError(f"{self._path} must hold at most {self._most:,} bytes unpacked; got more")
        return content


def _unpack(archive: Path, into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into) as temporary:
        folder = Path(temporary) / FOLDER
        folder.mkdir()
        try:
            with archive.open("rb") as packed:
                unpacker = next((one for magic, one in _UNPACKERS.items() if packed.peek(2).startswith(magic)), None)
                if unpacker is None:
                    raise tarfile.ReadError("neither gzip nor xz")
                stream = _AtMost(unpacker(packed), _TAR_BYTES, archive)
                with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                    for member in tar:
                        _unpack_member(archive, tar, member, folder)
        except (tarfile.TarError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(
                f"{archive} must be a whole tar archive packed by gzip or xz; got a damaged one ({error})"
            ) from error
        missing = [name for name in SHA256 if not (folder / name).exists()]
        if missing:
            raise InputError(f"{archive} must hold {', '.join(SHA256)}; got none of the name {missing[0]}")
        try:
            folder.rename(into / FOLDER)
        except OSError:
            if not (into / FOLDER).is_dir():
                raise


def _unpack_member(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = member.name.removeprefix("./")
    top, _, file = name.partition("/")
    if top == _PYTHON_VERSION[0]:
        raise InputError(f"{archive} must be the binary version of CIFAR-10; got the python version, with {name}")
    if member.isdir() and name in (".", "", FOLDER):
        return
    if top != FOLDER or file not in (*SHA256, *_OTHER_MEMBERS) or not member.isreg():
        raise InputError(f"{archive} must hold regular files of CIFAR-10 in {FOLDER}/ only; got {member.name}")
    if file not in SHA256:
        return
    path = f"{archive}: {name}"
    if member.size > _BATCH_BYTES:
        raise InputError(f"{path} must have {_BATCH_BYTES} bytes; got {member.size}")
    data = tar.extractfile(member)
    assert data is not None  # a regular file
    content = data.read()
    _check(content, file, path)
    (folder / file).write_bytes(content)


def _check(content: bytes, name: str, path: str | os.PathLike[str]) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != SHA256[name]:
        raise InputError(f"{path} must have the SHA-256 {SHA256[name]}; got {actual}")


def _files(data_dir: DataDir) -> dict[str, Sequence[Path]]:
    places = download.places(SOURCE, data_dir)
    folder = find_folder(places)
    return {ARCHIVES[0]: [folder] if folder else download.locate(places, ARCHIVES)[:1]}


ENTRY = Entry(
    name="cifar10",
    image_shape=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    train=50_000,
    test=10_000,
    licence="not stated by its authors",
    source="cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    read=read,
    files=_files,
)
