import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from capsnet import data
from capsnet.checkpoints import pretrained
from capsnet.data.dataset import to_float
from capsnet.data.photo import Frame, frame_of
from capsnet.data.preprocessing import MNIST_FRAME as MNIST
from capsnet.data.preprocessing import Invert, Prepared
from capsnet.data.sets import strokes
from capsnet.errors import InputError
from tiny import REAL, reading

SHAPE = (1, 28, 28)


def prepare(
    source: Path | bytes,
    shape: tuple[int, int, int],
    *,
    frame: Frame | None,
    invert: Invert = "auto",
    name: str | None = None,
) -> Prepared:
    return reading(shape, frame)(source, invert=invert, name=name)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def digits(labels: list[int], **changes: float) -> Tensor:
    """White on black, `uint8 [n, 28, 28]`."""
    ones = ("scale", "aspect")
    factors = {name: torch.full((len(labels),), float(name in ones)) for name in strokes.FACTORS}
    factors["stroke_width_pixels"][:] = 2.5
    for name, value in changes.items():
        factors[name][:] = value
    return strokes.render(torch.tensor(labels), factors)[:, 0]


def photograph(digit: Tensor, draw: np.random.Generator, *, light_on_dark: bool = False) -> Image.Image:
    """White on black as ink on unevenly lit, grainy paper (or chalk on a board), with a shadow, anywhere."""
    width, height = (int(side) for side in draw.integers(160, 420, 2))
    size = int(draw.uniform(0.4, 0.8) * min(width, height))
    sheet = Image.new("L", (width, height))
    place = (int(draw.integers(0, width - size + 1)), int(draw.integers(0, height - size + 1)))
    sheet.paste(Image.fromarray(digit.numpy()).resize((size, size), Image.Resampling.BICUBIC), place)
    sheet = sheet.rotate(draw.uniform(-5, 5), Image.Resampling.BICUBIC)
    ink = np.asarray(sheet, float) / 255
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    light = 0.8 + draw.uniform(-0.2, 0.2) * x + draw.uniform(-0.2, 0.2) * y
    angle = draw.uniform(0, 2 * np.pi)
    edge = np.cos(angle) * x + np.sin(angle) * y - draw.uniform(-0.4, 0.6)
    light *= 1 - draw.uniform(0.1, 0.35) / (1 + np.exp(-edge / draw.uniform(0.02, 0.2)))
    shown = light * (0.15 + 0.6 * ink) if light_on_dark else light * (1 - draw.uniform(0.55, 0.9) * ink)
    shown = shown + draw.normal(0, draw.uniform(0.005, 0.03), shown.shape)
    grey = Image.fromarray((shown.clip(0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return Image.merge("RGB", [grey, grey, grey.point(lambda level: int(0.9 * level))])


def files(images: Tensor, seed: int) -> list[bytes]:
    """A file for each digit: every fifth a light one on dark, JPEG of several qualities, PNG with RGBA, turned."""
    draw = np.random.default_rng(seed)
    found = []
    for number, digit in enumerate(images):
        photo = photograph(digit, draw, light_on_dark=number % 5 == 4)
        if number % 3 == 0:
            found.append(encoded(photo, "JPEG", quality=int(draw.integers(45, 95))))
        elif number % 3 == 1:
            found.append(encoded(photo.convert("RGBA")))
        else:
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees to the right
            found.append(encoded(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif))
    return found


def similarity(one: Tensor, other: Tensor) -> float:
    """Cosine between two images."""
    a, b = one.flatten().double(), other.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))


def box_of(image: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is brighter than a third."""
    rows, columns = ((image > 85).any(axis).nonzero() for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


# the frame


def test_the_frame_of_drawn_digits() -> None:
    images = digits([0, 3, 4, 8])[:, None]
    frame = frame_of(images)
    assert frame is not None
    assert frame.ground == 0
    boxes = [box_of(image[0]) for image in images]
    longest = [max(bottom - top, right - left) / 28 for top, bottom, left, right in boxes]
    assert frame.box == pytest.approx(sorted(longest)[1], abs=1 / 28)
    negative = frame_of(255 - images)
    assert negative is not None
    assert (negative.ground, negative.box) == (1, frame.box)


def test_the_box_is_the_median_and_relative_to_the_side_it_lies_along() -> None:
    images = torch.full((3, 1, 40, 20), 250, dtype=torch.uint8)
    images[0, :, 10:30, 5:6] = 0  # 20 of 40 high
    images[1, :, 10:12, 5:20] = 0  # 15 of 20 wide
    images[2, :, 3:7, 5:7] = 0
    frame = frame_of(images)
    assert frame is not None
    assert frame.ground == pytest.approx(250 / 255)
    assert frame.box == 0.5


def test_photographs_have_no_frame() -> None:
    noise = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert frame_of(noise) is None
    grey = torch.full((5, 1, 9, 9), 100, dtype=torch.uint8)
    grey[:, :, 4, 4] = 250
    assert frame_of(grey) is None, "grey is no paper"
    assert frame_of(torch.zeros(5, 1, 9, 9, dtype=torch.uint8)) is None, "nothing is shown"
    assert frame_of(torch.zeros(0, 1, 9, 9, dtype=torch.uint8)) is None
    colours = torch.zeros(4, 3, 9, 9, dtype=torch.uint8)
    colours[:, 2, 3:6, 4] = 200  # blue, 3 of 9 high
    frame = frame_of(colours)
    assert frame is not None
    assert frame.ground == 0
    assert frame.box == pytest.approx(1 / 3)


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"no MNIST in {REAL}")
def test_the_frame_of_mnist_is_that_of_its_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(REAL))
    frame = frame_of(data.load("mnist").test.images[:500])
    assert frame is not None
    assert frame.ground == 0
    assert frame.box == pytest.approx(20 / 28)


@pytest.mark.parametrize(("ground", "box"), [(-0.1, 0.5), (1.1, 0.5), (0.0, 0.0), (0.0, 1.1)])
def test_an_impossible_frame_is_refused(ground: float, box: float) -> None:
    with pytest.raises(InputError, match=r"of a frame must be in"):
        Frame(ground, box)


# an image of the network's own size


def test_an_image_of_the_networks_size_is_taken_as_it_is() -> None:
    digit = digits([5], x_pixels=3.0)[0]
    file = encoded(Image.fromarray(digit.numpy()))
    for frame in (MNIST, None):
        prepared = prepare(file, SHAPE, frame=frame)
        assert torch.equal(prepared.image[0], digit)
        assert not prepared.inverted
        assert not prepared.framed


def test_and_inverted_if_its_ground_is_clearly_the_opposite() -> None:
    digit = digits([5])[0]
    negative = encoded(Image.fromarray(255 - digit.numpy()))
    prepared = prepare(negative, SHAPE, frame=MNIST)
    assert torch.equal(prepared.image[0], digit)
    assert prepared.inverted
    assert torch.equal(prepare(negative, SHAPE, frame=MNIST, invert="no").image[0], 255 - digit)
    assert torch.equal(prepare(negative, SHAPE, frame=None).image[0], 255 - digit), "never unasked without a frame"
    assert torch.equal(prepare(negative, SHAPE, frame=None, invert="yes").image[0], digit)
    middle = encoded(Image.new("L", (28, 28), 140))
    assert not prepare(middle, SHAPE, frame=MNIST).inverted, "not clearly the opposite"


# without a frame


def test_without_a_frame_it_is_resized_only(tmp_path: Path) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    prepared = prepare(tmp_path / "photo.png", (3, 20, 30), frame=None)
    assert np.array_equal(
        prepared.image.permute(1, 2, 0).numpy(), np.asarray(photo.resize((30, 20), Image.Resampling.LANCZOS))
    )
    assert not prepared.framed
    assert not prepared.inverted
    grey = prepare(tmp_path / "photo.png", (1, 20, 30), frame=None).image
    assert grey.shape == (1, 20, 30)
    inverted = prepare(tmp_path / "photo.png", (1, 20, 30), frame=None, invert="yes")
    assert torch.equal(inverted.image, 255 - grey)
    assert inverted.inverted


# with a frame


@pytest.mark.parametrize("ground", [0.0, 1.0])
@pytest.mark.parametrize("light_on_dark", [False, True])
def test_a_photograph_becomes_like_the_training_images(ground: float, light_on_dark: bool) -> None:
    draw = np.random.default_rng(1)
    for digit in digits([2, 0, 7]):
        file = encoded(photograph(digit, draw, light_on_dark=light_on_dark))
        prepared = prepare(file, SHAPE, frame=Frame(ground, 20 / 28))
        assert prepared.framed
        assert prepared.inverted == (light_on_dark == (ground == 1))
        image = prepared.image[0] if ground == 0 else 255 - prepared.image[0]
        top, bottom, left, right = box_of(image)
        assert 19 <= max(bottom - top, right - left) <= 21
        assert image.max() >= 250, "full contrast"
        assert (image[0] == 0).all(), "nothing but ground around"
        weight = image.double()
        centre = [
            float((weight.sum(axis) * torch.arange(28)).sum() / weight.sum())
            for axis in (0, 1)  # over rows, over columns
        ]
        assert centre == pytest.approx([14, 14], abs=0.35)


def test_the_proportions_are_kept_and_nothing_leaves_the_image() -> None:
    """A T whose mass is at its top: centred on it, a box of the whole height would leave the image."""
    sheet = np.full((300, 200), 230, np.uint8)
    sheet[40:80, 40:160] = 30
    sheet[80:280, 95:105] = 30
    whole = prepare(encoded(Image.fromarray(sheet)), SHAPE, frame=Frame(0.0, 1.0)).image[0]
    top, bottom, left, right = box_of(whole)
    assert (top, bottom) == (0, 28)
    assert right - left == pytest.approx(28 * 120 / 240, abs=1)
    wide = prepare(encoded(Image.fromarray(sheet)), (1, 28, 56), frame=Frame(0.0, 0.5)).image[0]
    top, bottom, left, right = box_of(wide)
    assert bottom - top == 14
    assert right - left == pytest.approx(7, abs=1)


def test_what_is_left_of_the_middle_stays_left() -> None:
    """No axis is mirrored or swapped, and the size is that of the network."""
    sheet = np.full((120, 160), 240, np.uint8)
    sheet[30:90, 20:30] = 20
    sheet[80:90, 20:60] = 20  # an L
    image = prepare(encoded(Image.fromarray(sheet)), (1, 24, 30), frame=Frame(0.0, 0.5)).image[0]
    top, bottom, left, right = box_of(image)
    assert bottom - top == 12
    assert (image[top:bottom, left] > 127).all()
    assert (image[bottom - 1, left:right] > 127).all()
    assert (image[top : bottom - 4, left + 4 :] < 60).all()


def test_invert_overrules_what_is_seen() -> None:
    """Light on dark on grey: which of them is ink, the caller may know better."""
    sheet = Image.new("L", (300, 300), 140)
    sheet.paste(20, (120, 120, 180, 180))
    sheet.paste(255, (130, 145, 170, 155))
    auto = prepare(encoded(sheet), SHAPE, frame=MNIST)
    assert auto.inverted
    assert torch.equal(prepare(encoded(sheet), SHAPE, frame=MNIST, invert="yes").image, auto.image)
    other = prepare(encoded(sheet), SHAPE, frame=MNIST, invert="no")
    assert not other.inverted
    assert other.image.any()
    assert similarity(other.image, auto.image) < 0.5


def test_strokes_may_cross_the_border() -> None:
    sheet = np.full((200, 200), 220, np.uint8)
    sheet[:, 90:110] = 40
    sheet[100:115, :] = 40
    prepared = prepare(encoded(Image.fromarray(sheet)), SHAPE, frame=MNIST)
    assert prepared.inverted
    top, bottom, left, right = box_of(prepared.image[0])
    assert 19 <= bottom - top <= 21
    assert 19 <= right - left <= 21


def test_a_shadow_across_the_ink_is_no_ink() -> None:
    sheet = np.full((300, 300), 230.0)
    sheet[40:260, 100:120] = 40
    sheet[40:60, 100:220] = 40
    clean = prepare(encoded(Image.fromarray(sheet.astype(np.uint8))), SHAPE, frame=MNIST).image
    sheet[150:] *= 0.55
    shadowed = prepare(encoded(Image.fromarray(sheet.astype(np.uint8))), SHAPE, frame=MNIST).image
    assert similarity(shadowed, clean) > 0.99


def test_a_smudge_beside_the_ink_is_no_ink() -> None:
    """As much ink as a part of the digit, but far paler."""
    sheet = np.full((300, 300), 230, np.uint8)
    sheet[60:240, 80:100] = 30
    clean = prepare(encoded(Image.fromarray(sheet)), SHAPE, frame=MNIST).image
    sheet[200:240, 240:280] = 140
    assert similarity(prepare(encoded(Image.fromarray(sheet)), SHAPE, frame=MNIST).image, clean) > 0.99


def test_thin_strokes_do_not_fade() -> None:
    sheet = Image.new("L", (400, 400), 235)
    sheet.paste(30, (60, 60, 64, 340))
    sheet.paste(30, (60, 336, 260, 340))
    assert prepare(encoded(sheet), SHAPE, frame=MNIST).image.max() > 230


def test_even_paper_is_all_ground_beside_the_ink() -> None:
    """Grain stays below the floor of what counts as ink, also close to the strokes."""
    draw = np.random.default_rng(8)
    sheet = 220 + draw.normal(0, 6, (300, 300))
    sheet[60:240, 130:170] -= 150
    image = prepare(encoded(Image.fromarray(sheet.clip(0, 255).astype(np.uint8))), SHAPE, frame=MNIST).image[0]
    top, bottom, left, right = box_of(image)
    image[top - 1 : bottom + 1, left - 1 : right + 1] = 0
    assert not image.any()


def test_what_pillow_warns_of_is_handled_in_silence() -> None:
    palette = Image.new("P", (60, 60), 0)
    palette.putpalette([255, 255, 255, 0, 0, 0])
    palette.paste(1, (20, 10, 30, 50))
    file = encoded(palette, transparency=bytes([200, 255]))  # "should be converted to RGBA images"
    assert prepare(file, SHAPE, frame=MNIST).image.any()


def test_specks_and_the_table_beside_the_sheet_are_passed_over() -> None:
    digit = digits([3])[0]
    sheet = Image.fromarray(np.full((300, 400), 225, np.uint8))
    ink = Image.fromarray(digit.numpy()).resize((150, 150), Image.Resampling.BICUBIC)
    sheet.paste(Image.new("L", ink.size, 40), (120, 80), ink)
    clean = prepare(encoded(sheet), SHAPE, frame=MNIST).image
    for place in ((20, 20), (370, 250), (30, 270)):
        sheet.paste(60, (*place, place[0] + 7, place[1] + 7))
    assert similarity(prepare(encoded(sheet), SHAPE, frame=MNIST).image, clean) > 0.99
    sheet.paste(90, (385, 0, 400, 300))
    assert similarity(prepare(encoded(sheet), SHAPE, frame=MNIST).image, clean) > 0.97


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_sheet_becomes_all_ground(level: int) -> None:
    for ground in (0.0, 1.0):
        prepared = prepare(encoded(Image.new("RGB", (90, 70), (level,) * 3)), SHAPE, frame=Frame(ground, 0.7))
        assert (prepared.image == 255 * ground).all()
        assert prepared.framed
    draw = np.random.default_rng(2)
    paper = (level + draw.normal(0, 3, (90, 120))).clip(0, 255).astype(np.uint8)
    assert (prepare(encoded(Image.fromarray(paper)), SHAPE, frame=MNIST).image == 0).all(), "paper is no ink"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (5, 9), (16, 16), (1200, 3)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    sheet = Image.new("L", size, 250)
    sheet.paste(0, (size[0] // 3, size[1] // 3, size[0] // 3 + 1, size[1] // 3 + 1))
    prepared = prepare(encoded(sheet), SHAPE, frame=MNIST)
    assert prepared.image.shape == SHAPE
    assert prepared.image.dtype == torch.uint8


def test_a_small_drawing_is_enlarged() -> None:
    digit = digits([6])[0]
    large = Image.fromarray(255 - digit.numpy()).resize((160, 160), Image.Resampling.BICUBIC)
    one, other = (prepare(encoded(large.resize((n, n))), SHAPE, frame=MNIST).image for n in (16, 160))
    assert similarity(one, other) > 0.9


def test_colours_are_kept_on_the_same_ground_and_swapped_on_the_other() -> None:
    sheet = Image.new("RGB", (200, 150), (250, 250, 250))
    sheet.paste((200, 30, 40), (60, 40, 120, 110))
    kept = prepare(encoded(sheet), (3, 32, 32), frame=Frame(1.0, 0.5))
    assert not kept.inverted
    red, green, blue = (int(level) for level in kept.image[:, 16, 16])
    assert red > 150 > 30 > max(green, blue)
    assert (kept.image[:, 0, 0] == 255).all()
    swapped = prepare(encoded(sheet), (3, 32, 32), frame=Frame(0.0, 0.5))
    assert swapped.inverted
    assert torch.allclose(swapped.image.float(), 255 - kept.image.float(), atol=1)
    grey = prepare(encoded(sheet.convert("L")), (3, 32, 32), frame=Frame(0.0, 0.5)).image
    assert torch.equal(grey[0], grey[2])


# files


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    file = files(digits([4]), 3)[0]
    (tmp_path / "four.jpg").write_bytes(file)
    one, other = prepare(tmp_path / "four.jpg", SHAPE, frame=MNIST), prepare(file, SHAPE, frame=MNIST)
    assert isinstance(one, Prepared)
    assert torch.equal(one.image, other.image)


def test_a_turned_photograph_is_turned_back() -> None:
    photo = photograph(digits([7])[0], np.random.default_rng(4))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo.transpose(Image.Transpose.ROTATE_90), exif=exif)
    straight = prepare(encoded(photo), SHAPE, frame=MNIST)
    assert torch.equal(prepare(turned, SHAPE, frame=MNIST).image, straight.image)


def test_transparency_is_paper() -> None:
    drawing = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    drawing.paste((20, 20, 90, 255), (30, 20, 45, 80))
    assert prepare(encoded(drawing), SHAPE, frame=MNIST).inverted
    white = Image.new("RGBA", (100, 100), "white")
    white.alpha_composite(drawing)
    images = [prepare(encoded(one), SHAPE, frame=MNIST).image for one in (drawing, white)]
    assert torch.equal(*images)


def test_sixteen_bits_are_scaled() -> None:
    eight = np.asarray(photograph(digits([9])[0], np.random.default_rng(5)).convert("L"))
    sixteen = Image.fromarray(eight.astype(np.uint16) * 257)
    images = [prepare(encoded(one), SHAPE, frame=MNIST).image for one in (Image.fromarray(eight), sixteen)]
    assert torch.equal(*images)


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pages() -> bytes:
    return encoded(Image.new("L", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9), 9)])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", r"^photo 1 must be a readable image; got: an empty file$"),
        (b"no image", r"^photo 1 must be a readable image; got: cannot identify image file\b[^<]*$"),
        (pages(), r"^photo 1 must be a still image of one page; got 2 frames$"),
        (bomb(), r"^photo 1 must (have at most 250,000,000 pixels; got 20000x20000|be a readable image; got: .*)$"),
        (encoded(Image.new("L", (50, 50)))[:-30], r"^photo 1 must be a readable image; got: "),
    ],
)
def test_what_is_no_image_is_refused(file: bytes, message: str, tmp_path: Path) -> None:
    for frame in (MNIST, None):
        with pytest.raises(InputError, match=message):
            prepare(file, SHAPE, frame=frame, name="photo 1")
    path = tmp_path / "x.png"
    path.write_bytes(file)
    with pytest.raises(InputError, match=rf"^{path} must "):
        prepare(path, SHAPE, frame=MNIST)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.png must be a readable image; got: .*No such file"):
        prepare(tmp_path / "nothing.png", SHAPE, frame=None)


@pytest.mark.usefixtures("unchecked")
def test_shapes_and_choices_that_do_not_exist_are_refused() -> None:
    file = encoded(Image.new("L", (9, 9)))
    with pytest.raises(InputError, match=r"^network must take images of 1 or 3 channels to read files; it takes 2$"):
        prepare(file, (2, 9, 9), frame=None)
    with pytest.raises(InputError, match=r"^invert must be auto, yes or no; got 'maybe'$"):
        prepare(file, (1, 9, 9), frame=None, invert="maybe")  # type: ignore[arg-type]


# what it is for


def test_drawn_digits_come_back_from_their_photographs() -> None:
    """Each photograph is nearest to the prepared original of its own digit, among all ten."""
    originals = digits(list(range(10)))
    plain = [
        prepare(encoded(Image.fromarray(255 - digit.numpy()).resize((280, 280))), SHAPE, frame=MNIST).image
        for digit in originals
    ]
    found = []
    for number, file in enumerate(files(originals.repeat(2, 1, 1), 6)):
        image = prepare(file, SHAPE, frame=MNIST).image
        nearest = int(np.argmax([similarity(image, other) for other in plain]))
        found.append(nearest == number % 10)
    assert sum(found) >= 19


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"no MNIST in {REAL}")
def test_photographs_of_mnist_digits_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(REAL))
    test = data.load("mnist").test
    photos = [prepare(file, SHAPE, frame=MNIST) for file in files(test.images[:50, 0], 7)]
    with torch.inference_mode():
        scores = pretrained.load("capsnet-mnist")(to_float(torch.stack([photo.image for photo in photos]))).scores
    assert int((scores.argmax(1) == test.labels[:50]).sum()) >= 48
