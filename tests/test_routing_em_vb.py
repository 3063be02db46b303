"""EM and VB routing: closed forms, their twins in NumPy, and what holds for all routings."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capsnet import functional as F
from capsnet import reference
from capsnet.errors import InputError
from capsnet.matrix_capsules import patches
from capsnet.routing import RoutingResult, em_routing, over_outputs, over_parents, vb_routing

BATCH, INS, OUTS, DIM = 2, 7, 5, 4
ROUTINGS: dict[str, Any] = {
    "em": partial(em_routing, final_lambda=1.0),
    "google": partial(em_routing, final_lambda=0.5, cost="google"),
    "vb": vb_routing,
}
every_routing = pytest.mark.parametrize("name", ROUTINGS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def inputs(ins: int = INS, outs: int = OUTS, dim: int = DIM) -> list[Tensor]:
    """Votes, activations, beta_u and beta_a."""
    betas = [0.3 * random(outs, seed=2), 0.001 * random(outs, seed=3)]
    return [random(BATCH, ins, outs, dim), random(BATCH, ins, seed=1).sigmoid(), *betas]


def close(one: Any, other: Any, *, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    for part, expected in zip(one, other, strict=True):
        torch.testing.assert_close(part, expected, rtol=rtol, atol=atol)


# every routing


@every_routing
@pytest.mark.parametrize("r", [1, 2, 3])
def test_it_equals_the_reference(name: str, r: int) -> None:
    votes, activation, beta_u, beta_a = inputs()
    found = ROUTINGS[name](votes, activation, beta_u, beta_a, iterations=r)
    for k in range(BATCH):
        v, a = votes[k].numpy(), activation[k].numpy()
        if name == "vb":
            m, evidence, c = reference.vb_routing(v, a, r)
            logit = beta_a.numpy() + evidence - beta_u.numpy()
            golden = m, 1 / (1 + np.exp(-logit)), c
        elif name == "google":
            s = (math.log(2 * math.pi) + 1) / 2 * beta_u.numpy()
            golden = reference.em_routing(v, a, s, -2500 * beta_a.numpy(), r, 1.0, momentum=0.1)
        else:
            golden = reference.em_routing(v, a, beta_u.numpy(), beta_a.numpy(), r, 1.0)
        for part, expected in zip(found, golden, strict=True):
            np.testing.assert_allclose(part[k], expected, rtol=1e-9, atol=1e-12)


@every_routing
def test_couplings_are_shares_of_the_parents(name: str) -> None:
    c = ROUTINGS[name](*inputs()).couplings
    torch.testing.assert_close(c.sum(-1), torch.ones(BATCH, INS).double())
    assert (c >= 0).all()
    assert c.std() > 0.05, "couplings near uniform would hide mistakes"


@every_routing
def test_children_and_parents_can_be_permuted(name: str) -> None:
    votes, activation, *betas = inputs()
    whole = ROUTINGS[name](votes, activation, *betas)
    order = torch.randperm(INS)
    moved = ROUTINGS[name](votes[:, order], activation[:, order], *betas)
    close(moved, (whole.pose, whole.activation, whole.couplings[:, order]))
    order = torch.randperm(OUTS)
    moved = ROUTINGS[name](votes[:, :, order], activation, *(beta[order] for beta in betas))
    close(moved, (whole.pose[:, order], whole.activation[:, order], whole.couplings[..., order]))


@every_routing
def test_negated_votes_negate_the_poses_and_nothing_else(name: str) -> None:
    votes, *others = inputs()
    whole = ROUTINGS[name](votes, *others)
    close(ROUTINGS[name](-votes, *others), (-whole.pose, whole.activation, whole.couplings))


@every_routing
def test_axes_of_the_poses_can_be_permuted_with_signs(name: str) -> None:
    votes, *others = inputs()
    order, signs = torch.randperm(DIM), torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    whole = ROUTINGS[name](votes, *others)
    close(ROUTINGS[name](votes[..., order] * signs, *others), (whole.pose[..., order] * signs, *whole[1:]))


@every_routing
def test_a_child_split_in_two_of_half_its_activation_changes_nothing(name: str) -> None:
    votes, activation, *betas = inputs()
    whole = ROUTINGS[name](votes, activation, *betas)
    activation = torch.cat([activation, activation[:, :1] / 2], 1)
    activation[:, 0] /= 2
    split = ROUTINGS[name](torch.cat([votes, votes[:, :1]], 1), activation, *betas)
    close(split[:2], whole[:2])


@every_routing
def test_a_child_without_activation_is_not_there(name: str) -> None:
    votes, activation, *betas = inputs()
    whole = ROUTINGS[name](votes[:, 1:], activation[:, 1:], *betas)
    activation[:, 0] = 0
    close(ROUTINGS[name](votes, activation, *betas)[:2], whole[:2])


@every_routing
def test_an_example_does_not_depend_on_its_batch(name: str) -> None:
    votes, activation, *betas = inputs()
    whole = ROUTINGS[name](votes, activation, *betas)
    for k in range(BATCH):
        close(ROUTINGS[name](votes[k], activation[k], *betas), (part[k] for part in whole))


@every_routing
@pytest.mark.parametrize(("ins", "outs"), [(1, OUTS), (INS, 1), (1, 1)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("active", [0.0, 0.5])
def test_everything_is_finite(name: str, ins: int, outs: int, scale: float, active: float) -> None:
    """In float32: one child, one parent, votes of 0 and of 1e4, children that are not active; gradients too."""
    votes, activation, *betas = (x.float() for x in inputs(ins, outs, 16))
    given = [votes * scale, torch.full_like(activation, active), *betas]
    given = [x.requires_grad_() for x in given]
    found = ROUTINGS[name](*given)
    assert all(part.isfinite().all() for part in found)
    assert ((found.activation >= 0) & (found.activation <= 1)).all()
    gradients = torch.autograd.grad(found.activation.sum() + found.pose.sum(), given, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@every_routing
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_routed_in_float32(name: str, dtype: torch.dtype) -> None:
    halves = [x.to(dtype) for x in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ROUTINGS[name](*halves)
    assert all(part.dtype == torch.float32 for part in found)
    close(found, ROUTINGS[name](*(x.float() for x in halves)), rtol=1e-6, atol=1e-7)


@every_routing
@pytest.mark.parametrize("r", [1, 3])
def test_its_gradient(name: str, r: int) -> None:
    given = [x.requires_grad_() for x in inputs(4, 3, 4)]
    assert torch.autograd.gradcheck(lambda *x: ROUTINGS[name](*x, iterations=r), given)


@every_routing
@pytest.mark.usefixtures("unchecked")
def test_what_it_refuses(name: str) -> None:
    votes, *others = inputs()
    with pytest.raises(InputError, match=r"^routing iterations must be at least 1; got 0$"):
        ROUTINGS[name](votes, *others, iterations=0)
    with pytest.raises(InputError, match=r"^votes must be \[..., in, out, dim\] with at least 3 axes; got shape"):
        ROUTINGS[name](votes[0, 0], *others)


# EM


def test_with_one_iteration_the_pose_is_the_mean_by_activation() -> None:
    votes, activation, *betas = inputs()
    mean = torch.einsum("bi,bijd->bjd", activation / activation.sum(1, keepdim=True), votes)
    torch.testing.assert_close(em_routing(votes, activation, *betas, iterations=1).pose, mean)


def test_shifted_votes_shift_the_poses_and_nothing_else() -> None:
    votes, *others = inputs()
    shift = random(OUTS, DIM, seed=5)
    whole = em_routing(votes, *others, final_lambda=1.0)
    moved = em_routing(votes + shift, *others, final_lambda=1.0)
    close(moved, (whole.pose + shift, *whole[1:]))


def test_scaled_votes_are_another_beta_u() -> None:
    votes, activation, beta_u, beta_a = inputs()
    em = partial(em_routing, final_lambda=1.0, variance_guard=0.0)
    whole = em(votes, activation, beta_u, beta_a)
    moved = em(3 * votes, activation, beta_u - math.log(3), beta_a)
    close(moved, (3 * whole.pose, *whole[1:]))


def test_without_lambda_every_parent_is_half_active() -> None:
    assert (em_routing(*inputs(), final_lambda=0.0).activation == 0.5).all()


def test_votes_that_agree_win() -> None:
    votes, activation, *betas = inputs()
    votes[:, :, 2] = votes[:, :1, 2] + 0.01 * votes[:, :, 2]
    found = em_routing(votes, activation, *betas, final_lambda=1.0)
    assert (found.activation.argmax(-1) == 2).all()
    assert (found.couplings[..., 2] > 0.9).all()


def test_google_starts_with_means_below_the_votes() -> None:
    votes = torch.ones(1, 3, 2, 4).double()
    found = em_routing(votes, torch.ones(1, 3).double(), torch.zeros(2), torch.zeros(2), cost="google")
    torch.testing.assert_close(found.pose, torch.full((1, 2, 4), 0.999).double())


# VB


def test_without_children_the_posterior_is_the_prior() -> None:
    votes, activation = inputs(dim=16)[:2]
    pose, evidence, _ = vb_routing(votes, 0 * activation, before_sigmoid=True)
    log_det = sum(reference.digamma((17 - d) / 2) for d in range(16)) + 16 * math.log(2)
    log_pi = reference.digamma(1.0) - reference.digamma(float(OUTS))
    entropy = 8 * math.log(2 * math.pi * math.e) - log_det / 2
    assert (pose == 0).all()
    torch.testing.assert_close(evidence, torch.full_like(evidence, -math.exp(log_pi) * entropy))


def test_many_children_have_the_gaussian_of_em() -> None:
    votes, activation, *betas = inputs(dim=4)
    many = votes.repeat(1, 20_000, 1, 1), activation.repeat(1, 20_000)
    one, other = vb_routing(*many, iterations=1), em_routing(*many, *betas, iterations=1)
    torch.testing.assert_close(one.pose, other.pose, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x", [0.5, 1.0, 3.7, 12.0, 150.0])
def test_digamma_of_the_reference(x: float) -> None:
    assert reference.digamma(x) == pytest.approx(float(torch.tensor(x, dtype=torch.float64).digamma()), rel=1e-13)


# convolutional capsules


GRIDS = [((5, 6), 3, 2), ((5, 4), 3, 1), ((4, 7), 2, 2), ((3, 3), 3, 1), ((7, 6), 2, 3), ((3, 2), 1, 1)]


def seen_by(in_size: tuple[int, int], k: int, stride: int) -> list[list[int]]:
    """Of each window the places that it sees, in loops."""
    rows, columns = ((size - k) // stride + 1 for size in in_size)
    return [
        [(r * stride + y) * in_size[1] + c * stride + x for y in range(k) for x in range(k)]
        for r in range(rows)
        for c in range(columns)
    ]


@pytest.mark.parametrize(("in_size", "k", "stride"), GRIDS)
def test_patches_are_what_windows_see(in_size: tuple[int, int], k: int, stride: int) -> None:
    x = random(2, *in_size, 3)
    found, flat = patches(x, kernel_size=k, stride=stride).flatten(1, 2), x.flatten(1, 2)
    for place, seen in enumerate(seen_by(in_size, k, stride)):
        assert torch.equal(found[:, place], flat[:, seen])


@pytest.mark.parametrize(("in_size", "k", "stride"), GRIDS)
@pytest.mark.parametrize("name", ["em", "vb"])
def test_children_share_their_couplings_over_all_parents_that_see_them(
    name: str, in_size: tuple[int, int], k: int, stride: int
) -> None:
    """The twin has all capsules of the grid as children, all types at all places as parents, and who sees whom."""
    types, outs, dim = 2, 3, 4
    windows = seen_by(in_size, k, stride)
    votes, activation, beta_u, beta_a = inputs(k * k * types, outs, dim)
    votes = random(1, len(windows), k * k * types, outs, dim, seed=7)
    active = random(1, math.prod(in_size), types, seed=8).sigmoid()
    activation = torch.stack([active[:, seen].flatten(1) for seen in windows], 1)
    shares = partial(over_parents, types=types, in_size=in_size, kernel_size=k, stride=stride)
    found: RoutingResult = ROUTINGS[name](votes, activation, beta_u, beta_a, log_couplings=shares)

    children, parents = math.prod(in_size) * types, len(windows) * outs
    v, sees = np.zeros((children, parents, dim)), np.zeros((children, parents), dtype=bool)
    for place, seen in enumerate(windows):
        for n, i in enumerate(seen):
            for t in range(types):
                for j in range(outs):
                    v[i * types + t, place * outs + j] = votes[0, place, n * types + t, j]
                    sees[i * types + t, place * outs + j] = True
    a, many = active[0].flatten().numpy(), len(windows)
    if name == "em":
        pose, activity, c = reference.em_routing(v, a, np.tile(beta_u, many), np.tile(beta_a, many), 3, 1.0, sees=sees)
    else:
        pose, evidence, c = reference.vb_routing(v, a, 3, places=many, sees=sees)
        activity = 1 / (1 + np.exp(-(np.tile(beta_a - beta_u, many) + evidence)))
    np.testing.assert_allclose(found.pose[0].flatten(0, 1), pose, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.activation[0].flatten(), activity, rtol=1e-9)
    np.testing.assert_allclose(c[sees.any(1)].sum(1), 1)
    for place, seen in enumerate(windows):
        rows = c[[i * types + t for i in seen for t in range(types)], place * outs : (place + 1) * outs]
        np.testing.assert_allclose(found.couplings[0, place], rows, rtol=1e-9, atol=1e-14)


def test_a_window_as_large_as_the_grid_is_dense_and_one_of_one_place_is_dense_at_each() -> None:
    logits = random(2, 1, 9 * 2, 5)
    about: dict[str, Any] = {"types": 2, "stride": 1}
    torch.testing.assert_close(over_parents(logits, in_size=(3, 3), kernel_size=3, **about), over_outputs(logits))
    logits = random(2, 9, 2, 5)
    torch.testing.assert_close(over_parents(logits, in_size=(3, 3), kernel_size=1, **about), over_outputs(logits))


def test_the_gradient_of_shared_couplings_is_right_where_stride_leaves_children_out() -> None:
    logits = random(2, 4, 4 * 2, 3).requires_grad_()
    shares: Callable[[Tensor], Tensor] = partial(over_parents, types=2, in_size=(5, 6), kernel_size=2, stride=3)
    assert torch.autograd.gradcheck(shares, logits)
    far = (1e30 * logits.detach().float()).requires_grad_()
    (gradient,) = torch.autograd.grad(shares(far).exp().sum(), far)
    assert gradient.isfinite().all()


# votes, coordinates, loss


def test_matrix_votes_equal_the_reference() -> None:
    pose, weight = random(2, 7, 9), random(7, 3, 5, 3, seed=1)
    found = F.matrix_votes(pose, weight)
    for k in range(2):
        np.testing.assert_allclose(found[k], reference.matrix_votes(pose[k].numpy(), weight.numpy()), rtol=1e-12)
    assert found.transpose(-3, -2).is_contiguous(), "as routing reads them"


@pytest.mark.usefixtures("unchecked")
def test_matrix_votes_and_coordinates_refuse_other_dimensions() -> None:
    with pytest.raises(InputError, match=r"^poses must have dimension 16, the square of .* side 4; got 9$"):
        F.matrix_votes(torch.zeros(7, 9), torch.zeros(7, 4, 5, 4))
    for dim in (1, 8):
        with pytest.raises(InputError, match=rf"^votes must be square matrices of at least 2 x 2.*; got {dim} numbers"):
            F.add_coordinates(torch.zeros(1, 1, 1, 1, dim), torch.zeros(1), torch.zeros(1))


def test_coordinates_are_added_to_the_right_hand_column() -> None:
    votes, rows, columns = random(2, 3, 5, 2, 7, 16), random(3, seed=1), random(5, seed=2)
    moved = (F.add_coordinates(votes, rows, columns) - votes).reshape(2, 3, 5, 2, 7, 4, 4)
    expected = torch.zeros_like(moved)
    for r in range(3):
        for c in range(5):
            expected[:, r, c, :, :, 0, 3], expected[:, r, c, :, :, 1, 3] = rows[r], columns[c]
    torch.testing.assert_close(moved, expected)


def test_spread_loss_in_closed_form() -> None:
    equal, present = torch.full((2, 5), 0.7), F.multi_hot(torch.tensor([0, 3]), 5)
    torch.testing.assert_close(F.spread_loss(equal, present, 0.9), torch.full((2,), 4 * 0.81))
    assert (F.spread_loss(present.float(), present, 0.99) == 0).all()
    scores = random(3, 5).sigmoid()
    for labels in (torch.tensor([4, 1, 1]), torch.tensor([[0, 3], [1, 2], [2, 4]])):
        found = F.spread_loss(scores, F.multi_hot(labels, 5), 0.4)
        for k in range(3):
            truth = set(labels[k].flatten().tolist())
            assert float(found[k]) == pytest.approx(reference.spread_loss(scores[k].numpy(), truth, 0.4), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: F.spread_loss(x, present, 0.4), random(2, 5).sigmoid().requires_grad_())


@pytest.mark.usefixtures("unchecked")
def test_spread_loss_needs_one_presence_for_each_score() -> None:
    with pytest.raises(InputError, match=r"^presence must have the scores' shape \(2, 5\); got \(2, 4\)$"):
        F.spread_loss(torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.bool), 0.5)


@pytest.mark.parametrize(
    ("step", "margin"), [(0, 0.214), (100_000, 0.294), (200_000, 0.595), (400_000, 0.976), (10**9, 0.98996)]
)
def test_the_margin_rises(step: int, margin: float) -> None:
    assert F.spread_margin(step) == pytest.approx(margin, abs=5e-4)
    assert F.spread_margin(step / 50_000, rise=1) == F.spread_margin(step)
