"""How an image file becomes the pixels that a network sees: the settings, and reading by them.

`preprocessing.py` makes tensors of them. This file needs numpy and Pillow only, as do those it imports: they go along
with exported networks (`checkpoints.serving`), so that the same code prepares images there.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from capsnet.data.image_file import Resize, read_image
from capsnet.data.photo import SIDE, Frame, channels_first, frame_digit, is_opposite
from capsnet.errors import InputError

__all__ = ["MNIST_FRAME", "RESIZED", "Framing", "ImagePreparation", "Invert", "PreparedPixels", "central"]

P = TypeVar("P", bound="ImagePreparation")
Framing = Literal["off", "digits"]
Invert = Literal["auto", "yes", "no"]
MNIST_FRAME = Frame(ground=0.0, box=20 / 28)
"""How the makers of MNIST placed a digit: white on black, 20 of 28 pixels long."""
RESIZED = {
    "pad": "in proportion, with the colour of their edge around them",
    "crop": "in proportion, and their middle cut out",
    "squash": "whatever their proportions",
}
"""What `ImagePreparation.resize` means."""


class PreparedPixels(NamedTuple):
    """An image ready for a network."""

    image: NDArray[np.uint8]  # [channels, height, width], intensities 0 to 255
    inverted: bool = False  # whether dark and light were swapped
    framed: bool = False  # whether a digit was cut out, scaled and centred; False where the image was only resized
    notes: tuple[str, ...] = ()  # what else its owner should know: that it is empty, or what reading it changed or lost


@dataclass(frozen=True)
class ImagePreparation:
    """How an image file becomes what a network sees.

    It is read in grey or colour. With `framing` "digits", and unless it has the network's size already, its ink is
    cut out, scaled and centred as in MNIST; else it is resized. Then the centre is cut out.

    Attributes:
        height: in pixels, before `crop`.
        width: in pixels, before `crop`.
        channels: 1 for grey (luma of ITU-R 601), 3 for colour.
        crop: side of the central square that the network sees; None for the whole image.
        bits: of integer images of more than 8 bits; None where each is read by its own range.
        framing: `digits` for networks that know framed digits, else `off`.
        frame: where the digit lies, with framing "digits".
        resize: what becomes of an image's proportions, see `image_file.resized`; `squash` of weights from before this.
        filter: of resizing. This and what follows has one value today, and is kept so that a file which comes to mean
            something else is refused, and not read otherwise.
        orientation: images are turned as their EXIF tag says.
        ground: under transparency: white, or black where white would hide what is drawn, see `image_file`.

    Raises:
        InputError: a value outside its range, or a frame without framing, or the other way.
    """

    height: int
    width: int
    channels: int
    crop: int | None = None
    bits: int | None = None
    framing: Framing = "off"
    frame: Frame | None = None
    resize: Resize = "squash"
    filter: Literal["lanczos"] = "lanczos"
    orientation: Literal["exif"] = "exif"
    ground: Literal["white unless unseen"] = "white unless unseen"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.channels < 1:
            shape = self.channels, self.height, self.width
            raise InputError(f"channels, height and width of a preprocessing must be from 1 on; got {shape}")
        if self.crop is not None and not 0 < self.crop <= min(self.height, self.width):
            raise InputError(f"crop of a preprocessing must be 1 to the shorter side; got {self.crop}")
        if self.bits is not None and not 8 <= self.bits <= 32:
            raise InputError(f"bits of a preprocessing must be 8 to 32; got {self.bits}")
        if (self.framing == "digits") != (self.frame is not None):
            raise InputError(f"frame of a preprocessing must go with framing digits; got {self.framing}")

    def __str__(self) -> str:
        """What becomes of an image, in words: `resized to 32 x 32 pixels in proportion, ..., in colour`."""
        size, colour = f"{self.height} x {self.width} pixels", "in grey" if self.channels == 1 else "in colour"
        cut = "" if self.crop is None else f", the central {self.crop} x {self.crop} cut out"
        if self.framing == "digits":
            return f"digit cut out, scaled in proportion and centred in {size}{cut}, {colour}"
        return f"resized to {size} {RESIZED[self.resize]}{cut}, {colour}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network sees."""
        return self.channels, self.crop or self.height, self.crop or self.width

    def with_framing(self: P, framing: Framing | None) -> P:
        """The same with another framing; digits then lie as in MNIST. None changes nothing."""
        if framing in (None, self.framing):
            return self
        return replace(self, framing=framing, frame=MNIST_FRAME if framing == "digits" else None)

    def pixels(
        self,
        source: Path | bytes,
        *,
        invert: Invert = "auto",
        name: str | None = None,
        seen: bool = False,
        most: int | None = None,
    ) -> PreparedPixels:
        """Read an image file and make it what the network sees.

        Dark and light are swapped if `invert` says so; with `auto` only where, with framing "digits", the ink is on the
        opposite of the frame's ground. `name` is what errors call the image, by default the path. An image `seen` as
        the network is to see it, of the size after `crop`, is not cut again. `most` is `read_image`'s.

        Raises:
            InputError: not a readable image, or two channels, which no image file has.
        """
        if self.channels not in (1, 3):
            raise InputError(f"network must take images of 1 or 3 channels to read files; it takes {self.channels}")
        if invert not in ("auto", "yes", "no"):
            raise InputError(f"invert must be auto, yes or no; got {invert!r}")
        kind, size = 1 if self.channels == 1 else None, (self.height, self.width)
        keep = (self.crop, self.crop) if seen and self.crop else None
        whole_image = {"size": size, "keep": keep, "resize": self.resize}
        how: dict[str, Any] = whole_image if self.frame is None else {"least": max(SIDE, *(2 * side for side in size))}
        pixels, notes = read_image(source, **how, channels=kind, bits=self.bits, name=name, most=most)
        fits = pixels.shape[:2] in (size, keep)
        if self.frame is not None and not fits:
            found = frame_digit(pixels, (self.channels, *size), self.frame, invert=invert)
            notes = (*notes, "no ink") if found.empty else notes
            return PreparedPixels(self._cropped(found.image), found.inverted, framed=True, notes=notes)
        whole = channels_first(pixels, self.channels)
        swap = invert == "yes" or (invert == "auto" and self.frame is not None and is_opposite(whole, self.frame))
        image = self._cropped(whole)
        blank = bool((image == image[:, :1, :1]).all())
        notes = (*notes, "blank: one colour all over") if blank else notes
        return PreparedPixels(255 - image if swap else image, swap, notes=notes)

    def _cropped(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if image.shape == self.image_shape:
            return image
        rows, columns = (central(side, self.image_shape[1]) for side in image.shape[1:])
        return image[:, rows, columns]


def central(side: int, size: int) -> slice:
    """The central `size` of `side` pixels; of two middles the first."""
    start = (side - size) // 2
    return slice(start, start + size)
