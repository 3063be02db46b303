"""Figures. The only file that imports matplotlib, and only when it draws."""

import warnings
from pathlib import Path

import torch

from capsnet.data import Split
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.models import Network

__all__ = ["reconstructions"]


def reconstructions(network: Network, split: Split, path: Path, *, count: int = 20) -> Path:
    """Draw the first images of a split above their reconstructions from the longest capsule.

    Args:
        network: with a decoder, on the CPU.
        split: images and labels.
        path: of the PNG file; its folder is made. PNG is written whatever the name ends with.
        count: number of images, at most.

    Returns:
        `path`.

    Raises:
        InputError: the network has no decoder.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    images = to_float(split.images[:count])
    with torch.inference_mode():
        output = network(images)
    if output.reconstruction is None:
        raise InputError("network must have a decoder to draw reconstructions; this one was built without")
    predictions, labels = output.scores.argmax(-1).tolist(), split.labels[:count].tolist()

    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.1 * columns, 2.7 * rows + 0.6), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (image, drawn) in enumerate(zip(images, output.reconstruction, strict=True)):
        row, column = 2 * (k // columns), k % columns
        truth, answer = network.classes[labels[k]], network.classes[predictions[k]]
        for axis, pixels in zip(axes[row : row + 2, column], (image, drawn), strict=True):
            axis.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        right = truth == answer
        title = _short(truth) if right else f"{_short(truth)},\nnot {_short(answer)}"
        axes[row, column].set_title(title, fontsize=9, weight="normal" if right else "bold", parse_math=False)
    figure.suptitle("Test images (title: true class; bold: predicted wrongly) above their reconstructions", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"savefig.dpi": 110}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # class names may be in any script
        figure.savefig(path, format="png")
    return path


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}"
