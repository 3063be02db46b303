"""MNIST's test images under random affine transformations within affNIST's ranges, with the true factors."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsnet.data.dataset import Split
from capsnet.data.download import DataDir
from capsnet.data.sets import expanded_mnist, mnist
from capsnet.data.sets.expanded_mnist import SHIFTS, SIZE
from capsnet.errors import InputError

__all__ = ["ENTRY", "FACTORS", "generated", "in_place", "read", "transform"]

FACTORS: dict[str, tuple[float, float]] = {
    "rotation_degrees": (-20.0, 20.0),
    "shear": (-0.2, 0.2),
    "scale_x": (0.8, 1.2),
    "scale_y": (0.8, 1.2),
}
"""Name to the range that `generated` draws uniformly from: affNIST's, as commonly quoted; not checked on its files."""
_CHUNK = 1000  # images transformed at a time
_TEST_SEED = 0


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The split `train` of expanded-mnist, or MNIST's test images transformed."""
    if split == "train":
        return expanded_mnist.read(split, data_dir=data_dir)
    return generated(mnist.read(split, data_dir=data_dir), seed=_TEST_SEED)


def generated(split: Split, *, seed: int) -> Split:
    """Each image once under a random affine transformation, as affNIST is commonly described to have been made.

    Rotation, shear and both scales are uniform in the ranges of `FACTORS`; then the image is moved to anywhere such
    that no ink falls off, each place as likely as the next. The order of the transformations and the interpolation are
    those of `transform`, which need not be affNIST's own.

    Returns:
        Images `uint8 [N, 1, 40, 40]`; `factors` are the parameters of `transform`. The same seed always draws the same.

    Raises:
        InputError: images with ink that does not fit into 40 x 40 pixels when transformed.
    """
    drawn = _drawn(len(split), seed)
    factors = _factors(drawn)
    lowest, highest = _room(split.images, _matrix(factors))
    if bool((lowest > highest).any()):
        raise InputError(f"images must hold ink that fits into {SIZE} x {SIZE} pixels when transformed; got larger")
    shift = lowest + (highest - lowest) * drawn[len(FACTORS) :].T
    factors |= dict(zip(SHIFTS, shift.float().T.contiguous(), strict=True))
    return Split(transform(split.images, factors), split.labels, {**split.factors, **factors})


def in_place(split: Split, *, seed: int) -> Split:
    """Each image once under the rotation, shear and scales that `generated` draws, about its centre.

    Returns:
        Images `uint8` of the shape they have; ink beyond the edges is lost. `factors` are those that were drawn; the
        same seed always draws the same.
    """
    factors = _factors(_drawn(len(split), seed))
    still = dict.fromkeys(SHIFTS, torch.zeros(len(split)))
    images = _sampled(split.images, factors | still, *split.images.shape[-2:])
    return Split(images, split.labels, {**split.factors, **factors})


def _drawn(count: int, seed: int) -> Float[Tensor, "factors images"]:
    """A number in [0, 1) for each factor, then for each direction of a shift, of each image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(FACTORS) + len(SHIFTS), count, generator=generator, dtype=torch.float64)


def _factors(drawn: Float[Tensor, "factors images"]) -> dict[str, Tensor]:
    return {
        name: (low + (high - low) * values).float()
        for (name, (low, high)), values in zip(FACTORS.items(), drawn, strict=False)
    }


def transform(
    images: UInt8[Tensor, "images channels height width"], parameters: Mapping[str, Tensor], *, size: int = SIZE
) -> UInt8[Tensor, "images channels {size} {size}"]:
    """Shear, scale, rotate and shift each image, in this order, about its centre, onto black of `size` x `size` pixels.

    The image is sampled once, bilinearly. With no shear, rotation and shift and with scales of 1, the result is
    `expanded_mnist.padded(images)` exactly.

    Args:
        images: intensities 0..255; what lies outside is black.
        parameters: one value per image for each of `rotation_degrees` (counter-clockwise), `shear` (pixels to the right
            per pixel above the centre), `scale_x` and `scale_y` (magnification, above 0), `shift_x_pixels` (to the
            right) and `shift_y_pixels` (downwards).
        size: height and width of the result, in pixels.

    Raises:
        InputError: a parameter is missing, unknown or of another length, or a scale is not above 0.

    Examples:
        turned = {name: torch.zeros(1) for name in (*FACTORS, "shift_x_pixels", "shift_y_pixels")}
        turned |= {"rotation_degrees": torch.tensor([90.0]), "scale_x": torch.ones(1), "scale_y": torch.ones(1)}
        transform(images, turned)  # uint8 [1, 1, 40, 40]
    """
    names = (*FACTORS, *SHIFTS)
    if set(parameters) != set(names):
        raise InputError(f"parameters of transform must be {', '.join(names)}; got {', '.join(parameters) or 'none'}")
    for name, values in parameters.items():
        if values.shape != (len(images),):
            raise InputError(
                f"{name} of transform must be one value per image, [{len(images)}]; got {list(values.shape)}"
            )
        if name.startswith("scale") and bool((values <= 0).any()):
            raise InputError(f"{name} of transform must be above 0; got {float(values.min()):g}")
    return _sampled(images, parameters, size, size)


def _sampled(images: Tensor, parameters: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """The same onto black of any height and width."""
    height, width = images.shape[-2:]
    inverse = torch.linalg.inv(_matrix(parameters))
    shift = torch.stack([parameters[name] for name in SHIFTS], dim=-1).double()
    y, x = torch.meshgrid(*(torch.arange(side).double() - (side - 1) / 2 for side in (rows, columns)), indexing="ij")
    pixels = torch.stack([x, y], dim=-1)  # of the result, from its centre
    half = torch.tensor([width, height]) / 2  # grid_sample counts in halves of the image's sides
    result = torch.empty(*images.shape[:2], rows, columns, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        source = torch.einsum("nij,nyxj->nyxi", inverse[part], pixels - shift[part, None, None])
        grid = (source / half).float()
        drawn = F.grid_sample(images[part].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        result[part] = drawn.round().clamp(0, 255)
    return result


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


ENTRY = replace(
    expanded_mnist.ENTRY,
    name="affnist-generated",
    source="made of mnist by capsnet: trained on expanded-mnist and tested on mnist's test images, each under one "
    "random affine transformation within affNIST's ranges, with the true factors; not the official test set",
    read=read,
)
