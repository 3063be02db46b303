"""affNIST: MNIST digits under random affine transformations, for networks trained on expanded-mnist.

Section 5.2 of Sabour et al. 2017: "each example is an MNIST digit with a random small affine transformation".

affNIST is Tijmen Tieleman's, https://www.cs.toronto.edu/~tijmen/affNIST/. Its page says: images of 40 x 40 pixels,
MATLAB's format, 32 transformed versions of each MNIST image. The names of the files, the layout inside and the order of
an image's pixels are those that published readers agree on, among them TensorFlow Datasets (tensorflow/datasets,
tensorflow_datasets/image_classification/affnist.py): test.mat, or a file per version, 1.mat to 32.mat, in
test_batches/; in each a structure `affNISTdata` with `image`, `uint8 [1600, N]`, a column per image, row by row from
its top left; and `label_int`, `[1, N]`. No official file was at hand to check any of this.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from capsnet.data import download, idx
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir, Source
from capsnet.data.matlab import variables
from capsnet.data.sets import expanded_mnist, mnist
from capsnet.data.sets.expanded_mnist import SIZE
from capsnet.errors import InputError
from capsnet.files import unpacked

__all__ = ["ENTRY", "FILE", "SOURCE", "find", "parse", "read", "read_test"]

FILE = "test.mat"
"""The test set in one file."""
SOURCE = Source(name="affnist", files={FILE: None}, mirrors=())  # no checksum is known of what is in the zip
_BATCHES = "test_batches"


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The split `train` of expanded-mnist, or affNIST's test images."""
    if split == "train":
        return expanded_mnist.read(split, data_dir=data_dir)
    return read_test(download.places(SOURCE, data_dir))


def find(places: Sequence[Path]) -> list[Path]:
    """The files of affNIST's test set: the first test.mat, or the first folder of numbered batches; empty if none."""
    for place in places:
        if (place / FILE).is_file():
            return [place / FILE]
        for folder in (place / _BATCHES, place):
            batches = [path for path in folder.glob("*.mat") if path.stem.isdecimal()] if folder.is_dir() else []
            if batches:
                return sorted(batches, key=lambda path: int(path.stem))
    return []


def read_test(places: Sequence[Path]) -> Split:
    """The test set of affNIST, from one file or from all batches of a folder.

    Raises:
        InputError: it is in none of the `places`, or a file is not what `parse` wants.
    """
    paths = find(places)
    if not paths:
        raise InputError(
            f"data set affnist must be on this machine; missing: {FILE} or {_BATCHES}/, from "
            "https://www.cs.toronto.edu/~tijmen/affNIST/32x/transformed/test.mat.zip, unpacked; looked in: "
            f"{', '.join(map(str, places))}; put it into a directory and name that with --data-dir or CAPSNET_DATA, or "
            "use --data affnist-generated, which is made of MNIST and needs no such file"
        )
    images, labels = zip(*(parse(unpacked(path), path) for path in paths), strict=True)
    return Split(torch.cat(images) if len(images) > 1 else images[0], torch.cat(labels))


def parse(
    content: bytes, path: str | os.PathLike[str]
) -> tuple[UInt8[Tensor, "images 1 40 40"], Int64[Tensor, " images"]]:
    """Images (intensities 0..255) and labels (0..9) of one file of affNIST; `path` only names it in errors.

    Raises:
        InputError: see `matlab.variables`; or `affNISTdata` is no structure, or a field of it is missing or of another
            type, shape or value.
    """
    structure = variables(content, path, ("affNISTdata",))["affNISTdata"]
    names = structure.dtype.names or ()
    if structure.size != 1 or not {"image", "label_int"} <= set(names):
        raise InputError(
            f"{path} must hold affNISTdata with the fields image and label_int; got {', '.join(names) or 'none'}"
        )
    pixels, labels = (np.asarray(structure[name].item()) for name in ("image", "label_int"))
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or len(pixels) != SIZE**2:
        raise InputError(f"{path} must hold images of uint8 [{SIZE**2}, N]; got {pixels.dtype} {list(pixels.shape)}")
    if labels.size != pixels.shape[1] or labels.dtype.kind not in "uif":
        raise InputError(
            f"{path} must hold a label for each of the {pixels.shape[1]} images; "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise InputError(f"{path} must have labels 0 to 9; got {labels.min()} to {labels.max()}")
    images = torch.from_numpy(np.ascontiguousarray(pixels.T)).view(-1, 1, SIZE, SIZE)
    return images, torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _files(data_dir: DataDir) -> dict[str, Sequence[Path]]:
    digits = download.here(mnist.SOURCE, data_dir, files=idx.FILES["train"])
    return {**digits, FILE: find(download.places(SOURCE, data_dir))}


ENTRY = replace(
    expanded_mnist.ENTRY,
    name="affnist",
    test=320_000,
    licence="not stated by its author; training images as mnist",
    source="Tijmen Tieleman, https://www.cs.toronto.edu/~tijmen/affNIST/; trained on expanded-mnist and tested on "
    "affNIST; its test.mat is not downloaded but must be put in place",
    read=read,
    files=_files,
)
