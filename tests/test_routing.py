"""Every implementation of dynamic routing goes through the same tests; a new one is an entry of IMPLEMENTATIONS."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsnet import functional as F
from capsnet import reference, routing
from capsnet.errors import InputError
from capsnet.functional import votes
from capsnet.kernels import sweeps_cpu
from capsnet.kernels.fused import votes_and_routing
from capsnet.routing import RoutingResult, check_iterations, couplings_of, dynamic_routing

Routing = Callable[..., RoutingResult]


def plain(u: Tensor, weight: Tensor, **options: object) -> RoutingResult:
    return dynamic_routing(votes(u, weight), **options)  # type: ignore[arg-type]


IMPLEMENTATIONS: dict[str, Routing] = {"plain": plain, "fused": partial(votes_and_routing, sweeps_cpu.Sweeps)}
BATCH, INS, IN_DIM, OUTS, DIM = 2, 7, 3, 5, 4

every_routing = pytest.mark.parametrize("route", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
every_r = pytest.mark.parametrize("r", [1, 2, 3, 5])
leaky_or_not = pytest.mark.parametrize("leaky", [False, True], ids=["softmax", "leaky"])
biased_or_not = pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def inputs(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Poses, weights and biases whose couplings end far from uniform."""
    shapes = (*(leading or (BATCH,)), INS, IN_DIM), (INS, IN_DIM, OUTS, DIM), (OUTS, DIM)
    u, weight, bias = (random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    return u, weight, bias * 0.3


def by_votes(route: Routing, u_hat: Tensor, **options: object) -> RoutingResult:
    """Route given votes `[batch, in, out, dim]` by any implementation, one example at a time: u = 1 and W = votes."""
    ones = u_hat.new_ones(u_hat.shape[1], 1)
    results = [route(ones, example[:, None], **options) for example in u_hat]
    return RoutingResult(*(torch.stack(part) for part in zip(*results, strict=True)))


# golden


@every_routing
@every_r
@leaky_or_not
@biased_or_not
def test_routing_equals_the_reference(route: Routing, r: int, leaky: bool, biased: bool) -> None:
    u, weight, bias = inputs()
    result = route(u, weight, iterations=r, bias=bias if biased else None, leaky=leaky)
    assert result.pose.shape == (BATCH, OUTS, DIM)
    assert result.couplings.shape == (BATCH, INS, OUTS)
    for k in range(BATCH):
        u_hat = reference.votes(u[k].numpy(), weight.numpy())
        v, c = reference.dynamic_routing(u_hat, r, bias.numpy() if biased else None, leaky)
        np.testing.assert_allclose(result.pose[k], v, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(result.couplings[k], c, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(result.activation[k], np.linalg.norm(v, axis=-1), rtol=1e-12)
    if r > 1:
        assert float(result.couplings.max()) > 2 / OUTS, "couplings near uniform would hide mistakes"


def test_votes_equal_the_reference() -> None:
    u, weight, _ = inputs()
    golden = [reference.votes(example.numpy(), weight.numpy()) for example in u]
    np.testing.assert_allclose(votes(u, weight), golden, rtol=1e-12, atol=1e-13)


@every_routing
def test_float32_is_as_near_to_the_reference_as_measured(route: Routing) -> None:
    """At the paper's size the RMS ratio was measured as 2e-7 to 6e-7; here as 1e-7."""
    u, weight, bias = inputs(dtype=torch.float32)
    result = route(u, weight, iterations=3, bias=bias)
    exact = plain(u.double(), weight.double(), iterations=3, bias=bias.double())
    assert result.pose.dtype == torch.float32
    ratio = (result.pose - exact.pose).square().mean().sqrt() / exact.pose.square().mean().sqrt()
    assert float(ratio) < 1e-6


# properties


@every_routing
@settings(deadline=None, max_examples=25)
@given(
    r=st.integers(1, 6),
    ins=st.integers(1, 11),
    outs=st.integers(1, 7),
    dim=st.integers(1, 5),
    scale=st.floats(0, 30),
    leaky=st.booleans(),
    seed=st.integers(0, 99),
)
def test_couplings_share_out_each_input_capsule(
    route: Routing, r: int, ins: int, outs: int, dim: int, scale: float, leaky: bool, seed: int
) -> None:
    u_hat = random(1, ins, outs, dim, seed=seed) * scale
    result = by_votes(route, u_hat, iterations=r, leaky=leaky)
    c, total = result.couplings, result.couplings.sum(-1)
    assert (c >= 0).all()
    if leaky:
        assert (total <= 1 + 1e-12).all()
        assert scale > 1 or r > 3 or (total < 1).all()  # where logits are large, the last slot's share rounds to zero
    else:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert (result.activation < 1).all()
    torch.testing.assert_close(result.activation, F.lengths(result.pose))


@every_routing
@every_r
@leaky_or_not
@biased_or_not
def test_the_order_of_the_input_capsules_does_not_matter(route: Routing, r: int, leaky: bool, biased: bool) -> None:
    u, weight, bias = inputs()
    options = {"iterations": r, "leaky": leaky, "bias": bias if biased else None}
    order = torch.from_numpy(np.random.default_rng(3).permutation(INS))
    straight, shuffled = route(u, weight, **options), route(u[:, order], weight[order], **options)
    torch.testing.assert_close(shuffled.pose, straight.pose, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(shuffled.couplings, straight.couplings[:, order], rtol=1e-12, atol=1e-13)


@every_routing
@every_r
@leaky_or_not
@biased_or_not
def test_the_result_follows_the_order_of_the_output_capsules(route: Routing, r: int, leaky: bool, biased: bool) -> None:
    u, weight, bias = inputs()
    order = torch.from_numpy(np.random.default_rng(3).permutation(OUTS))
    straight = route(u, weight, iterations=r, leaky=leaky, bias=bias if biased else None)
    shuffled = route(u, weight[:, :, order], iterations=r, leaky=leaky, bias=bias[order] if biased else None)
    torch.testing.assert_close(shuffled.pose, straight.pose[:, order], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(shuffled.couplings, straight.couplings[..., order], rtol=1e-12, atol=1e-13)


@every_routing
@every_r
@leaky_or_not
def test_the_result_turns_with_the_votes(route: Routing, r: int, leaky: bool) -> None:
    u, weight, _ = inputs()
    rotation = torch.linalg.qr(random(DIM, DIM, seed=9))[0]
    straight = route(u, weight, iterations=r, leaky=leaky)
    turned = route(u, weight @ rotation, iterations=r, leaky=leaky)
    torch.testing.assert_close(turned.pose, straight.pose @ rotation, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(turned.couplings, straight.couplings, rtol=1e-11, atol=1e-12)


@every_routing
@every_r
@leaky_or_not
@biased_or_not
def test_an_example_does_not_see_its_batch(route: Routing, r: int, leaky: bool, biased: bool) -> None:
    u, weight, bias = inputs(3)
    options = {"iterations": r, "leaky": leaky, "bias": bias if biased else None}
    together = route(u, weight, **options)
    for k in range(3):
        alone = route(u[k], weight, **options)
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part, whole[k], rtol=1e-12, atol=1e-13)


@every_routing
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_leading_axes_are_free(route: Routing, leading: tuple[int, ...]) -> None:
    _, weight, bias = inputs()
    u = random(*leading, INS, IN_DIM, seed=8)
    result = route(u, weight, iterations=3, bias=bias)
    flat = route(u.reshape(-1, INS, IN_DIM), weight, iterations=3, bias=bias)
    assert result.pose.shape == (*leading, OUTS, DIM)
    assert result.activation.shape == (*leading, OUTS)
    assert result.couplings.shape == (*leading, INS, OUTS)
    for part, whole in zip(result, flat, strict=True):
        torch.testing.assert_close(part.reshape(whole.shape), whole, rtol=1e-12, atol=1e-13)


@every_routing
@leaky_or_not
@biased_or_not
def test_one_iteration_is_the_squash_of_a_plain_mean(route: Routing, leaky: bool, biased: bool) -> None:
    u, weight, bias = inputs()
    result = route(u, weight, iterations=1, leaky=leaky, bias=bias if biased else None)
    share = 1 / (OUTS + leaky)
    s = votes(u, weight).sum(1) * share + (bias if biased else 0)
    torch.testing.assert_close(result.pose, F.squash(s), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.couplings, torch.full_like(result.couplings, share))


@every_routing
@every_r
@leaky_or_not
def test_zero_votes_give_zero_and_uniform_couplings(route: Routing, r: int, leaky: bool) -> None:
    _, weight, _ = inputs()
    result = route(torch.zeros(BATCH, INS, IN_DIM, dtype=torch.float64), weight, iterations=r, leaky=leaky)
    assert not result.pose.any()
    assert not result.activation.any()
    torch.testing.assert_close(result.couplings, torch.full_like(result.couplings, 1 / (OUTS + leaky)))


@every_routing
@leaky_or_not
def test_a_capsule_whose_votes_agree_gains_coupling(route: Routing, leaky: bool) -> None:
    u_hat = torch.zeros(1, 8, 3, 2, dtype=torch.float64)
    u_hat[:, :, 0, 0] = 1  # all votes for capsule 0 are one vector
    u_hat[:, :4, 1, 0], u_hat[:, 4:, 1, 0] = 1, -1  # those for capsule 1 are as long and cancel
    shares = [by_votes(route, u_hat, iterations=r, leaky=leaky).couplings[0, :, 0] for r in (1, 2, 3)]
    assert (shares[0] < shares[1]).all()
    assert (shares[1] < shares[2]).all()


@every_routing
def test_an_outlier_loses_coupling(route: Routing) -> None:
    u_hat = torch.zeros(1, 5, 2, 3, dtype=torch.float64)
    u_hat[:, :, 0, 0] = 1
    u_hat[:, 4, 0, 0] = -1  # the last capsule votes against the other four
    couplings = by_votes(route, u_hat, iterations=3).couplings[0, :, 0]
    assert couplings[4] < 0.5 < couplings[:4].min()


# gradients


@every_routing
@every_r
@leaky_or_not
@biased_or_not
def test_the_gradient_is_right(route: Routing, r: int, leaky: bool, biased: bool) -> None:
    u, weight, bias = random(2, 3, 2), random(3, 2, 5, 2, seed=1), random(5, 2, seed=2)

    def function(u: Tensor, weight: Tensor, bias: Tensor) -> RoutingResult:
        return route(u, weight, iterations=r, leaky=leaky, bias=bias if biased else None)

    arguments = [x.requires_grad_() for x in (u, weight, bias)]
    if not biased:
        arguments[2] = bias.detach()
    assert torch.autograd.gradcheck(function, arguments)


@every_routing
@pytest.mark.parametrize("r", [1, 3])
@leaky_or_not
def test_the_gradient_is_right_at_zero_votes(route: Routing, r: int, leaky: bool) -> None:
    """Pose and couplings only: a length has a corner at zero, where its gradient is defined as zero."""
    u, weight = torch.zeros(2, 3, 2, dtype=torch.float64), random(3, 2, 5, 2, seed=1)

    def function(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        result = route(u, weight, iterations=r, leaky=leaky)
        return result.pose, result.couplings

    assert torch.autograd.gradcheck(function, [u.requires_grad_(), weight.requires_grad_()])
    zero = torch.zeros(2, 3, 2, requires_grad=True)
    torch.autograd.backward(route(zero, weight.detach().float(), iterations=r, leaky=leaky).activation.sum())
    assert zero.grad is not None
    assert not zero.grad.any()


@every_routing
@pytest.mark.parametrize("r", [2, 3])
@leaky_or_not
@biased_or_not
def test_detached_routing_differentiates_the_last_weighted_sum_only(
    route: Routing, r: int, leaky: bool, biased: bool
) -> None:
    given_inputs = inputs()
    direction = random(BATCH, OUTS, DIM, seed=5)
    options = {"iterations": r, "leaky": leaky}

    def gradients(function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given_inputs[: 2 + biased]]
        pose = function(leaves[0], leaves[1], leaves[2] if biased else None)
        return list(torch.autograd.grad((pose * direction).sum(), leaves))

    u, weight, bias = given_inputs
    whole = route(u, weight, bias=bias if biased else None, **options)
    detached = route(u, weight, bias=bias if biased else None, detach_routing=True, **options)
    assert torch.equal(detached.pose, whole.pose)
    assert torch.equal(detached.couplings, whole.couplings)

    def held(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        s = torch.einsum("bij,bip,ipjd->bjd", whole.couplings, u, weight)
        return F.squash(s if bias is None else s + bias)

    by_hand = gradients(held)
    ours = gradients(lambda u, w, b: route(u, w, bias=b, detach_routing=True, **options).pose)
    attached = gradients(lambda u, w, b: route(u, w, bias=b, **options).pose)
    for name, one, expected, full in zip(("u", "weight", "bias"), ours, by_hand, attached, strict=False):
        torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-12, msg=name)
        assert float((one - full).norm() / full.norm()) > 0.01, name


@every_routing
def test_detached_couplings_carry_no_gradient(route: Routing) -> None:
    u, weight, _ = inputs()
    result = route(u.requires_grad_(), weight, iterations=3, detach_routing=True)
    gradient: Tensor | None = None
    if result.couplings.requires_grad:
        (gradient,) = torch.autograd.grad(result.couplings.square().sum(), u, allow_unused=True)
    assert gradient is None or not gradient.any()


# precision


@every_routing
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 200.0])
def test_half_precision_votes_are_routed_in_float32(route: Routing, dtype: torch.dtype, size: float) -> None:
    u, weight, _ = inputs()
    if route is plain:  # the plain version takes votes, the others the poses
        half = votes(u * size, weight).to(dtype).requires_grad_()
        result = dynamic_routing(half)
        exact = dynamic_routing(half.detach().double())
    else:
        half = (u * size).to(dtype).requires_grad_()
        result = route(half, weight.float())
        exact = route(half.detach().double(), weight.float().double())
    torch.autograd.backward(result.pose.sum())
    assert half.grad is not None
    assert half.grad.isfinite().all()
    assert half.grad.dtype == dtype
    for part, right in zip(result, exact, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, right.float(), rtol=1e-4, atol=1e-5)


@every_routing
def test_routing_stays_float32_under_autocast(route: Routing) -> None:
    u, weight, bias = inputs(dtype=torch.float32)
    u_hat = votes(u, weight)
    outside = dynamic_routing(u_hat, bias=bias) if route is plain else route(u, weight, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dynamic_routing(u_hat, bias=bias) if route is plain else route(u, weight, bias=bias)
    for part, expected in zip(inside, outside, strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, expected)


def test_double_precision_stays_double() -> None:
    u, weight, _ = inputs()
    for route in IMPLEMENTATIONS.values():
        assert {part.dtype for part in route(u, weight)} == {torch.float64}


# pieces and errors


@pytest.mark.parametrize("dim", [0, 1, -1])
@leaky_or_not
def test_couplings_of_is_a_softmax_over_the_given_axis(dim: int, leaky: bool) -> None:
    logits = random(3, 5, 2)
    e = logits.exp()
    expected = e / (e.sum(dim, keepdim=True) + leaky)
    torch.testing.assert_close(couplings_of(logits, leaky=leaky, dim=dim), expected, rtol=1e-13, atol=0)


def test_large_logits_do_not_overflow() -> None:
    couplings = couplings_of(torch.tensor([[1000.0, 0.0, -1000.0]]), leaky=True)
    assert couplings.tolist() == [[1.0, 0.0, 0.0]]


@every_routing
@pytest.mark.parametrize("r", [0, -1])
def test_fewer_than_one_iteration_is_refused(route: Routing, r: int) -> None:
    u, weight, _ = inputs()
    with pytest.raises(InputError, match=f"^routing iterations must be at least 1; got {r}$"):
        route(u, weight, iterations=r)


@pytest.mark.usefixtures("unchecked")
def test_votes_without_all_their_axes_are_refused() -> None:
    message = r"^votes must be \[\.\.\., in, out, dim\] with at least 3 axes; got shape \(32, 16\)$"
    with pytest.raises(InputError, match=message):
        dynamic_routing(torch.zeros(32, 16))


def test_one_iteration_is_enough() -> None:
    check_iterations(1)


@every_r
@leaky_or_not
def test_an_epsilon_reaches_every_squash(r: int, leaky: bool) -> None:
    """Procedure 1 written out, with `v = |s|^2 / (1 + |s|^2) * s / sqrt(|s|^2 + epsilon)`."""
    u, weight, bias = inputs()
    u_hat = np.einsum("nip,ipjd->nijd", u.numpy(), weight.numpy())
    epsilon = 0.3
    b = np.zeros(u_hat.shape[:-1])
    for iteration in range(r):
        e = np.exp(b)
        c = e / (e.sum(-1, keepdims=True) + leaky)
        s = np.einsum("nij,nijd->njd", c, u_hat) + bias.numpy()
        squared = (s**2).sum(-1, keepdims=True)
        v = squared / (1 + squared) * s / np.sqrt(squared + epsilon)
        if iteration < r - 1:
            b = b + np.einsum("nijd,njd->nij", u_hat, v)
    found = dynamic_routing(votes(u, weight), iterations=r, bias=bias, leaky=leaky, epsilon=epsilon)
    np.testing.assert_allclose(found.pose, v, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.couplings, c, rtol=1e-11, atol=1e-13)
    without = dynamic_routing(votes(u, weight), iterations=r, bias=bias, leaky=leaky)
    assert float((found.pose - without.pose).abs().max()) > 0.01


@pytest.mark.parametrize("iterations", [101, 10**30, 10**5000], ids=["101", "30 digits", "5,000 digits"])
def test_routing_ends(iterations: int) -> None:
    with pytest.raises(InputError, match=r"^routing iterations must be at most 100; got [^\n]{1,80}$"):
        dynamic_routing(torch.zeros(1, 2, 3, 4), iterations=iterations)
    assert routing.MOST_ITERATIONS == 100
    check_iterations(100)
