"""Patches and transforms of tiles by PyTorch's operators, in float32 or float64: see `winograd.Tiles`.

A chunk is `[points, rows, width]`. Each transform is a batched matrix product along x and one product for each column.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from capsnet.kernels.winograd import Plan

__all__ = ["TorchTiles"]

Matrices = tuple[Tensor, Tensor]


class TorchTiles:
    """See `winograd.Tiles`."""

    @staticmethod
    def patches(plan: Plan, images: Tensor, out: Tensor) -> None:
        """See `winograd.Tiles`."""
        (batch, channels, height, width), (left, _, top, _) = images.shape, plan.pads1
        pads: list[int] = []
        for axis, before, have in ((plan.x, left, width), (plan.y, top, height)):
            first = before + plan.s1 * axis.before
            pads += [first, max(0, plan.s1 * (axis.reach - 1) + plan.k1 - have - first)]
        padded = nn.functional.pad(images, pads).contiguous()
        n, c, row, column = padded.stride()
        step = plan.s1 * plan.s2
        axes = [  # size, stride
            (plan.y.points, step * row),
            (plan.x.points, step * column),
            (batch, n),
            (plan.y.tiles, step * plan.y.tile * row),
            (plan.x.tiles, step * plan.x.tile * column),
            (plan.s2, plan.s1 * row),
            (plan.s2, plan.s1 * column),
            (channels, c),
            (plan.k1, row),
            (plan.k1, column),
        ]
        windows = padded.as_strided([size for size, _ in axes], [stride for _, stride in axes])
        by_place = out.view(*(size for size, _ in axes[:7]), out.shape[1])  # [y, x, batch, tiles, tiles, s2, s2, ...]
        by_place[..., :-1].view(windows.shape).copy_(windows)  # [..., channels, k1, k1]
        by_place[..., -1] = 1
        for point, tile, phase in plan.y.outside:
            by_place[point, :, :, tile, :, phase].zero_()
        for point, tile, phase in plan.x.outside:
            by_place[:, point, :, :, tile, :, phase].zero_()

    @staticmethod
    def forward(plan: Plan, x: Tensor, v: Tensor, positive: Tensor | None) -> None:
        """See `winograd.Tiles`."""
        if positive is not None:
            torch.gt(x.view(positive.shape), 0, out=positive)  # [points * rows, width]
        points = x.relu_().view(plan.y.points, plan.x.points, -1)  # [y, x, rows * width]
        _transform(plan.b, points, _by_axis(plan, v))

    @staticmethod
    def backward(plan: Plan, d_v: Tensor, positive: Tensor, d_x: Tensor) -> None:
        """See `winograd.Tiles`."""
        points = d_x.view(plan.y.points, plan.x.points, -1)  # [y, x, rows * width]
        _transform(plan.b_t, _by_axis(plan, d_v).flatten(2), points)
        d_x.view(positive.shape).mul_(positive)  # [points * rows, width]

    @staticmethod
    def weight(plan: Plan, kernel: Tensor, u: Tensor) -> None:
        """See `winograd.Tiles`."""
        to = _by_axis(plan, u)  # [y, x, phases, phases, channels * out]
        taps = kernel.new_empty(plan.y.taps, plan.x.taps, kernel.shape[2])
        for y, x, phase in _phases(plan, kernel):
            rows, columns = phase.shape[:2]
            taps[rows:].zero_()
            taps[:, columns:].zero_()
            taps[:rows, :columns] = phase
            _transform(plan.g, taps, to[:, :, y, x])

    @staticmethod
    def weight_backward(plan: Plan, d_u: Tensor, d_kernel: Tensor) -> None:
        """See `winograd.Tiles`."""
        given = _by_axis(plan, d_u)  # [y, x, phases, phases, channels * out]
        taps = d_u.new_empty(plan.y.taps, plan.x.taps, d_kernel.shape[2])
        for y, x, phase in _phases(plan, d_kernel):
            _transform(plan.g_t, given[:, :, y, x], taps)
            phase.copy_(taps[: phase.shape[0], : phase.shape[1]])

    @staticmethod
    def output(plan: Plan, m: Tensor, grid: Tensor) -> None:
        """See `winograd.Tiles`."""
        batch, _, _, out = grid.shape
        tiles = m.new_empty(plan.y.tile, plan.x.tile, m.shape[1] * out)  # [tile, tile, rows * out]
        _transform(plan.a, m.view(plan.y.points, plan.x.points, -1), tiles)
        apart = tiles.view(plan.y.tile, plan.x.tile, batch, plan.y.tiles, plan.x.tiles, out).permute(2, 3, 0, 4, 1, 5)
        whole = apart.reshape(batch, plan.y.tiles * plan.y.tile, plan.x.tiles * plan.x.tile, out)
        grid.copy_(whole[:, : plan.y.outputs, : plan.x.outputs])

    @staticmethod
    def output_backward(plan: Plan, d_grid: Tensor, d_m: Tensor) -> None:
        """See `winograd.Tiles`."""
        batch, _, _, out = d_grid.shape
        rest = [axis.tile * axis.tiles - axis.outputs for axis in (plan.y, plan.x)]
        whole = nn.functional.pad(d_grid, (0, 0, 0, rest[1], 0, rest[0]))
        apart = whole.view(batch, plan.y.tiles, plan.y.tile, plan.x.tiles, plan.x.tile, out).permute(2, 4, 0, 1, 3, 5)
        tiles = apart.reshape(plan.y.tile, plan.x.tile, d_m.shape[1] * out)  # [tile, tile, rows * out]
        _transform(plan.a_t, tiles, d_m.view(plan.y.points, plan.x.points, -1))


def _phases(plan: Plan, kernel: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The number of each phase, down and across, and its taps of the kernel."""
    for y in range(plan.s2):
        for x in range(plan.s2):
            yield y, x, kernel[y :: plan.s2, x :: plan.s2]


def _by_axis(plan: Plan, x: Tensor) -> Tensor:
    """`[points, ...]` as `[y, x, ...]`."""
    return x.view(plan.y.points, plan.x.points, *x.shape[1:])


def _transform(matrices: Matrices, given: Tensor, to: Tensor) -> None:
    """`to[y', x'] = sum_y,x left[y', y] right[x', x] given[y, x]`, for `[y, x, all]`; `to` may have more axes."""
    left, right = matrices
    half = torch.bmm(right.expand(len(given), *right.shape), given)  # [y, x', all]
    for x in range(len(right)):
        torch.mm(left, half[:, x], out=to[:, x].view(len(left), half.shape[2]))  # [y', all]
