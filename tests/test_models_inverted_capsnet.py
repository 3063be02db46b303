"""Inverted dot-product attention: closed forms, the NumPy twin, published sizes, and what common tests do not ask."""

import math
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
from capsnet.data import Dataset, Split
from capsnet.errors import InputError
from capsnet.matrix_capsules import patches
from capsnet.models import create
from capsnet.models.inverted_capsnet import CapsuleLayer, InvertedCapsNet
from capsnet.routing import inverted_attention_routing, inverted_attention_step
from capsnet.training.fit import fit
from tiny import typed

INS, OUTS, DIM = 7, 5, 4
FEW: dict[str, Any] = {
    "capsule_types": 3,
    "pose_side": 2,
    "capsule_kernel_sizes": (2, 2),
    "capsule_strides": (2, 1),
    "backbone_channels": (4, 6),
    "backbone_blocks": (1, 1),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def built(shape: tuple[int, int, int] = (3, 12, 13), classes: int = 4, **options: Any) -> InvertedCapsNet:
    torch.manual_seed(0)
    network = create("inverted-capsnet", image_shape=shape, num_classes=classes, **{**FEW, **options})
    assert isinstance(network, InvertedCapsNet)
    return network


# routing


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize(("ins", "outs"), [(INS, OUTS), (1, OUTS), (INS, 1), (1, 1)])
def test_routing_equals_the_reference(iterations: int, ins: int, outs: int) -> None:
    votes = random(3, ins, outs, DIM)
    scale, offset = 1 + 0.3 * random(DIM, seed=1), 0.3 * random(DIM, seed=2)
    result = inverted_attention_routing(votes, iterations=iterations, scale=scale, offset=offset)
    for k in range(3):
        v, c = reference.inverted_attention_routing(votes[k].numpy(), iterations, scale.numpy(), offset.numpy())
        np.testing.assert_allclose(result.pose[k], v, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(result.couplings[k], c, rtol=1e-10)
    assert torch.equal(result.activation, torch.ones(3, outs, dtype=torch.float64))
    torch.testing.assert_close(result.couplings.sum(-1), torch.ones(3, ins, dtype=torch.float64))


def test_a_pose_has_mean_0_and_the_length_of_the_root_of_its_dimension() -> None:
    for iterations in (1, 3):
        pose = inverted_attention_routing(2 * random(2, INS, OUTS, 16), iterations=iterations).pose
        torch.testing.assert_close(pose.mean(-1), torch.zeros(2, OUTS, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(F.lengths(pose), torch.full((2, OUTS), 4.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_one_iteration_sees_neither_the_scale_nor_a_shift_of_all_votes() -> None:
    votes = 100 * random(2, INS, OUTS, DIM)
    one = inverted_attention_step(votes)
    for other in (7 * votes, votes + 3):
        torch.testing.assert_close(inverted_attention_step(other).pose, one.pose, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.couplings, torch.full((2, INS, OUTS), 1 / OUTS, dtype=torch.float64))


def test_larger_votes_sharpen_the_couplings() -> None:
    votes, entropy = random(2, INS, OUTS, DIM), []
    for factor in (1e-3, 0.5, 1.0, 2.0, 8.0):
        c = inverted_attention_routing(factor * votes, iterations=2).couplings
        entropy.append(float(-torch.special.xlogy(c, c).sum(-1).mean()))
    assert entropy == sorted(entropy, reverse=True)
    assert entropy[0] == pytest.approx(math.log(OUTS), rel=1e-4)


def test_a_logit_is_at_most_the_length_of_its_vote() -> None:
    """By Cauchy and Schwarz: a pose is as long as the divisor."""
    votes = random(2, INS, OUTS, 16)
    pose = inverted_attention_step(votes).pose
    logits = torch.einsum("bijd,bjd->bij", votes, pose) / 4
    assert (logits.abs() <= F.lengths(votes) + 1e-9).all()
    torch.testing.assert_close(inverted_attention_step(votes, pose).couplings, logits.softmax(-1))


@pytest.mark.parametrize("iterations", [1, 3])
def test_symmetries(iterations: int) -> None:
    votes = random(2, INS, OUTS, DIM)
    one = inverted_attention_routing(votes, iterations=iterations)
    below, above = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    other = inverted_attention_routing(votes[:, below], iterations=iterations)
    torch.testing.assert_close(other.pose, one.pose)
    torch.testing.assert_close(other.couplings, one.couplings[:, below])
    other = inverted_attention_routing(votes[:, :, above], iterations=iterations)
    torch.testing.assert_close(other.pose, one.pose[:, above])
    other = inverted_attention_routing(-votes, iterations=iterations)
    torch.testing.assert_close(other.pose, -one.pose)
    torch.testing.assert_close(other.couplings, one.couplings)
    for k in range(2):
        alone = inverted_attention_routing(votes[k], iterations=iterations)
        torch.testing.assert_close(alone.pose, one.pose[k], rtol=1e-12, atol=1e-13)


def test_the_gradient_is_right() -> None:
    votes, scale, offset = (
        random(*shape, seed=k).requires_grad_() for k, shape in enumerate([(2, 4, 3, 4), (4,), (4,)])
    )
    assert torch.autograd.gradcheck(
        lambda v, s, o: inverted_attention_routing(v, iterations=3, scale=s, offset=o)[::2], (votes, scale, offset)
    )


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4])
def test_extremes_are_finite_with_finite_gradients(size: float) -> None:
    votes = (size * random(2, INS, OUTS, DIM).float()).requires_grad_()
    result = inverted_attention_routing(votes, iterations=3)
    (gradient,) = torch.autograd.grad(result.pose.square().sum() + result.couplings.square().sum(), votes)
    assert all(part.isfinite().all() for part in (*result, gradient))
    if not size:
        assert not result.pose.any()
        torch.testing.assert_close(result.couplings, torch.full((2, INS, OUTS), 1 / OUTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = random(2, INS, OUTS, DIM).to(dtype)
    found, expected = inverted_attention_routing(half), inverted_attention_routing(half.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = inverted_attention_routing(half.float())
    assert {part.dtype for part in found} == {torch.float32}
    assert torch.equal(found.pose, expected.pose)
    assert torch.equal(within.pose, expected.pose)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_routed_is_refused() -> None:
    with pytest.raises(InputError, match="votes must be"):
        inverted_attention_step(torch.zeros(3, 4))
    with pytest.raises(InputError, match="routing iterations must be at least 1; got 0"):
        inverted_attention_routing(torch.zeros(3, 4, 2), iterations=0)


# layers


def test_matrix_votes_are_products_of_matrices() -> None:
    pose, weight = random(2, 3, INS, 4), random(INS, 2, OUTS, 2, seed=1)
    votes = F.matrix_votes(pose, weight)
    assert votes.shape == (2, 3, INS, OUTS, 4)
    np.testing.assert_allclose(votes[1, 2], reference.matrix_votes(pose[1, 2].numpy(), weight.numpy()), rtol=1e-12)
    product = pose[1, 2, 3].view(2, 2) @ weight[3, :, 4]
    torch.testing.assert_close(votes[1, 2, 3, 4], product.flatten())


def test_a_window_keeps_poses_whole() -> None:
    """On a tensor that counts: row, column, type, component."""
    rows, columns, types, dims = torch.meshgrid(*map(torch.arange, (5, 7, 3, 4)), indexing="ij")
    grid = (1000 * rows + 100 * columns + 10 * types + dims).float()[None]
    seen = patches(grid, kernel_size=2, stride=2).flatten(3, 4)
    assert seen.shape == (1, 2, 3, 12, 4)
    for y, x, i, j, kind in ((0, 0, 0, 1, 2), (1, 2, 1, 0, 1), (1, 0, 1, 1, 0)):
        expected = 1000 * (2 * y + i) + 100 * (2 * x + j) + 10 * kind + torch.arange(4.0)
        assert torch.equal(seen[0, y, x, (2 * i + j) * 3 + kind], expected)


@pytest.mark.parametrize("chunk", [1, 500, 2**21])
def test_a_layer_is_an_iteration_of_its_votes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all its gradients, whatever the number of places at a time."""
    monkeypatch.setitem(matrix_capsules.SLICES, "small", chunk)
    layer = CapsuleLayer(INS, OUTS, 2).double()
    with torch.no_grad():
        layer.norm.weight.copy_(random(4, seed=3))
        layer.norm.bias.copy_(random(4, seed=4))
    u, before = random(3, 2, INS, 4).requires_grad_(), random(3, 2, OUTS, 4, seed=1).requires_grad_()
    for pose in (None, before):
        found = layer(u, pose)
        expected = inverted_attention_step(
            F.matrix_votes(u, layer.weight), pose, scale=layer.norm.weight, offset=layer.norm.bias
        )
        given = [u, *layer.parameters(), *([] if pose is None else [pose])]
        gradients = [torch.autograd.grad(each.pose.square().sum(), given) for each in (found, expected)]
        for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(layer(u, pose).pose, expected.pose, rtol=1e-12, atol=1e-12)


# the network


@pytest.mark.parametrize(
    ("options", "parameters", "capsules"),
    [
        ({}, 1_828_817, 800),  # published
        ({"capsule_kernel_sizes": (), "capsule_strides": ()}, 1_828_817 - 294_976 + (8192 - 800) * 160, 8192),
        ({"image_shape": (3, 224, 224)}, 1_828_817 + 64 * 3 * (49 - 9) - (25 - 16) * 32 * 160, 512),
    ],
    ids=str,
)
def test_sizes(options: dict[str, Any], parameters: int, capsules: int) -> None:
    with torch.device("meta"):
        network = create("inverted-capsnet", **{"image_shape": (3, 32, 32), **options})
    assert isinstance(network, InvertedCapsNet)
    assert (network.parameter_count(), network.in_capsules) == (parameters, capsules)


def test_weights_start_as_published() -> None:
    layer = CapsuleLayer(288, 32, 4)
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(32 / (4 * 32 * 9)), rel=0.02)


@pytest.mark.parametrize("order", ["concurrent", "sequential"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_network_is_the_one_written_in_loops(order: str, iterations: int) -> None:
    """From the primary capsules on, in float64: two layers of windows and the class capsules."""
    network = built(routing_order=order, routing_iterations=iterations).double().eval()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and "norm" in name and not name.startswith("backbone"):
            tensor.uniform_(0.5, 1.5)
    images = random(1, 3, 12, 13).abs()
    with torch.no_grad():
        output = network(images)
        grid = network.primary(network.pool(network.backbone(images)))[0].numpy()
    p = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    assert grid.shape == (6, 7, 3, 4)
    names = ["capsule_layers.0", "capsule_layers.1", "class_capsules"]

    def seen(k: int, below: Any) -> Any:
        """Of each place of layer `k`, the capsules that it sees."""
        if k == 2:
            return [[below.reshape(-1, 4)]]
        stride = (2, 1)[k]
        rows, columns = ((size - 2) // stride + 1 for size in below.shape[:2])
        return [
            [below[stride * y : stride * y + 2, stride * x : stride * x + 2].reshape(-1, 4) for x in range(columns)]
            for y in range(rows)
        ]

    def iteration(k: int, below: Any, own: Any) -> tuple[Any, Any]:
        scale, offset = p[f"{names[k]}.norm.weight"], p[f"{names[k]}.norm.bias"]
        poses, couplings = list[Any](), None
        for y, row in enumerate(seen(k, below)):
            poses.append([])
            for x, u in enumerate(row):
                votes = reference.matrix_votes(u, p[f"{names[k]}.weight"])
                c = np.full(votes.shape[:2], 1 / votes.shape[1])
                if own is not None:
                    agreement = np.exp((votes * own[y, x]).sum(-1) / 2)  # the root of 4
                    c = agreement / agreement.sum(1, keepdims=True)
                s = (c[..., None] * votes).sum(0)
                deviation = np.sqrt(s.var(1, keepdims=True) + 1e-5)
                poses[-1].append((s - s.mean(1, keepdims=True)) / deviation * scale + offset)
                couplings = c
        return np.array(poses), couplings

    state: list[Any] = [grid, None, None, None]
    if order == "sequential":
        for k in range(3):
            for _ in range(iterations):
                state[k + 1], couplings = iteration(k, state[k], state[k + 1])
    else:
        for k in range(3):
            state[k + 1], couplings = iteration(k, state[k], None)
        for _ in range(iterations - 1):
            results = [iteration(k, state[k], state[k + 1]) for k in range(3)]
            state, couplings = [grid, *(each[0] for each in results)], results[-1][1]
    np.testing.assert_allclose(output.pose[0], state[3][0, 0], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(output.couplings[0], couplings, rtol=1e-8)
    scores = state[3][0, 0] @ p["score.weight"][0] + p["score.bias"]
    np.testing.assert_allclose(output.scores[0], scores, rtol=1e-8, atol=1e-9)


def test_when_both_orders_are_the_same() -> None:
    images = torch.rand(2, 3, 12, 13)
    bare: dict[str, Any] = {"capsule_kernel_sizes": (), "capsule_strides": ()}
    for options, same in (({"routing_iterations": 1}, True), ({**bare, "routing_iterations": 3}, True), ({}, False)):
        one, other = (built(routing_order=order, **options).eval() for order in ("concurrent", "sequential"))
        with torch.no_grad():
            assert torch.allclose(one(images).scores, other(images).scores, atol=1e-5) == same


def test_presence_loss_and_trace() -> None:
    network = built(routing_iterations=3).eval()
    images, labels = torch.rand(3, 3, 12, 13), torch.tensor([2, 0, 3])
    with torch.no_grad():
        output, trace = network(images), network.trace_routing(images)
    torch.testing.assert_close(network.presence(output), output.scores.softmax(-1))
    loss = network.classification_loss(output, labels, Config())
    torch.testing.assert_close(loss, -output.scores.log_softmax(-1)[torch.arange(3), labels])
    torch.testing.assert_close(trace.pose[-1], output.pose)
    torch.testing.assert_close(trace.couplings[-1], output.couplings)
    assert len(trace.pose) == 3
    rerouted = inverted_attention_step(
        trace.votes,
        trace.pose[-2],
        scale=network.class_capsules.norm.weight,
        offset=network.class_capsules.norm.bias,
    )
    torch.testing.assert_close(rerouted.pose, output.pose)
    assert all(part.isfinite().all() for part in evidence(network, images))
    rows, columns = network.receptive_fields()
    assert len(rows) * len(columns) * 3 == network.in_capsules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capsule_strides": (1,)}, "^capsule_strides must be one for each of the 2 capsule_kernel_sizes; got 1$"),
        ({"backbone_blocks": (1,)}, "^backbone_blocks must be one for each of the 2 backbone_channels; got 1$"),
        ({"backbone_channels": (), "backbone_blocks": ()}, "^backbone_channels must be one number or more; got none$"),
        ({"capsule_kernel_sizes": (2, 4)}, "^capsule_kernel_sizes must be at most the 3x3 places below layer 2; got 4"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        built(**options)


def test_a_training_step_of_64_images_fits_into_4_gib() -> None:
    with torch.device("meta"):
        network = create("inverted-capsnet", image_shape=(3, 32, 32))
    split = Split(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    data = Dataset("some", network.classes, split, split)
    config = Config.of(model="inverted-capsnet")
    needed = memory.training(network, config, torch.device("cpu"), data, precision="32", batch_size=64)
    assert needed < 4 * 2**30


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_it_learns_photographs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.of(
        data=str(photos),
        model="inverted-capsnet",
        epochs=8,
        batch_size=16,
        lr=0.02,
        precision="32",
        **FEW | {"pose_side": 4, "capsule_types": 8, "backbone_channels": (16, 16)},
    )
    assert fit(config.changed(out="run")).test.error_percent < 20  # chance is 67
    for line in ("evaluate run", "plot couplings run", f"predict run {photos / 'a'}"):
        assert typed(capsys, line)[0] == 0, line
    for line in ("plot reconstructions run", "analyse ood run --against noise"):
        code, _, err = typed(capsys, line)
        assert (code, err.count("\n")) == (2, 1)
        assert "model must have a decoder" in err
