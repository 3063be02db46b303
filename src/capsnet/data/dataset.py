"""What a data set is here: whole splits of uint8 images in memory. Readers make these; nothing in this file reads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from capsnet.data.augment import Augmentation, centre_crop, move
from capsnet.data.image_file import Header
from capsnet.data.overlay import pairs
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import InputError

__all__ = ["Dataset", "ImageFile", "Split", "check_memory", "stratified", "to_float"]

MAX_BYTES = 8 * 2**30
"""Of the images of a data set, all of which are held in memory."""


def check_memory(count: int, shape: tuple[int, ...]) -> None:
    """Raise InputError unless so many images of this shape fit into `MAX_BYTES`."""
    if count * math.prod(shape) > MAX_BYTES:
        size = " x ".join(map(str, shape))
        raise InputError(f"images must fit into {MAX_BYTES >> 30} GiB (see --image-size); got {count:,} of {size}")


class ImageFile(NamedTuple):
    """An image of a folder or a table."""

    path: str  # from the folder on, with `/`; or absolute, in a table
    label: int  # number of its class
    split: str  # `train`, `validation` or `test`; empty where it is still to be divided, `unused` where none wants it
    hash: str  # BLAKE2b of its content, 32 hexadecimal digits
    header: Header  # what it tells before it is decoded
    group: str = ""  # images of one group belong to one split; empty for an image of its own


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        images: `uint8 [N, C, H, W]`, intensities 0..255.
        labels: `int64 [N]`, each in `[0, number of classes)`; `[N, k]` where every image shows k objects.
        factors: true pose parameters by name, `float32 [N]` each, where a data set knows them (`strokes`): the unit
            is part of the name, as in `slant_degrees`.
        single_images: each of k objects alone, `uint8 [N, k, C, H, W]`, where `labels` are `[N, k]`.

    Raises:
        InputError: an array of another type or shape, or counts that differ.

    Examples:
        >>> images, labels = torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6) % 3
        >>> len(Split(images, labels))
        6
    """

    images: Tensor
    labels: Tensor
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    single_images: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(f"images must be uint8 [N, C, H, W]; got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim not in (1, 2):
            raise InputError(f"labels must be int64 [N] or [N, k]; got {self.labels.dtype} {list(self.labels.shape)}")
        got = None if self.single_images is None else list(self.single_images.shape)
        if got != (None if self.labels.ndim == 1 else [*self.labels.shape, *self.images.shape[1:]]):
            raise InputError(
                f"single_images must be [N, k, C, H, W] where labels are [N, k], and absent elsewhere; got {got}"
            )
        for name, values in {"labels": self.labels, **self.factors}.items():
            if len(values) != len(self.images):
                raise InputError(f"{name} must be as many as the {len(self.images)} images; got {len(values)}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """The examples at `index` (`int64 [M]`), in that order."""
        factors = {name: values[index] for name, values in self.factors.items()}
        single_images = None if self.single_images is None else self.single_images[index]
        return Split(self.images[index], self.labels[index], factors, single_images)

    def cropped(self, size: int) -> "Split":
        """The central `size` x `size` pixels of every image.

        Raises:
            InputError: images smaller than that.
        """
        single_images = None if self.single_images is None else centre_crop(self.single_images, size)
        return replace(self, images=centre_crop(self.images, size), single_images=single_images)

    def paired(self, *, shift: int, seed: int) -> "Split":
        """Each image laid once over one of another class, see `overlay.pairs`."""
        images, labels, single_images = pairs(self.images, self.labels, shift=shift, seed=seed)
        return Split(images, labels, single_images=single_images)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set: train and test, and a validation split where the data set brings its own.

    Attributes:
        name: as given to `--data`.
        classes: the names of the classes, in the order of the labels.
        train: the training split.
        test: the test split; read once, at the end of a run.
        validation: None where a part of `train` has to serve, see `with_validation`.
        shift: how far a training moves its images, in pixels, unless it is told otherwise.
        objects_per_image: number of objects in an image, 1 or 2. With 2, a training lays its images over each other
            anew in every step, so those of `train` show one each, and those of the other splits two.
        crop: side in pixels of the random square that a training cuts out of each image, anew in every step; the other
            splits hold the central one. None where images are used whole.
        placed: whether images held out for validation are moved once by up to `shift`, as those of the test are.
        tested: what `test` is: "validation" where a folder has train/ and val/ but no test/.
        files: of a folder, those that were read, those of each split in the order of its images, and unused ones.
        preprocessing: how they were read; without `crop`.
        notes: what is to be told of how they were read.

    Raises:
        InputError: a label outside `[0, len(classes))`, a split without images, splits that differ in shape, an image
            that shows one class twice, or pairs of images that are all of one class.

    Examples:
        >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        >>> split = Split(images, torch.tensor([0, 1, 0, 1]))
        >>> Dataset("mine", ("dark", "light"), train=split, test=split).image_shape
        (1, 8, 8)
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None
    shift: int = 2
    objects_per_image: int = 1
    crop: int | None = None
    placed: bool = False
    tested: Literal["test", "validation"] = "test"
    files: tuple[ImageFile, ...] = ()
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def need(holds: bool, rule: str) -> None:
            if not holds:
                raise InputError(f"data set {self.name}: {rule}")

        need(self.objects_per_image in (1, 2), f"objects_per_image must be 1 or 2; got {self.objects_per_image}")
        for name in ("train", "validation", "test"):
            split: Split | None = getattr(self, name)
            if split is None:
                continue
            need(len(split) > 0, f"the {name} split must hold at least one image; got none")
            low, high, most = int(split.labels.min()), int(split.labels.max()), len(self.classes) - 1
            need(low >= 0 and high <= most, f"labels of the {name} split must be 0 to {most}; got {low} to {high}")
            shape, wanted = tuple(split.images.shape[1:]), self.image_shape
            fits = name == "train" or shape == wanted
            need(fits, f"{name} images must be {wanted} as the training images; got {shape}")
            objects, shown = split.labels[0].numel(), 1 if name == "train" else self.objects_per_image
            need(objects == shown, f"{name} images must show {shown} object{'s' * (shown > 1)} each; got {objects}")
            differ = shown == 1 or not bool((split.labels[:, 0] == split.labels[:, 1]).any())
            need(differ, f"{name} images must show objects of different classes; got one class twice")
            paired = shown == self.objects_per_image or low < high
            need(paired, f"training images to be paired must be of at least 2 classes; got {len(split)} of one class")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image as a network sees it."""
        channels, height, width = self.train.images.shape[1:]
        return (channels, height, width) if self.crop is None else (channels, self.crop, self.crop)

    def names(self, split: str) -> tuple[str, ...]:
        """What the images of a split are called, in their order: their files, or where there are none their numbers."""
        count, of = len(getattr(self, split)), self.tested if split == "test" else split
        files = tuple(file.path for file in self.files if file.split == of)
        return files if len(files) == count else tuple(map(str, range(count)))

    def shown(self, name: str) -> Split | None:
        """The split `train`, `validation` or `test` as a network sees it outside of training: whole, or cropped.

        Training images of a set of pairs show one object each.
        """
        split: Split | None = getattr(self, name)
        return split.cropped(self.crop) if split and name == "train" and self.crop else split

    def cropped(self, size: int) -> "Dataset":
        """The same with random squares of `size` x `size` pixels for training, and the central one elsewhere.

        Raises:
            InputError: images smaller than that.
        """
        validation = self.validation and self.validation.cropped(size)
        return replace(self, test=self.test.cropped(size), validation=validation, crop=size)

    def with_train(self, count: int, *, seed: int, shares: bool = True) -> "Dataset":
        """The same with `count` random training images only, of each class its share.

        The same seed always chooses the same, and fewer are among more. Without `shares` they are chosen from all
        classes together, as runs without a manifest did.

        Raises:
            InputError: there are not so many.
        """
        if not 0 < count <= len(self.train):
            raise InputError(f"train_images must be 1 to the {len(self.train)} there are; got {count}")
        chosen = _chosen(self.train.labels, count, seed=seed, shares=shares)
        train = self.train.take(chosen.sort().values)
        without = len(self.classes) - int((train.labels.bincount() > 0).sum())
        notes = (f"{without} of {len(self.classes)} classes have no training image",) if without else ()
        return replace(self, train=train, files=(), notes=(*self.notes, *notes))

    def with_validation(self, count: int, *, seed: int, shares: bool = True) -> "Dataset":
        """Split `count` random images off the training split as validation, of each class its share.

        With 0 there is no validation split, not even the data set's own. `seed` and `shares` are as in `with_train`.

        Raises:
            InputError: `count` leaves nothing to train on.
        """
        if count == 0:
            return replace(self, validation=None, files=())
        if not 0 < count < len(self.train):
            raise InputError(
                f"validation must be 0 to {len(self.train) - 1} of the {len(self.train)} training images; got {count}"
            )
        order = _chosen(self.train.labels, count, seed=seed, shares=shares, held_out=True)
        kept = torch.ones(len(self.train), dtype=torch.bool).index_fill_(0, order, False).nonzero().flatten()
        held_out = order.sort().values
        validation = self.train.take(held_out)
        if self.objects_per_image > 1:
            validation = validation.paired(shift=self.shift, seed=seed)
        elif self.placed:
            drawn = Augmentation(shift=self.shift).draw(count, generator=torch.Generator().manual_seed(seed))
            validation = replace(validation, images=move(validation.images, drawn))
        if self.crop:
            validation = validation.cropped(self.crop)
        return replace(self, train=self.train.take(kept), validation=validation, files=())


def to_float(images: Tensor) -> Tensor:
    """`uint8` intensities 0..255 as `float32` in [0, 1]."""
    return images.float().div_(255)


def stratified(labels: Tensor, count: int, *, seed: int, held_out: bool = False) -> Tensor:
    """`count` random places, of each class its share; the same seed always chooses the same, and fewer are among more.

    Labels are `int64 [N]`, places `int64 [count]`. Of each class one comes first, or, if `held_out`, one is left.

    Raises:
        InputError: there are not so many to choose from.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    of_each = sizes[labels[by_class]]
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    share = (rank + 0.5) / of_each  # of its class before it
    if held_out:
        by_class, share = by_class[rank < of_each - 1], share[rank < of_each - 1]
        if count > len(by_class):
            classes = int((sizes > 0).sum())
            raise InputError(
                f"validation must be 0 to {len(by_class)}, which leaves an image of each of {classes} classes to train "
                f"on; got {count}"
            )
    else:
        share = torch.where(rank == 0, 0.0, share)
    place = torch.empty(len(labels), dtype=torch.int64).index_put_((order,), torch.arange(len(labels)))
    mixed = place[by_class].argsort()  # where shares are equal, at random
    return by_class[mixed][share[mixed].argsort(stable=True)][:count]


def _chosen(labels: Tensor, count: int, *, seed: int, shares: bool, held_out: bool = False) -> Tensor:
    """Indices of `count` random images, of each class its share, or of all classes together."""
    if shares:
        return stratified(labels, count, seed=seed, held_out=held_out)
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
