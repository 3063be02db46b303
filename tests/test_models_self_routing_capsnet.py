"""Self-routing: closed forms, the NumPy twin, published sizes, and what the common tests do not ask."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capsnet import functional as F
from capsnet import matrix_capsules, memory, reference
from capsnet.analysis.routing_trace import evidence
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.models import create
from capsnet.models.self_routing_capsnet import ConvCapsules, SelfRoutingCapsNet
from capsnet.options import LossOptions
from capsnet.routing import self_routing
from tiny import resumed, typed

INS, OUTS, DIM = 7, 5, 4
FEW: dict[str, Any] = {"blocks": 1, "grid": 3, "capsule_types": 2, "primary_dim": 3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def inputs(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    """Votes, activations and logits."""
    shape = (*leading, INS, OUTS)
    return random(*shape, DIM), random(*leading, INS, seed=1).sigmoid(), 2 * random(*shape, seed=2)


def built(shape: tuple[int, int, int] = (3, 12, 13), classes: int = 4, **options: Any) -> SelfRoutingCapsNet:
    torch.manual_seed(0)
    network = create("self-routing-capsnet", image_shape=shape, num_classes=classes, **{**FEW, **options})
    assert isinstance(network, SelfRoutingCapsNet)
    return network


# routing


@pytest.mark.parametrize(("ins", "outs"), [(INS, OUTS), (1, OUTS), (INS, 1), (1, 1)])
def test_routing_equals_the_reference(ins: int, outs: int) -> None:
    votes, activation, logits = (part[:, :ins] for part in inputs(3))
    votes, logits = votes[:, :, :outs], logits[:, :, :outs]
    result = self_routing(votes, activation, logits)
    bare = self_routing(None, activation, logits)
    for k in range(3):
        v, a, c = reference.self_routing(votes[k].numpy(), activation[k].numpy(), logits[k].numpy())
        np.testing.assert_allclose(result.pose[k], v, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(result.activation[k], a, rtol=1e-12)
        np.testing.assert_allclose(result.couplings[k], c, rtol=1e-12)
    assert torch.equal(bare.activation, result.activation)
    assert torch.equal(bare.couplings, result.couplings)
    assert torch.equal(bare.pose, result.activation[..., None])


def test_couplings_and_activations_are_distributions() -> None:
    _, activation, couplings = self_routing(*inputs(2, 3))
    torch.testing.assert_close(couplings.sum(-1), torch.ones(2, 3, INS, dtype=torch.float64))
    torch.testing.assert_close(activation.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_a_pose_lies_among_its_votes() -> None:
    votes, activation, logits = inputs(2)
    pose = self_routing(votes, activation, logits).pose
    assert (pose <= votes.amax(1)).all()
    assert (pose >= votes.amin(1)).all()
    alike = votes[:, :1].expand_as(votes)
    torch.testing.assert_close(self_routing(alike, activation, logits).pose, alike[:, 0])


def test_poses_shift_and_scale_with_the_votes() -> None:
    votes, activation, logits = inputs(2)
    one, shift = self_routing(votes, activation, logits), random(OUTS, DIM, seed=5)
    other = self_routing(-3 * votes + shift, activation, logits)
    torch.testing.assert_close(other.pose, -3 * one.pose + shift)
    assert torch.equal(other.couplings, one.couplings)


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1e6])
def test_only_shares_of_the_activations_count(factor: float) -> None:
    votes, activation, logits = inputs(2)
    for one, other in zip(
        self_routing(votes, activation, logits), self_routing(votes, factor * activation, logits), strict=True
    ):
        torch.testing.assert_close(other, one)


def test_equal_gates_share_alike() -> None:
    votes, activation, _ = inputs(2)
    result = self_routing(votes, activation, torch.full((2, INS, OUTS), 0.7, dtype=torch.float64))
    torch.testing.assert_close(result.activation, torch.full((2, OUTS), 1 / OUTS, dtype=torch.float64))
    shares = activation / activation.sum(-1, keepdim=True)
    torch.testing.assert_close(result.pose, torch.einsum("bi,bijd->bjd", shares, votes))


def test_the_order_of_the_capsules_does_not_matter() -> None:
    votes, activation, logits = inputs(2)
    one = self_routing(votes, activation, logits)
    below, above = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    other = self_routing(votes[:, below], activation[:, below], logits[:, below])
    torch.testing.assert_close(other.pose, one.pose)
    torch.testing.assert_close(other.couplings, one.couplings[:, below])
    other = self_routing(votes[:, :, above], activation, logits[..., above])
    torch.testing.assert_close(other.pose, one.pose[:, above])
    torch.testing.assert_close(other.activation, one.activation[:, above])


def test_an_example_does_not_see_its_batch() -> None:
    votes, activation, logits = inputs(2, 3)
    whole = self_routing(votes, activation, logits)
    for k in range(2):
        for part, found in zip(whole, self_routing(votes[k], activation[k], logits[k]), strict=True):
            torch.testing.assert_close(found, part[k], rtol=1e-13, atol=1e-15)


def test_the_gradient_is_right() -> None:
    votes, logits = random(2, 4, 3, 2).requires_grad_(), random(2, 4, 3, seed=2).requires_grad_()
    activation = random(2, 4, seed=1).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, a, b: self_routing(v, a, b)[:2], (votes, activation, logits))
    assert torch.autograd.gradcheck(lambda a, b: self_routing(None, a, b).activation, (activation, logits))


@pytest.mark.parametrize(
    "what", ["zero votes", "large votes", "zero activations", "next to none", "one silent", "large logits"]
)
def test_extremes_are_finite_with_finite_gradients(what: str) -> None:
    votes, activation, logits = (part.float() for part in inputs(2))
    votes = votes * {"zero votes": 0.0, "large votes": 1e4}.get(what, 1.0)
    logits = logits * (1e4 if what == "large logits" else 1)
    activation = activation * {"zero activations": 0.0, "next to none": 1e-39}.get(what, 1.0)
    activation[:, 2] *= what != "one silent"
    given = [part.requires_grad_() for part in (votes, activation, logits)]
    result = self_routing(*given)
    gradients = torch.autograd.grad(sum((part.sum() for part in result), torch.zeros(())), given)
    assert all(part.isfinite().all() for part in (*result, *gradients))
    if what == "zero activations":
        assert not result.pose.any()
        assert not result.activation.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = [part.to(dtype) for part in inputs(2)]
    found, expected = self_routing(*half), self_routing(*(part.float() for part in half))
    assert {part.dtype for part in found} == {torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(self_routing(*(part.float() for part in half)).pose, expected.pose)


def test_the_gates_depend_on_the_sign_of_a_pose() -> None:
    """Evenness, which agreement has, is not theirs."""
    network = built().double().eval()
    with torch.no_grad():
        network.class_capsules.weight.normal_(std=1.0)
    u, activation = random(2, network.in_capsules, 3), random(2, network.in_capsules, seed=1).sigmoid()
    one, other = network.class_capsules(u, activation), network.class_capsules(-u, activation)
    assert not torch.allclose(one.activation, other.activation, atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused() -> None:
    votes, activation, logits = inputs(2)
    with pytest.raises(InputError, match=r"^activation must have the shape of the logits .*, \(2, 7\); got \(2, 6\)$"):
        self_routing(votes, activation[:, 1:], logits)
    with pytest.raises(
        InputError, match=r"^votes must be \[..., in, out, dim\] with logits of \(2, 7, 5\); got \(2, 7"
    ):
        self_routing(votes[:, :, 1:], activation, logits)


# the network


@pytest.mark.parametrize(
    ("options", "parameters", "capsules"),
    [
        ({}, 931_664, 2048),  # published
        ({"routing_layers": 2}, 3_187_536, 512),  # of the authors' code
        ({"routing_layers": 3}, 3_187_536 + 288 * (512 * 16 + 17 * 32) + 2 * 512, 512),
        ({"capsule_types": 16}, 269_072 + 64 * 9 * (16 + 256) + 2 * (16 + 256) + 1024 * 17 * 10, 1024),
        ({"image_shape": (3, 224, 224)}, 931_664 - 432 + 49 * 48 - (64 - 49) * 32 * 17 * 10, 1568),
    ],
    ids=str,
)
def test_sizes(options: dict[str, Any], parameters: int, capsules: int) -> None:
    with torch.device("meta"):
        network = create("self-routing-capsnet", **{"image_shape": (3, 32, 32), **options})
    assert isinstance(network, SelfRoutingCapsNet)
    assert (network.parameter_count(), network.in_capsules) == (parameters, capsules)


@pytest.mark.parametrize(("classes", "layers"), [(1, 1), (4, 1), (10, 1), (10, 2)])
def test_the_loss_starts_at_the_logarithm_of_the_classes(classes: int, layers: int) -> None:
    network = built(classes=classes, routing_layers=layers)
    labels = torch.arange(6) % classes
    output = network(torch.rand(6, 3, 12, 13))
    torch.testing.assert_close(output.scores, torch.full((6, classes), 1 / classes))
    loss = network.classification_loss(output, labels, LossOptions())
    torch.testing.assert_close(loss, torch.full((6,), math.log(classes)))


def test_the_loss_is_the_negative_logarithm() -> None:
    network = built(classes=3)
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    output = network(torch.rand(2, 3, 12, 13))._replace(scores=scores.requires_grad_())
    loss = network.classification_loss(output, torch.tensor([1, 2]), LossOptions())
    torch.testing.assert_close(loss, -torch.tensor([0.2, 0.5]).log())
    two = network.classification_loss(output, torch.tensor([[0, 1], [2, 1]]), LossOptions())
    torch.testing.assert_close(two, -torch.tensor([0.14, 0.25]).log())
    impossible = network.classification_loss(output, torch.tensor([0, 0]), LossOptions())
    (gradient,) = torch.autograd.grad(impossible.sum(), scores)
    assert impossible.isfinite().all()
    assert gradient.isfinite().all()


def test_the_network_is_the_one_written_in_loops() -> None:
    """From the feature map on, in float64 and evaluation mode."""
    network = built().double().eval()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not name.startswith("backbone"):
            tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(std=0.5)
    images = random(2, 3, 12, 13).abs()
    p = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        maps, output = network.pool(network.backbone(images)), network(images)
    assert maps.shape == (2, 64, 3, 2)

    def made(image: Any, part: str) -> Any:
        weight = p[f"primary.{part}.weight"]
        x = reference.conv2d(np.pad(image, ((0, 0), (1, 1), (1, 1))), weight, np.zeros(len(weight)))
        mean, variance = p[f"primary.{part}_norm.running_mean"], p[f"primary.{part}_norm.running_var"]
        x = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
        return x * p[f"primary.{part}_norm.weight"][:, None, None] + p[f"primary.{part}_norm.bias"][:, None, None]

    for image, scores, couplings in zip(maps.numpy(), output.scores, output.couplings, strict=True):
        pose, activation = made(image, "pose"), 1 / (1 + np.exp(-made(image, "activation")))
        logits, a = list[Any](), list[Any]()
        for y in range(3):
            for x in range(2):
                for kind in range(2):
                    i = len(a)
                    a.append(activation[kind, y, x])
                    u = pose[3 * kind : 3 * kind + 3, y, x]
                    logits.append(u @ p["class_capsules.weight"][i] + p["class_capsules.bias"][i])
        _, expected, c = reference.self_routing(np.zeros((12, 4, 1)), np.array(a), np.array(logits))
        np.testing.assert_allclose(scores, expected, rtol=1e-10)
        np.testing.assert_allclose(couplings, c, rtol=1e-10)


def convolutional(stride: int = 2) -> ConvCapsules:
    """On 5 x 3 places, in evaluation mode and float64, away from where its weights start."""
    torch.manual_seed(0)
    layer = ConvCapsules(types=2, dim=3, in_size=(5, 3), stride=stride).double().eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if "norm" in name else tensor.normal_(std=0.5)
    return layer


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 3)), (2, (3, 2))])
def test_convolutional_capsules_are_the_ones_written_in_loops(stride: int, size: tuple[int, int]) -> None:
    """Of each place with the capsules that there are in its window."""
    layer = convolutional(stride)
    assert layer.out_size == size
    u, activation = random(2, 30, 3), random(2, 30, seed=1).sigmoid()
    p = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        found = layer(u, activation)
    assert found[1].shape == (2, size[0] * size[1] * 2)
    for b, y, x in product(range(2), range(size[0]), range(size[1])):
        votes, a, logits = list[Any](), list[Any](), list[Any]()
        for n, kind in product(range(9), range(2)):
            row, column = stride * y + n // 3 - 1, stride * x + n % 3 - 1
            if 0 <= row < 5 and 0 <= column < 3:
                i, k = (row * 3 + column) * 2 + kind, 2 * n + kind
                child = u[b, i].numpy()
                votes.append(np.einsum("p,pjd->jd", child, p["weight"][k]))
                logits.append(child @ p["gates.weight"][k] + p["gates.bias"][k])
                a.append(activation[b, i].item())
        v, expected, _ = reference.self_routing(np.array(votes), np.array(a), np.array(logits))
        v = (v.flatten() - p["norm.running_mean"]) / np.sqrt(p["norm.running_var"] + 1e-5)
        v = v * p["norm.weight"] + p["norm.bias"]
        place = (y * size[1] + x) * 2
        np.testing.assert_allclose(found[0][b, place : place + 2].flatten(), v, rtol=1e-10)
        np.testing.assert_allclose(found[1][b, place : place + 2], expected, rtol=1e-10)


def test_slices_of_a_batch_are_routed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image by image, with the gradients of all at once."""
    layer, given = convolutional(), (random(5, 30, 3).requires_grad_(), random(5, 30, seed=1).sigmoid())
    results = []
    for size in (2**21, 1):
        monkeypatch.setitem(matrix_capsules.SLICES, "small", size)
        pose, activation = layer(*given)
        loss = (pose * torch.arange(3)).sum() + (activation**2).sum()
        results.append((pose, activation, *torch.autograd.grad(loss, (given[0], *layer.parameters()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert one.abs().max() > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_the_trace_is_the_routing_of_the_network(layers: int) -> None:
    network = built(routing_layers=layers).eval()
    with torch.no_grad():
        network.class_capsules.weight.normal_()
    images = torch.rand(2, 3, 12, 13)
    with torch.no_grad():
        output, trace = network(images), network.trace_routing(images)
    torch.testing.assert_close(trace.couplings[-1], output.couplings)
    torch.testing.assert_close(trace.pose[-1], output.pose)
    torch.testing.assert_close(trace.couplings[0], torch.full_like(trace.couplings[0], 1 / 4))
    torch.testing.assert_close(F.lengths(trace.pose[0]), torch.full((2, 4), 1 / 4))
    found = evidence(network, images)
    torch.testing.assert_close(found.pose[-1, ..., 0], output.scores)
    torch.testing.assert_close(found.agreement, torch.ones_like(found.agreement))


def test_a_training_step_takes_little_memory() -> None:
    with torch.device("meta"):
        network = create("self-routing-capsnet", image_shape=(3, 32, 32))
    assert memory.inference(network, 64, torch.device("cpu")) < 2**30


@pytest.mark.usefixtures("workplace", "blank_figure")
@pytest.mark.parametrize("layers", [1, 2])
def test_it_learns_stops_and_resumes(photos: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    about = {"model": "self-routing-capsnet", "epochs": 5, "batch_size": 16, "routing_layers": layers, **FEW}
    config = Config.of(data=str(photos), precision="32", **about)
    assert resumed(config, monkeypatch).test.error_percent < 20  # chance is 67


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_verbs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--data {photos} --model self-routing-capsnet --grid 3 --blocks 1 --epochs 1 --batch-size 32"
    assert typed(capsys, f"train {words} --out run")[0] == 0
    for line in ("evaluate run", "plot couplings run", f"predict run {photos / 'a'}"):
        assert typed(capsys, line)[0] == 0, line
    for line in ("plot reconstructions run", "analyse ood run --against noise"):
        code, _, err = typed(capsys, line)
        assert (code, err.count("\n")) == (2, 1)
        assert "model must have a decoder" in err
