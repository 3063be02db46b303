"""Data sets by name: `load("mnist")`, `load("strokes")`, `load("my/images")`.

A published set is read from this machine or downloaded, see `download.py`; strokes are drawn on the spot; a
directory, or a table of files, is read as one's own images, see `image_folder.py`; `dataset_of` takes what a program
holds.
"""

import os
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from capsnet.data.dataset import Dataset, Split, check_memory
from capsnet.data.download import DataDir
from capsnet.data.image_file import Resize, resized
from capsnet.data.in_memory import dataset_of
from capsnet.data.photo import channels_first
from capsnet.data.registry import Entry, available, entry
from capsnet.errors import InputError
from capsnet.files import is_own_images
from capsnet.options import size_of

__all__ = ["Dataset", "Entry", "Split", "available", "dataset_of", "describe", "is_own", "load", "load_split"]


def is_own(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of images of one's own, a folder or a table of them, and not of a published data set.

    Examples:
        >>> is_own("mnist")
        False
    """
    return name not in ("", *available()) and is_own_images(name)


def describe(name: str | os.PathLike[str], *, data_dir: DataDir = None) -> Entry:
    """What is known of a registered data set, and which of its files are on this machine; reads none of them.

    Raises:
        InputError: an unknown name, or a `data_dir` that is not a directory.

    Examples:
        >>> describe("mnist").classes[:3]
        ('0', '1', '2')
    """
    about = entry(name)
    found = about.files(data_dir)
    return replace(
        about,
        where=tuple(path for paths in found.values() for path in paths),
        missing=tuple(file for file, paths in found.items() if not paths),
    )


def load(
    name: str | os.PathLike[str],
    *,
    data_dir: DataDir = None,
    image_size: int | str | None = None,
    resize: Resize | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set by its registered name, or one's own images from a directory or a table.

    Args:
        name: one of `available()`, or else the path of a directory with a sub-directory per class (`./mnist`
            for one that is called as a registered set), or of a table of images, see `table.py`.
        data_dir: the only directory to look for the files in; without it CAPSNET_DATA, the cache and the mirrors.
            A damaged file is an error, and not passed over; see `download.py`. Of a table: where its names start from.
        image_size: side in pixels, or `"HEIGHTxWIDTH"`: strokes are drawn at it, others resized. None keeps what a
            published set has; a directory's images are then 32 x 32, unless all are of one size of at most 40 pixels a
            side.
        resize: what becomes of their proportions, `pad`, `crop` or `squash`, see `image_file.resized`. None pads those
            of a directory, and squashes those of a published set.
        channels: 1 for grey (luma of ITU-R BT.601), 3 for colour (grey repeated); None keeps what the set
            has, and nothing else will do for the two cameras of smallnorb.
        seed: of the strokes, and of the split of a directory without train/ and test/; others come split.

    Raises:
        InputError: an unknown name, a wrong argument, or files that are missing or not what they must be.

    Examples:
        >>> load("strokes").image_shape
        (1, 28, 28)
    """
    if is_own(name):
        from capsnet.data.image_folder import scan

        _check_shape(image_size, channels)
        folder = scan(name, data_dir=data_dir).divided(seed=seed)
        reading = folder.preprocessing(size=size_of(image_size), resize=resize, channels=channels)
        return folder.read(reading, channels=channels)
    about = entry(name)
    shape = fitting_shape(about, image_size, channels, seed)
    check_memory(sum(about.counts.values()), shape)
    read = partial(about.read, data_dir=data_dir, side=shape[1], seed=seed)
    return about.dataset(
        {split: _fit(read(split), shape, resize) for split in sorted(about.counts)}
    )  # affNIST's test first


def load_split(
    name: str,
    split: str,
    *,
    data_dir: DataDir = None,
    image_size: int | str | None = None,
    resize: Resize | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Split:
    """One split, `train`, `test` or, where it has one, `validation`, of a registered data set.

    The files of the other splits need not be there. All other arguments, and what is refused, are those of `load`.

    Examples:
        >>> load_split("strokes", "test").images.shape
        torch.Size([2000, 1, 28, 28])
    """
    about = entry(name)
    shape = fitting_shape(about, image_size, channels, seed)
    if split not in about.counts:
        raise InputError(f"split of {name} must be among {', '.join(about.counts)}; got {split}")
    check_memory(about.counts[split], shape)
    return _fit(about.read(split, data_dir=data_dir, side=shape[1], seed=seed), shape, resize)


def fitting_shape(
    about: Entry, image_size: int | str | None, channels: int | None, seed: int = 0
) -> tuple[int, int, int]:
    """Channels, height and width of a registered set's images at `image_size`.

    Raises:
        InputError: a shape or a seed that the set cannot have.
    """
    _check_shape(image_size, channels)
    has, *native = about.image_shape
    if channels is not None and has not in (1, 3):
        raise InputError(
            f"channels must be left out for {about.name}, whose images have {has}, one a camera; got {channels}"
        )
    height, width = size_of(image_size) or native
    about.check(channels or has, height, width, seed)
    return channels or has, height, width


def _fit(whole: Split, shape: tuple[int, int, int], resize: Resize | None = None) -> Split:
    """A split with images of another size or number of channels, as they would be read from files of them."""
    count, has, *native = whole.images.shape
    channels, *size = shape
    if (has, *native) == shape:
        return whole
    from PIL import Image

    images = torch.empty(count, *shape, dtype=torch.uint8)
    for k, image in enumerate(whole.images):
        planes = [image.permute(1, 2, 0).numpy()] if has == 3 else list(image.numpy())  # as many as cameras
        for plane, place in zip(planes, images[k].chunk(len(planes)), strict=True):
            one = Image.fromarray(plane)
            one = one.convert("L") if channels < has else one
            one = resized(one, (size[0], size[1]), resize or "squash") if size != native else one
            place.copy_(torch.from_numpy(channels_first(np.array(one), len(place))))
    return replace(whole, images=images)


def _check_shape(image_size: int | str | None, channels: int | None) -> None:
    if image_size is not None and size_of(image_size) is None:
        raise InputError(f"image_size must be pixels, at least 1, or HEIGHTxWIDTH; got {image_size}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour); got {channels}")
