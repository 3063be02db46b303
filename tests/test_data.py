import gzip
import hashlib
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from capsnet import data
from capsnet.data import cifar
from capsnet.errors import InputError
from tiny import REAL

NAMES = (
    "strokes",
    "mnist",
    "multimnist",
    "expanded-mnist",
    "affnist",
    "affnist-generated",
    "fashion-mnist",
    "kmnist",
    "cifar10",
    "svhn",
    "smallnorb",
)


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
            r"data must be one of strokes, mnist, .* directory of images; got fashion_mnist \(did you mean",
        ),
        ("MNIST", r"got MNIST \(did you mean mnist\?\)"),
        ("qqqq", "got qqqq$"),
        ("", "got $"),
        (Path("no/where"), "or the path of a directory of images; got no.where$"),
    ],
)
def test_an_unknown_name_lists_the_known(name: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel; got 0"),
        ({"channels": 4}, r"channels must be 1 \(grey\) or 3 \(colour\); got 4"),
        ({"data_dir": "no/where"}, "data_dir must be an existing directory; got no/where"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load("mnist", **arguments)


def test_nothing_here_and_offline() -> None:
    with pytest.raises(
        InputError, match=r"missing: train-images-idx3-ubyte.gz, .*t10k-labels-idx1-ubyte.gz; looked in"
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
    fitted = data._fit(data.Split(stripes, torch.arange(3)), 7, None)
    assert fitted.images.shape == (3, 1, 7, 7)
    assert ((fitted.images.float() - 127.5).abs() < 20).all()


def test_the_python_version_of_cifar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match=r"must be the binary version.*got the python version"):
        data.load("cifar10", data_dir=tmp_path)


def test_load_split_takes_published_sets_only() -> None:
    with pytest.raises(InputError, match="split must be train or test of a published data set; got test of strokes"):
        data.load_split("strokes", "test")
    with pytest.raises(InputError, match=r"split must be train or test .*; got validation of mnist"):
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
    small, plain = (
        data.load_split("mnist", "test", data_dir=REAL, **shape) for shape in ({"image_size": 14, "channels": 3}, {})
    )
    assert small.images.shape == (10_000, 3, 14, 14)
    assert torch.equal(small.images[:, 0], small.images[:, 2])
    halves = torch.nn.functional.avg_pool2d(plain.images.float(), 2)
    assert (small.images[:, :1].float() - halves).abs().mean() < 8
    assert small.images.float().mean().item() == pytest.approx(plain.images.float().mean().item(), abs=1)


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
def test_real_cifar_is_unpacked_once(tmp_path: Path) -> None:
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
    start = time.perf_counter()
    data.load("cifar10", data_dir=REAL)
    assert time.perf_counter() - start < 4  # about 1 s; unpacking takes 7 to 10
