"""IDX files, the format of MNIST and its relatives: bytes in, whole uint8 tensors out.

A file starts with two zero bytes, a type code (8: unsigned byte) and the number of dimensions; then the size
of each dimension as a big-endian 32-bit number; then the values, row by row. Source: "The IDX file format" in
LeCun, Cortes and Burges, "The MNIST database of handwritten digits", http://yann.lecun.com/exdb/mnist/.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from capsnet.errors import InputError
from capsnet.files import read_up_to

__all__ = ["parse_images", "parse_labels", "read_images", "read_labels", "unpacked"]

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
LARGEST = 2**31
"""Bytes of the largest file of a data set, affNIST's, are about a third of this."""


def read_images(path: str | os.PathLike[str]) -> UInt8[Tensor, "images 1 height width"]:
    """The images of an IDX file, raw or packed by gzip, intensities 0..255.

    Raises:
        InputError: the file is unreadable, damaged, or no IDX file of unsigned bytes with 3 dimensions.

    Example:
        >>> read_images("mnist/t10k-images-idx3-ubyte.gz").shape  # [10000, 1, 28, 28]
    """
    return parse_images(unpacked(path), path)


def read_labels(path: str | os.PathLike[str]) -> Int64[Tensor, " labels"]:
    """The labels of an IDX file, raw or packed by gzip, each 0..255.

    Raises:
        InputError: the file is unreadable, damaged, or no IDX file of unsigned bytes with 1 dimension.
    """
    return parse_labels(unpacked(path), path)


def parse_images(content: bytes, path: str | os.PathLike[str]) -> UInt8[Tensor, "images 1 height width"]:
    """The images in `content`, an unpacked IDX file; `path` only names it in errors.

    Raises:
        InputError: `content` is no IDX file of unsigned bytes with 3 dimensions.
    """
    values, (images, height, width) = _parse(content, path, kind="images", dimensions=3)
    return torch.from_numpy(values).view(images, 1, height, width)


def parse_labels(content: bytes, path: str | os.PathLike[str]) -> Int64[Tensor, " labels"]:
    """The labels in `content`, an unpacked IDX file; `path` only names it in errors.

    Raises:
        InputError: `content` is no IDX file of unsigned bytes with 1 dimension.
    """
    values, _ = _parse(content, path, kind="labels", dimensions=1)
    return torch.from_numpy(values).long()


def unpacked(path: str | os.PathLike[str], *, most: int = LARGEST) -> bytes:
    """The content of a file, unpacked where its first two bytes, not its name, say that it is gzip.

    Args:
        path: of the file.
        most: bytes that the content can rightly have; no more are unpacked.

    Raises:
        InputError: the file cannot be read, is a gzip file cut short or damaged, or holds more.
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


def _parse(
    content: bytes, path: str | os.PathLike[str], *, kind: str, dimensions: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The values as a writable flat uint8 array, and the size of each dimension."""
    head = content[:4]
    if len(head) < 4 or head[:2] != b"\x00\x00":
        raise InputError(
            f"{path} must be an IDX file, raw or packed by gzip, and start with 00 00; "
            f"got {head.hex(' ') or 'an empty file'}"
        )
    if head[2] != _UNSIGNED_BYTE:
        raise InputError(f"{path} must hold unsigned bytes, IDX type code 0x{_UNSIGNED_BYTE:02x}; got 0x{head[2]:02x}")
    if head[3] != dimensions:
        raise InputError(f"{path} must hold {kind}, with dimensions: {dimensions}; got {head[3]}")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise InputError(f"{path} must have a header of {start} bytes; got a file of {len(content)}")
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if 0 in sizes:
        raise InputError(f"{path} must hold at least one value; got dimensions {list(sizes)}")
    wanted = start + math.prod(sizes)
    if len(content) != wanted:
        fault = "too short" if len(content) < wanted else "with trailing bytes"
        raise InputError(
            f"{path} must have {wanted} bytes for {kind} of {list(sizes)}; got {len(content)}, a file {fault}"
        )
    return np.frombuffer(content, np.uint8, offset=start).copy(), sizes
