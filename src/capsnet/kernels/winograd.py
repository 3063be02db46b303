"""Minimal filtering (Toom, Cook, Winograd): its matrices, and how an image is cut into tiles for it.

For outputs y of an r-tap filter g on the inputs d, m at a time (https://arxiv.org/abs/1509.09308):

    y = A [(G g) * (B d)],    A = V_m^T,  G = V_r,  B = V_n^-T,    n = m + r - 1,

with V_c the first c powers of n points (the last one at infinity), by transposition of multiplying polynomials through
their values. All in exact fractions.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from capsnet.errors import InputError

__all__ = ["POINTS", "Axis", "Pads", "Plan", "Tiles", "plan_for", "saving", "transforms"]

POINTS = tuple(Fraction(x) for x in ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "3/2", "-3/2"))
"""Finite points, in the order of use: small numbers keep the matrices, and so the rounding, small."""

Pads = tuple[int, int, int, int]
"""Zeros at the left, right, top and bottom."""


def saving(in_size: tuple[int, int], kernel: int, stride: int, pads: Pads = (0, 0, 0, 0)) -> float:
    """Products of the direct convolution over those of minimal filtering, for an input of `in_size` pixels."""
    left, right, top, bottom = pads
    sides = zip(in_size, ((top, bottom), (left, right)), strict=True)
    axes = [Axis.of(size, kernel, stride, *pad) for size, pad in sides]
    direct = math.prod(axis.outputs * kernel for axis in axes)
    return direct / (stride**2 * math.prod(axis.points * axis.tiles for axis in axes))


@lru_cache
def transforms(outputs: int, taps: int) -> tuple[list[list[Fraction]], list[list[Fraction]], list[list[Fraction]]]:
    """A `[m, n]`, G `[n, r]` and B `[n, n]` of `outputs` m and `taps` r in exact fractions.

    Raises:
        InputError: more than ten points.
    """
    n = outputs + taps - 1
    if n > len(POINTS) + 1:
        raise InputError(f"outputs + taps - 1 must be at most {len(POINTS) + 1}; got {n}")
    points = POINTS[: n - 1]

    def powers(count: int) -> list[list[Fraction]]:
        finite = [[x**k for k in range(count)] for x in points]
        return [*finite, [Fraction(int(k == count - 1)) for k in range(count)]]

    a = [list(column) for column in zip(*powers(outputs), strict=True)]
    b = [list(column) for column in zip(*_inverse(powers(n)), strict=True)]
    return a, powers(taps), b


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """Gauss and Jordan."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next(k for k in range(i, n) if rows[k][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(n):
            if k != i and rows[k][i]:
                factor = rows[k][i]
                rows[k] = [x - factor * y for x, y in zip(rows[k], rows[i], strict=True)]
    return [row[n:] for row in rows]


@dataclass(frozen=True)
class Axis:
    """How one axis of the second convolution's input is cut: `tiles` of `tile` outputs from `points` inputs a phase."""

    outputs: int
    taps: int
    tile: int
    tiles: int
    stride: int
    size: int
    before: int

    @property
    def points(self) -> int:
        """Inputs of a tile."""
        return self.tile + self.taps - 1

    @property
    def reach(self) -> int:
        """Pixels from the first to the last that are read, padding included."""
        return self.stride * (self.tile * (self.tiles - 1) + self.points)

    @property
    def outside(self) -> list[tuple[int, int, int]]:
        """Point, tile and phase of each row that lies in the padding or beyond."""
        everywhere = product(range(self.points), range(self.tiles), range(self.stride))
        pixels = ((at, self.stride * (self.tile * at[1] + at[0]) + at[2] - self.before) for at in everywhere)
        return [at for at, pixel in pixels if not 0 <= pixel < self.size]

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, before: int = 0, after: int = 0) -> "Axis":
        """The fewest tiles that the points allow, for `size` pixels and zeros before and after.

        Raises:
            InputError: fewer pixels than the kernel has.
        """
        padded = before + size + after
        if padded < kernel:
            raise InputError(f"input of the second convolution must be at least {kernel} pixels; got {padded}")
        outputs, taps = (padded - kernel) // stride + 1, -(-kernel // stride)
        largest = max(1, len(POINTS) + 2 - taps)
        tiles = -(-outputs // largest)
        return cls(outputs, taps, -(-outputs // tiles), tiles, stride, size, before)


@dataclass(frozen=True, eq=False)
class Plan:
    """Sizes and matrices for one shape of images and kernels, and the way in which its tiles are transformed."""

    y: Axis
    x: Axis
    k1: int
    s1: int
    pads1: Pads
    k2: int
    s2: int
    a: tuple[Tensor, Tensor]  # of y and x: [tile, points]
    g: tuple[Tensor, Tensor]  # [points, taps]
    b: tuple[Tensor, Tensor]  # [points, points]
    a_t: tuple[Tensor, Tensor]  # their transposes
    g_t: tuple[Tensor, Tensor]
    b_t: tuple[Tensor, Tensor]
    tiles: "type[Tiles]"

    @property
    def points(self) -> int:
        """Of a tile."""
        return self.y.points * self.x.points

    @property
    def rows(self) -> int:
        """Tiles of an image."""
        return self.y.tiles * self.x.tiles


@runtime_checkable
class Tiles(Protocol):
    """How patches are gathered and tiles transformed, `to = left from right^T` at each of their places.

    The rows of all arrays are `(image, tile y, tile x)`. A chunk is the first convolution's output for some images,
    `width = phases * phases * channels` numbers at each point of each row, in any order of points and rows.
    """

    @staticmethod
    def patches(plan: Plan, images: Tensor, out: Tensor) -> None:
        """Fill `out [points * rows * phases^2, in_channels * k1^2 + 1]` with what gives a chunk: see `_Input`."""

    @staticmethod
    def forward(plan: Plan, x: Tensor, v: Tensor, positive: Tensor | None) -> None:
        """`v [points, rows, width] = B relu(x) B^T` for a chunk `x`; `positive` tells where it is above zero."""

    @staticmethod
    def backward(plan: Plan, d_v: Tensor, positive: Tensor, d_x: Tensor) -> None:
        """The gradient of `x` from that of `v`."""

    @staticmethod
    def weight(plan: Plan, kernel: Tensor, u: Tensor) -> None:
        """`u [points, phases, phases, channels * out] = G kernel G^T` for `kernel [k2, k2, channels * out]`."""

    @staticmethod
    def weight_backward(plan: Plan, d_u: Tensor, d_kernel: Tensor) -> None:
        """The gradient of `kernel` from that of `u`."""

    @staticmethod
    def output(plan: Plan, m: Tensor, grid: Tensor) -> None:
        """`grid [batch, height, width, out]`, of the tiles `A m A^T` for `m [points, rows, out]`."""

    @staticmethod
    def output_backward(plan: Plan, d_grid: Tensor, d_m: Tensor) -> None:
        """The gradient of `m` from that of `grid`."""


@lru_cache(maxsize=8)
def plan_for(
    in_size: tuple[int, int],
    k1: int,
    s1: int,
    pads1: Pads,
    k2: int,
    s2: int,
    pads2: Pads,
    dtype: torch.dtype,
    device: torch.device,
    tiles: type[Tiles],
) -> Plan:
    """The sizes and matrices for images of `in_size` and both convolutions; made once."""
    (left1, right1, top1, bottom1), (left2, right2, top2, bottom2) = pads1, pads2
    y = Axis.of((in_size[0] + top1 + bottom1 - k1) // s1 + 1, k2, s2, top2, bottom2)
    x = Axis.of((in_size[1] + left1 + right1 - k1) // s1 + 1, k2, s2, left2, right2)

    def both(of_y: list[list[Fraction]], of_x: list[list[Fraction]]) -> tuple[Tensor, Tensor]:
        first, second = (
            torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64, device="cpu")
            for matrix in (of_y, of_x)
        )
        return first.to(device, dtype), second.to(device, dtype)

    matrices = [both(*pair) for pair in zip(transforms(y.tile, y.taps), transforms(x.tile, x.taps), strict=True)]
    transposes = [(left.t().contiguous(), right.t().contiguous()) for left, right in matrices]
    (a, g, b), (a_t, g_t, b_t) = matrices, transposes
    return Plan(y, x, k1, s1, pads1, k2, s2, a, g, b, a_t, g_t, b_t, tiles)
