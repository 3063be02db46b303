import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsnet.data.augment import Augmentation, AugmentationParameters, augment
from capsnet.errors import InputError

EVERYTHING = Augmentation(shift=2, flip=True, rotation=30.0, scale=0.2, shear=0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(count: int, **changed: Tensor) -> AugmentationParameters:
    """Parameters that change nothing, those in `changed` replaced."""
    nothing = Augmentation(shift=0).draw(count, generator=seeded())
    return replace(nothing, **changed)


def by_loops(images: Tensor, p: AugmentationParameters) -> Tensor:
    """Each pixel's source: unshift, unflip, rotate back, unscale, unshear; then bilinear, zero outside."""
    batch, _, height, width = images.shape
    result = torch.zeros_like(images)
    for b in range(batch):
        angle, scale, shear = math.radians(float(p.angle[b])), float(p.scale[b]), float(p.shear[b])
        for y in range(height):
            for x in range(width):
                sy, sx = y - int(p.dy[b]), x - int(p.dx[b])
                if not (0 <= sy < height and 0 <= sx < width):
                    continue
                if p.flip[b]:
                    sx = width - 1 - sx
                right, up = sx - (width - 1) / 2, (height - 1) / 2 - sy
                right, up = (
                    math.cos(angle) * right + math.sin(angle) * up,
                    math.cos(angle) * up - math.sin(angle) * right,
                )
                right, up = right / scale, up / scale
                right -= shear * up
                fx, fy = right + (width - 1) / 2, (height - 1) / 2 - up
                for ny in (math.floor(fy), math.floor(fy) + 1):
                    for nx in (math.floor(fx), math.floor(fx) + 1):
                        if 0 <= ny < height and 0 <= nx < width:
                            weight = (1 - abs(fx - nx)) * (1 - abs(fy - ny))
                            result[b, :, y, x] += weight * images[b, :, ny, nx]
    return result


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    shift=st.integers(0, 12),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shift_and_flip_equal_loops_exactly(
    shape: tuple[int, int, int, int], shift: int, flip: bool, seed: int
) -> None:
    images = torch.rand(shape, generator=seeded(seed))
    p = Augmentation(shift=shift, flip=flip).draw(shape[0], generator=seeded(seed))
    assert torch.equal(augment(images, p), by_loops(images, p))


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(shift=0, rotation=40.0),
        Augmentation(shift=0, scale=0.4),
        Augmentation(shift=0, shear=0.5),
        EVERYTHING,
    ],
)
def test_affine_equals_loops(augmentation: Augmentation) -> None:
    images = torch.rand(3, 2, 11, 7, generator=seeded(1))
    p = augmentation.draw(3, generator=seeded(2))
    torch.testing.assert_close(augment(images, p), by_loops(images, p), atol=1e-5, rtol=0)


def test_shift_moves_right_and_down() -> None:
    images = torch.zeros(1, 1, 5, 7)
    images[0, 0, 2, 3] = 1
    moved = augment(images, parameters(1, dx=torch.tensor([3]), dy=torch.tensor([-1])))
    assert moved.nonzero().tolist() == [[0, 0, 1, 6]]
    assert moved.sum() == 1


def test_a_shift_beyond_the_image_leaves_zeros() -> None:
    far = torch.tensor([5, -5, 1000])
    assert augment(torch.ones(3, 1, 5, 5), parameters(3, dx=far)).sum() == 0
    assert augment(torch.ones(3, 1, 5, 5), parameters(3, dy=far)).sum() == 0


def test_flip_mirrors_left_and_right() -> None:
    images = torch.rand(2, 3, 4, 5, generator=seeded())
    flipped = augment(images, parameters(2, flip=torch.tensor([True, False])))
    assert torch.equal(flipped, torch.stack([images[0].flip(-1), images[1]]))


def test_a_quarter_turn_is_rot90_which_is_counter_clockwise() -> None:
    images = torch.rand(2, 1, 9, 9, generator=seeded())
    turned = augment(images, parameters(2, angle=torch.tensor([90.0, -90.0])))
    expected = torch.stack([torch.rot90(images[0], 1, dims=(1, 2)), torch.rot90(images[1], -1, dims=(1, 2))])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_positive_shear_leans_the_top_to_the_right() -> None:
    images = torch.zeros(1, 1, 9, 9)
    images[..., 4] = 1
    leaning = augment(images, parameters(1, shear=torch.tensor([1.0])))[0, 0]
    torch.testing.assert_close(leaning, torch.eye(9).flip(1), atol=1e-5, rtol=0)


def test_larger_scale_magnifies() -> None:
    images = torch.zeros(2, 1, 28, 28)
    images[..., 9:19, 9:19] = 1
    area = augment(images, parameters(2, scale=torch.tensor([1.2, 0.8]))).sum((1, 2, 3))
    torch.testing.assert_close(area, torch.tensor([144.0, 64.0]), atol=3, rtol=0)


def test_nothing_to_do_returns_the_images() -> None:
    images = torch.rand(3, 1, 6, 6)
    assert augment(images, Augmentation(shift=0).draw(3, generator=seeded())) is images


def test_each_image_is_changed_on_its_own() -> None:
    images = torch.rand(6, 2, 13, 11, generator=seeded())
    p = EVERYTHING.draw(6, generator=seeded(4))
    whole = augment(images, p)
    for rows in (slice(0, 1), slice(2, 5), torch.tensor([5, 0, 3])):
        torch.testing.assert_close(augment(images[rows], p[rows]), whole[rows], atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_does_the_same() -> None:
    images = torch.rand(6, 2, 13, 11, generator=seeded())
    p = EVERYTHING.draw(6, generator=seeded(4))
    torch.testing.assert_close(augment(images.cuda(), p).cpu(), augment(images, p), atol=1e-4, rtol=0)
    shifted = Augmentation(flip=True).draw(6, generator=seeded(4))
    assert torch.equal(augment(images.cuda(), shifted).cpu(), augment(images, shifted))


def test_input_is_left_alone_and_range_kept() -> None:
    images = torch.rand(50, 1, 12, 12, generator=seeded())
    before = images.clone()
    result = augment(images, EVERYTHING.draw(50, generator=seeded()))
    assert torch.equal(images, before)
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6


def test_drawing_is_seeded_and_covers_its_range_evenly() -> None:
    p, again = (EVERYTHING.draw(20_000, generator=seeded(7)) for _ in range(2))
    other = EVERYTHING.draw(20_000, generator=seeded(8))
    for field in fields(p):
        assert torch.equal(getattr(p, field.name), getattr(again, field.name))
        assert not torch.equal(getattr(p, field.name), getattr(other, field.name))
    assert (p.dx.dtype, p.flip.dtype, p.angle.dtype) == (torch.int64, torch.bool, torch.float32)
    pairs = torch.stack([p.dx + 2, p.dy + 2])
    counts = (pairs[0] * 5 + pairs[1]).bincount(minlength=25)
    assert len(counts) == 25
    assert (counts - 800).abs().max() < 150  # 800 expected, standard deviation 28
    assert p.flip.float().mean() == pytest.approx(0.5, abs=0.02)
    for values, low, high in ((p.angle, -30, 30), (p.scale, 0.8, 1.2), (p.shear, -0.3, 0.3)):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high


def test_one_change_switched_off_leaves_the_others() -> None:
    p = EVERYTHING.draw(9, generator=seeded(3))
    q = replace(EVERYTHING, shift=0, flip=False).draw(9, generator=seeded(3))
    assert (q.dx == 0).all()
    assert not q.flip.any()
    assert torch.equal(p.angle, q.angle)


def test_slicing_keeps_every_field() -> None:
    p = EVERYTHING.draw(7, generator=seeded())
    part = p[2:7:2]
    assert len(part) == 3
    assert all(torch.equal(getattr(part, f.name), getattr(p, f.name)[[2, 4, 6]]) for f in fields(p))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"shift": -1}, "shift of the augmentation must be 0 pixels or more; got -1"),
        ({"rotation": 181.0}, "rotation of the augmentation must be 0 to 180 degrees; got 181.0"),
        ({"rotation": float("nan")}, "rotation .* got nan"),
        ({"scale": 1.0}, "scale of the augmentation must be at least 0 and below 1; got 1.0"),
        ({"shear": -0.1}, "shear of the augmentation must be finite and at least 0; got -0.1"),
        ({"shear": float("inf")}, "shear .* got inf"),
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**limits)  # type: ignore[arg-type]


def test_parameters_for_another_batch_are_refused() -> None:
    with pytest.raises(InputError, match="parameters of augment must be one set per image, 3; got 2"):
        augment(torch.rand(3, 1, 4, 4), parameters(2))
