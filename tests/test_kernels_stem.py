"""Minimal filtering against direct convolution in float64: matrices, outputs, gradients, kept buffers, the rule."""

from contextvars import copy_context
from fractions import Fraction
from itertools import pairwise
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from capsnet.errors import InputError
from capsnet.kernels import stem
from capsnet.kernels.buffers import pool
from capsnet.kernels.stem import constant_weights, winograd_stem
from capsnet.kernels.winograd import Pads, saving, transforms
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from tiny import in_threads

SHAPES = {  # batch, in channels, height, width, channels, k1, stride1, out, k2, stride2
    "paper, fewer channels": (3, 1, 28, 28, 7, 9, 1, 5, 9, 2),
    "several tiles, colour, not square": (2, 3, 40, 33, 5, 5, 1, 3, 9, 2),
    "even kernel, stride in both": (2, 2, 23, 29, 5, 3, 2, 3, 4, 2),
    "stride 1": (1, 1, 20, 20, 3, 5, 1, 4, 5, 1),
    "stride 3": (2, 3, 50, 47, 4, 9, 1, 3, 7, 3),
    "one output": (5, 1, 17, 17, 3, 9, 1, 2, 9, 2),
    "1 x 1 kernels": (2, 3, 7, 11, 5, 1, 1, 3, 1, 1),
    "pieces far apart in memory": (2, 1, 13, 12, 1100, 3, 1, 37, 3, 2),
    "taps as many as points": (1, 1, 30, 30, 2, 3, 1, 2, 19, 2),
}


pytestmark = pytest.mark.usefixtures("each_way")


def direct(images: Tensor, weights: list[Tensor], stride1: int, stride2: int) -> Tensor:
    weight1, bias1, weight2 = (weight.double() for weight in weights)
    hidden = torch.relu(F.conv2d(images.double(), weight1, bias1, stride=stride1))
    return F.conv2d(hidden, weight2, stride=stride2).permute(0, 2, 3, 1)


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], int, int]:
    batch, in_channels, height, width, channels, k1, stride1, out, k2, stride2 = shape
    generator = torch.Generator().manual_seed(sum(shape))
    images = torch.rand(batch, in_channels, height, width, generator=generator, dtype=dtype)
    weights = [
        0.1 * torch.randn(size, generator=generator, dtype=dtype)
        for size in ((channels, in_channels, k1, k1), (channels,), (out, channels, k2, k2))
    ]
    return [images, *(weight.requires_grad_() for weight in weights)], stride1, stride2


def winograd(images: Tensor, weights: list[Tensor], stride1: int, stride2: int) -> Tensor:
    return winograd_stem(images, *weights, stride1=stride1, stride2=stride2)


def results(function: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    (images, *weights), stride1, stride2 = arguments(shape, dtype)
    grid: Tensor = function(images, weights, stride1, stride2)
    slopes = torch.arange(grid.numel(), dtype=grid.dtype).view(grid.shape).cos()
    return [grid, *torch.autograd.grad((grid * slopes).sum(), weights)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_every_gradient_equal_direct_convolution(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    for ours, theirs in zip(results(winograd, shape, dtype), results(direct, shape, dtype), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        error = torch.linalg.vector_norm(ours.double() - theirs) / torch.linalg.vector_norm(theirs)
        assert error < tolerance


@pytest.mark.parametrize(("outputs", "taps"), [(1, 1), (2, 3), (6, 5), (3, 5), (4, 2), (9, 2), (1, 10)])
def test_transforms_filter_exactly(outputs: int, taps: int) -> None:
    a, g, b = transforms(outputs, taps)
    n = outputs + taps - 1
    signal = [Fraction(k * k - 7 * k + 3, 5) for k in range(n)]
    kernel = [Fraction(2 * k - 3, 7) for k in range(taps)]
    products = [
        sum(x * y for x, y in zip(g[p], kernel, strict=True)) * sum(x * y for x, y in zip(b[p], signal, strict=True))
        for p in range(n)
    ]
    filtered = [sum(x * y for x, y in zip(row, products, strict=True)) for row in a]
    assert filtered == [sum(kernel[u] * signal[o + u] for u in range(taps)) for o in range(outputs)]


def test_more_points_than_there_are_is_an_error() -> None:
    with pytest.raises(InputError, match="at most 10; got 11"):
        transforms(6, 6)


def test_saving_at_the_papers_size_is_81_times_36_over_4_times_100() -> None:
    assert saving((20, 20), 9, 2) == pytest.approx(36 * 81 / 400)


PADS: dict[str, tuple[Pads, Pads]] = {  # left, right, top, bottom
    "second only": ((0, 0, 0, 0), (4, 4, 4, 4)),
    "first only": ((2, 1, 4, 3), (0, 0, 0, 0)),
    "both, uneven": ((4, 4, 4, 4), (3, 4, 0, 2)),
    "wider than the kernel's reach": ((0, 0, 0, 0), (9, 11, 10, 9)),
}


@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("1 x 1 kernels", "taps as many as points")])
def test_padding_equals_zeros_around_a_direct_convolution(name: str, pads: tuple[Pads, Pads]) -> None:
    pads1, pads2 = pads

    def padded(images: Tensor, weights: list[Tensor], stride1: int, stride2: int) -> Tensor:
        hidden = torch.relu(F.conv2d(F.pad(images, pads1), weights[0], weights[1], stride=stride1))
        return F.conv2d(F.pad(hidden, pads2), weights[2], stride=stride2).permute(0, 2, 3, 1)

    def ours(images: Tensor, weights: list[Tensor], stride1: int, stride2: int) -> Tensor:
        return winograd_stem(images, *weights, stride1=stride1, stride2=stride2, pads1=pads1, pads2=pads2)

    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        for found, expected in zip(*(results(f, SHAPES[name], dtype) for f in (ours, padded)), strict=True):
            assert (found - expected).norm() <= near * expected.norm()


@pytest.fixture
def transformed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the weights that are transformed, in its one number."""
    count, transform = [0], stem._transform

    def counted(*arguments: Any) -> Tensor:
        count[0] += 1
        return transform(*arguments)

    monkeypatch.setattr(stem, "_transform", counted)
    return count


def scores(network: CapsNet) -> Tensor:
    """Of 9 images that are always the same: a batch that is convolved by minimal filtering."""
    images = torch.linspace(0, 1, 9 * 28 * 28).view(9, 1, 28, 28)
    result: Tensor = network(images).scores.clone()
    return result


def plainly(network: CapsNet) -> Tensor:
    network.convolution, stem = "direct", network.convolution
    result = scores(network)
    network.convolution = stem
    return result


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_transforms_each_weight_once_also_inside_another_pass(mode: Any, transformed: list[int]) -> None:
    first, second = tiny(), tiny()
    with mode(), constant_weights():
        for _ in range(3):
            near(scores(first), plainly(first))
            with constant_weights():
                near(scores(second), plainly(second))
        assert transformed == [2]
    with mode():
        near(scores(first), plainly(first))
    assert transformed == [3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_that_changes_inside_a_pass_is_transformed_again(mode: Any, transformed: list[int]) -> None:
    network = tiny()
    weight = network.primary.conv.weight
    with mode(), constant_weights():
        before = scores(network)
        weight.mul_(3)
        near(scores(network), plainly(network))
        weight.data = -weight.data
        near(scores(network), plainly(network))
        assert transformed == [3]
        assert (scores(network) - before).abs().max() > 0.1 * before.max()


def test_passes_of_threads_that_overlap_leave_nothing_behind() -> None:
    """A enters, B enters, A leaves, B leaves; then the weights change."""
    network = tiny()
    a_entered, b_entered, a_left = Event(), Event(), Event()

    def a() -> None:
        with torch.no_grad(), constant_weights():
            scores(network)
            a_entered.set()
            assert b_entered.wait(10)
        a_left.set()

    def b() -> None:
        assert a_entered.wait(10)
        with torch.no_grad(), constant_weights():
            scores(network)
            b_entered.set()
            assert a_left.wait(10)
            scores(network)

    in_threads([a, b])
    with torch.no_grad():
        network.primary.conv.weight.mul_(3)
        near(scores(network), plainly(network))


def test_a_thread_in_a_copy_of_a_pass_s_context_keeps_its_own_weights(transformed: list[int]) -> None:
    network = tiny()
    with torch.no_grad(), constant_weights():
        scores(network)
        context = copy_context()

        def there() -> None:
            with torch.no_grad():
                context.run(scores, network)

        in_threads([there])
    assert transformed == [2]


def test_networks_that_come_and_go_inside_a_pass_are_not_taken_for_each_other() -> None:
    with torch.no_grad(), constant_weights():
        for _ in range(20):  # a new network's weights lie where the last one's did
            network = tiny()
            near(scores(network), plainly(network))


def test_computed_weights_are_not_kept(transformed: list[int]) -> None:
    """As a parametrization makes them at every call, some of them where earlier ones lay."""
    (images, *weights), s1, s2 = arguments(SHAPES["paper, fewer channels"], torch.float32)
    with torch.inference_mode(), constant_weights():
        for k in range(6):
            computed = (1 + k % 3) * weights[2]
            found = winograd_stem(images, weights[0], weights[1], computed, stride1=s1, stride2=s2)
            wanted = direct(images, [*weights[:2], computed], s1, s2)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
        kept = stem._transforms.get()
        assert kept is not None
        assert not kept.kept
    assert transformed == [6]


def gradients(network: CapsNet) -> list[Tensor]:
    network.zero_grad()
    torch.autograd.backward(scores(network).square().sum())
    return [p.grad.clone() for name, p in network.named_parameters() if "conv" in name and p.grad is not None]


def test_a_training_step_inside_a_pass_has_a_weight_of_its_own() -> None:
    network = tiny()
    with constant_weights():
        with torch.no_grad():
            before = scores(network)
        inside = gradients(network)
        with torch.no_grad():  # the backward has overwritten its own transformed weight, not the pass's
            assert torch.equal(scores(network), before)
    for one, other in zip(inside, gradients(network), strict=True):
        assert torch.equal(one, other)


def test_one_weight_for_images_of_two_sizes_inside_a_pass() -> None:
    (images, *weights), s1, s2 = arguments(SHAPES["paper, fewer channels"], torch.float64)
    parameter = nn.Parameter(weights[2].detach().permute(2, 3, 1, 0).contiguous())
    with torch.no_grad(), constant_weights():
        for _ in range(2):
            for x in (images, images[:, :, :-3, :-5]):
                given = [weights[0], weights[1], parameter.permute(3, 2, 0, 1)]
                found = winograd_stem(x, *given, stride1=s1, stride2=s2)
                torch.testing.assert_close(found, direct(x, weights, s1, s2), rtol=1e-10, atol=1e-10)


def test_where_the_first_convolution_is_exactly_zero_there_is_no_gradient() -> None:
    (images, *weights), s1, s2 = arguments(SHAPES["stride 1"], torch.float32)
    with torch.no_grad():
        weights[0].zero_()
        weights[1].zero_()
    grid = winograd_stem(images, *weights, stride1=s1, stride2=s2)
    for gradient in torch.autograd.grad(grid.sum(), weights):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_strided_images_weights_and_gradients_are_read_right(dtype: torch.dtype) -> None:
    (images, *weights), s1, s2 = arguments(SHAPES["several tiles, colour, not square"], dtype)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x.detach(), torch.full_like(x, torch.nan)], -1)[..., 0]

    grid = winograd_stem(images, *weights, stride1=s1, stride2=s2)
    slopes = torch.arange(grid.numel(), dtype=dtype).view(grid.shape).cos()
    wanted = [grid, *torch.autograd.grad(grid, weights, slopes)]
    leaves = [strided(weight).requires_grad_() for weight in weights]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    grid = winograd_stem(strided(images), *leaves, stride1=s1, stride2=s2)
    found = [grid, *torch.autograd.grad(grid, leaves, strided(slopes))]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_two_forwards_before_their_backwards_do_not_share_buffers() -> None:
    shape = SHAPES["paper, fewer channels"]
    (images, *weights), s1, s2 = arguments(shape, torch.float64)
    first = winograd_stem(images, *weights, stride1=s1, stride2=s2)
    second = winograd_stem(1 - images, *weights, stride1=s1, stride2=s2)
    together = torch.autograd.grad(first.square().sum() + second.square().sum(), weights)
    apart = [torch.autograd.grad(direct(x, weights, s1, s2).square().sum(), weights) for x in (images, 1 - images)]
    for ours, one, other in zip(together, *apart, strict=True):
        torch.testing.assert_close(ours, one + other, rtol=1e-10, atol=1e-10)


def test_buffers_are_reused_from_step_to_step_and_replaced_when_the_shape_changes() -> None:
    pool.clear()
    addresses, sizes = [], []
    for name in ("paper, fewer channels", "paper, fewer channels", "stride 3"):
        results(winograd, SHAPES[name], torch.float32)
        addresses.append(pool._free["stem v"].data_ptr())
        sizes.append(pool._free["stem v"].numel())
    assert addresses[0] == addresses[1]
    assert sizes[0] != sizes[2]
    assert len(pool._free) == 7


def test_garbage_in_the_buffers_does_not_reach_the_results() -> None:
    shape = SHAPES["several tiles, colour, not square"]
    clean = results(winograd, shape, torch.float32)
    for array in pool._free.values():
        array.fill_(float("nan") if array.is_floating_point() else 255)
    for ours, again in zip(clean, results(winograd, shape, torch.float32), strict=True):
        assert torch.equal(ours, again)


def test_buffers_of_inference_mode_are_not_trained_with() -> None:
    network = tiny()
    with torch.inference_mode():
        network(torch.rand(3, 1, 28, 28))
    network(torch.rand(3, 1, 28, 28)).scores.sum().backward()
    assert network.primary.conv.weight.grad is not None


def test_a_second_backward_is_refused() -> None:
    (images, *weights), s1, s2 = arguments(SHAPES["stride 1"], torch.float32)
    loss = winograd_stem(images, *weights, stride1=s1, stride2=s2).square().sum()
    torch.autograd.grad(loss, weights, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"can run once, .*; use convolution direct for retain"):
        torch.autograd.grad(loss, weights)


def test_images_that_need_a_gradient_are_refused() -> None:
    (images, *weights), s1, s2 = arguments(SHAPES["stride 1"], torch.float32)
    with pytest.raises(InputError, match="images of Winograd convolutions must not need a gradient"):
        winograd_stem(images.requires_grad_(), *weights, stride1=s1, stride2=s2)


def tiny(**options: Any) -> CapsNet:
    network = create(
        "capsnet", image_shape=(1, 28, 28), num_classes=3, conv_channels=5, capsule_types=2, primary_dim=3, **options
    )
    assert isinstance(network, CapsNet)
    return network


def test_the_network_gives_the_same_with_either_stem() -> None:
    images = torch.rand(4, 1, 28, 28)
    network = tiny(convolution="direct").double()
    outputs, gradients = [], []
    for choice in ("direct", "winograd"):
        network.convolution = choice
        network.zero_grad()
        output = network(images.double(), torch.tensor([0, 1, 2, 0]))
        assert output.reconstruction is not None
        (output.scores.sum() + output.reconstruction.square().sum()).backward()
        outputs.append(output.scores)
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for one, other in pairwise(gradients):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """What the rule sees of images on `device`, which this machine need not have."""
    if device == "cpu":
        return torch.empty(0, dtype=dtype)
    return SimpleNamespace(device=torch.device(device), dtype=dtype, requires_grad=False)


@pytest.mark.usefixtures("unchecked")
def test_the_rule_of_auto() -> None:
    assert tiny().resolved_convolution(on("cpu")) == "winograd"
    assert tiny().resolved_convolution(on("cpu", torch.float64)) == "winograd"
    assert tiny().resolved_convolution(on("cpu", torch.bfloat16)) == "direct"
    assert tiny().resolved_convolution(on("cuda")) == "direct"
    assert tiny(padding="same").resolved_convolution(on("cpu")) == "winograd"
    assert tiny(primary_kernel_size=2, primary_stride=2).resolved_convolution(on("cpu")) == "direct"
    few, many = torch.rand(8, 1, 28, 28), torch.rand(9, 1, 28, 28)
    assert [tiny().resolved_convolution(images) for images in (few, many)] == ["winograd", "winograd"]
    with torch.no_grad():
        assert [tiny().resolved_convolution(images) for images in (few, many)] == ["direct", "winograd"]
        assert tiny(convolution="winograd").resolved_convolution(few) == "winograd"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny().resolved_convolution(on("cpu")) == "direct"


@pytest.mark.usefixtures("unchecked")
def test_minimal_where_it_cannot_run_names_the_condition() -> None:
    network = tiny(convolution="winograd")
    with pytest.raises(InputError, match="images on cuda, and it must run on a CPU"):
        network.resolved_convolution(on("cuda"))
    with pytest.raises(InputError, match=r"images of torch.bfloat16, and it must run in float32 or float64"):
        network.bfloat16()(torch.rand(1, 1, 28, 28, dtype=torch.bfloat16))
    network = tiny(convolution="winograd")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(InputError, match="must run in precision 32"),
    ):
        network(torch.rand(1, 1, 28, 28))
    with pytest.raises(InputError, match="images that need a gradient, and it gives them none"):
        network(torch.rand(1, 1, 28, 28, requires_grad=True))
    with pytest.raises(InputError, match="convolution must be one of auto, direct, winograd; got 'fast'"):
        tiny(convolution="fast")


def test_a_network_of_bfloat16_weights_is_near_one_of_float32() -> None:
    network, images = tiny(init="authors"), torch.rand(3, 1, 28, 28)
    scores = network(images).scores
    rounded = network.bfloat16()(images.bfloat16()).scores
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, scores, rtol=0.05, atol=0.02)


def test_tracing_leaves_nothing_behind() -> None:
    network, images = tiny(), torch.rand(2, 1, 28, 28)
    before = network(images).scores
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(network(mode.from_tensor(images)).scores).__name__ == "FakeTensor"
    after = network(images).scores
    assert type(after) is Tensor
    assert torch.equal(after, before)


def test_evaluation_gives_its_buffers_back() -> None:
    network = tiny()
    pool.clear()
    with torch.no_grad():
        network(torch.rand(9, 1, 28, 28))
    assert {f"stem {name}" for name in ("x", "u", "v", "m", "patches")} <= set(pool._free)
    pool.clear()
    assert not pool._free


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_no_images_give_no_results_and_zero_gradients(padding: str) -> None:
    network = tiny(padding=padding)
    output = network(torch.rand(0, 1, 28, 28))
    assert output.scores.shape == (0, 3)
    output.scores.sum().backward()
    for name, parameter in network.named_parameters():
        if "conv" in name:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_auto_gives_images_their_gradient() -> None:
    images = torch.rand(2, 1, 28, 28, requires_grad=True)
    tiny()(images).scores.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
