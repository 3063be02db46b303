"""MNIST digits on black images of 40 x 40 pixels: placed at random, or under random affine transformations (affNIST).

Section 5.2 of Sabour et al. 2017, "Robustness to Affine Transformations": a network is trained on MNIST digits "placed
randomly on a black background of 40 x 40 pixels" and tested on affNIST, in which "each example is an MNIST digit with a
random small affine transformation".

affNIST is Tijmen Tieleman's, https://www.cs.toronto.edu/~tijmen/affNIST/. Its page says: images of 40 x 40 pixels,
MATLAB's format, 32 transformed versions of each MNIST image. The names of the files, the layout inside and the order of
an image's pixels are those that published readers agree on, among them TensorFlow Datasets (tensorflow/datasets,
tensorflow_datasets/image_classification/affnist.py): test.mat, or a file per version, 1.mat to 32.mat, in
test_batches/; in each a structure `affNISTdata` with `image`, `uint8 [1600, N]`, a column per image, row by row from
its top left; and `label_int`, `[1, N]`. No official file was at hand to check any of this.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsnet.data.augment import Augmentation, move
from capsnet.data.dataset import Split
from capsnet.data.idx import unpacked
from capsnet.data.matlab import variables
from capsnet.errors import InputError

__all__ = [
    "FACTORS",
    "FILE",
    "MARGIN",
    "SIZE",
    "find",
    "generated",
    "padded",
    "parse",
    "placed",
    "read",
    "transform",
]

SIZE = 40
"""Height and width of every image, in pixels."""
MARGIN = 6
"""Pixels of black around an MNIST image of 28 x 28, and so the furthest a digit moves with its image."""
FACTORS: dict[str, tuple[float, float]] = {
    "rotation_degrees": (-20.0, 20.0),
    "shear": (-0.2, 0.2),
    "scale_x": (0.8, 1.2),
    "scale_y": (0.8, 1.2),
}
"""Name to the range that `generated` draws uniformly from: affNIST's, as commonly quoted; not checked on its files."""
FILE = "test.mat"
"""The test set in one file."""
_SHIFTS = ("shift_x_pixels", "shift_y_pixels")
_BATCHES = "test_batches"
_CHUNK = 1000  # images transformed at a time


def padded(
    images: UInt8[Tensor, "images channels height width"], *, size: int = SIZE
) -> UInt8[Tensor, "images channels {size} {size}"]:
    """The images in the middle of black ones of `size` x `size` pixels.

    Raises:
        InputError: images larger than that.
    """
    height, width = images.shape[-2:]
    if max(height, width) > size:
        raise InputError(f"images must be at most {size} x {size} pixels to be placed there; got {height} x {width}")
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def placed(split: Split, *, seed: int) -> Split:
    """Each image once at a random place: MNIST's, in 40 x 40 pixels, moved by -6 to 6 pixels in each direction.

    Args:
        split: images of at most 40 x 40 pixels.
        seed: of the places; the same seed always draws the same.

    Returns:
        Images `uint8 [N, C, 40, 40]`; `factors` tell the shift, to the right and downwards.

    Raises:
        InputError: larger images.
    """
    height, width = split.images.shape[-2:]
    images = padded(split.images)
    reach = (SIZE - max(height, width)) // 2
    drawn = Augmentation(shift=reach).draw(len(split), generator=torch.Generator().manual_seed(seed))
    factors = dict(zip(_SHIFTS, (drawn.dx.float(), drawn.dy.float()), strict=True))
    return Split(move(images, drawn), split.labels, {**split.factors, **factors})


def generated(split: Split, *, seed: int) -> Split:
    """Each image once under a random affine transformation, as affNIST is commonly described to have been made.

    Rotation, shear and both scales are uniform in the ranges of `FACTORS`; then the image is moved to anywhere such
    that no ink falls off, each place as likely as the next. The order of the transformations and the interpolation are
    those of `transform`, which need not be affNIST's own.

    Args:
        split: grey images on black.
        seed: of the transformations; the same seed always draws the same.

    Returns:
        Images `uint8 [N, 1, 40, 40]`; `factors` are the parameters of `transform`.

    Raises:
        InputError: images with ink that does not fit into 40 x 40 pixels when transformed.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(FACTORS) + len(_SHIFTS), len(split), generator=generator, dtype=torch.float64)
    factors = {
        name: (low + (high - low) * values).float()
        for (name, (low, high)), values in zip(FACTORS.items(), drawn, strict=False)
    }
    lowest, highest = _room(split.images, _matrix(factors))
    if bool((lowest > highest).any()):
        raise InputError(f"images must hold ink that fits into {SIZE} x {SIZE} pixels when transformed; got larger")
    shift = lowest + (highest - lowest) * drawn[len(FACTORS) :].T
    factors |= dict(zip(_SHIFTS, shift.float().T.contiguous(), strict=True))
    return Split(transform(split.images, factors), split.labels, {**split.factors, **factors})


def transform(
    images: UInt8[Tensor, "images channels height width"], parameters: Mapping[str, Tensor], *, size: int = SIZE
) -> UInt8[Tensor, "images channels {size} {size}"]:
    """Shear, scale, rotate and shift each image, in this order, about its centre, onto black of `size` x `size` pixels.

    The image is sampled once, bilinearly. With no shear, rotation and shift and with scales of 1, the result is
    `padded(images)` exactly.

    Args:
        images: intensities 0..255; what lies outside is black.
        parameters: one value per image for each of `rotation_degrees` (counter-clockwise), `shear` (pixels to the right
            per pixel above the centre), `scale_x` and `scale_y` (magnification, above 0), `shift_x_pixels` (to the
            right) and `shift_y_pixels` (downwards).
        size: height and width of the result, in pixels.

    Raises:
        InputError: a parameter is missing, unknown or of another length, or a scale is not above 0.

    Example:
        turned = {name: torch.zeros(1) for name in (*FACTORS, "shift_x_pixels", "shift_y_pixels")}
        turned |= {"rotation_degrees": torch.tensor([90.0]), "scale_x": torch.ones(1), "scale_y": torch.ones(1)}
        transform(images, turned)  # uint8 [1, 1, 40, 40]
    """
    names = (*FACTORS, *_SHIFTS)
    if set(parameters) != set(names):
        raise InputError(f"parameters of transform must be {', '.join(names)}; got {', '.join(parameters) or 'none'}")
    for name, values in parameters.items():
        if values.shape != (len(images),):
            raise InputError(
                f"{name} of transform must be one value per image, [{len(images)}]; got {list(values.shape)}"
            )
        if name.startswith("scale") and bool((values <= 0).any()):
            raise InputError(f"{name} of transform must be above 0; got {float(values.min()):g}")
    height, width = images.shape[-2:]
    inverse = torch.linalg.inv(_matrix(parameters))
    shift = torch.stack([parameters[name] for name in _SHIFTS], dim=-1).double()
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    pixels = torch.stack([x, y], dim=-1)  # of the result, from its centre
    half = torch.tensor([width, height]) / 2  # grid_sample counts in halves of the image's sides
    result = torch.empty(len(images), images.shape[1], size, size, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        rows = slice(start, start + _CHUNK)
        source = torch.einsum("nij,nyxj->nyxi", inverse[rows], pixels - shift[rows, None, None])
        grid = (source / half).float()
        drawn = F.grid_sample(images[rows].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        result[rows] = drawn.round().clamp(0, 255)
    return result


def find(places: Sequence[Path]) -> list[Path]:
    """The files of affNIST's test set: the first test.mat, or the first folder of numbered batches; empty if none."""
    for place in places:
        if (place / FILE).is_file():
            return [place / FILE]
        for folder in (place / _BATCHES, place):
            batches = [path for path in folder.glob("*.mat") if path.stem.isdecimal()] if folder.is_dir() else []
            if batches:
                return sorted(batches, key=lambda path: int(path.stem))
    return []


def read(places: Sequence[Path]) -> Split:
    """The test set of affNIST, from one file or from all batches of a folder.

    Raises:
        InputError: it is in none of the `places`, or a file is not what `parse` wants.
    """
    paths = find(places)
    if not paths:
        raise InputError(
            f"data set affnist must be on this machine; missing: {FILE} or {_BATCHES}/, from "
            "https://www.cs.toronto.edu/~tijmen/affNIST/32x/transformed/test.mat.zip, unpacked; looked in: "
            f"{', '.join(map(str, places))}; put it into a directory and name that with --data-dir or CAPSNET_DATA, or "
            "use --data affnist-generated, which is made of MNIST and needs no such file"
        )
    images, labels = zip(*(parse(unpacked(path), path) for path in paths), strict=True)
    return Split(torch.cat(images) if len(images) > 1 else images[0], torch.cat(labels))


def parse(
    content: bytes, path: str | os.PathLike[str]
) -> tuple[UInt8[Tensor, "images 1 40 40"], Int64[Tensor, " images"]]:
    """Images (intensities 0..255) and labels (0..9) of one file of affNIST; `path` only names it in errors.

    Raises:
        InputError: see `matlab.variables`; or `affNISTdata` is no structure, or a field of it is missing or of another
            type, shape or value.
    """
    structure = variables(content, path, ("affNISTdata",))["affNISTdata"]
    names = structure.dtype.names or ()
    if structure.size != 1 or not {"image", "label_int"} <= set(names):
        raise InputError(
            f"{path} must hold affNISTdata with the fields image and label_int; got {', '.join(names) or 'none'}"
        )
    pixels, labels = (np.asarray(structure[name].item()) for name in ("image", "label_int"))
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or len(pixels) != SIZE**2:
        raise InputError(f"{path} must hold images of uint8 [{SIZE**2}, N]; got {pixels.dtype} {list(pixels.shape)}")
    if labels.size != pixels.shape[1] or labels.dtype.kind not in "uif":
        raise InputError(
            f"{path} must hold a label for each of the {pixels.shape[1]} images; "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise InputError(f"{path} must have labels 0 to 9; got {labels.min()} to {labels.max()}")
    images = torch.from_numpy(np.ascontiguousarray(pixels.T)).view(-1, 1, SIZE, SIZE)
    return images, torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _matrix(parameters: Mapping[str, Tensor]) -> Float[Tensor, "images 2 2"]:
    """From a point of the image to its place in the result, both from the centre, x to the right and y down."""
    values = {name: tensor.double() for name, tensor in parameters.items()}
    angle, shear = values["rotation_degrees"].deg2rad(), values["shear"]
    cos, sin, wide, high = angle.cos(), angle.sin(), values["scale_x"], values["scale_y"]
    x_row = torch.stack([cos * wide, sin * high - cos * wide * shear], dim=-1)
    y_row = torch.stack([-sin * wide, cos * high + sin * wide * shear], dim=-1)
    return torch.stack([x_row, y_row], dim=-2)


def _room(images: Tensor, matrix: Tensor) -> tuple[Float[Tensor, "images 2"], Float[Tensor, "images 2"]]:
    """Least and largest shift, x first, with which no ink falls off; sampling spreads each pixel by one all around."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    pixels = torch.stack([x, y], dim=-1).view(-1, 2).double()
    reach = matrix.abs().sum(-1)
    lowest, highest = torch.zeros(2, len(images), 2, dtype=torch.float64)
    for start in range(0, len(images), _CHUNK):
        rows = slice(start, start + _CHUNK)
        ink = (images[rows] > 0).any(1).flatten(1)[..., None]
        moved = pixels @ matrix[rows].mT
        lowest[rows] = moved.masked_fill(~ink, torch.inf).amin(1)
        highest[rows] = moved.masked_fill(~ink, -torch.inf).amax(1)
    blank = highest < lowest
    edge = (SIZE + 1) / 2  # the first pixel centre outside
    lowest, highest = lowest.masked_fill(blank, 0) - reach, highest.masked_fill(blank, 0) + reach
    return -edge - lowest, edge - highest
