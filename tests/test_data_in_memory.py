"""Images that a program holds as a data set: what is taken, how it is read and divided, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

import capsnet
from capsnet.data import Dataset, dataset_of, load
from capsnet.data.in_memory import encoded, pixels_of, to_uint8
from capsnet.errors import InputError
from capsnet.training.fit import fit, resume
from tiny import SIZES, same_weights
from tiny import photos as folder_of


class Folder(torch.utils.data.Dataset[Any]):
    """As torchvision's `ImageFolder`: `classes`, and pairs of a PIL image and a number; `transform` as there."""

    def __init__(self, root: Path, transform: Callable[[Image.Image], Any] = lambda image: image) -> None:
        self.classes = sorted(path.name for path in root.iterdir())
        self.samples = [(path, k) for k, name in enumerate(self.classes) for path in sorted((root / name).iterdir())]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(Image.open(path).convert("RGB")), label


def to_tensor(image: Image.Image) -> Tensor:
    """As torchvision's `ToTensor`: floats in [0, 1], channels first."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def equal(one: Dataset, other: Dataset) -> bool:
    return (
        one.classes == other.classes
        and one.preprocessing == other.preprocessing
        and torch.equal(one.train.images, other.train.images)
        and torch.equal(one.test.images, other.test.images)
        and torch.equal(one.train.labels, other.train.labels)
        and torch.equal(one.test.labels, other.test.labels)
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("large") / "photos", count=9, size=(60, 50))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("small") / "photos", count=9)


@pytest.mark.parametrize(
    "options", [{}, {"image_size": "14x20", "resize": "crop"}, {"channels": 1}, {"seed": 3}], ids=str
)
@pytest.mark.parametrize("name", ["small", "large"])
def test_pil_images_make_the_data_set_of_the_folder_of_their_files(
    name: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(name)
    ours, theirs = dataset_of(Folder(root), **options), load(root, **options)
    assert equal(ours, theirs)
    assert ours.preprocessing is not None
    assert bool(ours.notes) == (ours.image_shape[1:] != (12, 13) and len(options) < 2)


def test_grey_and_deep_and_turned_images_are_read_as_files_of_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    made: list[Image.Image] = []
    for k in range(8):
        deep = draw.integers(0, 4096, (20, 20), dtype=np.uint16)
        made.append(Image.fromarray(deep) if k % 2 else Image.fromarray((deep // 16).astype(np.uint8)))
        made[-1].getexif()[0x0112] = 6 if k < 4 else 1
        (tmp_path / "ab"[k // 4]).mkdir(exist_ok=True)
        made[-1].save(tmp_path / "ab"[k // 4] / f"{k}.png", exif=made[-1].getexif())
    assert equal(dataset_of([(image, "ab"[k // 4]) for k, image in enumerate(made)]), load(tmp_path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_each_mode_of_a_pil_image_is_taken(mode: str) -> None:
    image = Image.new("I;16", (9, 8), 700) if mode == "I;16" else Image.new("L", (9, 8), 200).convert(mode)
    assert dataset_of([(image, 0), (image, 1)] * 2).image_shape == (1, 8, 9)
    assert isinstance(encoded(image), bytes)


def test_a_subset_has_the_classes_of_the_whole(small: Path) -> None:
    part = torch.utils.data.Subset(Folder(small), [*range(8), *range(18, 26)])
    with pytest.raises(InputError, match=r"^class b must have at least 2 images, one to train and one to test; got 0$"):
        dataset_of(part)
    assert dataset_of({"train": Folder(small), "test": part}).classes == ("a", "b", "c")


def test_tensors_of_a_torch_dataset_are_their_pixels(small: Path) -> None:
    assert equal(dataset_of(Folder(small, to_tensor)), dataset_of(Folder(small)))


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("kind", ["array", "tensor", "floats", "list"])
@pytest.mark.parametrize("last", [False, True])
def test_arrays_and_tensors_are_taken_as_they_are(channels: int, kind: str, last: bool) -> None:
    shape = (12, channels, 6, 7) if channels else (12, 6, 7)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given: Any = images.permute(0, 2, 3, 1) if last and channels else images
    given = {"array": given.numpy(), "tensor": given, "floats": given / 255, "list": list(given)}[kind]
    labels = torch.arange(12) % 3
    found = dataset_of((given, labels))
    assert found.classes == ("0", "1", "2")
    assert found.image_shape == (channels or 1, 6, 7)
    whole = images if channels else images[:, None]
    every = torch.cat([found.train.images, found.test.images])
    assert sorted(every.flatten(1).tolist()) == sorted(whole.flatten(1).tolist())
    assert found.test.labels.tolist() == [0, 1, 2], "a sixth of each class"
    for split in (found.train, found.test):
        for image, label in zip(split.images, split.labels, strict=True):
            place = (whole == image).flatten(1).all(1).nonzero().item()
            assert place % 3 == label


def test_a_tensor_dataset_and_integers_of_any_type() -> None:
    images = torch.randint(0, 256, (8, 1, 5, 5))
    found = dataset_of(TensorDataset(images, torch.arange(8) % 2))
    assert equal(found, dataset_of((images.numpy().astype(np.uint16), [0, 1] * 4)))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, 7] * 4, ("3", "7")),
        ([10, 9] * 4, ("9", "10")),
        (np.array([1, 0] * 4, np.int16), ("0", "1")),
        ([torch.tensor(1), np.int64(0)] * 4, ("0", "1")),
        (["dog", "cat"] * 4, ("cat", "dog")),
        (np.array(["dog", "cat"] * 4), ("cat", "dog")),
    ],
)
def test_classes_are_the_distinct_labels_in_order(labels: Any, classes: tuple[str, ...]) -> None:
    found = dataset_of((np.arange(8).repeat(25).reshape(8, 5, 5) % 2, labels))
    assert found.classes == classes
    first = labels[0].item() if hasattr(labels[0], "item") else labels[0]
    assert str(first) in classes
    assert found.train.labels.tolist() == [0] * 3 + [1] * 3
    assert (found.train.images[:3] == (0 if str(first) == classes[0] else 1)).all()


def numbers(count: int, classes: int = 2) -> tuple[np.ndarray, list[int]]:
    return np.arange(count * 25).astype(np.uint8).reshape(count, 5, 5), [k % classes for k in range(count)]


def test_splits_that_are_given_stay() -> None:
    train, test, held = numbers(8), numbers(4), numbers(6)
    found = dataset_of({"train": train, "test": test, "validation": held})
    assert (len(found.train), len(found.test), found.tested) == (8, 4, "test")
    assert found.validation is not None
    assert len(found.validation) == 6
    assert found.train.labels.tolist() == train[1], "in their order"
    alone = dataset_of({"train": train, "validation": held})
    assert (alone.tested, len(alone.test)) == ("validation", 6)
    divided = dataset_of({"train": train})
    assert (len(divided.train), len(divided.test)) == (6, 2)


NORMAL = np.random.default_rng(0).normal(size=(8, 5, 5))
ZEROS = np.zeros((8, 5, 5), np.uint8)
BINARY = [0, 1] * 4
WANTED = (
    r"data must be a torch Dataset of \(image, label\), a pair \(images, labels\), or a mapping of train and test to "
    "such"
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("photos", rf"{WANTED}; got 'photos'"),
        (ZEROS, rf"{WANTED}; got ndarray"),
        ((ZEROS, BINARY, 1), rf"{WANTED}; got tuple"),
        (iter([]), rf"{WANTED}; got list_iterator"),
        ([], r"train data must hold at least one image; got none"),
        ({"test": (ZEROS, BINARY)}, r"splits of data must be train, and test and validation if there are; got test"),
        ({"train": (ZEROS, BINARY), "val": 1}, r"splits of data must be train, .*; got train, val"),
        ([1, 2], r"item 0 of the train data must be \(image, label\); got 1"),
        ([("a.png", 0)], r"image 0 of the train data must be a PIL image, an array or a tensor; got 'a.png'"),
        (
            (NORMAL, BINARY),
            r"image 0 .* must have floats in \[0, 1\], so give images before Normalize, .*; got -.* to .*",
        ),
        ((NORMAL * np.nan, BINARY), r"image 0 .* floats in \[0, 1\], .*; got nan to nan"),
        ((ZEROS.astype(int) + 256, BINARY), r"image 0 .* must be of integers 0 to 255 or floats .*; got 256 to 256"),
        ((ZEROS > 1, BINARY), r"image 0 .* must be of integers 0 to 255 or floats .*; got torch.bool"),
        ((ZEROS.astype(str), BINARY), r"image 0 .* must be of integers 0 to 255 or floats .*; got <U3"),
        ((np.zeros((8, 3, 5, 3), np.uint8), BINARY), r"image 0 .* one axis alone may be 1 or 3 long; got \[3, 5, 3\]"),
        ((np.zeros((8, 4, 5, 5), np.uint8), BINARY), r"image 0 .* of 1 or 3 channels; got \[4, 5, 5\]"),
        ((np.zeros((8, 5), np.uint8), BINARY), r"train images must be \[N, H, W\], .*; got \[8, 5\]"),
        (
            (ZEROS, np.eye(8)),
            r"train labels must be one for each image, \[N\]; got \[8, 8\] \(one-hot .* argmax\(1\)\)",
        ),
        (
            [(ZEROS[0], np.eye(2)[0])],
            r"label 0 .* must be one number or name; got \[2\] \(one-hot: give its argmax\(\)\)",
        ),
        ((ZEROS, [0, 1]), r"train labels must be as many as the 8 images; got 2"),
        ((ZEROS, 1), r"train labels must be one for each image, \[N\]; got 1"),
        ((ZEROS, [0, -1] * 4), r"label 1 of the train data must be at least 0; got -1"),
        ((ZEROS, [0, 1.5] * 4), r"label 1 of the train data must be a whole number or the name of a class; got 1.5"),
        ((ZEROS, [True, False] * 4), r"label 0 of the train data must be a whole number or .*; got True"),
        ((ZEROS, [0, "a"] * 4), r"labels must be all whole numbers or all names; got both"),
        ((ZEROS, [0] * 7 + [1]), r"class 1 must have at least 2 images, one to train and one to test; got 1"),
        (
            {"train": (ZEROS, BINARY), "test": (ZEROS, [0, 2] * 4)},
            r"labels of the test data must be the classes 0, 1; got 2 for image 1",
        ),
        (
            [(np.zeros((5, 5), np.uint8), 0), (np.zeros((5, 6), np.uint8), 1)],
            r"arrays and tensors must be of one size, or image_size given; got 5 x 5 and 5 x 6 pixels",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_anything_else_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}$"):
        dataset_of(data)


def test_labels_outside_the_classes_that_are_named_are_refused(small: Path) -> None:
    data = Folder(small)
    data.classes = ["a", "b"]
    with pytest.raises(
        InputError, match=r"^labels of the train data must be numbers of classes, 0 to 1; got 2 for image 18$"
    ):
        dataset_of(data)
    data.classes, other = ["a", "b", "c"], Folder(small)
    other.classes = ["c", "b", "a"]
    with pytest.raises(
        InputError, match=r"^classes of the test data must be those of the training data, a, b, c; got ot"
    ):
        dataset_of({"train": data, "test": other})


def test_arrays_of_other_sizes_are_resized_where_a_size_is_given() -> None:
    images = [np.full((5 + k, 7), 20 * k, np.uint8) for k in range(8)]
    found = dataset_of((images, BINARY), image_size=6)
    assert found.image_shape == (1, 6, 6)
    assert dataset_of((ZEROS, BINARY), image_size=6, channels=3).image_shape == (3, 6, 6)


def test_floats_round_to_the_nearest_of_256() -> None:
    whole = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_uint8(pixels_of(whole / 255)), whole)
    assert torch.equal(to_uint8(pixels_of((whole.double() / 255).numpy())), whole)


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_fit_takes_them_and_resume_goes_on(small: Path) -> None:
    about: dict[str, Any] = {"batch_size": 8, "precision": "32", **SIZES}
    one = capsnet.fit(dataset=Folder(small), out="run", epochs=1, **about)
    assert one.network.classes == ("a", "b", "c")
    assert one.network.preprocessing is not None
    fit(dataset=load(small), out="folder", epochs=1, **about)
    assert same_weights("run", "folder")
    with pytest.raises(InputError, match="the images that the run began with; since then: the images of "):
        resume("run", (np.zeros((27, 12, 13, 3), np.uint8), [0, 1, 2] * 9), epochs=2)
    assert resume("run", Folder(small), epochs=2).epochs == 2
    with pytest.raises(InputError, match=rf"^{WANTED}; got 3$"):
        fit(dataset=3)
