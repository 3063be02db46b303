"""Images that a program holds: a torch `Dataset`, arrays, tensors or PIL images with labels, as a `Dataset` of capsnet.

An array or tensor is one image `[H, W]`, `[C, H, W]` or `[H, W, C]` of 1 or 3 channels, or several with one axis more
in front: uint8 (or other integers) from 0 to 255, or floats in [0, 1], which are rounded to 8 bits. A PIL image is read
as a file of it would be, see `preprocessing.py`. Nothing here needs torchvision; what its data sets give is read.
"""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from capsnet.data.dataset import Dataset, ImageFile, Split, check_memory
from capsnet.data.image_file import Header, Resize, read_header
from capsnet.data.image_folder import KEPT_SIDE, SIDE, ImageFolder
from capsnet.data.preprocessing import RESIZED, Framing, Preprocessing
from capsnet.errors import InputError
from capsnet.options import size_of
from capsnet.options.schema import shown

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["dataset_of", "encoded", "is_picture", "pixels_of", "to_uint8"]

NAME = "in-memory"
"""Of a data set that has no other."""
_SPLITS = ("train", "validation", "test")
_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that this format holds unchanged


def dataset_of(
    data: Any,
    *,
    seed: int = 0,
    image_size: int | str | None = None,
    resize: Resize | None = None,
    channels: int | None = None,
    bits: int | None = None,
    framing: Framing | None = None,
) -> Dataset:
    """A data set of images in memory.

    Args:
        data: a map-style torch `Dataset`, or a list, of pairs (image, label); or a pair (tuple) of images and labels:
            arrays, tensors or lists; or a mapping of "train" and "test", and "validation" if there is one, to any of
            these. Without "test" the validation images are tested; with neither, and for images that are not in a
            mapping, a sixth of each class, at least one image, is split off by `seed` and tested. Images are described
            at the head of this file. A label is a whole number from 0 on or the name of a class. With an attribute
            `classes` (torchvision's `ImageFolder`, `MNIST`, a `Subset` of one) labels count these names; else the
            classes are the distinct labels of the training images, sorted and called by themselves: labels 3 and 7 are
            the classes "3" and "7".
        seed: of the test images that are split off.
        image_size: side in pixels, or "HEIGHTxWIDTH", to resize to. None keeps arrays and tensors, which must then be
            of one size; PIL images are 32 x 32, unless all are of one size of at most 40 pixels a side.
        resize: `pad`, `crop` or `squash`, see `image_file.resized`. Default: pad.
        channels: 1 for grey, 3 for colour. Default: grey if every image is.
        bits: of PIL images of more than 8 bits. Default: the fewest that hold the values of each image, and for all
            images the most of these.
        framing: see `preprocessing.py`. Default: off.

    Raises:
        InputError: anything else, in one line that says which image or label.

    Examples:
        >>> images, labels = np.zeros((12, 28, 28), np.uint8), ["cat", "dog"] * 6
        >>> dataset_of((images, labels)).image_shape
        (1, 28, 28)
    """
    parts = {name: _Part(name, part) for name, part in _parts(data).items()}
    headers = {name: [part.header(k) for k in range(len(part))] for name, part in parts.items()}
    every = [header for each in headers.values() for header in each]
    sizes = {(header.height, header.width) for header in every}
    arrays = any(part.arrays for part in parts.values())
    size = size_of(image_size)
    if size is None and arrays and len(sizes) > 1:
        some = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise InputError(f"arrays and tensors must be of one size, or image_size given; got {some} pixels")
    own = next(iter(sizes)) if len(sizes) == 1 else (SIDE, SIDE)
    height, width = size or (own if arrays or max(own) <= KEPT_SIDE else (SIDE, SIDE))
    bits = bits or max((header.bits for header in every if header.bits is not None), default=None)
    colours = channels or (3 if any(header.colour for header in every) else 1)
    reading = Preprocessing(height, width, colours, bits=bits, resize=resize or "pad").with_framing(framing)
    check_memory(len(every), reading.image_shape)
    classes, labels = _classes(parts)
    splits = {name: Split(part.read(reading), labels[name]) for name, part in parts.items()}
    if channels is None and colours == 3 and all(_grey(split.images) for split in splits.values()):
        splits = {name: replace(split, images=split.images[:, :1].contiguous()) for name, split in splits.items()}
        reading = replace(reading, channels=1)
    tested: Literal["test", "validation"] = "test"
    if "validation" in splits and "test" not in splits:
        tested, splits["test"] = "validation", splits["validation"]
    if "test" not in splits:
        splits = _divided(splits["train"], classes, seed)
    resized = sizes != {(height, width)}
    note = f"images resized to {height} x {width} pixels {RESIZED[reading.resize]} (image_size and resize change it)"
    return Dataset(
        NAME,
        classes,
        splits["train"],
        splits["test"],
        splits.get("validation"),
        tested=tested,
        preprocessing=reading,
        notes=(note,) if resized and reading.frame is None and (image_size is None or resize is None) else (),
    )


def is_picture(image: object) -> "TypeGuard[Image]":
    """Whether this is a PIL image."""
    from PIL import Image

    return isinstance(image, Image.Image)


def pixels_of(image: np.ndarray | Tensor, *, name: str = "image") -> Tensor:
    """One image as a tensor `[C, H, W]`, of uint8, or of float32 in [0, 1] where it has floats.

    `name` is what errors call it.

    Raises:
        InputError: not an image of 1 or 3 channels, first or last; or values out of range.
    """
    rule = "must be [H, W], [C, H, W] or [H, W, C] of 1 or 3 channels"
    tensor = _tensor(image, name)
    if tensor.numel() == 0 or tensor.ndim not in (2, 3):
        raise InputError(f"{name} {rule}; got {list(tensor.shape)}")
    if tensor.ndim == 2:
        return _checked(tensor[None], name)
    first, last = (tensor.shape[axis] in (1, 3) for axis in (0, 2))
    if first and last:
        raise InputError(f"{name} {rule}, where one axis alone may be 1 or 3 long; got {list(tensor.shape)}")
    if not first and not last:
        raise InputError(f"{name} {rule}; got {list(tensor.shape)}")
    return _checked(tensor if first else tensor.permute(2, 0, 1), name)


def to_uint8(pixels: Tensor) -> Tensor:
    """What `pixels_of` gives as uint8: floats times 255, rounded."""
    return pixels.mul(255).round().to(torch.uint8) if pixels.is_floating_point() else pixels


def encoded(image: "Image | Tensor") -> bytes:
    """The content of an image file that holds a PIL image, or uint8 `[1 or 3, H, W]`, without loss."""
    if isinstance(image, Tensor):
        from PIL import Image

        image = Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()).numpy())
    place = io.BytesIO()
    if image.mode in ("La", "RGBa", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    turned = image.getexif()
    if image.mode in _PNG:
        image.save(place, "PNG", compress_level=0, exif=turned)
    else:
        image.save(place, "TIFF", exif=turned)
    return place.getvalue()


class _Labelled(NamedTuple):
    """Images beside their labels, as if they were pairs."""

    images: Any
    labels: Any

    def pair(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


class _Part:
    """The images and labels of one split; images are looked at once for their sizes, and once more to be read."""

    def __init__(self, name: str, data: Any) -> None:
        self.name, self.data, self.arrays = name, data, False
        self.classes = _class_names(data)
        if isinstance(data, tuple):
            self.data = self._labelled(*data) if len(data) == 2 else None
        if self.data is None or isinstance(data, str | bytes | np.ndarray | Tensor):
            raise InputError(_rule(data))
        if not isinstance(self.data, _Labelled) and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise InputError(_rule(data))
        self._count = len(self.data.images if isinstance(self.data, _Labelled) else self.data)
        if self._count == 0:
            raise InputError(f"{name} data must hold at least one image; got none")
        self.labels: list[int | str] = []

    def __len__(self) -> int:
        return self._count

    def _labelled(self, images: Any, labels: Any) -> _Labelled:
        if not isinstance(images, np.ndarray | Tensor | list | tuple):
            raise InputError(_rule((images, labels)))
        if isinstance(images, np.ndarray | Tensor) and images.ndim not in (3, 4):
            raise InputError(
                f"{self.name} images must be [N, H, W], [N, C, H, W] or [N, H, W, C]; got {list(images.shape)}"
            )
        if isinstance(labels, np.ndarray | Tensor) and labels.ndim != 1:
            hint = " (one-hot labels: give their argmax(1))" if labels.ndim == 2 else ""
            raise InputError(f"{self.name} labels must be one for each image, [N]; got {list(labels.shape)}{hint}")
        if not hasattr(labels, "__len__") or isinstance(labels, str):
            raise InputError(f"{self.name} labels must be one for each image, [N]; got {_seen(labels)}")
        if len(images) != len(labels):
            raise InputError(f"{self.name} labels must be as many as the {len(images)} images; got {len(labels)}")
        return _Labelled(images, labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels)

    def _pair(self, index: int) -> tuple[Any, Any]:
        if isinstance(self.data, _Labelled):
            return self.data.pair(index)
        item = self.data[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"item {index} of the {self.name} data must be (image, label); got {_seen(item)}")
        return item[0], item[1]

    def header(self, index: int) -> Header:
        """Size and colours of an image; its label is kept."""
        image, label = self._pair(index)
        self.labels.append(_label(label, f"label {index} of the {self.name} data"))
        if is_picture(image):
            if image.mode.startswith("I"):
                return read_header(encoded(image))
            height, width = image.height, image.width
            if image.getexif().get(0x0112) in (5, 6, 7, 8):  # turned by a quarter
                height, width = width, height
            return Header(height, width, image.mode not in ("1", "L", "LA", "La"), None)
        pixels = self._pixels(image, index)
        self.arrays = True
        return Header(pixels.shape[1], pixels.shape[2], len(pixels) == 3, None)

    def _pixels(self, image: Any, index: int) -> Tensor:
        if not isinstance(image, np.ndarray | Tensor):
            what = f"image {index} of the {self.name} data"
            raise InputError(f"{what} must be a PIL image, an array or a tensor; got {_seen(image)}")
        return pixels_of(image, name=f"image {index} of the {self.name} data")

    def read(self, reading: Preprocessing) -> Tensor:
        """All images, `uint8 [N, C, H, W]`."""
        images = torch.empty(len(self), *reading.image_shape, dtype=torch.uint8)
        for index in range(len(self)):
            image, _ = self._pair(index)
            name = f"image {index} of the {self.name} data"
            if is_picture(image):
                images[index] = reading(encoded(image), name=name).image
                continue
            pixels = to_uint8(self._pixels(image, index))
            fits = tuple(pixels.shape[1:]) == (reading.height, reading.width) and len(pixels) <= reading.channels
            images[index] = pixels if fits and reading.frame is None else reading(encoded(pixels), name=name).image
        return images


def _class_names(data: Any) -> Any:
    """The attribute `classes` of a torch `Dataset`, or of that of which it is a `Subset`; None without one."""
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    return getattr(data, "classes", None)


def _seen(got: object) -> str:
    """What was given, in a few words."""
    return shown(got) if isinstance(got, str | int | float | None) else type(got).__name__


def _rule(got: object) -> str:
    return (
        "data must be a torch Dataset of (image, label), a pair (images, labels), or a mapping of train and test to "
        f"such; got {_seen(got)}"
    )


def _parts(data: Any) -> Mapping[str, Any]:
    """What is given for each split."""
    if not isinstance(data, Mapping):
        return {"train": data}
    if "train" not in data or not set(data) <= set(_SPLITS):
        got = ", ".join(map(str, data)) or "none"
        raise InputError(f"splits of data must be train, and test and validation if there are; got {got}")
    return {name: data[name] for name in _SPLITS if data.get(name) is not None}


def _tensor(image: np.ndarray | Tensor, name: str) -> Tensor:
    if isinstance(image, Tensor):
        return image.detach().cpu()
    if image.dtype.kind not in "biuf":
        raise InputError(f"{name} must be of integers 0 to 255 or floats in [0, 1]; got {image.dtype}")
    if image.dtype in (np.uint16, np.uint32, np.uint64):
        image = image.astype(np.int64)
    native = image.astype(image.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.array(native))  # of its own: strides may be negative, and memory be locked


def _checked(pixels: Tensor, name: str) -> Tensor:
    """The same as uint8, or as float32 in [0, 1]."""
    low, high = (float(x) for x in (pixels.min(), pixels.max())) if pixels.dtype != torch.bool else (0.0, 0.0)
    if pixels.is_floating_point():
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{name} must have floats in [0, 1], so give images before Normalize, and 0 to 255 as uint8; got "
                f"{low:g} to {high:g}"
            )
        return pixels.float()
    if pixels.dtype in (torch.bool, torch.complex64, torch.complex128) or not 0 <= low <= high <= 255:
        got = str(pixels.dtype) if pixels.dtype == torch.bool else f"{low:g} to {high:g}"
        raise InputError(f"{name} must be of integers 0 to 255 or floats in [0, 1]; got {got}")
    return pixels.to(torch.uint8)


def _label(label: Any, name: str) -> int | str:
    if isinstance(label, np.ndarray | Tensor | list | tuple) and (shape := list(np.shape(label))):
        hint = " (one-hot: give its argmax())" if len(shape) == 1 else ""
        raise InputError(f"{name} must be one number or name; got {shape}{hint}")
    if isinstance(label, np.ndarray | Tensor | np.generic):
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise InputError(f"{name} must be a whole number or the name of a class; got {_seen(label)}")
    if isinstance(label, int) and label < 0:
        raise InputError(f"{name} must be at least 0; got {label}")
    return label


def _classes(parts: Mapping[str, _Part]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Names of the classes, and the labels of each split."""
    train = parts["train"]
    kinds = {type(label).__name__ for part in parts.values() for label in part.labels}
    if len(kinds) > 1:
        raise InputError("labels must be all whole numbers or all names; got both")
    if train.classes is not None:
        names = tuple(map(str, train.classes))
        values: list[Any] = list(range(len(names))) if kinds == {"int"} else list(names)
    else:
        values = sorted(set(train.labels))
        names = tuple(map(str, values))
    place = {value: k for k, value in enumerate(values)}
    few = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    rule = f"numbers of classes, 0 to {len(names) - 1}" if train.classes is not None else f"the classes {few}"
    for part in parts.values():
        if part.classes is not None and tuple(map(str, part.classes)) != names:
            raise InputError(f"classes of the {part.name} data must be those of the training data, {few}; got others")
        for index, label in enumerate(part.labels):
            if label not in place:
                raise InputError(f"labels of the {part.name} data must be {rule}; got {label!r} for image {index}")
    return names, {
        name: torch.tensor([place[label] for label in part.labels], dtype=torch.int64) for name, part in parts.items()
    }


def _grey(images: Tensor) -> bool:
    return all(bool((part == part[:, :1]).all()) for part in torch.split(images, 1000))


def _divided(whole: Split, classes: tuple[str, ...], seed: int) -> dict[str, Split]:
    """Train and test as of a folder of these images."""
    header = Header(1, 1, colour=False, bits=None)
    files = tuple(ImageFile(str(k), label, "", "", header) for k, label in enumerate(whole.labels.tolist()))
    folder = ImageFolder(Path(NAME), classes, files).divided(seed=seed)
    return {name: whole.take(torch.tensor([int(file.path) for file in folder.of(name)])) for name in ("train", "test")}
