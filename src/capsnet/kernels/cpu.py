"""Votes and dynamic routing for a few images at a time, so that their votes stay in the processor's cache.

The votes of a batch of 128 at the paper's size are 94 MB, and plain routing reads them 2 r - 1 times forward and writes
as much backward. Here the votes of a slice are computed, routed and forgotten; the backward computes them again. Its
derivation, for one image and with `a_t` the gradient that reaches `x_t`:

    s_t = sum_i c_t u_hat + beta,  v_t = squash(s_t),  b_{t+1} = b_t + u_hat . v_t,  c_t = softmax_j(b_t)

    d s_t     = (d squash)^T d v_t
    d c_t     = u_hat . d s_t                          and  d u_hat += c_t d s_t
    d b_t     = c_t (d c_t - sum_j c_t d c_t) + d b_{t+1}
    d v_{t-1} = sum_i d b_t u_hat                      and  d u_hat += d b_t v_{t-1}

Inside a slice the images are the last axis: `u_hat [in, out, dim, n]`, so that every sum runs over whole vectors. The
arrays of that shape are buffers kept for all slices, as fresh memory costs several times the arithmetic done in it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet import functional as F
from capsnet.routing import RoutingResult, check_iterations, couplings_of

__all__ = ["votes_and_routing"]

SLICE_BYTES = 12 << 20  # votes of one slice: 16 images at the paper's size, the fastest of 1 to 32


def votes_and_routing(
    u: Float[Tensor, "*batch in in_dim"],
    weight: Float[Tensor, "in in_dim out dim"],
    *,
    iterations: int = 3,
    bias: Float[Tensor, "out dim"] | None = None,
    leaky: bool = False,
    detach_routing: bool = False,
) -> RoutingResult:
    """`dynamic_routing(votes(u, weight))` without ever holding the votes of the whole batch.

    Args:
        u: poses of the input capsules.
        weight: `W_ij`, with the axes of one matrix product an input capsule.
        iterations: as in `routing.dynamic_routing`, and so are `bias`, `leaky` and `detach_routing`.
        bias: see there.
        leaky: see there.
        detach_routing: see there.

    Returns:
        The same RoutingResult, with the same gradients (first derivatives only).

    Raises:
        InputError: fewer than 1 iteration.
    """
    check_iterations(iterations)
    flat = u.reshape(-1, *u.shape[-2:])
    with F.full_precision(u.device):
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat = flat.float()
        apply: Callable[..., tuple[Tensor, Tensor]] = _Routing.apply
        pose, couplings = apply(flat, weight, bias, iterations, leaky, detach_routing)
        pose, couplings = (x.reshape(*u.shape[:-2], *x.shape[1:]) for x in (pose, couplings))
        return RoutingResult(pose, F.lengths(pose), couplings)


class _Iteration(NamedTuple):
    c: Tensor  # [in, out, n]
    s: Tensor  # [out, n, dim]
    v: Tensor  # [out, n, dim]


class _Routing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        iterations: int,
        leaky: bool,
        detach_routing: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, weight, bias)
        ctx.options = iterations, leaky, detach_routing
        ctx.set_materialize_grads(False)
        outs, dim = weight.shape[2:]
        pose = u.new_empty(len(u), outs, dim)
        couplings = u.new_empty(len(u), u.shape[1], outs)
        buffers = _Buffers(weight, count=2)
        for images in _slices(u, weight):
            u_hat, product = buffers.arrays(u[images])
            _votes(u[images], weight, out=u_hat)
            last = _route(u_hat, product, bias, iterations, leaky)[-1]
            pose[images] = last.v.transpose(0, 1)
            couplings[images] = last.c.permute(2, 0, 1)
        return pose, couplings

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_pose: Tensor | None, d_couplings: Tensor | None) -> tuple[Tensor | None, ...]:
        u, weight, bias = ctx.saved_tensors
        iterations, leaky, detach_routing = ctx.options
        d_u, d_weight = torch.empty_like(u), weight.new_zeros(weight.shape)  # contiguous: by_input must be a view
        d_bias = None if bias is None else torch.zeros_like(bias)
        by_input = d_weight.flatten(2)
        buffers = _Buffers(weight, count=3)
        for images in _slices(u, weight):
            u_hat, product, d_u_hat = buffers.arrays(u[images])
            _votes(u[images], weight, out=u_hat)
            d_v = torch.zeros_like(u_hat[0]).transpose(1, 2) if d_pose is None else d_pose[images].transpose(0, 1)
            d_c = None if d_couplings is None or detach_routing else d_couplings[images].permute(1, 2, 0)
            steps = _route(u_hat, product, bias, iterations, leaky)
            d_beta = _route_backward(u_hat, product, steps, d_v, d_c, detach_routing, out=d_u_hat)
            if d_bias is not None:
                d_bias += d_beta
            by_vote = d_u_hat.flatten(1, 2)  # [in, out * dim, n]
            d_u[images] = torch.bmm(weight.flatten(2), by_vote).permute(2, 0, 1)
            by_input += torch.bmm(u[images].permute(1, 2, 0).contiguous(), by_vote.transpose(1, 2))
        return d_u, d_weight, d_bias, None, None, None


class _Buffers:
    """Arrays of the votes' shape for one slice, the same memory for every slice."""

    def __init__(self, weight: Tensor, *, count: int) -> None:
        self.shape = weight.shape[0], *weight.shape[2:]
        self.flat = [weight.new_empty(_slice_length(weight) * math.prod(self.shape)) for _ in range(count)]

    def arrays(self, u: Tensor) -> list[Tensor]:
        shape = *self.shape, len(u)
        return [flat[: math.prod(shape)].view(shape) for flat in self.flat]


def _slice_length(weight: Tensor) -> int:
    per_image = weight.shape[0] * weight[0, 0].numel() * weight.element_size()
    n = max(1, SLICE_BYTES // per_image)
    return n - n % 16 if n > 16 else n  # whole vectors of 16 floats


def _slices(u: Tensor, weight: Tensor) -> list[slice]:
    n = _slice_length(weight)
    return [slice(start, start + n) for start in range(0, len(u), n)]


def _votes(u: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Votes `[in, out, dim, n]` of the poses `u [n, in, in_dim]`."""
    torch.bmm(weight.flatten(2).transpose(1, 2), u.permute(1, 2, 0), out=out.flatten(1, 2))


def _route(u_hat: Tensor, product: Tensor, bias: Tensor | None, iterations: int, leaky: bool) -> list[_Iteration]:
    steps: list[_Iteration] = []
    b = u_hat.new_zeros(u_hat.shape[0], u_hat.shape[1], u_hat.shape[3])
    for _ in range(iterations):
        if steps:
            b = b + _agreement(u_hat, steps[-1].v, product)
            c = couplings_of(b, leaky=leaky, dim=1)
            s = _weighted_sum(c, u_hat, product)
        else:  # logits of zero: uniform couplings, and a plain sum in place of a weighted one
            uniform = 1 / (u_hat.shape[1] + leaky)
            c = torch.full_like(b, uniform)
            s = (u_hat.sum(0) * uniform).transpose(1, 2)
        if bias is not None:
            s = s + bias[:, None]
        steps.append(_Iteration(c, s, F.squash(s)))
    return steps


def _route_backward(
    u_hat: Tensor,
    product: Tensor,
    steps: list[_Iteration],
    d_v: Tensor,
    d_c: Tensor | None,
    detach_routing: bool,
    *,
    out: Tensor,
) -> Tensor:
    """Write the votes' gradient `[in, out, dim, n]`; return the bias's `[out, dim]`, summed over the images."""
    d_bias = torch.zeros_like(u_hat[0, :, :, 0])
    d_b = torch.zeros_like(steps[0].c)
    for t in range(len(steps) - 1, -1, -1):
        c, s, _ = steps[t]
        d_s = _squash_backward(s, d_v)
        d_bias += d_s.sum(1)
        if t == len(steps) - 1:
            torch.mul(c[:, :, None], _images_last(d_s), out=out)
        else:
            out.addcmul_(c[:, :, None], _images_last(d_s))
        if t == 0 or detach_routing:
            break
        d_c_t = _agreement(u_hat, d_s, product)
        if t == len(steps) - 1 and d_c is not None:
            d_c_t = d_c_t + d_c
        d_b = d_b + c * (d_c_t - (c * d_c_t).sum(1, keepdim=True))
        out.addcmul_(d_b[:, :, None], _images_last(steps[t - 1].v))
        d_v = _weighted_sum(d_b, u_hat, product)
    return d_bias


def _squash_backward(s: Tensor, d_v: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        (d_s,) = torch.autograd.grad(F.squash(leaf), leaf, d_v)
    return d_s


def _weighted_sum(c: Tensor, u_hat: Tensor, product: Tensor) -> Tensor:
    """`sum_i c[i, j, n] u_hat[i, j, d, n]` as `[out, n, dim]`."""
    return torch.mul(u_hat, c[:, :, None], out=product).sum(0).transpose(1, 2)


def _agreement(u_hat: Tensor, v: Tensor, product: Tensor) -> Tensor:
    """`sum_d u_hat[i, j, d, n] v[j, n, d]` as `[in, out, n]`."""
    return torch.mul(u_hat, _images_last(v), out=product).sum(2)


def _images_last(v: Tensor) -> Tensor:
    """`[out, n, dim]` as `[out, dim, n]`; a strided operand would cost ten times the product it goes into."""
    return v.transpose(1, 2).contiguous()
