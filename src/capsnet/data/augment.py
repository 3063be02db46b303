"""Augmentation of a batch on its own device: what is drawn (on the CPU, seeded) apart from what is done.

Directions are as seen: x to the right, y down, a positive angle counter-clockwise, a positive shear with the
top to the right.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from torch import Tensor

from capsnet.data.image_preparation import central
from capsnet.errors import InputError
from capsnet.options import DataOptions

__all__ = ["WORDS", "Augmentation", "AugmentationParameters", "augment", "centre_crop", "move"]

WORDS: dict[str, dict[str, Any]] = {
    "none": {"shift": 0},
    "paper": {},
    "affine": {"rotation": 15.0, "scale": 0.1, "shear": 0.1},
    "photo": {"rotation": 10.0, "scale": 0.1, "brightness": 0.2, "contrast": 0.2},
}
"""What each choice of `--augment` does beside the shift of the data set; `photo` see `Augmentation.of`."""
PHOTO_SHIFT = 0.1  # of the shorter side


@dataclass(frozen=True, eq=False)
class AugmentationParameters:
    """What happens to each image of a batch: small CPU tensors; `parameters[index]` are those of some images.

    Attributes:
        dx: shift to the right, in pixels.
        dy: shift downwards, in pixels.
        flip: mirror left and right.
        angle: rotation about the image's centre, in degrees.
        scale: magnification about the centre; 1 leaves the size.
        shear: pixels to the right per pixel above the centre.
        crop_x: where the crop lies between the left edge, 0, and the right, below 1.
        crop_y: where it lies between the top and the bottom.
        brightness: added to the intensities.
        contrast: factor of the distance from the mean intensity; 1 leaves it.
        erase_x: where the erased square lies between the left edge, 0, and the right, below 1.
        erase_y: where it lies between the top and the bottom.
        crop: side in pixels of the square cut out of each image; None leaves images whole.
        erase: side in pixels of the square set to 0 in each image; 0 for none.
    """

    dx: Int64[Tensor, "count"]
    dy: Int64[Tensor, "count"]
    flip: Bool[Tensor, "count"]
    angle: Float32[Tensor, "count"]
    scale: Float32[Tensor, "count"]
    shear: Float32[Tensor, "count"]
    crop_x: Float64[Tensor, "count"]
    crop_y: Float64[Tensor, "count"]
    brightness: Float32[Tensor, "count"]
    contrast: Float32[Tensor, "count"]
    erase_x: Float64[Tensor, "count"]
    erase_y: Float64[Tensor, "count"]
    crop: int | None
    erase: int

    def __len__(self) -> int:
        return len(self.dx)

    def __getitem__(self, index: slice | Tensor) -> "AugmentationParameters":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class Augmentation:
    """Limits of the random changes; each is drawn uniformly, independently for every image.

    Attributes:
        shift: most pixels moved along x and along y, each in {-shift, ..., shift}; what moves in is zero.
            Default: Sabour et al. 2017, section 5, "shifted by up to 2 pixels in each direction with zero
            padding".
        flip: mirror left and right, every other image on average.
        rotation: largest angle to either side, in degrees, 0 to 180.
        scale: largest relative change of size, at least 0 and below 1; 0.1 draws from 0.9 to 1.1.
        shear: largest shear to either side, at least 0; 0.1 moves a pixel by a tenth of its height.
        crop: side in pixels of a square cut out of each image at a random place; None leaves images whole.
        brightness: largest intensity added or taken away, 0 to 1. The first author's code for CIFAR-10 has 63 / 255
            (https://github.com/Sarasra/models, research/capsules).
        contrast: largest relative change of the distance from the mean intensity, 0 to 1; 0.8, as in that code, draws
            from 0.2 to 1.8.
        erase: side in pixels of a square set to 0 at a random place of each image (Zhong et al. 2020, arXiv
            1708.04896, with one size).

    Raises:
        InputError: a limit out of its range.
    """

    shift: int = 2
    flip: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    crop: int | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    erase: int = 0

    @classmethod
    def of(
        cls, options: DataOptions, *, shift: int, crop: int | None, image_shape: tuple[int, int, int]
    ) -> "Augmentation":
        """That of a run.

        `photo` moves by a tenth of the shorter side, and mirrors images in colour only: in grey there are letters and
        X-rays, which mean something else from the other side.

        Args:
            options: of the run. What is given beside `options.augment` takes the place of the word's.
            shift: of the data set, where no other is given.
            crop: of the data set.
            image_shape: channels, height and width of the images that the network sees.
        """
        word = {"shift": shift, **WORDS[options.augment or "paper"]}
        if options.augment == "photo":
            channels, *sides = image_shape
            word |= {"shift": round(PHOTO_SHIFT * min(sides)), "flip": channels == 3}
        names = [field.name for field in fields(cls) if field.name != "crop"]
        given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        return cls(**{**word, **given}, crop=crop)

    def __str__(self) -> str:
        """Its parts: `shift 3 pixels, flip, rotation 10 degrees, scale 0.1`."""
        units = {"shift": " pixels", "rotation": " degrees", "erase": " pixels", "crop": " pixels"}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = (
            name if value is True else f"{name} {value:g}{units.get(name, '')}"
            for name, value in values.items()
            if value
        )
        return ", ".join(parts) or "nothing"

    def __post_init__(self) -> None:
        if self.erase < 0:
            raise InputError(f"erase of the augmentation must be 0 pixels or more; got {self.erase}")
        if self.shift < 0:
            raise InputError(f"shift of the augmentation must be 0 pixels or more; got {self.shift}")
        if not 0 <= self.rotation <= 180:
            raise InputError(f"rotation of the augmentation must be 0 to 180 degrees; got {self.rotation}")
        if not 0 <= self.scale < 1:
            raise InputError(f"scale of the augmentation must be at least 0 and below 1; got {self.scale}")
        if not 0 <= self.shear < math.inf:
            raise InputError(f"shear of the augmentation must be finite and at least 0; got {self.shear}")
        if self.crop is not None and self.crop < 1:
            raise InputError(f"crop of the augmentation must be at least 1 pixel; got {self.crop}")
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} of the augmentation must be 0 to 1; got {getattr(self, name)}")

    def draw(self, count: int, *, generator: torch.Generator) -> AugmentationParameters:
        """Draw for `count` images; with several processes, for the global batch, each taking its rows.

        Args:
            count: number of images.
            generator: a CPU generator. What it is asked for depends on `count` alone, and on whether anything is
                erased, so switching one change on or off leaves the others as they were.
        """
        uniform = torch.rand(6, count, generator=generator, dtype=torch.float64)
        dx, dy = (uniform[:2] * (2 * self.shift + 1)).long() - self.shift
        angle, scale, shear = (2 * uniform[3:] - 1).float()
        # A second draw, so that the numbers of the first are those of versions that knew no others.
        crop_x, crop_y, *light = torch.rand(4, count, generator=generator, dtype=torch.float64)
        brightness, contrast = (2 * torch.stack(light) - 1).float()
        erase_x = erase_y = torch.zeros(count, dtype=torch.float64)
        if self.erase:
            erase_x, erase_y = torch.rand(2, count, generator=generator, dtype=torch.float64)
        return AugmentationParameters(
            dx,
            dy,
            (uniform[2] < 0.5) & self.flip,
            self.rotation * angle,
            1 + self.scale * scale,
            self.shear * shear,
            crop_x,
            crop_y,
            self.brightness * brightness,
            1 + self.contrast * contrast,
            erase_x,
            erase_y,
            self.crop,
            self.erase,
        )


def augment(
    images: Float32[Tensor, "batch channels height width"], parameters: AugmentationParameters
) -> Float32[Tensor, "batch channels new_height new_width"]:
    """Shear, scale, rotate, flip, shift, crop, brighten, change the contrast of, then erase from each image, in order.

    Zeros move in. Flips, shifts and crops move pixels and change none. Only when an image of the batch is sheared,
    scaled or rotated is the batch sampled anew, once, bilinearly, about the centre. Contrast is about the mean of each
    channel of the brightened image; what then lies outside [0, 1] is cut off.

    Args:
        images: intensities in [0, 1].
        parameters: one set per image, from `Augmentation.draw`.

    Returns:
        As `images`, in [0, 1], `crop` pixels high and wide if that is given; `images` itself if nothing is to be done.

    Raises:
        InputError: not one set of parameters per image, or a crop larger than the images.

    Examples:
        parameters = Augmentation(shift=2).draw(128, generator=torch.Generator().manual_seed(0))
        augment(torch.rand(128, 1, 28, 28), parameters)  # [128, 1, 28, 28]
    """
    p = parameters
    if len(p) != len(images):
        raise InputError(f"parameters of augment must be one set per image, {len(images)}; got {len(p)}")
    if bool((p.angle != 0).any() | (p.scale != 1).any() | (p.shear != 0).any()):
        images = _affine(images, p)
    if bool(p.flip.any() | (p.dx != 0).any() | (p.dy != 0).any()):
        images = move(images, p)
    if p.crop is not None:
        images = _crop(images, p, p.crop)
    if bool((p.brightness != 0).any() | (p.contrast != 1).any()):
        images = _light(images, p)
    return _erased(images, p) if p.erase else images


def centre_crop(images: Shaped[Tensor, "*batch height width"], size: int) -> Shaped[Tensor, "*batch {size} {size}"]:
    """The central `size` x `size` pixels of images `[N, C, H, W]` of any type; of two middles the upper left one.

    Raises:
        InputError: an image smaller than that.
    """
    _check_crop(images, size)
    height, width = images.shape[-2:]
    return images[..., central(height, size), central(width, size)]


def move(
    images: Shaped[Tensor, "batch channels height width"], parameters: AugmentationParameters
) -> Shaped[Tensor, "batch channels height width"]:
    """Flip and shift each image of any type by its own parameters, and do nothing else; zeros move in."""
    p = parameters
    batch, channels, height, width = images.shape
    y = torch.arange(height) - p.dy[:, None]
    x = torch.arange(width) - p.dx[:, None]
    x = torch.where(p.flip[:, None], width - 1 - x, x)
    # One pixel of zeros around the image; whatever comes from outside is read there.
    y = (y + 1).clamp(0, height + 1).to(images.device, non_blocking=True)
    x = (x + 1).clamp(0, width + 1).to(images.device, non_blocking=True)
    source = (y[:, :, None] * (width + 2) + x[:, None, :]).view(batch, 1, height * width)
    padded = F.pad(images, (1, 1, 1, 1)).flatten(2)
    return padded.gather(2, source.expand(-1, channels, -1)).view(images.shape)


def _affine(images: Tensor, p: AugmentationParameters) -> Tensor:
    height, width = images.shape[2:]
    cos, sin = p.angle.deg2rad().cos(), p.angle.deg2rad().sin()
    # The inverse map, from a pixel of the result to its source: rotate back, unscale, unshear. affine_grid
    # wants it in halves of the image's sides.
    xx, xy = (cos + p.shear * sin) / p.scale, (p.shear * cos - sin) / p.scale
    yx, yy = sin / p.scale, cos / p.scale
    zero = torch.zeros_like(xx)
    rows = [xx, xy * height / width, zero, yx * width / height, yy, zero]
    theta = torch.stack(rows, dim=-1).view(-1, 2, 3).to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _check_crop(images: Tensor, size: int) -> None:
    height, width = images.shape[-2:]
    if not 0 < size <= min(height, width):
        raise InputError(f"crop must be 1 to {min(height, width)} pixels for images of {height} x {width}; got {size}")


def _crop(images: Tensor, p: AugmentationParameters, size: int) -> Tensor:
    _check_crop(images, size)
    batch, channels, height, width = images.shape
    top, left = (p.crop_y * (height - size + 1)).long(), (p.crop_x * (width - size + 1)).long()
    y, x = top[:, None] + torch.arange(size), left[:, None] + torch.arange(size)
    source = (y[:, :, None] * width + x[:, None, :]).view(batch, 1, size * size)
    source = source.to(images.device, non_blocking=True).expand(-1, channels, -1)
    return images.flatten(2).gather(2, source).view(batch, channels, size, size)


def _light(images: Tensor, p: AugmentationParameters) -> Tensor:
    brightness, contrast = (
        values.to(images.device, non_blocking=True).view(-1, 1, 1, 1) for values in (p.brightness, p.contrast)
    )
    images = images + brightness
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * contrast + mean).clamp(0, 1)


def _erased(images: Tensor, p: AugmentationParameters) -> Tensor:
    height, width = images.shape[2:]
    top = (p.erase_y * max(1, height - p.erase + 1)).long()[:, None]
    left = (p.erase_x * max(1, width - p.erase + 1)).long()[:, None]
    y, x = torch.arange(height), torch.arange(width)
    rows, columns = (y >= top) & (y < top + p.erase), (x >= left) & (x < left + p.erase)
    square = rows[:, None, :, None] & columns[:, None, None, :]  # [batch, 1, height, width]
    return images.masked_fill(square.to(images.device, non_blocking=True), 0)
