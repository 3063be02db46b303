"""The sliced kernel against the plain version: outputs and every gradient, at awkward sizes and slices."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from capsnet.kernels import cpu
from capsnet.layers import votes
from capsnet.routing import RoutingResult, dynamic_routing

OUTS, DIM, IN_DIM = 5, 3, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def inputs(
    ins: int, *leading: int, dtype: torch.dtype = torch.float64, biased: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    u, weight = random(*leading, ins, IN_DIM), random(ins, IN_DIM, OUTS, DIM, seed=1) / math.sqrt(ins)
    bias = random(OUTS, DIM, seed=2) * 0.3 if biased else None
    return u.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def plain(u: Tensor, weight: Tensor, **options: object) -> RoutingResult:
    return dynamic_routing(votes(u, weight), **options)  # type: ignore[arg-type]


def outputs_and_gradients(
    route: Callable[..., RoutingResult],
    arguments: tuple[Tensor, Tensor, Tensor | None],
    **options: object,
) -> dict[str, Tensor]:
    """Pose, activation, couplings, and the gradients of a random linear function of each of them and of all."""
    u, weight, bias = (None if x is None else x.detach().clone().requires_grad_() for x in arguments)
    result = route(u, weight, bias=bias, **options)
    weighted = [(part * random(*part.shape, seed=7 + k).to(part.dtype)).sum() for k, part in enumerate(result)]
    leaves = {name: x for name, x in (("u", u), ("weight", weight), ("bias", bias)) if x is not None}
    found = dict(result._asdict())
    for name, scalar in (*zip(result._fields, weighted, strict=True), ("all", sum(weighted[1:], weighted[0]))):
        if not scalar.requires_grad:  # detached couplings
            continue
        gradients = torch.autograd.grad(
            scalar, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found |= {f"d {name} / d {leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def distance(one: Tensor, other: Tensor) -> float:
    """RMS of the difference over RMS of `other`; a plain RMS where that is zero."""
    difference = (one.double() - other.double()).square().mean().sqrt()
    size = other.double().square().mean().sqrt()
    return float(difference / size if size > 0 else difference)


@pytest.fixture(params=[1, 2, 1000], ids="slices-of-{}".format)
def images_per_slice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call with the votes' bytes of one image to cut the batch into slices of so many images."""

    def cut(bytes_per_image: int) -> None:
        monkeypatch.setattr(cpu, "SLICE_BYTES", bytes_per_image * request.param)

    return cut


@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("leaky", [False, True], ids=["softmax", "leaky"])
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_sliced_equals_plain_in_float64(
    images_per_slice: Callable[[int], None], r: int, leaky: bool, biased: bool, detached: bool
) -> None:
    """Batch 5 in slices of 1, of 2 with a last one of 1, and whole."""
    images_per_slice(7 * OUTS * DIM * 8)
    arguments = inputs(7, 5, biased=biased)
    options = {"iterations": r, "leaky": leaky, "detach_routing": detached}
    expected = outputs_and_gradients(plain, arguments, **options)
    found = outputs_and_gradients(cpu.votes_and_routing, arguments, **options)
    assert set(expected) <= set(found)
    for name, x in found.items():
        if name in expected:
            assert distance(x, expected[name]) < 1e-12, name
        else:  # the gradient of detached couplings: plain has none
            assert not x.any(), name


@pytest.mark.parametrize("ins", [1, 7, 63, 100])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sliced_equals_plain_at_awkward_sizes(
    images_per_slice: Callable[[int], None], ins: int, batch: int, dtype: torch.dtype
) -> None:
    """In float32 the sliced version may be twice as far from float64 as the plain one (measured: about as far)."""
    arguments = inputs(ins, batch, dtype=dtype)
    images_per_slice(ins * OUTS * DIM * dtype.itemsize)
    exact = outputs_and_gradients(plain, tuple(None if x is None else x.double() for x in arguments))  # type: ignore[arg-type]
    expected = outputs_and_gradients(plain, arguments)
    found = outputs_and_gradients(cpu.votes_and_routing, arguments)
    assert found.keys() == expected.keys() == exact.keys()
    for name, x in found.items():
        assert x.dtype == dtype
        allowed = 1e-12 if dtype == torch.float64 else 2 * distance(expected[name], exact[name]) + 2e-7
        assert distance(x, exact[name]) < allowed, name


def test_slices_cover_the_batch_with_a_last_partial_one(monkeypatch: pytest.MonkeyPatch) -> None:
    u, weight, _ = inputs(7, 11)
    monkeypatch.setattr(cpu, "SLICE_BYTES", 4 * 7 * OUTS * DIM * 8 + 1)
    assert [u[images].shape[0] for images in cpu._slices(u, weight)] == [4, 4, 3]


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_leading_axes_are_free_forward_and_backward(
    images_per_slice: Callable[[int], None], leading: tuple[int, ...]
) -> None:
    images_per_slice(7 * OUTS * DIM * 8)
    arguments = inputs(7, *leading)
    expected = outputs_and_gradients(plain, arguments)
    for name, x in outputs_and_gradients(cpu.votes_and_routing, arguments).items():
        assert x.shape == expected[name].shape
        assert distance(x, expected[name]) < 1e-12, name


@pytest.mark.parametrize("needed", ["u", "weight", "bias"])
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_one_argument_alone_gets_its_gradient(needed: str, detached: bool) -> None:
    found = []
    for route in (plain, cpu.votes_and_routing):
        u, weight, bias = inputs(7, 3)
        leaves = {"u": u, "weight": weight, "bias": bias}
        leaf = leaves[needed]
        assert leaf is not None
        leaf.requires_grad_()
        result = route(u, weight, bias=bias, detach_routing=detached)
        torch.autograd.backward(result.activation.square().sum())
        assert all(x is None or x.grad is None for name, x in leaves.items() if name != needed)
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert distance(found[1], found[0]) < 1e-12


def test_without_gradients_nothing_is_recorded() -> None:
    u, weight, bias = inputs(7, 3)
    expected = plain(u, weight, bias=bias)
    for result in (
        cpu.votes_and_routing(u, weight, bias=bias),
        torch.no_grad()(cpu.votes_and_routing)(u, weight.clone().requires_grad_(), bias=bias),
        torch.inference_mode()(cpu.votes_and_routing)(u, weight, bias=bias),
    ):
        for part, right in zip(result, expected, strict=True):
            assert not part.requires_grad
            assert distance(part.clone(), right) < 1e-12


def test_an_empty_batch_gives_empty_results_and_zero_gradients() -> None:
    arguments = inputs(7, 0)
    for route in (plain, cpu.votes_and_routing):
        u, weight, bias = (x.clone().requires_grad_() for x in arguments if x is not None)
        result = route(u, weight, bias=bias)
        assert [tuple(part.shape) for part in result] == [(0, OUTS, DIM), (0, OUTS), (0, 7, OUTS)]
        torch.autograd.backward(result.pose.sum())
        assert u.grad is not None
        assert u.grad.shape == u.shape
        for leaf in (weight, bias):
            assert leaf.grad is not None
            assert not leaf.grad.any()


def test_arguments_that_are_not_contiguous_are_read_right() -> None:
    u, weight, bias = inputs(7, 3)
    strided = u.transpose(0, 1).contiguous().transpose(0, 1), weight.mT.contiguous().mT, bias
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    expected = outputs_and_gradients(plain, (u, weight, bias))
    for route in (plain, cpu.votes_and_routing):
        for name, x in outputs_and_gradients(route, strided).items():
            assert distance(x, expected[name]) < 1e-12, name


def test_no_memory_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """`new_empty` and `empty_like` hand out NaN here: what is not overwritten shows."""
    fresh, like = Tensor.new_empty, torch.empty_like
    arguments = inputs(7, 5)
    expected = outputs_and_gradients(plain, arguments)
    monkeypatch.setattr(cpu, "SLICE_BYTES", 2 * 7 * OUTS * DIM * 8)
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fresh(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(float("nan")))
    for name, x in outputs_and_gradients(cpu.votes_and_routing, arguments).items():
        assert distance(x, expected[name]) < 1e-12, name


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    u, weight, _ = inputs(7, 3)
    u.requires_grad_()
    pose = cpu.votes_and_routing(u, weight).pose
    (first,) = torch.autograd.grad(pose.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(first.sum())
