"""The data set and the untrained network of a run."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from capsnet import models
from capsnet.checkpoints import pretrained
from capsnet.config import Config, with_defaults
from capsnet.data import Dataset, available, is_own, load, outline
from capsnet.data import describe as describe_data
from capsnet.data.augment import Augmentation
from capsnet.data.image_folder import ImageFolder, Unreadable, scan
from capsnet.data.manifest import Manifest
from capsnet.data.photo import frame_of
from capsnet.data.preprocessing import MNIST_FRAME, RESIZED, Preprocessing
from capsnet.errors import InputError
from capsnet.models import Network
from capsnet.options import size_of

__all__ = ["as_read", "augmentation_of", "build", "how_read", "layout", "prepare_data", "reading_of", "same_images"]


def prepare_data(
    config: Config,
    dataset: Dataset | None = None,
    *,
    recorded: Manifest | None = None,
    shares: bool = True,
    tell: Callable[[str], object] | None = None,
    check: Callable[[Dataset], object] | None = None,
    read: bool = True,
) -> Dataset:
    """The data set of `config`, or `dataset` if given, with its validation split.

    Args:
        config: of a run.
        dataset: images of one's own in memory.
        recorded: which files of a folder were in which split; those that are not recorded are left out.
        shares: False chooses validation and training images as runs without a manifest did, see `Dataset`.
        tell: is given the place of decoded images that do not fit into memory.
        check: is given the data set without its images (see `data.outline`) before they are read; it may raise.
        read: False returns the data set without its images, where they need not be read to know it.

    Raises:
        InputError: see `data.load`, `image_folder.scan` and `Dataset.with_validation`.
    """
    divided = dataset is None and is_own(config.data) and shares
    if dataset is not None or not is_own(config.data):
        for name, what in (("test_fraction", "a data set with a test split"), ("group_by", "a data set without files")):
            if (value := getattr(config, name)) is not None:
                raise InputError(f"{name} must be left out for {what}; got {value}")
    if dataset is not None:
        outlined = dataset
    elif is_own(config.data):
        folder, reading = _scanned(config, recorded)
        outlined = outline.of_folder(_divided(folder, config, recorded, divide=shares), reading)
    else:
        about = {name: getattr(config, name) for name in ("data_dir", "image_size", "resize", "channels")}
        about["seed"] = config.data_seed
        outlined = (outline.of_registered if config.data in available() else load)(config.data, **about)
    known = _with_splits(config, outlined, shares=shares, divided=divided)
    if check is not None:
        check(known)
    if not read or not outline.is_outline(outlined):
        return known
    if is_own(config.data):
        dataset = _read_folder(config, folder, reading, recorded, divide=shares, tell=tell)
    else:
        dataset = load(config.data, **about)
    return _with_splits(config, dataset, shares=shares, divided=divided)


def _with_splits(config: Config, dataset: Dataset, *, shares: bool, divided: bool) -> Dataset:
    """The same cropped and, unless it is divided already, with the validation and training images of `config`."""
    if config.crop is not None:
        dataset = dataset.cropped(config.crop)
    if config.erase is not None and config.erase >= (side := min(dataset.image_shape[1:])):
        raise InputError(f"erase must be less than the {side} pixels of the images; got {config.erase}")
    if config.balance and dataset.objects_per_image > 1:
        raise InputError("balance must be left out where images show several objects; got it")
    if divided:
        return dataset
    if config.validation is not None or dataset.validation is None:
        count = _validation_images(config, len(dataset.train))
        dataset = dataset.with_validation(count, seed=config.data_seed, shares=shares)
    if config.train_images is not None:
        dataset = dataset.with_train(config.train_images, seed=config.data_seed, shares=shares)
    return dataset


def _scanned(config: Config, recorded: Manifest | None) -> tuple[ImageFolder, Preprocessing]:
    """The images of a folder, not yet divided, and how they are to be read; a recorded one may have got other files."""
    skip = config.skip_unreadable or recorded is not None
    folder = scan(
        config.data,
        skip_unreadable=skip,
        classes=recorded.classes if recorded else None,
        data_dir=config.data_dir,
        group_by=None if recorded else config.group_by,
    )
    size, channels = size_of(config.image_size), config.channels
    reading = folder.preprocessing(size=size, resize=config.resize, channels=channels, bits=config.bit_depth)
    return folder, reading.with_framing(config.framing)


def _read_folder(
    config: Config,
    folder: ImageFolder,
    reading: Preprocessing,
    recorded: Manifest | None,
    *,
    divide: bool,
    tell: Callable[[str], object] | None,
) -> Dataset:
    """The images of a folder in the splits that are recorded, or in those of `config`."""
    try:
        return _divided(folder, config, recorded, divide=divide).read(reading, channels=config.channels, tell=tell)
    except Unreadable as error:
        if not config.skip_unreadable and recorded is None:
            raise
        return _read_folder(config, folder.without(error.faults), reading, recorded, divide=divide, tell=tell)


def _divided(folder: ImageFolder, config: Config, recorded: Manifest | None, *, divide: bool) -> ImageFolder:
    if recorded is not None:
        return folder.recorded(recorded.splits)
    folder = folder.divided(seed=config.data_seed, test=config.test_fraction)
    if not divide:
        return folder
    if config.validation is not None or not folder.of("validation"):
        folder = folder.with_validation(_validation_images(config, len(folder.of("train"))), seed=config.data_seed)
    return folder if config.train_images is None else folder.with_train(config.train_images, seed=config.data_seed)


def _validation_images(config: Config, train_images: int) -> int:
    """How many are held out: as many as it is said, or that share, else a tenth, at most 5,000."""
    if config.validation is None:
        return min(5000, train_images // 10)
    return config.validation if isinstance(config.validation, int) else max(1, round(config.validation * train_images))


def as_read(config: Config, dataset: Dataset) -> Config:
    """`config` with what was chosen of how a folder is read, so that it is read so again."""
    reading = dataset.preprocessing
    if reading is None:
        return config
    size = reading.height if reading.height == reading.width else f"{reading.height}x{reading.width}"
    chosen = {"image_size": size, "resize": reading.resize, "channels": reading.channels, "bit_depth": reading.bits}
    return config.changed(**chosen, framing=reading.framing)


def how_read(given: Config, dataset: Dataset) -> str | None:
    """One line on how a folder's images are read where that was not chosen."""
    reading = dataset.preprocessing
    if reading is None or not dataset.files:
        return None
    if reading.framing == "digits":
        return "digits cut out, scaled in proportion and centred (--framing off resizes whole images)"
    size = f"{reading.height} x {reading.width}"
    sizes = {(file.header.height, file.header.width) for file in dataset.files}
    if sizes == {(reading.height, reading.width)}:
        return None if given.image_size is not None else f"images kept at {size} pixels (--image-size changes it)"
    in_proportion = all(height * reading.width == width * reading.height for height, width in sizes)
    how = "" if in_proportion else f" {RESIZED[reading.resize]}"
    options = ["--image-size"] * (given.image_size is None) + ["--resize"] * (given.resize is None and bool(how))
    if not options:
        return None
    return f"images resized to {size} pixels{how} ({' and '.join(options)} change{'s' * (len(options) == 1)} it)"


def augmentation_of(config: Config, dataset: Dataset) -> Augmentation:
    """What a training of `config` does to the images of `dataset`."""
    return Augmentation.of(config, shift=dataset.shift, crop=dataset.crop, image_shape=dataset.image_shape)


def same_images(dataset: Dataset, recorded: Manifest, config: Config) -> None:
    """Raise InputError unless the images of a run that goes on are those that it began with."""
    both = (recorded, Manifest.of(dataset))
    begun, now = (Manifest(tuple(line for line in one.lines if line.split != "unused")) for one in both)
    if differences := begun.differences(now):
        raise InputError(
            f"data {config.data} must be the images that the run began with; since then: {'; '.join(differences)}"
        )


def reading_of(network: Network, dataset: Dataset, config: Config) -> Preprocessing:
    """How image files become what the network sees."""
    if dataset.preprocessing is not None:
        return replace(dataset.preprocessing, crop=dataset.crop)
    framing = config.framing or (describe_data(dataset.name).framing if dataset.name in available() else "off")
    frame = (frame_of(dataset.train.images) or MNIST_FRAME) if framing == "digits" else None
    (height, width), resize = dataset.train.images.shape[2:], config.resize or "squash"
    return Preprocessing(
        height, width, network.image_shape[0], dataset.crop, framing=framing, frame=frame, resize=resize
    )


def layout(config: Config, dataset: Dataset, modules: Mapping[str, nn.Module] = MappingProxyType({})) -> Network:
    """The network of `config` for the images and classes of `dataset`, without memory for its weights.

    With copies of `modules`, which are those of one's own that `config` asks for.

    Raises:
        InputError: a module that is missing, or see `pretrained.outline` and `Network.freeze`.
    """
    models.check_modules(modules, config.modules, call="capsnet.fit(config")
    about = {
        "image_shape": dataset.image_shape,
        "num_classes": len(dataset.classes),
        "classes": dataset.classes,
        "objects_per_image": dataset.objects_per_image,
        **vars(with_defaults(config).options),
    }
    about |= {name: deepcopy(module).to("meta") for name, module in modules.items()}
    network = pretrained.outline(config.model, **about)
    network.freeze(*config.freeze)
    return network


def build(config: Config, dataset: Dataset, modules: Mapping[str, nn.Module] = MappingProxyType({})) -> Network:
    """The untrained network of `config` for the images and classes of `dataset`; weights follow the seed.

    Those of `modules` are the ones that they have; in the network are copies.

    Raises:
        InputError: see `layout`.
    """
    about = {**layout(config, dataset, modules).config, **deepcopy(dict(modules))}
    torch.manual_seed(config.seed)
    network = models.create(**about)
    network.freeze(*config.freeze)
    return network
