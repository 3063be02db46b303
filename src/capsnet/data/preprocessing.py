"""How an image file becomes what a network sees: a value stored with the weights, used wherever images are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from capsnet.data.image_preparation import MNIST_FRAME, RESIZED, Framing, ImagePreparation, Invert

__all__ = ["MNIST_FRAME", "RESIZED", "Framing", "Invert", "Prepared", "Preprocessing"]


class Prepared(NamedTuple):
    """An image ready for a network, see `PreparedPixels`."""

    image: UInt8[Tensor, "channels height width"]  # intensities 0 to 255
    inverted: bool = False
    framed: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preprocessing(ImagePreparation):
    """`ImagePreparation`, which see, that makes tensors."""

    def __call__(
        self,
        source: Path | bytes,
        *,
        invert: Invert = "auto",
        name: str | None = None,
        seen: bool = False,
        most: int | None = None,
    ) -> Prepared:
        """Read an image file and make it what the network sees; see `ImagePreparation.pixels`.

        Raises:
            InputError: not a readable image, or two channels, which no image file has.
        """
        found = self.pixels(source, invert=invert, name=name, seen=seen, most=most)
        return Prepared(torch.from_numpy(found.image), found.inverted, found.framed, found.notes)
