"""One image file as pixels: bit depths, transparency, formats, giants; and what is told of it."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capsnet.data import image_file
from capsnet.data.image_file import SUFFIXES, Header, formats, read_header, read_image
from capsnet.errors import InputError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(bits: int) -> Image.Image:
    """All shades from black to white of so many bits, 64 x 64."""
    values = np.linspace(0, 2**bits - 1, 64 * 64).round().reshape(64, 64)
    return Image.fromarray(values.astype(np.uint16 if bits <= 16 else np.int32))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16, 24])
def test_integers_of_any_depth_keep_their_range(bits: int, kind: str) -> None:
    if bits > 16 and kind == "PNG":
        pytest.skip("PNG holds 16 bits at most")
    content = encoded(ramp(bits), kind)
    pixels, notes = read_image(content)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels.ravel() - np.linspace(0, 255, 64 * 64)).max() <= 0.7
    assert notes == (() if bits == 16 else (f"integers read as {bits} bits",))
    assert read_header(content) == Header(64, 64, False, bits)


def test_a_depth_that_is_given_holds_for_dark_and_light_images() -> None:
    dark = Image.fromarray(np.full((4, 4), 511, np.uint16))
    assert read_image(encoded(dark), bits=12).pixels[0, 0] == round(255 * 511 / 4095)
    assert read_image(encoded(dark), bits=16).pixels[0, 0] == 2
    light = read_image(encoded(ramp(14)), bits=12)
    assert light.pixels.max() == 255
    assert light.notes == ("integers up to 16,383 cut off at 12 bits",)


def test_a_portable_map_tells_its_own_range() -> None:
    content = b"P5\n2 1\n4095\n" + (2048).to_bytes(2, "big") + (4095).to_bytes(2, "big")
    assert read_image(content).pixels.tolist() == [[128, 255]]


def test_a_tag_of_the_depth_is_believed() -> None:
    content = encoded(Image.fromarray(np.full((4, 4), 100, np.uint16)), "TIFF", tiffinfo={281: 4095})
    assert read_image(content).pixels[0, 0] == round(255 * 100 / 4095)


def test_colours_that_8_bits_would_flatten_are_refused() -> None:
    def deep(most: int) -> bytes:
        cv = np.linspace(0, most, 16 * 16 * 3).astype(">u2").reshape(16, 16, 3)
        rows = b"".join(b"\0" + row.tobytes() for row in cv)
        import struct
        import zlib

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

    assert read_image(deep(65535)).pixels.max() == 255
    assert read_image(deep(65535)).notes == ()
    noted = ("16-bit colours no lighter than 63 of 255: scale them up if they have fewer bits",)
    assert read_image(deep(16383)).notes == noted
    with pytest.raises(InputError, match=r"^image must be a readable image; got: colours that use the lowest of"):
        read_image(deep(1023))


@pytest.mark.parametrize(
    ("ink", "ground", "noted"),
    [((0, 0, 0), 255, False), ((200, 30, 40), 255, False), ((255, 255, 255), 0, True), ((250, 255, 240), 0, True)],
)
def test_what_is_drawn_on_nothing_is_seen(ink: tuple[int, ...], ground: int, noted: bool) -> None:
    image = Image.new("RGBA", (9, 9), (*ink, 0))
    image.paste((*ink, 255), (2, 2, 7, 7))
    pixels, notes = read_image(encoded(image))
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
    assert pixels[0, 0].tolist() == [ground] * 3
    assert pixels[4, 4].tolist() == list(ink)
    assert notes == (("transparent, laid over black",) if noted else ())


def test_a_light_image_without_transparency_is_left_alone() -> None:
    assert read_image(encoded(Image.new("RGBA", (4, 4), (255, 255, 255, 255)))).notes == ()


@pytest.mark.parametrize("name", ["x.jfif", "x.JPE", "x.avif", "x.heic", "x.HEIF", "x.webp", "x.tiff"])
def test_formats_that_people_have(name: str, tmp_path: Path) -> None:
    kind = {"jfif": "JPEG", "jpe": "JPEG", "heic": "HEIF"}.get(name[2:].lower(), name[2:].upper())
    if kind not in formats():
        pytest.skip(f"{kind} is not there: an extra, or an older Pillow")
    Image.new("RGB", (32, 24), (250, 10, 10)).save(tmp_path / name, kind)
    pixels = read_image(tmp_path / name).pixels
    assert pixels.shape == (24, 32, 3)
    assert np.abs(pixels[12, 16].astype(int) - (250, 10, 10)).max() < 12
    assert Path(name).suffix.lower() in SUFFIXES


@pytest.mark.parametrize(
    ("brand", "message"),
    [
        (b"heic", r"HEIF, for which pillow-heif is needed \(pip install 'capsnet\[heif\]'\)"),
        (b"avif", "AVIF, which this build of Pillow does not read"),
    ],
)
def test_a_format_that_is_missing_is_told(brand: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "formats", lambda: ("PNG", "JPEG"))
    with pytest.raises(InputError, match=f"^image must be a readable image; got: {message}$"):
        read_image(b"\0\0\0\x1cftyp" + brand + bytes(20))


@pytest.mark.slow
def test_a_photograph_of_200_megapixels_is_read(tmp_path: Path) -> None:
    Image.new("L", (20_000, 10_000), 128).save(tmp_path / "x.jpg", quality=1)
    Image.new("L", (20_000, 10_000), 128).save(tmp_path / "x.png", compress_level=1)
    for name in ("x.jpg", "x.png"):
        assert read_image(tmp_path / name, size=(32, 64)).pixels.shape == (32, 64)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_pillows_limit_is_as_it_was_after_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    start, content = threading.Barrier(4), encoded(Image.new("L", (9, 9)))

    def read(_: int) -> int:
        start.wait()
        return max(int(read_image(content).pixels.shape[0]) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [9] * 4
    assert Image.MAX_IMAGE_PIXELS == 7


def test_a_header_knows_what_the_pixels_will_be() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_header(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)) == Header(30, 20, True, None)
    assert read_header(encoded(Image.new("L", (30, 20)))) == Header(20, 30, False, None)
    assert read_header(encoded(Image.new("P", (30, 20)))).colour
