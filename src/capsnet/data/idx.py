"""IDX files, the format of MNIST and its relatives: bytes in, whole uint8 tensors out.

A file starts with two zero bytes, a type code (8: unsigned byte) and the number of dimensions; then the size
of each dimension as a big-endian 32-bit number; then the values, row by row. Source: "The IDX file format" in
LeCun, Cortes and Burges, "The MNIST database of handwritten digits", http://yann.lecun.com/exdb/mnist/.
"""

import math
import os
import struct

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from capsnet.data import download
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir, Source
from capsnet.data.registry import checksums
from capsnet.errors import InputError

__all__ = ["FILES", "MNIST_BYTES", "parse_images", "parse_labels", "read"]

_UNSIGNED_BYTE = 0x08
MNIST_BYTES = 16 + 60_000 * 28 * 28
"""Of the training images of MNIST and its kind, with their header."""
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Of MNIST and its kind: images and labels of each split."""


def read(
    source: Source,
    split: str,
    *,
    data_dir: DataDir = None,
    shape: tuple[int, ...] | None = None,
    of_each: int | None = None,
    side: int = 0,
    seed: int = 0,
) -> Split:
    """One split of MNIST or its kind, `train` or `test`, downloaded where need be.

    Sets of this kind share the names of `FILES`. As a checksum may not be known, the `shape` of all images and the
    number `of_each` label are checked where they are given.

    Raises:
        InputError: a file is not here and not to be had, has a wrong checksum or other counts, or is not what its
            parser wants.
    """
    found = download.contents(source, FILES[split], data_dir, known=checksums())
    (images_path, images), (labels_path, labels) = (found[file] for file in FILES[split])
    whole = Split(parse_images(images, images_path), parse_labels(labels, labels_path))
    if shape is not None and whole.images.shape != shape:
        raise InputError(f"{images_path} must hold images of {shape}; got {tuple(whole.images.shape)}")
    counts = whole.labels.bincount().tolist()
    if of_each is not None and {*counts} != {of_each}:
        raise InputError(f"{labels_path} must hold {of_each} labels of each class; got {counts}")
    return whole


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
