"""Patches and transforms of tiles in C, for float32: see `winograd.Tiles`.

A chunk is `[rows, points, width]`, so that a tile is one piece of memory that the cache holds. Every transform is one
call: `_Grid` says where the places of a tile lie in an array, and which of them exist.
"""

import ctypes
from dataclasses import dataclass

from torch import Tensor

from capsnet.kernels import native
from capsnet.kernels.winograd import Plan

__all__ = ["NativeTiles"]

_ARRAY, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_THREE = _LONG * 3


class _Transform(native.Struct):
    _fields_ = (
        *((name, _ARRAY) for name in ("left", "right")),
        *((name, _INT) for name in ("outs_y", "ins_y", "outs_x", "ins_x")),
        *((name, _ARRAY) for name in ("given", "to", "positive", "kept")),
        ("rectify", _LONG),
        ("width", _LONG),
        ("counts", _THREE),
        ("given_row", _LONG),
        ("given_column", _LONG),
        ("given_steps", _THREE),
        ("to_row", _LONG),
        ("to_column", _LONG),
        ("to_steps", _THREE),
        *((name, _THREE) for name in ("given_rows", "given_columns", "to_rows", "to_columns")),
    )


class _Patching(native.Struct):
    _fields_ = (
        ("images", _ARRAY),
        ("patches", _ARRAY),
        *(
            (name, _LONG)
            for name in (
                *("count", "channels", "height", "width", "k", "stride", "top", "left"),
                *("phases", "tiles_y", "tiles_x", "tile_y", "tile_x", "points_y", "points_x"),
                *("before_y", "before_x", "rows", "columns"),
            )
        ),
    )


@dataclass(frozen=True)
class _Grid:
    """Places of tiles in an array: strides of a tile's rows and columns, and steps from tile to tile of three loops.

    Of a tile with numbers b and c in the second and third loop the rows y with `scale * y + step * b < total` exist,
    for `rows = (total, step, scale)`, and so for `columns` with c.
    """

    row: int
    column: int
    steps: tuple[int, int, int]
    rows: tuple[int, int, int] = (native.LARGEST, 0, 1)
    columns: tuple[int, int, int] = (native.LARGEST, 0, 1)


class NativeTiles:
    """See `winograd.Tiles`."""

    @staticmethod
    def patches(plan: Plan, images: Tensor, out: Tensor) -> None:
        """See `winograd.Tiles`."""
        (count, channels, height, width), (left, _, top, _) = images.shape, plan.pads1
        arguments = _Patching(
            images=images,
            patches=out,
            count=count,
            channels=channels,
            height=height,
            width=width,
            k=plan.k1,
            stride=plan.s1,
            top=top,
            left=left,
            phases=plan.s2,
            tiles_y=plan.y.tiles,
            tiles_x=plan.x.tiles,
            tile_y=plan.y.tile,
            tile_x=plan.x.tile,
            points_y=plan.y.points,
            points_x=plan.x.points,
            before_y=plan.y.before,
            before_x=plan.x.before,
            rows=plan.y.size,
            columns=plan.x.size,
        )
        native.call("native_patches", arguments)

    @staticmethod
    def forward(plan: Plan, x: Tensor, v: Tensor, positive: Tensor | None) -> None:
        """See `winograd.Tiles`."""
        chunk, points = _of_points(plan, v)
        _run(plan.b, x, chunk, v, points, v.shape[2], (v.shape[1], 1, 1), positive=positive, rectify=1)

    @staticmethod
    def backward(plan: Plan, d_v: Tensor, positive: Tensor, d_x: Tensor) -> None:
        """See `winograd.Tiles`."""
        chunk, points = _of_points(plan, d_v)
        _run(plan.b_t, d_v, points, d_x, chunk, d_v.shape[2], (d_v.shape[1], 1, 1), kept=positive)

    @staticmethod
    def weight(plan: Plan, kernel: Tensor, u: Tensor) -> None:
        """See `winograd.Tiles`."""
        taps, points, width, counts = _of_taps(plan, kernel)
        _run(plan.g, kernel, taps, u, points, width, counts)

    @staticmethod
    def weight_backward(plan: Plan, d_u: Tensor, d_kernel: Tensor) -> None:
        """See `winograd.Tiles`."""
        taps, points, width, counts = _of_taps(plan, d_kernel)
        _run(plan.g_t, d_u, points, d_kernel, taps, width, counts)

    @staticmethod
    def output(plan: Plan, m: Tensor, grid: Tensor) -> None:
        """See `winograd.Tiles`."""
        points, places, counts = _of_outputs(plan, grid)
        _run(plan.a, m, points, grid, places, grid.shape[3], counts)

    @staticmethod
    def output_backward(plan: Plan, d_grid: Tensor, d_m: Tensor) -> None:
        """See `winograd.Tiles`."""
        points, places, counts = _of_outputs(plan, d_grid)
        _run(plan.a_t, d_grid, places, d_m, points, d_grid.shape[3], counts)


def _of_points(plan: Plan, v: Tensor) -> tuple[_Grid, _Grid]:
    """Of a chunk `[rows, points, width]`, and of `v [points, rows, width]`, which may be part of a larger one."""
    point, row, _ = v.stride()
    across, width = plan.x.points, v.shape[2]
    return _Grid(across * width, width, (plan.points * width, 0, 0)), _Grid(across * point, point, (row, 0, 0))


def _of_taps(plan: Plan, kernel: Tensor) -> tuple[_Grid, _Grid, int, tuple[int, int, int]]:
    """Of `kernel [k2, k2, all]` and of `u [points, phases, phases, all]`, with the width of a piece and the loops."""
    s, k, every = plan.s2, plan.k2, kernel.shape[2]
    pieces = next(count for count in (64, 16, 4, 1) if every % count == 0)
    width, whole = every // pieces, s * s * every
    taps = _Grid(s * k * every, s * every, (width, k * every, every), (k, 1, s), (k, 1, s))
    points = _Grid(plan.x.points * whole, whole, (width, s * every, every))
    return taps, points, width, (pieces, s, s)


def _of_outputs(plan: Plan, grid: Tensor) -> tuple[_Grid, _Grid, tuple[int, int, int]]:
    """Of `m [points, rows, out]` and of `grid [batch, height, width, out]`, with the loops."""
    (batch, height, width, out), y, x = grid.shape, plan.y, plan.x
    point = batch * plan.rows * out
    points = _Grid(x.points * point, point, (plan.rows * out, x.tiles * out, out))
    steps = (height * width * out, y.tile * width * out, x.tile * out)
    places = _Grid(width * out, out, steps, (height, y.tile, 1), (width, x.tile, 1))
    return points, places, (batch, y.tiles, x.tiles)


def _run(
    matrices: tuple[Tensor, Tensor],
    given: Tensor,
    given_grid: _Grid,
    to: Tensor,
    to_grid: _Grid,
    width: int,
    counts: tuple[int, int, int],
    *,
    positive: Tensor | None = None,
    kept: Tensor | None = None,
    rectify: int = 0,
) -> None:
    left, right = matrices
    arguments = _Transform(
        left=left,
        right=right,
        outs_y=left.shape[0],
        ins_y=left.shape[1],
        outs_x=right.shape[0],
        ins_x=right.shape[1],
        given=given,
        to=to,
        positive=positive,
        kept=kept,
        rectify=rectify,
        width=width,
        counts=counts,
        given_row=given_grid.row,
        given_column=given_grid.column,
        given_steps=given_grid.steps,
        to_row=to_grid.row,
        to_column=to_grid.column,
        to_steps=to_grid.steps,
        given_rows=given_grid.rows,
        given_columns=given_grid.columns,
        to_rows=to_grid.rows,
        to_columns=to_grid.columns,
    )
    native.call("native_transform", arguments)
