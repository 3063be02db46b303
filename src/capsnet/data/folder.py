"""One's own images as a data set: a folder per class, below train/ and test/ or split here by seed.

What becomes of an image: it is turned as its EXIF tag says; transparency is laid over white, as image viewers
show it; palettes and CMYK become RGB; 16 bits per pixel are scaled to 8; then it is resized. A file that is
not an image is refused by name, never skipped, so that no example is lost unnoticed; only hidden files and
what operating systems leave behind (Thumbs.db, desktop.ini, __MACOSX) are passed over, and beside the class
folders anything that is no image.
"""

import io
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from capsnet.data.dataset import Dataset, Split, check_memory
from capsnet.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "folder", "image_files", "read_image"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")
_VALIDATION = ("validation", "valid", "val")
_MAX_PIXELS = 100_000_000  # of one file: beyond any camera in common use, below what fills the memory
_MAX_THREADS = 8  # so many images are open at full size at once


def folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    channels: int | None = None,
    test_fraction: float = 1 / 6,
    seed: int = 0,
) -> Dataset:
    """Read a directory of images, a sub-directory per class; classes in natural order, "2" before "10".

    Args:
        path: holds train/ and test/ (and may hold validation/, valid/ or val/) with the same class folders in
            each; or the class folders themselves, which are then split at random, class by class.
        image_size: height and width in pixels to resize to, without regard to the proportions,
            Lanczos-filtered; None keeps the size, which must then be the same for all images and may be other
            than square.
        channels: 1 for grey (luma of ITU-R 601), 3 for colour; None for 1 if every image is grey, else 3.
        test_fraction: part of each class that becomes test, in (0, 1), at least one image; only where there
            is no test/.
        seed: chooses the test images; the same seed always chooses the same.

    Raises:
        InputError: the directory is not of this form, a class is empty, train and test differ in their
            classes, or a file is not a readable still image; the message names it.

    Example:
        >>> folder("flowers", image_size=32).image_shape  # (3, 32, 32)
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"path of an image folder must be an existing directory; got {path}")
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size must be at least 1 pixel; got {image_size}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels must be 1 (grey) or 3 (colour); got {channels}")
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction must be in (0, 1); got {test_fraction}")
    given = _splits(root)
    if given is None:
        classes = _classes(root)
        files = _divide(classes, test_fraction, seed)
    else:
        by_split = {name: _classes(directory) for name, directory in given.items()}
        classes = by_split["train"]
        for name, found in by_split.items():
            for one in found.keys() ^ classes.keys():
                has, lacks = (name, "train") if one in found else ("train", name)
                raise InputError(f"{root} must have the same classes in {has} and {lacks}; {lacks} lacks {one}")
        files = {name: [by_split[name][one] for one in classes] for name in by_split}
    images = _images([file for split in files.values() for paths in split for file in paths], image_size, channels)
    splits = {}
    for name, paths_by_class in files.items():
        counts = torch.tensor([len(paths) for paths in paths_by_class])
        labels = torch.arange(len(classes)).repeat_interleave(counts)
        splits[name] = Split(images[: len(labels)], labels)
        images = images[len(labels) :]
    return Dataset(str(path), tuple(classes), splits["train"], splits["test"], splits.get("validation"))


def image_files(directory: Path) -> list[Path]:
    """All image files in a directory and below, told by their names, in natural order.

    Raises:
        InputError: a directory that cannot be read.
    """
    directories, files = _listing(directory)
    found = [file for file in files if file.suffix.lower() in _SUFFIXES]
    return found + [file for inner in directories for file in image_files(inner)]


def _splits(root: Path) -> dict[str, Path] | None:
    """The directories of the splits, None where `root` holds the classes themselves."""
    directories, _ = _listing(root)
    by_name = {directory.name.lower(): directory for directory in directories}
    validation = [name for name in _VALIDATION if name in by_name]
    pair = [name for name in ("train", "test") if name in by_name]
    if len(pair) == 1 and not _listing(by_name[pair[0]])[0]:
        return None  # a class that happens to be called train or test
    if not pair:
        return None
    if len(pair) == 1:
        raise InputError(f"{root} must hold both train/ and test/, or the classes only; got {pair[0]}/ alone")
    others = [name for name in by_name if name not in ("train", "test", *validation[:1])]
    if others:
        raise InputError(f"{root} must hold train/, test/ and at most one validation/ only; got {others[0]}/ as well")
    splits = {"train": by_name["train"], "test": by_name["test"]}
    if validation:
        splits["validation"] = by_name[validation[0]]
    return splits


def _classes(directory: Path) -> dict[str, list[Path]]:
    """The images of each class, in natural order."""
    directories, loose = _listing(directory)
    for file in loose:
        if file.suffix.lower() in _SUFFIXES:
            raise InputError(f"{file} must be in the folder of its class; got an image beside the class folders")
    if len(directories) < 2:
        raise InputError(f"{directory} must hold a folder for each of at least 2 classes; got {len(directories)}")
    classes = {}
    for one in directories:
        inner, files = _listing(one)
        if inner:
            raise InputError(f"class folder {one} must hold images only; got the folder {inner[0].name}/")
        for file in files:
            if file.suffix.lower() not in _SUFFIXES:
                raise InputError(f"class folder {one} must hold images only ({' '.join(_SUFFIXES)}); got {file.name}")
        if not files:
            raise InputError(f"class folder {one} must hold at least one image; got none")
        classes[one.name] = files
    return classes


def _listing(directory: Path) -> tuple[list[Path], list[Path]]:
    """Directories and files in `directory`, without clutter, in natural order."""
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise InputError(f"{directory} must be a readable directory; got: {error.strerror}") from error
    entries = [one for one in entries if not one.name.startswith(".") and one.name.lower() not in _CLUTTER]
    entries.sort(key=lambda entry: _natural(entry.name))
    return [entry for entry in entries if entry.is_dir()], [entry for entry in entries if not entry.is_dir()]


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sorting key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part.lower()) for part in parts], name


def _divide(classes: dict[str, list[Path]], test_fraction: float, seed: int) -> dict[str, list[list[Path]]]:
    """Files per class for train and test, drawn at random from each class."""
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, list[list[Path]]] = {"train": [], "test": []}
    for name, paths in classes.items():
        if len(paths) < 2:
            raise InputError(f"class {name} must have at least 2 images, one to train and one to test; got 1")
        count = min(max(round(test_fraction * len(paths)), 1), len(paths) - 1)
        order = torch.randperm(len(paths), generator=generator).tolist()
        files["test"].append([paths[index] for index in sorted(order[:count])])
        files["train"].append([paths[index] for index in sorted(order[count:])])
    return files


def _images(paths: Sequence[Path], image_size: int | None, channels: int | None) -> torch.Tensor:
    """The images of all files, `uint8 [N, C, H, W]`; as many are open at full size as there are threads."""
    arrays: list[np.ndarray] = []
    # The filters of warnings belong to the process, not to a thread: set once, around all threads. What
    # Pillow warns of (odd EXIF, many pixels, transparency) is handled or refused below.
    size = None if image_size is None else (image_size, image_size)
    read = partial(read_image, size=size, channels=channels)
    with warnings.catch_warnings(), ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        warnings.simplefilter("ignore")
        try:
            for path, array in zip(paths, pool.map(read, paths), strict=True):
                if arrays and array.shape[:2] != arrays[0].shape[:2]:
                    raise InputError(
                        "images must all have one size (or pass --image-size to resize them); "
                        f"got {_size(arrays[0])} in {paths[0]} and {_size(array)} in {path}"
                    )
                arrays.append(array)
                if len(arrays) == 1:
                    check_memory(len(paths), array.shape)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    colours = max(3 if array.ndim == 3 else 1 for array in arrays) if channels is None else channels
    images = torch.empty(len(arrays), colours, *arrays[0].shape[:2], dtype=torch.uint8)
    for index, array in enumerate(arrays):
        image = torch.from_numpy(array)
        images[index] = image if array.ndim == 2 else image.permute(2, 0, 1)
    return images


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def read_image(
    source: Path | bytes,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    least: int | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Read one image, see the head of this file for what becomes of it.

    Pillow warns of odd EXIF and of many pixels, which are handled or refused here: the caller may want to
    silence it (filters of warnings belong to the process, so that it is not done here, in a thread).

    Args:
        source: a file, or what it holds.
        size: height and width in pixels to resize to, Lanczos-filtered; None keeps the image's own.
        channels: 1 for grey (luma of ITU-R 601); None for grey or colour as the image is.
        least: pixels that each side needs; a JPEG file that is far larger may be decoded at a fraction of
            its size. None decodes it in full unless `size` is given.
        name: what errors call the image; default the path.

    Returns:
        `uint8 [H, W]` if the image is grey, else `[H, W, 3]`.

    Raises:
        InputError: not a readable still image of one page, or too large.
    """
    from PIL import Image, ImageOps

    name = name or ("image" if isinstance(source, bytes) else str(source))
    if size is not None:
        least = 2 * max(size)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(f"{name} must have at most {_MAX_PIXELS} pixels; got {image.width}x{image.height}")
            # MPO is what some cameras call a JPEG with a preview inside: the first picture is the photograph.
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":
                raise InputError(f"{name} must be a still image of one page; got {frames} frames")
            if least is not None:
                image.draft(None, (least, least))
            plain = _plain(ImageOps.exif_transpose(image))
        if channels == 1:
            plain = plain.convert("L")
        if size is not None:
            plain = plain.resize(size[::-1], Image.Resampling.LANCZOS)
        array = np.array(plain)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders answer damaged files with many types
        empty = not source if isinstance(source, bytes) else source.is_file() and source.stat().st_size == 0
        reason = str(error) if isinstance(source, Path) else re.sub(" <_io.BytesIO object.*?>", "", str(error))
        raise InputError(f"{name} must be a readable image; got: {'an empty file' if empty else reason}") from error
    if array.ndim == 3 and (array == array[..., :1]).all():
        return array[..., 0].copy()
    return array


def _plain(image: "Image.Image") -> "Image.Image":
    """The image in mode L or RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values outside 16 bits, {values.min()} to {values.max()}")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, not 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
