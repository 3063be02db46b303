import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch

from capsnet.data.sets import cifar10 as cifar
from capsnet.errors import InputError

NAMES = tuple(cifar.SHA256)


def record(label: int, red: int, green: int, blue: int) -> bytes:
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Six small batch files, whose checksums count as the right ones."""
    contents = {name: record(i, i, 10, 20) + record(9, 1, 2, 3) for i, name in enumerate(NAMES)}
    for name, content in contents.items():
        monkeypatch.setitem(cifar.SHA256, name, hashlib.sha256(content).hexdigest())
    return contents


def write_archive(
    path: Path,
    contents: Mapping[str, bytes],
    *,
    top: str = cifar.FOLDER,
    kind: str = "gz",
    more: Iterable[tarfile.TarInfo] = (),
) -> Path:
    with tarfile.open(path, "w:xz" if kind == "xz" else "w:gz") as tar:
        folder = tarfile.TarInfo(top)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return path


def test_parse() -> None:
    images, labels = cifar.parse(record(3, 7, 8, 9) + record(9, 1, 2, 3), "batch")
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images[0, :, 31, 5].tolist() == [7, 8, 9]
    assert labels.tolist() == [3, 9]


def test_rows_run_before_columns() -> None:
    pixels = bytes(range(256)) * 12
    images, _ = cifar.parse(b"\0" + pixels, "batch")
    assert images[0, 0, 1, 0] == 32
    assert images[0, 0, 0, 1] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "batch must be whole records of 3073 bytes .*; got 0 bytes"),
        (
            bytes(3073 + 5),
            "batch must be whole records of 3073 bytes .*; got 3078 bytes, 5 of them left over",
        ),
        (record(10, 0, 0, 0), "batch must have labels 0 to 9; got 10"),
    ],
)
def test_a_wrong_batch_is_named(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cifar.parse(content, "batch")


def test_read(tmp_path: Path, batches: dict[str, bytes]) -> None:
    for name, content in batches.items():
        (tmp_path / name).write_bytes(content)
    train, test = (cifar.read(split, data_dir=tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test.labels.tolist() == [5, 9]
    assert test.images[0, :, 0, 0].tolist() == [5, 10, 20]


def test_a_changed_batch_is_named_with_both_checksums(tmp_path: Path, batches: dict[str, bytes]) -> None:
    for name, content in batches.items():
        (tmp_path / name).write_bytes(content)
    wrong = record(0, 0, 0, 0)
    (tmp_path / "data_batch_2.bin").write_bytes(wrong)
    expected, actual = cifar.SHA256["data_batch_2.bin"], hashlib.sha256(wrong).hexdigest()
    with pytest.raises(InputError, match=f"data_batch_2.bin must have the SHA-256 {expected}; got {actual}"):
        cifar.read("train", data_dir=tmp_path)


def test_a_missing_batch_is_named(tmp_path: Path, batches: dict[str, bytes]) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(batches["data_batch_1.bin"])
    with pytest.raises(InputError, match=r"^file .*test_batch.bin must be readable; got: No such file"):
        cifar.read("test", data_dir=tmp_path)


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_unpack(tmp_path: Path, batches: dict[str, bytes], kind: str) -> None:
    extra = {"batches.meta.txt": b"airplane", "readme.html": b""}
    archive = write_archive(tmp_path / f"cifar-10-binary.tar.{kind}", batches | extra, kind=kind)
    folder = cifar.unpack(archive, tmp_path / "cache")
    assert folder == tmp_path / "cache" / cifar.FOLDER
    assert sorted(path.name for path in folder.iterdir()) == sorted([".unpacked-from", *NAMES])
    assert [path.name for path in folder.parent.iterdir()] == [cifar.FOLDER]
    assert cifar.unpack(archive, tmp_path / "cache") == folder  # as when another process was faster


def test_what_an_archive_can_unpack_to_is_bounded(
    tmp_path: Path, batches: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is passed over unread: members that are not needed, and headers, which tarfile reads whole."""
    monkeypatch.setattr(cifar, "_TAR_BYTES", 2**17)
    for number, name in enumerate(("readme.html", f"{'x' * 2**18}/readme.html")):
        archive = write_archive(tmp_path / f"{number}.tar.gz", batches | {name: bytes(2**18)})
        assert archive.stat().st_size < 2**13
        with pytest.raises(InputError, match=rf"^{archive} must hold at most 131,072 bytes unpacked; got more$"):
            cifar.unpack(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_that_changed_is_unpacked_again(tmp_path: Path, batches: dict[str, bytes]) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", batches)
    cifar.unpack(archive, tmp_path / "cache")
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a.tar.gz must be a whole tar archive packed by gzip or xz"):
        cifar.unpack(archive, tmp_path / "cache")


def test_a_batch_of_any_size_is_not_read_whole(tmp_path: Path, batches: dict[str, bytes]) -> None:
    with (tmp_path / "test_batch.bin").open("wb") as file:
        file.truncate(5 * 10**9)
    with pytest.raises(InputError, match=r"test_batch.bin must hold at most 30,730,000 bytes; got more$"):
        cifar.read("test", data_dir=tmp_path)


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"{cifar.FOLDER}/readme.html")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../evil.bin"),
        tarfile.TarInfo("/evil.bin"),
        tarfile.TarInfo(f"{cifar.FOLDER}/../test_batch.bin"),
        tarfile.TarInfo("test_batch.bin"),
        link(tarfile.SYMTYPE),
        link(tarfile.LNKTYPE),
    ],
    ids=lambda member: member.name,
)
def test_an_archive_with_a_foreign_member_is_refused(
    tmp_path: Path, batches: dict[str, bytes], member: tarfile.TarInfo
) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", batches, more=[member])
    with pytest.raises(InputError, match=r"a.tar.gz must hold regular files of CIFAR-10 in .* only; got "):
        cifar.unpack(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"test_batch.bin": None},
            "a.tar.gz must hold data_batch_1.bin, .*; got none of the name test_batch.bin",
        ),
        (
            {"test_batch.bin": b"other"},
            "a.tar.gz: .*test_batch.bin must have the SHA-256 .*; got d9298a10d1b0",
        ),
        ({"test_batch.bin": bytes(30_730_001)}, "test_batch.bin must have 30730000 bytes; got 30730001"),
    ],
)
def test_an_archive_with_wrong_files_is_refused(
    tmp_path: Path, batches: dict[str, bytes], change: dict[str, bytes | None], message: str
) -> None:
    contents = {name: content for name, content in (batches | change).items() if content is not None}
    archive = write_archive(tmp_path / "a.tar.gz", contents)
    with pytest.raises(InputError, match=message):
        cifar.unpack(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_archive_is_refused(tmp_path: Path, batches: dict[str, bytes]) -> None:
    archive = write_archive(tmp_path / "a.tar.xz", batches, kind="xz")
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive", b""):
        archive.write_bytes(content)
        with pytest.raises(InputError, match=r"a.tar.xz must be a whole tar archive packed by gzip or xz"):
            cifar.unpack(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_of_the_python_version_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", {"data_batch_1": b"pickle"}, top="cifar-10-batches-py")
    with pytest.raises(InputError, match="must be the binary version of CIFAR-10; got the python version"):
        cifar.unpack(archive, tmp_path / "cache")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, batches: dict[str, bytes]) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", batches)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"a.tar.gz must be readable, and .*file.cache writable"):
        cifar.unpack(archive, tmp_path / "file" / "cache")


def test_finding(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / cifar.FOLDER).mkdir(parents=True)
    assert cifar.find_folder([here, there]) is None
    assert cifar.find_archive([here, there]) is None
    (there / cifar.FOLDER / "test_batch.bin").touch()
    (there / "cifar-10-binary.tar.xz").touch()
    assert cifar.find_folder([here, there]) == there / cifar.FOLDER
    assert cifar.find_folder([there / cifar.FOLDER]) == there / cifar.FOLDER  # the place itself
    assert cifar.find_archive([here, there]) == there / "cifar-10-binary.tar.xz"


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"])
def test_the_python_version_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"must be the binary version, .*; got the python version, .*{name}"):
        cifar.find_archive([tmp_path])
