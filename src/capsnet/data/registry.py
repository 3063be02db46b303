"""The data sets by name: each file of `sets/` is one, named as the set is.

Such a file holds the `ENTRY` of the set, and its `SOURCE` where it is downloaded.
"""

import fnmatch
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from capsnet.data.dataset import Dataset, Split
from capsnet.data.download import DataDir
from capsnet.data.preprocessing import Framing
from capsnet.errors import InputError
from capsnet.options.schema import brief, did_you_mean

__all__ = ["Entry", "available", "checksums", "entry"]


@runtime_checkable
class Reader(Protocol):
    """Reads or draws one split of a data set."""

    def __call__(self, split: str, *, data_dir: DataDir, side: int, seed: int) -> Split:
        """The split `train`, `validation` or `test`, read from `data_dir` (see `download`), or drawn.

        `side`, in pixels, and `seed` are of what is drawn. InputError tells of files that are missing or damaged.
        """


@dataclass(frozen=True)
class Entry:
    """What is known of a data set without reading it, and how to read it.

    Attributes:
        name: for `--data`.
        image_shape: channels, height and width.
        classes: names, in the order of the labels.
        train: number of training images.
        test: number of test images.
        licence: of the data.
        source: who made it and what to cite.
        read: gives a split.
        files: for a `data_dir`, its files as published, each with those that are on this machine, unverified.
        check: refuses a height, width, number of channels and seed that the set cannot have.
        validation: number of images of a validation split of its own.
        framing: `digits` where they are framed as in MNIST, so that photographs of digits can be made like them.
        shift: how far a training moves the images, in pixels at `image_shape`; None for the default of `Dataset`.
        objects_per_image: see `Dataset`.
        placed: see `Dataset`.
        where: its files on this machine, unverified; empty where there are none, or where none are needed.
        missing: names of files that are not on this machine; empty where none are.

    Examples:
        >>> from capsnet.data import describe
        >>> about = describe("cifar10")
        >>> about.image_shape, about.train, about.classes[:2]
        ((3, 32, 32), 50000, ('airplane', 'automobile'))
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train: int
    test: int
    licence: str
    source: str
    read: Reader
    files: Callable[[DataDir], Mapping[str, Sequence[Path]]] = lambda data_dir: {}
    check: Callable[[int, int, int, int], object] = lambda *_: None
    validation: int = 0
    framing: Framing = "off"
    shift: int | None = None
    objects_per_image: int = 1
    placed: bool = False
    where: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split that there is."""
        counts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: count for split, count in counts.items() if count}

    def dataset(self, splits: Mapping[str, Split]) -> Dataset:
        """The data set of these splits."""
        train, test = splits["train"], splits["test"]
        ratio = min(train.images.shape[2:]) / min(self.image_shape[1:])
        return Dataset(
            self.name,
            self.classes,
            train,
            test,
            splits.get("validation"),
            shift=Dataset.shift if self.shift is None else round(self.shift * ratio),
            objects_per_image=self.objects_per_image,
            placed=self.placed,
        )


def available(pattern: str = "*") -> list[str]:
    """Names of the data sets that match a shell pattern, sorted: `available("*mnist")`.

    Examples:
        >>> available("*cifar*")
        ['cifar10']
    """
    folders = import_module("capsnet.data.sets").__path__
    names = (module.name.replace("_", "-") for module in pkgutil.iter_modules(folders))
    return sorted(fnmatch.filter(names, pattern))


def entry(name: str | os.PathLike[str]) -> Entry:
    """What is known of the data set `name`.

    Raises:
        InputError: an unknown name.
    """
    if name not in available():
        near, names = did_you_mean(Path(name).name.lower(), available()), ", ".join(available())
        raise InputError(
            f"data must be one of {names}, or the path of a directory or table of images; got {brief(str(name))}{near}"
        )
    return cast(Entry, _file(str(name)).ENTRY)


@cache
def checksums() -> dict[str, str]:
    """By the SHA-256 of a file that is downloaded, unpacked or as published, the name of the set it belongs to."""
    sources = [_file(name).SOURCE for name in available() if hasattr(_file(name), "SOURCE")]
    return {
        checksum: one.name for one in sources for checksum in (*one.files.values(), *one.packed.values()) if checksum
    }


def _file(name: str) -> Any:
    """The module of the data set `name`."""
    return import_module(f"capsnet.data.sets.{name.replace('-', '_')}")
