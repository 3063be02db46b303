"""Sweeps over the votes in C: those of a few images and one input capsule at a time, in registers and the L1 cache.

With images as the lanes of vectors, the votes of 16 images for one input capsule are `out * dim` vectors: made, used
for the agreement and the weighted sum, and forgotten. A sweep of the backward gives the gradient of the gains alone.
The gradients of `u` and `weight` are made at the end, for all iterations at once, from one sum over them:

    d u_hat = (1 / out) d s_1 + sum_t (c_t d s_t + d b_t g_t),   d u = d u_hat W^T,   d W = u^T d u_hat
"""

import ctypes
import math

import torch
from torch import Tensor, nn

from capsnet.kernels import native
from capsnet.kernels.buffers import pool

__all__ = ["Sweeps"]

TASKS = 16  # at least, for each sweep: so many that threads have the same to do, whatever their number
_ARRAY, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class _Sweeping(native.Struct):
    _fields_ = (
        *((name, _ARRAY) for name in ("u", "weight")),
        *((name, _LONG) for name in ("blocks", "ins", "in_dim", "outs", "dim", "groups")),
        ("leaky", _INT),
        *((name, _ARRAY) for name in ("gains", "sums", "couplings", "d_s", "d_couplings")),
    )


class _Gradients(native.Struct):
    _fields_ = (
        *((name, _ARRAY) for name in ("u", "weight", "d_u", "d_weight")),
        *((name, _LONG) for name in ("blocks", "ins", "in_dim", "outs", "dim", "iterations")),
        ("leaky", _INT),
        ("detached", _INT),
        *((name, _ARRAY) for name in ("d_first", "gains", "d_s", "d_couplings")),
    )


class Sweeps:
    """See `fused.Sweeps`; float32 on a CPU."""

    def __init__(self, u: Tensor, weight: Tensor, *, leaky: bool) -> None:
        self.n, self.leaky, self.lanes = len(u), leaky, native.lanes()
        self.blocks = -(-self.n // self.lanes)
        self.groups = min(len(weight), max(1, -(-TASKS // max(1, self.blocks))))
        self.weight, self.u = weight.contiguous(), self._in_blocks(u)
        self.swept: list[tuple[Tensor, Tensor]] = []  # gains and d_s of the backward's sweeps
        self.d_c: Tensor | None = None
        self.detached = False

    def rebind(self, u: Tensor, weight: Tensor) -> None:
        """See `fused.Sweeps`; of `u` there is a copy."""
        self.weight = weight.contiguous()

    def weighted_sum(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """See `fused.Sweeps`."""
        ins, _, outs, _ = self.weight.shape
        couplings = self.weight.new_empty(outs, ins, self.blocks * self.lanes)
        s = self._sweep(self._in_blocks(gains), couplings=couplings)
        return s, couplings[..., : self.n].permute(2, 1, 0)

    def weighted_sum_backward(self, gains: Tensor, d_s: Tensor, d_c: Tensor | None, *, detached: bool) -> Tensor | None:
        """See `fused.Sweeps`."""
        g, d_s = self._in_blocks(gains), self._in_blocks(d_s)
        if not self.swept:
            self.detached = detached
            if d_c is not None and not detached:
                self.d_c = nn.functional.pad(d_c.permute(2, 1, 0), (0, self.blocks * self.lanes - self.n)).contiguous()
        d_couplings = None if self.swept else self.d_c
        self.swept.append((g, d_s))
        return None if detached else self._sweep(g, d_s=d_s, d_couplings=d_couplings)

    def gradients(self, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `fused.Sweeps`."""
        ins, in_dim, _, _ = self.weight.shape
        d_u, d_weight = pool.acquire("sweeps d_u", tuple(self.u.shape), self.u), torch.empty_like(self.weight)
        gains, d_s = (torch.stack(each) for each in zip(*self.swept, strict=True)) if self.swept else (None, None)
        arguments = _Gradients(
            **self._sizes(),
            d_u=d_u,
            d_weight=d_weight,
            iterations=len(self.swept),
            detached=self.detached,
            d_first=None if first is None else self._in_blocks(first),
            gains=gains,
            d_s=d_s,
            d_couplings=self.d_c,
        )
        native.call("native_gradients", arguments)
        self.swept, self.d_c = [], None  # a second backward of the same forward starts anew
        images_first = self._images_first(d_u).view(self.n, ins, in_dim)
        pool.release("sweeps d_u", d_u)
        return images_first, d_weight

    def _sweep(self, gains: Tensor, **arrays: Tensor | None) -> Tensor:
        """The sum `[n, out, dim]` of a sweep."""
        _, _, outs, dim = self.weight.shape
        sums = self.weight.new_empty(self.groups, self.blocks, outs * dim, self.lanes)
        native.call("native_sweep", _Sweeping(**self._sizes(), groups=self.groups, gains=gains, sums=sums, **arrays))
        return self._images_first(sums.sum(0)).view(self.n, outs, dim)

    def _sizes(self) -> dict[str, Tensor | int]:
        ins, in_dim, outs, dim = self.weight.shape
        sizes = {"blocks": self.blocks, "ins": ins, "in_dim": in_dim, "outs": outs, "dim": dim, "leaky": self.leaky}
        return {"u": self.u, "weight": self.weight, **sizes}

    def _in_blocks(self, x: Tensor) -> Tensor:
        """`[n, ...]` as `[blocks, ..., lanes]`, zeros after the last image."""
        flat = x.reshape(self.n, math.prod(x.shape[1:]))
        if missing := self.blocks * self.lanes - self.n:
            flat = nn.functional.pad(flat, (0, 0, 0, missing))
        return flat.view(self.blocks, self.lanes, flat.shape[1]).transpose(1, 2).contiguous()

    def _images_first(self, x: Tensor) -> Tensor:
        """`[blocks, all, lanes]` as `[n, all]`, in memory of its own."""
        return x.transpose(1, 2).flatten(0, 1)[: self.n].clone(memory_format=torch.contiguous_format)
