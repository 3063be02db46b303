import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capsnet.data import idx
from capsnet.errors import InputError
from capsnet.files import unpacked
from tiny import REAL

MNIST = REAL / "mnist"


def encode(sizes: tuple[int, ...], values: bytes, *, code: int = 8) -> bytes:
    return bytes([0, 0, code, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + values


IMAGES = encode((2, 3, 5), bytes(range(30)))
LABELS = encode((7,), bytes([5, 0, 4, 1, 9, 2, 255]))


def parse(parser: Callable[[bytes, Path], Tensor], path: Path) -> Tensor:
    return parser(unpacked(path), path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["images", "images.gz"])  # the content decides, not the name
def test_images(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    (tmp_path / name).write_bytes(pack(IMAGES))
    images = parse(idx.parse_images, tmp_path / name)
    assert images.dtype == torch.uint8
    assert torch.equal(images, torch.arange(30, dtype=torch.uint8).view(2, 1, 3, 5))


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(gzip.compress(LABELS))
    labels = parse(idx.parse_labels, tmp_path / "labels")
    assert labels.dtype == torch.int64
    assert labels.tolist() == [5, 0, 4, 1, 9, 2, 255]


def test_tensors_can_be_written_to() -> None:
    images = idx.parse_images(IMAGES, "x")
    images[0] = 0
    assert idx.parse_images(IMAGES, "x").sum() == sum(range(30))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an IDX file.*got an empty file"),
        (
            b"<!DOCTYPE html>",
            "must be an IDX file, raw or packed by gzip, and start with 00 00; got 3c 21 44 4f",
        ),
        (encode((2, 3, 5), bytes(30), code=0x0D), "must hold unsigned bytes, IDX type code 0x08; got 0x0d"),
        (LABELS, "must hold images, with dimensions: 3; got 1"),
        (IMAGES[:9], "must have a header of 16 bytes; got a file of 9"),
        (encode((0, 3, 5), b""), r"must hold at least one value; got dimensions \[0, 3, 5\]"),
        (IMAGES[:-1], r"must have 46 bytes for images of \[2, 3, 5\]; got 45, a file too short"),
        (IMAGES + b"!", "must have 46 bytes .*; got 47, a file with trailing bytes"),
        (gzip.compress(IMAGES, mtime=0)[:-12], "must be a whole gzip file; got one cut short, at"),
        (b"\x1f\x8b not gzip at all", "must be a sound gzip file; got a damaged one"),
        (
            gzip.compress(IMAGES, mtime=0)[:-8] + bytes(8),
            r"must be a sound gzip file; got a damaged one \(CRC check failed",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"train-images.gz {message}"):
        parse(idx.parse_images, path)


def test_images_are_not_labels() -> None:
    with pytest.raises(InputError, match="x must hold labels, with dimensions: 1; got 3"):
        idx.parse_labels(IMAGES, "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere must be a readable file; got: No such file"):
        unpacked(tmp_path / "nowhere")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_no_more_is_unpacked_than_can_be_right(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "labels"
    path.write_bytes(pack(bytes(3 * 2**20)))
    assert len(unpacked(path, most=3 * 2**20)) == 3 * 2**20
    with pytest.raises(InputError, match=rf"^file {path} must hold at most 3,145,727 bytes; got more$"):
        unpacked(path, most=3 * 2**20 - 1)


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST in {MNIST}; set CAPSNET_DATA")
def test_mnist_test_set() -> None:
    content = unpacked(MNIST / "t10k-images-idx3-ubyte.gz")
    assert hashlib.sha256(content).hexdigest().startswith("0fa7898d5092")
    assert idx.parse_images(content, "t10k").shape == (10_000, 1, 28, 28)
    labels = parse(idx.parse_labels, MNIST / "t10k-labels-idx1-ubyte.gz")
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
