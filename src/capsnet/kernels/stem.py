"""First convolution, ReLU and primary convolution as one function, without most of the multiplications.

Nine tenths of a CapsNet's arithmetic is its second convolution, k x k with stride s. Split into its s x s phases (input
pixels of equal remainder by s) it is a convolution of stride 1 with s^2 times the channels and r = ceil(k / s) taps a
side, and those need far fewer products by minimal filtering, see `winograd.py`: 6 x 6 outputs of 5 x 5 taps take 100 in
place of 900. In two dimensions its matrices A, B and G are Kronecker squares:

    X [n^2, batch * tiles, phases * channels]    relu of the first convolution
    V = B X,  U = G W,  M[p] = V[p] U[p] for each of the n^2 points,  Y = A M

and the backward is the same chain transposed. A Kronecker square is applied as two products, one for each axis. Both
ways to do so have the same results: `tiles_torch.py` with PyTorch's matrix products, `tiles_native.py` in C, whose
passes over memory also take the ReLU, its mask and the cut of the image into tiles along. Where a tile reaches beyond
the image it is zero, as it is in the padding of the second convolution.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet.errors import InputError
from capsnet.kernels import native
from capsnet.kernels.autograd import first_derivatives
from capsnet.kernels.buffers import pool
from capsnet.kernels.tiles_native import NativeTiles
from capsnet.kernels.tiles_torch import TorchTiles
from capsnet.kernels.winograd import Pads, Plan, Tiles, plan_for

__all__ = ["constant_weights", "winograd_stem"]

CHUNK_BYTES = 4 << 20  # of the first convolution's output at a time: it stays in the cache


def winograd_stem(
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
        raise InputError("images of Winograd convolutions must not need a gradient; use convolution direct")
    if type(images) is not Tensor:
        raise InputError(f"images of Winograd convolutions must be a plain tensor; got {type(images).__name__}")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (weight1, bias1, weight2))
    apply: Callable[..., Tensor] = _Stem.apply
    return apply(images, weight1, bias1, weight2, stride1, stride2, pads1, pads2, keep)


@contextmanager
def constant_weights() -> Iterator[None]:
    """Inside, `winograd_stem` without gradients transforms each weight once, for this thread's calls.

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
        mine.release()


@dataclass
class _Transforms:
    """The transformed weights of one pass over images, which are that pass's and its thread's alone."""

    thread: int = field(default_factory=get_ident)
    kept: dict[tuple[int, Plan], tuple[Tensor, int, int, Tensor]] = field(default_factory=dict)

    @staticmethod
    def here() -> "_Transforms | None":
        """Those of the pass that this call belongs to; a thread may run in a copy of another one's context."""
        found = _transforms.get()
        return found if found is not None and found.thread == get_ident() else None

    def of(self, plan: Plan, weight2: Tensor) -> Tensor | None:
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

    def release(self) -> None:
        for *_, u in self.kept.values():
            pool.release("stem u", u)
        self.kept.clear()


_transforms: ContextVar[_Transforms | None] = ContextVar("transforms", default=None)


def _transform(plan: Plan, weight2: Tensor) -> Tensor:
    """U = G W, `[points, phases^2 * channels, out]`."""
    out, channels, s = *weight2.shape[:2], plan.s2
    u = pool.acquire("stem u", (plan.points, s * s * channels, out), weight2)
    kernel = weight2.permute(2, 3, 1, 0).reshape(plan.k2, plan.k2, channels * out)
    plan.tiles.weight(plan, kernel, u.view(plan.points, s, s, channels * out))
    return u


@dataclass(frozen=True)
class _Input:
    """First convolution, ReLU and transform of the input, for a few images at a time: their arrays stay in the cache.

    A chunk of the first convolution's output is one matrix product of patches, which end with 1, and its weight, which
    ends with its bias. Patches are zero where the second convolution is padded, the 1 too.
    """

    plan: Plan
    images: Tensor
    channels: int

    @property
    def width(self) -> int:
        """Numbers at each point of a row."""
        return self.plan.s2**2 * self.channels

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, patches, and an array for what they give; both are overwritten by the next."""
        plan, (batch, in_channels, *_) = self.plan, self.images.shape
        one = plan.rows * plan.points * self.width * self.images.element_size()
        most = max(1, min(batch, CHUNK_BYTES // one))
        taps = in_channels * plan.k1**2 + 1
        places = plan.rows * plan.points * plan.s2**2
        patches = pool.acquire("stem patches", (most * places, taps), self.images)
        x = pool.acquire("stem x", (most * places, self.channels), self.images)
        for start in range(0, batch, most):
            count = min(most, batch - start)
            part = patches[: count * places]
            plan.tiles.patches(plan, self.images[start : start + count], part)
            yield slice(start * plan.rows, (start + count) * plan.rows), part, x[: count * places]
            if part.is_meta:
                break  # the others take no more memory, see `capsnet.memory`
        pool.release("stem patches", patches)
        pool.release("stem x", x)

    def forward(self, weight1: Tensor, bias1: Tensor, positive: Tensor | None) -> Tensor:
        """V, `[points, rows, width]`; `positive [points * rows, width]` tells where ReLU lets pass."""
        plan, rows = self.plan, len(self.images) * self.plan.rows
        v = pool.acquire("stem v", (plan.points, rows, self.width), self.images)
        matrix = torch.cat([weight1.flatten(1).t(), bias1[None]])
        for part, patches, x in self.chunks():
            torch.mm(patches, matrix, out=x)
            plan.tiles.forward(plan, x, v[:, part], None if positive is None else positive[self.places(part)])
        return v

    def backward(self, d_v: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the first convolution's weight, `[channels, in_channels * k1 * k1]`, and bias."""
        d_matrix = d_v.new_zeros(self.images.shape[1] * self.plan.k1**2 + 1, self.channels)
        for part, patches, d_x in self.chunks():
            self.plan.tiles.backward(self.plan, d_v[:, part], positive[self.places(part)], d_x)
            d_matrix.addmm_(patches.t(), d_x)
        return d_matrix[:-1].t(), d_matrix[-1]

    def places(self, rows: slice) -> slice:
        """Where these rows are in `positive`."""
        return slice(rows.start * self.plan.points, rows.stop * self.plan.points)


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
        tiles: type[Tiles] = NativeTiles if native.usable(images, weight1, bias1, weight2) else TorchTiles
        plan = plan_for(in_size, k1, stride1, pads1, k2, stride2, pads2, images.dtype, images.device, tiles)
        out, channels = weight2.shape[:2]
        source, rows = _Input(plan, images.contiguous(), channels), len(images) * plan.rows

        positive = None
        if keep:
            places = (plan.points * rows, source.width)
            positive = pool.acquire("stem positive", places, images.new_empty(0, dtype=torch.uint8))
        v = source.forward(weight1, bias1, positive)
        transforms = None if keep else _Transforms.here()
        kept = transforms.of(plan, weight2) if transforms else None
        u = _transform(plan, weight2) if kept is None else kept
        m = pool.acquire("stem m", (plan.points, rows, out), images)
        torch.bmm(v, u, out=m)
        grid = images.new_empty(len(images), plan.y.outputs, plan.x.outputs, out)
        tiles.output(plan, m, grid)
        pool.release("stem m", m)
        if keep:
            ctx.plan = plan
            ctx.save_for_backward(images, weight1, weight2, positive, u, v)
        else:
            pool.release("stem v", v)
            if kept is None:
                pool.release("stem u", u)
        return grid

    @staticmethod
    @first_derivatives("the Winograd convolutions", "convolution direct", once=True)
    def backward(ctx: Any, d_grid: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        images, weight1, weight2, positive, u, v = ctx.saved_tensors
        out, channels = weight2.shape[:2]

        d_m = pool.acquire("stem m", (plan.points, v.shape[1], out), d_grid)
        plan.tiles.output_backward(plan, d_grid.contiguous(), d_m)
        d_v = pool.acquire("stem d_v", tuple(v.shape), d_grid)
        torch.bmm(d_m, u.transpose(1, 2), out=d_v)
        d_u = u  # its memory takes its gradient
        torch.bmm(v.transpose(1, 2), d_m, out=d_u)
        d_weight1, d_bias1 = _Input(plan, images.contiguous(), channels).backward(d_v, positive)
        d_kernel = weight2.new_empty(plan.k2, plan.k2, channels, out)
        in_phases = d_u.view(plan.points, plan.s2, plan.s2, channels * out)
        plan.tiles.weight_backward(plan, in_phases, d_kernel.view(plan.k2, plan.k2, channels * out))
        for name, array in (("positive", positive), ("u", u), ("v", v), ("d_v", d_v), ("m", d_m)):
            pool.release(f"stem {name}", array)
        return None, d_weight1.view(weight1.shape), d_bias1, d_kernel.permute(3, 2, 0, 1), None, None, None, None, None
