"""Routing algorithms: votes in, a RoutingResult out. No parameters; one function for each algorithm.

Letters follow the paper: `u_hat` votes, `b` logits, `c` couplings, `s` weighted sums, `v` squashed outputs. The plain
versions here are judged by `reference.py` and are themselves the judge of the fused ones in `kernels/`.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.options.schema import shown

__all__ = [
    "MOST_ITERATIONS",
    "Normalization",
    "RoutingResult",
    "attention_routing",
    "check_iterations",
    "couplings_of",
    "dynamic_routing",
    "inverted_attention_routing",
    "inverted_attention_step",
    "self_routing",
    "uniform_routing",
]

Normalization = Literal["softmax", "max-min"]
"""How logits become couplings, see `couplings_of`."""

MOST_ITERATIONS = 100
"""The paper tries up to 10, by which the couplings have settled; each costs the same time and memory again."""


class RoutingResult(NamedTuple):
    """What every routing algorithm returns.

    Attributes:
        pose: `v`, the output capsules' vectors, `[*batch, out, dim]`.
        activation: presence of each output capsule, `[*batch, out]`, in [0, 1].
        couplings: `c` of the last iteration, `[*batch, in, out]`; what each input capsule's row sums to over the
            output capsules is said by the function: 1 in `dynamic_routing` (less with a leaky slot, more with max-min).
    """

    pose: Tensor
    activation: Tensor
    couplings: Tensor


def dynamic_routing(
    votes: Float[Tensor, "*batch in out dim"],
    *,
    iterations: int = 3,
    bias: Float[Tensor, "out dim"] | None = None,
    leaky: bool = False,
    detach_routing: bool = False,
    epsilon: float = 0.0,
    normalization: Normalization = "softmax",
) -> RoutingResult:
    """Routing by agreement (Procedure 1): send each input capsule's vote to where the other votes agree with it.

    `iterations` weighted sums and `iterations - 1` updates of the logits, which start at zero for every example and
    are never shared over a batch. Computed in float32 whatever the precision around it.

    Args:
        votes: `u_hat_{j|i} = W_ij u_i` (eq. 2).
        iterations: r; 1 means uniform couplings and no update.
        bias: added to the weighted sum before the squash. Not in the paper's equations; in the first author's
            published code (https://github.com/Sarasra/models), where it starts at 0.1.
        leaky: give every input capsule one more place to send its vote, "none of the above", with a logit held at
            zero (Section 5 of the paper for CIFAR-10; the form is that of the first author's code).
        detach_routing: no gradient through the couplings, only through the last weighted sum. The result is the
            same and the gradient is not; several public implementations do this to save memory.
        epsilon: of `functional.squash`.
        normalization: how logits become couplings, see `couplings_of`.

    Returns:
        Pose (lengths in [0, 1)), activation (those lengths) and the last couplings.

    Raises:
        InputError: votes with fewer than 3 axes, iterations that are not 1 to 100, or a leaky slot without a softmax.

    Example:
        >>> dynamic_routing(torch.randn(2, 1152, 10, 16)).pose.shape
        torch.Size([2, 10, 16])
    """
    check_iterations(iterations)
    _check_votes(votes)
    with F.full_precision(votes.device):
        u_hat = F.at_least_float32(votes)
        beta = 0 if bias is None else bias
        b = u_hat.new_zeros(u_hat.shape[:-1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_routing):
            for _ in range(iterations - 1):
                c = couplings_of(b, leaky=leaky, normalization=normalization)
                v = F.squash(_weighted_sum(c, u_hat) + beta, epsilon=epsilon)
                b = b + torch.einsum("...ijd,...jd->...ij", u_hat, v)
        c = couplings_of(b, leaky=leaky, normalization=normalization)
        v = F.squash(_weighted_sum(c, u_hat) + beta, epsilon=epsilon)
        return RoutingResult(v, F.lengths(v), c)


def attention_routing(
    votes: Float[Tensor, "*batch in out dim"], *, prior: Float[Tensor, "in out"] | None = None
) -> RoutingResult:
    """Self-attention routing (Mazzia, Salvetti, Chiaberge 2021, arXiv 2101.12491, Section 3.3): no iteration.

    A vote's logit is how well it agrees with the sum of all votes for the same output capsule, divided by the square
    root of their dimension: `c = softmax_j(u_hat_ij . sum_k u_hat_kj / sqrt(dim)) + prior_ij`, and
    `v_j = exponential_squash(sum_i c_ij u_hat_ij)`. The authors form all products of two votes and sum a row of them,
    which is the same. Computed in float32 whatever the precision around it.

    Args:
        votes: `u_hat_{j|i} = W_ij u_i`.
        prior: a learned bias of the couplings, added after the softmax as in the authors' code.

    Returns:
        Pose (lengths in [0, 1)), activation (those lengths) and couplings, whose rows sum to 1 plus those of the
            prior, and can be negative with it.

    Raises:
        InputError: votes with fewer than 3 axes.

    Example:
        >>> attention_routing(torch.randn(2, 16, 10, 16)).pose.shape
        torch.Size([2, 10, 16])
    """
    _check_votes(votes)
    with F.full_precision(votes.device):
        u_hat = F.at_least_float32(votes)
        logits = torch.einsum("...ijd,...jd->...ij", u_hat, u_hat.sum(-3)) / math.sqrt(u_hat.shape[-1])
        c = logits.softmax(-1) if prior is None else logits.softmax(-1) + prior
        v = F.exponential_squash(_weighted_sum(c, u_hat))
        return RoutingResult(v, F.lengths(v), c)


def uniform_routing(
    votes: Float[Tensor, "*batch in out dim"], *, squash: Callable[[Tensor], Tensor] = F.squash
) -> RoutingResult:
    """All couplings 1 / out: the control that every routing needs (Paik et al. 2019, arXiv 1907.13327).

    With `functional.squash` it is `dynamic_routing` of one iteration.

    Args:
        votes: `u_hat_{j|i} = W_ij u_i`.
        squash: that of the routing it stands beside.

    Returns:
        Pose, activation (its lengths) and couplings.

    Raises:
        InputError: votes with fewer than 3 axes.
    """
    _check_votes(votes)
    with F.full_precision(votes.device):
        u_hat = F.at_least_float32(votes)
        c = torch.full_like(u_hat[..., 0], 1 / u_hat.shape[-2])
        v = squash(u_hat.sum(-3) / u_hat.shape[-2])
        return RoutingResult(v, F.lengths(v), c)


def self_routing(
    votes: Float[Tensor, "*batch in out dim"] | None,
    activation: Float[Tensor, "*batch in"],
    logits: Float[Tensor, "*batch in out"],
) -> RoutingResult:
    """Self-routing (Hahn, Pyeon, Kim, "Self-Routing Capsule Networks", NeurIPS 2019): no agreement, no iteration.

    Each input capsule has a gate, whose logits follow from its own pose: `c_ij = softmax_j logits_ij`. Then
    `a_j = sum_i a_i c_ij / sum_i a_i` and `v_j = sum_i a_i c_ij u_hat_ij / sum_i a_i c_ij`, a mean of the votes. The
    authors' code divides by sums that may be 0; here activations that are all 0 give zeros. Computed in float32
    whatever the precision around it.

    Args:
        votes: `u_hat_{j|i} = W_ij u_i`; None for output capsules without a pose, whose vectors then have one component,
            the activation.
        activation: of the input capsules, at least 0.
        logits: of their gates, `(G_i u_i + g_i)_j`.

    Returns:
        Pose, activation (which sums to 1 over the output capsules) and couplings, whose rows sum to 1.

    Raises:
        InputError: logits or an activation of other shapes than the votes'.

    Example:
        >>> self_routing(torch.randn(2, 32, 10, 16), torch.rand(2, 32), torch.randn(2, 32, 10)).pose.shape
        torch.Size([2, 10, 16])
    """
    if logits.ndim < 2 or activation.shape != logits.shape[:-1]:
        raise InputError(
            f"activation must have the shape of the logits [..., in, out] without out, {tuple(logits.shape[:-1])}; "
            f"got {tuple(activation.shape)}"
        )
    if votes is not None and votes.shape[:-1] != logits.shape:
        raise InputError(
            f"votes must be [..., in, out, dim] with logits of {tuple(logits.shape)}; got {tuple(votes.shape)}"
        )
    with F.full_precision(logits.device):
        c = F.at_least_float32(logits).softmax(-1)
        a_in = F.at_least_float32(activation)
        a = torch.einsum("...i,...ij->...j", a_in, c) / _divisor(a_in.sum(-1, keepdim=True))
        if votes is None:
            return RoutingResult(a[..., None], a, c)
        sent = a_in[..., None] * c
        shares = sent / _divisor(sent.sum(-2, keepdim=True))
        return RoutingResult(_weighted_sum(shares, F.at_least_float32(votes)), a, c)


def inverted_attention_step(
    votes: Float[Tensor, "*batch in out dim"],
    pose: Float[Tensor, "*batch out dim"] | None = None,
    *,
    scale: Float[Tensor, "dim"] | None = None,
    offset: Float[Tensor, "dim"] | None = None,
) -> RoutingResult:
    """One iteration of inverted dot-product attention (Tsai et al., ICLR 2020, arXiv 2002.04764, Algorithm 1).

    The output capsules compete for each input capsule by how well its votes agree with their poses so far:
    `c_ij = softmax_j(u_hat_ij . v_j / sqrt(dim))`, and `v_j = LayerNorm(sum_i c_ij u_hat_ij)`. In the first iteration
    there are no poses, and all couplings are 1 / out. Computed in float32 whatever the precision around it.

    Args:
        votes: `u_hat_ij`.
        pose: of the output capsules after the iteration before; None in the first one.
        scale: of the layer normalisation, over the components of a pose; None for 1.
        offset: of the same; None for 0.

    Returns:
        Pose (at scale 1 and offset 0 of mean 0 and length `sqrt(dim)`), activation (1: the capsules have none) and
        couplings, whose rows sum to 1.

    Raises:
        InputError: votes with fewer than 3 axes.
    """
    _check_votes(votes)
    with F.full_precision(votes.device):
        u_hat = F.at_least_float32(votes)
        if pose is None:
            c, s = torch.full_like(u_hat[..., 0], 1 / u_hat.shape[-2]), u_hat.sum(-3) / u_hat.shape[-2]
        else:
            logits = torch.einsum("...ijd,...jd->...ij", u_hat, F.at_least_float32(pose))
            c = (logits / math.sqrt(u_hat.shape[-1])).softmax(-1)
            s = _weighted_sum(c, u_hat)
        v = nn.functional.layer_norm(s, s.shape[-1:], scale, offset)
        return RoutingResult(v, torch.ones_like(v[..., 0]), c)


def inverted_attention_routing(
    votes: Float[Tensor, "*batch in out dim"],
    *,
    iterations: int = 2,
    scale: Float[Tensor, "dim"] | None = None,
    offset: Float[Tensor, "dim"] | None = None,
) -> RoutingResult:
    """Inverted dot-product attention: `iterations` of `inverted_attention_step` on the same votes.

    Raises:
        InputError: votes with fewer than 3 axes, or iterations that are not 1 to 100.

    Example:
        >>> inverted_attention_routing(torch.randn(2, 800, 10, 16)).pose.shape
        torch.Size([2, 10, 16])
    """
    check_iterations(iterations)
    result = inverted_attention_step(votes, scale=scale, offset=offset)
    for _ in range(iterations - 1):
        result = inverted_attention_step(votes, result.pose, scale=scale, offset=offset)
    return result


def couplings_of(
    logits: Float[Tensor, "..."], *, leaky: bool = False, dim: int = -1, normalization: Normalization = "softmax"
) -> Float[Tensor, "..."]:
    """Coupling coefficients: the softmax of the logits over the output capsules (eq. 3), or their max-min scaling.

    Args:
        logits: `b`, with the output capsules on axis `dim`.
        leaky: share the softmax with one more slot, of logit zero, that is then dropped.
        dim: the axis of the output capsules.
        normalization: `max-min` brings each input capsule's logits to 0 ... 1: `(b - min b) / (max b - min b)`, and 1
            where all are equal, as at the first iteration (Zhao et al. 2019, arXiv 1903.09662).

    Returns:
        `c` of the logits' shape, at least 0, summing to 1 over `dim` (to less than 1 if `leaky`); with `max-min` each
        in [0, 1], and they sum to 1 or more.

    Raises:
        InputError: `leaky` with `max-min`.
    """
    if normalization == "max-min":
        if leaky:
            raise InputError("leaky must be off with couplings by max-min, which have no softmax to share; got it on")
        low, high = logits.amin(dim, keepdim=True), logits.amax(dim, keepdim=True)
        spread = high - low
        equal = spread == 0
        return torch.where(equal, 1.0, (logits - low) / torch.where(equal, 1.0, spread))
    if not leaky:
        return logits.softmax(dim)
    none_of_the_above = torch.zeros_like(logits.narrow(dim, 0, 1))
    return torch.cat([none_of_the_above, logits], dim).softmax(dim).narrow(dim, 1, logits.shape[dim])


def check_iterations(iterations: int) -> None:
    """Raise InputError unless there are 1 to `MOST_ITERATIONS` routing iterations."""
    if not 1 <= iterations <= MOST_ITERATIONS:
        rule = "least 1" if iterations < 1 else f"most {MOST_ITERATIONS}"
        raise InputError(f"routing iterations must be at {rule}; got {shown(iterations)}")


def _check_votes(votes: Tensor) -> None:
    if votes.ndim < 3:
        raise InputError(f"votes must be [..., in, out, dim] with at least 3 axes; got shape {tuple(votes.shape)}")


def _divisor(total: Tensor) -> Tensor:
    """A total of parts to divide them by; 1 in place of next to nothing, of which gradients would overflow."""
    return torch.where(total > 2.0**-60, total, 1.0)


def _weighted_sum(c: Tensor, u_hat: Tensor) -> Tensor:
    return torch.einsum("...ij,...ijd->...jd", c, u_hat)
