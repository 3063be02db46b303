import io
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capsnet.config import Config
from capsnet.data import Dataset, image_cache, image_file, load
from capsnet.data.image_folder import image_files, scan
from capsnet.errors import InputError
from capsnet.training import fit as training
from capsnet.training import prepare
from tiny import photos, same_weights, tiny

RED, BLUE = (200, 10, 30), (10, 20, 190)


def folder(
    path: Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> Dataset:
    """The images of a folder, read as `capsnet.load` does."""
    found = scan(path, skip_unreadable=skip_unreadable).divided(seed=seed)
    size = None if image_size is None else (image_size, image_size)
    return found.read(found.preprocessing(size=size, channels=channels), channels=channels)


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    """An image at `path`, by default grey, 4 wide and 3 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("L", (4, 3), 77)).save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of two grey images each."""
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"):
        save(tmp_path / name)
    return tmp_path


def first(
    tmp_path: Path, image: Image.Image, name: str = "x.png", *, image_size: int | None = None, **options: Any
) -> torch.Tensor:
    """`image`, saved and read again: `uint8 [C, H, W]`."""
    with Image.open(save(tmp_path / "train" / "a" / name, image, **options)) as saved:
        size = saved.size
    for other in ("train/b", "test/a", "test/b"):
        save(tmp_path / other / "y.png", Image.new("L", size, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return folder(tmp_path, image_size=image_size or size[0]).train.images[0]


def test_train_test_and_validation(tmp_path: Path) -> None:
    for level, (split, count) in enumerate({"train": 3, "test": 2, "val": 1}.items()):
        for name in ("class10", "class2"):
            for index in range(count):
                shade = 100 * level + 10 * (name == "class2") + index
                save(tmp_path / split / name / f"{index}.png", Image.new("L", (4, 3), shade))
    data = folder(tmp_path)
    assert data.name == str(tmp_path)
    assert data.classes == ("class2", "class10")
    assert data.image_shape == (1, 3, 4)
    assert data.validation is not None
    assert data.train.images[:, 0, 0, 0].tolist() == [10, 11, 12, 0, 1, 2]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.images[:, 0, 2, 3].tolist() == [110, 111, 100, 101]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.validation.images[:, 0, 0, 0].tolist() == [210, 200]


def test_one_level_is_split_by_seed_within_each_class(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / "many" / f"{index}.png", Image.new("L", (4, 3), index))
    for index in range(2):
        save(tmp_path / "few" / f"{index}.png", Image.new("L", (4, 3), 100 + index))
    data, again, other = (folder(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert data.classes == ("few", "many")
    assert data.train.labels.bincount().tolist() == [1, 10]
    assert data.test.labels.bincount().tolist() == [1, 2]
    shades = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0]
    assert sorted(shades.tolist()) == [*range(12), 100, 101]
    assert torch.equal(data.test.images, again.test.images)
    assert not torch.equal(data.test.images, other.test.images)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        save(tmp_path / name / "1.png")
        save(tmp_path / name / "2.png")
    assert folder(tmp_path).classes == ("train", "tram")


def test_clutter_is_passed_over(pets: Path) -> None:
    for name in (
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "dog/desktop.ini",
        "dog/._a.png",
        "README.md",
        ".git/a.png",
    ):
        (pets / name).parent.mkdir(exist_ok=True)
        (pets / name).write_bytes(b"clutter")
    (pets / "__MACOSX").mkdir()
    assert len(folder(pets).train) == 2


def test_grey_stays_grey_and_one_coloured_image_makes_colour(pets: Path) -> None:
    save(pets / "cat" / "c.JPG", Image.new("RGB", (4, 3), (9, 9, 9)))
    assert folder(pets).image_shape == (1, 3, 4)
    assert folder(pets, channels=3).image_shape == (3, 3, 4)
    save(pets / "dog" / "c.bmp", Image.new("RGB", (4, 3), RED))
    data = folder(pets)
    assert data.image_shape == (3, 3, 4)
    colours = torch.cat([data.train.images, data.test.images])[:, :, 0, 0]
    assert {tuple(colour) for colour in colours.tolist()} == {RED, (9, 9, 9), (77, 77, 77)}
    luma = torch.cat([(grey := folder(pets, channels=1)).train.images, grey.test.images])[:, 0, 0, 0]
    assert grey.image_shape == (1, 3, 4)
    assert sorted(set(luma.tolist())) == [9, round(0.299 * 200 + 0.587 * 10 + 0.114 * 30), 77]


def test_resizing_is_plain_and_antialiased(tmp_path: Path) -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (100, 100)))  # [100, 200], one pixel wide
    image = first(tmp_path, stripes, image_size=10)
    assert image.shape == (1, 10, 10)
    assert (image.int() - 127).abs().max() <= 3


def test_large_jpeg_is_read_at_a_fraction_to_the_same_end(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8).repeat(4), (512, 1)))  # [512, 1024]
    image = first(tmp_path, ramp, "x.jpg", image_size=16)[0, 4:12].float()
    assert (image - (torch.arange(16) * 16 + 7.5)).abs().max() < 3


def test_exif_turns_the_image(tmp_path: Path) -> None:
    image = Image.new("L", (6, 6))
    image.paste(255, (0, 0, 6, 3))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise by 90 degrees
    turned = first(tmp_path, image, exif=exif)
    assert turned[0, :, 3:].min() == 255
    assert turned[0, :, :3].max() == 0


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    return image


def grey16(*shades: int) -> Image.Image:
    return Image.fromarray(np.array([shades] * len(shades), np.uint16))


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (palette(), "x.png", {}, RED),
        (palette(), "x.gif", {}, RED),
        (palette(), "x.png", {"transparency": 1}, (255,)),
        (palette(), "x.png", {"transparency": b"\xff\x00"}, (255,)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "x.png", {}, (255,)),
        (Image.new("RGBA", (4, 4), (*BLUE, 255)), "x.webp", {"lossless": True}, BLUE),
        (Image.new("LA", (4, 4), (0, 51)), "x.png", {}, (204,)),
        (Image.new("RGB", (4, 4), RED), "x.png", {"transparency": RED}, (255,)),
        (Image.new("1", (4, 4), 1), "x.png", {}, (255,)),
        (Image.new("1", (4, 4), 1), "x.pbm", {}, (255,)),
        (Image.new("CMYK", (4, 4), (255, 255, 0, 0)), "x.tif", {}, (0, 0, 255)),
        (Image.new("L", (4, 4), 8), "x.pgm", {}, (8,)),
        (Image.new("L", (4, 4), 8), "wrongly-named.jpg", {"format": "PNG"}, (8,)),
    ],
)
def test_modes(
    tmp_path: Path, image: Image.Image, name: str, options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    read = first(tmp_path, image, name, **options)
    assert read.shape == (len(expected), 4, 4)
    assert (read == torch.tensor(expected).view(-1, 1, 1)).all()


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    image = first(tmp_path, grey16(0, 128, 129, 257, 32768, 65535), name)
    assert image[0, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    read = first(tmp_path, Image.new("CMYK", (8, 8), (255, 255, 0, 0)), "x.jpg")
    assert (read.float() - torch.tensor([0.0, 0.0, 255.0]).view(3, 1, 1)).abs().max() < 4


def test_a_jpeg_with_a_preview_is_a_still_image(tmp_path: Path) -> None:
    save(
        tmp_path / "x.mpo",
        Image.new("RGB", (8, 8), (0, 0, 0)),
        save_all=True,
        append_images=[Image.new("L", (4, 4))],
    )
    with Image.open(tmp_path / "x.mpo") as saved:
        assert saved.format == "MPO"
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes((tmp_path / "x.mpo").read_bytes())
    assert folder(tmp_path / "set").image_shape == (1, 8, 8)


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def huge_png() -> bytes:
    """A PNG whose header claims 20,000 x 20,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + encoded("PNG")[33:]
    )


def float_tiff() -> bytes:
    stream = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(stream, "TIFF")
    return stream.getvalue()


MORE: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (40, 40), RED)]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"", "must be a readable image; got: an empty file"),
        ("x.png", b"not an image", "must be a readable image; got: cannot identify image file"),
        ("x.png", encoded("PNG")[:-2000], "must be a readable image; got: "),
        ("x.jpg", encoded("JPEG")[:-500], "must be a readable image; got: image file is truncated"),
        ("x.gif", encoded("GIF", **MORE), "must be a still image of one page; got 2 frames"),
        ("x.png", encoded("PNG", **MORE), "must be a still image of one page; got 2 frames"),
        ("x.webp", encoded("WEBP", **MORE), "must be a still image of one page; got 2 frames"),
        ("x.tiff", encoded("TIFF", **MORE), "must be a still image of one page; got 2 frames"),
        ("x.tiff", float_tiff(), "must be a readable image; got: floating-point pixels"),
        ("x.png", huge_png(), "must have at most 250,000,000 pixels; got 20000x20000"),
        (
            "x.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
            "must be a readable image; got: cannot identify",
        ),
    ],
)
def test_a_bad_file_is_named(pets: Path, name: str, content: bytes, message: str) -> None:
    (pets / "dog" / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=f"dog.{name} .*({message})"):
            folder(pets, image_size=8)


def test_many_pixels_are_refused_before_they_are_decoded(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "MAX_PIXELS", 11)
    with pytest.raises(
        InputError, match=r"4 files are none: (\w+/[ab].png must have at most 11 pixels; got 4x3(; |$)){4}"
    ):
        folder(pets)


def test_warnings_of_pillow_do_not_leak(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)  # above it Pillow warns, above twice as many it refuses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folder(pets).train) == 2


def test_an_unreadable_directory_is_named(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="must be a readable directory; got: Permission denied"):
        folder(pets)


def test_a_broken_link_is_named(pets: Path) -> None:
    (pets / "dog" / "c.png").symlink_to(pets / "nowhere")
    with pytest.raises(InputError, match=r"dog.c.png must be a readable image; got: .*No such file"):
        folder(pets)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(3, 4)], (3, 4)), ([(40, 17)], (40, 17)), ([(41, 17)], (32, 32)), ([(3, 4), (4, 3)], (32, 32))],
    ids=str,
)
def test_the_size_is_theirs_if_one_and_small_and_else_32(
    tmp_path: Path, sizes: list[tuple[int, int]], expected: tuple[int, int]
) -> None:
    for k in range(8):
        height, width = sizes[k % len(sizes)]
        save(tmp_path / "ab"[k // 4] / f"{k}.png", Image.new("L", (width, height), 7))
    assert folder(tmp_path).image_shape == (1, *expected)
    assert load(tmp_path).image_shape == (1, *expected)
    assert load(tmp_path, image_size="5x6", channels=3).image_shape == (3, 5, 6)


def make(root: Path, *names: str) -> None:
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True, exist_ok=True)
        elif name.endswith(".png"):
            save(root / name)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"text")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "must hold a folder for each of at least 2 classes; got 0"),
        (["a/1.png", "a/2.png"], "must hold a folder for each of at least 2 classes; got 1"),
        (
            ["1.png", "2.png"],
            "must hold a folder for each of at least 2 classes; got 0, and 2 images outside of them$",
        ),
        (
            ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "3.png"],
            r"3.png must be in the folder of its class; got an image beside the class folders",
        ),
        (["a/1.png", "a/2.png", "b/"], "class folder .*b must hold at least one image; got none"),
        (["a/1.png", "a/2.png", "b/1.png"], "class b must have at least 2 images, .*; got 1"),
        (
            ["a/1.png", "a/2.png", "b/1.png", "b/notes.txt"],
            r"b/notes.txt must be an image \(.*\); got another name",
        ),
        (["a/1.png", "a/2.png", "b/1.png", "b/more/2.png"], "b/more must be an image; got a folder in a class folder"),
        (
            ["train/a/1.png", "train/b/1.png"],
            r"must hold train/ and test/ or val/, or the classes only; got train/ alone",
        ),
        (["test/a/1.png", "test/b/1.png"], "must hold train/ and test/ or val/, .*; got test/ alone"),
        (["train/a/1.png", "test/a/1.png", "test/b/1.png"], "train must hold a folder for each of at least 2"),
        (["train/a/1.png", "train/b/", "test/a/1.png"], "train.b must hold at least one image"),
        (["train/a/1.png", "train/b/1.png", "test/A/1.png", "test/c/1.png"], "must hold test images; got none"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "more/"], "got more/ as well"),
        (["train/a/1.png", "test/a/1.png", "val/a/1.png", "validation/a/1.png"], "got val/ as well"),
        (["train/1.png", "test/1.png"], "train must hold a folder for each .*; got 0, and 1 image outside of them$"),
    ],
)
def test_a_wrong_layout_is_told(tmp_path: Path, names: list[str], message: str) -> None:
    make(tmp_path, *names)
    with pytest.raises(InputError, match=message):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        (["test/a/1.png", "test/b/1.png", "test/c/1.png"], ()),
        (["test/a/1.png", "test/c/1.png"], ("no test image of b",)),
        (["test/c/1.png"], ("no test image of a, b",)),
        (["test/c/1.png", "test/a/", "test/b/1.png"], ("no test image of a",)),
        (
            ["test/a/1.png", "test/b/1.png", "test/c/1.png", "test/d/1.png", "test/d/2.png"],
            ("left out, classes that training does not know: d (2)",),
        ),
        (["val/b/1.png", "test/c/1.png"], ("no validation image of a, c", "no test image of a, b")),
    ],
)
def test_classes_are_matched_by_name(tmp_path: Path, names: list[str], notes: tuple[str, ...]) -> None:
    make(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", *names)
    data = folder(tmp_path)
    assert data.classes == ("a", "b", "c")
    tested = [name[5] for name in names if name.startswith("test/") and name.endswith("png")]
    assert data.test.labels.tolist() == ["abc".index(name) for name in sorted(tested) if name in "abc"]
    told = {note for note in data.notes if "in several" not in note and "blank" not in note}  # as they all are
    assert told == set(notes)


def test_the_path_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path of an image folder must be an existing directory; got .*nowhere"):
        folder(tmp_path / "nowhere")


# what is no image, and what is passed over


def test_all_bad_files_are_told_at_once(pets: Path) -> None:
    (pets / "cat" / "c.png").write_bytes(b"no image")
    (pets / "dog" / "notes.txt").write_bytes(b"text")
    save(pets / "loose.png")
    (pets / "dog" / "d.jpg").write_bytes(encoded("JPEG")[:-500])  # of which only decoding tells
    with pytest.raises(InputError) as told:
        folder(pets)
    for part in (
        "3 files are none",
        "loose.png must be in",
        "cat/c.png must be a readable",
        "dog/notes.txt must be an",
    ):
        assert part in str(told.value)
    data = prepare.prepare_data(Config.of(data=str(pets), validation=0, skip_unreadable=True))
    assert len(data.train) + len(data.test) == 4


def test_files_that_only_decoding_finds_damaged_are_told_together_or_passed_over(pets: Path) -> None:
    for name in ("cat/c.jpg", "dog/d.jpg"):
        (pets / name).write_bytes(encoded("JPEG")[:-500])
    with pytest.raises(InputError, match=r"2 files are none: cat/c.jpg must be a .* truncated.*; dog/d.jpg must be a"):
        folder(pets, image_size=8)
    config = Config.of(data=str(pets), image_size=8, validation=0, skip_unreadable=True)
    data = prepare.prepare_data(config)
    assert len(data.train) + len(data.test) == 4
    told = next(note for note in data.notes if "passed over" in note)
    assert re.match(r"passed over 2 unreadable: cat/c.jpg \(must be a readable image; got: .*truncated", told)


def test_what_is_passed_over_is_told(pets: Path) -> None:
    for name in (".hidden.png", "README.md", "list.csv", "more.csv"):
        (pets / name).write_bytes(b"x")
    assert scan(pets).notes[0] == "passed over: 1 hidden, 2 .csv files, 1 .md files"


def test_a_folder_is_listed_once_whatever_links_lead_to_it(pets: Path) -> None:
    (pets / "cat" / "again").symlink_to(pets)
    (pets / "dog" / "b.txt").write_bytes(b"x")
    files, notes = image_files(pets)
    assert [file.relative_to(pets).as_posix() for file in files] == [
        "cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png",
    ]  # fmt: skip
    assert notes == ("passed over: 1 links to what was visited, 1 .txt files",)


def test_one_depth_holds_for_the_whole_folder(tmp_path: Path) -> None:
    for k, most in enumerate((400, 900, 3000, 500)):
        image = Image.fromarray(np.full((4, 4), most, np.uint16))
        save(tmp_path / "ab"[k // 2] / f"{k}.png", image)
    data = folder(tmp_path)
    assert data.preprocessing is not None
    assert data.preprocessing.bits == 12
    shades = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0]
    assert sorted(shades.tolist()) == [round(255 * most / 4095) for most in (400, 500, 900, 3000)]


def test_a_class_under_two_names_is_told(pets: Path) -> None:
    (pets / "wolf").symlink_to(pets / "dog")
    with pytest.raises(InputError, match=r"wolf must be a folder of its own; got another name of dog/"):
        folder(pets)


def test_a_training_on_mapped_images_ends_as_one_in_memory(
    photos: Path,
    workplace: Path,
    blank_figure: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training.fit(tiny(photos, out="memory", epochs=1))
    monkeypatch.setattr(image_cache, "IN_MEMORY", 0)
    training.fit(tiny(photos, out="mapped", epochs=1, report=False))
    assert same_weights("memory", "mapped")
    assert len(image_cache.entries()) == 1
    assert str(image_cache.entries()[0].path) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory in /proc")
def test_a_report_of_1000_classes_takes_less_than_a_gigabyte_more(workplace: Path) -> None:
    for k in range(1000):
        for number in range(3):
            save(workplace / "many" / str(k) / f"{number}.png", Image.new("L", (12, 12), (7 * k + number) % 256))
    sizes = "--conv-channels 8 --conv-kernel-size 5 --primary-kernel-size 5 --capsule-types 2 --decoder-sizes 16"
    sizes += " --threads 1 --epochs 1 --validation 0"
    program = (
        "import sys; from capsnet.cli import main; code = main(sys.argv[1:]); "
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]); sys.exit(code)"
    )
    peaks = []
    for words in ("--no-report --out plain", "--out reported"):
        command = [sys.executable, "-c", program, "train", "--data", "many", *sizes.split(), *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 2**20  # kibibytes


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (68, 7, 15)),
        ({"test_fraction": 0.3}, (57, 6, 27)),
        ({"test_fraction": 20}, (63, 7, 20)),
        ({"test_fraction": 0.3, "validation": 0.25}, (47, 16, 27)),
        ({"test_fraction": 20, "validation": 10}, (60, 10, 20)),
        ({"test_fraction": 0.99, "validation": 0}, (3, 0, 87)),  # one of each class is left
        ({"test_fraction": 87, "validation": 0}, (3, 0, 87)),
    ],
)
def test_splits_are_counts_or_shares(options: dict[str, Any], sizes: tuple[int, ...], tmp_path: Path) -> None:
    config = Config.of(data=str(photos(tmp_path / "own")), **options)
    dataset = prepare.prepare_data(config)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert tuple(0 if part is None else len(part) for part in parts) == sizes
    spread = [part.labels.bincount(minlength=3).tolist() for part in parts if part is not None]
    assert all(max(counts) - min(counts) <= 1 for counts in spread), "of each class its share"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"test_fraction": 88}, "test_fraction must be a share, or 1 to 87 of the 90 images; got 88$"),
        ({"test_fraction": 0}, "test_fraction must be a share, or 1 to 87 of the 90 images; got 0$"),
        (
            {"test_fraction": 1.0},
            r"test_fraction must be a whole number, .*, or a share in \(0, 1\); got 1.0$",
        ),
        (
            {"validation": -0.1},
            r"validation must be a whole number, .*, or a share in \(0, 1\); got -0.1$",
        ),
    ],
)
def test_splits_that_cannot_be_are_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        prepare.prepare_data(Config.of(data=str(photos(tmp_path / "own")), **options))


def test_a_test_fraction_of_what_has_a_test_split_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        photos(tmp_path / "own" / split, count=2)
    with pytest.raises(InputError, match=r"test_fraction must be left out where .*own is divided already; got 0.2$"):
        prepare.prepare_data(Config.of(data=str(tmp_path / "own"), test_fraction=0.2))
    with pytest.raises(InputError, match=r"test_fraction must be left out for a data set with a test split; got 5$"):
        prepare.prepare_data(Config.of(data="strokes", test_fraction=5))
