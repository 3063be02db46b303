"""A digit on a photograph: found, scaled and centred as in MNIST (LeCun, Bottou, Bengio, Haffner 1998, Section III).

A photograph of a digit on paper differs from a training image of MNIST in all but the digit: it is dark on light,
large, unevenly lit, grainy, and the digit lies anywhere.

How the ink is found: the ground is what is left when every patch that differs from its surroundings is filled
to their level (`_ground`), so that gradients of light and shadows that reach the border belong to the ground;
ink is the difference from the ground, relative to it on paper, since light multiplies. Nothing here is learned.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsnet.errors import InputError

__all__ = ["SIDE", "Frame", "Framed", "channels_first", "frame_digit", "frame_of", "is_opposite"]

SIDE = 512
"""Longer side in pixels at which the ink is looked for."""

_PLAIN = 0.8  # share of the border's pixels that lie on the ground: MNIST 1.00, Fashion-MNIST 0.89, CIFAR-10 0.10
_NEAR = 0.1  # of intensity: so close to black or white is the ground
_GRID = 112  # and of the coarse grid for ground and connected parts
_STROKE = 0.3  # of the shorter side: what is narrower is ink and no shadow
_CROSSING = 0.12  # of the shorter side: what crosses the border and is narrower is the end of a stroke
_FAINTEST = 0.06  # of intensity: below, differences from the ground are paper and not ink
_SPECK = 0.08  # of the largest part's ink: what has less is dirt


@dataclass(frozen=True)
class Frame:
    """How the training images show their subject.

    Attributes:
        ground: intensity of the plain background they share, in [0, 1].
        box: longer side of the ink's bounding box relative to the image's side, their median, in (0, 1].

    Raises:
        InputError: a value outside its range.
    """

    ground: float
    box: float

    def __post_init__(self) -> None:
        if not 0 <= self.ground <= 1:
            raise InputError(f"ground of a frame must be in [0, 1]; got {self.ground}")
        if not 0 < self.box <= 1:
            raise InputError(f"box of a frame must be in (0, 1]; got {self.box}")


class Framed(NamedTuple):
    """A digit as a network that knows framed ones sees it."""

    image: UInt8[Tensor, "channels height width"]  # intensities 0 to 255
    inverted: bool  # whether dark and light were swapped
    empty: bool  # whether no ink was found, and the image is all ground


def frame_of(images: UInt8[Tensor, "n channels height width"]) -> Frame | None:
    """The frame of a training set; None where its images have no plain ground in common, as photographs.

    The ground is plain if at least 80 % of the pixels along the borders are within 0.1 of black, or of white.
    """
    levels = images[..., _ring(*images.shape[2:])].flatten().float() / 255  # [n * channels * border]
    if not len(levels):
        return None
    near = (levels - levels.median().round()).abs() <= _NEAR  # black or white, whichever more of them are nearer to
    if float(near.float().mean()) < _PLAIN:
        return None
    ground = float(levels[near].median())
    height, width = images.shape[2:]
    level = round(255 * ground)
    ink = torch.stack([(image.int() - level).abs().amax(0) > 51 for image in images])  # a fifth of the range
    rows, columns = ink.any(2), ink.any(1)  # [n, height], [n, width]
    longer = torch.maximum(_extent(rows) / height, _extent(columns) / width)[rows.any(1)]
    return Frame(ground, float(longer.median())) if len(longer) else None


def frame_digit(
    pixels: np.ndarray,
    image_shape: tuple[int, int, int],
    frame: Frame,
    *,
    invert: Literal["auto", "yes", "no"] = "auto",
) -> Framed:
    """Find the ink, stretch it to full contrast, scale and centre it.

    Its bounding box becomes as long as the frame's, and its centre of mass comes to the middle of the frame's ground,
    or as near to it as the box allows. An image without ink becomes all ground and no error: an empty sheet among many
    shall not stop the others.

    Args:
        pixels: `uint8 [H, W]` or `[H, W, 3]`.
        image_shape: channels (1 or 3), height and width of the result.
        frame: of the digits that the network knows.
        invert: swap dark and light; `auto` where the ink is darker than its ground and the frame's ground is dark, or
            both the other way.
    """
    channels, height, width = image_shape
    work = channels_first(_reduced(pixels), channels).float() / 255
    dark = _ink_is_dark(work) if invert == "auto" else (frame.ground < 0.5) == (invert == "yes")
    ink = _placed(_ink(work if dark else 1 - work, on_paper=dark), height, width, frame.box)
    towards = (0.0 if frame.ground >= 0.5 else 1.0) - frame.ground
    image = ((frame.ground + towards * ink) * 255).round().to(torch.uint8)
    return Framed(image, dark == (frame.ground < 0.5), empty=not bool(ink.any()))


def channels_first(array: np.ndarray, channels: int) -> UInt8[Tensor, "channels height width"]:
    """Pixels `[H, W]` or `[H, W, 3]` as a tensor of so many channels; grey is repeated."""
    image = torch.from_numpy(array)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)  # [1 or 3, height, width]
    return image.expand(channels, -1, -1).contiguous()


def is_opposite(image: UInt8[Tensor, "channels height width"], frame: Frame) -> bool:
    """Whether the border is nearer to the opposite of the frame's ground by far."""
    level = float(image.float().mean(0)[_ring(*image.shape[1:])].median()) / 255
    return abs(level - (1 - frame.ground)) + 0.25 < abs(level - frame.ground)


def _ring(height: int, width: int) -> Bool[Tensor, "height width"]:
    """The outermost pixels."""
    ring = torch.ones(height, width, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return ring


def _reduced(array: np.ndarray) -> np.ndarray:
    """At most `SIDE` pixels on the longer side."""
    from PIL import Image

    longer = max(array.shape[:2])
    if longer <= SIDE:
        return array
    size = [max(1, round(side * SIDE / longer)) for side in array.shape[1::-1]]
    return np.array(Image.fromarray(array).resize((size[0], size[1]), Image.Resampling.BOX))


def _coarse(image: Float[Tensor, "channels height width"]) -> Float[Tensor, "channels rows columns"]:
    """Averages over the cells of a grid of at most `_GRID` on the longer side."""
    height, width = image.shape[1:]
    scale = min(1.0, _GRID / max(height, width))
    return F.adaptive_avg_pool2d(image, (max(1, round(height * scale)), max(1, round(width * scale))))


def _ink_is_dark(image: Float[Tensor, "channels height width"]) -> bool:
    """Whether what differs from the ground is darker: the larger of what is seen as dark and as light ink.

    The hole of a 0 is light on dark, too, but smaller than the 0. Size counts as length times contrast.
    """
    grey = (_coarse(image).mean(0, keepdim=True) + 0.05).log()  # light multiplies: in shadow contrasts are as large
    dark, light = (_size_of((_filled(one) - one)[0]) for one in (grey, -grey))
    return dark >= light


def _size_of(difference: Float[Tensor, "rows columns"]) -> float:
    most = float(difference.max())
    if most <= 0:
        return 0.0
    parts = _without_specks(difference > 0.5 * most, difference)
    return most * max(float(_extent(parts.any(axis)[None])) for axis in (0, 1))


def _ink(image: Float[Tensor, "channels height width"], *, on_paper: bool) -> Float[Tensor, "channels height width"]:
    """Ink in [0, 1] of an image whose ink is dark; all 0 where there is none.

    Where ink is, is decided on the coarse grid, which averages noise away; how dark it is, pixel by pixel. Light on
    dark is given as its negative; `on_paper`, which is lit, differences are relative to the ground.
    """
    coarse = _coarse(image)
    ground = _ground(coarse)

    def below(ground: Tensor, levels: Tensor) -> Tensor:
        difference = (ground - levels) / ground.clamp(min=0.1) if on_paper else ground - levels
        least = difference.flatten(1).quantile(0.3, dim=1)  # above 0 almost everywhere: noise
        return difference - least[:, None, None]

    strength = below(ground, coarse).amax(0)  # [rows, columns]
    noise = 1.4826 * float((strength - strength.median()).abs().median())
    level = _level(strength, max(_FAINTEST, 5 * noise))
    if level is None:
        return torch.zeros_like(image)
    kept = _without_specks(strength > max(0.3 * level, 4 * noise), strength)
    near = F.max_pool2d(kept.float()[None], 3, 1, 1)  # the edges of a stroke are paler
    near = F.interpolate(near[None], image.shape[1:], mode="nearest")[0]  # [1, height, width]
    smooth = F.avg_pool2d(ground, 3, 1, 1, count_include_pad=False)
    smooth = F.interpolate(smooth[None], image.shape[1:], mode="bilinear", align_corners=False)[0]
    difference = below(smooth, image)  # [channels, height, width]
    full = _level(difference.amax(0)[near[0] > 0], _FAINTEST)
    if full is None:
        return torch.zeros_like(image)
    floor = 0.2 * full
    return ((difference - floor) / (0.95 * full - floor)).clamp(0, 1) * near


def _level(strength: Float[Tensor, "*pixels"], floor: float) -> float | None:
    """Mean of what is above `floor`, in which dark strokes count more than their pale edges; None for no ink."""
    ink = strength[strength > floor]
    return float(ink.square().sum() / ink.sum()) if len(ink) else None


def _ground(image: Float[Tensor, "channels rows columns"]) -> Float[Tensor, "channels rows columns"]:
    """The image with all that is darker than its surroundings filled to their level.

    Besides `_filled`, narrow dark parts are closed up, which also serves where a shadow ends amid the ink.
    """
    from scipy import ndimage

    width = 2 * _reach(image, _STROKE) + 1
    closed = ndimage.grey_closing(image.numpy(), (1, width, width))  # [channels, rows, columns]
    return torch.maximum(_filled(image), torch.from_numpy(closed))


def _filled(image: Float[Tensor, "channels rows columns"]) -> Float[Tensor, "channels rows columns"]:
    """Dark parts that do not reach the border filled as a landscape is by rain, up to the lowest way out.

    Grey-scale reconstruction (Vincent 1993, IEEE Trans. Image Processing 2, 176-201). What is narrow where it
    reaches the border, as the end of a stroke, is no way out.
    """
    from scipy import ndimage

    rows, columns = image.shape[1:]
    number = np.arange(rows * columns).reshape(rows, columns)
    around = np.concatenate([number[0], number[1:, -1], number[-1, :-1][::-1], number[1:-1, 0][::-1]])  # [border]
    reach = min(_reach(image, _CROSSING), len(around) // 4)
    levels = image.flatten(1).numpy()[:, around]  # [channels, border]
    filled = np.full((len(image), rows * columns), np.inf, np.float32)
    filled[:, around] = ndimage.grey_closing(levels, (1, 2 * reach + 1), mode="wrap")
    filled = filled.reshape(image.shape)
    floor = np.where(_ring(rows, columns), filled, image)
    while True:
        lower = np.maximum(ndimage.minimum_filter(filled, (1, 3, 3)), floor)
        if np.array_equal(lower, filled):
            return torch.from_numpy(filled)
        filled = lower


def _reach(image: Tensor, share: float) -> int:
    """Half the width of a window as wide as a share of the shorter side."""
    return max(1, round(share * min(image.shape[-2:]) / 2))


def _without_specks(
    parts: Bool[Tensor, "rows columns"], ink: Float[Tensor, "rows columns"]
) -> Bool[Tensor, "rows columns"]:
    """`parts` without the connected ones of too little ink, and without what comes in over the border beside others."""
    from scipy import ndimage

    label, count = ndimage.label(parts.numpy(), np.ones((3, 3)))  # 0 where there is no part
    every = np.arange(count + 1)
    mass = ndimage.sum_labels(ink.numpy(), label, every)  # [count + 1]
    peak = ndimage.maximum(ink.numpy(), label, every)
    mass[0] = peak[0] = 0
    contact = np.bincount(label[_ring(*parts.shape)], minlength=count + 1)
    foreign = contact > 0.15 * min(parts.shape)  # a table beside the sheet; a stroke's end is narrower
    if (mass[~foreign] > _SPECK * mass.max()).any():
        mass[foreign] = peak[foreign] = 0
    main = mass.argmax()
    return torch.from_numpy(((mass > _SPECK * mass[main]) & (peak > 0.5 * peak[main]))[label]) & parts


def _placed(
    ink: Float[Tensor, "channels rows columns"], height: int, width: int, box: float
) -> Float[Tensor, "channels height width"]:
    """Ink scaled in proportion to fill `box` of the image in one direction, its centre of mass in the middle."""
    from PIL import Image

    strength = ink.amax(0)
    dark = strength > 0.3
    if not bool(dark.any()):
        return torch.zeros(len(ink), height, width)
    top, bottom = _ends(dark.any(1))
    left, right = _ends(dark.any(0))
    scale = max((bottom - top) / (box * height), (right - left) / (box * width))  # pixels of the source in one
    strength = strength[top:bottom, left:right]
    total = float(strength.sum())

    def start(first: int, last: int, size: int, mass: Tensor) -> float:
        centre = first + float((mass * (torch.arange(len(mass)) + 0.5)).sum()) / total
        # The middle is pixel 14 of 28, as in MNIST: its makers rounded up.
        return min(max(centre - (size // 2 + 0.5) * scale, last - size * scale), first)

    x, y = start(left, right, width, strength.sum(0)), start(top, bottom, height, strength.sum(1))
    # The part of the source under the result, with nothing where it reaches over the source's border.
    x0, x1 = math.floor(x), math.ceil(x + width * scale)
    y0, y1 = math.floor(y), math.ceil(y + height * scale)
    part = torch.zeros(len(ink), y1 - y0, x1 - x0)
    part[:, top - y0 : bottom - y0, left - x0 : right - x0] = ink[:, top:bottom, left:right]
    region = (x - x0, y - y0, x - x0 + width * scale, y - y0 + height * scale)
    planes = [
        np.array(Image.fromarray(plane.numpy()).resize((width, height), Image.Resampling.BICUBIC, region))
        for plane in part
    ]
    result = torch.from_numpy(np.stack(planes)).clamp(0, 1)
    return (result / result.max().clamp(min=0.25)).clamp(0, 1)  # thin strokes fade when scaled down


def _ends(used: Bool[Tensor, "n"]) -> tuple[int, int]:
    found = used.nonzero()
    return int(found[0]), int(found[-1]) + 1


def _extent(used: Bool[Tensor, "n side"]) -> Float[Tensor, "n"]:
    """Length from the first to the last used place in each row; meaningless where none is."""
    side = used.shape[1]
    values = used.float()
    return side - values.argmax(1).float() - values.flip(1).argmax(1).float()
