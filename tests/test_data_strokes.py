import math

import pytest
import torch
from torch import Tensor

from capsnet.data.sets.strokes import FACTORS, SKELETONS, render, strokes
from capsnet.errors import InputError

DRAWINGS = [(digit, k) for digit, drawings in enumerate(SKELETONS) for k in range(len(drawings))]


def upright(count: int, **changed: object) -> dict[str, Tensor]:
    """Factors of `count` upright, centred digits of middling size and width, those in `changed` replaced."""
    plain = {"scale": 0.8, "aspect": 1.0, "stroke_width_pixels": 2.5} | changed
    return {name: torch.as_tensor(plain.get(name, 0.0)).float().expand(count) for name in FACTORS}


def every_drawing(image_size: int = 28, **changed: object) -> Tensor:
    """One image per skeleton, `float32 [N, S, S]` in [0, 1]."""
    digits, skeletons = torch.tensor(DRAWINGS).T
    factors = upright(len(DRAWINGS), **changed)
    return render(digits, factors, image_size=image_size, skeletons=skeletons)[:, 0] / 255


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass `[N, 2]` from the image's and covariance `[N, 2, 2]` of the ink, in pixels, x first."""
    size = images.shape[-1]
    place = torch.arange(size) - (size - 1) / 2
    where = torch.stack([place.repeat(size), place.repeat_interleave(size)], dim=1)
    weight = images.flatten(1) / images.sum((1, 2))[:, None]
    mean = weight @ where
    away = where - mean[:, None]
    return mean, torch.einsum("np,npi,npj->nij", weight, away, away)


def test_same_seed_draws_the_same() -> None:
    first, second = (strokes(train=40, validation=20, test=20, seed=3) for _ in range(2))
    assert first.validation is not None
    assert second.validation is not None
    for a, b in (
        (first.train, second.train),
        (first.validation, second.validation),
        (first.test, second.test),
    ):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(a.factors[name], b.factors[name]) for name in FACTORS)


def test_seeds_and_splits_have_streams_of_their_own() -> None:
    sets = [strokes(train=20, validation=20, test=20, seed=seed) for seed in range(4)]
    drawn = [split.factors["scale"] for d in sets for split in (d.train, d.validation, d.test) if split]
    assert len(set(torch.cat(drawn).tolist())) == 4 * 3 * 20


def test_layout_and_ranges() -> None:
    data = strokes(train=205, validation=0, test=10)
    assert data.name == "strokes"
    assert data.classes == tuple("0123456789")
    assert data.validation is None
    assert data.image_shape == (1, 28, 28)
    assert set(data.train.labels.bincount(minlength=10).tolist()) == {20, 21}
    assert not torch.equal(data.train.labels[:10], torch.arange(10))
    assert list(data.train.factors) == list(FACTORS)
    for name, (low, high) in FACTORS.items():
        values = data.train.factors[name]
        assert values.dtype == torch.float32
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high


@pytest.mark.parametrize("size", [12, 20, 40])
def test_any_image_size(size: int) -> None:
    split = strokes(train=60, validation=1, test=1, image_size=size).train
    assert split.images.shape == (60, 1, size, size)
    assert (split.images.amax((1, 2, 3)) > 100).all()
    assert split.factors["x_pixels"].abs().max() <= 2.5 * size / 28
    assert split.factors["scale"].max() <= 1


def test_a_larger_image_shows_the_same_digit() -> None:
    small = every_drawing(28, stroke_width_pixels=4.0)
    large = every_drawing(56, stroke_width_pixels=8.0)
    difference = (torch.nn.functional.avg_pool2d(large, 2) - small).abs()
    assert difference.mean() < 0.01


def test_most_digits_lie_within_the_image() -> None:
    images = strokes(train=500, validation=0, test=1).train.images[:, 0]
    border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    assert (border > 127).any(1).float().mean() < 0.06
    assert images.float().mean() / 255 == pytest.approx(0.12, abs=0.03)


def test_every_skeleton_is_a_drawing_of_its_own() -> None:
    images = every_drawing().flatten(1)
    distance = torch.cdist(images, images) + 100 * torch.eye(len(images))
    assert distance.min() > 1.5


def test_shift_moves_the_centre_of_mass() -> None:
    here, _ = moments(every_drawing())
    there, _ = moments(every_drawing(x_pixels=2.25, y_pixels=-1.5))
    torch.testing.assert_close(there - here, torch.tensor([2.25, -1.5]).expand_as(here), atol=0.07, rtol=0)


def test_scale_is_the_height() -> None:
    ink = every_drawing(84, scale=0.8, stroke_width_pixels=3.0) > 0.5
    height = ink.any(2).sum(1)
    assert (height - (0.8 * 60 + 3)).abs().max() <= 4  # a spline may pass beyond its control points
    _, before = moments(every_drawing(84, scale=0.6, stroke_width_pixels=1.2))
    _, after = moments(every_drawing(84, scale=0.9, stroke_width_pixels=1.8))
    torch.testing.assert_close(after, before * 1.5**2, atol=3, rtol=0.02)


def test_aspect_is_the_relative_width() -> None:
    width, height = zip(
        *(extent(every_drawing(84, aspect=a, stroke_width_pixels=2.0)) for a in (1.0, 1.5)), strict=True
    )
    torch.testing.assert_close(width[1] - 2, 1.5 * (width[0] - 2), atol=2, rtol=0)
    torch.testing.assert_close(height[0], height[1], atol=1, rtol=0)


def extent(images: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the ink, in pixels."""
    ink = images > 0.5
    return ink.any(1).sum(1).float(), ink.any(2).sum(1).float()


@pytest.mark.parametrize("x", [0.0, 0.3, 0.5])
def test_width_is_the_width_of_the_line(x: float) -> None:
    widths = torch.tensor([1.2, 2.0, 3.5])
    one = render(torch.tensor([1, 1, 1]), upright(3, stroke_width_pixels=widths, x_pixels=x))[:, 0] / 255
    torch.testing.assert_close(one[:, 14].sum(1), widths, atol=0.01, rtol=0)


def test_a_wider_pen_leaves_more_ink() -> None:
    ink = [every_drawing(stroke_width_pixels=w).sum((1, 2)) for w in (1.6, 2.8, 4.0)]
    assert (ink[0] < 0.8 * ink[1]).all()
    assert (ink[1] < 0.95 * ink[2]).all()


def test_positive_slant_leans_the_top_to_the_right() -> None:
    one = render(torch.tensor([1]), upright(1, slant_degrees=20.0, stroke_width_pixels=3.0), image_size=56)
    rows = one[0, 0, 16:40].float()  # clear of the ends
    middles = (rows * torch.arange(56)).sum(1) / rows.sum(1)
    slope = math.tan(math.radians(20))
    assert float(middles[0] - middles[-1]) / 23 == pytest.approx(slope, rel=0.01)
    _, before = moments(every_drawing(56))
    _, after = moments(every_drawing(56, slant_degrees=20.0))
    # The sheared covariance, y being down; not exact, for a slanted stroke is longer and has more ink.
    expected = before[:, 0, 1] - slope * before[:, 1, 1]
    assert ((after[:, 0, 1] - expected) / expected).abs().max() < 0.3


def test_a_quarter_turn_is_rot90_which_is_counter_clockwise() -> None:
    turned = every_drawing(rotation_degrees=90.0)
    torch.testing.assert_close(turned, torch.rot90(every_drawing(), 1, dims=(1, 2)), atol=2 / 255, rtol=0)


def test_slant_and_aspect_come_before_rotation() -> None:
    both = every_drawing(slant_degrees=15.0, aspect=1.3, rotation_degrees=90.0)
    leaning = every_drawing(slant_degrees=15.0, aspect=1.3)
    torch.testing.assert_close(both, torch.rot90(leaning, 1, dims=(1, 2)), atol=2 / 255, rtol=0)


def test_jitter_varies_the_curve_but_not_the_pose() -> None:
    labels = torch.arange(10).repeat(60)
    factors = upright(600)
    generator = torch.Generator().manual_seed(5)
    hands = render(labels, factors, image_size=56, generator=generator)[:, 0] / 255
    clean = render(labels, factors, image_size=56)[:, 0] / 255
    assert (hands - clean).abs().amax((1, 2)).min() > 0.2
    centre, spread = moments(hands)
    true_centre, true_spread = moments(clean)
    assert (centre - true_centre).abs().mean() < 0.6
    torch.testing.assert_close(spread.view(60, 10, 2, 2).mean(0), true_spread[:10], atol=5, rtol=0.08)


def test_jitter_hardly_shifts_or_slants() -> None:
    """The straight 1 bends about its place; an affine part in the jitter would more than double both."""
    ones = render(
        torch.ones(200, dtype=torch.int64),
        upright(200),
        image_size=56,
        generator=torch.Generator().manual_seed(0),
    )
    centre, spread = moments(ones[:, 0].float())
    slope = spread[:, 0, 1] / spread[:, 1, 1]
    assert slope.std() < 0.025
    assert centre[:, 0].std() < 0.3


def test_images_do_not_depend_on_their_neighbours() -> None:
    split = strokes(train=300, validation=0, test=1).train
    some = torch.tensor([250, 3, 77])
    factors = {name: values[some] for name, values in split.factors.items()}
    alone = torch.cat([render(split.labels[i : i + 1], split.take(torch.tensor([i])).factors) for i in some])
    assert torch.equal(render(split.labels[some], factors), alone)


def test_no_images() -> None:
    assert render(torch.zeros(0, dtype=torch.int64), upright(0)).shape == (0, 1, 28, 28)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 11}, "image_size of strokes must be at least 12 pixels; got 11"),
        ({"train": 0}, "train of strokes must be at least 1 images; got 0"),
        ({"validation": -1}, "validation of strokes must be at least 0 images; got -1"),
        ({"test": 0}, "test of strokes must be at least 1 images; got 0"),
        ({"seed": -2}, "seed of strokes must be 0 to 4611686018427387903; got -2"),
        ({"seed": 10**26}, "seed of strokes must be 0 to 4611686018427387903; got 1000"),
        ({"seed": 10**5000}, "seed of strokes must be 0 to 4611686018427387903; got a whole number of about 5001 di"),
        (
            {"image_size": 10**6},
            r"images must fit into 8 GiB \(see --image-size\); got 13,000 of 1 x 1000000 x 1000000",
        ),
    ],
)
def test_strokes_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        strokes(**arguments)


@pytest.mark.parametrize(
    ("digit", "skeleton", "changed", "message"),
    [
        (10, 0, {}, "labels of render must be digits 0 to 9; got 10 to 10"),
        (-1, 0, {}, "labels of render must be digits 0 to 9; got -1 to -1"),
        (4, 3, {}, "skeletons of render must be 0 to 2 for digit 4; got 3"),
        (4, -1, {}, "skeletons of render must be 0 to 2 for digit 4; got -1"),
        (4, 0, {"scale": torch.ones(2)}, r"scale of render must be one value per label, \[1\]; got \[2\]"),
        (
            4,
            0,
            {"stroke_width_pixels": torch.zeros(1)},
            "stroke_width_pixels of render must be above 0; got 0",
        ),
        (4, 0, {"size": torch.ones(1)}, "factors of render must be slant_degrees, .*; got .*, size"),
    ],
)
def test_render_refuses(digit: int, skeleton: int, changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(torch.tensor([digit]), upright(1) | changed, skeletons=torch.tensor([skeleton]))
