import gzip
import hashlib
import re
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from capsnet import data
from capsnet.data import Dataset, Split
from capsnet.data.augment import Augmentation, move
from capsnet.data.dataset import stratified
from capsnet.data.sets import cifar10 as cifar
from capsnet.errors import InputError
from tiny import REAL

NAMES = [
    "affnist",
    "affnist-generated",
    "cifar10",
    "expanded-mnist",
    "fashion-mnist",
    "kmnist",
    "mnist",
    "multimnist",
    "smallnorb",
    "strokes",
    "svhn",
]


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAPSNET_DATA", raising=False)
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAPSNET_OFFLINE", "1")


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"no {name} in {REAL}; set CAPSNET_DATA")


def idx_file(*sizes: int, values: bytes) -> bytes:
    return gzip.compress(bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + values, 1)


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked CIFAR-10 of one record per file: colour (label, 100, 200)."""
    folder = tmp_path / "given" / "cifar10" / cifar.FOLDER
    folder.mkdir(parents=True)
    for label, name in enumerate(cifar.SHA256):
        content = bytes([label]) + bytes([label]) * 1024 + bytes([100]) * 1024 + bytes([200]) * 1024
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar.SHA256, name, hashlib.sha256(content).hexdigest())
    return tmp_path / "given"


def test_available() -> None:
    assert data.available() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_describe(name: Any) -> None:
    one = data.describe(name)
    assert one.name == name
    assert len(one.classes) == len(set(one.classes)) == (5 if name == "smallnorb" else 10)
    assert one.licence
    assert one.source
    assert one.where == ()
    assert one.missing or name == "strokes"


def test_public_names() -> None:
    assert all(hasattr(data, name) for name in data.__all__)


def test_import_is_cheap() -> None:
    heavy = "{'PIL', 'pooch', 'rich', 'huggingface_hub', 'requests'}"
    heavy = f"import sys, capsnet.data; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fashion_mnist",
            r"data must be one of affnist, affnist-generated, .* table of images; got fashion_mnist \(did you mean",
        ),
        ("MNIST", r"got MNIST \(did you mean mnist\?\)"),
        ("qqqq", "got qqqq$"),
        ("", "got $"),
        (Path("no/where"), "or the path of a directory or table of images; got no.where$"),
    ],
)
def test_an_unknown_name_lists_the_known(name: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be pixels, at least 1, or HEIGHTxWIDTH; got 0"),
        ({"channels": 4}, r"channels must be 1 \(grey\) or 3 \(colour\); got 4"),
        ({"data_dir": "no/where"}, "data_dir must be an existing directory; got no/where"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load("mnist", **arguments)


def test_nothing_here_and_offline() -> None:
    with pytest.raises(
        InputError, match=r"missing: t10k-images-idx3-ubyte.gz, .*train-labels-idx1-ubyte.gz; looked in"
    ):
        data.load("mnist")
    with pytest.raises(InputError, match=r"data set cifar10 .*missing: cifar-10-binary.tar.gz; looked in: .*cifar10"):
        data.load("cifar10")


def test_strokes() -> None:
    strokes = data.load("strokes", image_size=24, channels=3, seed=5)
    again = data.load("strokes", image_size=24, seed=5)
    one = data.describe("strokes")
    assert strokes.image_shape == (3, 24, 24)
    assert (strokes.classes, len(strokes.train), len(strokes.test)) == (one.classes, one.train, one.test)
    assert torch.equal(strokes.train.images[:, 1:2], again.train.images)
    assert strokes.train.factors.keys() == again.train.factors.keys() != set()
    assert strokes.validation is not None
    assert strokes.validation.images.shape[1] == 3


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_is_ones_own_images(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    for name in ("mnist/a/1.png", "mnist/a/2.png", "mnist/b/1.png", "mnist/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    own = data.load(kind(tmp_path / "mnist"), image_size=5, channels=3)
    assert own.image_shape == (3, 5, 5)
    assert own.classes == ("a", "b")


def test_cifar(small_cifar: Path) -> None:
    read = data.load("cifar10", data_dir=small_cifar)
    assert read.image_shape == (3, 32, 32)
    assert read.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert read.classes[5] == "dog"
    assert data.describe("cifar10", data_dir=small_cifar).where == (small_cifar / "cifar10" / cifar.FOLDER,)
    grey = data.load("cifar10", data_dir=small_cifar, channels=1, image_size=8)
    assert grey.image_shape == (1, 8, 8)
    assert set(grey.test.images.flatten().tolist()) == {round(0.299 * 5 + 0.587 * 100 + 0.114 * 200)}


def test_resizing_is_antialiased() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 1, 32, 16)  # one pixel wide
    fitted = data._fit(data.Split(stripes, torch.arange(3)), (1, 7, 7))
    assert fitted.images.shape == (3, 1, 7, 7)
    assert ((fitted.images.float() - 127.5).abs() < 20).all()


def test_images_are_not_resized_beyond_what_memory_holds() -> None:
    for load, count in ((data.load, "70,000"), (partial(data.load_split, split="test"), "10,000")):
        with pytest.raises(InputError, match=rf"^images must fit into 8 GiB .*; got {count} of 3 x 10000 x 10000$"):
            load("mnist", image_size=10**4, channels=3)


def test_the_python_version_of_cifar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match=r"must be the binary version.*got the python version"):
        data.load("cifar10", data_dir=tmp_path)


def test_cifar_of_data_dir_is_read_or_told(small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(small_cifar))
    given, folder = tmp_path / "other", small_cifar / "cifar10" / cifar.FOLDER
    given.mkdir()
    with pytest.raises(InputError, match=r"data set cifar10 .*; missing: .*; with --data-dir nothing is downloaded"):
        data.load("cifar10", data_dir=given)
    archive = given / cifar.ARCHIVES[0]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar.FOLDER)
    whole = archive.read_bytes()
    assert len(data.load("cifar10", data_dir=given).test) == 1
    archive.write_bytes(whole[:-50])  # the unpacked batches are in the cache
    with pytest.raises(InputError, match=rf"^{archive} must be a whole tar archive packed by gzip or xz"):
        data.load("cifar10", data_dir=given)
    assert len(data.load("cifar10").test) == 1
    (folder / "test_batch.bin").write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{folder}/test_batch.bin must be whole records"):
        data.load("cifar10")


def test_the_python_version_of_cifar_does_not_hide_the_binary_one_in_the_cache(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (small_cifar / "cifar10").rename(tmp_path / "cache" / "cifar10")
    (tmp_path / "env" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / "env"))
    assert len(data.load("cifar10").test) == 1


@real("mnist")
def test_damaged_files_of_data_dir_are_not_replaced_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(REAL))
    for path in (REAL / "mnist").glob("t10k-*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/t10k-images-idx3-ubyte.gz must be a whole gzip file; got one cut"
    ):
        data.load_split("mnist", "test", data_dir=tmp_path)


def test_a_split_is_that_of_the_whole_set() -> None:
    split = data.load_split("strokes", "validation", image_size=13, seed=3)
    assert torch.equal(split.images, data.load("strokes", image_size=13, seed=3).validation.images)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"^split of mnist must be among train, test; got validation$"):
        data.load_split("mnist", "validation")


def test_kmnist_training_files_of_unknown_checksum_are_checked_by_counts(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
    for name, path in files.items():
        content = idx_file(60_000, values=bytes(60_000))
        if "images" in name:
            content = idx_file(60_000, 28, 28, values=bytes(60_000 * 784))
        path.write_bytes(gzip.decompress(content))
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte must hold 6000 labels of each class; got \[60000\]"):
        data.load_split("kmnist", "train", data_dir=tmp_path)
    files["train-labels-idx1-ubyte"].write_bytes(gzip.decompress(idx_file(60_000, values=bytes(range(10)) * 6_000)))
    assert len(data.load_split("kmnist", "train", data_dir=tmp_path)) == 60_000
    files["train-images-idx3-ubyte"].write_bytes(gzip.decompress(idx_file(60_000, 2, 2, values=bytes(240_000))))
    with pytest.raises(InputError, match=r"must hold images of \(60000, 1, 28, 28\); got \(60000, 1, 2, 2\)"):
        data.load_split("kmnist", "train", data_dir=tmp_path)


@real("mnist")
def test_real_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(REAL))
    mnist = data.load("mnist")
    assert mnist.image_shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.train.labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]  # fmt: skip
    assert mnist.train.images.float().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    one = data.describe("mnist")
    assert (one.image_shape, one.missing, len(one.where)) == (mnist.image_shape, (), 4)


@real("mnist")
def test_real_mnist_in_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    small = data.load_split("mnist", "test", data_dir=REAL, image_size=14, channels=3)
    plain = data.load_split("mnist", "test", data_dir=REAL)
    assert small.images.shape == (10_000, 3, 14, 14)
    assert torch.equal(small.images[:, 0], small.images[:, 2])
    halves = torch.nn.functional.avg_pool2d(plain.images.float(), 2)
    assert (small.images[:, :1].float() - halves).abs().mean() < 8
    assert small.images.float().mean().item() == pytest.approx(plain.images.float().mean().item(), abs=2)


@real("fashion-mnist")
def test_real_fashion_mnist_is_not_taken_for_mnist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must have the SHA-256 0fa7898d\w+ .* of mnist; got 5b4141f0"):
        data.load_split("mnist", "test", data_dir=REAL / "fashion-mnist")
    fashion = data.load_split("fashion-mnist", "test", data_dir=REAL / "fashion-mnist")
    assert fashion.labels.bincount().tolist() == [1000] * 10
    assert data.describe("fashion-mnist").classes[fashion.labels[0]] == "Ankle boot"


@real("kmnist-test")
def test_real_kmnist_has_its_test_split_only() -> None:
    with pytest.raises(
        InputError,
        match=r"data set kmnist .*missing: train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz; looked",
    ):
        data.load("kmnist", data_dir=REAL)
    test = data.load_split("kmnist", "test", data_dir=REAL)
    assert test.labels.bincount().tolist() == [1000] * 10
    one = data.describe("kmnist", data_dir=REAL)
    assert one.missing == ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    assert replace(one, where=(), missing=()) == replace(data.describe("kmnist"), where=(), missing=())


@pytest.mark.slow
@real("cifar10")
def test_real_cifar_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10 = data.load("cifar10", data_dir=REAL)
    assert cifar10.image_shape == (3, 32, 32)
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    assert [cifar10.classes[label] for label in cifar10.train.labels[:4]] == [
        "frog",
        "truck",
        "truck",
        "deer",
    ]
    assert (tmp_path / "cache" / "cifar10" / cifar.FOLDER).is_dir()
    monkeypatch.setattr("tarfile.open", lambda *_, **__: pytest.fail("unpacked again"))
    assert len(data.load("cifar10", data_dir=REAL).train) == 50_000


# Split and Dataset


def singles(count: int, *, classes: int = 4, first: int = 0) -> Split:
    """Different images of 9 x 11 pixels, whose factor is their number."""
    values = torch.randint(1, 256, (count, 2, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(first))
    number = torch.arange(first, first + count)
    return Split(values, number % classes, {"number": number.float()})


def dataset_of(*, objects: int = 1, train: int = 40, **options: Any) -> Dataset:
    test = singles(15, first=100)
    test = test if objects == 1 else test.paired(shift=2, seed=0)
    return Dataset("mine", tuple("abcd"), singles(train), test, objects_per_image=objects, **options)


def numbers(split: Split) -> list[int]:
    return split.factors["number"].int().tolist()


def test_a_split_holds_each_object_where_its_labels_are_several() -> None:
    one, pair = singles(6), singles(6).paired(shift=1, seed=0)
    assert pair.single_images is not None
    taken = pair.take(torch.tensor([4, 1]))
    assert taken.single_images is not None
    assert torch.equal(taken.single_images, pair.single_images[[4, 1]])
    assert torch.equal(taken.labels, pair.labels[[4, 1]])
    assert len(pair) == 6
    wrong: tuple[tuple[Tensor, Tensor | None], ...] = (
        (pair.labels, None),
        (one.labels, pair.single_images),
        (pair.labels, pair.single_images[:, :1]),
        (pair.labels, pair.single_images[:5]),
        (pair.labels, pair.single_images[..., :-1]),
    )
    for labels, objects in wrong:
        got = re.escape(str(None if objects is None else list(objects.shape)))
        message = (
            rf"^single_images must be \[N, k, C, H, W\] where labels are \[N, k\], and absent elsewhere; got {got}$"
        )
        with pytest.raises(InputError, match=message):
            Split(pair.images, labels, single_images=objects)
    with pytest.raises(InputError, match=r"^labels must be int64 \[N\] or \[N, k\]; got torch.int64 \[6, 2, 1\]$"):
        Split(pair.images, pair.labels[..., None])


@pytest.mark.parametrize("objects", [1, 2])
def test_cropped_images_are_whole_for_training_and_the_middle_elsewhere(objects: int) -> None:
    whole = dataset_of(objects=objects, shift=2)
    whole = replace(whole, validation=whole.test.take(torch.arange(5)))
    made = whole.cropped(6)
    assert (whole.image_shape, made.image_shape, made.crop) == ((2, 9, 11), (2, 6, 6), 6)
    assert made.train is whole.train
    before: Any
    after: Any
    rows, columns = slice(1, 7), slice(2, 8)
    for name in ("test", "validation"):
        before, after = getattr(whole, name), getattr(made, name)
        assert made.shown(name) is getattr(made, name)
        assert torch.equal(after.images, before.images[..., rows, columns])
        assert torch.equal(after.labels, before.labels)
        assert after.factors.keys() == before.factors.keys()
        if objects == 2:
            assert torch.equal(after.single_images, before.single_images[..., rows, columns])
    shown = made.shown("train")
    assert shown is not None
    assert torch.equal(shown.images, whole.train.images[..., rows, columns])
    assert torch.equal(shown.labels, whole.train.labels)
    assert whole.shown("train") is whole.train
    assert dataset_of().cropped(6).shown("validation") is None


@pytest.mark.parametrize("size", [0, 10])
def test_a_crop_must_fit_into_the_images(size: int) -> None:
    with pytest.raises(InputError, match=rf"^crop must be 1 to 9 pixels for images of 9 x 11; got {size}$"):
        dataset_of().cropped(size)


@pytest.mark.parametrize("kind", ["plain", "pairs", "placed"])
@pytest.mark.parametrize("crop", [None, 6])
def test_validation_images_are_as_those_of_the_test(kind: str, crop: int | None) -> None:
    """Held out of the training images, laid over each other or moved as the test images were, then cropped as they."""
    whole = dataset_of(objects=2 if kind == "pairs" else 1, placed=kind == "placed", shift=2)
    made = (whole.cropped(crop) if crop else whole).with_validation(12, seed=3)
    held_out = stratified(whole.train.labels, 12, seed=3, held_out=True).sort().values
    kept = torch.tensor([k for k in range(40) if k not in held_out.tolist()])
    assert numbers(made.train) == kept.tolist()
    assert torch.equal(made.train.images, whole.train.images[kept])
    validation = made.validation
    assert validation is not None
    wanted = whole.train.take(held_out)
    if kind == "pairs":
        wanted = wanted.paired(shift=2, seed=3)
        assert torch.equal(validation.labels[:, 0], whole.train.labels[held_out])
    elif kind == "placed":
        assert numbers(validation) == held_out.tolist()
        drawn = Augmentation(shift=2).draw(12, generator=torch.Generator().manual_seed(3))
        assert (drawn.dx != 0).any()
        wanted = replace(wanted, images=move(wanted.images, drawn))
    wanted = wanted.cropped(crop) if crop else wanted
    assert torch.equal(validation.images, wanted.images)
    assert torch.equal(validation.labels, wanted.labels)
    assert (validation.single_images is None) == (wanted.single_images is None) == (kind != "pairs")
    if validation.single_images is not None and wanted.single_images is not None:
        assert torch.equal(validation.single_images, wanted.single_images)
        assert torch.equal(validation.images.int(), validation.single_images.int().sum(1).clamp(max=255))


def test_fewer_training_images_are_among_more_and_follow_the_seed() -> None:
    whole = dataset_of()
    few, more, again, other = (
        whole.with_train(count, seed=seed).train for count, seed in ((7, 1), (20, 1), (7, 1), (7, 2))
    )
    assert len(few) == 7
    assert set(numbers(few)) < set(numbers(more))
    assert numbers(few) == numbers(again) == sorted(numbers(few))
    assert numbers(few) != numbers(other)
    assert numbers(few) != list(range(7))
    assert torch.equal(few.images, whole.train.images[numbers(few)])
    assert whole.with_train(40, seed=0).train.labels.tolist() == whole.train.labels.tolist()
    held_out = whole.with_validation(10, seed=1).with_train(12, seed=1)
    assert held_out.validation is not None
    assert not set(numbers(held_out.train)) & set(numbers(held_out.validation))


@pytest.mark.parametrize("count", [0, 41])
def test_there_are_not_more_training_images_than_there_are(count: int) -> None:
    with pytest.raises(InputError, match=rf"^train_images must be 1 to the 40 there are; got {count}$"):
        dataset_of().with_train(count, seed=0)


def test_a_set_of_pairs_must_be_one() -> None:
    one, pair = singles(8), singles(8).paired(shift=1, seed=0)
    assert pair.single_images is not None
    twice = Split(pair.images, pair.labels[:, :1].expand(-1, 2), single_images=pair.single_images)
    alike = one.take((one.labels == 2).nonzero().flatten())
    faults: dict[str, dict[str, Any]] = {
        "train images must show 1 object each; got 2": {"train": pair},
        "test images must show 2 objects each; got 1": {"test": one},
        "validation images must show 2 objects each; got 1": {"validation": one},
        "test images must show objects of different classes; got one class twice": {"test": twice},
        "training images to be paired must be of at least 2 classes; got 2 of one class": {"train": alike},
        "objects_per_image must be 1 or 2; got 3": {"objects_per_image": 3},
        "labels of the test split must be 0 to 2; got 0 to 3": {
            "classes": tuple("abc"),
            "train": one.take(torch.arange(3)),
        },
    }
    for message, options in faults.items():
        fields = {"classes": tuple("abcd"), "train": one, "test": pair, "objects_per_image": 2, **options}
        with pytest.raises(InputError, match=rf"^data set mine: {message}$"):
            Dataset("mine", **fields)
    with pytest.raises(InputError, match=r"^data set mine: test images must show 1 object each; got 2$"):
        Dataset("mine", tuple("abcd"), one, pair)
    with pytest.raises(InputError, match=r"must be of at least 2 classes; got 1 of one class$"):
        dataset_of(objects=2).with_train(1, seed=0)
    Dataset("mine", tuple("abcd"), alike, alike)  # one class is enough for single objects


def test_multimnist_has_one_size() -> None:
    shapes: tuple[dict[str, Any], ...] = ({"image_size": 28}, {"channels": 3})
    for shape in shapes:
        with pytest.raises(InputError, match=r"^image_size and channels of multimnist must be 36 and 1; got"):
            data.load("multimnist", **shape)


@real("mnist")
def test_real_multimnist() -> None:
    made = data.load("multimnist", data_dir=REAL)
    about = data.describe("multimnist", data_dir=REAL)
    assert made.image_shape == about.image_shape == (1, 36, 36)
    assert (made.classes, len(made.train), len(made.test)) == (about.classes, about.train, about.test)
    assert (made.objects_per_image, made.shift) == (2, 4)
    assert made.test.labels[:4, 0].tolist() == [7, 2, 1, 0]
    assert made.test.single_images is not None
    assert made.test.labels[:, 1].bincount(minlength=10).min() > 800  # partners are of all classes
    digits = data.load_split("mnist", "test", data_dir=REAL).images.sum((1, 2, 3))
    assert torch.equal(made.test.single_images[:, 0].sum((1, 2, 3)), digits)


@pytest.mark.parametrize("count", [1, 4, 7, 20, 60, 64])
@pytest.mark.parametrize("held_out", [False, True])
def test_each_class_gets_its_share(count: int, held_out: bool) -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])[torch.randperm(64)]
    if held_out and count > 60:
        with pytest.raises(InputError, match=r"^validation must be 0 to 60, which leaves an image of each of 4"):
            stratified(labels, count, seed=1, held_out=True)
        return
    chosen = stratified(labels, count, seed=1, held_out=held_out)
    assert len(set(chosen.tolist())) == count
    assert chosen.equal(stratified(labels, count, seed=1, held_out=held_out))
    shares = labels[chosen].bincount(minlength=4)
    assert (shares[:2] - torch.tensor([50, 10]) * count / 64).abs().max() <= 3
    if held_out:
        assert (shares < labels.bincount()).all()
    elif count >= 4:
        assert shares.min() >= 1
    more = stratified(labels, min(count + 1, 60 if held_out else 64), seed=1, held_out=held_out)
    assert set(chosen.tolist()) <= set(more.tolist())
