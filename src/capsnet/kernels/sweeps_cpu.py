"""Sweeps over the votes on a CPU: a few input capsules of all images at a time, so that they stay in the cache.

Not even these few are formed as votes, `[out, dim, in, n]`. With the matrix `W_ij` on the other side of each product,

    u_hat . g = u . (W g),   sum_i c u_hat = sum_i (c u) W,   d u = sum_j c (W d s) + d b (W g),

the sum over `dim` is part of a matrix product, and the arrays that are written have `in_dim` in its place, half as
long in the paper. Their axes are `[out, in_dim, in * n]`: whatever is not a matrix product runs over long rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from capsnet.kernels.buffers import pool
from capsnet.kernels.fused import add_first

__all__ = ["Sweeps"]

CHUNK_BYTES = 2 << 20  # of one working array; of 1, 2, 3, 4 and 6 MiB the fastest at the paper's size


class Sweeps:
    """See `fused.Sweeps`."""

    def __init__(self, u: Tensor, weight: Tensor, *, leaky: bool) -> None:
        self.images_first, self.weight, self.leaky = u, weight, leaky
        self.ins, self.in_dim, self.outs, self.dim = weight.shape
        self.n = len(u)
        self.arrays: dict[str, Tensor] = {}
        self.d_u: Tensor | None = None
        self.d_weight: Tensor | None = None

    @cached_property
    def u(self) -> Tensor:
        """`[in_dim, in, n]`."""
        return _images_last(self.images_first, out=self._array("u", self.in_dim, self.ins, self.n))

    @cached_property
    def couplings(self) -> Tensor:
        """Of the last sweep, `[out, in, n]`."""
        return self.weight.new_empty(self.outs, self.ins, self.n)

    def __del__(self) -> None:
        for name, array in getattr(self, "arrays", {}).items():
            pool.release(f"sweeps {name}", array)

    def rebind(self, u: Tensor, weight: Tensor) -> None:
        """See `fused.Sweeps`; of `u` there is a copy where it was read already."""
        self.images_first, self.weight = u, weight

    def weighted_sum(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """See `fused.Sweeps`."""
        g = gains.permute(1, 2, 0).contiguous()  # [out, dim, n]
        s = torch.zeros_like(g)
        for chunk in self._chunks():
            c = self._couplings(chunk, g)
            self.couplings[:, chunk.inputs] = c.view(self.outs, -1, self.n)  # [out, in, n]
            torch.mul(chunk.u, c[:, None], out=chunk.x)  # [out, in_dim, in * n]
            s.baddbmm_(chunk.weight.transpose(1, 2), chunk.as_matrices(chunk.x))
        return s.permute(2, 0, 1).contiguous(), self.couplings.permute(2, 1, 0)  # [n, out, dim], [n, in, out]

    def weighted_sum_backward(self, gains: Tensor, d_s: Tensor, d_c: Tensor | None, *, detached: bool) -> Tensor | None:
        """See `fused.Sweeps`."""
        g, d_s = (x.permute(1, 2, 0).contiguous() for x in (gains, d_s))  # [out, dim, n]
        d_g = torch.zeros_like(g)
        if self.d_u is None or self.d_weight is None:
            self.d_u = self._array("d_u", *self.u.shape).zero_()
            self.d_weight = self.weight.new_zeros(self.weight.shape)  # [in, in_dim, out, dim]
        for chunk in self._chunks():
            u, weight, x, y = chunk.u, chunk.weight, chunk.x, chunk.y
            c = self._couplings(chunk, g)
            torch.bmm(weight, d_s, out=chunk.as_matrices(y))
            d_b = None if detached else self._logits_backward(chunk, c, d_c)
            y *= c[:, None]
            if d_b is not None:
                y.addcmul_(x, d_b[:, None])
            self.d_u[:, chunk.inputs] += y.sum(0).view(self.in_dim, -1, self.n)  # [in_dim, in, n]
            torch.mul(u, c[:, None], out=y)
            d_w = torch.bmm(chunk.as_matrices(y), d_s.transpose(1, 2))  # [out, in_dim * in, dim]
            if d_b is not None:
                torch.mul(u, d_b[:, None], out=x)
                d_w.baddbmm_(chunk.as_matrices(x), g.transpose(1, 2))
                d_g.baddbmm_(weight.transpose(1, 2), chunk.as_matrices(x))
            self.d_weight[chunk.inputs] += d_w.view(self.outs, self.in_dim, -1, self.dim).permute(2, 1, 0, 3)
        return None if detached else d_g.permute(2, 0, 1).contiguous()  # [n, out, dim]

    def gradients(self, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `fused.Sweeps`."""
        u, weight = self.images_first, self.weight
        if self.d_u is None or self.d_weight is None:
            d_u, d_weight = u.new_zeros(u.shape), weight.new_zeros(weight.shape)  # zeros_like would keep the strides
        else:
            d_u, d_weight = _images_first(self.d_u), self.d_weight
        self.d_u = self.d_weight = None
        if first is not None:
            add_first(d_u, d_weight, u, weight, first)
        return d_u, d_weight

    def _couplings(self, chunk: "_Chunk", g: Tensor) -> Tensor:
        """Couplings `[out, in * n]`; leaves `W g` in `x`."""
        torch.bmm(chunk.weight, g, out=chunk.as_matrices(chunk.x))
        _agreement(chunk.u, chunk.x, out=chunk.b[self.leaky :])
        torch.softmax(chunk.b, 0, out=chunk.c)
        return chunk.c[self.leaky :]

    def _logits_backward(self, chunk: "_Chunk", c: Tensor, d_c: Tensor | None) -> Tensor:
        """The gradient of the logits `[out, in * n]`, from `W d_s` in `y`."""
        product, d_b = chunk.b[self.leaky :], chunk.d_b
        _agreement(chunk.u, chunk.y, out=d_b)
        if d_c is not None:
            d_b += d_c.permute(2, 1, 0)[:, chunk.inputs].reshape(d_b.shape)
        d_b -= torch.mul(c, d_b, out=product).sum(0)
        d_b *= c
        return d_b

    def _chunks(self) -> Iterator["_Chunk"]:
        """The input capsules, a few at a time; all in the same working arrays."""
        one = self.outs * self.in_dim * max(1, self.n)
        length = min(self.ins, max(1, CHUNK_BYTES // (one * self.u.element_size())))
        x, y = (self._array(name, one * length) for name in ("x", "y"))
        b, c = (self._array(name, (self.outs + self.leaky) * self.n * length) for name in ("b", "c"))
        d_b = self._array("d_b", self.outs * self.n * length)
        for start in range(0, self.ins if self.n else 0, length):
            inputs = slice(start, min(start + length, self.ins))
            columns = (inputs.stop - inputs.start) * self.n
            b[: self.leaky * columns] = 0
            yield _Chunk(
                inputs=inputs,
                u=self.u[:, inputs].flatten(1),
                weight=self.weight[inputs].permute(2, 1, 0, 3).reshape(self.outs, -1, self.dim),
                x=_first(x, self.outs, self.in_dim, columns),
                y=_first(y, self.outs, self.in_dim, columns),
                b=_first(b, self.outs + self.leaky, columns),
                c=_first(c, self.outs + self.leaky, columns),
                d_b=_first(d_b, self.outs, columns),
            )
            if self.weight.is_meta:
                return  # the others take no more memory, see `capsnet.memory`

    def _array(self, name: str, *shape: int) -> Tensor:
        """A working array of undefined content, the pool's until this object is gone."""
        if name not in self.arrays:
            self.arrays[name] = pool.acquire(f"sweeps {name}", shape, self.weight)
        return self.arrays[name]


@dataclass
class _Chunk:
    inputs: slice
    u: Tensor  # [in_dim, in * n]
    weight: Tensor  # [out, in_dim * in, dim]
    x: Tensor  # [out, in_dim, in * n]
    y: Tensor
    b: Tensor  # [leaky + out, in * n]
    c: Tensor
    d_b: Tensor  # [out, in * n]

    def as_matrices(self, x: Tensor) -> Tensor:
        """`[out, in_dim * in, n]`."""
        return x.view(len(x), self.weight.shape[1], -1)


def _agreement(u: Tensor, product: Tensor, *, out: Tensor) -> None:
    """`sum_k u[k] product[:, k]`."""
    (first, first_u), *rest = zip(product.unbind(1), u.unbind(0), strict=True)  # [out, in * n], [in * n]
    torch.mul(first, first_u, out=out)
    for row, row_u in rest:
        out.addcmul_(row, row_u)


def _first(array: Tensor, *shape: int) -> Tensor:
    return array[: math.prod(shape)].view(shape)


def _images_last(u: Tensor, *, out: Tensor) -> Tensor:
    """Copy `[n, in, in_dim]` to `[in_dim, in, n]`: in two steps, each of which PyTorch is quick at."""
    n, ins, in_dim = u.shape
    return out.copy_(u.flatten(1).t().contiguous().view(ins, in_dim, n).transpose(0, 1))


def _images_first(u: Tensor) -> Tensor:
    in_dim, ins, n = u.shape
    images_last = u.transpose(0, 1).flatten(0, 1)  # of one image it is `u` itself, which others will write to
    return images_last.t().clone(memory_format=torch.contiguous_format).view(n, ins, in_dim)
