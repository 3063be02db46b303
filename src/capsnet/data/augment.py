"""Augmentation of a batch on its own device: what is drawn (on the CPU, seeded) apart from what is done.

Directions are as seen: x to the right, y down, a positive angle counter-clockwise, a positive shear with the
top to the right.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from capsnet.errors import InputError

__all__ = ["Augmentation", "AugmentationParameters", "augment"]


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
    """

    dx: Int64[Tensor, "count"]
    dy: Int64[Tensor, "count"]
    flip: Bool[Tensor, "count"]
    angle: Float32[Tensor, "count"]
    scale: Float32[Tensor, "count"]
    shear: Float32[Tensor, "count"]

    def __len__(self) -> int:
        return len(self.dx)

    def __getitem__(self, index: slice | Tensor) -> "AugmentationParameters":
        return AugmentationParameters(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


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

    Raises:
        InputError: a limit out of its range.
    """

    shift: int = 2
    flip: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise InputError(f"shift of the augmentation must be 0 pixels or more; got {self.shift}")
        if not 0 <= self.rotation <= 180:
            raise InputError(f"rotation of the augmentation must be 0 to 180 degrees; got {self.rotation}")
        if not 0 <= self.scale < 1:
            raise InputError(f"scale of the augmentation must be at least 0 and below 1; got {self.scale}")
        if not 0 <= self.shear < math.inf:
            raise InputError(f"shear of the augmentation must be finite and at least 0; got {self.shear}")

    def draw(self, count: int, *, generator: torch.Generator) -> AugmentationParameters:
        """Draw for `count` images; with several processes, for the global batch, each taking its rows.

        Args:
            count: number of images.
            generator: a CPU generator. What it is asked for depends on `count` alone, so switching one change
                on or off leaves the others as they were.
        """
        uniform = torch.rand(6, count, generator=generator, dtype=torch.float64)
        dx, dy = (uniform[:2] * (2 * self.shift + 1)).long() - self.shift
        angle, scale, shear = (2 * uniform[3:] - 1).float()
        return AugmentationParameters(
            dx,
            dy,
            (uniform[2] < 0.5) & self.flip,
            self.rotation * angle,
            1 + self.scale * scale,
            self.shear * shear,
        )


def augment(
    images: Float32[Tensor, "batch channels height width"], parameters: AugmentationParameters
) -> Float32[Tensor, "batch channels height width"]:
    """Shear, scale, rotate, flip and shift each image by its own parameters, in this order; zeros move in.

    Flips and shifts move pixels and change none. Only when an image of the batch is sheared, scaled or
    rotated is the batch sampled anew, once, bilinearly, about the centre.

    Args:
        images: intensities in [0, 1].
        parameters: one set per image, from `Augmentation.draw`.

    Returns:
        As `images`, in [0, 1]; `images` itself if nothing is to be done.

    Raises:
        InputError: not one set of parameters per image.

    Example:
        parameters = Augmentation(shift=2).draw(128, generator=torch.Generator().manual_seed(0))
        augment(torch.rand(128, 1, 28, 28), parameters)  # [128, 1, 28, 28]
    """
    p = parameters
    if len(p) != len(images):
        raise InputError(f"parameters of augment must be one set per image, {len(images)}; got {len(p)}")
    if bool((p.angle != 0).any() | (p.scale != 1).any() | (p.shear != 0).any()):
        images = _affine(images, p)
    if bool(p.flip.any() | (p.dx != 0).any() | (p.dy != 0).any()):
        images = _move(images, p)
    return images


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


def _move(images: Tensor, p: AugmentationParameters) -> Tensor:
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
