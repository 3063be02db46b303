"""SVHN, digits of house numbers in photographs: the official files of cropped digits, of MATLAB's format.

A file holds `X`, `uint8 [32, 32, 3, N]` (row, column, colour, image), and `y`, `uint8 [N, 1]`, in which 10 means the
digit 0. Source: http://ufldl.stanford.edu/housenumbers/, "Format 2"; Netzer, Wang, Coates, Bissacco, Wu, Ng, "Reading
Digits in Natural Images with Unsupervised Feature Learning", NIPS workshop 2011. The further `extra_32x32.mat` is not
used.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from capsnet.data import download
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir, Source
from capsnet.data.matlab import variables
from capsnet.data.registry import Entry
from capsnet.errors import InputError
from capsnet.files import cache_dir

__all__ = ["ENTRY", "FILES", "SOURCE", "parse", "read"]

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
SOURCE = Source(
    name="svhn",
    files={
        # As torchvision records them (pytorch/vision, torchvision/prototype/datasets/_builtin/svhn.py); never checked
        # by us against the files. None switches the check off.
        "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    },
    mirrors=("http://ufldl.stanford.edu/housenumbers/",),
    most=2**28,
)
_CLASSES = 10


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The split `train` or `test`, downloaded where need be.

    Raises:
        InputError: the file is not here and not to be had, has a wrong checksum, or is not what `parse` wants.
    """
    name = FILES[split]
    if not download.locate(download.places(SOURCE, data_dir), (name, f"{name}.gz")):
        download.from_mirrors(SOURCE, name, _keep, wanted=[name], data_dir=data_dir)
    path, content = download.contents(SOURCE, [name], data_dir)[name]
    return Split(*parse(content, path))


def parse(
    content: bytes, path: str | os.PathLike[str]
) -> tuple[UInt8[Tensor, "images 3 height width"], Int64[Tensor, " images"]]:
    """Images (intensities 0..255) and labels (0..9) of one file; `path` only names it in errors.

    Raises:
        InputError: see `matlab.variables`; or `X` or `y` has another type, shape or value than the official files.
    """
    found = variables(content, path, ("X", "y"))
    pixels, digits = found["X"], found["y"].reshape(-1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3:
        raise InputError(f"{path} must hold X, uint8 [height, width, 3, N]; got {pixels.dtype} {list(pixels.shape)}")
    if len(digits) != pixels.shape[3] or digits.dtype.kind not in "ui":
        raise InputError(
            f"{path} must hold y, a whole number for each of the {pixels.shape[3]} images; "
            f"got {digits.dtype} {list(found['y'].shape)}"
        )
    if len(digits) and not 1 <= digits.min() <= digits.max() <= _CLASSES:
        raise InputError(f"{path} must have labels 1 to {_CLASSES} in y; got {digits.min()} to {digits.max()}")
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(digits.astype(np.int64) % _CLASSES)


def _keep(path: Path) -> None:
    """Move a download into the cache if its checksum is right."""
    expected, actual = SOURCE.files[path.name], download.sha256_of(path)
    if expected is not None and actual != expected:
        raise InputError(f"{path.name} must have the SHA-256 {expected}; got {actual}")
    path.replace(cache_dir() / SOURCE.name / path.name)


ENTRY = Entry(
    name="svhn",
    image_shape=(3, 32, 32),
    classes=tuple("0123456789"),
    train=73_257,
    test=26_032,
    licence="for non-commercial use only",
    source="http://ufldl.stanford.edu/housenumbers/, cropped digits; cite Netzer et al., Reading Digits in Natural "
    "Images with Unsupervised Feature Learning, NIPS workshop 2011",
    read=read,
    files=partial(download.here, SOURCE, packing=""),  # as published
)
