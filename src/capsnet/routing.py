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
    "em_routing",
    "inverted_attention_routing",
    "inverted_attention_step",
    "over_outputs",
    "over_parents",
    "self_routing",
    "uniform_routing",
    "vb_routing",
]

Normalization = Literal["softmax", "max-min"]
"""How logits become couplings, see `couplings_of`."""

VARIANCE_GUARD = 5e-4
"""Added to the variances of `em_routing` (authors' code)."""
LEAST_MASS = 1e-7
"""Sum of couplings times activations that a parent has at least where something is divided by it (authors' code)."""
MOST_ITERATIONS = 100
"""The paper tries up to 10, by which the couplings have settled; each costs the same time and memory again."""


class RoutingResult(NamedTuple):
    """What every routing algorithm returns.

    Attributes:
        pose: `v`, the output capsules' vectors, `[*batch, out, dim]`.
        activation: presence of each output capsule, `[*batch, out]`, in [0, 1].
        couplings: `c` of the last iteration, `[*batch, in, out]`; what each input capsule's row sums to over the
            output capsules is said by the function: 1 in `dynamic_routing` (less with a leaky slot, more with max-min).

    Examples:
        >>> pose, activation, couplings = dynamic_routing(torch.randn(2, 1152, 10, 16))
        >>> activation.shape, couplings.shape
        (torch.Size([2, 10]), torch.Size([2, 1152, 10]))
    """

    pose: Tensor
    activation: Tensor
    couplings: Tensor


def over_outputs(logits: Float[Tensor, "*batch in out"]) -> Float[Tensor, "*batch in out"]:
    """Log-softmax over the output capsules: logarithms of couplings where every capsule votes for every other.

    Examples:
        >>> over_outputs(torch.zeros(1, 3, 4)).exp()[0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return logits.log_softmax(-1)


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

    Examples:
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

    Examples:
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


def em_routing(
    votes: Float[Tensor, "*batch in out dim"],
    activation: Float[Tensor, "*batch in"],
    beta_u: Float[Tensor, "out"],
    beta_a: Float[Tensor, "out"],
    *,
    iterations: int = 3,
    final_lambda: float = 0.01,
    cost: Literal["paper", "google"] = "paper",
    log_couplings: Callable[[Tensor], Tensor] = over_outputs,
    variance_guard: float = VARIANCE_GUARD,
) -> RoutingResult:
    """EM routing: each output capsule is a Gaussian of the votes for it (Hinton, Sabour, Frosst 2018, Procedure 1).

    Starting with couplings `R_ij` of 1 over the number of parents of capsule i, `iterations` M steps and one E step
    less, with gradients through all of them, and `lambda_t = final_lambda (1 - 0.95^(t + 1))`, t from 0.

    M step: `r_ij = R_ij a_i`; mean `mu_j` and variance `var_jh` of the votes weighted by `r_ij`; `m_j = sum_i r_ij`;
    `cost_j = m_j sum_h (beta_u_j + log(var_jh) / 2)`; `a_j = sigmoid(lambda_t (beta_a_j - cost_j))`.
    E step: `R_ij` is the softmax, over the parents of i, of `log a_j + log N(V_ij; mu_j, var_j)`.

    Computed in float32 or better whatever the precision around it. `variance_guard` is added to each variance, as
    votes that agree have a cost without bound else; and no parent has a mass `m_j` below 1e-7.

    Args:
        votes: `V_ij`, such as `functional.matrix_votes`.
        activation: `a_i`, in [0, 1].
        beta_u: cost of each component of a pose per child.
        beta_a: cost below which a parent is more active than not.
        iterations: T.
        final_lambda: the inverse temperature that the sequence tends to.
        cost: `google` is what the authors' published code computes (google-research, capsule_em): `beta_u` and `beta_a`
            are its parameters s and alpha, for `(log(2 pi) + 1) s / 2` and `-2500 alpha` above; lambda is twice the
            one above; and each mean is 0.9 of the new one and 0.1 of the former, of which the first is 0.
        log_couplings: from `[*batch, in, out]` to the logarithms of the couplings; the log-softmax over the output
            capsules, or for convolutional capsules `over_parents`. That of zeros starts the routing.
        variance_guard: at least 0 (5e-4 in the authors' code).

    Returns:
        Pose `mu_j`, activation `a_j` in [0, 1], and the couplings of the last M step, whose rows sum to 1 over the
            parents of a capsule.

    Raises:
        InputError: votes with fewer than 3 axes, or iterations that are not 1 to 100.

    Examples:
        >>> em_routing(torch.randn(2, 144, 10, 16), torch.rand(2, 144), torch.zeros(10), torch.zeros(10)).pose.shape
        torch.Size([2, 10, 16])
    """
    check_iterations(iterations)
    _check_votes(votes)
    with F.full_precision(votes.device):
        v = F.at_least_float32(votes).transpose(-3, -2).contiguous()  # [..., out, in, dim]
        a, beta_u, beta_a = (x.to(v.dtype) for x in (activation, beta_u, beta_a))
        momentum = 0.0
        if cost == "google":
            beta_u, beta_a = (math.log(2 * math.pi) + 1) / 2 * beta_u, -2500 * beta_a
            final_lambda, momentum = 2 * final_lambda, 0.1
        log_r = log_couplings(v.new_zeros(v.shape[:-1]).transpose(-2, -1))
        mean = None
        for t in range(iterations):
            r = (log_r.exp() * a[..., None]).transpose(-2, -1)  # [..., out, in]
            mean, squares, variance, cost_j = _m_step(v, r, mean, beta_u, momentum=momentum, guard=variance_guard)
            x = final_lambda * (1 - 0.95 ** (t + 1)) * (beta_a - cost_j)
            if t < iterations - 1:
                log_r = log_couplings(_e_step(x, squares, variance).transpose(-2, -1))
        assert mean is not None
        return RoutingResult(mean.squeeze(-2), x.sigmoid(), log_r.exp())


def _m_step(
    v: Tensor, r: Tensor, former: Tensor | None, beta_u: Tensor, *, momentum: float, guard: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, squared distances from them, variances, and costs of the parents, for `v [..., out, in, dim]`."""
    mass = r.sum(-1).clamp(min=LEAST_MASS)  # [..., out]
    shares = (r / mass[..., None])[..., None, :]  # [..., out, 1, in]
    mean = shares @ v  # [..., out, 1, dim]
    if momentum:
        mean = (1 - momentum) * mean + (0 if former is None else momentum * former)
    squares = (v - mean).square()
    variance = shares @ squares + guard
    cost = mass * (beta_u[:, None] + variance.squeeze(-2).log() / 2).sum(-1)
    return mean, squares, variance, cost


def _e_step(x: Tensor, squares: Tensor, variance: Tensor) -> Tensor:
    """Logits of the couplings `[..., out, in]`: `log a_j + log N(V_ij; mu_j, var_j)`."""
    distance = (squares @ variance.reciprocal().transpose(-2, -1)).squeeze(-1)
    normalizer = nn.functional.logsigmoid(x) - (2 * math.pi * variance.squeeze(-2)).log().sum(-1) / 2
    return normalizer[..., None] - distance / 2


def over_parents(
    logits: Float[Tensor, "batch places seen out"],
    *,
    types: int,
    in_size: tuple[int, int],
    kernel_size: int,
    stride: int,
) -> Float[Tensor, "batch places seen out"]:
    """Log-softmax of the logits of convolutional capsules: over all parents of a child, their types and positions.

    In the published code of EM routing each type of parent is normalised alone, and children are not found again at
    other strides than 1; Gritzman 2019 (arXiv 1907.00652) has the competition as here.

    Args:
        logits: of each place of the output, row by row: what it sees, row by row of its window, `types` capsules each;
            by types of parents.
        types: of the children.
        in_size: rows and columns of the grid of children.
        kernel_size: rows and columns of a window.
        stride: between windows.

    Returns:
        Logarithms of the couplings; those of a child that k places see are in k rows, and sum to 1 over these.

    Examples:
        >>> logits = torch.zeros(1, 4, 9, 5)  # 2 x 2 places with 5 types each see 3 x 3 of 4 x 4 children
        >>> couplings = over_parents(logits, types=1, in_size=(4, 4), kernel_size=3, stride=1).exp()
        >>> couplings[0, 0, 0, 0], couplings[0, 0, 8, 0]  # a child in the corner has 5 parents, one in the middle 20
        (tensor(0.2000), tensor(0.0500))
    """
    rows, columns = (_windows_of(size, kernel_size, stride, logits.device) for size in in_size)
    across = (in_size[1] - kernel_size) // stride + 1
    place = rows.place[:, None, :, None] * across + columns.place[:, None]  # [rows, columns, n, n]
    offset = rows.offset[:, None, :, None] * kernel_size + columns.offset[:, None]
    seen = (rows.inside[:, None, :, None] & columns.inside[:, None]).flatten(0, 1).flatten(1)  # [children, n * n]
    windows = torch.where(seen, (place * kernel_size**2 + offset).flatten(0, 1).flatten(1), 0)
    of_place = logits.logsumexp(-1).reshape(logits.shape[0], -1, types)  # [batch, windows, types]
    lowest = torch.finfo(logits.dtype).min
    found = of_place.index_select(1, windows.flatten()).reshape(logits.shape[0], *windows.shape, types)
    of_child = found.masked_fill(~seen[..., None], lowest).logsumexp(2)  # [batch, children, types]
    total = of_child.index_select(1, _children(in_size, kernel_size, stride, logits.device))
    log_couplings: Tensor = logits - total.reshape(*logits.shape[:-1], 1)
    return log_couplings


class _Windows(NamedTuple):
    """Along one axis, of each child the places that may see it, its offset there, and whether they do: `[size, n]`."""

    place: Tensor
    offset: Tensor
    inside: Tensor


def _windows_of(size: int, kernel_size: int, stride: int, device: torch.device) -> _Windows:
    child = torch.arange(size, device=device)[:, None]
    place = child // stride - torch.arange(-(-kernel_size // stride), device=device)
    offset = child - place * stride
    inside = (place >= 0) & (place <= (size - kernel_size) // stride) & (offset < kernel_size)
    return _Windows(place, offset, inside)


def _children(in_size: tuple[int, int], kernel_size: int, stride: int, device: torch.device) -> Tensor:
    """The place in its grid of what each window sees, row by row: `[places * kernel_size^2]`."""
    rows, columns = (
        torch.arange((size - kernel_size) // stride + 1, device=device)[:, None] * stride
        + torch.arange(kernel_size, device=device)
        for size in in_size
    )
    return (rows[:, None, :, None] * in_size[1] + columns[:, None]).flatten()


def vb_routing(
    votes: Float[Tensor, "*batch in out dim"],
    activation: Float[Tensor, "*batch in"],
    beta_u: Float[Tensor, "out"] | None = None,
    beta_a: Float[Tensor, "out"] | None = None,
    *,
    iterations: int = 3,
    log_couplings: Callable[[Tensor], Tensor] = over_outputs,
    before_sigmoid: bool = False,
) -> RoutingResult:
    """Variational Bayes routing (De Sousa Ribeiro, Leontidis, Kollias 2020, arXiv 1905.11455): EM with priors.

    The parameters of each output capsule's Gaussian, of diagonal precision, have distributions: Dirichlet `alpha0 = 1`,
    normal `m0 = 0`, `kappa0 = 1`, Wishart `Psi0 = I`, `nu0 = dim + 1`, which bound all that has to be guarded in
    `em_routing`. Couplings `R_ij` start as 1 / out; `iterations` updates of the posteriors and one less of the
    couplings. With `r_ij = R_ij a_i`, `M_j = sum_i r_ij` and `x_j` the mean of the votes weighted by `r_ij`:

    `alpha_j = 1 + M_j`, `kappa_j = 1 + M_j`, `nu_j = dim + 1 + M_j`, `m_j = M_j x_j / kappa_j`,
    `S_jh = 1 + sum_i r_ij (V_ijh - x_jh)^2 + (M_j / kappa_j) x_jh^2`,
    `ln pi_j = psi(alpha_j) - psi(sum_j alpha_j)`,
    `ln L_j = sum_d psi((nu_j - d) / 2) + dim log 2 - sum_h log S_jh`, d from 0, and the couplings are the softmax of
    `ln pi_j + ln L_j / 2 - dim log(2 pi) / 2 - [dim / kappa_j + nu_j sum_h (V_ijh - m_jh)^2 / S_jh] / 2`.

    Computed in float32 or better whatever the precision around it.

    Args:
        votes: `V_ij`, such as `functional.matrix_votes`.
        activation: `a_i`, in [0, 1].
        beta_u: offset of the activations; 0 if not given.
        beta_a: the same with the other sign.
        iterations: T.
        log_couplings: as of `em_routing`. The sum over j in `ln pi_j` is over the last axis alone, the types of
            capsules of one place.
        before_sigmoid: return the argument of the sigmoid as the activation, any number, which a layer may normalise,
            as the paper's network does over the batch.

    Returns:
        Pose `m_j`; activation, in [0, 1], `sigmoid(beta_a_j - exp(ln pi_j) H_j - beta_u_j)` with the entropy `H_j =
            dim log(2 pi e) / 2 - ln L_j / 2`; and the couplings of the last update of the posteriors, whose rows sum to
            1 over the parents of a capsule, but for convolutional capsules with one iteration.

    Raises:
        InputError: votes with fewer than 3 axes, or iterations that are not 1 to 100.

    Examples:
        >>> vb_routing(torch.randn(2, 144, 10, 16), torch.rand(2, 144)).pose.shape
        torch.Size([2, 10, 16])
    """
    check_iterations(iterations)
    _check_votes(votes)
    with F.full_precision(votes.device):
        v = F.at_least_float32(votes).transpose(-3, -2).contiguous()  # [..., out, in, dim]
        a, dim = activation.to(v.dtype), v.shape[-1]
        log_r = v.new_full(v.shape[:-1], -math.log(v.shape[-3])).transpose(-2, -1)
        for t in range(iterations):
            r = (log_r.exp() * a[..., None]).transpose(-2, -1)[..., None, :]  # [..., out, 1, in]
            mass = r.sum(-1, keepdim=True)  # [..., out, 1, 1]
            total = r @ v  # [..., out, 1, dim]
            x, kappa, nu = total / mass.clamp(min=LEAST_MASS), 1 + mass, dim + 1 + mass
            m = total / kappa
            scale = 1 + r @ (v - x).square() + mass / kappa * x.square()
            alpha = 1 + mass[..., 0, 0]
            log_pi = _digamma(alpha) - _digamma(alpha.sum(-1, keepdim=True))  # [..., out]
            below = torch.arange(dim, device=v.device)
            log_det = _digamma((nu - below) / 2).sum((-2, -1)) + dim * math.log(2) - scale.log().sum((-2, -1))
            if t < iterations - 1:
                distance = ((v - m).square() @ (nu / scale).transpose(-2, -1)).squeeze(-1)
                constant = log_pi + (log_det - dim * math.log(2 * math.pi) - dim / kappa[..., 0, 0]) / 2
                log_r = log_couplings((constant[..., None] - distance / 2).transpose(-2, -1))
        entropy = (dim * math.log(2 * math.pi * math.e) - log_det) / 2
        evidence = -log_pi.exp() * entropy
        if beta_a is not None:
            evidence = evidence + beta_a.to(v.dtype)
        if beta_u is not None:
            evidence = evidence - beta_u.to(v.dtype)
        return RoutingResult(m.squeeze(-2), evidence if before_sigmoid else evidence.sigmoid(), log_r.exp())


def _digamma(x: Tensor) -> Tensor:
    """`psi(x)` for x of at least 1, to 2e-12: `torch.digamma` has no counterpart in ONNX."""
    below = (x[..., None] + torch.arange(6, device=x.device)).reciprocal().sum(-1)  # psi(x + 6) - psi(x)
    x = x + 6
    y = x.square().reciprocal()
    series = y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))
    return x.log() - 0.5 / x - series - below


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

    Examples:
        >>> votes = torch.randn(2, 1152, 10, 16)
        >>> torch.allclose(uniform_routing(votes).pose, dynamic_routing(votes, iterations=1).pose, atol=1e-5)
        True
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

    Examples:
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

    Examples:
        >>> votes = torch.randn(2, 800, 10, 16)
        >>> first = inverted_attention_step(votes)
        >>> inverted_attention_step(votes, first.pose).couplings.shape
        torch.Size([2, 800, 10])
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

    Examples:
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

    Examples:
        >>> couplings_of(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
        >>> couplings_of(torch.tensor([0.0, 0.0]), leaky=True)  # a third goes nowhere
        tensor([0.3333, 0.3333])
        >>> couplings_of(torch.tensor([1.0, 2.0, 3.0]), normalization="max-min")
        tensor([0.0000, 0.5000, 1.0000])
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
    """Raise InputError unless there are 1 to `MOST_ITERATIONS` routing iterations.

    Examples:
        >>> check_iterations(0)
        Traceback (most recent call last):
            ...
        capsnet.errors.InputError: routing iterations must be at least 1; got 0
    """
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
