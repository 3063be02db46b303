"""Votes and routing, dynamic or by self-attention, as one function that never stores the votes, on any device.

Plain routing writes the votes of the whole batch (94 MB for 128 images at the paper's size) and reads them again in
every iteration. Two observations make that needless. First, the logits of iteration t are the agreement with the sum
of all poses before it, so nothing but that small sum, the gains `g_t`, is carried from one iteration to the next:

    b_t = u_hat . g_t,   g_t = v_1 + ... + v_{t-1}
    c_t = softmax_j(b_t),   s_t = sum_i c_t u_hat + beta,   v_t = squash(s_t)

Second, an iteration then reads each vote once, so it can be computed, used and forgotten: a *sweep* over the input
capsules. So can the backward, with `d x` the gradient that reaches x:

    d s_t    = (d squash)^T d v_t
    d c_t    = u_hat . d s_t                              and  d u_hat += c_t d s_t
    d b_t    = c_t (d c_t - sum_j c_t d c_t)
    d g_t    = sum_i d b_t u_hat                          and  d u_hat += d b_t g_t
    d v_t   += d g_{t+1} + ... + d g_r

The first iteration has uniform couplings and is one matrix product. Self-attention is a single sweep, with gains of
another kind: `g = sum_i u_hat / sqrt(dim)`, one matrix product, too. The sweeps are those of `sweeps_cpu.py` and
`sweeps_triton.py`.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet import functional as F
from capsnet.kernels.autograd import first_derivatives
from capsnet.routing import RoutingResult, check_iterations

__all__ = ["Sweeps", "add_first", "votes_and_attention", "votes_and_routing"]


@runtime_checkable
class Sweeps(Protocol):
    """Sweeps over all votes of `u [n, in, in_dim]` and `weight [in, in_dim, out, dim]`."""

    def __init__(self, u: Tensor, weight: Tensor, *, leaky: bool) -> None:
        """Prepare for any number of sweeps."""

    def rebind(self, u: Tensor, weight: Tensor) -> None:
        """Read these from now on, in a backward: what autograd saved, which saved-tensor hooks may have moved."""

    def weighted_sum(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """`sum_i c u_hat [n, out, dim]` and the couplings `c [n, in, out]` of `gains [n, out, dim]`."""

    def weighted_sum_backward(self, gains: Tensor, d_s: Tensor, d_c: Tensor | None, *, detached: bool) -> Tensor | None:
        """Add to the gradients of `u` and `weight`; return that of `gains`, or None if couplings are `detached`."""

    def gradients(self, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of `u` and `weight`, contiguous, of the backward sweeps since the last call.

        `first [n, out, dim]` is the gradient of each vote by the first iteration, alike for all input capsules; None
        where it has none.
        """


def add_first(d_u: Tensor, d_weight: Tensor, u: Tensor, weight: Tensor, first: Tensor) -> None:
    """Add what the first iteration gives to the gradients, both contiguous: two matrix products."""
    d_vote, matrix = first.flatten(1), _matrix(weight)
    d_u.view(len(u), len(matrix)).addmm_(d_vote, matrix.t())  # views, and never a flatten, which may copy
    d_weight.view(matrix.shape).addmm_(u.flatten(1).t(), d_vote)


def votes_and_routing(
    sweeps: type[Sweeps],
    u: Float[Tensor, "*batch in in_dim"],
    weight: Float[Tensor, "in in_dim out dim"],
    *,
    iterations: int = 3,
    bias: Float[Tensor, "out dim"] | None = None,
    leaky: bool = False,
    detach_routing: bool = False,
) -> RoutingResult:
    """`dynamic_routing(votes(u, weight))` without the votes in memory: of their size over `dim`, the couplings alone.

    Args:
        sweeps: how the votes are read: `cpu.Sweeps` or `gpu.Sweeps`.
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
        apply: Callable[..., tuple[Tensor, Tensor]] = _Routing.apply
        pose, couplings = apply(sweeps, F.at_least_float32(flat), weight, bias, iterations, leaky, detach_routing)
        pose, couplings = (x.reshape(*u.shape[:-2], *x.shape[1:]) for x in (pose, couplings))
        return RoutingResult(pose, F.lengths(pose), couplings)


def votes_and_attention(
    sweeps: type[Sweeps],
    u: Float[Tensor, "*batch in in_dim"],
    weight: Float[Tensor, "in in_dim out dim"],
    *,
    prior: Float[Tensor, "in out"] | None = None,
) -> RoutingResult:
    """`attention_routing(votes(u, weight), prior=prior)` without the votes in memory, see `votes_and_routing`.

    Args:
        sweeps: how the votes are read.
        u: poses of the input capsules.
        weight: `W_ij`, with the axes of one matrix product an input capsule.
        prior: as in `routing.attention_routing`.

    Returns:
        The same RoutingResult, with the same gradients (first derivatives only).
    """
    flat = u.reshape(-1, *u.shape[-2:])
    with F.full_precision(u.device):
        apply: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply
        u_flat = F.at_least_float32(flat)
        s, couplings = apply(sweeps, u_flat, weight)
        if prior is not None:
            s = s + (u_flat.flatten(1) @ _matrix(weight * prior[:, None, :, None])).view(s.shape)
            couplings = couplings + prior
        s, couplings = (x.reshape(*u.shape[:-2], *x.shape[1:]) for x in (s, couplings))
        pose = F.exponential_squash(s)
        return RoutingResult(pose, F.lengths(pose), couplings)


class _Attention(torch.autograd.Function):
    """The sum of votes weighted by `softmax_j(u_hat_ij . sum_k u_hat_kj / sqrt(dim))`, and these couplings."""

    @staticmethod
    def forward(ctx: Any, sweeps: type[Sweeps], u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gains = (u.flatten(1) @ _matrix(weight)).view(len(u), *weight.shape[2:]) / sqrt(weight.shape[3])
        ctx.sweep = sweeps(u, weight, leaky=False)
        s, couplings = ctx.sweep.weighted_sum(gains)
        ctx.save_for_backward(u, weight, gains)
        ctx.set_materialize_grads(False)
        return s, couplings

    @staticmethod
    @first_derivatives("kernel fused", "kernel plain", once=False)
    def backward(ctx: Any, d_s: Tensor | None, d_couplings: Tensor | None) -> tuple[Tensor | None, ...]:
        u, weight, gains = ctx.saved_tensors
        sweep: Sweeps = ctx.sweep
        sweep.rebind(u, weight)
        d_sum = torch.zeros_like(gains) if d_s is None else d_s
        d_gains = sweep.weighted_sum_backward(gains, d_sum, d_couplings, detached=False)
        assert d_gains is not None
        return None, *sweep.gradients(d_gains / sqrt(weight.shape[3]))


class _Routing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sweeps: type[Sweeps],
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        iterations: int,
        leaky: bool,
        detach_routing: bool,
    ) -> tuple[Tensor, Tensor]:
        beta = 0 if bias is None else bias
        uniform = 1 / (weight.shape[2] + leaky)
        s = uniform * (u.flatten(1) @ _matrix(weight)).view(len(u), *weight.shape[2:]) + beta
        sums, gains = [s], [torch.zeros_like(s)]
        sweep = sweeps(u, weight, leaky=leaky)
        for _ in range(iterations - 1):
            gains.append(gains[-1] + F.squash(s))
            s, couplings = sweep.weighted_sum(gains[-1])
            s = s + beta
            sums.append(s)
        ctx.save_for_backward(u, weight, bias, *sums, *gains)
        ctx.sweep, ctx.uniform, ctx.detached = sweep, uniform, detach_routing
        ctx.set_materialize_grads(False)
        if iterations == 1:
            couplings = u.new_full((len(u), u.shape[1], weight.shape[2]), uniform)
        return F.squash(s), couplings

    @staticmethod
    @first_derivatives("kernel fused", "kernel plain", once=False)
    def backward(ctx: Any, d_pose: Tensor | None, d_couplings: Tensor | None) -> tuple[Tensor | None, ...]:
        u, weight, bias, *rest = ctx.saved_tensors
        sweep: Sweeps = ctx.sweep
        sweep.rebind(u, weight)
        sums, gains = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        d_v = torch.zeros_like(sums[0]) if d_pose is None else d_pose
        d_later_gains = torch.zeros_like(d_v)
        d_c = None if ctx.detached else d_couplings
        d_bias = weight.new_zeros(weight.shape[2:])
        for t in range(len(sums) - 1, -1, -1):
            d_s = _squash_backward(sums[t], d_v)
            d_bias += d_s.sum(0)
            if t == 0:
                break
            d_g = sweep.weighted_sum_backward(gains[t], d_s, d_c, detached=ctx.detached)
            d_c = None
            if d_g is None:
                break
            d_v = d_later_gains = d_later_gains + d_g
        d_u, d_weight = sweep.gradients(ctx.uniform * d_s if t == 0 else None)
        return None, d_u, d_weight, None if bias is None else d_bias, None, None, None


def _matrix(weight: Tensor) -> Tensor:
    """`[in * in_dim, out * dim]`."""
    return weight.flatten(2).flatten(0, 1)


def _squash_backward(s: Tensor, d_v: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        (d_s,) = torch.autograd.grad(F.squash(leaf), leaf, d_v)
    return d_s
