import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capsnet import data
from capsnet.data import Split
from capsnet.data.sets import affnist_generated
from capsnet.data.sets.affnist import parse
from capsnet.data.sets.affnist_generated import FACTORS, generated, in_place, transform
from capsnet.data.sets.expanded_mnist import padded, placed
from capsnet.errors import InputError
from tiny import REAL

real = pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"no mnist in {REAL}; set CAPSNET_DATA")
COS, SIN = math.cos(math.radians(20)), math.sin(math.radians(20))
SHIFTS = ("shift_x_pixels", "shift_y_pixels")


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAPSNET_DATA", raising=False)
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAPSNET_OFFLINE", "1")


def digits(count: int, *, size: int = 28, ink: int = 20, seed: int = 0) -> Split:
    """Noise in a square of `ink` x `ink` pixels in the middle of black, as MNIST's digits lie, with black in it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    edge = (size - ink) // 2
    drawn = torch.randint(-100, 256, (count, 1, ink, ink), generator=generator).clamp(min=0)
    images[..., edge : edge + ink, edge : edge + ink] = drawn.to(torch.uint8)
    return Split(images, torch.arange(count) % 10)


def parameters(count: int = 1, **changed: Any) -> dict[str, Tensor]:
    """Those that change nothing, the ones in `changed` replaced."""
    plain = dict.fromkeys((*FACTORS, *SHIFTS), 0.0) | {"scale_x": 1.0, "scale_y": 1.0} | changed
    return {name: torch.as_tensor(value).float().expand(count).contiguous() for name, value in plain.items()}


def blob(right: float, up: float, *, size: int = 29) -> Tensor:
    """A lit pixel at a whole distance from the middle of an odd image."""
    images = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    images[0, 0, size // 2 - int(up), size // 2 + int(right)] = 255
    return images


def centre(images: Tensor) -> tuple[float, float]:
    """Centre of mass from the image's centre: right, up."""
    weight = images[0, 0].double() / images.double().sum()
    place = torch.arange(len(weight)).double() - (len(weight) - 1) / 2
    return float(weight.sum(0) @ place), -float(weight.sum(1) @ place)


# transformations


def test_no_transformation_is_padding_exactly() -> None:
    images = digits(7).images
    framed = padded(images)
    assert torch.equal(transform(images, parameters(7)), framed)
    assert framed.shape == (7, 1, 40, 40)
    assert torch.equal(framed[..., 6:34, 6:34], images)
    assert framed.sum() == images.sum()


def test_whole_shifts_move_pixels_right_and_down_and_change_none() -> None:
    images = digits(2).images
    moved = transform(images, parameters(2, shift_x_pixels=[3.0, -6.0], shift_y_pixels=[-5.0, 2.0]))
    assert torch.equal(moved[0], padded(images)[0].roll((-5, 3), (1, 2)))
    assert torch.equal(moved[1], padded(images)[1].roll((2, -6), (1, 2)))


@pytest.mark.parametrize(
    ("changed", "right", "up"),
    [
        ({"rotation_degrees": 90.0}, -4, 10),
        ({"rotation_degrees": 20.0}, 10 * COS - 4 * SIN, 10 * SIN + 4 * COS),
        ({"scale_x": 1.2}, 12, 4),
        ({"scale_y": 0.75}, 10, 3),
        ({"shear": 0.5}, 12, 4),
        ({"shift_x_pixels": -7.5, "shift_y_pixels": 2.0}, 2.5, 2),
        ({"shear": 0.5, "scale_x": 0.5, "scale_y": 2.0}, 6, 8),
        ({"shear": 0.5, "rotation_degrees": -90.0}, 4, -12),
        ({"scale_x": 1.5, "rotation_degrees": 90.0}, -4, 15),
        ({"rotation_degrees": 90.0, "shift_x_pixels": 3.0}, -1, 10),
    ],
)
def test_a_point_goes_where_trigonometry_says(changed: dict[str, Any], right: float, up: float) -> None:
    """The point 10 to the right and 4 above the centre; sheared, scaled, rotated, then shifted."""
    found = centre(transform(blob(10, 4), parameters(**changed), size=41))
    assert found == pytest.approx((right, up), abs=0.15)


def test_transforming_keeps_the_share_of_ink_that_scales_say() -> None:
    images = torch.full((1, 1, 20, 20), 200, dtype=torch.uint8)
    ink = transform(images, parameters(rotation_degrees=17.0, shear=0.1, scale_x=1.1, scale_y=0.9)).double().sum()
    assert float(ink) == pytest.approx(200 * 400 * 1.1 * 0.9, rel=0.01)


def test_colours_and_other_sizes_are_transformed_alike() -> None:
    images = torch.randint(0, 256, (2, 3, 11, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = parameters(2, rotation_degrees=30.0, shear=0.1, shift_x_pixels=1.0)
    result = transform(images, whole, size=23)
    assert result.shape == (2, 3, 23, 23)
    assert torch.equal(result[:, 1:2], transform(images[:, 1:2], whole, size=23))
    assert torch.equal(transform(images, parameters(2), size=23), padded(images, size=23))


def test_images_do_not_depend_on_the_chunk_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    split = digits(7)
    whole = generated(split, seed=3)
    monkeypatch.setattr(affnist_generated, "_CHUNK", 3)
    assert torch.equal(generated(split, seed=3).images, whole.images)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shear": None}, r"parameters of transform must be rotation_degrees, .*; got rotation_degrees, scale_x, "),
        ({"skew": [0.0]}, "parameters of transform must be .* got .*, skew$"),
        ({"shear": [0.0, 1.0]}, r"shear of transform must be one value per image, \[1\]; got \[2\]"),
        ({"scale_y": [0.0]}, "scale_y of transform must be above 0; got 0"),
    ],
)
def test_wrong_parameters_are_refused(changed: dict[str, Any], message: str) -> None:
    wrong = {name: value for name, value in (parameters() | changed).items() if value is not None}
    with pytest.raises(InputError, match=message):
        transform(blob(0, 0), {name: torch.as_tensor(value) for name, value in wrong.items()})


# the generated test set


def test_same_seed_same_bytes_and_true_factors() -> None:
    split = digits(30)
    first, again, other = (generated(split, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert set(first.factors) == {*FACTORS, *SHIFTS}
    assert all(values.dtype == torch.float32 for values in first.factors.values())
    assert torch.equal(transform(split.images, first.factors), first.images)
    assert torch.equal(first.labels, split.labels)


def test_in_place_images_keep_their_size_and_centre_and_have_the_factors_of_the_generated_set() -> None:
    split = digits(30, size=28)
    made, moved = in_place(split, seed=5), generated(split, seed=5)
    assert set(made.factors) == set(FACTORS)
    for name in FACTORS:
        assert torch.equal(made.factors[name], moved.factors[name])
    still = {**made.factors, **dict.fromkeys(SHIFTS, torch.zeros(30))}
    assert torch.equal(made.images, transform(split.images, still, size=28))
    assert torch.equal(made.labels, split.labels)
    tall = replace(split, images=split.images[:, :, 1:-1])  # two rows of black less
    assert torch.equal(in_place(tall, seed=5).images, made.images[:, :, 1:-1])


def test_factors_are_uniform_in_their_ranges_and_independent() -> None:
    factors = generated(digits(4000, size=4, ink=2), seed=0).factors
    assert FACTORS == {
        "rotation_degrees": (-20.0, 20.0),
        "shear": (-0.2, 0.2),
        "scale_x": (0.8, 1.2),
        "scale_y": (0.8, 1.2),
    }
    for name, (low, high) in FACTORS.items():
        assert low <= factors[name].min()
        assert factors[name].max() <= high
        counts = ((factors[name] - low) / (high - low) * 10).long().clamp(max=9).bincount(minlength=10)
        assert (counts - 400).abs().max() < 90, name  # standard deviation 19
    for name in SHIFTS:  # room for two pixels in forty, a little less or more as the image turns
        assert factors[name].min() < -17
        assert factors[name].max() > 17
        assert abs(float(factors[name].mean())) < 1
    correlations = torch.corrcoef(torch.stack(list(factors.values()))) - torch.eye(6)
    assert correlations.abs().max() < 0.07


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), ink=st.integers(1, 20))
def test_no_ink_falls_off(seed: int, ink: int) -> None:
    """On a larger ground with the same factors, nothing lies outside of the 40 x 40 pixels."""
    split = digits(6, ink=ink, seed=seed)
    made = generated(split, seed=seed)
    wide = transform(split.images, made.factors, size=60)
    assert wide[..., 10:50, 10:50].sum() == wide.sum()
    assert torch.equal(wide[..., 10:50, 10:50], made.images)


def test_ink_comes_close_to_every_edge() -> None:
    lit = generated(digits(300), seed=1).images[:, 0] > 0
    for edge in (lit[:, :2], lit[:, -2:], lit[:, :, :2], lit[:, :, -2:]):
        assert edge.any((1, 2)).float().mean() > 0.05


def test_a_blank_image_stays_blank() -> None:
    blank = Split(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert generated(blank, seed=0).images.sum() == 0


def test_ink_too_large_for_the_ground_is_refused() -> None:
    with pytest.raises(InputError, match="images must hold ink that fits into 40 x 40 pixels when transformed"):
        generated(digits(20, size=40, ink=40), seed=0)


# digits at random places


def test_every_place_is_as_likely_and_told() -> None:
    split = digits(5000, size=28, ink=4)
    moved = placed(split, seed=2)
    dx, dy = (moved.factors[name].long() for name in SHIFTS)
    counts = ((dx + 6) * 13 + dy + 6).bincount(minlength=169)
    assert len(counts) == 169
    assert (counts - 5000 / 169).abs().max() < 30  # standard deviation 5
    for n in range(50):
        assert torch.equal(moved.images[n], padded(split.images)[n].roll((int(dy[n]), int(dx[n])), (1, 2)))
    assert torch.equal(placed(split, seed=2).images, moved.images)
    assert not torch.equal(placed(split, seed=3).images, moved.images)


def test_images_larger_than_the_ground_are_refused() -> None:
    with pytest.raises(InputError, match="images must be at most 40 x 40 pixels to be placed there; got 44 x 44"):
        padded(torch.zeros(1, 1, 44, 44, dtype=torch.uint8))


# the official file


def matlab(**fields: Any) -> bytes:
    """A MATLAB file with the structure `affNISTdata` of the given fields."""
    file = io.BytesIO()
    scipy.io.savemat(file, {"affNISTdata": fields}, do_compression=True)
    return file.getvalue()


def official(count: int, *, seed: int = 0, **changed: Any) -> bytes:
    """As affNIST lays out its test set: a column of 1600 pixels per image, row by row."""
    draw = np.random.default_rng(seed)
    fields = {
        "affine_matrix": draw.random((6, count)),
        "human_readable_transform": draw.random((6, count)),
        "image": draw.integers(0, 256, (1600, count), dtype=np.uint8),
        "label_int": (np.arange(count, dtype=np.uint8) % 10)[None],
        "label_one_of_n": np.eye(10)[:, np.arange(count) % 10],
    }
    return matlab(**fields | changed)


def test_an_official_file_is_read_row_by_row() -> None:
    """A horizontal bar near the top stays one, and is not read as a vertical bar at the left."""
    columns = np.zeros((1600, 3), np.uint8)
    columns[2 * 40 + 5 : 2 * 40 + 35, 1] = 255
    images, labels = parse(official(3, image=columns), "test.mat")
    assert (images.shape, images.dtype, labels.dtype) == ((3, 1, 40, 40), torch.uint8, torch.int64)
    assert images[1, 0].any(1).nonzero().flatten().tolist() == [2]
    assert images[1, 0, 2].nonzero().flatten().tolist() == list(range(5, 35))
    assert images[[0, 2]].sum() == 0
    assert labels.tolist() == [0, 1, 2]


def test_a_file_of_one_image_is_read() -> None:
    images, labels = parse(official(1), "1.mat")
    assert (images.shape, labels.tolist()) == ((1, 1, 40, 40), [0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.mat must be a whole MATLAB file of version 5; got another or a damaged one"),
        (b"PK\x03\x04 a zip file" * 20, "x.mat must be a whole MATLAB file"),
        (official(5)[:-300], "x.mat must be a whole MATLAB file"),
        (matlab(image=1), r"x.mat must hold affNISTdata with the fields image and label_int; got image"),
        (
            official(5, image=np.zeros((1600, 5))),
            r"x.mat must hold images of uint8 \[1600, N\]; got float64 \[1600, 5\]",
        ),
        (official(5, image=np.zeros((784, 5), np.uint8)), r"x.mat must hold images .*; got uint8 \[784, 5\]"),
        (official(5, label_int=np.zeros((1, 4), np.uint8)), r"must hold a label for each of the 5 images; got .*4\]"),
        (official(5, label_int=np.full((1, 5), 10, np.uint8)), "x.mat must have labels 0 to 9; got 10 to 10"),
    ],
)
def test_another_file_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(content, "x.mat")


def test_a_file_without_the_structure_is_refused() -> None:
    file = io.BytesIO()
    scipy.io.savemat(file, {"X": np.zeros(3)})
    with pytest.raises(InputError, match=r"x.mat must hold a variable affNISTdata; got none of that name"):
        parse(file.getvalue(), "x.mat")
    file = io.BytesIO()
    scipy.io.savemat(file, {"affNISTdata": np.zeros(3)})
    with pytest.raises(InputError, match=r"x.mat must hold affNISTdata with the fields .*; got none"):
        parse(file.getvalue(), "x.mat")


@pytest.mark.parametrize("folder", ["affnist", "affnist/test_batches", "", "test_batches"])
def test_batches_are_joined_in_the_order_of_their_numbers(tmp_path: Path, folder: str) -> None:
    place = tmp_path / "given" / folder
    place.mkdir(parents=True)
    for number in (1, 2, 10):
        (place / f"{number}.mat").write_bytes(official(3, seed=number))
    (place / "train_32x32.mat").write_bytes(b"of another data set")
    test = data.load_split("affnist", "test", data_dir=tmp_path / "given")
    assert len(test) == 9
    assert torch.equal(test.images[6:], parse(official(3, seed=10), "10.mat")[0])
    (tmp_path / "given" / "affnist").mkdir(exist_ok=True)
    (tmp_path / "given" / "affnist" / "test.mat").write_bytes(official(4, seed=7))
    assert len(data.load_split("affnist", "test", data_dir=tmp_path / "given")) == 4


def test_a_missing_file_is_told_with_its_source_and_the_way_without(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        data.load("affnist", data_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "test.mat or test_batches/",
        "affNIST/32x/transformed/test.mat.zip",
        str(tmp_path),
        "affnist-generated",
    ):
        assert part in message


@pytest.mark.parametrize("root", ["data_dir", "CAPSNET_DATA"])
def test_a_damaged_file_is_told_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    for name, content in {"damaged": official(4)[:-100], "cache": official(4), "sound": official(4)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.mat").write_bytes(content)
    given, named = ("damaged", "sound") if root == "data_dir" else (None, "damaged")
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / named))
    with pytest.raises(InputError, match=rf"^{tmp_path}/damaged/test.mat must be a whole MATLAB file of version 5"):
        data.load_split("affnist", "test", data_dir=given and tmp_path / given)
    (tmp_path / "damaged" / "test.mat").unlink()
    if root == "data_dir":
        with pytest.raises(InputError, match=r"^data set affnist must be on this machine; missing: test.mat"):
            data.load_split("affnist", "test", data_dir=tmp_path / "damaged")
    else:
        assert len(data.load_split("affnist", "test")) == 4


def test_describing_affnist_tells_its_own_file(tmp_path: Path) -> None:
    missing = data.describe("affnist", data_dir=tmp_path).missing
    assert missing == ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "test.mat")
    (tmp_path / "test.mat").touch()
    one = data.describe("affnist", data_dir=tmp_path)
    assert (one.missing[-1], one.where) == ("train-labels-idx1-ubyte.gz", (tmp_path / "test.mat",))


# with MNIST's own images


@real
def test_real_mnist_at_random_places() -> None:
    mnist = data.load_split("mnist", "test", data_dir=REAL)
    test = data.load_split("expanded-mnist", "test", data_dir=REAL)
    assert test.images.shape == (10_000, 1, 40, 40)
    assert torch.equal(test.images.sum((1, 2, 3)), mnist.images.sum((1, 2, 3)))
    assert torch.equal(test.labels, mnist.labels)
    with pytest.raises(InputError, match=r"^split of expanded-mnist must be among train, test; got validation$"):
        data.load_split("expanded-mnist", "validation", data_dir=REAL)


@pytest.mark.slow
@real
@pytest.mark.parametrize("name", ["expanded-mnist", "affnist-generated", "affnist"])
def test_real_mnist_is_trained_on_centred_and_judged_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "mnist").symlink_to(REAL / "mnist")
    (tmp_path / "test.mat").write_bytes(official(20))
    mnist = data.load("mnist", data_dir=REAL)
    read = data.load(name, data_dir=tmp_path)
    assert (read.image_shape, read.shift, len(read.train)) == ((1, 40, 40), 6, 60_000)
    assert len(read.test) == (20 if name == "affnist" else 10_000)
    assert torch.equal(read.train.images[..., 6:34, 6:34], mnist.train.images)
    held_out = read.with_validation(500, seed=0).validation
    assert held_out is not None
    held_out.images[..., 6:34, 6:34] = 0
    assert int(held_out.images.any(-1).any((1, 2)).sum()) > 100  # digits stand anywhere: many reach out of the middle
    about = data.describe(name, data_dir=tmp_path)
    assert (about.missing, about.image_shape, about.train) == ((), (1, 40, 40), 60_000)
    small = data.load(name, data_dir=tmp_path, image_size=20, channels=3)
    assert (small.image_shape, small.shift) == ((3, 20, 20), 3)


@pytest.mark.slow
@real
def test_real_digits_under_affine_transformations_keep_their_ink() -> None:
    mnist, made = (data.load_split(name, "test", data_dir=REAL) for name in ("mnist", "affnist-generated"))
    assert torch.equal(made.labels, mnist.labels)
    assert set(made.factors) == {*FACTORS, *SHIFTS}
    area = made.factors["scale_x"] * made.factors["scale_y"]
    share = made.images.sum((1, 2, 3)) / mnist.images.sum((1, 2, 3)) / area
    assert (share - 1).abs().max() < 0.1
    assert float(share.mean()) == pytest.approx(1, abs=0.001)


@pytest.mark.skipif(not (REAL / "affnist").is_dir(), reason=f"no affnist in {REAL}; set CAPSNET_DATA")
def test_real_affnist_has_upright_ones() -> None:
    test = data.load_split("affnist", "test", data_dir=REAL)
    lit = test.images[test.labels == 1][:, 0] > 127
    assert (lit.any(2).sum(1) > lit.any(1).sum(1)).float().mean() > 0.9
