"""First convolution, ReLU and primary convolution as one function, without most of the multiplications.

Nine tenths of a CapsNet's arithmetic is its second convolution, k x k with stride s. Split into its s x s phases (input
pixels of equal remainder by s) it is a convolution of stride 1 with s^2 times the channels and r = ceil(k / s) taps a
side, and those need far fewer products (Toom 1963, Cook 1966; Winograd 1980; for networks Lavin and Gray 2015,
https://arxiv.org/abs/1509.09308): m outputs of an r-tap filter are

    y = A [(G g) * (B d)],    A = V_m^T,  G = V_r,  B = V_n^-T,    n = m + r - 1,

with V_c the first c powers of n points (the last one at infinity), by transposition of multiplying polynomials through
their values. In two dimensions the matrices are Kronecker squares; 6 x 6 outputs of 5 x 5 taps take 100 products in
place of 900. With the position in a tile as the first axis every transform is one matrix product:

    X [n^2, tiles * batch, phases * channels]    relu of the first convolution, written in this order
    V = B X,  U = G W,  M[p] = V[p] U[p] for each of the n^2 points,  Y = A M

and the backward is the same chain transposed. Where a tile reaches beyond the image, its rows are computed from zeros
and meet only outputs that are dropped or taps that are zero. Padding of the second convolution is set to zero there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import product
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet.errors import InputError
from capsnet.kernels.autograd import first_derivatives
from capsnet.kernels.buffers import pool

__all__ = ["POINTS", "Pads", "constant_weights", "minimal_stem", "saving", "transforms"]

POINTS = tuple(Fraction(x) for x in ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "3/2", "-3/2"))
"""Finite points, in the order of use: small numbers keep the matrices, and so the rounding, small."""

Pads = tuple[int, int, int, int]


def minimal_stem(
    images: Float[Tensor, "batch in_channels in_height in_width"],
    weight1: Float[Tensor, "channels in_channels k1 k1"],
    bias1: Float[Tensor, "channels"],
    weight2: Float[Tensor, "out channels k2 k2"],
    *,
    stride1: int = 1,
    stride2: int = 2,
    pads1: Pads = (0, 0, 0, 0),
    pads2: Pads = (0, 0, 0, 0),
) -> Float[Tensor, "batch height width out"]:
    """`conv2d(relu(conv2d(images, weight1, bias1, stride1)), weight2, stride=stride2)`, channels last.

    `pads1` and `pads2` are zeros around the input of each convolution: at the left, right, top and bottom.

    In float32 about 1e-4 relative error in the output and its gradients at 9 x 9 kernels, where a direct convolution
    has 1e-6. Gradients for both weights and the bias, once; none for the images. `weight2` is fastest with its memory
    in the order [k2, k2, channels, out].

    Raises:
        InputError: images smaller than the kernels, that need a gradient, or of a tensor subclass (as in an export).
    """
    if images.requires_grad:
        raise InputError("images of the minimal stem must not need a gradient; use stem direct")
    if type(images) is not Tensor:
        raise InputError(f"images of the minimal stem must be a plain tensor; got {type(images).__name__}")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (weight1, bias1, weight2))
    apply: Callable[..., Tensor] = _Stem.apply
    return apply(images, weight1, bias1, weight2, stride1, stride2, pads1, pads2, keep)


@contextmanager
def constant_weights() -> Iterator[None]:
    """Inside, `minimal_stem` without gradients transforms each weight once, for this thread's calls.

    A pass inside another one shares what that has transformed. A weight that is changed meanwhile is transformed
    again, unless it is changed through `.data`, which PyTorch does not count as a change.
    """
    if _Transforms.here():
        yield
        return
    mine = _Transforms()
    token = _transforms.set(mine)
    try:
        yield
    finally:
        _transforms.reset(token)
        mine.give_back()


@dataclass
class _Transforms:
    """The transformed weights of one pass over images, which are that pass's and its thread's alone."""

    thread: int = field(default_factory=get_ident)
    kept: dict[tuple[int, "_Plan"], tuple[Tensor, int, int, Tensor]] = field(default_factory=dict)

    @staticmethod
    def here() -> "_Transforms | None":
        """Those of the pass that this call belongs to; a thread may run in a copy of another one's context."""
        found = _transforms.get()
        return found if found is not None and found.thread == get_ident() else None

    def of(self, plan: "_Plan", weight2: Tensor) -> Tensor | None:
        """U of `weight2`, computed where it must be; None if it cannot be kept, as it belongs to no parameter.

        A computed weight (of a parametrization, say) is another tensor at each call, and in inference mode it has no
        version. A parameter is the same tensor as long as it is held here, so that its `id` is nobody else's.
        """
        parameter = weight2._base
        if not isinstance(parameter, nn.Parameter) or parameter.is_inference():
            return None
        key, state = (id(parameter), plan), (parameter._version, weight2.data_ptr())
        held = self.kept.get(key)
        if held is None or held[1:3] != state:
            self.kept[key] = held = (parameter, *state, _transform(plan, weight2))
        return held[3]

    def give_back(self) -> None:
        for *_, u in self.kept.values():
            pool.give("stem u", u)
        self.kept.clear()


_transforms: ContextVar[_Transforms | None] = ContextVar("transforms", default=None)


def saving(in_size: tuple[int, int], kernel: int, stride: int, pads: Pads = (0, 0, 0, 0)) -> float:
    """Products of the direct convolution over those of minimal filtering, for an input of `in_size` pixels."""
    left, right, top, bottom = pads
    sides = zip(in_size, ((top, bottom), (left, right)), strict=True)
    axes = [_Axis.of(size, kernel, stride, *pad) for size, pad in sides]
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
class _Axis:
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
    def of(cls, size: int, kernel: int, stride: int, before: int = 0, after: int = 0) -> "_Axis":
        padded = before + size + after
        if padded < kernel:
            raise InputError(f"input of the second convolution must be at least {kernel} pixels; got {padded}")
        outputs, taps = (padded - kernel) // stride + 1, -(-kernel // stride)
        largest = max(1, len(POINTS) + 2 - taps)
        tiles = -(-outputs // largest)
        return cls(outputs, taps, -(-outputs // tiles), tiles, stride, size, before)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Sizes and matrices for one shape of images and kernels."""

    y: _Axis
    x: _Axis
    k1: int
    s1: int
    pads1: Pads
    k2: int
    s2: int
    padded: bool
    a: Tensor  # [tile_y * tile_x, points]
    g: Tensor  # [points, taps^2]
    b: Tensor  # [points, points]

    def columns(self, images: Tensor) -> Tensor:
        """Patches of the first convolution, `[points * tiles * batch * phases, in_channels * k1 * k1]`."""
        batch, channels = images.shape[:2]
        left, _, top, _ = self.pads1
        pads: list[int] = []
        for axis, before, have in ((self.x, left, images.shape[3]), (self.y, top, images.shape[2])):
            first = before + self.s1 * axis.before
            pads += [first, max(0, self.s1 * (axis.reach - 1) + self.k1 - have - first)]
        padded = nn.functional.pad(images, pads).contiguous()
        n, c, row, column = padded.stride()
        step = self.s1 * self.s2
        axes = [  # size, stride
            (self.y.points, step * row),
            (self.x.points, step * column),
            (self.y.tiles, step * self.y.tile * row),
            (self.x.tiles, step * self.x.tile * column),
            (batch, n),
            (self.s2, self.s1 * row),
            (self.s2, self.s1 * column),
            (channels, c),
            (self.k1, row),
            (self.k1, column),
        ]
        windows = padded.as_strided([size for size, _ in axes], [stride for _, stride in axes])
        return windows.flatten(0, 6).flatten(1)

    def clear_padding(self, x: Tensor, batch: int, channels: int) -> None:
        """Set to zero what the second convolution reads outside the first one's output."""
        if not self.padded:
            return
        by_place = x.view(self.y.points, self.x.points, self.y.tiles, self.x.tiles, batch, self.s2, self.s2, channels)
        for point, tile, phase in self.y.outside:
            by_place[point, :, tile, :, :, phase].zero_()
        for point, tile, phase in self.x.outside:
            by_place[:, point, :, tile, :, :, phase].zero_()

    def filters(self, weight2: Tensor, out: Tensor) -> Tensor:
        """Write the taps by phase, `[taps_y * taps_x, phases * channels * out]`, zero past the kernel."""
        for phase, weight in self._phases(out, weight2):
            rows, columns = weight.shape[:2]
            phase[rows:].zero_()
            phase[:, columns:].zero_()
            phase[:rows, :columns] = weight
        return out

    def filters_backward(self, d_filters: Tensor, weight2: Tensor) -> Tensor:
        """The gradient of `weight2`, with its memory in the order [k2, k2, channels, out]."""
        d_weight = weight2.new_empty(self.k2, self.k2, weight2.shape[1], weight2.shape[0]).permute(3, 2, 0, 1)
        for phase, weight in self._phases(d_filters, d_weight):
            rows, columns = weight.shape[:2]
            weight.copy_(phase[:rows, :columns])
        return d_weight

    def _phases(self, filters: Tensor, weight2: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each phase its part of the filters and of the weight, both `[taps_y, taps_x, channels, out]`."""
        s, channels, outs = self.s2, weight2.shape[1], weight2.shape[0]
        by_phase = filters.view(self.y.taps, self.x.taps, s, s, channels, outs)
        kernel = weight2.permute(2, 3, 1, 0)
        for y in range(s):
            for x in range(s):
                yield by_phase[:, :, y, x], kernel[y::s, x::s]

    def grid(self, y: Tensor, batch: int, out: int) -> Tensor:
        """`[tile_y * tile_x, tiles * batch * out]` as `[batch, height, width, out]`."""
        tiles = y.view(self.y.tile, self.x.tile, self.y.tiles, self.x.tiles, batch, out).permute(4, 2, 0, 3, 1, 5)
        whole = tiles.reshape(batch, self.y.tiles * self.y.tile, self.x.tiles * self.x.tile, out)
        return whole[:, : self.y.outputs, : self.x.outputs]

    def grid_backward(self, d_grid: Tensor) -> Tensor:
        rest = [axis.tile * axis.tiles - axis.outputs for axis in (self.y, self.x)]
        whole: Tensor = nn.functional.pad(d_grid, (0, 0, 0, rest[1], 0, rest[0]))
        (batch, *_, outs), (y, x) = whole.shape, (self.y, self.x)
        tiles = whole.view(batch, y.tiles, y.tile, x.tiles, x.tile, outs)
        return tiles.permute(2, 4, 1, 3, 0, 5).flatten(2).flatten(0, 1)


@lru_cache(maxsize=8)
def _plan(
    in_size: tuple[int, int],
    k1: int,
    s1: int,
    pads1: Pads,
    k2: int,
    s2: int,
    pads2: Pads,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan:
    (left1, right1, top1, bottom1), (left2, right2, top2, bottom2) = pads1, pads2
    y = _Axis.of((in_size[0] + top1 + bottom1 - k1) // s1 + 1, k2, s2, top2, bottom2)
    x = _Axis.of((in_size[1] + left1 + right1 - k1) // s1 + 1, k2, s2, left2, right2)

    def both(rows: list[list[Fraction]], columns: list[list[Fraction]]) -> Tensor:
        first, second = (
            torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64, device="cpu")
            for matrix in (rows, columns)
        )
        return torch.kron(first, second).to(device, dtype)

    a, g, b = (both(*pair) for pair in zip(transforms(y.tile, y.taps), transforms(x.tile, x.taps), strict=True))
    return _Plan(y, x, k1, s1, pads1, k2, s2, any(pads2), a, g, b)


def _transform(plan: _Plan, weight2: Tensor) -> Tensor:
    """U = G W, `[points, phases * channels * out]`."""
    out, channels = weight2.shape[:2]
    width = plan.s2 * plan.s2 * channels
    u = pool.take("stem u", (len(plan.b), width * out), weight2)
    filters = plan.filters(weight2, out=pool.take("stem filters", (plan.g.shape[1], width * out), weight2))
    torch.mm(plan.g, filters, out=u)
    pool.give("stem filters", filters)
    return u


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        stride1: int,
        stride2: int,
        pads1: Pads,
        pads2: Pads,
        keep: bool,
    ) -> Tensor:
        in_size, k1, k2 = (images.shape[2], images.shape[3]), weight1.shape[-1], weight2.shape[-1]
        plan = _plan(in_size, k1, stride1, pads1, k2, stride2, pads2, images.dtype, images.device)
        out, channels = weight2.shape[:2]
        points, width = len(plan.b), stride2 * stride2 * channels
        rows = plan.y.tiles * plan.x.tiles * len(images)

        columns = plan.columns(images)
        x = pool.take("stem x", (points, rows * width), images)
        torch.addmm(bias1, columns, weight1.flatten(1).t(), out=x.view(-1, channels)).relu_()
        plan.clear_padding(x, len(images), channels)
        transforms = None if keep else _Transforms.here()
        kept = transforms.of(plan, weight2) if transforms else None
        u = _transform(plan, weight2) if kept is None else kept
        v = pool.take("stem v", (points, rows * width), images)
        torch.mm(plan.b, x, out=v)
        m = pool.take("stem m", (points, rows, out), images)
        torch.bmm(v.view(points, rows, width), u.view(points, width, out), out=m)
        grid = plan.grid(plan.a @ m.view(points, rows * out), len(images), out).contiguous()
        pool.give("stem m", m)
        if keep:
            ctx.plan = plan
            ctx.save_for_backward(weight1, weight2, columns, x, u, v)
        else:
            pool.give("stem x", x)
            pool.give("stem v", v)
            if kept is None:
                pool.give("stem u", u)
        return grid

    @staticmethod
    @first_derivatives("the minimal stem", "stem direct", once=True)
    def backward(ctx: Any, d_grid: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        weight1, weight2, columns, x, u, v = ctx.saved_tensors
        out, channels = weight2.shape[:2]
        points, rows, width = len(plan.b), plan.y.tiles * plan.x.tiles * len(d_grid), u.shape[1] // out
        u_matrices, v_matrices = u.view(points, width, out), v.view(points, rows, width)

        d_m = pool.take("stem m", (points, rows * out), d_grid)
        torch.mm(plan.a.t(), plan.grid_backward(d_grid), out=d_m)
        d_m = d_m.view(points, rows, out)
        d_v = pool.take("stem d_v", tuple(v.shape), d_grid)
        torch.bmm(d_m, u_matrices.transpose(1, 2), out=d_v.view(points, rows, width))
        d_u = u  # its memory takes its gradient
        torch.bmm(v_matrices.transpose(1, 2), d_m, out=u_matrices)
        d_filters = pool.take("stem filters", (plan.g.shape[1], d_u.shape[1]), d_grid)
        d_weight2 = plan.filters_backward(torch.mm(plan.g.t(), d_u, out=d_filters), weight2)
        d_x = torch.mm(plan.b.t(), d_v, out=v).view(-1, channels)
        torch.ops.aten.threshold_backward.grad_input(d_x, x.view(-1, channels), 0, grad_input=d_x)
        d_weight1 = (d_x.t() @ columns).view(weight1.shape)
        d_bias1 = d_x.sum(0)
        for name, array in (("x", x), ("u", u), ("v", v), ("d_v", d_v), ("m", d_m), ("filters", d_filters)):
            pool.give(f"stem {name}", array)
        return None, d_weight1, d_bias1, d_weight2, None, None, None, None, None
