"""What surrounds both hand-written backwards: autocast, second backwards, second derivatives, saved-tensor hooks."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capsnet.layers import ClassCapsules
from capsnet.models import create
from capsnet.models.capsnet import CapsNet

pytestmark = pytest.mark.usefixtures("each_way")
WAYS = {"winograd": ("winograd", "plain"), "fused": ("direct", "fused"), "both": ("winograd", "fused")}
PLAINLY = ("direct", "plain")


def network(way: tuple[str, str]) -> CapsNet:
    torch.manual_seed(3)
    made = create(
        "capsnet",
        image_shape=(2, 17, 19),
        num_classes=3,
        conv_channels=5,
        conv_kernel_size=3,
        capsule_types=2,
        primary_dim=3,
        primary_kernel_size=5,
        class_dim=4,
        decoder_sizes=(7,),
        convolution=way[0],
        routing_kernel=way[1],
    ).double()
    assert isinstance(made, CapsNet)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    return made


IMAGES = torch.rand(9, 2, 17, 19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(net: CapsNet) -> Tensor:
    output = net(IMAGES.to(net.conv.weight.dtype))
    found: Tensor = output.scores.square().sum() + output.couplings.square().sum() + output.reconstruction.sum()
    return found


def gradients(way: tuple[str, str], around: Callable[[], Any] = nullcontext, **options: Any) -> list[Tensor]:
    net = network(way)
    value = loss(net)
    with around():
        return list(torch.autograd.grad(value, list(net.parameters()), **options))


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


def test_a_backward_inside_autocast_is_the_one_outside() -> None:
    """In float32, which autocast rounds where it can: in PyTorch's own backwards too, so no decoder is in the loss."""
    found = []
    for precision in (False, True):
        net = network(WAYS["both"]).float()
        value = net(IMAGES.float()).scores.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            value.backward()
        found.append([p.grad for name, p in net.named_parameters() if not name.startswith("decoder")])
    for inside, outside in zip(*found, strict=True):
        assert inside is not None
        assert outside is not None
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu], ids=["plain", "save_on_cpu"])
@pytest.mark.parametrize("stem", ["winograd", "both"])
def test_a_second_backward_through_winograd_convolutions_names_the_remedy(stem: str, hooks: Callable[[], Any]) -> None:
    net = network(WAYS[stem])
    with hooks():
        value = loss(net)
    first = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
    same(list(first), gradients(PLAINLY))
    with pytest.raises(
        RuntimeError, match=r"Winograd convolutions can run once.*use convolution direct for retain_graph=True"
    ):
        torch.autograd.grad(value, list(net.parameters()))


@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu], ids=["plain", "save_on_cpu"])
def test_a_second_backward_through_fused_routing_gives_the_same(hooks: Callable[[], Any]) -> None:
    for dtype in (torch.float64, torch.float32):
        net = network(WAYS["fused"]).to(dtype)
        with hooks():
            value = loss(net)
        first, second = (torch.autograd.grad(value, list(net.parameters()), retain_graph=True) for _ in range(2))
        same(list(first), list(second))
        if dtype == torch.float64:
            same(list(first), gradients(PLAINLY))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_weight_that_changes_after_the_forward_is_read_as_it_was_saved(iterations: int, dtype: torch.dtype) -> None:
    """With saved-tensor hooks PyTorch has a copy, and does not see that the original changed."""
    layer = ClassCapsules(6, 4, 3, 5, iterations=iterations, routing_kernel="fused").to(dtype)
    u = torch.rand(2, 6, 4, dtype=dtype, requires_grad=True)
    wanted = torch.autograd.grad(layer(u).pose.sum(), (u, layer.weight))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
        value = layer(u).pose.sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    same(list(torch.autograd.grad(value, (u, layer.weight))), list(wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_strided_poses_and_weights_have_the_gradients_of_plain_routing(
    iterations: int, dtype: torch.dtype, detached: bool
) -> None:
    """With one iteration the gradient of poses that are not contiguous was zero."""
    found = []
    for kernel in ("fused", "plain"):
        torch.manual_seed(2)
        layer = ClassCapsules(6, 4, 3, 5, iterations=iterations, routing_kernel=kernel, detach_routing=detached)
        layer.weight = nn.Parameter(torch.randn(4, 5, 6, 3).permute(2, 0, 3, 1))
        layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
        u = torch.randn(2, 4, 6).to(dtype).requires_grad_()
        slopes = torch.randn(5, 3, 2).permute(2, 1, 0)
        assert not any(x.is_contiguous() for x in (layer.weight, u.transpose(1, 2), slopes))
        routed = layer(u.transpose(1, 2))
        total = (routed.pose * slopes).sum()
        if not detached:
            total = total + (routed.couplings * torch.randn(3, 6, 2).permute(2, 1, 0)).sum()
        torch.autograd.backward(total)
        assert u.grad is not None
        assert u.grad.abs().max() > 1e-3
        found.append([routed.pose, u.grad, layer.weight.grad])
    near = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


def test_second_derivatives_name_the_remedy(way: tuple[str, str]) -> None:
    net = network(way)
    first = torch.autograd.grad(loss(net), list(net.parameters()), create_graph=True)
    same([x.detach() for x in first], gradients(PLAINLY))
    for gradient in first[:3]:  # through the convolutions
        with pytest.raises(RuntimeError, match=r"use (convolution direct|kernel plain) for .*second derivatives"):
            torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True, retain_graph=True)


def test_second_derivatives_are_refused_also_of_what_is_linear_in_the_output() -> None:
    """The incoming gradient is then a constant, and PyTorch's own decorator lets the wrong answer pass."""
    layer, u = ClassCapsules(6, 4, 3, 5, iterations=1, routing_kernel="fused"), torch.rand(2, 6, 4)
    (first,) = torch.autograd.grad(layer(u).couplings.sum() + layer(u).pose.sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="kernel fused has first derivatives only; use kernel plain"):
        torch.autograd.grad(first.sum(), layer.weight)


def test_the_remedy_gives_second_derivatives() -> None:
    net = network(PLAINLY)
    weight, bias = net.class_capsules.weight, net.conv.bias
    assert isinstance(bias, nn.Parameter)
    (first,) = torch.autograd.grad(loss(net), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), bias)
    step = 1e-5
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * step
        sums.append(torch.autograd.grad(loss(net), weight)[0].sum())
        with torch.no_grad():
            bias[0] -= sign * step
    torch.testing.assert_close(second[0], (sums[0] - sums[1]) / (2 * step), rtol=1e-5, atol=1e-7)
