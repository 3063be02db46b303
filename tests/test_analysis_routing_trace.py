import math

import pytest
import torch

from capsnet import functional as F
from capsnet.analysis.routing_trace import Evidence, evidence, fold
from capsnet.errors import InputError
from capsnet.functional import votes
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from tiny import SIZES


def network(**options: object) -> CapsNet:
    torch.manual_seed(0)
    made = create("capsnet", image_shape=(3, 12, 15), num_classes=4, **{**SIZES, **options}).eval()
    assert isinstance(made, CapsNet)
    with torch.no_grad():  # first weights are so small that couplings would stay uniform
        made.primary.conv.weight.mul_(5)
        made.class_capsules.weight.mul_(20)
    return made


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 12, 15, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found() -> Evidence:
    return evidence(network(), images())


def test_shapes_follow_the_network(found: Evidence) -> None:
    capsules = network().primary.capsules
    assert found.maps.shape == found.support.shape == (3, 3, 4, 12, 15)
    assert found.couplings.shape == (3, 3, capsules, 4)
    assert found.entropy.shape == (3, 3)
    assert found.agreement.shape == (3, 3, 4)
    assert found.pose.shape == (3, 3, 4, 4)


@pytest.mark.parametrize(
    "options", [{}, {"leaky": True, "routing_bias": True}, {"routing_iterations": 1}, {"squash_epsilon": 0.1}], ids=str
)
def test_the_last_iteration_is_the_networks_own(options: dict[str, object]) -> None:
    one = network(**options)
    found, output = evidence(one, images()), one(images())
    assert len(found.pose) == one.class_capsules.iterations
    torch.testing.assert_close(found.pose[-1], output.pose, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.couplings[-1], output.couplings, atol=1e-6, rtol=1e-5)


def test_maps_sum_to_coupling_times_activation(found: Evidence) -> None:
    activation = F.lengths(network().primary_poses(images())).detach()
    expected = (found.couplings * activation[:, :, None]).sum(2)
    torch.testing.assert_close(found.maps.sum((3, 4)), expected)
    torch.testing.assert_close(found.maps.sum((2, 3, 4)), activation.sum(1).expand(3, -1))


def test_support_sums_to_the_length_before_the_squash(found: Evidence) -> None:
    one = network()
    u_hat = votes(one.primary_poses(images()), one.class_capsules.weight)
    s = torch.einsum("tbij,bijd->tbjd", found.couplings, u_hat)
    torch.testing.assert_close(found.support.sum((3, 4)), s.norm(dim=-1), atol=1e-6, rtol=1e-4)


def test_the_first_iteration_is_uniform(found: Evidence) -> None:
    torch.testing.assert_close(found.couplings[0], torch.full_like(found.couplings[0], 1 / 4))
    torch.testing.assert_close(found.entropy[0], torch.full((3,), 2.0))
    assert (found.entropy[1:] < 2).all()
    leaky = evidence(network(leaky=True), images())
    torch.testing.assert_close(leaky.entropy[0], torch.full((3,), math.log2(5)))


def test_agreement_is_the_weighted_cosine(found: Evidence) -> None:
    one = network()
    u_hat = votes(one.primary_poses(images()), one.class_capsules.weight).detach()
    weight = found.couplings * u_hat.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(u_hat, found.pose[:, :, None], dim=-1)
    torch.testing.assert_close(found.agreement, (weight * cosine).sum(2) / weight.sum(2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_fold_counts_the_paths_from_a_pixel_to_a_capsule(padding: str) -> None:
    """A pixel's share is what the gradient of two convolutions with weights of one says."""
    one = network(padding=padding, conv_stride=2 if padding == "same" else 1)
    count = one.primary.capsules
    pixels = torch.ones(1, 1, 12, 15, requires_grad=True)
    x = torch.nn.functional.pad(pixels, one.conv.pads)
    x = torch.nn.functional.conv2d(x, torch.ones(1, 1, 5, 5), stride=one.conv.stride)
    x = torch.nn.functional.pad(x, one.primary.conv.pads)
    x = torch.nn.functional.conv2d(x, torch.ones(1, 1, 5, 5), stride=one.primary.conv.stride)
    assert x[0, 0].numel() * one.primary.types == count
    for capsule in (0, count // 2, count - 1):
        values = torch.zeros(1, count, 2)
        values[0, capsule, 1] = 3.0
        (paths,) = torch.autograd.grad(x[0, 0].flatten()[capsule // one.primary.types], pixels, retain_graph=True)
        maps = fold(one, values)
        assert maps.shape == (1, 2, 12, 15)
        assert not maps[0, 0].any()
        torch.testing.assert_close(maps[0, 1], 3 * paths[0, 0] / paths.sum())


@pytest.mark.usefixtures("unchecked")
def test_it_needs_capsules_and_the_right_images() -> None:
    with pytest.raises(InputError, match=r"^model must have capsules; got baseline, which has none$"):
        evidence(create("baseline"), torch.rand(1, 1, 28, 28))
    with pytest.raises(InputError, match=r"images must be \[batch"):
        evidence(network(), torch.rand(1, 3, 15, 12))
