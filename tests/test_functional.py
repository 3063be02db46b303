import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsnet import functional as F
from capsnet import reference
from capsnet.errors import InputError

HALF = (torch.float16, torch.bfloat16)
EPS = float(torch.finfo(torch.float32).eps)

leading_axes = pytest.mark.parametrize("leading", [(), (3,), (3, 2)], ids=str)
vectors = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=7)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# squash


def test_squash_of_3_4_is_15_26ths_and_20_26ths() -> None:
    torch.testing.assert_close(
        F.squash(torch.tensor([3.0, 4.0], dtype=torch.float64)),
        torch.tensor([15 / 26, 20 / 26], dtype=torch.float64),
        rtol=1e-15,
        atol=0,
    )


@leading_axes
def test_squash_equals_the_reference(leading: tuple[int, ...]) -> None:
    s = random(*leading, 5) * 2
    golden = np.apply_along_axis(reference.squash, -1, s.numpy())
    torch.testing.assert_close(F.squash(s), torch.from_numpy(golden), rtol=1e-14, atol=1e-15)


def test_squash_of_zero_is_zero() -> None:
    assert torch.equal(F.squash(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("length", [1e-8, 1e-4, 1e-2])
def test_squash_of_a_short_vector_is_its_square(length: float) -> None:
    """An epsilon under the root, the usual remedy for the gradient at zero, would be seen here."""
    squashed = F.squash(torch.tensor([0.0, length], dtype=torch.float64))
    assert float(squashed[1]) == pytest.approx(length**2 / (1 + length**2), rel=1e-14)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
@pytest.mark.parametrize("length", [1e18, 1.8e19, 2e19, 1e30, 3e38])
def test_squash_of_a_length_whose_square_overflows_is_its_direction(length: float, epsilon: float) -> None:
    s = torch.stack([length * torch.tensor([0.6, -0.8, 0.0]), torch.tensor([3.0, 4.0, 0.0])]).requires_grad_()
    v = F.squash(s, epsilon=epsilon)
    torch.testing.assert_close(v[0], torch.tensor([0.6, -0.8, 0.0]))
    torch.testing.assert_close(v[1], F.squash(torch.tensor([3.0, 4.0, 0.0]), epsilon=epsilon), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(v.sum(), s)
    assert gradient.isfinite().all()
    assert gradient[1].any()
    many = F.squash(torch.full((2, 3000), length / 60), epsilon=epsilon)  # components of a vector 1 times as long
    torch.testing.assert_close(many, torch.full_like(many, 3000**-0.5))


@settings(deadline=None, max_examples=60)
@given(vectors)
def test_squash_keeps_the_direction_and_ends_below_1(values: list[float]) -> None:
    s = torch.tensor(values, dtype=torch.float32)
    v = F.squash(s)
    assert float(v.norm()) <= 1 + 4 * EPS
    n = s.double().norm()
    if n > 1e-15:  # shorter ones underflow, as length becomes its square
        torch.testing.assert_close(v.double(), s.double() * n / (1 + n * n), rtol=8 * EPS, atol=1e-30)
    if n < 100:
        assert float(v.norm()) < 1


@settings(deadline=None, max_examples=60)
@given(vectors, st.floats(1.01, 50))
def test_squash_of_a_longer_vector_is_longer(values: list[float], factor: float) -> None:
    s = torch.tensor(values, dtype=torch.float64)
    short, long = F.squash(s).norm(), F.squash(s * factor).norm()
    if 1e-100 < s.norm() < 1e4:
        assert short < long < 1


def test_squash_has_the_right_gradient_at_random_points_and_at_zero() -> None:
    for s in (random(2, 3, 5), random(2, 5) * 1e-3, torch.zeros(2, 5, dtype=torch.float64)):
        assert torch.autograd.gradcheck(F.squash, s.requires_grad_())


def test_squash_has_a_zero_gradient_at_zero() -> None:
    s = torch.zeros(2, 5, requires_grad=True)
    torch.autograd.backward(F.squash(s).sum())
    assert s.grad is not None
    assert torch.equal(s.grad, torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-4, 1e-2, 1.0, 400.0, 1e4])
def test_squash_and_lengths_are_safe_in_half_precision(dtype: torch.dtype, size: float) -> None:
    s = (torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.0]]) * size).to(dtype).requires_grad_()
    v = F.squash(s)
    torch.autograd.backward(F.lengths(v).sum() + F.lengths(s).sum())
    assert v.dtype == dtype
    assert s.grad is not None
    assert s.grad.isfinite().all()
    torch.testing.assert_close(v, F.squash(s.double()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


# lengths


@leading_axes
def test_lengths_are_euclidean(leading: tuple[int, ...]) -> None:
    pose = random(*leading, 5, 7)
    torch.testing.assert_close(F.lengths(pose), torch.from_numpy(np.sqrt((pose.numpy() ** 2).sum(-1))))


def test_lengths_of_3_4_is_5() -> None:
    assert F.lengths(torch.tensor([[3.0, 4.0]])).tolist() == [5.0]


def test_lengths_has_the_right_gradient_and_zero_at_zero() -> None:
    assert torch.autograd.gradcheck(F.lengths, random(2, 3, 5).requires_grad_())
    pose = torch.zeros(3, 5, requires_grad=True)
    torch.autograd.backward(F.lengths(pose).sum())
    assert pose.grad is not None
    assert torch.equal(pose.grad, torch.zeros(3, 5))


# mask


@leading_axes
def test_mask_keeps_the_one_capsule(leading: tuple[int, ...]) -> None:
    pose = random(*leading, 5, 7)
    index = torch.arange(math.prod(leading)).reshape(leading) % 5
    masked = F.mask(pose, index).reshape(-1, 5, 7)
    for example, whole, kept in zip(masked, pose.reshape(-1, 5, 7), index.flatten(), strict=True):
        for capsule in range(5):
            expected = whole[capsule] if capsule == kept else torch.zeros(7, dtype=torch.float64)
            assert torch.equal(example[capsule], expected)


def test_mask_lets_the_gradient_through_to_the_kept_capsule_only() -> None:
    index = torch.tensor([1, 4])
    for pose in (random(2, 5, 3), torch.zeros(2, 5, 3, dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda x: F.mask(x, index), pose.requires_grad_())
    pose = random(2, 5, 3).requires_grad_()
    torch.autograd.backward(F.mask(pose, index).sum())
    assert pose.grad is not None
    assert pose.grad.abs().sum(-1).nonzero().tolist() == [[0, 1], [1, 4]]


# margin loss


def test_margin_loss_of_one_half_and_three_tenths_is_18_hundredths() -> None:
    loss = F.margin_loss(torch.tensor([0.5, 0.3]), torch.tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx(0.18, rel=1e-6)


@leading_axes
def test_margin_loss_equals_the_reference(leading: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.uniform(0, 1, (*leading, 7))
    presence = rng.uniform(size=(*leading, 7)) < 0.4  # several classes, or none, may be present
    options = {"m_pos": 0.8, "m_neg": 0.15, "down_weight": 0.3}
    ours = F.margin_loss(torch.from_numpy(lengths), torch.from_numpy(presence).double())
    other = F.margin_loss(torch.from_numpy(lengths), torch.from_numpy(presence).double(), **options)
    assert ours.shape == leading
    rows = zip(lengths.reshape(-1, 7), presence.reshape(-1, 7), ours.flatten(), other.flatten(), strict=True)
    for length, present, loss, changed in rows:
        classes = set(np.flatnonzero(present).tolist())
        assert float(loss) == pytest.approx(reference.margin_loss(length, classes), rel=1e-13)
        assert float(changed) == pytest.approx(reference.margin_loss(length, classes, **options), rel=1e-13)


def test_margin_loss_is_zero_beyond_the_margins() -> None:
    loss = F.margin_loss(torch.tensor([0.95, 0.05, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert float(loss) == 0


def test_margin_loss_has_the_right_gradient_at_random_points_and_at_zero() -> None:
    presence = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.float64)
    for lengths in (random(2, 5).abs() / 3, torch.zeros(2, 5, dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda x: F.margin_loss(x, presence), lengths.requires_grad_())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-8, 1e-4, 0.5, 1.0])
def test_margin_loss_is_safe_in_half_precision(dtype: torch.dtype, length: float) -> None:
    lengths = torch.full((2, 5), length, dtype=dtype, requires_grad=True)
    presence = torch.eye(5, dtype=dtype)[:2]
    loss = F.margin_loss(lengths, presence)
    torch.autograd.backward(loss.sum())
    assert lengths.grad is not None
    assert lengths.grad.isfinite().all()
    expected = reference.margin_loss(np.full(5, length), {0})
    assert loss.tolist() == pytest.approx([expected, expected], rel=4 * float(torch.finfo(dtype).eps))


# reconstruction loss


@leading_axes
def test_reconstruction_loss_is_the_sum_over_the_pixels(leading: tuple[int, ...]) -> None:
    drawn, images = random(*leading, 2, 3, 5, seed=1), random(*leading, 2, 3, 5, seed=2)
    loss = F.reconstruction_loss(drawn, images)
    assert loss.shape == leading
    rows = zip(loss.flatten(), drawn.reshape(-1, 2, 3, 5), images.reshape(-1, 2, 3, 5), strict=True)
    for number, one, other in rows:
        assert float(number) == pytest.approx(reference.reconstruction_loss(one.numpy(), other.numpy()), rel=1e-13)


def test_reconstruction_loss_has_the_right_gradient_at_random_points_and_at_zero() -> None:
    images = random(2, 1, 3, 5)
    for drawn in (random(2, 1, 3, 5, seed=2), torch.zeros(2, 1, 3, 5, dtype=torch.float64), images.clone()):
        assert torch.autograd.gradcheck(lambda x: F.reconstruction_loss(x, images), drawn.requires_grad_())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_reconstruction_loss_is_safe_in_half_precision(dtype: torch.dtype) -> None:
    drawn = torch.linspace(0, 1, 784).reshape(1, 1, 28, 28).to(dtype).requires_grad_()
    loss = F.reconstruction_loss(drawn, torch.zeros_like(drawn))
    torch.autograd.backward(loss.sum())
    assert drawn.grad is not None
    assert drawn.grad.isfinite().all()
    assert loss.item() == pytest.approx(float((torch.linspace(0, 1, 784) ** 2).sum()), rel=0.01)


@pytest.mark.usefixtures("unchecked")
def test_reconstruction_loss_refuses_another_shape() -> None:
    message = r"reconstruction must have the images' shape \(2, 1, 3, 5\); got \(2, 1, 5, 3\)"
    with pytest.raises(InputError, match=message):
        F.reconstruction_loss(torch.zeros(2, 1, 5, 3), torch.zeros(2, 1, 3, 5))


# full precision


def test_full_precision_suspends_autocast() -> None:
    x = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        with F.full_precision(x.device):
            assert (x @ x.T).dtype == torch.float32


def test_full_precision_does_nothing_on_a_device_without_autocast() -> None:
    with F.full_precision(torch.device("meta")):
        assert torch.ones(2, device="meta").dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
def test_one_index_and_one_presence_for_each_example() -> None:
    with pytest.raises(InputError, match=r"^index must be of shape \(3,\), one an example; got \(1,\)$"):
        F.mask(torch.zeros(3, 5, 7), torch.tensor([2]))
    with pytest.raises(InputError, match=r"^presence must have the lengths' shape \(3, 5\); got \(3,\)$"):
        F.margin_loss(torch.zeros(3, 5), torch.zeros(3))


# squash with an epsilon


@pytest.mark.parametrize("epsilon", [1e-9, 1e-3, 0.7])
def test_with_an_epsilon_squash_divides_by_the_root_of_the_squared_length_and_it(epsilon: float) -> None:
    for s in (random(2, 3, 5), random(2, 5) * 1e-4, torch.zeros(2, 5, dtype=torch.float64)):
        squared = s.square().sum(-1, keepdim=True)
        expected = squared / (1 + squared) * s / (squared + epsilon).sqrt()
        torch.testing.assert_close(F.squash(s, epsilon=epsilon), expected, rtol=1e-13, atol=1e-300)
        assert torch.autograd.gradcheck(lambda x: F.squash(x, epsilon=epsilon), s.requires_grad_())


def test_an_epsilon_shortens_and_without_one_nothing_changes() -> None:
    s = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    assert float(F.squash(s, epsilon=1e-8)[1]) == pytest.approx(float(F.squash(s)[1]) / math.sqrt(2), rel=1e-6)
    x = random(7, 5).float()
    n = x.norm(dim=-1, keepdim=True)
    assert torch.equal(F.squash(x, epsilon=0.0), x * (n / (1 + n * n)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_squash_with_an_epsilon_is_safe_in_half_precision(dtype: torch.dtype) -> None:
    s = torch.tensor([[400.0, -800.0], [0.0, 0.0], [1e-3, 2e-3]]).to(dtype)
    expected = F.squash(s.double(), epsilon=1e-9).to(dtype)
    torch.testing.assert_close(F.squash(s, epsilon=1e-9), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


# multi_hot, top_k_mask


@leading_axes
@pytest.mark.parametrize("k", [0, 1, 2, 3], ids=lambda k: f"{k or 'plain'}")
def test_found_are_the_true_classes_and_as_many_of_the_largest_scores(leading: tuple[int, ...], k: int) -> None:
    scores = random(*leading, 7)
    labels = random(*leading, 7, seed=1).argsort(-1)[..., : max(k, 1)]
    predicted = F.top_k_mask(scores, max(k, 1))
    present = F.multi_hot((labels if k else labels[..., 0]).reshape(-1, *(k,) * bool(k)), 7).view(scores.shape)
    assert present.shape == predicted.shape == scores.shape
    assert present.dtype == predicted.dtype == torch.bool
    rows = zip(*(x.reshape(-1, x.shape[-1]) for x in (scores, labels, present, predicted)), strict=True)
    for score, label, true, said in rows:
        assert set(true.nonzero().flatten().tolist()) == set(label.tolist())
        largest = sorted(range(7), key=lambda c: float(score[c]), reverse=True)[: max(k, 1)]
        assert set(said.nonzero().flatten().tolist()) == set(largest)


def test_of_equal_scores_one_object_is_the_first_class() -> None:
    """As argmax has it; topk takes another."""
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [0.1, 0.3, 0.2, 0.3, 0.3]])
    assert F.top_k_mask(scores, 1).nonzero().tolist() == [[0, 0], [1, 1]]


# standardized


@leading_axes
def test_standardized_images_have_mean_0_and_deviation_1_over_pixels_and_channels(leading: tuple[int, ...]) -> None:
    images = random(*leading, 2, 3, 5) + 0.4
    images[..., 0, :, :] += 3  # channels of another brightness stay so
    found = F.per_image_standardize(images)
    for one, image in zip(found.reshape(-1, 2, 3, 5), images.reshape(-1, 2, 3, 5), strict=True):
        values = image.numpy()
        np.testing.assert_allclose(one, (values - values.mean()) / values.std(), rtol=1e-12, atol=1e-13)
        assert float(one[0].mean()) > float(one[1].mean())


def test_no_images_are_standardized_to_none() -> None:
    assert F.per_image_standardize(torch.rand(0, 3, 4, 5)).shape == (0, 3, 4, 5)


def test_the_deviation_is_at_least_that_of_one_over_the_root_of_the_intensities() -> None:
    plain = torch.full((1, 2, 5, 10), 0.3, dtype=torch.float64)
    torch.testing.assert_close(F.per_image_standardize(plain), torch.zeros_like(plain), rtol=0, atol=1e-14)
    faint = plain.clone()
    faint[0, 0, 0, 0] += 0.01  # a deviation of 0.001, below 0.1
    assert float(F.per_image_standardize(faint)[0, 0, 0, 0]) == pytest.approx(0.01 * 0.99 / 0.1, rel=1e-9)
