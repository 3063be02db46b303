"""The sweeps of `fused.py` as Triton kernels: votes live in a GPU's registers only, never in its memory.

A program takes a group of input capsules, a block of images and a block of output capsules. For one input capsule at a
time it makes the *tile* of their votes by matrix products and uses it at once, for the agreement and for the sum that
the couplings weigh. What several programs add to is written in parts that are summed afterwards: no atomics, and the
same bits every time.

The softmax needs the logits of all output capsules. Where these do not fit into one tile, a first kernel finds, for
each block of output capsules, the logarithm of the sum of `exp(b)` (and, for the backward, the mean of `d c` under the
block's own softmax); these are combined, and `c = exp(b - log_sum)` needs no other block.

Sizes: J output capsules, BN images, and D and K for the dimensions of output and input capsules, all powers of 2; what
is beyond the arrays is read as zero. Tiles are `[J, BN, D]`, so that a warp has whole capsules and sums over `dim`
without the others.
"""
# A kernel's arguments are what Triton makes of them, so they have no types here.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations  # tl.constexpr, where there is no tl

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capsnet.errors import InputError
from capsnet.kernels.fused import add_first

try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:  # `available` says so, and the kernels below stay functions that nobody calls
    triton = tl = None

__all__ = ["Sweeps", "available"]

LARGEST = 64  # dimension: at 128 the weights between two capsules do not fit into registers
IMAGES = 16  # of a block: the least of a matrix product
VOTES = 256  # numbers in one image's votes in a tile: the paper's 10 x 16 fit, and 8 warps hold them without spilling
WEIGHTS = 4096  # numbers in a tile's weights: fewer capsules of more than 16 dimensions
INPUTS = 8  # of a group, at least: the parts of a sum over all inputs stay below 1/8 of the votes
BATCH_PARTS = 2  # of the weight's gradient, each as large as the weight


def available() -> bool:
    """Whether these kernels can run: with Triton, on a GPU or in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return triton is not None and (torch.cuda.is_available() or bool(triton.knobs.runtime.interpret))


class Sweeps:
    """Sweeps over all votes of `u [n, in, in_dim]` and `weight [in, in_dim, out, dim]`, float32 on one GPU.

    Raises:
        InputError: another type, or `in_dim` or `dim` above 64.
    """

    def __init__(self, u: Tensor, weight: Tensor, *, leaky: bool) -> None:
        for name, x in (("u", u), ("weight", weight)):
            if x.dtype != torch.float32:
                raise InputError(f"{name} of the fused kernel must be torch.float32; got {x.dtype}")
        for name, size in (("in_dim", u.shape[-1]), ("dim", weight.shape[-1])):
            if size > LARGEST:
                raise InputError(f"{name} of the fused kernel must be at most {LARGEST}; got {size}")
        self.leaky = leaky
        self.rebind(u, weight)
        self.tile = _tile_of(weight)
        self.images = _ceil_div(len(u), IMAGES)
        self.blocks = _ceil_div(weight.shape[2], self.tile.J)
        self.d_u: Tensor | None = None
        self.d_weight: Tensor | None = None  # [part of the batch, in, in_dim, out, dim]

    def rebind(self, u: Tensor, weight: Tensor) -> None:
        """Read these from now on, in a backward: what autograd saved, which saved-tensor hooks may have moved."""
        self.u, self.weight = u.contiguous(), weight.contiguous()

    def weighted_sum(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_i c u_hat [n, out, dim]` and the couplings `c [n, in, out]` of `gains [n, out, dim]`."""
        gains = gains.contiguous()
        log_sum = self._log_sum(self._statistics(gains)[0]) if self.blocks > 1 else None
        groups = self._groups(4, self.images * self.blocks)
        parts = gains.new_empty(groups, *gains.shape)
        c = gains.new_empty(*self.u.shape[:2], self.weight.shape[2])
        grid = groups, self.images, self.blocks
        self._launch(_forward, grid, gains, log_sum, parts, c, LEAKY=self.leaky, maxnreg=128)
        return parts.sum(0), c

    def weighted_sum_backward(self, gains: Tensor, d_s: Tensor, d_c: Tensor | None, *, detached: bool) -> Tensor | None:
        """Add to the gradients of `u` and `weight`; return that of `gains`, or None if couplings are `detached`."""
        gains, d_s = gains.contiguous(), d_s.contiguous()
        d_c = None if d_c is None or detached else d_c.contiguous()
        batch_parts = min(BATCH_PARTS, max(1, self.images))
        if self.d_u is None or self.d_weight is None:
            self.d_u, self.d_weight = torch.zeros_like(self.u), self.weight.new_zeros(batch_parts, *self.weight.shape)
        log_sum = mean = None
        if self.blocks > 1:
            log_sums, means = self._statistics(gains, None if detached else d_s, d_c)
            log_sum = self._log_sum(log_sums)
            mean = None if means is None else (means * (log_sums - log_sum).exp_()).sum(0)
        groups = self._groups(2, batch_parts)
        parts = None if detached else gains.new_empty(groups, *gains.shape)
        to = self.d_u, self.d_weight, parts
        for block in range(self.blocks):  # one after the other, as all of them add to d_u
            grid = groups, batch_parts
            self._launch(_backward, grid, gains, d_s, d_c, log_sum, mean, *to, block, LEAKY=self.leaky)
        return None if parts is None else parts.sum(0)

    def gradients(self, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradients of `u` and `weight` of the backward sweeps since the last call, and of the first iteration."""
        if self.d_u is None or self.d_weight is None:
            d_u, d_weight = torch.zeros_like(self.u), torch.zeros_like(self.weight)
        else:
            d_u, d_weight = self.d_u, self.d_weight.sum(0)
        self.d_u = self.d_weight = None  # a second backward of the same forward starts anew
        if first is not None:
            add_first(d_u, d_weight, self.u, self.weight, first)
        return d_u, d_weight

    def _statistics(
        self, gains: Tensor, d_s: Tensor | None = None, d_c: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The log-sum-exp of each block of output capsules and, given `d_s`, its mean of `d c`: `[block, n, in]`."""
        log_sums = gains.new_empty(self.blocks, *self.u.shape[:2])
        means = None if d_s is None else torch.empty_like(log_sums)
        grid = self._groups(4, self.images * self.blocks), self.images, self.blocks
        self._launch(_statistics, grid, gains, d_s, d_c, log_sums, means, maxnreg=128)
        return log_sums, means

    def _log_sum(self, log_sums: Tensor) -> Tensor:
        """The log-sum-exp `[n, in]` over all blocks and, if leaky, the slot of logit 0."""
        log_sum = log_sums.logsumexp(0)
        return torch.nn.functional.softplus(log_sum) if self.leaky else log_sum

    def _groups(self, programs: int, others: int) -> int:
        """Groups of input capsules that make so many `programs` for each processor, with `others` for each group."""
        ins = self.u.shape[1]
        wanted = _ceil_div(programs * _processors(self.u.device), max(1, others))
        return _ceil_div(ins, _ceil_div(ins, min(wanted, _ceil_div(ins, INPUTS))))  # none of them empty

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        ins, in_dim, outs, dim = self.weight.shape
        sizes = {"INS": ins, "IN_DIM": in_dim, "OUTS": outs, "DIM": dim, "BN": IMAGES, **self.tile._asdict()}
        on_its_device = torch.cuda.device_of(self.u)  # type: ignore[no-untyped-call]
        with on_its_device:  # Triton launches on the current device, wherever the tensors are
            kernel[grid](self.u, self.weight, *arguments, len(self.u), **sizes, **options, num_warps=8)


class _Tile(NamedTuple):
    J: int
    D: int
    K: int


def _tile_of(weight: Tensor) -> _Tile:
    _, in_dim, outs, dim = weight.shape
    k, d = (max(16, _power_of_2(size)) for size in (in_dim, dim))  # 16: the least of a matrix product
    return _Tile(max(1, min(_power_of_2(outs), VOTES // d, WEIGHTS // (k * d))), d, k)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _kernel(function: Callable[..., Any]) -> Any:
    """Compile the function as written, not what a checker of types has made of it, and once for all batch sizes."""
    return triton.jit(inspect.unwrap(function), do_not_specialize=["n", "block"]) if triton else function


@_kernel
def _forward(
    u, weight, gains, log_sum, parts, couplings, n,
    INS: tl.constexpr, IN_DIM: tl.constexpr, OUTS: tl.constexpr, DIM: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    """Couplings `[n, in, out]` of a group of inputs, and its part of their weighted sum, `[group, n, out, dim]`."""
    group, row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BN, tl.program_id(2)
    per_group = (INS + tl.num_programs(0) - 1) // tl.num_programs(0)
    at, there = _places(row, block, n, OUTS, DIM, BN, J, D)
    g = tl.load(gains + row * (OUTS * DIM) + at, there, 0.0)
    s = tl.zeros((J, BN, D), tl.float32)
    for step in range(per_group):
        i = group * per_group + step
        votes, _, _ = _votes(u, weight, row, block, i, n, INS, IN_DIM, OUTS, DIM, BN, J, D, K)
        c = _couplings(tl.sum(votes * g, 2), log_sum, row, block, i, n, INS, OUTS, BN, J, LEAKY)
        at_c, is_c = _coupling_places(row, block, i, n, INS, OUTS, BN, J)
        tl.store(couplings + (row * INS + i) * OUTS + at_c, c, is_c)
        s += c[:, :, None] * votes
    tl.store(parts + (group * n + row) * (OUTS * DIM) + at, s, there)


@_kernel
def _statistics(
    u, weight, gains, d_s, d_c, log_sums, means, n,
    INS: tl.constexpr, IN_DIM: tl.constexpr, OUTS: tl.constexpr, DIM: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of each block of output capsules `log sum_j exp(b)` and the mean of `d c` under its softmax, `[block, n, in]`."""
    group, row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BN, tl.program_id(2)
    per_group = (INS + tl.num_programs(0) - 1) // tl.num_programs(0)
    r = tl.arange(0, BN)
    at, there = _places(row, block, n, OUTS, DIM, BN, J, D)
    g = tl.load(gains + row * (OUTS * DIM) + at, there, 0.0)
    if means is not None:
        ds = tl.load(d_s + row * (OUTS * DIM) + at, there, 0.0)
    for step in range(per_group):
        i = group * per_group + step
        votes, _, _ = _votes(u, weight, row, block, i, n, INS, IN_DIM, OUTS, DIM, BN, J, D, K)
        b = _existing(tl.sum(votes * g, 2), block, OUTS, J)
        largest = tl.max(b, 0)
        e = tl.exp(b - largest[None, :])
        total = tl.sum(e, 0)
        first, is_row = (block.to(tl.int64) * n + row) * INS + i, (row + r < n) & (i < INS)
        tl.store(log_sums + first + r * INS, largest + tl.log(total), is_row)
        if means is not None:
            dc = tl.sum(votes * ds, 2)
            if d_c is not None:
                at_c, is_c = _coupling_places(row, block, i, n, INS, OUTS, BN, J)
                dc += tl.load(d_c + (row * INS + i) * OUTS + at_c, is_c, 0.0)
            tl.store(means + first + r * INS, tl.sum(e * dc, 0) / total, is_row)


@_kernel
def _backward(
    u, weight, gains, d_s, d_c, log_sum, mean, d_u, d_weight, parts, block, n,
    INS: tl.constexpr, IN_DIM: tl.constexpr, OUTS: tl.constexpr, DIM: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    """Back through one block of output capsules, for a group of inputs and a part of the batch.

    Adds to `d_u [n, in, in_dim]` and `d_weight [part, in, in_dim, out, dim]` where no other program does, and stores
    the group's part of the gradient of the gains, `[group, n, out, dim]`, unless `parts` is None: couplings detached.
    """
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    per_group = (INS + tl.num_programs(0) - 1) // tl.num_programs(0)
    per_part = ((n + BN - 1) // BN + tl.num_programs(1) - 1) // tl.num_programs(1)
    r = tl.arange(0, BN)
    for images in range(per_part):
        row = (part * per_part + images) * BN
        at, there = _places(row, block, n, OUTS, DIM, BN, J, D)
        g = tl.load(gains + row * (OUTS * DIM) + at, there, 0.0)
        ds = tl.load(d_s + row * (OUTS * DIM) + at, there, 0.0)
        dg = tl.zeros((J, BN, D), tl.float32)
        for step in range(per_group):
            i = group * per_group + step
            votes, poses, w = _votes(u, weight, row, block, i, n, INS, IN_DIM, OUTS, DIM, BN, J, D, K)
            c = _couplings(tl.sum(votes * g, 2), log_sum, row, block, i, n, INS, OUTS, BN, J, LEAKY)
            d_votes = c[:, :, None] * ds
            if parts is not None:
                dc = tl.sum(votes * ds, 2)
                if d_c is not None:
                    at_c, is_c = _coupling_places(row, block, i, n, INS, OUTS, BN, J)
                    dc += tl.load(d_c + (row * INS + i) * OUTS + at_c, is_c, 0.0)
                if mean is None:
                    average = tl.sum(c * dc, 0)
                else:
                    average = tl.load(mean + row * INS + i + r * INS, (row + r < n) & (i < INS), 0.0)
                db = c * (dc - average[None, :])
                d_votes += db[:, :, None] * g
                dg += db[:, :, None] * votes
            at_u, is_u = _pose_places(row, i, n, INS, IN_DIM, BN, K)
            to_u = d_u + (row * INS + i) * IN_DIM + at_u
            du = tl.dot(d_votes, tl.permute(w, (0, 2, 1)), input_precision="tf32x3")  # [J, BN, K]
            tl.store(to_u, tl.load(to_u, is_u, 0.0) + tl.sum(du, 0), is_u)
            at_w, is_w = _weight_places(block, i, INS, IN_DIM, OUTS, DIM, J, D, K)
            to_w = d_weight + (part * INS + i) * (IN_DIM * OUTS * DIM) + at_w
            dw = tl.dot(tl.permute(poses, (0, 2, 1)), d_votes, input_precision="tf32x3")  # [J, K, D]
            tl.store(to_w, tl.load(to_w, is_w, 0.0) + dw, is_w)
        if parts is not None:
            tl.store(parts + (group * n + row) * (OUTS * DIM) + at, dg, there)
        tl.debug_barrier()  # the next images' d_weight is what other threads of this program wrote here


@_kernel
def _votes(
    u, weight, row, block, i, n,
    INS: tl.constexpr, IN_DIM: tl.constexpr, OUTS: tl.constexpr, DIM: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The tile `[J, BN, D]` of input capsule i, from its poses `[J, BN, K]`, all J alike, and weights `[J, K, D]`."""
    at_u, is_u = _pose_places(row, i, n, INS, IN_DIM, BN, K)
    poses = tl.load(u + (row * INS + i) * IN_DIM + at_u, is_u, 0.0)
    poses = tl.broadcast_to(poses[None, :, :], (J, BN, K))
    at_w, is_w = _weight_places(block, i, INS, IN_DIM, OUTS, DIM, J, D, K)
    w = tl.load(weight + i * (IN_DIM * OUTS * DIM) + at_w, is_w, 0.0)
    return tl.dot(poses, w, input_precision="tf32x3"), poses, w


@_kernel
def _couplings(
    b, log_sum, row, block, i, n,
    INS: tl.constexpr, OUTS: tl.constexpr, BN: tl.constexpr, J: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    """Softmax `[J, BN]` of the logits `b`: of the tile's own, or with the sum over all blocks, `log_sum [n, in]`."""
    b = _existing(b, block, OUTS, J)
    if log_sum is None:
        largest = tl.max(b, 0)
        if LEAKY:
            largest = tl.maximum(largest, 0.0)
        e = tl.exp(b - largest[None, :])
        total = tl.sum(e, 0)
        if LEAKY:
            total += tl.exp(-largest)
        c = e / total[None, :]
    else:
        r = tl.arange(0, BN)
        c = tl.exp(b - tl.load(log_sum + row * INS + i + r * INS, (row + r < n) & (i < INS), 0.0)[None, :])
    return c


@_kernel
def _existing(b, block, OUTS: tl.constexpr, J: tl.constexpr):
    """The logits `[J, BN]`, minus infinity for capsules beyond the last."""
    return tl.where((block * J + tl.arange(0, J) < OUTS)[:, None], b, float("-inf"))


@_kernel
def _places(
    row, block, n, OUTS: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, J: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Where a tile `[J, BN, D]` lies in `[n, out, dim]`, counted from image `row`, and whether it does."""
    j, r, d = (block * J + tl.arange(0, J))[:, None, None], tl.arange(0, BN)[None, :, None], tl.arange(0, D)[None, None]
    return r * (OUTS * DIM) + j * DIM + d, (row + r < n) & (j < OUTS) & (d < DIM)


@_kernel
def _pose_places(row, i, n, INS: tl.constexpr, IN_DIM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
    """The same for `[BN, K]` in `[n, in, in_dim]`, counted from input i of image `row`."""
    r, k = tl.arange(0, BN)[:, None], tl.arange(0, K)[None, :]
    return r * (INS * IN_DIM) + k, (row + r < n) & (k < IN_DIM) & (i < INS)


@_kernel
def _weight_places(
    block, i,
    INS: tl.constexpr, IN_DIM: tl.constexpr, OUTS: tl.constexpr, DIM: tl.constexpr,
    J: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The same for `[J, K, D]` in `[in, in_dim, out, dim]`, counted from input i."""
    j, k, d = (block * J + tl.arange(0, J))[:, None, None], tl.arange(0, K)[None, :, None], tl.arange(0, D)[None, None]
    return k * (OUTS * DIM) + j * DIM + d, (k < IN_DIM) & (j < OUTS) & (d < DIM) & (i < INS)


@_kernel
def _coupling_places(row, block, i, n, INS: tl.constexpr, OUTS: tl.constexpr, BN: tl.constexpr, J: tl.constexpr):
    """The same for `[J, BN]` in `[n, in, out]`, counted from input i of image `row`."""
    j, r = (block * J + tl.arange(0, J))[:, None], tl.arange(0, BN)[None, :]
    return r * (INS * OUTS) + j, (row + r < n) & (j < OUTS) & (i < INS)
