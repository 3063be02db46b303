import gzip
import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capsnet import data
from capsnet.data.sets import smallnorb
from capsnet.data.sets.smallnorb import CLASSES, FILES, SOURCE, parse_factors, parse_images, parse_labels
from capsnet.errors import InputError

BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54
COUNT = 10


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAPSNET_DATA", raising=False)
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAPSNET_OFFLINE", "1")


def matrix(values: np.ndarray, *, magic: int | None = None) -> bytes:
    """As the official files: magic number, dimensions, at least three sizes, values, all little endian."""
    kind = magic or (BYTES if values.dtype == np.uint8 else INTEGERS)
    sizes = values.shape + (1,) * (3 - values.ndim)
    packed = values if values.dtype == np.uint8 else values.astype("<i4")
    return struct.pack("<Ii", kind, values.ndim) + struct.pack(f"<{len(sizes)}i", *sizes) + packed.tobytes()


def official(seed: int) -> tuple[bytes, bytes, bytes]:
    """A split of ten pairs: images, classes, poses."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (COUNT, 2, 96, 96), dtype=np.uint8)
    pose = np.stack([np.arange(COUNT) % n * step for n, step in ((10, 1), (9, 1), (18, 2), (6, 1))], axis=1)
    return matrix(images), matrix(np.arange(COUNT, dtype=np.int32) % 5), matrix(pose.astype(np.int32))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unpacked files of ten pairs a split, of which the set is said to consist."""
    folder = tmp_path / "given" / "smallnorb"
    folder.mkdir(parents=True)
    for seed, files in enumerate(FILES.values()):
        for name, content in zip(files, official(seed), strict=True):
            (folder / name).write_bytes(content)
    monkeypatch.setattr(smallnorb, "PAIRS", COUNT)
    return tmp_path / "given"


def test_the_names_of_the_files_are_the_official_ones() -> None:
    assert FILES["train"][0] == "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat"
    assert FILES["test"] == (
        "smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat",
        "smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat",
        "smallnorb-5x01235x9x18x6x2x96x96-testing-info.mat",
    )
    assert set(SOURCE.packed) == {name for files in FILES.values() for name in files}
    assert len({bytes.fromhex(value) for value in SOURCE.packed.values()}) == 6
    assert math.prod((5, 5, 9, 18, 6)) == smallnorb.PAIRS


def test_images_keep_their_cameras_rows_and_columns() -> None:
    values = np.zeros((3, 2, 5, 7), np.uint8)
    values[2, 1, 4, 3] = 9
    images = parse_images(matrix(values), "dat")
    assert (images.shape, images.dtype) == ((3, 2, 5, 7), torch.uint8)
    assert images.nonzero().tolist() == [[2, 1, 4, 3]]
    images += 1  # the memory is ours to write to


def test_labels_are_read_past_three_sizes() -> None:
    labels = parse_labels(matrix(np.array([4, 0, 3, 1], np.int32)), "cat")
    assert (labels.tolist(), labels.dtype) == ([4, 0, 3, 1], torch.int64)


def test_factors_have_the_units_of_their_names() -> None:
    factors = parse_factors(matrix(np.array([[7, 0, 34, 5], [3, 8, 0, 2]], np.int32)), "info")
    assert {name: values.tolist() for name, values in factors.items()} == {
        "instance": [7, 3],
        "elevation_degrees": [30, 70],
        "azimuth_degrees": [340, 0],
        "lighting": [5, 2],
    }
    assert all(values.dtype == torch.float32 for values in factors.values())


LABELS = np.array([0, 1, 2], np.int32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cat must have a header of 20 bytes; got a file of 0"),
        (matrix(LABELS)[:18], "cat must have a header of 20 bytes; got a file of 18"),
        (matrix(LABELS, magic=BYTES), "cat must start with 0x1E3D4C54, a matrix of int32; got 0x1E3D4C55"),
        (matrix(LABELS, magic=0x544C3D1E), "cat must start with 0x1E3D4C54, .*; got 0x544C3D1E"),
        (matrix(LABELS[:, None]), "cat must have 1 dimensions; got 2"),
        (matrix(LABELS[:0]), r"cat must hold at least one value; got dimensions \[0\]"),
        (matrix(LABELS)[:-1], r"cat must have 32 bytes for \[3\] values; got 31"),
        (matrix(LABELS) + b"\0", r"cat must have 32 bytes for \[3\] values; got 33"),
        (matrix(LABELS + 3), "cat must have classes 0 to 4; got 3 to 5"),
        (matrix(LABELS - 1), "cat must have classes 0 to 4; got -1 to 1"),
    ],
)
def test_another_file_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_labels(content, "cat")


def test_poses_and_images_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="info must hold 4 numbers for each pair; got 10"):
        parse_factors(matrix(np.zeros((2, 10), np.int32)), "info")
    with pytest.raises(InputError, match="dat must start with 0x1E3D4C55, a matrix of uint8; got 0x1E3D4C54"):
        parse_images(matrix(np.zeros((2, 2, 9, 9), np.int32)), "dat")


def test_loading(small: Path) -> None:
    read = data.load("smallnorb", data_dir=small)
    assert (read.image_shape, read.classes) == ((2, 96, 96), CLASSES)
    assert (len(read.train), len(read.test)) == (COUNT, COUNT)
    assert torch.equal(read.test.images, parse_images(official(1)[0], "dat"))
    assert read.train.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert read.test.factors["azimuth_degrees"].tolist() == [20 * n for n in range(10)]
    one = data.describe("smallnorb", data_dir=small)
    assert (len(one.where), one.missing, one.classes) == (6, (), CLASSES)


def test_both_cameras_are_resized(small: Path) -> None:
    whole = data.load_split("smallnorb", "train", data_dir=small)
    halved = data.load_split("smallnorb", "train", data_dir=small, image_size=48)
    assert halved.images.shape == (COUNT, 2, 48, 48)
    assert halved.factors.keys() == whole.factors.keys() != set()
    means = torch.nn.functional.avg_pool2d(whole.images.float(), 2)
    assert (halved.images.float() - means).abs().mean() < 15  # noise, of standard deviation 37 after the halving
    assert (halved.images.float() - means.flip(1)).abs().mean() > 30


@pytest.mark.parametrize("channels", [1, 3])
def test_two_cameras_are_neither_grey_nor_colour(tmp_path: Path, channels: int) -> None:
    message = f"channels must be left out for smallnorb, whose images have 2, one a camera; got {channels}"
    with pytest.raises(InputError, match=message):
        data.load("smallnorb", data_dir=tmp_path, channels=channels)
    with pytest.raises(InputError, match=message):
        data.load_split("smallnorb", "test", data_dir=tmp_path, channels=channels)


def change(small: Path, kind: int, values: Any) -> None:
    (small / "smallnorb" / FILES["test"][kind]).write_bytes(matrix(values))


def test_other_counts_are_refused(small: Path) -> None:
    change(small, 2, np.zeros((9, 4), np.int32))
    with pytest.raises(InputError, match=r"testing-info.mat must hold the pose of 10 pairs; got 9"):
        data.load_split("smallnorb", "test", data_dir=small)
    change(small, 1, np.zeros(10, np.int32))
    with pytest.raises(InputError, match=r"-cat.mat must hold 2 labels of each class; got \[10, 0, 0, 0, 0\]"):
        data.load_split("smallnorb", "test", data_dir=small)
    change(small, 0, np.zeros((10, 2, 48, 48), np.uint8))
    with pytest.raises(InputError, match=r"-dat.mat must hold images of \(10, 2, 96, 96\); got \(10, 2, 48, 48\)"):
        data.load_split("smallnorb", "test", data_dir=small)
    assert len(data.load_split("smallnorb", "train", data_dir=small)) == 10


def test_packed_files_are_held_to_the_recorded_checksums(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small / "smallnorb" / FILES["test"][1]
    packed = gzip.compress(plain.read_bytes(), 1)
    plain.with_suffix(".mat.gz").write_bytes(packed)
    plain.unlink()
    with pytest.raises(InputError, match=r"testing-cat.mat.gz must have the SHA-256 ecaf6d5bb8\w+ as the published"):
        data.load_split("smallnorb", "test", data_dir=small)
    monkeypatch.setitem(SOURCE.packed, plain.name, hashlib.sha256(packed).hexdigest())
    assert len(data.load_split("smallnorb", "test", data_dir=small)) == 10


def test_missing_files_are_named() -> None:
    with pytest.raises(
        InputError, match=r"data set smallnorb .*; missing: .*training-dat.mat.gz, .*info.mat.gz; looked"
    ):
        data.load("smallnorb")


def test_in_data_dir_nothing_else_is_looked_at(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(small))
    given = tmp_path / "other"
    given.mkdir()
    with pytest.raises(InputError, match=r"data set smallnorb .*; missing: .*; with --data-dir nothing is downloaded"):
        data.load_split("smallnorb", "test", data_dir=given)
    for file in FILES["test"]:
        (given / file).write_bytes((small / "smallnorb" / file).read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"^{given}/.*-dat.mat must have \d+ bytes for .* values; got \d+$"):
        data.load_split("smallnorb", "test", data_dir=given)
    assert len(data.load_split("smallnorb", "test")) == 10
