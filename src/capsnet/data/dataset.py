"""What a data set is here: whole splits of uint8 images in memory. Readers make these; nothing in this file reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from capsnet.errors import InputError

__all__ = ["Dataset", "Split", "to_float"]


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        images: `uint8 [N, C, H, W]`, intensities 0..255.
        labels: `int64 [N]`, each in `[0, number of classes)`.
        factors: true pose parameters by name, `float32 [N]` each, where a data set knows them (`strokes`): the unit
            is part of the name, as in `slant_degrees`.

    Raises:
        InputError: an array of another type or shape, or counts that differ.
    """

    images: Tensor
    labels: Tensor
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(f"images must be uint8 [N, C, H, W]; got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise InputError(f"labels must be int64 [N]; got {self.labels.dtype} {list(self.labels.shape)}")
        for name, values in {"labels": self.labels, **self.factors}.items():
            if len(values) != len(self.images):
                raise InputError(f"{name} must be as many as the {len(self.images)} images; got {len(values)}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """The examples at `index` (`int64 [M]`), in that order."""
        factors = {name: values[index] for name, values in self.factors.items()}
        return Split(self.images[index], self.labels[index], factors)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set: train and test, and a validation split where the data set brings its own.

    Attributes:
        name: as given to `--data`.
        classes: the names of the classes, in the order of the labels.
        train: the training split.
        test: the test split; read once, at the end of a run.
        validation: None where a part of `train` has to serve, see `with_validation`.

    Raises:
        InputError: a label outside `[0, len(classes))`, a split without images, or splits that differ in shape.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            split: Split | None = getattr(self, name)
            if split is None:
                continue
            if len(split) == 0:
                raise InputError(f"data set {self.name}: the {name} split must hold at least one image; got none")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"data set {self.name}: labels of the {name} split must be 0 to {len(self.classes) - 1}; "
                    f"got {low} to {high}"
                )
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise InputError(
                    f"data set {self.name}: {name} images must be {self.image_shape} as the training images; "
                    f"got {tuple(split.images.shape[1:])}"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def with_validation(self, count: int, *, seed: int) -> "Dataset":
        """Split `count` random images off the training split as validation.

        Args:
            count: 0 to train on everything: then there is no validation split, not even the data set's own.
            seed: chooses the images; the same seed always chooses the same.

        Raises:
            InputError: `count` leaves nothing to train on.
        """
        if count == 0:
            return Dataset(self.name, self.classes, self.train, self.test)
        if not 0 < count < len(self.train):
            raise InputError(
                f"validation must be 0 to {len(self.train) - 1} of the {len(self.train)} training images; got {count}"
            )
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[:count].sort().values, order[count:].sort().values
        return Dataset(self.name, self.classes, self.train.take(kept), self.test, self.train.take(held_out))


def to_float(images: Tensor) -> Tensor:
    """`uint8` intensities 0..255 as `float32` in [0, 1]."""
    return images.float().div_(255)
