"""A data set without its images: what is known before they are read."""

import os

import torch
from torch import Tensor

from capsnet.config import size_of
from capsnet.data import PLACED, available, describe, image_cache, load, placed_shift, sides
from capsnet.data.dataset import Dataset, Split, check_memory
from capsnet.data.image_folder import ImageFolder
from capsnet.data.multimnist import SHIFT
from capsnet.data.preprocessing import Preprocessing
from capsnet.data.strokes import VALIDATION, strokes

__all__ = ["is_outline", "nbytes", "of_folder", "of_registered"]


def of_registered(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | str | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Dataset:
    """What `data.load` makes of a registered name and the same arguments, with images on the `meta` device.

    Labels are of as many classes, but not the true ones. A set whose files are not on this machine is loaded.

    Raises:
        InputError: as `data.load`.
    """
    about = describe(name, data_dir=data_dir) if name in available() else None
    odd = about and about.image_shape[0] == 2 and channels is not None
    if about is None or about.missing or odd or (image_size is not None and size_of(image_size) is None):
        return load(name, data_dir=data_dir, image_size=image_size, channels=channels, seed=seed)
    height, width = sides(name, image_size, channels)
    shape = (channels or about.image_shape[0], height, width)
    held_out = None
    if name == "strokes":
        strokes(train=1, validation=0, test=1, image_size=min(height, 28), seed=seed)  # refuses what they cannot be
        held_out = _split(VALIDATION, shape, len(about.classes))
    if name == "multimnist":
        first = _labels(about.test, len(about.classes))
        both = torch.stack([first, (first + 1) % len(about.classes)], dim=1)
        test = Split(_images(about.test, shape), both, single_images=_images(about.test, (2, *shape)))
        return Dataset(name, about.classes, _split(about.train, shape, 10), test, shift=SHIFT, objects_per_image=2)
    train, test = (_split(count, shape, len(about.classes)) for count in (about.train, about.test))
    check_memory(sum(len(split) for split in (train, test, held_out) if split), shape)
    if name in PLACED:
        return Dataset(name, about.classes, train, test, shift=placed_shift(height, width), placed=True)
    return Dataset(name, about.classes, train, test, held_out)


def of_folder(folder: ImageFolder, preprocessing: Preprocessing) -> Dataset:
    """What `folder.read(preprocessing)` makes, with images on the `meta` device.

    Raises:
        InputError: no images to train on or to test.
    """
    splits = {}
    for name in ("train", "validation", "test"):
        labels = torch.tensor([file.label for file in folder.of(name)], dtype=torch.int64)
        if len(labels):
            splits[name] = Split(_images(len(labels), preprocessing.image_shape), labels)
    return folder.dataset(splits, preprocessing)


def nbytes(dataset: Dataset) -> int:
    """Bytes of memory that the images will take which a data set lacks; those that are to be mapped take none."""
    splits = [split for split in (dataset.train, dataset.validation, dataset.test) if split is not None]
    arrays = [array for split in splits for array in (split.images, split.single_images) if array is not None]
    size = sum(array.nbytes for array in arrays if array.is_meta)
    return 0 if dataset.files and size > image_cache.IN_MEMORY else size


def is_outline(dataset: Dataset) -> bool:
    """Whether a data set lacks its images."""
    return dataset.train.images.is_meta


def _split(count: int, shape: tuple[int, ...], classes: int) -> Split:
    return Split(_images(count, shape), _labels(count, classes))


def _images(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(count, *shape, dtype=torch.uint8, device="meta")


def _labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) % classes
