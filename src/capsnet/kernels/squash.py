"""Bias and squash of the primary capsules in one pass over memory, forward and backward, in C."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet.kernels import native
from capsnet.kernels.autograd import first_derivatives

__all__ = ["biased_squash"]

PARTS = 16  # of the rows: so many that threads have the same to do, whatever their number
_ARRAY, _LONG = ctypes.c_void_p, ctypes.c_long


class _Squashing(native.Struct):
    _fields_ = (
        *((name, _ARRAY) for name in ("given", "bias", "capsules", "d_capsules", "d_bias")),
        *((name, _LONG) for name in ("rows", "width", "dim", "parts")),
        ("scale", ctypes.c_float),
    )


def biased_squash(
    grid: Float[Tensor, "*batch channels"], bias: Float[Tensor, "channels"], dim: int, *, scale: float = 1.0
) -> Float[Tensor, "*batch channels"]:
    """`squash(scale * grid + bias)` of each group of `dim` channels; see `functional.squash`.

    In float32 on a CPU, where `native.usable`. First derivatives only.
    """
    apply: Callable[..., Tensor] = _BiasedSquash.apply
    return apply(grid, bias, dim, scale)


class _BiasedSquash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Tensor, bias: Tensor, dim: int, scale: float) -> Tensor:
        grid, bias = grid.contiguous(), bias.contiguous()
        ctx.save_for_backward(grid, bias)
        ctx.dim, ctx.scale = dim, scale
        capsules = torch.empty_like(grid)
        native.call("native_squash", _arguments(grid, bias, dim, scale, capsules=capsules))
        return capsules

    @staticmethod
    @first_derivatives("the squash of the primary capsules", "convolution direct", once=False)
    def backward(ctx: Any, d_capsules: Tensor) -> tuple[Tensor | None, ...]:
        grid, bias = ctx.saved_tensors
        d_grid, d_bias = torch.empty_like(grid), bias.new_empty(PARTS, len(bias))
        given = {"capsules": d_grid, "d_capsules": d_capsules.contiguous(), "d_bias": d_bias}
        native.call("native_squash", _arguments(grid, bias, ctx.dim, ctx.scale, **given))
        return d_grid, d_bias.sum(0), None, None


def _arguments(grid: Tensor, bias: Tensor, dim: int, scale: float, **arrays: Tensor) -> _Squashing:
    width = len(bias)
    sizes = {"rows": grid.numel() // width, "width": width, "dim": dim, "parts": PARTS, "scale": scale}
    return _Squashing(given=grid, bias=bias, **sizes, **arrays)
