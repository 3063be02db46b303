"""The embedded data set `strokes`: the digits 0-9 as pen strokes, drawn on the spot; nothing is downloaded.

A digit is one of several skeletons, splines through a few control points. The points are jittered, the pose
(slant, scale, rotation, shift) is applied to them, and the pen's ink is a function of each pixel's distance
to the curve. The true pose of every image is known and kept in `Split.factors`: that is what the set is for.
Directions are as seen: x to the right, y down, a positive rotation counter-clockwise, a positive slant with
the top to the right.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from capsnet.data.dataset import Dataset, Split, check_memory
from capsnet.data.download import DataDir
from capsnet.data.registry import Entry
from capsnet.errors import InputError
from capsnet.options.schema import shown

__all__ = ["ENTRY", "FACTORS", "SKELETONS", "read", "render", "strokes"]

# Each line a skeleton of the digit before the colon. "/" parts strokes; points are x,y in hundredths of the
# digit's height. Equal points are one control point, so strokes that share one stay joined there, in a
# corner. A stroke that ends where it began is closed.
_TABLE = """
0: 30,0 9,13 0,50 9,87 30,100 51,87 60,50 51,13 30,0
0: 22,0 6,15 0,52 7,87 21,100 36,85 42,48 36,13 22,0
0: 50,3 22,4 2,36 4,80 28,100 56,86 66,46 50,10 30,6 20,18
1: 5,0 5,33 5,66 5,100
1: 6,24 17,14 26,0 / 26,0 26,33 26,66 26,100
1: 8,24 19,13 28,0 / 28,0 28,33 28,66 28,100 / 6,100 28,100 50,100
2: 2,22 12,5 30,0 48,8 52,28 38,55 18,80 0,100 / 0,100 28,98 58,99
2: 4,20 16,3 36,0 52,14 48,38 30,66 12,90 2,92 4,80 16,80 34,94 60,96
2: 0,24 14,4 34,0 50,14 46,38 26,68 4,96 / 4,96 22,92 40,98 60,90
3: 4,14 22,0 44,6 48,24 36,42 18,47 / 18,47 42,54 54,72 44,92 22,100 0,88
3: 2,2 26,1 50,0 / 50,0 38,20 24,40 / 24,40 46,48 54,70 40,94 18,100 0,90
3: 2,12 24,0 46,10 42,34 22,48 16,42 28,44 50,58 52,82 28,100 0,90
4: 8,0 4,28 0,56 / 0,56 28,56 56,52 / 44,18 42,58 40,100
4: 40,0 20,30 0,64 / 0,64 28,64 60,64 / 40,0 40,33 40,66 40,100
4: 4,6 0,34 12,52 32,50 50,38 / 54,0 50,38 46,70 44,100
5: 52,2 30,1 10,0 / 10,0 8,20 5,42 / 5,42 28,36 50,50 52,76 32,98 0,94
5: 54,2 32,0 14,6 8,26 16,42 40,50 52,70 40,94 18,100 0,90
5: 10,10 8,28 4,46 / 4,46 26,40 48,52 50,78 30,100 2,92 / 12,6 32,4 56,0
6: 46,2 22,18 4,50 4,80 22,100 44,92 50,72 36,56 16,62 4,80
6: 36,0 18,30 4,62 8,90 28,100 46,88 46,68 28,58 10,68
6: 52,12 38,0 16,14 2,48 6,84 28,100 50,88 52,64 32,52 8,64
7: 0,3 30,4 60,0 / 60,0 44,32 30,64 20,100
7: 0,4 30,2 60,2 / 60,2 45,32 30,64 18,100 / 16,52 34,50 54,48
7: 2,18 4,2 / 4,2 32,4 62,2 / 62,2 42,34 31,66 28,100
8: 46,14 26,0 6,16 16,40 40,58 50,80 26,100 2,82 12,58 36,40 46,14
8: 28,0 8,10 8,34 28,46 48,34 48,10 28,0 / 28,46 4,58 2,86 28,100 54,86 52,58 28,46
8: 44,6 22,0 6,16 16,40 42,60 48,84 24,100 2,82 14,58 40,38 54,16
9: 46,10 24,0 2,14 4,40 24,48 44,34 46,10 / 46,10 44,50 42,100
9: 48,14 28,0 6,10 2,34 20,48 42,34 48,14 / 48,14 50,50 42,86 22,100 4,90
9: 46,8 22,0 2,18 6,42 26,46 44,28 46,8 / 46,8 38,40 26,72 10,100
"""
SKELETONS: tuple[tuple[str, ...], ...] = tuple(
    tuple(line[2:].strip() for line in _TABLE.splitlines() if line.startswith(f"{digit}:")) for digit in range(10)
)
# Name -> the range that `strokes` draws uniformly from, at 28 pixels; those in pixels grow with the image.
FACTORS: dict[str, tuple[float, float]] = {
    "slant_degrees": (-12.0, 24.0),
    "rotation_degrees": (-15.0, 15.0),
    "scale": (0.7, 1.0),
    "aspect": (0.8, 1.2),
    "stroke_width_pixels": (1.6, 4.0),
    "x_pixels": (-2.5, 2.5),
    "y_pixels": (-2.5, 2.5),
}
VALIDATION = 1_000
"""Images of the split for validation."""
_LARGEST_SEED = 2**62 - 1  # PyTorch takes seeds below 2**64, and three are made of one
_NATIVE_SIZE = 28
_DIGIT_HEIGHT = 20 / 28  # of the image at scale 1, as in MNIST
_JITTER = 0.03  # standard deviation of a control point, in heights of the digit
_PRESSURE = 0.15  # largest relative change of the width along the strokes
_FAINTEST = 0.75  # ink of the palest pen
_SEGMENTS = 32  # line segments a skeleton is drawn with
_CHUNK = 1 << 18  # distances held at a time


class _Curves(NamedTuple):
    """All skeletons, padded to the same sizes; those of digit d are `variants[d]` from `first[d]` on."""

    first: Int64[Tensor, "digits"]
    variants: Int64[Tensor, "digits"]
    points: Float[Tensor, "skeletons points 2"]  # heights of the digit, about the centre of its box
    bend: Float[Tensor, "skeletons points points"]  # takes the affine part out of a jitter
    starts: Float[Tensor, "skeletons segments points"]
    ends: Float[Tensor, "skeletons segments points"]


def strokes(
    *, image_size: int = 28, train: int = 10_000, validation: int = VALIDATION, test: int = 2_000, seed: int = 0
) -> Dataset:
    """Draw the data set: white ink on black, "0" to "9" equally often, pose factors uniform in their ranges.

    Args:
        image_size: height and width in pixels, at least 12.
        train: number of training images.
        validation: number of validation images; 0 for no such split.
        test: number of test images.
        seed: 0 to 2**62 - 1; the same seed draws the same images, another machine's rounding aside (one grey
            level). Each split has a stream of its own.

    Returns:
        Images `uint8 [N, 1, S, S]`. `factors` holds the names of `FACTORS`: degrees; relative size (1: the
        digit is 20/28 of the image high); width relative to the skeleton's own; and, in pixels of this image,
        the width of the pen and the shift of the digit's centre from the image's.

    Raises:
        InputError: an argument out of its range, or images that do not fit into memory.

    Examples:
        strokes(train=100).train.factors["slant_degrees"]  # float32 [100]
    """
    _check_size(image_size)
    _check_seed(seed)
    for name, value, least in (("train", train, 1), ("validation", validation, 0), ("test", test, 1)):
        if value < least:
            raise InputError(f"{name} of strokes must be at least {least} images; got {value}")
    check_memory(train + validation + test, (1, image_size, image_size))
    counts = {"train": train, "test": test, "validation": validation}
    splits = {split: _split(count, image_size, _stream(seed, split)) for split, count in counts.items() if count}
    return ENTRY.dataset(splits)


def read(split: str, *, data_dir: DataDir = None, side: int, seed: int) -> Split:
    """The same split as that of `strokes(image_size=side, seed=seed)`."""
    return _split(ENTRY.counts[split], side, _stream(seed, split))


def render(
    labels: Int64[Tensor, "n"],
    factors: Mapping[str, Tensor],
    *,
    image_size: int = 28,
    skeletons: Int64[Tensor, "n"] | None = None,
    generator: torch.Generator | None = None,
) -> UInt8[Tensor, "n 1 size size"]:
    """Draw digits of given pose: a skeleton is widened, slanted, scaled, rotated and shifted, in this order.

    Args:
        labels: the digits, 0 to 9.
        factors: `float32 [N]` for each name of `FACTORS`, of any value but a pen's width above 0.
        image_size: height and width in pixels, at least 12.
        skeletons: which of the digit's skeletons, `0` to `len(SKELETONS[digit]) - 1`; default the first.
        generator: draws what makes each image a hand's: jitter of the control points, without an affine
            part, so that `factors` stay the true pose; pressure along the strokes; paleness. Default: none.

    Returns:
        Intensities 0 to 255.

    Raises:
        InputError: a digit, a skeleton or a factor that does not exist, is missing, or has another length.

    Examples:
        sweep = {name: torch.zeros(5) for name in FACTORS} | {"slant_degrees": torch.linspace(-20, 20, 5)}
        sweep |= {name: torch.ones(5) for name in ("scale", "aspect", "stroke_width_pixels")}
        render(torch.full((5,), 4), sweep)  # uint8 [5, 1, 28, 28]: a 4 that leans more and more to the right
    """
    _check_size(image_size)
    curves = _curves()
    n, points = len(labels), curves.points.shape[1]
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(SKELETONS):
        raise InputError(f"labels of render must be digits 0 to 9; got {int(labels.min())} to {int(labels.max())}")
    if set(factors) != set(FACTORS):
        raise InputError(f"factors of render must be {', '.join(FACTORS)}; got {', '.join(factors) or 'none'}")
    for name, values in factors.items():
        if values.shape != (n,):
            raise InputError(f"{name} of render must be one value per label, [{n}]; got {list(values.shape)}")
    if bool((factors["stroke_width_pixels"] <= 0).any()):
        raise InputError(f"stroke_width_pixels of render must be above 0; got {factors['stroke_width_pixels'].min():g}")
    index = curves.first[labels]
    if skeletons is not None:
        wrong = (skeletons < 0) | (skeletons >= curves.variants[labels])
        if bool(wrong.any()):
            raise InputError(
                f"skeletons of render must be 0 to {int(curves.variants[labels][wrong][0]) - 1} "
                f"for digit {int(labels[wrong][0])}; got {int(skeletons[wrong][0])}"
            )
        index = index + skeletons
    jitter, ink, width = torch.zeros(n, points, 2), torch.ones(n), torch.ones(n, _SEGMENTS)
    if generator is not None:
        jitter = _JITTER * torch.randn(n, points, 2, generator=generator)
        ink = _FAINTEST + (1 - _FAINTEST) * torch.rand(n, generator=generator)
        phase, waves = torch.rand(2, n, 1, generator=generator)
        along = torch.linspace(0, 1, _SEGMENTS)
        width = 1 + _PRESSURE * torch.sin(2 * math.pi * (phase + (0.5 + waves) * along))  # [n, segments]
    width = width * factors["stroke_width_pixels"][:, None]
    pose = _pose(factors, image_size)
    shift = torch.stack([factors["x_pixels"], factors["y_pixels"]], dim=-1)  # [n, 2]
    images = torch.empty(n, 1, image_size, image_size, dtype=torch.uint8)
    chunk = max(1, _CHUNK // (_SEGMENTS * image_size**2))
    for begin in range(0, n, chunk):
        rows = slice(begin, begin + chunk)
        which = index[rows]
        points_drawn = curves.points[which] + curves.bend[which] @ jitter[rows]  # [chunk, points, 2]
        placed = points_drawn @ pose[rows].mT + shift[rows][:, None]
        drawn = _draw(curves.starts[which] @ placed, curves.ends[which] @ placed, width[rows], image_size)
        images[rows, 0] = (255 * ink[rows][:, None, None] * drawn).round().to(torch.uint8)
    return images


def _stream(seed: int, split: str) -> int:
    """The seed of a split's own stream."""
    return 3 * seed + ("train", "test", "validation").index(split)


def _check(channels: int, height: int, width: int, seed: int) -> None:
    if height != width:
        raise InputError(f"image_size of strokes must be one side, as they are square; got {height} x {width}")
    _check_size(height)
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= _LARGEST_SEED:
        raise InputError(f"seed of strokes must be 0 to {_LARGEST_SEED}; got {shown(seed)}")


def _check_size(image_size: int) -> None:
    if image_size < 12:
        raise InputError(f"image_size of strokes must be at least 12 pixels; got {image_size}")


def _split(count: int, image_size: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % len(SKELETONS))[torch.randperm(count, generator=generator)]
    factors = {}
    for name, (low, high) in FACTORS.items():
        unit = image_size / _NATIVE_SIZE if name.endswith("_pixels") else 1.0
        factors[name] = unit * (low + (high - low) * torch.rand(count, generator=generator))
    skeletons = (torch.rand(count, generator=generator) * _curves().variants[labels]).long()
    images = render(labels, factors, image_size=image_size, skeletons=skeletons, generator=generator)
    return Split(images, labels, factors)


def _pose(factors: Mapping[str, Tensor], image_size: int) -> Float[Tensor, "n 2 2"]:
    """Heights of the digit to pixels: rotation x scale x slant x aspect."""
    angle, slant = factors["rotation_degrees"].deg2rad(), factors["slant_degrees"].deg2rad()
    size, aspect = factors["scale"] * _DIGIT_HEIGHT * image_size, factors["aspect"]
    cos, sin, lean = angle.cos(), angle.sin(), -slant.tan()
    x_row = torch.stack([cos * aspect, cos * lean + sin], dim=-1)
    y_row = torch.stack([-sin * aspect, cos - sin * lean], dim=-1)
    return size[:, None, None] * torch.stack([x_row, y_row], dim=-2)


def _draw(
    starts: Float[Tensor, "n segments 2"],
    ends: Float[Tensor, "n segments 2"],
    width: Float[Tensor, "n segments"],
    image_size: int,
) -> Float[Tensor, "n size size"]:
    """Ink in [0, 1] by each pixel's distance to the nearest segment, all in pixels from the image's centre.

    Lengths are divided by half the segment's width, so the pen's edge is at distance 1. Across and along a
    segment from its middle are linear in the pixel's place, a matrix product each; along counts past its end.
    """
    n, segments, _ = starts.shape
    half = width / 2
    length = torch.linalg.vector_norm(ends - starts, dim=-1, keepdim=True)
    x, y = ((ends - starts) / length.clamp(min=1e-6)).unbind(-1)  # [n, segments]
    direction = torch.stack([x, y], dim=-1)
    normal = torch.stack([-y, x], dim=-1)
    middle = (starts + ends) / 2
    place = torch.arange(image_size) - (image_size - 1) / 2
    pixels = torch.stack([place.repeat(image_size), place.repeat_interleave(image_size)])  # [2, size * size]

    def project(axis: Tensor) -> Tensor:
        offset = -(axis * middle).sum(-1, keepdim=True) / half[..., None]  # [n, segments, 1]
        flat = (axis / half[..., None]).reshape(-1, 2)  # [n * segments, 2]
        return torch.addmm(offset.reshape(-1, 1), flat, pixels).view(n, segments, image_size**2)

    beyond = project(direction).abs_().sub_(length / width[..., None]).clamp_(min=0)
    squared = project(normal).square_().addcmul_(beyond, beyond)
    distance = squared.amin(dim=1).sqrt_()  # [n, size * size]
    # The edge fades over one pixel: the ink across a line then sums to its width, wherever the pixels lie.
    inside = (1 - distance) * half.mean(dim=1, keepdim=True)
    return (inside + 0.5).clamp_(0, 1).view(n, image_size, image_size)


@cache
def _curves() -> _Curves:
    """Turn the table of skeletons into matrices: a curve is linear in its control points."""
    parsed = [_parse(text) for texts in SKELETONS for text in texts]
    size = max(len(points) for points, _ in parsed)
    points, bend = torch.zeros(len(parsed), size, 2), torch.zeros(len(parsed), size, size)
    knots = torch.zeros(2, len(parsed), _SEGMENTS, size)
    for k, (control, paths) in enumerate(parsed):
        n = len(control)
        points[k, :n] = control - (control.amax(0) + control.amin(0)) / 2
        affine = torch.cat([points[k, :n], torch.ones(n, 1)], dim=1).double()  # [n, 3]
        bend[k, :n, :n] = (torch.eye(n).double() - affine @ torch.linalg.pinv(affine)).float()
        knots[:, k, :, :n] = _segments(control, paths)
    variants = torch.tensor([len(texts) for texts in SKELETONS])
    return _Curves(variants.cumsum(0) - variants, variants, points, bend, knots[0], knots[1])


def _parse(text: str) -> tuple[Tensor, list[list[int]]]:
    """Distinct control points `[P, 2]` and, per stroke, the indices of its points."""
    paths = [[tuple(float(v) / 100 for v in point.split(",")) for point in s.split()] for s in text.split("/")]
    distinct = list(dict.fromkeys(point for path in paths for point in path))
    return torch.tensor(distinct), [[distinct.index(point) for point in path] for path in paths]


def _segments(control: Tensor, paths: list[list[int]]) -> Tensor:
    """Weights of the control points in the starts and ends of the segments, `[2, segments, P]`.

    Uniform Catmull-Rom splines (Catmull and Rom 1974); a span is cut the finer, the longer its chord.
    """
    spans = []
    for path in paths:
        closed = path[0] == path[-1]
        before, after = (path[-2], path[1]) if closed else (path[0], path[-1])
        spans += list(zip([before, *path], path, path[1:], [*path[2:], after], strict=False))
    lengths = torch.tensor([float(torch.dist(control[b], control[c])) for _, b, c, _ in spans])
    cuts = _share(lengths, _SEGMENTS)
    pieces = []
    for span, count in zip(spans, cuts, strict=True):
        t = torch.linspace(0, 1, count + 1)[:, None]
        weights = torch.cat(
            [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], dim=1
        )  # [count + 1, 4]
        knots = (weights / 2) @ torch.eye(len(control))[list(span)]  # [count + 1, P]
        pieces.append(torch.stack([knots[:-1], knots[1:]]))  # [2, count, P]
    return torch.cat(pieces, dim=1)


def _share(lengths: Tensor, total: int) -> list[int]:
    """Whole numbers, each at least 1, that sum to `total` and are nearly in proportion to `lengths`."""
    shares = [1] * len(lengths)
    for _ in range(total - len(lengths)):
        longest = int((lengths / torch.tensor(shares)).argmax())
        shares[longest] += 1
    return shares


ENTRY = Entry(
    name="strokes",
    image_shape=(1, 28, 28),
    classes=tuple(str(digit) for digit in range(len(SKELETONS))),
    train=10_000,
    test=2_000,
    licence="that of capsnet",
    source="drawn by capsnet itself, with the true pose of every digit; needs no download",
    framing="digits",
    read=read,
    check=_check,
    validation=VALIDATION,
)
