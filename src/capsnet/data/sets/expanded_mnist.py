"""MNIST digits at random places on black images of 40 x 40 pixels: Section 5.2 of Sabour et al. 2017.

"Robustness to Affine Transformations": a network is trained on MNIST digits "placed randomly on a black background of
40 x 40 pixels" and tested on affNIST.
"""

from dataclasses import replace

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from capsnet.data.augment import Augmentation, move
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir
from capsnet.data.sets import mnist
from capsnet.errors import InputError

__all__ = ["ENTRY", "MARGIN", "SHIFTS", "SIZE", "padded", "placed", "read"]

SIZE = 40
"""Height and width of every image, in pixels."""
MARGIN = 6
"""Pixels of black around an MNIST image of 28 x 28, and so the furthest a digit moves with its image."""
SHIFTS = ("shift_x_pixels", "shift_y_pixels")
_TEST_SEED = 0


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The digits of `train` in the middle, as a training moves them anew in every step, those of `test` placed once."""
    whole = mnist.read(split, data_dir=data_dir)
    return replace(whole, images=padded(whole.images)) if split == "train" else placed(whole, seed=_TEST_SEED)


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

    Returns:
        Images `uint8 [N, C, 40, 40]`; `factors` tell the shift, to the right and downwards. The same seed always draws
        the same.

    Raises:
        InputError: larger images.
    """
    height, width = split.images.shape[-2:]
    images = padded(split.images)
    reach = (SIZE - max(height, width)) // 2
    drawn = Augmentation(shift=reach).draw(len(split), generator=torch.Generator().manual_seed(seed))
    factors = dict(zip(SHIFTS, (drawn.dx.float(), drawn.dy.float()), strict=True))
    return Split(move(images, drawn), split.labels, {**split.factors, **factors})


ENTRY = replace(
    mnist.ENTRY,
    name="expanded-mnist",
    image_shape=(1, SIZE, SIZE),
    licence="that of mnist, of which its images are made",
    source="made of mnist by capsnet: digits at random places on black, for affnist, as in Sabour, Frosst, Hinton, "
    "Dynamic Routing Between Capsules, NIPS 2017, Section 5.2",
    read=read,
    shift=MARGIN,
    placed=True,
)
