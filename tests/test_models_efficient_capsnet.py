"""Efficient-CapsNet: published sizes, closed forms, NumPy twins, and what the common tests do not ask."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet import reference
from capsnet.analysis.routing_trace import evidence
from capsnet.config import Config
from capsnet.layers import Convolution
from capsnet.models import create
from capsnet.models.efficient_capsnet import EfficientCapsNet
from capsnet.routing import attention_routing
from tiny import resumed

SMALL: dict[str, Any] = {
    "conv_channels": (3, 4, 6),
    "conv_kernel_sizes": (3, 2, 3),
    "conv_strides": (1, 2, 1),
    "primary_dim": 2,
    "class_dim": 4,
    "decoder_sizes": (5,),
}


def built(image_shape: tuple[int, int, int] = (2, 11, 12), classes: int = 3, **options: Any) -> EfficientCapsNet:
    torch.manual_seed(0)
    network = create("efficient-capsnet", image_shape=image_shape, num_classes=classes, **{**SMALL, **options})
    assert isinstance(network, EfficientCapsNet)
    return network


def convolutions_of(network: EfficientCapsNet) -> list[Convolution]:
    return [layer for layer in network.stem if isinstance(layer, Convolution)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# squash


def test_squash_in_closed_form() -> None:
    squashed = F.exponential_squash(torch.tensor([3.0, 4.0], dtype=torch.float64))
    np.testing.assert_allclose(squashed, (1 - math.exp(-5)) * np.array([0.6, 0.8]), rtol=1e-15)
    np.testing.assert_allclose(reference.exponential_squash(np.array([3.0, 4.0])), squashed, rtol=1e-15)
    zero = torch.zeros(2, 3)
    assert torch.equal(F.exponential_squash(zero), zero)
    jacobian = torch.func.jacrev(F.exponential_squash)(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("length", [1e-30, 1e-8, 1e-3, 1.0, 30.0, 88.8, 1000.0, 1e30])
def test_squash_and_its_gradient_are_finite_and_right_at_any_length(length: float) -> None:
    s = torch.tensor([0.6 * length, -0.8 * length], requires_grad=True)
    reached = F.exponential_squash(s).double().norm()
    assert float(reached.detach()) == pytest.approx(-math.expm1(-length), rel=1e-6)
    (gradient,) = torch.autograd.grad(reached, s)
    slope = math.exp(-length)  # of the length, along the vector
    torch.testing.assert_close(gradient, slope * torch.tensor([0.6, -0.8]), rtol=2e-5, atol=1e-7)


def test_the_gradient_of_squash() -> None:
    assert torch.autograd.gradcheck(F.exponential_squash, random(5, 4).requires_grad_())
    assert F.exponential_squash(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


# routing


def test_routing_equals_the_reference() -> None:
    u_hat, prior = random(2, 7, 5, 4), 0.3 * random(7, 5, seed=1)
    result = attention_routing(u_hat, prior=prior)
    for k in range(2):
        v, c = reference.attention_routing(u_hat[k].numpy(), prior.numpy())
        np.testing.assert_allclose(result.pose[k], v, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(result.couplings[k], c, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(result.activation[k], np.linalg.norm(v, axis=-1), rtol=1e-12)
    torch.testing.assert_close((result.couplings - prior).sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert bool((result.couplings < 0).any())
    assert float(attention_routing(u_hat).couplings.max()) > 2 / 5, "couplings near uniform would hide mistakes"


def test_the_gradient_of_routing() -> None:
    u_hat, prior = random(4, 3, 2).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: attention_routing(x, prior=b), (u_hat, prior))


def test_routing_knows_no_order_of_the_capsules_below() -> None:
    u_hat, prior, order = random(7, 5, 4), random(7, 5, seed=1), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    one, other = attention_routing(u_hat, prior=prior), attention_routing(u_hat[order], prior=prior[order])
    torch.testing.assert_close(other.pose, one.pose)
    torch.testing.assert_close(other.couplings, one.couplings[order])


def test_rotated_votes_rotate_the_pose_and_leave_the_couplings() -> None:
    u_hat, prior = random(7, 5, 4), random(7, 5, seed=1)
    turn = torch.linalg.qr(random(4, 4, seed=2)).Q
    one = attention_routing(u_hat, prior=prior)
    for other, expected in ((u_hat @ turn, one.pose @ turn), (-u_hat, -one.pose)):
        found = attention_routing(other, prior=prior)
        torch.testing.assert_close(found.pose, expected)
        torch.testing.assert_close(found.couplings, one.couplings)


def test_routing_of_votes_that_say_nothing() -> None:
    prior = random(7, 5)
    silent = attention_routing(torch.zeros(7, 5, 4, dtype=torch.float64), prior=prior)
    torch.testing.assert_close(silent.couplings, 1 / 5 + prior)
    assert not silent.pose.any()
    alike = random(7, 1, 4, seed=1).expand(7, 5, 4)
    torch.testing.assert_close(attention_routing(alike, prior=prior).couplings, 1 / 5 + prior)
    cancelled = attention_routing(alike, prior=torch.full((7, 5), -1 / 5, dtype=torch.float64))
    torch.testing.assert_close(cancelled.pose, torch.zeros(5, 4, dtype=torch.float64))


def test_the_logits_of_one_capsule_are_its_squared_votes() -> None:
    u_hat = random(1, 5, 16)
    torch.testing.assert_close(attention_routing(u_hat).couplings, (u_hat.square().sum(-1) / 4).softmax(-1))


# the network


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 161_824),  # MNIST
        ({"reconstruction": True}, 1_573_168),
        (
            {
                "image_shape": (2, 48, 48),
                "num_classes": 5,
                "conv_kernel_sizes": (7, 3, 3, 3),
                "conv_strides": (2, 1, 1, 2),
                "normalization": "instance",
                "negative_slope": 0.3,
            },
            151_664,  # smallNORB
        ),
        (
            {
                "image_shape": (1, 36, 36),
                "conv_strides": (1, 1, 2, 2),
                "primary_kernel_size": 5,
                "primary_stride": 2,
            },
            154_656,  # MultiMNIST
        ),
    ],
)
def test_published_sizes(options: dict[str, Any], parameters: int) -> None:
    network = create("efficient-capsnet", **{"reconstruction": False, **options})
    assert network.parameter_count() == parameters
    assert isinstance(network, EfficientCapsNet)
    assert network.in_capsules == 16


def test_weights_start_as_keras_starts_them() -> None:
    torch.manual_seed(0)
    network = create("efficient-capsnet")
    assert isinstance(network, EfficientCapsNet)
    network.requires_grad_(False)
    weight = network.class_capsules.weight
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / 1280), rel=0.02)
    assert float(weight.abs().max()) < 2 * 0.0396 / 0.8796
    convolutions = convolutions_of(network)
    for convolution, fan_in in zip(convolutions, (25, 288, 576, 576), strict=True):
        assert float(convolution.weight.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.06)
        assert convolution.bias is not None
        assert not convolution.bias.any()
    assert float(network.primary.weight.abs().max()) == pytest.approx(0.02396, rel=0.01)
    assert network.class_capsules.prior is not None
    assert not network.class_capsules.prior.any()
    assert network.decoder is not None
    first, second, last = [layer for layer in network.decoder.layers if isinstance(layer, nn.Linear)]
    for layer, std in ((first, math.sqrt(2 / 160)), (second, math.sqrt(2 / 512)), (last, math.sqrt(2 / (1024 + 784)))):
        assert float(layer.weight.std()) == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"primary_kernel_size": 2}, {"negative_slope": 0.3}], ids=str)
def test_the_network_is_the_one_written_in_loops(changes: dict[str, Any]) -> None:
    """In evaluation mode, in float64; normalisations and prior away from where they start."""
    network = built(**changes).double()
    for name, tensor in network.named_buffers():
        if tensor.is_floating_point():
            tensor.copy_(random(*tensor.shape, seed=3).abs() + (0.5 if "var" in name else 0))
    prior = network.class_capsules.prior
    assert prior is not None
    with torch.no_grad():
        prior.copy_(0.2 * random(*prior.shape, seed=4))
    images = torch.rand(2, *network.image_shape, dtype=torch.float64)
    with torch.no_grad():
        output = network.eval()(images)
    p = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    for image, scores, couplings in zip(images, output.scores, output.couplings, strict=True):
        x = image.numpy()
        for k, stride in enumerate(SMALL["conv_strides"]):
            weight = p[f"stem.{3 * k}.weight"].transpose(3, 2, 0, 1)
            x = reference.conv2d(x, weight, p[f"stem.{3 * k}.bias"], stride)
            x = np.where(x > 0, x, changes.get("negative_slope", 0.0) * x)
            mean, variance = p[f"stem.{3 * k + 2}.running_mean"], p[f"stem.{3 * k + 2}.running_var"]
            scaled = (x - mean[:, None, None]) / np.sqrt(variance + 1e-3)[:, None, None]
            x = scaled * p[f"stem.{3 * k + 2}.weight"][:, None, None] + p[f"stem.{3 * k + 2}.bias"][:, None, None]
        kernel = p["primary.weight"][:, 0]
        poses = []
        for top in range(x.shape[1] - kernel.shape[1] + 1):
            for left in range(x.shape[2] - kernel.shape[2] + 1):
                seen = x[:, top : top + kernel.shape[1], left : left + kernel.shape[2]]
                numbers = [float((seen[c] * kernel[c]).sum()) + p["primary.bias"][c] for c in range(len(x))]
                poses += [reference.exponential_squash(np.array(numbers[c : c + 2])) for c in range(0, len(x), 2)]
        u_hat = reference.votes(np.array(poses), p["class_capsules.weight"])
        v, c = reference.attention_routing(u_hat, p["class_capsules.prior"])
        np.testing.assert_allclose(scores, np.linalg.norm(v, axis=-1), rtol=1e-10)
        np.testing.assert_allclose(couplings, c, rtol=1e-10, atol=1e-12)


def test_the_trace_is_the_routing_of_the_network() -> None:
    network = built().eval()
    images = torch.rand(2, *network.image_shape)
    with torch.no_grad():
        output, trace = network(images), network.trace_routing(images)
    assert output.couplings is not None
    torch.testing.assert_close(trace.couplings[-1], output.couplings)
    torch.testing.assert_close(trace.pose[-1], output.pose)
    assert trace.votes.shape == (2, network.in_capsules, 3, 4)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("kernel", [None, 2])
def test_the_receptive_field_is_where_a_capsule_sees(kernel: int | None, padding: str) -> None:
    """By the gradient of each place: with weights of ones it counts the paths."""
    network = built((1, 11, 13), primary_kernel_size=kernel, padding=padding).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(float(name.endswith("weight")))
    rows, columns = network.receptive_fields()
    images = torch.rand(1, 1, 11, 13, dtype=torch.float64, requires_grad=True)
    x: Tensor = images
    for convolution in convolutions_of(network):
        x = convolution(x)
    grid = nn.functional.conv2d(x, network.primary.weight, groups=x.shape[1])
    assert grid.shape[2:] == (len(rows), len(columns))
    for r in range(len(rows)):
        for c in range(len(columns)):
            (seen,) = torch.autograd.grad(grid[0, 0, r, c], images, retain_graph=True)
            torch.testing.assert_close(seen[0, 0] / seen.sum(), torch.outer(rows[r], columns[c]).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_strides": (1, 1)}, "conv_strides must be one for each of the 3 conv_channels; got 2"),
        ({"conv_kernel_sizes": (3, 3)}, "conv_kernel_sizes must be one for each of the 3 conv_channels; got 2"),
        ({"primary_dim": 4}, "primary_dim must divide the 6 channels of the last convolution; got 4"),
        (
            {"primary_kernel_size": 9},
            "primary_kernel_size must be at most the 2x3 places of the last .*; got 9",
        ),
        ({"conv_channels": (), "conv_kernel_sizes": ()}, "conv_channels must be one number or more; got none"),
        ({"image_shape": (1, 4, 4)}, "convolution 2 of 3: its 2x2 kernel|convolution 3 of 3: its 3x3 kernel"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**options)


def test_a_batch_of_one_value_a_channel_is_normalised_by_the_running_statistics() -> None:
    sizes: dict[str, Any] = {"conv_channels": (4, 4), "conv_kernel_sizes": (5, 4), "conv_strides": (2, 1)}
    network = built((1, 11, 11), **sizes).train()
    assert convolutions_of(network)[-1].out_size == (1, 1)
    images = torch.rand(3, 1, 11, 11)
    for count in (3, 1, 2):
        torch.autograd.backward(network(images[:count], torch.zeros(count, dtype=torch.int64)).scores.sum())
    for name, parameter in network.named_parameters():
        assert name.startswith("decoder") or (parameter.grad is not None and parameter.grad.isfinite().all()), name
    with pytest.raises(ValueError, match=r"^normalization must be batch for one place, as of convolution 2; got inst"):
        built((1, 11, 11), **sizes, normalization="instance")


def test_evidence_of_couplings_that_are_negative_is_finite() -> None:
    network = built().eval()
    assert network.class_capsules.prior is not None
    with torch.no_grad():
        network.class_capsules.prior.fill_(-0.4)
    found = evidence(network, torch.rand(4, *network.image_shape))
    assert bool((found.couplings[1] < 0).any())
    assert torch.allclose(found.couplings[0], torch.tensor(1 / 3))
    assert ((found.entropy >= 0) & (found.entropy <= math.log2(3) + 1e-6)).all()
    assert (found.agreement.abs() <= 1 + 1e-6).all()
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize(("side", "first"), [(28, 1), (32, 1), (55, 1), (64, 2), (96, 3)])
def test_larger_images_are_looked_at_in_larger_steps(side: int, first: int) -> None:
    with torch.device("meta"):
        network = create("efficient-capsnet", image_shape=(3, side, side))
    assert isinstance(network, EfficientCapsNet)
    strides = [convolution.stride for convolution in convolutions_of(network)]
    assert strides == [first, 1, 1, 2]


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_a_stopped_training_resumes_with_the_statistics_of_its_batches(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.of(
        data=str(photos), model="efficient-capsnet", epochs=2, batch_size=16, precision="32", **SMALL, report=False
    )
    resumed(config, monkeypatch)
