"""One image file as pixels: what becomes of rotation, transparency, palettes and bit depths, and what is refused.

An image is turned as its EXIF tag says. Transparency is laid over white, as image viewers show it, or over black where
white would hide what is drawn. Palettes and CMYK become RGB. Integers of more than 8 bits are scaled by the range they
use (see `read_image`), never by a constant that would flatten them. What was done beside that is noted.
"""

import importlib.metadata
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from capsnet.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "DEPTHS",
    "MAX_PIXELS",
    "SUFFIXES",
    "Header",
    "Picture",
    "Resize",
    "formats",
    "read_header",
    "read_image",
    "resized",
    "version",
]

Resize = Literal["pad", "crop", "squash"]
"""What becomes of an image's proportions, see `resized`."""
SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
"""Names by which an image is known among other files, in lower case."""
MAX_PIXELS = 250_000_000  # of one file: beyond the cameras there are, below what fills the memory
DEPTHS = (8, 10, 12, 14, 16, 24, 32)
"""Bits of the integers that cameras, scanners and microscopes write."""
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GIANT = 50_000_000  # pixels: one at a time is decoded of these, each 150 MB and more
_SEEN = 32  # of 255, mean difference from white at which what is drawn is seen on it
_GIANTS = threading.Lock()
_LIMIT = threading.Lock()


class Picture(NamedTuple):
    """An image that was read."""

    pixels: np.ndarray  # `uint8 [H, W]` if it is grey, else `[H, W, 3]`
    notes: tuple[str, ...] = ()  # what was done to it that its owner should know, or what is lost


class Header(NamedTuple):
    """What a file tells before it is decoded; height and width in pixels, turned as EXIF says."""

    height: int
    width: int
    colour: bool  # whether it may be in colour
    bits: int | None  # that hold its integers, if these have more than 8 (for which it is decoded); else None


def version() -> tuple[str, ...]:
    """Of what decodes: pixels that were kept of another are not used."""
    import PIL

    return importlib.metadata.version("capsnet"), PIL.__version__


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read, as Pillow calls them: AVIF where it has it, HEIF with the extra `heif`."""
    from PIL import Image

    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def read_header(source: Path | bytes) -> Header:
    """What is known of an image, in a file or in bytes, without its pixels.

    Raises:
        InputError: not a still image of one page in a known format, or too large.
    """
    with _opened(source) as image:
        height, width = image.height, image.width
        if image.getexif().get(0x0112) in (5, 6, 7, 8):  # turned by a quarter
            height, width = width, height
        bits = _bits(image) if image.mode.startswith("I") else None
        return Header(height, width, image.mode not in ("1", "L", "LA", "La") and not image.mode.startswith("I"), bits)


def read_image(
    source: Path | bytes,
    *,
    size: tuple[int, int] | None = None,
    resize: Resize = "squash",
    keep: tuple[int, ...] | None = None,
    channels: int | None = None,
    least: int | None = None,
    bits: int | None = None,
    name: str | None = None,
    most: int | None = None,
) -> Picture:
    """Read one image, see the head of this file for what becomes of it.

    Args:
        source: a file, or what it holds.
        size: height and width in pixels to resize to; None keeps the image's own.
        resize: what becomes of its proportions, see `resized`.
        keep: another height and width that an image keeps which has them.
        channels: 1 for grey (luma of ITU-R 601); None for grey or colour as the image is.
        least: pixels that each side needs; a JPEG file that is far larger may be decoded at a fraction of its size.
            None decodes it in full unless `size` is given.
        bits: of integers of more than 8 bits; default: those that the file's tags tell, else the fewest of `DEPTHS`
            that hold all its values.
        name: what errors call the image; default the path.
        most: pixels that the file may have; default `MAX_PIXELS`.

    Raises:
        InputError: not a readable still image of one page, or too large.
    """
    from PIL import ImageOps

    least = 2 * max(size) if size is not None else least
    with _opened(source, name, most) as image:
        if least is not None:
            image.draft(None, (least, least))
        giant = image.width * image.height > _GIANT
        with _GIANTS if giant else threading.Lock():
            if image.mode.startswith("I"):
                bits = bits or _bits(image)
            # Whether Pillow takes the upper 8 of 16 bits of each colour: known until it is loaded.
            deep = image.mode == "RGB" and any("16" in str(tile[-1]) for tile in getattr(image, "tile", ()))
            plain, notes = _plain(ImageOps.exif_transpose(image), bits, deep=deep)
            if channels == 1:
                plain = plain.convert("L")
            if size is not None and plain.size[::-1] not in (size, keep):
                plain = resized(plain, size, resize)
            pixels = np.array(plain)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0].copy()
    return Picture(pixels, notes)


def resized(image: "Image.Image", size: tuple[int, int], resize: Resize) -> "Image.Image":
    """An image in mode L or RGB at `size`, height and width in pixels, Lanczos-filtered.

    pad: whole and in proportion, in the middle, with the median colour of its edge around it. crop: in proportion, its
    middle. squash: whole, whatever its proportions.
    """
    from PIL import Image, ImageOps

    height, width = size
    if resize == "squash":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if resize == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    scale = min(width / image.width, height / image.height)
    sides = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    whole = image.resize(sides, Image.Resampling.LANCZOS)
    if sides == (width, height):
        return whole
    pixels = np.asarray(whole)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0).astype(int)
    padded = Image.new(image.mode, (width, height), tuple(ground.tolist()) if ground.ndim else int(ground))
    padded.paste(whole, ((width - sides[0]) // 2, (height - sides[1]) // 2))
    return padded


@contextmanager
def _opened(source: Path | bytes, name: str | None = None, most: int | None = None) -> Iterator["Image.Image"]:
    """An open image that may be decoded; whatever goes wrong with it is an InputError."""
    from PIL import Image, UnidentifiedImageError

    most = most or MAX_PIXELS
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with (
            _quiet(),
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as one,
        ):
            if one.width * one.height > most:
                raise InputError(f"{name} must have at most {most:,} pixels; got {one.width}x{one.height}")
            # MPO is what some cameras call a JPEG with a preview inside: the first picture is the photograph.
            frames = getattr(one, "n_frames", 1)
            if frames > 1 and one.format != "MPO":
                raise InputError(f"{name} must be a still image of one page; got {frames} frames")
            yield one
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} must be a readable image; got: {_unknown(source, str(error))}") from error
    except Exception as error:  # Pillow's decoders answer damaged files with many types
        raise InputError(f"{name} must be a readable image; got: {_shortened(str(error))}") from error


def _unknown(source: Path | bytes, reason: str) -> str:
    """What a file is that is in no known format."""
    head = source if isinstance(source, bytes) else source.read_bytes()
    if not head:
        return "an empty file"
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"mif1", b"msf1", b"heim", b"heis"):
        return "HEIF, for which pillow-heif is needed (pip install 'capsnet[heif]')"
    if brand == b"avif":
        return "AVIF, which this build of Pillow does not read"
    return _shortened(reason)


def _shortened(reason: str) -> str:
    return re.sub(" <_io.BytesIO object.*?>", "", reason)


_readers = 0
_before: int | None = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's own limit of pixels is off, which belongs to the process: while any image is read, and no longer."""
    from PIL import Image

    global _readers, _before
    with _LIMIT:
        if _readers == 0:
            _before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _LIMIT:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS = _before


def _plain(image: "Image.Image", bits: int | None, *, deep: bool) -> tuple["Image.Image", tuple[str, ...]]:
    """The image in mode L or RGB, and what is to be noted; of `deep` colours Pillow takes the upper 8 of 16 bits."""
    if bits is not None and image.mode.startswith("I"):
        return _scaled(image, bits)
    if image.mode == "F":
        raise ValueError("floating-point pixels, not integers")
    if image.has_transparency_data:
        return _on_ground(image.convert("RGBA"))
    plain = image.convert("L" if image.mode in ("1", "L") else "RGB")
    most = int(np.asarray(plain).max()) if deep else 255
    if 0 < most < 16:
        raise ValueError("colours that use the lowest of their 16 bits only, which are lost in 8; scale them up first")
    return plain, (f"16-bit colours no lighter than {most} of 255: scale them up if they have fewer bits",) * (
        most < 128
    )


def _values(image: "Image.Image") -> np.ndarray:
    values = np.array(image).astype(np.int64)
    if values.min() < 0:
        raise ValueError(f"integers from 0 on; got {values.min()}")
    return values


def _bits(image: "Image.Image") -> int:
    """Bits of integers of more than 8: those that the tags tell, or the fewest that hold the values."""
    tags = getattr(image, "tag_v2", {})
    tag = 281 if 281 in tags else 258  # MaxSampleValue, BitsPerSample
    told = int(np.ravel(tags.get(tag, 0))[0])
    told = told.bit_length() if tag == 281 else told
    if 8 < told < 32 and told != 16:
        return told
    if image.format == "PPM":
        return 16  # Pillow scales them as the file's header tells
    largest = int(_values(image).max())
    return next((bits for bits in DEPTHS if largest < 2**bits), DEPTHS[-1])


def _scaled(image: "Image.Image", bits: int) -> tuple["Image.Image", tuple[str, ...]]:
    """Integers of more than 8 bits as 8."""
    from PIL import Image

    values, white = _values(image), 2**bits - 1
    notes = () if bits == 16 else (f"integers read as {bits} bits",)
    if values.max() > white:
        notes = (f"integers up to {values.max():,} cut off at {bits} bits",)
    return Image.fromarray(((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8)), notes


def _on_ground(image: "Image.Image") -> tuple["Image.Image", tuple[str, ...]]:
    """A transparent image on white; on black where nothing of it would be seen on white."""
    from PIL import Image

    pixels = np.asarray(image)
    opacity = pixels[..., 3].astype(np.float32)
    total = float(opacity.sum())
    from_white = 255.0 - pixels[..., :3].min(-1)
    dark = total == 0 or float((from_white * opacity).sum()) / total >= _SEEN or opacity.min() == 255
    ground = Image.new("RGBA", image.size, "white" if dark else "black")
    return Image.alpha_composite(ground, image).convert("RGB"), () if dark else ("transparent, laid over black",)
