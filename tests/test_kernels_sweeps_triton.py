"""The Triton kernels against plain PyTorch: one sweep and the whole routing, with every gradient.

Without a GPU they run in Triton's interpreter, and are compiled for one all the same.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capsnet.errors import InputError
from capsnet.functional import votes
from capsnet.kernels import sweeps_triton
from capsnet.kernels.fused import votes_and_routing
from capsnet.routing import RoutingResult, couplings_of, dynamic_routing

triton = pytest.importorskip("triton", reason="Triton is not installed")
interpreter = pytest.importorskip("triton.runtime.interpreter")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOLERANCE = 1e-6  # relative RMS of float32 against float64; measured: 1e-7 to 5e-7
ON_A_GPU = 5e-6  # not yet measured; sums of 1152 inputs and three TF32 products for one (TF32 alone: 3e-4)

Sizes = tuple[int, int, int, int, int]  # n, in, in_dim, out, dim
PAPER: Sizes = (128, 1152, 8, 10, 16)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter, whoever imported Triton before; several groups at small sizes too.

    Two faults of the interpreter of Triton 3.6 are put right: a function that a kernel calls leaves Triton's language
    patched, so that nothing compiles in this process any more; and NumPy 2.4 does not take its scalars for numbers.
    """

    class Interpreted(interpreter.InterpretedFunction):  # type: ignore[misc, name-defined]
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            scope = interpreter._patch_lang(self.fn)
            try:
                return self.rewrite()(*arguments, **options)
            finally:
                scope.restore()

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (sweeps_triton, triton.language, triton.language.standard):
        for name, function in list(vars(module).items()):
            if isinstance(function, triton.JITFunction | interpreter.InterpretedFunction):
                monkeypatch.setattr(module, name, Interpreted(function.fn))
    monkeypatch.setattr(sweeps_triton, "INPUTS", 2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def distance(one: Tensor, other: Tensor) -> float:
    """RMS of the difference over RMS of `other`; a plain RMS where that is zero."""
    assert one.shape == other.shape
    difference = (one.double() - other.double()).square().mean().sqrt()
    size = other.double().square().mean().sqrt()
    return float(difference / size if size > 0 else difference)


def arguments(sizes: Sizes, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`u`, `weight`, `gains`, and the gradients of the weighted sum and of the couplings."""
    n, ins, in_dim, outs, dim = sizes
    u, weight = random(n, ins, in_dim), random(ins, in_dim, outs, dim, seed=1) / math.sqrt(in_dim)
    gains, d_s = random(n, outs, dim, seed=2) / math.sqrt(dim), random(n, outs, dim, seed=3)
    d_c = random(n, ins, outs, seed=4) * math.sqrt(dim)
    return u.to(device), weight.to(device), gains.to(device), d_s.to(device), d_c.to(device)


def plain_sweep(
    u: Tensor, weight: Tensor, gains: Tensor, d_s: Tensor, d_c: Tensor | None, *, leaky: bool, detached: bool
) -> dict[str, Tensor]:
    """A sweep and its gradients in float64, by autograd."""
    u, weight, gains = (x.double().requires_grad_() for x in (u, weight, gains))
    u_hat = votes(u, weight)
    c = couplings_of(torch.einsum("nijd,njd->nij", u_hat, gains), leaky=leaky)
    s = torch.einsum("nij,nijd->njd", c.detach() if detached else c, u_hat)
    scalar = (s * d_s).sum() if d_c is None or detached else (s * d_s).sum() + (c * d_c).sum()
    leaves = {"u": u, "weight": weight} | ({} if detached else {"gains": gains})
    gradients = torch.autograd.grad(scalar, list(leaves.values()))
    return {"s": s.detach(), "c": c.detach()} | dict(zip(leaves, gradients, strict=True))


def sweep(
    u: Tensor, weight: Tensor, gains: Tensor, d_s: Tensor, d_c: Tensor | None, *, leaky: bool, detached: bool
) -> dict[str, Tensor]:
    kernel = sweeps_triton.Sweeps(u, weight, leaky=leaky)
    s, c = kernel.weighted_sum(gains)
    d_gains = kernel.weighted_sum_backward(gains, d_s, d_c, detached=detached)
    d_u, d_weight = kernel.gradients()
    assert d_u.is_contiguous()
    assert d_weight.is_contiguous()
    return {"s": s, "c": c, "u": d_u, "weight": d_weight} | ({} if d_gains is None else {"gains": d_gains})


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert distance(x, expected[name]) < tolerance, name


def plain(u: Tensor, weight: Tensor, **options: Any) -> RoutingResult:
    return dynamic_routing(votes(u, weight), **options)


def outputs_and_gradients(
    route: Callable[..., RoutingResult], u: Tensor, weight: Tensor, bias: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Pose, activation, couplings, and the gradients of a random linear function of all of them."""
    leaves = {"d u": u, "d weight": weight, "d bias": bias}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    result = route(leaves["d u"], leaves["d weight"], bias=leaves["d bias"], **options)
    scalar = sum((x * random(*x.shape, seed=7 + k).to(x)).sum() for k, x in enumerate(result) if x.requires_grad)
    gradients = torch.autograd.grad(scalar, list(leaves.values()))  # type: ignore[arg-type]
    found = {name: x.detach() for name, x in result._asdict().items()}
    return found | dict(zip(leaves, gradients, strict=True))


def routing_arguments(sizes: Sizes, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """`u`, `weight` and `bias` with which the poses are neither all short nor all long."""
    n, ins, in_dim, outs, dim = sizes
    u, weight = random(n, ins, in_dim), random(ins, in_dim, outs, dim, seed=1) / math.sqrt(ins)
    return u.to(device), weight.to(device), (random(outs, dim, seed=2) * 0.3).to(device)


# one sweep


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("leaky", [False, True], ids=["softmax", "leaky"])
@pytest.mark.parametrize("given", ["d_s", "d_s and d_c", "detached"])
@pytest.mark.parametrize(
    "sizes",
    [(3, 7, 3, 5, 3), (17, 3, 8, 10, 16), (3, 3, 3, 37, 3), (1, 1, 8, 1, 16), (17, 1, 3, 37, 16), (1, 2, 64, 5, 33)],
    ids=str,
)
def test_one_sweep_and_its_gradients(sizes: Sizes, given: str, leaky: bool) -> None:
    """37 output capsules are three blocks; 17 images two blocks, each a part of the batch."""
    u, weight, gains, d_s, d_c = arguments(sizes)
    options = {"leaky": leaky, "detached": given == "detached"}
    upstream = None if given == "d_s" else d_c  # detached couplings ignore it
    expected = plain_sweep(u, weight, gains, d_s, upstream, **options)
    compare(sweep(u, weight, gains, d_s, upstream, **options), expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("sizes", [(33, 3, 3, 5, 3), (3, 3, 3, 37, 3)], ids=str)
def test_sweeps_add_their_gradients(sizes: Sizes) -> None:
    """33 images are three blocks, so that one part of the batch has two of them."""
    u, weight, gains, d_s, d_c = arguments(sizes)
    kernel = sweeps_triton.Sweeps(u, weight, leaky=False)
    expected = [
        plain_sweep(u, weight, *x, leaky=False, detached=False) for x in ((gains, d_s, None), (d_s, gains, d_c))
    ]
    for given, right in zip(((gains, d_s, None), (d_s, gains, d_c)), expected, strict=True):
        d_gains = kernel.weighted_sum_backward(*given, detached=False)
        assert d_gains is not None
        assert distance(d_gains, right["gains"]) < TOLERANCE
    for found, name in zip(kernel.gradients(), ("u", "weight"), strict=True):
        assert distance(found, expected[0][name] + expected[1][name]) < TOLERANCE


@pytest.mark.usefixtures("interpreted")
def test_large_logits_overflow_nothing() -> None:
    """Logits of some thousands, so that couplings are 0 or 1: in one block, in three, and with the leaky slot."""
    for outs in (5, 37):
        u, weight, gains, d_s, d_c = arguments((3, 2, 3, outs, 3))
        for leaky in (False, True):
            found = sweep(u, weight, gains * 1000, d_s, d_c, leaky=leaky, detached=False)
            expected = plain_sweep(u, weight, gains * 1000, d_s, d_c, leaky=leaky, detached=False)
            assert distance(found["c"], expected["c"]) < 1e-3
            assert all(x.isfinite().all() for x in found.values())


@pytest.mark.usefixtures("interpreted")
def test_no_memory_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """`new_empty` and `empty_like` hand out NaN here: what is not overwritten shows."""
    fresh, like = Tensor.new_empty, torch.empty_like
    for outs in (5, 37):
        given = arguments((3, 3, 3, outs, 3))
        expected = plain_sweep(*given, leaky=False, detached=False)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", lambda *a, **k: fresh(*a, **k).fill_(float("nan")))
            patch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(float("nan")))
            compare(sweep(*given, leaky=False, detached=False), expected)


@pytest.mark.usefixtures("interpreted")
def test_arguments_that_are_not_contiguous_are_read_right() -> None:
    given = arguments((3, 7, 3, 5, 4))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    assert not any(x.is_contiguous() for x in strided)
    expected = plain_sweep(*given, leaky=False, detached=False)
    compare(sweep(*strided, leaky=False, detached=False), expected)


@pytest.mark.usefixtures("interpreted")
def test_an_empty_batch_gives_empty_results_and_zero_gradients() -> None:
    found = sweep(*arguments((0, 7, 3, 5, 4)), leaky=False, detached=False)
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes == {"s": (0, 5, 4), "c": (0, 7, 5), "u": (0, 7, 3), "weight": (7, 3, 5, 4), "gains": (0, 5, 4)}
    assert not found["weight"].any()


def test_without_a_backward_sweep_gradients_are_zero() -> None:
    u, weight, *_ = arguments((3, 7, 3, 5, 4))
    d_u, d_weight = sweeps_triton.Sweeps(u, weight, leaky=False).gradients()
    assert d_u.shape == u.shape
    assert d_weight.shape == weight.shape
    assert not d_u.any()
    assert not d_weight.any()


class Launches:
    """In place of a kernel and of `torch.cuda.device_of`: on which tensor's device each launch was."""

    def __init__(self) -> None:
        self.here: Tensor | None = None
        self.seen: list[Tensor | None] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.seen.append(self.here)

    @contextmanager
    def device_of(self, tensor: Tensor) -> Iterator[None]:
        self.here = tensor
        yield
        self.here = None


@pytest.mark.parametrize("outs", [5, 100], ids=["one block", "several blocks"])
def test_every_launch_is_on_the_device_of_the_tensors(outs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which on a machine of several is another one."""
    launches = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", launches.device_of)
    kernels = ("_forward", "_statistics", "_backward")
    for name in kernels:
        monkeypatch.setattr(sweeps_triton, name, launches)
    u, weight, gains, d_s, d_c = arguments((3, 7, 3, outs, 4))
    sweeps = sweeps_triton.Sweeps(u, weight, leaky=False)
    sweeps.weighted_sum(gains)
    sweeps.weighted_sum_backward(gains, d_s, d_c, detached=False)
    assert len(launches.seen) == (2 if outs == 5 else 4 + sweeps.blocks - 1)
    assert all(tensor is sweeps.u for tensor in launches.seen)
    assert inspect.getsource(sweeps_triton).count("[grid](") == 1  # no launch goes another way


# what is refused


def test_another_type_is_refused() -> None:
    u, weight, *_ = arguments((3, 7, 3, 5, 4))
    with pytest.raises(InputError, match=r"^u of the fused kernel must be torch.float32; got torch.float64$"):
        sweeps_triton.Sweeps(u.double(), weight.double(), leaky=False)
    with pytest.raises(InputError, match=r"^weight of the fused kernel must be torch.float32; got torch.bfloat16$"):
        sweeps_triton.Sweeps(u, weight.bfloat16(), leaky=False)


def test_large_capsules_are_refused() -> None:
    for name, in_dim, dim in (("in_dim", 65, 64), ("dim", 64, 65)):
        with pytest.raises(InputError, match=rf"^{name} of the fused kernel must be at most 64; got 65$"):
            sweeps_triton.Sweeps(torch.zeros(1, 1, in_dim), torch.zeros(1, in_dim, 1, dim), leaky=False)


def test_it_is_available_on_a_gpu_or_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_a_gpu, interpreted in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=on_a_gpu: answer)
        monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        assert sweeps_triton.available() == (on_a_gpu or interpreted)
    monkeypatch.setattr(sweeps_triton, "triton", None)
    assert not sweeps_triton.available()


# the whole routing


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", [{}, {"leaky": True}, {"detach_routing": True}], ids=str)
@pytest.mark.parametrize("sizes", [(3, 7, 3, 5, 3), (2, 3, 8, 37, 3)], ids=str)
def test_routing_and_its_gradients(sizes: Sizes, options: dict[str, Any]) -> None:
    given = routing_arguments(sizes)
    expected = outputs_and_gradients(plain, *(x.double() for x in given), iterations=3, **options)
    found = outputs_and_gradients(partial(votes_and_routing, sweeps_triton.Sweeps), *given, iterations=3, **options)
    compare(found, expected)


@pytest.mark.usefixtures("interpreted")
def test_a_second_backward_of_one_forward_gives_the_same() -> None:
    u, weight, *_ = (x.requires_grad_() for x in routing_arguments((3, 7, 3, 5, 3)))
    loss = votes_and_routing(sweeps_triton.Sweeps, u, weight, iterations=3).activation.square().sum()
    first, second = (torch.autograd.grad(loss, (u, weight), retain_graph=True) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


# compiled, without a GPU


def compiled(kernel: Any, sizes: Sizes, *, none: tuple[str, ...] = (), **options: object) -> Any:
    """The kernel for a Hopper GPU; arguments named in `none` are None."""
    _, ins, in_dim, outs, dim = sizes
    tile = sweeps_triton._tile_of(torch.empty(ins, in_dim, outs, dim, device="meta"))
    given = {"INS": ins, "IN_DIM": in_dim, "OUTS": outs, "DIM": dim, "BN": sweeps_triton.IMAGES, "LEAKY": True}
    given |= tile._asdict() | dict.fromkeys(none)
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    types = {name: "i32" if name in ("n", "block") else "*fp32" for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(
        source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options={"num_warps": 8, **options}
    )


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("sizes", [PAPER, (3, 7, 3, 37, 3)], ids=str)
def test_the_kernels_compile_for_a_gpu(sizes: Sizes) -> None:
    """For Hopper: by tensor cores, and within the 227 KiB of shared memory of a program."""
    if not hasattr(sweeps_triton._forward, "cache_key"):
        pytest.skip("Triton was imported for its interpreter only")
    in_one_block = sizes == PAPER
    whole = ("log_sum", "mean") if in_one_block else ()
    for kernel, none, options in (
        (sweeps_triton._forward, whole, {"maxnreg": 128}),
        (sweeps_triton._statistics, (), {"maxnreg": 128}),
        (sweeps_triton._statistics, ("d_s", "d_c", "means"), {"maxnreg": 128}),
        (sweeps_triton._backward, whole, {}),
        (sweeps_triton._backward, (*whole, "d_c", "mean", "parts"), {}),
    ):
        binary = compiled(kernel, sizes, none=none, **options)
        assert "mma.sync" in binary.asm["ptx"]
        assert binary.metadata.shared <= 227 * 1024


# on a GPU


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("leaky", [False, True], ids=["softmax", "leaky"])
@pytest.mark.parametrize("given", ["d_s", "d_s and d_c", "detached"])
@pytest.mark.parametrize("sizes", [PAPER, (32, 288, 8, 200, 16), (17, 7, 3, 37, 3), (3, 9, 64, 5, 64)], ids=str)
def test_one_sweep_on_a_gpu(sizes: Sizes, given: str, leaky: bool) -> None:
    u, weight, gains, d_s, d_c = arguments(sizes, "cuda")
    options = {"leaky": leaky, "detached": given == "detached"}
    upstream = None if given == "d_s" else d_c
    expected = plain_sweep(u, weight, gains, d_s, upstream, **options)
    compare(sweep(u, weight, gains, d_s, upstream, **options), expected, ON_A_GPU)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"leaky": True}, {"detach_routing": True}], ids=str)
@pytest.mark.parametrize("sizes", [PAPER, (32, 288, 8, 200, 16)], ids=str)
def test_routing_on_a_gpu(sizes: Sizes, options: dict[str, Any]) -> None:
    """The first iteration is a product of matrices by cuBLAS, in float32 by PyTorch's default."""
    given = routing_arguments(sizes, "cuda")
    expected = outputs_and_gradients(plain, *(x.double() for x in given), iterations=3, **options)
    route = partial(votes_and_routing, sweeps_triton.Sweeps)
    found = outputs_and_gradients(route, *given, iterations=3, **options)
    compare(found, expected, ON_A_GPU)
    for name, x in outputs_and_gradients(route, *given, iterations=3, **options).items():
        assert x.equal(found[name]), f"{name} differs from one run to the next"


def loss_of(route: Callable[..., RoutingResult], u: Tensor, weight: Tensor) -> Tensor:
    return route(u, weight, iterations=3).activation.square().sum()


@needs_gpu
@pytest.mark.gpu
def test_memory_on_a_gpu_is_a_tenth_of_the_plain_versions() -> None:
    u, weight, _ = routing_arguments(PAPER, "cuda")
    needed = []
    for route in (partial(votes_and_routing, sweeps_triton.Sweeps), plain):
        leaves = u.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.autograd.grad(loss_of(route, *leaves), leaves)  # what is set up once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss_of(route, *leaves), leaves)
        needed.append(torch.cuda.max_memory_allocated() - before)
    assert needed[0] <= needed[1] / 10


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [PAPER, (8, 32, 8, 37, 16)], ids=str)
def test_it_can_be_captured_in_a_cuda_graph(sizes: Sizes) -> None:
    u, weight, _ = routing_arguments(sizes, "cuda")
    leaves = u.clone().requires_grad_(), weight.clone().requires_grad_()
    route = partial(votes_and_routing, sweeps_triton.Sweeps)

    def step() -> tuple[Tensor, ...]:
        loss = loss_of(route, *leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(u.flip(0))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert distance(found, expected) < ON_A_GPU
