import math
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsnet.data.augment import WORDS, Augmentation, AugmentationParameters, augment, centre_crop, move
from capsnet.errors import InputError
from capsnet.options import DataOptions

EVERYTHING = Augmentation(
    shift=2, flip=True, rotation=30.0, scale=0.2, shear=0.3, crop=6, brightness=0.25, contrast=0.8
)
DRAWN = [field.name for field in fields(AugmentationParameters) if field.name != "crop" and "erase" not in field.name]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(count: int, **changed: Any) -> AugmentationParameters:
    """Parameters that change nothing, those in `changed` replaced."""
    nothing = Augmentation(shift=0).draw(count, generator=seeded())
    return replace(nothing, **changed)


def by_loops(images: Tensor, p: AugmentationParameters) -> Tensor:
    """Each pixel's source: unshift, unflip, rotate back, unscale, unshear; bilinear, zero outside; crop and light."""
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
    if p.crop is not None:
        squares = torch.zeros(batch, images.shape[1], p.crop, p.crop)
        for b in range(batch):
            top = math.floor(float(p.crop_y[b]) * (height - p.crop + 1))
            left = math.floor(float(p.crop_x[b]) * (width - p.crop + 1))
            for y in range(p.crop):
                for x in range(p.crop):
                    squares[b, :, y, x] = result[b, :, top + y, left + x]
        result = squares
    for b in range(batch):
        for c in range(images.shape[1]):
            brighter = result[b, c] + p.brightness[b]
            mean = sum(brighter.flatten().tolist()) / brighter.numel()
            result[b, c] = p.contrast[b] * brighter + (1 - p.contrast[b]) * mean
    return result.clamp(0, 1)


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
        Augmentation(shift=0, crop=7),
        Augmentation(shift=0, crop=1),
        Augmentation(shift=0, brightness=0.4),
        Augmentation(shift=0, contrast=1.0),
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
    for name in DRAWN:
        assert torch.equal(getattr(p, name), getattr(again, name))
        assert not torch.equal(getattr(p, name), getattr(other, name))
    assert (p.dx.dtype, p.flip.dtype, p.angle.dtype) == (torch.int64, torch.bool, torch.float32)
    pairs = torch.stack([p.dx + 2, p.dy + 2])
    counts = (pairs[0] * 5 + pairs[1]).bincount(minlength=25)
    assert len(counts) == 25
    assert (counts - 800).abs().max() < 150  # 800 expected, standard deviation 28
    assert p.flip.float().mean() == pytest.approx(0.5, abs=0.02)
    assert EVERYTHING.crop == p.crop
    for values, low, high in (
        (p.angle, -30, 30),
        (p.scale, 0.8, 1.2),
        (p.shear, -0.3, 0.3),
        (p.crop_x, 0, 1),
        (p.crop_y, 0, 1),
        (p.brightness, -0.25, 0.25),
        (p.contrast, 0.2, 1.8),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high


def test_a_square_is_erased_anywhere_inside_and_nothing_else_changes() -> None:
    images = torch.rand(3000, 2, 5, 7, generator=seeded()) + 0.01
    p = Augmentation(shift=0, erase=3).draw(3000, generator=seeded(1))
    erased = augment(images, p) != images
    assert torch.equal(erased[:, 0], erased[:, 1])
    assert (erased[:, 0].sum((1, 2)) == 9).all()
    rows, columns = erased[:, 0].any(2), erased[:, 0].any(1)
    assert ((rows.sum(1) == 3) & (columns.sum(1) == 3)).all()
    corners = rows.int().argmax(1) * 5 + columns.int().argmax(1)
    assert (corners.bincount(minlength=15) - 200).abs().max() < 70  # 3 x 5 places, standard deviation 14
    assert not augment(images, Augmentation(shift=0, erase=9).draw(3000, generator=seeded(1))).any()
    part = p[2:7:2]
    assert (part.erase, part.erase_x.tolist()) == (3, p.erase_x[2:7:2].tolist())
    before, after = (Augmentation(erase=size).draw(9, generator=seeded(3)) for size in (0, 3))
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in DRAWN)


def test_one_word_for_an_augmentation() -> None:
    def made(*, channels: int = 1, **options: Any) -> Augmentation:
        return Augmentation.of(DataOptions(**options), shift=4, crop=None, image_shape=(channels, 64, 48))

    words, _ = get_args(get_type_hints(DataOptions)["augment"])
    assert set(WORDS) == set(get_args(words))
    assert made() == Augmentation(shift=4)
    assert made(augment="none") == Augmentation(shift=0)
    assert made(augment="affine") == Augmentation(shift=4, rotation=15.0, scale=0.1, shear=0.1)
    assert made(augment="affine", shift=0, rotation=5.0, erase=2) == Augmentation(
        shift=0, rotation=5.0, scale=0.1, shear=0.1, erase=2
    )
    photo = Augmentation(shift=5, rotation=10.0, scale=0.1, brightness=0.2, contrast=0.2)  # a tenth of 48 pixels
    assert made(augment="photo") == photo, "grey images are not mirrored"
    assert made(augment="photo", channels=3) == replace(photo, flip=True)
    assert made(augment="photo", flip=True, shift=1) == replace(photo, flip=True, shift=1)
    assert str(replace(photo, flip=True)) == (
        "shift 5 pixels, flip, rotation 10 degrees, scale 0.1, brightness 0.2, contrast 0.2"
    )
    assert str(made(augment="none")) == "nothing"
    assert made(augment="none", flip=True) == Augmentation(shift=0, flip=True)
    assert made(augment="photo", channels=3, flip=False, rotation=0.0) == replace(photo, rotation=0.0), "no is no"


def test_one_change_switched_off_leaves_the_others() -> None:
    p = EVERYTHING.draw(9, generator=seeded(3))
    q = replace(EVERYTHING, shift=0, flip=False, crop=None, brightness=0.0).draw(9, generator=seeded(3))
    assert (q.dx == 0).all()
    assert (q.brightness == 0).all()
    assert q.crop is None
    assert torch.equal(p.contrast, q.contrast)
    assert not q.flip.any()
    assert torch.equal(p.angle, q.angle)


def test_slicing_keeps_every_field() -> None:
    p = EVERYTHING.draw(7, generator=seeded())
    part = p[2:7:2]
    assert len(part) == 3
    assert all(torch.equal(getattr(part, name), getattr(p, name)[[2, 4, 6]]) for name in DRAWN)
    assert part.crop == p.crop


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"erase": -1}, "erase of the augmentation must be 0 pixels or more; got -1"),
        ({"shift": -1}, "shift of the augmentation must be 0 pixels or more; got -1"),
        ({"rotation": 181.0}, "rotation of the augmentation must be 0 to 180 degrees; got 181.0"),
        ({"rotation": float("nan")}, "rotation .* got nan"),
        ({"scale": 1.0}, "scale of the augmentation must be at least 0 and below 1; got 1.0"),
        ({"shear": -0.1}, "shear of the augmentation must be finite and at least 0; got -0.1"),
        ({"shear": float("inf")}, "shear .* got inf"),
        ({"crop": 0}, "crop of the augmentation must be at least 1 pixel; got 0"),
        ({"brightness": -0.1}, "brightness of the augmentation must be 0 to 1; got -0.1"),
        ({"brightness": float("nan")}, "brightness .* got nan"),
        ({"contrast": 1.1}, "contrast of the augmentation must be 0 to 1; got 1.1"),
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**limits)  # type: ignore[arg-type]


def test_parameters_for_another_batch_are_refused() -> None:
    with pytest.raises(InputError, match="parameters of augment must be one set per image, 3; got 2"):
        augment(torch.rand(3, 1, 4, 4), parameters(2))


def test_numbers_of_older_versions_are_drawn_as_ever() -> None:
    """A run that began without crops and light goes on with the same shifts."""
    uniform = torch.rand(6, 5, generator=seeded(11), dtype=torch.float64)
    p = EVERYTHING.draw(5, generator=seeded(11))
    assert torch.equal(p.dx, (5 * uniform[0]).long() - 2)
    assert torch.equal(p.dy, (5 * uniform[1]).long() - 2)
    assert torch.equal(p.flip, uniform[2] < 0.5)
    assert torch.equal(p.angle, 30 * (2 * uniform[3] - 1).float())
    assert torch.equal(p.scale, 1 + 0.2 * (2 * uniform[4] - 1).float())
    assert torch.equal(p.shear, 0.3 * (2 * uniform[5] - 1).float())


def test_what_the_generator_is_asked_for_depends_on_the_count_alone() -> None:
    one, other = seeded(1), seeded(1)
    Augmentation(shift=0).draw(7, generator=one)
    EVERYTHING.draw(7, generator=other)
    assert torch.equal(one.get_state(), other.get_state())


def test_every_crop_is_as_likely() -> None:
    images = torch.arange(20.0).view(1, 1, 4, 5).expand(3000, 1, 4, 5) / 20
    p = Augmentation(shift=0, crop=3).draw(3000, generator=seeded(2))
    cropped = augment(images, p)
    assert cropped.shape == (3000, 1, 3, 3)
    first = (cropped[:, 0, 0, 0] * 20).round().long()
    counts = first.bincount(minlength=20)
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7]
    assert (counts[counts > 0] - 500).abs().max() < 100  # standard deviation 20
    assert torch.equal((cropped[0, 0] * 20).round(), first[0] + torch.tensor([[0.0, 1, 2], [5, 6, 7], [10, 11, 12]]))


def test_a_crop_of_the_whole_changes_nothing() -> None:
    images = torch.rand(3, 2, 6, 6, generator=seeded())
    assert torch.equal(augment(images, Augmentation(shift=0, crop=6).draw(3, generator=seeded())), images)


def test_light_by_hand() -> None:
    """Mean 0.5 after the change of brightness; twice as far from it, and cut off."""
    images = torch.tensor([0.1, 0.3, 0.5, 0.7]).view(1, 1, 2, 2)
    lit = augment(images, parameters(1, brightness=torch.tensor([0.1]), contrast=torch.tensor([2.0])))
    torch.testing.assert_close(lit.flatten(), torch.tensor([0.0, 0.3, 0.7, 1.0]), atol=1e-6, rtol=0)
    grey = augment(images, parameters(1, contrast=torch.tensor([0.0])))
    torch.testing.assert_close(grey, torch.full((1, 1, 2, 2), 0.4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_centre_is_cut_out(dtype: torch.dtype) -> None:
    images = torch.arange(42).view(1, 1, 6, 7).to(dtype)
    assert torch.equal(centre_crop(images, 3)[0, 0], images[0, 0, 1:4, 2:5])
    assert torch.equal(centre_crop(images, 6), images[..., :6])


@pytest.mark.parametrize("size", [0, 6])
def test_a_crop_larger_than_the_image_is_refused(size: int) -> None:
    message = f"crop must be 1 to 5 pixels for images of 5 x 8; got {size}"
    with pytest.raises(InputError, match=message):
        centre_crop(torch.zeros(1, 1, 5, 8), size)
    if size:
        p = Augmentation(shift=0, crop=size).draw(1, generator=seeded())
        with pytest.raises(InputError, match=message):
            augment(torch.zeros(1, 1, 5, 8), p)


def test_moving_does_bytes_too() -> None:
    images = torch.randint(0, 256, (4, 2, 5, 6), dtype=torch.uint8, generator=seeded())
    p = replace(EVERYTHING, shift=3).draw(4, generator=seeded(1))
    still = parameters(4, dx=p.dx, dy=p.dy, flip=p.flip)
    moved = move(images, p)
    assert moved.dtype == torch.uint8
    torch.testing.assert_close(moved.float(), 255 * augment(images / 255, still), atol=1e-3, rtol=0)
