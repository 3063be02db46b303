"""A data set without its images: what is known before they are read."""

import os

import torch
from torch import Tensor

from capsnet.data import describe, fitting_shape, image_cache, load
from capsnet.data.dataset import Dataset, Split, check_memory
from capsnet.data.image_file import Resize
from capsnet.data.image_folder import ImageFolder
from capsnet.data.preprocessing import Preprocessing

__all__ = ["is_outline", "nbytes", "of_folder", "of_registered"]


def of_registered(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | str | None = None,
    resize: Resize | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Dataset:
    """What `data.load` makes of a registered name and the same arguments, with images on the `meta` device.

    Labels are of as many classes, but not the true ones. A set whose files are not on this machine is loaded.

    Raises:
        InputError: as `data.load`.
    """
    about = describe(name, data_dir=data_dir)
    if about.missing:
        return load(name, data_dir=data_dir, image_size=image_size, resize=resize, channels=channels, seed=seed)
    shape = fitting_shape(about, image_size, channels, seed)
    check_memory(sum(about.counts.values()), shape)
    classes, objects = len(about.classes), about.objects_per_image
    splits = {name: Split(_images(count, shape), torch.arange(count) % classes) for name, count in about.counts.items()}
    if objects > 1:
        shown = (torch.arange(about.test)[:, None] + torch.arange(objects)) % classes
        splits["test"] = Split(_images(about.test, shape), shown, single_images=_images(about.test, (objects, *shape)))
    return about.dataset(splits)


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


def _images(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(count, *shape, dtype=torch.uint8, device="meta")
