"""Decoded images in memory and in the cache: once, whole, within limits, and by any number of processes."""

import errno
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from capsnet.cli import main
from capsnet.data import image_cache
from capsnet.data.image_cache import decoded, entries
from capsnet.errors import InputError

SHAPE = (3, 4, 5)
KEY = "0123abcd"


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, SHAPE, dtype=np.uint8)


def never(index: int) -> np.ndarray:
    raise AssertionError(f"image {index} is decoded again")


def expected(count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([image(index) for index in range(count)]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the images; all of them are mapped."""
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAPSNET_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(image_cache, "IN_MEMORY", 0)
    return tmp_path / "cache" / "images"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_few_images_are_held_in_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "IN_MEMORY", 10 * 60)
    images = decoded(10, SHAPE, lambda index: torch.from_numpy(image(index)), key=KEY)
    assert torch.equal(images, expected(10))
    assert not cache.exists()


def test_many_are_decoded_once_and_mapped(cache: Path) -> None:
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of memory that is read-only
        first = decoded(20, SHAPE, image, key=KEY, tell=told.append)
        again = decoded(20, SHAPE, never, key=KEY)
    assert torch.equal(first, expected(20))
    assert torch.equal(again, expected(20))
    path = cache / f"{KEY}-20x3x4x5.images"
    assert names(cache) == [path.name]
    assert told == [f"decoding 20 images to {path}, 0.0 GiB, once for all runs", f"images mapped from {path}"]
    again += 1  # stays in this process, and no other sees it
    assert torch.equal(decoded(20, SHAPE, never, key=KEY), expected(20))


def test_another_key_or_shape_is_another_entry(cache: Path) -> None:
    decoded(20, SHAPE, image, key=KEY)
    decoded(20, SHAPE, lambda index: 255 - image(index), key="0f")
    decoded(20, (3, 5, 4), lambda index: image(index).reshape(3, 5, 4), key=KEY)
    assert len(names(cache)) == 3
    assert torch.equal(decoded(20, SHAPE, never, key="0f"), 255 - expected(20))


@pytest.mark.parametrize("keep", [0, 59, 60 * 19 + 1])
def test_a_file_that_is_not_whole_is_made_again(cache: Path, keep: int) -> None:
    decoded(20, SHAPE, image, key=KEY)
    path = cache / names(cache)[0]
    with path.open("r+b") as file:
        file.truncate(keep)
    assert torch.equal(decoded(20, SHAPE, image, key=KEY), expected(20))


@pytest.mark.parametrize("in_memory", [0, 2**20])
def test_an_error_of_one_image_ends_it_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(image_cache, "IN_MEMORY", in_memory)
    calls: list[int] = []

    def decode(index: int) -> np.ndarray:
        calls.append(index)
        if index == 7:
            raise InputError("photo 7 is torn")
        time.sleep(0.001)
        return image(index)

    with pytest.raises(InputError, match="photo 7 is torn"):
        decoded(10_000, SHAPE, decode, key=KEY)
    assert len(calls) < 1000
    assert names(cache) == []


@pytest.mark.parametrize("wrong", [np.zeros((4, 5), np.uint8), np.zeros(SHAPE, np.float32)])
def test_an_image_of_another_shape_is_no_entry(cache: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image 0 must be uint8 \[3, 4, 5\]"):
        decoded(1, SHAPE, lambda index: wrong, key=KEY)
    assert names(cache) == []


PROGRAM = """
import os, sys, time
import numpy as np
from capsnet.data import image_cache
image_cache.IN_MEMORY = 0
def decode(index):
    print("decoded", flush=True)
    time.sleep(float(sys.argv[2]))
    return np.full((3, 4, 5), index, dtype=np.uint8)
images = image_cache.decoded(int(sys.argv[1]), (3, 4, 5), decode, key="abc", tell=lambda line: print(line, flush=True))
assert all((images[k] == k).all() for k in range(len(images)))
print("done", flush=True)
sys.stdin.read()
"""


def start(count: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(count), str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str], start_: str) -> str:
    assert process.stdout
    while line := process.stdout.readline():
        if line.startswith(start_):
            return line
    raise AssertionError(f"the process ended without {start_!r}")


def test_of_several_processes_one_decodes_and_all_use_it(cache: Path) -> None:
    processes = [start(60, 0.02) for _ in range(3)]
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(text.count("decoded") for text in told) == 60  # two threads may share a line
    assert all(text.endswith("done\n") for text in told)
    assert names(cache) == ["abc-60x3x4x5.images"]


def test_what_a_killed_process_leaves_is_not_taken_for_whole(cache: Path) -> None:
    process = start(100, 0.05)
    line_of(process, "decoded")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = names(cache)
    assert left.startswith(".abc-100")
    assert entries() == []
    second = start(100, 0)
    assert second.communicate()[0].count("decoded") == 100
    assert names(cache) == ["abc-100x3x4x5.images"]


def test_a_waiting_process_takes_over_from_a_killed_one(cache: Path) -> None:
    first = start(100, 1.0)  # far from done when the second one comes
    line_of(first, "decoded")
    second = start(100, 0)
    assert "waiting for another process" in line_of(second, "waiting")
    first.kill()
    first.communicate()
    assert second.communicate()[0].count("decoded") == 100
    assert names(cache) == ["abc-100x3x4x5.images"]


def test_the_longest_unused_goes_first_and_never_one_in_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_CACHE_LIMIT", str(3 * 20 * 60 / 2**30))  # three entries
    for k, key in enumerate(("a1", "b2", "c3")):
        decoded(20, SHAPE, image, key=key)
        os.utime(cache / f"{key}-20x3x4x5.images", (k, k))
    assert [entry.path.name[:2] for entry in entries()] == ["a1", "b2", "c3"]
    held = decoded(20, SHAPE, never, key="a1")  # the most recently used now
    os.utime(cache / "a1-20x3x4x5.images", (0, 0))  # and, were it not in use, the first to go
    decoded(20, SHAPE, image, key="d4")
    assert [name[:2] for name in names(cache)] == ["a1", "c3", "d4"]
    assert torch.equal(held, expected(20))
    with pytest.raises(InputError, match=r"^images need .* in the cache .*; its limit is .* in use \(set CAPS"):
        decoded(41, SHAPE, image, key="e5")
    assert [name[:2] for name in names(cache)] == ["a1"]
    del held
    decoded(41, SHAPE, image, key="e5")
    assert [name[:2] for name in names(cache)] == ["e5"]


def test_what_can_never_fit_costs_no_entry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded(20, SHAPE, image, key=KEY)
    monkeypatch.setenv("CAPSNET_CACHE_LIMIT", str(100 * 60 / 2**30))
    with pytest.raises(InputError, match=r"its limit is 0\.0 GiB \(set CAPSNET_CACHE_LIMIT to more GiB\)$"):
        decoded(101, SHAPE, never, key="e5")
    assert len(names(cache)) == 1


def test_using_an_entry_makes_it_recent(cache: Path) -> None:
    decoded(20, SHAPE, image, key="a1")
    os.utime(cache / "a1-20x3x4x5.images", (0, 0))
    decoded(20, SHAPE, never, key="a1")
    assert time.time() - entries()[0].used < 60


@pytest.mark.parametrize("given", ["much", "-1", "0", "nan", "inf"])
def test_a_limit_is_a_number_of_gib(cache: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CAPSNET_CACHE_LIMIT", given)
    with pytest.raises(InputError, match=f"^CAPSNET_CACHE_LIMIT must be a number of GiB above 0; got '{given}'$"):
        decoded(1, SHAPE, image, key=KEY)


def test_a_disk_with_too_little_room_is_said_before_decoding(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(InputError, match=r"^images need 0\.0 GiB in the cache .*; its disk has .*set CAPSNET_CACHE to"):
        decoded(20, SHAPE, never, key=KEY)
    assert names(cache) == []


@pytest.mark.parametrize("name", ["pwrite", "posix_fallocate", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(InputError, match=rf"^images need .*; got: {os.strerror(code)} \(set CAPSNET_CACHE to"):
        decoded(20, SHAPE, image, key=KEY)
    assert names(cache) == []


def test_a_cache_that_is_a_file_is_one_line(cache: Path) -> None:
    cache.parent.write_text("")
    with pytest.raises(InputError, match=r"^cache .*images must be writable; got: Not a directory \(set CAPSNET_CACHE"):
        decoded(20, SHAPE, image, key=KEY)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no anonymous memory")
def test_memory_does_not_grow_with_the_number_of_images(cache: Path) -> None:
    program = """
import numpy as np, torch
from capsnet.data import image_cache
image_cache.IN_MEMORY = 0
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
most = 0
def decode(index):
    global most
    most = max(most, anonymous()) if index % 100 == 0 else most
    return np.full((3, 64, 64), index % 256, dtype=np.uint8)
image_cache.decoded(1_000, (3, 64, 64), decode, key="a").sum()
before = most = anonymous()
images = image_cache.decoded(20_000, (3, 64, 64), decode, key="b")
assert images[:, 2, 63, 63].tolist() == [k % 256 for k in range(20_000)]
print(max(most, anonymous()) - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB; the images are 240,000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "shown"), [(io.StringIO, "decoding images: "), (Terminal, "decoding images")])
def test_progress_is_shown_of_what_takes_long(
    cache: Path, monkeypatch: pytest.MonkeyPatch, screen: Callable[[], io.StringIO], shown: str
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := screen())
    decoded(5, SHAPE, image, key="a1")
    assert stderr.getvalue() == ""
    monkeypatch.setattr(image_cache, "PATIENCE", 0.0)

    def slowly(index: int) -> np.ndarray:
        time.sleep(0.3)
        return image(index)

    decoded(3, SHAPE, slowly, key="b2")
    assert shown in stderr.getvalue()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "stderr", stderr := screen())
    decoded(3, SHAPE, slowly, key="c3")
    assert stderr.getvalue() == ""


def test_the_map_is_refused_in_one_line_where_there_is_no_address_space(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(InputError, match="of address space to be mapped; got: Cannot allocate memory"):
        decoded(20, SHAPE, image, key=KEY)


def test_list_cache_and_clear(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "cache"]) == 0
    assert capsys.readouterr().out.splitlines() == ["total: 0 MiB in 0 files", "  limit: 20.0 GiB"]
    held = decoded(20_000, SHAPE, lambda index: image(0), key="a1")
    decoded(40_000, SHAPE, lambda index: image(0), key="b2")
    assert main(["list", "cache", "--json"]) == 0
    first, second, total = json.loads(capsys.readouterr().out)
    assert first["file"] == str(cache / "a1-20000x3x4x5.images")
    assert (second["images"], second["size"]) == ("40,000 of 3 x 4 x 5", "2 MiB")
    assert second["last used"].startswith(time.strftime("%Y-"))
    assert total["total"] == "3 MiB in 2 files"
    (cache / ".c3-1x1x1x1.images..partial").write_bytes(b"left")
    assert main(["list", "cache", "--clear"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == str(cache / "b2-40000x3x4x5.images")
    assert out[-2:] == ["removed: 2 MiB in 1 file", "  in use: 1 MiB in 1 file"]
    assert names(cache) == ["a1-20000x3x4x5.images"]
    assert len(held) == 20_000


def test_clear_is_of_the_cache_only(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "data", "--clear"]) == 2
    assert capsys.readouterr().err == "capsnet list: error: --clear must be given with cache; got it with data\n"
