"""Uniform couplings, max-min couplings, shared transformations and shared decoders: what each is equal to."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capsnet import create, reference
from capsnet import functional as F
from capsnet.analysis.routing_trace import evidence
from capsnet.errors import InputError
from capsnet.kernels.select import ROUTING_KERNELS
from capsnet.layers import ClassCapsules, Decoder
from capsnet.models.efficient_capsnet import EfficientCapsNet
from capsnet.routing import couplings_of, dynamic_routing, uniform_routing
from tiny import SIZES

BATCH, INS, OUTS, DIM = 2, 7, 5, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# max-min couplings


@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("outs", [1, 2, OUTS])
def test_max_min_equals_the_reference(r: int, outs: int) -> None:
    u_hat, bias = random(BATCH, INS, outs, DIM), 0.3 * random(outs, DIM, seed=1)
    found = dynamic_routing(u_hat, iterations=r, bias=bias, normalization="max-min")
    for k in range(BATCH):
        v, c = reference.dynamic_routing(u_hat[k].numpy(), r, bias.numpy(), max_min=True)
        np.testing.assert_allclose(found.pose[k], v, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.couplings[k], c, rtol=1e-9, atol=1e-11)


def test_max_min_scales_each_row_to_the_whole_range() -> None:
    b = random(3, INS, OUTS)
    c = couplings_of(b, normalization="max-min")
    assert (c.amin(-1) == 0).all()
    assert (c.amax(-1) == 1).all()
    moved = couplings_of(7.5 * b - 3, normalization="max-min")
    torch.testing.assert_close(moved, c, rtol=1e-12, atol=1e-13)
    two = couplings_of(b[..., :2], normalization="max-min")
    assert set(two.flatten().tolist()) == {0.0, 1.0}, "of two, the winner takes all"
    assert torch.equal(couplings_of(torch.zeros(2, 3), normalization="max-min"), torch.ones(2, 3))
    with pytest.raises(InputError, match=r"^leaky must be off with couplings by max-min, .*; got it on$"):
        couplings_of(b, leaky=True, normalization="max-min")
    with pytest.raises(InputError, match="leaky must be off"):
        ClassCapsules(3, 2, 4, leaky=True, normalization="max-min")
    with pytest.raises(InputError, match="routing_kernel must be plain or auto with max-min; got fused"):
        ClassCapsules(3, 2, 4, normalization="max-min", routing_kernel="fused")


def test_max_min_has_the_right_gradient_and_none_that_is_not_finite() -> None:
    u_hat = random(2, 3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dynamic_routing(x, iterations=3, normalization="max-min").pose, u_hat)
    for scale in (0.0, 1e4):
        votes = (scale * random(2, 3, 4, 2).float()).requires_grad_()
        routed = dynamic_routing(votes, iterations=3, normalization="max-min")
        assert all(part.isfinite().all() for part in routed)
        (gradient,) = torch.autograd.grad(routed.activation.sum(), votes)
        assert gradient.isfinite().all()


# uniform couplings


def test_uniform_routing_is_dynamic_routing_of_one_iteration(unchecked: None) -> None:
    votes = random(BATCH, INS, OUTS, DIM)
    for part, whole in zip(uniform_routing(votes), dynamic_routing(votes, iterations=1), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14)
    other = uniform_routing(votes, squash=F.exponential_squash)
    torch.testing.assert_close(other.pose, F.exponential_squash(votes.sum(1) / OUTS))
    assert uniform_routing(votes.half()).pose.dtype == torch.float32
    with pytest.raises(InputError, match="votes must be"):
        uniform_routing(votes[0, 0])


@pytest.mark.parametrize(
    ("options", "parameters", "steps"),
    [
        ({}, 161_824, 2),
        ({"routing": "dynamic"}, 161_664, 3),
        ({"routing": "uniform"}, 161_664, 1),
        ({"routing": "uniform", "reconstruction": True, "share_decoder": True}, 161_664 + 1_411_344 - 144 * 512, 1),
    ],
)
def test_the_stem_of_efficient_capsnet_with_other_routings(
    options: dict[str, Any], parameters: int, steps: int
) -> None:
    network = create("efficient-capsnet", **{"reconstruction": False, **options}).eval()
    assert isinstance(network, EfficientCapsNet)
    assert network.parameter_count() == parameters
    images = torch.rand(3, 1, 28, 28)
    output, trace = network(images), network.trace_routing(images)
    assert network.routing_iterations == steps == len(trace.couplings)
    torch.testing.assert_close(trace.pose[-1], output.pose)
    torch.testing.assert_close(trace.couplings[-1], output.couplings)
    torch.testing.assert_close(trace.couplings[0], torch.full_like(trace.couplings[0], 0.1))
    if "routing" in options:
        torch.testing.assert_close(output.couplings.sum(-1), torch.ones(3, 16))
    assert evidence(network, images).entropy.isfinite().all()


# shared transformations


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        *(({**options}, kernel) for options in ({}, {"leaky": True}, {"bias": True}) for kernel in ROUTING_KERNELS),
        *(({**options}, "plain") for options in ({"normalization": "max-min"}, {"epsilon": 0.1})),
    ],
    ids=str,
)
def test_a_shared_transformation_is_one_repeated(r: int, options: dict[str, Any], kernel: str) -> None:
    shared = ClassCapsules(INS, 3, OUTS, DIM, iterations=r, types=1, routing_kernel=kernel, **options).double()
    single = ClassCapsules(INS, 3, OUTS, DIM, iterations=r, routing_kernel=kernel, **options).double()
    with torch.no_grad():
        shared.weight.mul_(20)
        single.weight.copy_(shared.weight.expand_as(single.weight))
    u = random(BATCH, INS, 3).requires_grad_()
    direction = random(BATCH, OUTS, DIM, seed=4)
    results, gradients = [], []
    for layer in (shared, single):
        routed = layer(u)
        results.append(routed)
        gradients.append(torch.autograd.grad((routed.pose * direction).sum(), [u, layer.weight]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[0][1], gradients[1][1].sum(0, keepdim=True), rtol=1e-9, atol=1e-12)
    order = torch.randperm(INS)
    torch.testing.assert_close(shared(u[:, order]).pose, results[0].pose, rtol=1e-10, atol=1e-12)


def test_with_one_iteration_only_the_sum_of_the_poses_counts() -> None:
    layer = ClassCapsules(INS, 3, OUTS, DIM, iterations=1, types=1).double()
    assert layer.sums_poses
    u = random(BATCH, INS, 3)
    s = torch.einsum("np,pjd->njd", u.sum(1), layer.weight[0]) / OUTS
    torch.testing.assert_close(layer(u).pose, F.squash(s), rtol=1e-12, atol=1e-14)
    moved = u.clone()
    moved[:, 0] += 1
    moved[:, 1] -= 1
    torch.testing.assert_close(layer(moved).pose, layer(u).pose, rtol=1e-10, atol=1e-12)
    assert not ClassCapsules(INS, 3, OUTS, DIM, iterations=2, types=1).sums_poses


@pytest.mark.parametrize("side", [28, 40])
def test_affine_capsules_have_the_same_number_of_parameters_at_any_image_size(side: int) -> None:
    options: dict[str, Any] = {"share_transform": True, "routing_iterations": 1, "reconstruction": False}
    network = create("capsnet", image_shape=(1, side, side), **options)
    assert network.parameter_count() == 20_992 + 5_308_672 + 1_280 == 5_330_944


# a decoder that all classes share


def test_a_shared_decoder_sees_one_vector() -> None:
    shared, masked = Decoder(None, DIM, (1, 3, 4), (6,)), Decoder(OUTS, DIM, (1, 3, 4), (6,))
    state = shared.state_dict()
    masked.load_state_dict(state | {"layers.0.weight": state["layers.0.weight"].repeat(1, OUTS)})
    pose = random(BATCH, OUTS, DIM).float()
    for index in (torch.tensor([4, 0]), torch.tensor([[1, 3], [2, 0]])):
        torch.testing.assert_close(shared(pose, index), masked(pose, index))


@pytest.mark.parametrize("model", ["capsnet", "efficient-capsnet"])
def test_networks_take_a_shared_decoder(model: str) -> None:
    sizes = SIZES if model == "capsnet" else {}
    ours = create(model, image_shape=(1, 28, 28), **sizes, share_decoder=True)
    theirs = create(model, image_shape=(1, 28, 28), **sizes)
    dim, hidden = (SIZES["class_dim"], 16) if model == "capsnet" else (16, 512)
    assert theirs.parameter_count() - ours.parameter_count() == 9 * dim * hidden
    output = ours(torch.rand(2, 1, 28, 28), torch.tensor([3, 4]))
    assert output.reconstruction is not None
    torch.autograd.backward(output.reconstruction.sum())
    assert all(parameter.grad is not None for parameter in ours.parameters())
