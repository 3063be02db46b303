"""Digits laid over each other, as in MultiMNIST (Section 6 of Sabour et al. 2017).

Pure functions of tensors. What is drawn is drawn on the CPU from a seeded generator; what is done is done on the
images' device, so that a training makes new pairs for every step.
"""

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsnet.errors import InputError

__all__ = ["overlay", "pairs", "partners"]


def partners(
    labels: Int64[Tensor, "images"], index: Int64[Tensor, "batch"], *, generator: torch.Generator
) -> Int64[Tensor, "batch"]:
    """For each image of `index` a random one of another class, each of those as likely as the next.

    `labels` are those of all images, and the generator is one of the CPU.

    Raises:
        InputError: all images are of one class.
    """
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    if int((counts > 0).sum()) < 2:
        raise InputError(f"labels of images to be paired must be of at least 2 classes; got {len(labels)} of one class")
    first, own = (counts.cumsum(0) - counts)[labels[index]], counts[labels[index]]
    drawn = torch.rand(len(index), generator=generator, dtype=torch.float64)
    rank = (drawn * (len(labels) - own)).long()
    return by_class[torch.where(rank >= first, rank + own, rank)]  # ranks jump over the own class


def overlay(single_images: Float32[Tensor, "*batch objects channels height width"]) -> Tensor:
    """Images laid over each other, `[*batch, channels, height, width]`: intensities in [0, 1] added, cut off at 1."""
    return single_images.sum(-4).clamp(max=1)


def pairs(
    images: UInt8[Tensor, "images channels height width"],
    labels: Int64[Tensor, "images"],
    *,
    shift: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image laid once over one of another class, both moved by up to `shift` pixels in each direction.

    Args:
        images: intensities 0..255, with a margin of at least `shift` pixels of zeros around what they show.
        labels: their classes.
        shift: largest distance in pixels; each direction is drawn uniformly from {-shift, ..., shift}.
        seed: of partners and distances.

    Returns:
        The pairs `uint8 [images, C, H, W]`, their classes `int64 [images, 2]` and each object alone
        `uint8 [images, 2, C, H, W]`.

    Raises:
        InputError: all images are of one class.
    """
    generator = torch.Generator().manual_seed(seed)
    others = partners(labels, torch.arange(len(labels)), generator=generator)
    index = torch.stack([torch.arange(len(labels)), others], dim=1)
    height, width = images.shape[-2:]
    moves = torch.randint(2 * shift + 1, (*index.shape, 2), generator=generator)
    padded = F.pad(images, (shift, shift, shift, shift))
    rows = moves[..., 0, None] + torch.arange(height)
    columns = moves[..., 1, None] + torch.arange(width)
    single_images = padded[index[..., None, None], :, rows[..., :, None], columns[..., None, :]].movedim(-1, 2)
    added = single_images.sum(1, dtype=torch.int16).clamp(max=255).to(torch.uint8)
    return added, labels[index], single_images.contiguous()
