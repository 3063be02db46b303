"""smallNORB, photographs of toys by two cameras: the official binary matrix files, raw or packed by gzip.

A file starts with a magic number, which says the type of its values, and the number of dimensions; then the size of
each dimension, of which at least three are written, those beyond the number being 1; then the values, the last
dimension running fastest; all numbers but the bytes of images are of 4 bytes, little endian. A split has three such
files: `dat`, `[N, 2, 96, 96]`, both cameras' images; `cat`, the classes `[N]`; `info`, the pose `[N, 4]`. Source:
https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/; LeCun, Huang, Bottou, "Learning Methods for Generic Object Recognition
with Invariance to Pose and Lighting", CVPR 2004.
"""

import math
import os
import struct
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from capsnet.data import download
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir, Source
from capsnet.data.registry import Entry
from capsnet.errors import InputError

__all__ = ["CLASSES", "ENTRY", "FILES", "PAIRS", "SOURCE", "parse_factors", "parse_images", "parse_labels", "read"]

CLASSES = ("four-legged animal", "human figure", "airplane", "truck", "car")
PAIRS = 24_300  # in each split: 5 classes, 5 instances, 9 elevations, 18 azimuths, 6 lightings
FILES = {
    split: tuple(f"smallnorb-5x{instances}x9x18x6x2x96x96-{name}-{kind}.mat" for kind in ("dat", "cat", "info"))
    for split, name, instances in (("train", "training", "46789"), ("test", "testing", "01235"))
}
SOURCE = Source(
    name="smallnorb",
    files={file: None for files in FILES.values() for file in files},  # unpacked, a file is checked by its counts only
    # Of the published .gz, as TensorFlow Datasets records them (tensorflow/datasets,
    # tensorflow_datasets/datasets/smallnorb/checksums.tsv); never checked by us against the files.
    packed=dict(
        zip(
            (file for files in FILES.values() for file in files),
            (
                "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
                "2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa",
                "de7eb932ebe7a4ee16217fead60660d0eb3d23632c2f4d1c51f88c501c17bf32",
                "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
                "ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff",
                "16adf314226327ee006d1a44db8cfef52773c06c829951d5653a9f6f310248a2",
            ),
            strict=True,
        )
    ),
    mirrors=("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",),
    most=24 + PAIRS * 2 * 96 * 96,
)
_MAGIC = {np.dtype(np.uint8): 0x1E3D4C55, np.dtype("<i4"): 0x1E3D4C54}
_LEAST_SIZES = 3


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The split `train` or `test`, 24,300 pairs of images each, of different toys, downloaded where need be.

    Returns:
        Images `uint8 [N, 2, 96, 96]`, left camera first; `factors` as of `parse_factors`.

    Raises:
        InputError: a file is not here and not to be had, has a wrong checksum, is not what its parser wants, or has
            other counts than the official one.
    """
    found = download.contents(SOURCE, FILES[split], data_dir)
    (dat, dat_content), (cat, cat_content), (info, info_content) = (found[file] for file in FILES[split])
    images, shape = parse_images(dat_content, dat), (PAIRS, *ENTRY.image_shape)
    if images.shape != shape:
        raise InputError(f"{dat} must hold images of {shape}; got {tuple(images.shape)}")
    labels = parse_labels(cat_content, cat)
    counts, each = labels.bincount(minlength=len(CLASSES)).tolist(), PAIRS // len(CLASSES)
    if counts != [each] * len(CLASSES):
        raise InputError(f"{cat} must hold {each} labels of each class; got {counts}")
    factors = parse_factors(info_content, info)
    if len(factors["instance"]) != PAIRS:
        raise InputError(f"{info} must hold the pose of {PAIRS} pairs; got {len(factors['instance'])}")
    return Split(images, labels, factors)


def parse_images(content: bytes, path: str | os.PathLike[str]) -> UInt8[Tensor, "pairs cameras height width"]:
    """The images of a `dat` file, intensities 0..255; `path` only names it in errors.

    Raises:
        InputError: `content` is no binary matrix of bytes with 4 dimensions, or is cut short.
    """
    return torch.from_numpy(_parse(content, path, dtype=np.dtype(np.uint8), dimensions=4))


def parse_labels(content: bytes, path: str | os.PathLike[str]) -> Int64[Tensor, " pairs"]:
    """The classes of a `cat` file, each an index into `CLASSES`.

    Raises:
        InputError: `content` is no binary matrix of whole numbers with 1 dimension, is cut short, or has another class.
    """
    labels = torch.from_numpy(_parse(content, path, dtype=np.dtype("<i4"), dimensions=1)).long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(CLASSES):
        raise InputError(f"{path} must have classes 0 to {len(CLASSES) - 1}; got {low} to {high}")
    return labels


def parse_factors(content: bytes, path: str | os.PathLike[str]) -> dict[str, Float32[Tensor, " pairs"]]:
    """The pose in an `info` file.

    Returns:
        `instance`: which toy of its class, 0 to 9; `elevation_degrees`: of the cameras, 30 to 70 by 5;
        `azimuth_degrees`: 0 to 340 by 20, from a zero of each toy's own; `lighting`: which of six, 0 to 5.

    Raises:
        InputError: `content` is no binary matrix of whole numbers `[N, 4]`, or is cut short.
    """
    rows = _parse(content, path, dtype=np.dtype("<i4"), dimensions=2)
    if rows.shape[1] != 4:
        raise InputError(f"{path} must hold 4 numbers for each pair; got {rows.shape[1]}")
    instance, elevation, azimuth, lighting = torch.from_numpy(rows).float().T.contiguous()
    return {
        "instance": instance,
        "elevation_degrees": 30 + 5 * elevation,
        "azimuth_degrees": 10 * azimuth,
        "lighting": lighting,
    }


def _parse(content: bytes, path: str | os.PathLike[str], *, dtype: np.dtype, dimensions: int) -> np.ndarray:
    """The values as a writable array."""
    start = 8 + 4 * max(dimensions, _LEAST_SIZES)
    if len(content) < start:
        raise InputError(f"{path} must have a header of {start} bytes; got a file of {len(content)}")
    magic, found = struct.unpack("<Ii", content[:8])
    if magic != _MAGIC[dtype]:
        raise InputError(f"{path} must start with 0x{_MAGIC[dtype]:08X}, a matrix of {dtype.name}; got 0x{magic:08X}")
    if found != dimensions:
        raise InputError(f"{path} must have {dimensions} dimensions; got {found}")
    sizes = struct.unpack(f"<{dimensions}i", content[8 : 8 + 4 * dimensions])
    if min(sizes) < 1:
        raise InputError(f"{path} must hold at least one value; got dimensions {list(sizes)}")
    wanted = start + math.prod(sizes) * dtype.itemsize
    if len(content) != wanted:
        raise InputError(f"{path} must have {wanted} bytes for {list(sizes)} values; got {len(content)}")
    return np.frombuffer(content, dtype, offset=start).reshape(sizes).copy()


ENTRY = Entry(
    name="smallnorb",
    image_shape=(2, 96, 96),
    classes=CLASSES,
    train=PAIRS,
    test=PAIRS,
    licence="for research purposes, not to be sold",
    source="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/; cite LeCun, Huang, Bottou, Learning Methods for "
    "Generic Object Recognition with Invariance to Pose and Lighting, CVPR 2004",
    read=read,
    files=partial(download.here, SOURCE),
)
