"""Data sets by name, `load("mnist")`, `load("strokes")`, `load("my/images")`, and the registry of the names.

A published set is read from this machine or downloaded, see `download.py`; strokes are drawn on the spot; a
directory is read as one's own images, see `image_folder.py`.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from capsnet.config import size_of
from capsnet.data import affnist, cifar, download, idx, smallnorb, svhn
from capsnet.data.dataset import Dataset, Split, check_memory
from capsnet.data.download import Source
from capsnet.data.multimnist import multimnist
from capsnet.data.preprocessing import Framing
from capsnet.errors import InputError
from capsnet.files import is_directory

__all__ = ["Dataset", "Description", "Split", "available", "describe", "is_folder", "load", "load_split"]


@dataclass(frozen=True)
class Description:
    """What is known of a data set without reading it.

    Attributes:
        name: for `--data`.
        image_shape: channels, height and width.
        classes: names, in the order of the labels.
        train: number of training images.
        test: number of test images.
        licence: of the data.
        source: who made it and what to cite.
        framing: `digits` where they are framed as in MNIST, so that photographs of digits can be made like them.
        where: its files on this machine, unverified; empty where there are none, or where none are needed.
        missing: names of files that are not on this machine; empty where none are.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train: int
    test: int
    licence: str
    source: str
    framing: Framing = "off"
    where: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()


_DESCRIPTIONS = (
    Description(
        name="strokes",
        image_shape=(1, 28, 28),
        classes=tuple("0123456789"),
        train=10_000,
        test=2_000,
        licence="that of capsnet",
        source="drawn by capsnet itself, with the true pose of every digit; needs no download",
        framing="digits",
    ),
    Description(
        name="mnist",
        image_shape=(1, 28, 28),
        classes=tuple("0123456789"),
        train=60_000,
        test=10_000,
        licence="not stated by its authors, usually given as CC BY-SA 3.0",
        source="LeCun, Cortes, Burges; cite LeCun et al., Gradient-based learning applied to document "
        "recognition, Proc. IEEE 86(11), 1998",
        framing="digits",
    ),
    Description(
        name="multimnist",
        image_shape=(1, 36, 36),
        classes=tuple("0123456789"),
        train=60_000,
        test=10_000,
        licence="that of mnist, of which its images are made",
        source="made of mnist by capsnet: two digits of different classes laid over each other, as in Sabour, Frosst, "
        "Hinton, Dynamic Routing Between Capsules, NIPS 2017, Section 6",
    ),
    Description(
        name="expanded-mnist",
        image_shape=(1, affnist.SIZE, affnist.SIZE),
        classes=tuple("0123456789"),
        train=60_000,
        test=10_000,
        licence="that of mnist, of which its images are made",
        source="made of mnist by capsnet: digits at random places on black, for affnist, as in Sabour, Frosst, Hinton, "
        "Dynamic Routing Between Capsules, NIPS 2017, Section 5.2",
        framing="digits",
    ),
    Description(
        name="affnist",
        image_shape=(1, affnist.SIZE, affnist.SIZE),
        classes=tuple("0123456789"),
        train=60_000,
        test=320_000,
        licence="not stated by its author; training images as mnist",
        source="Tijmen Tieleman, https://www.cs.toronto.edu/~tijmen/affNIST/; trained on expanded-mnist and tested on "
        "affNIST; its test.mat is not downloaded but must be put in place",
        framing="digits",
    ),
    Description(
        name="affnist-generated",
        image_shape=(1, affnist.SIZE, affnist.SIZE),
        classes=tuple("0123456789"),
        train=60_000,
        test=10_000,
        licence="that of mnist, of which its images are made",
        source="made of mnist by capsnet: trained on expanded-mnist and tested on mnist's test images, each under one "
        "random affine transformation within affNIST's ranges, with the true factors; not the official test set",
        framing="digits",
    ),
    Description(
        name="fashion-mnist",
        image_shape=(1, 28, 28),
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        train=60_000,
        test=10_000,
        licence="MIT",
        source="Zalando Research; cite Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, arXiv 1708.07747",
    ),
    Description(
        name="kmnist",
        image_shape=(1, 28, 28),
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        train=60_000,
        test=10_000,
        licence="CC BY-SA 4.0",
        source='"KMNIST Dataset" (created by CODH), adapted from "Kuzushiji Dataset" (created by NIJL and '
        "others), doi:10.20676/00000341; cite Clanuwat et al., 2018, arXiv 1812.01718",
    ),
    Description(
        name="cifar10",
        image_shape=(3, 32, 32),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        train=50_000,
        test=10_000,
        licence="not stated by its authors",
        source="cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    ),
    Description(
        name="svhn",
        image_shape=(3, 32, 32),
        classes=tuple("0123456789"),
        train=73_257,
        test=26_032,
        licence="for non-commercial use only",
        source="http://ufldl.stanford.edu/housenumbers/, cropped digits; cite Netzer et al., Reading Digits in Natural "
        "Images with Unsupervised Feature Learning, NIPS workshop 2011",
    ),
    Description(
        name="smallnorb",
        image_shape=(2, 96, 96),
        classes=smallnorb.CLASSES,
        train=smallnorb.PAIRS,
        test=smallnorb.PAIRS,
        licence="for research purposes, not to be sold",
        source="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/; cite LeCun, Huang, Bottou, Learning Methods for "
        "Generic Object Recognition with Invariance to Pose and Lighting, CVPR 2004",
    ),
)

_MADE_OF = {"multimnist": "mnist", "expanded-mnist": "mnist", "affnist": "mnist", "affnist-generated": "mnist"}
PLACED = ("expanded-mnist", "affnist", "affnist-generated")
"""Sets of digits at random places on a larger ground."""
_PLACED_TEST_SEED = 0
_AFFNIST = Source(name="affnist", files={affnist.FILE: None}, mirrors=())  # no checksum is known of what is in the zip
_READERS = {"svhn": svhn.read, "smallnorb": smallnorb.read}
_SPLITS = ("train", "test")
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_IDX_BYTES = 16 + 60_000 * 28 * 28  # of the training images of mnist and its kind, with their header
_SOURCES = (
    Source(
        name="mnist",
        files={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        most=_IDX_BYTES,
    ),
    Source(
        name="fashion-mnist",
        files={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        most=_IDX_BYTES,
    ),
    Source(
        name="kmnist",
        # No checksum of the unpacked training files is known to us. The packed files as published are held to
        # the SHA-256 that torchvision-ruby records (ankane/torchvision-ruby,
        # lib/torchvision/datasets/kmnist.rb); never checked by us against the files. An unpacked training
        # file is checked by its counts only, in _idx_split.
        files={
            "train-images-idx3-ubyte": None,
            "train-labels-idx1-ubyte": None,
            "t10k-images-idx3-ubyte": "76fbd229ce87db80dd281af5e6670de4ad0e42fb30a7bd643972994c47c1f42e",
            "t10k-labels-idx1-ubyte": "a11dc742be8e781a40a92f53d6a4957e7b7d36df2faa097659131ebfd8fd60c6",
        },
        packed={
            "train-images-idx3-ubyte": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        },
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        most=_IDX_BYTES,
    ),
    Source(name="cifar10", files=cifar.SHA256, mirrors=("https://www.cs.toronto.edu/~kriz/",)),
    Source(name="svhn", files=svhn.SHA256, mirrors=("http://ufldl.stanford.edu/housenumbers/",), most=2**28),
    Source(
        name="smallnorb",
        files=dict.fromkeys(smallnorb.PACKED_SHA256),  # unpacked, a file is checked by its counts only
        packed=smallnorb.PACKED_SHA256,
        mirrors=("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",),
        most=24 + smallnorb.PAIRS * 2 * 96 * 96,
    ),
)
_KNOWN = {
    checksum: one.name for one in _SOURCES for checksum in (*one.files.values(), *one.packed.values()) if checksum
}
"""Which set a file is of, by its SHA-256."""


def available() -> tuple[str, ...]:
    """The names that `load` knows, besides directories."""
    return tuple(one.name for one in _DESCRIPTIONS)


def is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a directory, and not of a published data set."""
    return name not in ("", *available()) and is_directory(name)


def describe(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Description:
    """What is known of a registered data set, and which of its files are on this machine; reads none of them.

    Raises:
        InputError: an unknown name, or a `data_dir` that is not a directory.
    """
    _check_name(name)
    description = next(one for one in _DESCRIPTIONS if one.name == name)
    source = next((one for one in _SOURCES if one.name == _MADE_OF.get(name, name)), None)
    if source is None:
        return description
    places = download.places(source, data_dir)
    if name == "cifar10":
        folder = cifar.find_folder(places)
        archives = [folder] if folder else download.locate(places, cifar.ARCHIVES)
        return replace(description, where=tuple(archives[:1]), missing=() if archives else cifar.ARCHIVES[:1])
    files = _IDX_FILES["train"] if name == "affnist" else source.files
    packing = "" if name == "svhn" else ".gz"  # as published
    found = {f"{file}{packing}": download.locate(places, (f"{file}.gz", file))[:1] for file in files}
    if name == "affnist":
        found[affnist.FILE] = affnist.find(download.places(_AFFNIST, data_dir))
    return replace(
        description,
        where=tuple(path for paths in found.values() for path in paths),
        missing=tuple(file for file, paths in found.items() if not paths),
    )


def load(
    name: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | str | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set by its registered name, or one's own images from a directory.

    Args:
        name: one of `available()`, or else the path of a directory with a sub-directory per class (`./mnist`
            for one that is called as a registered set).
        data_dir: the only directory to look for the files in; without it CAPSNET_DATA, the cache and the mirrors.
            A damaged file is an error, and not passed over; see `download.py`.
        image_size: side in pixels, or `"HEIGHTxWIDTH"`: strokes are drawn at it, others resized without regard to
            proportions, Lanczos-filtered. None keeps what a published set has; a directory's images are then 32 x 32,
            unless all are of one size of at most 40 pixels a side.
        channels: 1 for grey (luma of ITU-R BT.601), 3 for colour (grey repeated); None keeps what the set
            has, and nothing else will do for the two cameras of smallnorb.
        seed: of the strokes, and of the split of a directory without train/ and test/; others come split.

    Raises:
        InputError: an unknown name, a wrong argument, or files that are missing or not what they must be.

    Example:
        >>> load("mnist").image_shape  # (1, 28, 28)
    """
    _check_shape(image_size, channels)
    if is_folder(name):
        from capsnet.data.image_folder import scan

        folder = scan(name).divided(seed=seed)
        return folder.read(folder.preprocessing(size=size_of(image_size), channels=channels), channels=channels)
    _check_name(name)
    _check_channels(str(name), channels)
    height, width = sides(str(name), image_size, channels)
    if name == "strokes":
        from capsnet.data.strokes import strokes

        drawn = strokes(image_size=height, seed=seed)
        own = None if drawn.validation is None else _fit(drawn.validation, None, channels)
        train, test = (_fit(split, None, channels) for split in (drawn.train, drawn.test))
        return Dataset("strokes", drawn.classes, train, test, own)
    if name == "multimnist":
        return multimnist("multimnist", describe("multimnist").classes, *_read("mnist", _SPLITS, data_dir))
    if name in PLACED:
        shift = placed_shift(height, width)
        train, test = (_fit(split, image_size, channels) for split in _read_placed(str(name), _SPLITS, data_dir))
        return Dataset(str(name), describe(str(name)).classes, train, test, shift=shift, placed=True)
    train, test = (_fit(split, image_size, channels) for split in _read(str(name), _SPLITS, data_dir))
    return Dataset(str(name), describe(str(name)).classes, train, test)


def sides(name: str, image_size: int | str | None, channels: int | None) -> tuple[int, int]:
    """Height and width of a published set's images at `image_size`.

    Raises:
        InputError: strokes that are not square, or MultiMNIST of another size or in colour.
    """
    shape = next(one.image_shape for one in _DESCRIPTIONS if one.name == name)
    height, width = size_of(image_size) or shape[1:]
    if name == "strokes" and height != width:
        raise InputError(f"image_size of strokes must be one side, as they are square; got {image_size}")
    if name == "multimnist" and (channels or 1, height, width) != shape:
        raise InputError(f"image_size and channels of multimnist must be 36 and 1; got {image_size} and {channels}")
    return height, width


def placed_shift(height: int, width: int) -> int:
    """How far a training moves digits of `PLACED` on so many pixels."""
    return round(affnist.MARGIN * min(height, width) / affnist.SIZE)


def load_split(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | str | None = None,
    channels: int | None = None,
) -> Split:
    """One split of a published data set; the files of the other need not be there.

    Args:
        name: one of `available()` but "strokes" and "multimnist".
        split: "train" or "test".
        data_dir: as in `load`.
        image_size: as in `load`.
        channels: as in `load`.

    Raises:
        InputError: as `load`.
    """
    _check_shape(image_size, channels)
    _check_name(name)
    _check_channels(name, channels)
    if split not in _SPLITS or name in ("strokes", "multimnist"):
        raise InputError(f"split must be train or test of a published data set; got {split} of {name}")
    (wanted,) = (_read_placed if name in PLACED else _read)(name, (split,), data_dir)
    return _fit(wanted, image_size, channels)


def _read(name: str, splits: Sequence[str], data_dir: str | os.PathLike[str] | None) -> list[Split]:
    source = next(one for one in _SOURCES if one.name == name)
    if name == "cifar10":
        folder = _cifar_folder(source, data_dir)
        return [cifar.read(folder, split) for split in splits]
    if name in _READERS:
        return [_READERS[name](source, split, data_dir) for split in splits]
    files = [file for split in splits for file in _IDX_FILES[split]]
    found = download.contents(source, files, data_dir, known=_KNOWN)
    return [_idx_split(name, split, found) for split in splits]


def _read_placed(name: str, splits: Sequence[str], data_dir: str | os.PathLike[str] | None) -> list[Split]:
    """Of digits on 40 x 40 pixels, the `splits` among train and test; those of train are in the middle."""
    found: dict[str, Split] = {}
    if name == "affnist" and "test" in splits:
        found["test"] = affnist.read(download.places(_AFFNIST, data_dir))
    wanted = [split for split in _SPLITS if split in splits and split not in found]
    mnist = dict(zip(wanted, _read("mnist", wanted, data_dir), strict=True))
    if "train" in mnist:
        found["train"] = replace(mnist["train"], images=affnist.padded(mnist["train"].images))
    if "test" in mnist:
        made = affnist.generated if name == "affnist-generated" else affnist.placed
        found["test"] = made(mnist["test"], seed=_PLACED_TEST_SEED)
    return [found[split] for split in splits]


def _idx_split(name: str, split: str, found: dict[str, tuple[Path, bytes]]) -> Split:
    (images_path, images), (labels_path, labels) = (found[file] for file in _IDX_FILES[split])
    read = Split(idx.parse_images(images, images_path), idx.parse_labels(labels, labels_path))
    if name == "kmnist":  # the only one with files of unknown checksum; its classes are all of one size
        description = describe(name)
        shape = (getattr(description, split), *description.image_shape)
        if read.images.shape != shape:
            raise InputError(f"{images_path} must hold images of {shape}; got {tuple(read.images.shape)}")
        counts, each = read.labels.bincount(), shape[0] // len(description.classes)
        if counts.tolist() != [each] * len(description.classes):
            raise InputError(f"{labels_path} must hold {each} labels of each class; got {counts.tolist()}")
    return read


def _cifar_folder(source: Source, data_dir: str | os.PathLike[str] | None) -> Path:
    """Where CIFAR-10 is unpacked, after unpacking or downloading it if need be."""
    into, python_version = download.cache_dir() / source.name, list[InputError]()
    for folders in download.roots(source, data_dir):
        folder = cifar.find_folder(folders)
        if folder is not None:
            return folder
        try:
            archive = cifar.find_archive(folders)
        except InputError as error:
            python_version.append(error)
        else:
            if archive is not None:
                return cifar.unpack(archive, into)
    if python_version:
        raise python_version[0]
    name = cifar.ARCHIVES[0]
    return download.from_mirrors(source, name, lambda path: cifar.unpack(path, into), wanted=[name], data_dir=data_dir)


def _fit(split: Split, image_size: int | str | None, channels: int | None) -> Split:
    """The split with images of another size or number of channels, as they would be read from files of them."""
    count, has, height, width = split.images.shape
    size, channels = size_of(image_size) or (height, width), channels or has
    if (channels, *size) == (has, height, width):
        return split
    from PIL import Image

    check_memory(count, (channels, *size))
    images = torch.empty(count, channels, *size, dtype=torch.uint8)
    for k, image in enumerate(split.images):
        planes = [image.permute(1, 2, 0).numpy()] if has == 3 else list(image.numpy())  # as many as cameras
        for channel, plane in enumerate(planes):
            one = Image.fromarray(plane)
            one = one.convert("L") if channels < has else one
            one = one.resize(size[::-1], Image.Resampling.LANCZOS) if one.size != size[::-1] else one
            pixels = torch.from_numpy(np.array(one))
            if len(planes) > 1:
                images[k, channel] = pixels
            else:  # grey is repeated over the channels
                images[k] = pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return Split(images, split.labels, split.factors)


def _check_shape(image_size: int | str | None, channels: int | None) -> None:
    if image_size is not None and size_of(image_size) is None:
        raise InputError(f"image_size must be pixels, at least 1, or HEIGHTxWIDTH; got {image_size}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour); got {channels}")


def _check_channels(name: str, channels: int | None) -> None:
    has = next(one.image_shape[0] for one in _DESCRIPTIONS if one.name == name)
    if channels is not None and has not in (1, 3):
        raise InputError(f"channels must be left out for {name}, whose images have {has}, one a camera; got {channels}")


def _check_name(name: str | os.PathLike[str]) -> None:
    if name not in available():
        near = difflib.get_close_matches(Path(name).name.lower(), available(), 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"data must be one of {', '.join(available())}, or the path of a directory of images; got {name}{meant}"
        )
