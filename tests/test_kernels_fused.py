"""The fused function on a CPU against the plain version: outputs and every gradient, at awkward sizes and chunks."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from capsnet.functional import votes
from capsnet.kernels import buffers, native, sweeps_cpu, sweeps_native
from capsnet.kernels.fused import Sweeps, votes_and_attention, votes_and_routing
from capsnet.routing import RoutingResult, attention_routing, dynamic_routing

OUTS, DIM, IN_DIM = 5, 3, 2

fused = partial(votes_and_routing, sweeps_cpu.Sweeps)


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


@pytest.fixture(params=[1, 3, 1000], ids="chunks-of-{}".format)
def inputs_per_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call with the bytes of one input capsule's working array to cut the input capsules into chunks of so many."""

    def cut(bytes_per_input: int) -> None:
        monkeypatch.setattr(sweeps_cpu, "CHUNK_BYTES", bytes_per_input * request.param)

    return cut


@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("leaky", [False, True], ids=["softmax", "leaky"])
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_fused_equals_plain_in_float64(
    inputs_per_chunk: Callable[[int], None], r: int, leaky: bool, biased: bool, detached: bool
) -> None:
    """7 input capsules in chunks of 1, of 3 with a last one of 1, and whole."""
    inputs_per_chunk(5 * OUTS * IN_DIM * 8)
    arguments = inputs(7, 5, biased=biased)
    options = {"iterations": r, "leaky": leaky, "detach_routing": detached}
    expected = outputs_and_gradients(plain, arguments, **options)
    found = outputs_and_gradients(fused, arguments, **options)
    assert set(expected) <= set(found)
    for name, x in found.items():
        if name in expected:
            assert distance(x, expected[name]) < 1e-12, name
        else:  # the gradient of detached couplings: plain has none
            assert not x.any(), name


@pytest.mark.parametrize("ins", [1, 7, 63, 100])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fused_equals_plain_at_awkward_sizes(
    inputs_per_chunk: Callable[[int], None], ins: int, batch: int, dtype: torch.dtype
) -> None:
    """In float32 the fused version may be twice as far from float64 as the plain one (measured: about as far)."""
    arguments = inputs(ins, batch, dtype=dtype)
    inputs_per_chunk(batch * OUTS * IN_DIM * dtype.itemsize)
    exact = outputs_and_gradients(plain, tuple(None if x is None else x.double() for x in arguments))  # type: ignore[arg-type]
    expected = outputs_and_gradients(plain, arguments)
    found = outputs_and_gradients(fused, arguments)
    assert found.keys() == expected.keys() == exact.keys()
    for name, x in found.items():
        assert x.dtype == dtype
        allowed = 1e-12 if dtype == torch.float64 else 2 * distance(expected[name], exact[name]) + 2e-7
        assert distance(x, exact[name]) < allowed, name


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_leading_axes_are_free_forward_and_backward(
    inputs_per_chunk: Callable[[int], None], leading: tuple[int, ...]
) -> None:
    inputs_per_chunk(math.prod(leading) * OUTS * IN_DIM * 8)
    arguments = inputs(7, *leading)
    expected = outputs_and_gradients(plain, arguments)
    for name, x in outputs_and_gradients(fused, arguments).items():
        assert x.shape == expected[name].shape
        assert distance(x, expected[name]) < 1e-12, name


@pytest.mark.parametrize("needed", ["u", "weight", "bias"])
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_one_argument_alone_gets_its_gradient(needed: str, detached: bool) -> None:
    found = []
    for route in (plain, fused):
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
        fused(u, weight, bias=bias),
        torch.no_grad()(fused)(u, weight.clone().requires_grad_(), bias=bias),
        torch.inference_mode()(fused)(u, weight, bias=bias),
    ):
        for part, right in zip(result, expected, strict=True):
            assert not part.requires_grad
            assert distance(part.clone(), right) < 1e-12


def test_an_empty_batch_gives_empty_results_and_zero_gradients() -> None:
    arguments = inputs(7, 0)
    for route in (plain, fused):
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
    for route in (plain, fused):
        for name, x in outputs_and_gradients(route, strided).items():
            assert distance(x, expected[name]) < 1e-12, name


def test_no_memory_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh and kept memory hold NaN here: what is not overwritten shows."""
    fresh, like, take = Tensor.new_empty, torch.empty_like, buffers.BufferPool.acquire
    arguments = inputs(7, 5)
    monkeypatch.setattr(sweeps_cpu, "CHUNK_BYTES", 3 * 5 * OUTS * IN_DIM * 8)
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fresh(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(buffers.BufferPool, "acquire", lambda *a: take(*a).fill_(float("nan")))
    for leaky in (False, True):
        expected = outputs_and_gradients(plain, arguments, leaky=leaky)
        for name, x in outputs_and_gradients(fused, arguments, leaky=leaky).items():
            assert distance(x, expected[name]) < 1e-12, name


def test_two_forwards_before_their_backwards_do_not_share_arrays() -> None:
    found = []
    for route in (plain, fused):
        u, weight, bias = inputs(7, 5)
        weight.requires_grad_()
        losses = [route(x, weight, bias=bias).pose.square().sum() for x in (u, 1 - u)]
        found.append(torch.autograd.grad(losses[0] + 3 * losses[1], weight)[0])
    assert distance(found[1], found[0]) < 1e-12


def test_arrays_are_kept_from_step_to_step() -> None:
    buffers.pool.clear()
    addresses = []
    for _ in range(3):
        u, weight, _ = inputs(7, 5)
        fused(u.requires_grad_(), weight).pose.sum().backward()  # type: ignore[no-untyped-call]
        addresses.append({name: array.data_ptr() for name, array in buffers.pool._free.items()})
    assert addresses[0] == addresses[1] == addresses[2]
    assert addresses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_poses_in_half_precision_are_routed_in_float32(dtype: torch.dtype) -> None:
    u, weight, bias = inputs(7, 3, dtype=torch.float32)
    found = fused(u.to(dtype), weight, bias=bias)
    wanted = fused(u.to(dtype).float(), weight, bias=bias)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


# self-attention


def attended(u: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> RoutingResult:
    return attention_routing(votes(u, weight), prior=bias)


def swept(sweeps: type[Sweeps], u: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> RoutingResult:
    return votes_and_attention(sweeps, u, weight, prior=bias)


def with_prior(ins: int, *leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    u, weight, _ = inputs(ins, *leading, dtype=dtype)
    return u, weight * 3, random(ins, OUTS, seed=3).to(dtype) * 0.1  # larger votes: couplings far from uniform


@pytest.mark.parametrize("leading", [(5,), (), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("prior", [False, True], ids=["no-prior", "prior"])
def test_swept_attention_equals_plain_in_float64(
    inputs_per_chunk: Callable[[int], None], leading: tuple[int, ...], prior: bool
) -> None:
    inputs_per_chunk(5 * OUTS * IN_DIM * 8)
    u, weight, given = with_prior(7, *leading)
    arguments = u, weight, given if prior else None
    expected = outputs_and_gradients(attended, arguments)
    assert leading == (0,) or float((attended(*arguments[:2]).couplings - 1 / OUTS).abs().max()) > 0.1
    for name, x in outputs_and_gradients(partial(swept, sweeps_cpu.Sweeps), arguments).items():
        assert x.shape == expected[name].shape
        assert not x.numel() or distance(x, expected[name]) < 1e-12, name


@pytest.mark.parametrize("sweeps", [sweeps_cpu.Sweeps, sweeps_native.Sweeps], ids=["torch", "c"])
@pytest.mark.parametrize(("ins", "batch"), [(1, 1), (7, 3), (63, 17), (100, 33)])
def test_swept_attention_in_float32_is_as_exact_as_plain(sweeps: type[Sweeps], ins: int, batch: int) -> None:
    if sweeps is sweeps_native.Sweeps and not native.usable(torch.zeros(1), torch.zeros(1)):
        pytest.skip("no compiler")
    arguments = with_prior(ins, batch, dtype=torch.float32)
    exact = outputs_and_gradients(attended, tuple(None if x is None else x.double() for x in arguments))  # type: ignore[arg-type]
    expected = outputs_and_gradients(attended, arguments)
    for name, x in outputs_and_gradients(partial(swept, sweeps), arguments).items():
        assert distance(x, exact[name]) < 2 * distance(expected[name], exact[name]) + 3e-6, name


def test_swept_attention_refuses_second_derivatives() -> None:
    u, weight, _ = with_prior(7, 3)
    u.requires_grad_()
    (first,) = torch.autograd.grad(swept(sweeps_cpu.Sweeps, u, weight).activation.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="has first derivatives only; use kernel plain"):
        torch.autograd.grad(first.sum(), u)
