"""A digit on a photograph: found, scaled and centred as in MNIST (LeCun, Bottou, Bengio, Haffner 1998, Section III).

A photograph of a digit on paper differs from a training image of MNIST in all but the digit: it is dark on light,
large, unevenly lit, grainy, and the digit lies anywhere.

How the ink is found: the ground is what is left when every patch that differs from its surroundings is filled
to their level (`_ground`), so that gradients of light and shadows that reach the border belong to the ground;
ink is the difference from the ground, relative to it on paper, since light multiplies. Nothing here is learned.

This file needs numpy and Pillow only, as it goes along with exported networks, see `checkpoints.serving`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from capsnet.errors import InputError

__all__ = ["SIDE", "Frame", "Framed", "channels_first", "frame_digit", "frame_of", "is_opposite"]

Pixels = NDArray[np.uint8]
Levels = NDArray[np.floating[Any]]  # float32
Mask = NDArray[np.bool_]
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

    image: Pixels  # [channels, height, width], intensities 0 to 255
    inverted: bool  # whether dark and light were swapped
    empty: bool  # whether no ink was found, and the image is all ground


def frame_of(images: ArrayLike) -> Frame | None:
    """The frame of a training set; None where its images have no plain ground in common, as photographs.

    The ground is plain if at least 80 % of the pixels along the borders are within 0.1 of black, or of white.

    Args:
        images: `uint8 [n, channels, height, width]`, an array or a tensor on the CPU.
    """
    images = np.asarray(images)
    height, width = images.shape[2:]
    levels: Levels = images[..., _ring(height, width)].ravel().astype(np.float32) / 255  # [n * channels * border]
    if not levels.size:
        return None
    near = abs(levels - np.round(_median(levels))) <= _NEAR  # black or white, whichever more of them are nearer to
    if near.mean() < _PLAIN:
        return None
    ground = _median(levels[near])
    level = np.uint8(round(255 * ground))
    some = (images[start : start + 1000] for start in range(0, len(images), 1000))
    apart = [(np.maximum(one, level) - np.minimum(one, level)).max(1) for one in some]
    ink: Mask = np.concatenate(apart) > 51  # [n, height, width], a fifth of the range
    rows: Mask = np.any(ink, 2)  # [n, height]
    columns: Mask = np.any(ink, 1)  # [n, width]
    longer = np.maximum(_extent(rows) / height, _extent(columns) / width)[rows.any(1)]
    return Frame(ground, _median(longer)) if len(longer) else None


def frame_digit(
    pixels: Pixels,
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
    work: Levels = channels_first(_reduced(pixels), channels).astype(np.float32) / 255
    dark = _ink_is_dark(work) if invert == "auto" else (frame.ground < 0.5) == (invert == "yes")
    ink = _placed(_ink(work if dark else 1 - work, on_paper=dark), height, width, frame.box)
    towards = (0.0 if frame.ground >= 0.5 else 1.0) - frame.ground
    image = np.round((frame.ground + towards * ink) * 255).astype(np.uint8)
    return Framed(image, dark == (frame.ground < 0.5), empty=not ink.any())


def channels_first(pixels: Pixels, channels: int) -> Pixels:
    """Pixels `[H, W]` or `[H, W, 3]` as `[channels, H, W]`; grey is repeated."""
    image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # [1 or 3, H, W]
    return np.broadcast_to(image, (channels, *image.shape[1:])).copy()


def is_opposite(image: Pixels, frame: Frame) -> bool:
    """Whether the border of an image `[channels, H, W]` is nearer to the opposite of the frame's ground by far."""
    level = _median(image.mean(0, dtype=np.float32)[_ring(*image.shape[1:])]) / 255
    return abs(level - (1 - frame.ground)) + 0.25 < abs(level - frame.ground)


def _ring(height: int, width: int) -> Mask:
    """The outermost pixels, `[height, width]`."""
    ring = np.ones((height, width), bool)
    ring[1:-1, 1:-1] = False
    return ring


def _median(values: Levels) -> float:
    """The lower one of two in the middle."""
    return float(np.sort(values, axis=None)[(values.size - 1) // 2])


def _reduced(pixels: Pixels) -> Pixels:
    """At most `SIDE` pixels on the longer side."""
    from PIL import Image

    longer = max(pixels.shape[:2])
    if longer <= SIDE:
        return pixels
    size = [max(1, round(side * SIDE / longer)) for side in pixels.shape[1::-1]]
    return np.array(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BOX))


def _coarse(image: Levels) -> Levels:
    """Averages of `[channels, height, width]` over the cells of a grid of at most `_GRID` on the longer side."""
    scale = min(1.0, _GRID / max(image.shape[1:]))
    for axis in (1, 2):
        side = image.shape[axis]
        count = max(1, round(side * scale))
        starts, ends = np.arange(count) * side // count, -(-np.arange(1, count + 1) * side // count)
        bounds = np.stack([starts, ends], 1).ravel()[:-1]  # cells may overlap by a pixel: every other sum is one
        image = np.add.reduceat(image, bounds, axis).take(range(0, 2 * count, 2), axis)
        image /= (ends - starts).astype(np.float32).reshape([-1] + [1] * (2 - axis))
    return image


def _ink_is_dark(image: Levels) -> bool:
    """Whether what differs from the ground is darker: the larger of what is seen as dark and as light ink.

    The hole of a 0 is light on dark, too, but smaller than the 0. Size counts as length times contrast.
    """
    grey = np.log(_coarse(image).mean(0, keepdims=True) + 0.05)  # light multiplies: in shadow contrasts are as large
    dark, light = (_size_of((_filled(one) - one)[0]) for one in (grey, -grey))
    return dark >= light


def _size_of(difference: Levels) -> float:
    most = float(difference.max())
    if most <= 0:
        return 0.0
    parts = _without_specks(difference > 0.5 * most, difference)
    return most * max(float(_extent(np.any(parts, axis)[None])[0]) for axis in (0, 1))


def _ink(image: Levels, *, on_paper: bool) -> Levels:
    """Ink in [0, 1] of an image whose ink is dark, `[channels, height, width]`; all 0 where there is none.

    Where ink is, is decided on the coarse grid, which averages noise away; how dark it is, pixel by pixel. Light on
    dark is given as its negative; `on_paper`, which is lit, differences are relative to the ground.
    """
    height, width = image.shape[1:]
    coarse = _coarse(image)
    ground = _ground(coarse)

    def below(ground: Levels, levels: Levels) -> Levels:
        difference = ground - levels
        if on_paper:
            difference /= np.maximum(ground, 0.1)
        least = np.quantile(difference, 0.3, axis=(1, 2), keepdims=True)  # above 0 almost everywhere: noise
        return difference - least.astype(np.float32)

    strength = below(ground, coarse).max(0)  # [rows, columns]
    noise = 1.4826 * _median(abs(strength - _median(strength)))
    level = _level(strength, max(_FAINTEST, 5 * noise))
    if level is None:
        return np.zeros_like(image)
    kept = _without_specks(strength > max(0.3 * level, 4 * noise), strength)
    near = _extreme(np.maximum, kept, (1, 1))  # the edges of a stroke are paler
    rows, columns = (np.arange(side) * cells // side for side, cells in zip((height, width), near.shape, strict=True))
    near = near[rows][:, columns]  # [height, width]
    difference = below(_smooth(ground, height, width), image)  # [channels, height, width]
    full = _level(difference.max(0)[near], _FAINTEST)
    if full is None:
        return np.zeros_like(image)
    floor = 0.2 * full
    ink: Levels = ((difference - floor) / (0.95 * full - floor)).clip(0, 1) * near
    return ink


def _smooth(ground: Levels, height: int, width: int) -> Levels:
    """Averages over 3 x 3 cells, interpolated between the cells' middles to `[channels, height, width]`."""
    from PIL import Image

    cells = np.pad(ground, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    means: Levels = np.nanmean(sliding_window_view(cells, (3, 3), (1, 2)), (3, 4))  # [channels, rows, columns]
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in means]
    return np.stack([np.asarray(plane) for plane in planes])


def _level(strength: Levels, floor: float) -> float | None:
    """Mean of what is above `floor`, in which dark strokes count more than their pale edges; None for no ink."""
    ink = strength[strength > floor]
    return float((ink * ink).sum() / ink.sum()) if ink.size else None


def _ground(image: Levels) -> Levels:
    """The image `[channels, rows, columns]` with all that is darker than its surroundings filled to their level.

    Besides `_filled`, narrow dark parts are closed up, which also serves where a shadow ends amid the ink.
    """
    return np.maximum(_filled(image), _closed(image, (0, *[_reach(image, _STROKE)] * 2)))


def _filled(image: Levels) -> Levels:
    """Dark parts that do not reach the border filled as a landscape is by rain, up to the lowest way out.

    Grey-scale reconstruction (Vincent 1993, IEEE Trans. Image Processing 2, 176-201). What is narrow where it
    reaches the border, as the end of a stroke, is no way out.
    """
    rows, columns = image.shape[1:]
    number = np.arange(rows * columns).reshape(rows, columns)
    around = np.concatenate([number[0], number[1:, -1], number[-1, :-1][::-1], number[1:-1, 0][::-1]])  # [border]
    reach = min(_reach(image, _CROSSING), len(around) // 4)
    twice = np.arange(-2 * reach, len(around) + 2 * reach) % len(around)  # the border is closed
    levels = _closed(image.reshape(len(image), -1)[:, around[twice]], (0, reach))
    filled = np.full((len(image), rows * columns), np.inf, np.float32)
    filled[:, around] = levels[:, 2 * reach : 2 * reach + len(around)]
    filled = filled.reshape(image.shape)
    floor = np.where(_ring(rows, columns), filled, image)
    while True:
        lower = np.maximum(_extreme(np.minimum, filled, (0, 1, 1)), floor)
        if np.array_equal(lower, filled):
            return filled
        filled = lower


def _closed(image: Levels, reach: tuple[int, ...]) -> Levels:
    """What is darker than all around and narrower than a window, as light as that (grey-scale closing)."""
    return _extreme(np.minimum, _extreme(np.maximum, image, reach), reach)


def _extreme(pick: np.ufunc, image: NDArray[Any], reach: tuple[int, ...]) -> NDArray[Any]:
    """The largest (`pick` is `np.maximum`) or the least value of a window around each pixel, inside the image.

    The window ends `reach` pixels from its middle along each axis. It grows by two copies that are moved by up to
    what it covers; a copy that would be moved over the border stops there.
    """
    for axis, most in enumerate(reach):
        place, covered = np.arange(image.shape[axis]), 0
        while covered < most:
            step = min(2 * covered + 1, most - covered)
            before, after = (image.take(place + move, axis, mode="clip") for move in (-step, step))
            image = pick(pick(image, before), after)
            covered += step
    return image


def _reach(image: Levels, share: float) -> int:
    """Half the width of a window as wide as a share of the shorter side."""
    shorter: int = min(image.shape[-2:])
    return max(1, round(share * shorter / 2))


def _without_specks(parts: Mask, ink: Levels) -> Mask:
    """`parts` without the connected ones of too little ink, and without what comes in over the border beside others."""
    first, label = np.unique(_connected(parts), return_inverse=True)
    label = label.reshape(parts.shape)
    mass = np.bincount(label.ravel(), ink.ravel())  # [parts]
    peak = np.full(len(first), -np.inf, np.float32)
    np.maximum.at(peak, label, ink)
    contact = np.bincount(label[_ring(*parts.shape)], minlength=len(first))
    outside = first == parts.size
    mass[outside] = peak[outside] = 0
    foreign = contact > 0.15 * min(parts.shape)  # a table beside the sheet; a stroke's end is narrower
    if (mass[~foreign] > _SPECK * mass.max()).any():
        mass[foreign] = peak[foreign] = 0
    main = mass.argmax()
    kept: Mask = ((mass > _SPECK * mass[main]) & (peak > 0.5 * peak[main]))[label] & parts
    return kept


def _connected(parts: Mask) -> NDArray[np.int64]:
    """For each pixel the number of the first one that it is connected with, diagonals included; outside, their count.

    Each pixel takes the least number around it, and then the one that the pixel of this number has.
    """
    count = parts.size
    number = np.where(parts, np.arange(count).reshape(parts.shape), count)
    while True:
        least = np.where(parts, _extreme(np.minimum, number, (1, 1)), count)
        least = np.append(least, count)[least]
        if np.array_equal(least, number):
            return number
        number = least


def _placed(ink: Levels, height: int, width: int, box: float) -> Levels:
    """Ink scaled in proportion to fill `box` of the image in one direction, its centre of mass in the middle."""
    from PIL import Image

    strength = ink.max(0)
    dark = strength > 0.3
    if not dark.any():
        return np.zeros((len(ink), height, width), np.float32)
    top, bottom = _ends(dark.any(1))
    left, right = _ends(dark.any(0))
    scale = max((bottom - top) / (box * height), (right - left) / (box * width))  # pixels of the source in one
    strength = strength[top:bottom, left:right]
    total = float(strength.sum())

    def start(first: int, last: int, size: int, mass: Levels) -> float:
        centre = first + float((mass * (np.arange(len(mass)) + 0.5)).sum()) / total
        # The middle is pixel 14 of 28, as in MNIST: its makers rounded up.
        return min(max(centre - (size // 2 + 0.5) * scale, last - size * scale), first)

    x, y = start(left, right, width, strength.sum(0)), start(top, bottom, height, strength.sum(1))
    # The part of the source under the result, with nothing where it reaches over the source's border.
    x0, x1 = math.floor(x), math.ceil(x + width * scale)
    y0, y1 = math.floor(y), math.ceil(y + height * scale)
    part = np.zeros((len(ink), y1 - y0, x1 - x0), np.float32)
    part[:, top - y0 : bottom - y0, left - x0 : right - x0] = ink[:, top:bottom, left:right]
    region = (x - x0, y - y0, x - x0 + width * scale, y - y0 + height * scale)
    planes = [
        np.array(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, region)) for plane in part
    ]
    scaled = np.stack(planes).clip(0, 1)
    result: Levels = (scaled / max(scaled.max(), 0.25)).clip(0, 1)  # thin strokes fade when scaled down
    return result


def _ends(used: Mask) -> tuple[int, int]:
    found = used.nonzero()[0]
    return int(found[0]), int(found[-1]) + 1


def _extent(used: Mask) -> Levels:
    """Length from the first to the last used place in each row of `[n, side]`; meaningless where none is."""
    length: Levels = (used.shape[1] - used.argmax(1) - used[:, ::-1].argmax(1)).astype(np.float32)
    return length
