"""What all figures share: how they look, sheets of small images, and files that say how they were made."""

import io
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from capsnet.errors import InputError
from capsnet.files import visible, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure
    from PIL import Image

__all__ = ["FORMATS", "ORDER", "new", "picture", "pixels", "rendered", "save", "sheet", "short", "show_sheet", "styled"]

FORMATS = ("png", "svg", "pdf")
ORDER = ("#0b3c6f", "#d98e04", "#7a7a7a", "#5aa9a3")
"""Colours of lines in order; their lightness differs, and lines differ in style as well."""
STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "figure.titlesize": 11,
    "font.size": 9,
    "image.cmap": "gray",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 120,
    "svg.fonttype": "none",
    "svg.hashsalt": "capsnet",
    "text.parse_math": False,  # names of classes are no formulas
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
P = ParamSpec("P")
R = TypeVar("R")
_GAP = 2  # pixels between the images of a sheet
_LONGEST = 540  # inches: matplotlib draws fewer than 2^16 pixels a side, at 120 an inch
_LARGEST = 10_000  # square inches: half a gigabyte while it is drawn


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a function in our style, and leave that of the process alone."""

    @wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> R:
        import matplotlib as mpl

        with mpl.rc_context(cast(Any, STYLE)):
            return draw(*arguments, **options)

    return drawn


def new(width: int | float, height: int | float) -> "Figure":
    """An empty figure, `width` x `height` inches.

    Raises:
        InputError: it is too large to be drawn.
    """
    from matplotlib.figure import Figure as Figure

    if max(width, height) > _LONGEST or width * height > _LARGEST:
        raise InputError(
            f"figure must be at most {_LONGEST} inches a side and {_LARGEST:,} square inches; "
            f"got {width:.0f} x {height:.0f} (draw fewer images)"
        )
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path, *, format: str = "png", command: str = "") -> Path:
    """Write a figure, whole or not at all, in one of `FORMATS`, whatever the name of `path` ends with; returns `path`.

    Its folder is made. `command`, which makes the figure again, is kept in the file's metadata.

    Raises:
        InputError: an unknown format, or the file cannot be written.
    """
    content = rendered(figure, format=format, command=command)
    write_atomically(path, lambda place: place.write_bytes(content))
    return path


@styled
def rendered(figure: "Figure", *, format: str = "png", command: str = "") -> bytes:
    """A figure's file as bytes; a figure that is made again gives the same bytes.

    Raises:
        InputError: an unknown format.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    command = visible(command)
    metadata: dict[str, dict[str, str | None]] = {
        "png": {"Software": "capsnet", "Description": command},
        "svg": {"Creator": "capsnet", "Date": None, "Description": command},
        "pdf": {"Creator": "capsnet", "CreationDate": None, "Subject": command},
    }
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # class names may be in any script
        figure.savefig(content, format=format, metadata=metadata[format])
    return content.getvalue()


def pixels(image: Float[Tensor, "channels height width"]) -> np.ndarray:
    """An image as matplotlib takes it: `[height, width, 3]` in colour, else the first channel, `[height, width]`."""
    array: np.ndarray = image.clamp(0, 1).permute(1, 2, 0).numpy(force=True)
    return array if array.shape[-1] == 3 else array[..., 0]


def sheet(images: Float[Tensor, "rows columns channels height width"]) -> Tensor:
    """Images in rows and columns as one picture, white between them: `[channels, height, width]`."""
    padded = torch.nn.functional.pad(images, (0, _GAP, 0, _GAP), value=1.0)
    rows, columns, channels, height, width = padded.shape
    joined = padded.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return joined[:, :-_GAP, :-_GAP]


def show_sheet(
    axes: "Axes",
    images: Float[Tensor, "rows columns channels height width"],
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> None:
    """Draw a sheet with a label for each row at its left and for each column above it."""
    height, width = images.shape[-2:]
    axes.imshow(pixels(sheet(images)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labeltop=bool(columns), labelbottom=False)
    axes.set_yticks([k * (height + _GAP) + height / 2 for k in range(len(rows))], rows)
    axes.set_xticks([k * (width + _GAP) + width / 2 for k in range(len(columns))], columns)


def picture(images: Float[Tensor, "rows columns channels height width"], *, zoom: int = 1) -> "Image.Image":
    """Images in rows and columns as one picture without labels; a pixel becomes `zoom` x `zoom`."""
    from PIL import Image

    array = (pixels(sheet(images)) * 255).round().astype(np.uint8)
    drawn = Image.fromarray(array)
    return drawn.resize((drawn.width * zoom, drawn.height * zoom), Image.Resampling.NEAREST)


def short(name: str, most: int = 14) -> str:
    """A name as a figure shows it: visible, and in the little room above an image."""
    name = visible(name)
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
