import hashlib
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import scipy.io
import torch

from capsnet import data
from capsnet.data import download
from capsnet.data.sets import svhn
from capsnet.data.sets.svhn import FILES, SOURCE, parse
from capsnet.errors import InputError


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAPSNET_DATA", raising=False)
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAPSNET_OFFLINE", "1")


def official(count: int, *, seed: int = 0, **changed: Any) -> bytes:
    """As SVHN lays out its files: row, column, colour, image; labels 1 to 10."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = (np.arange(count, dtype=np.uint8)[:, None] % 10) + 1
    file = io.BytesIO()
    scipy.io.savemat(file, {"X": pixels, "y": labels.astype(np.uint8)} | changed, do_compression=True)
    return file.getvalue()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of 12 training and 11 test images, whose checksums are the ones that are asked for."""
    folder = tmp_path / "given" / "svhn"
    folder.mkdir(parents=True)
    for name, count in ((FILES["train"], 12), (FILES["test"], 11)):
        content = official(count, seed=count)
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cast(dict[str, str | None], SOURCE.files), name, hashlib.sha256(content).hexdigest())
    return tmp_path / "given"


def test_axes_are_put_in_our_order() -> None:
    pixels = np.zeros((32, 32, 3, 2), np.uint8)
    pixels[4, 7, 2, 1] = 200  # row 4, column 7, blue, second image
    images, labels = parse(official(2, X=pixels), "x.mat")
    assert (images.shape, images.dtype, labels.dtype) == ((2, 3, 32, 32), torch.uint8, torch.int64)
    assert images.nonzero().tolist() == [[1, 2, 4, 7]]
    assert images[1, 2, 4, 7] == 200


def test_ten_means_zero() -> None:
    assert parse(official(12), "x.mat")[1].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n", "x.mat must be a whole MATLAB file of version 5; got another or a damaged one"),
        (official(5)[:-100], "x.mat must be a whole MATLAB file"),
        (
            official(5, X=np.zeros((32, 32, 3, 5))),
            r"x.mat must hold X, uint8 \[height, .*; got float64 \[32, 32, 3, 5\]",
        ),
        (official(5, X=np.zeros((3, 32, 32, 5), np.uint8)), r"x.mat must hold X, .*; got uint8 \[3, 32, 32, 5\]"),
        (
            official(5, y=np.ones((4, 1), np.uint8)),
            r"hold y, a whole number for each of the 5 images; got uint8 \[4, 1",
        ),
        (official(5, y=np.ones((5, 1))), r"x.mat must hold y, a whole number .*; got float64"),
        (official(5, y=np.zeros((5, 1), np.uint8)), "x.mat must have labels 1 to 10 in y; got 0 to 0"),
        (official(5, y=np.full((5, 1), 11, np.uint8)), "x.mat must have labels 1 to 10 in y; got 11 to 11"),
    ],
)
def test_another_file_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(content, "x.mat")


def test_a_file_without_labels_is_refused() -> None:
    file = io.BytesIO()
    scipy.io.savemat(file, {"X": np.zeros((32, 32, 3, 1), np.uint8)})
    with pytest.raises(InputError, match=r"x.mat must hold a variable y; got none of that name"):
        parse(file.getvalue(), "x.mat")


def test_loading(small: Path) -> None:
    read = data.load("svhn", data_dir=small)
    assert (read.image_shape, read.classes) == ((3, 32, 32), tuple("0123456789"))
    assert (len(read.train), len(read.test)) == (12, 11)
    assert torch.equal(read.test.images, parse(official(11, seed=11), "x.mat")[0])
    grey = data.load_split("svhn", "test", data_dir=small, channels=1, image_size=16)
    assert grey.images.shape == (11, 1, 16, 16)
    one = data.describe("svhn", data_dir=small)
    assert (len(one.where), one.missing) == (2, ())


def test_one_split_needs_its_own_file_only(small: Path) -> None:
    (small / "svhn" / FILES["train"]).unlink()
    assert len(data.load_split("svhn", "test", data_dir=small)) == 11
    assert data.describe("svhn", data_dir=small).missing == (FILES["train"],)
    with pytest.raises(InputError, match=r"data set svhn .*; missing: train_32x32.mat; looked in: .*; with --data-"):
        data.load("svhn", data_dir=small)


def test_a_wrong_checksum_is_refused(small: Path) -> None:
    (small / "svhn" / FILES["test"]).write_bytes(official(11, seed=1))
    with pytest.raises(InputError, match=r"test_32x32.mat must have the SHA-256 \w+ .*of svhn; got \w+: delete or"):
        data.load_split("svhn", "test", data_dir=small)


def test_the_recorded_checksums_are_whole() -> None:
    assert set(SOURCE.files) == set(FILES.values())
    assert all(value is not None and len(bytes.fromhex(value)) == 32 for value in SOURCE.files.values())


def test_a_download_is_kept_when_its_checksum_is_right(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def retrieve(url: str, path: Path) -> Path:
        asked.append(url)
        path.write_bytes((small / "svhn" / path.name).read_bytes())
        return path

    monkeypatch.setenv("CAPSNET_OFFLINE", "0")
    monkeypatch.setattr(download, "_retrieve", retrieve)
    read = data.load("svhn")
    assert asked == [f"http://ufldl.stanford.edu/housenumbers/{name}" for name in (FILES["test"], FILES["train"])]
    assert {path.name for path in (tmp_path / "cache" / "svhn").iterdir()} == set(FILES.values())
    assert torch.equal(data.load("svhn").train.images, read.train.images)
    assert len(asked) == 2


def test_a_download_of_another_checksum_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_OFFLINE", "0")
    monkeypatch.setattr(download, "_retrieve", lambda url, path: path.write_bytes(official(3)) and path)
    with pytest.raises(InputError, match=r"missing: test_32x32.mat; .*test_32x32.mat must have the SHA-256 cdce80df"):
        svhn.read("test")
    assert not list((tmp_path / "cache" / "svhn").glob("*.mat"))


def test_what_a_file_can_unpack_to_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    scipy.io.savemat(file, {"X": np.zeros((32, 32, 3, 400), np.uint8), "y": np.ones((400, 1))}, do_compression=True)
    content = file.getvalue()
    assert len(content) < 2**13
    monkeypatch.setattr("capsnet.data.matlab._LARGEST", 10**6)
    with pytest.raises(InputError, match=r"^x.mat must hold at most 1,000,000 bytes unpacked; got more$"):
        parse(content, "x.mat")


@pytest.mark.parametrize("packed", [True, False])
def test_variables_are_the_same_however_they_are_stored(packed: bool) -> None:
    file = io.BytesIO()
    digits = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
    scipy.io.savemat(file, {"X": digits, "y": np.ones((7, 1), np.uint8)}, do_compression=packed)
    assert (parse(file.getvalue(), "x.mat")[0].numpy() == digits.transpose(3, 2, 0, 1)).all()


@pytest.mark.parametrize("root", ["data_dir", "CAPSNET_DATA"])
def test_a_damaged_file_is_told_and_not_passed_over(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    damaged, cached = tmp_path / "damaged" / FILES["test"], tmp_path / "cache" / "svhn" / FILES["test"]
    for path in (damaged, cached):
        path.parent.mkdir(parents=True)
        path.write_bytes((small / "svhn" / FILES["test"]).read_bytes()[: -100 if path == damaged else None])
    monkeypatch.setenv("CAPSNET_DATA", str(damaged.parent if root == "CAPSNET_DATA" else small))
    with pytest.raises(InputError, match=rf"^{damaged} must have the SHA-256 "):
        data.load_split("svhn", "test", data_dir=damaged.parent if root == "data_dir" else None)
    damaged.unlink()
    if root == "data_dir":
        with pytest.raises(
            InputError, match=r"; missing: test_32x32.mat; looked in: .*; with --data-dir nothing is down"
        ):
            data.load_split("svhn", "test", data_dir=damaged.parent)
    else:
        assert len(data.load_split("svhn", "test")) == 11
