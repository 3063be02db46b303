"""Figures of how a run went and how good its network is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from capsnet.data.dataset import Split, to_float
from capsnet.evaluation import Calibration, Predictions
from capsnet.evaluation.statistics import wilson_interval
from capsnet.files import visible
from capsnet.plots.style import ORDER, new, pixels, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves", "errors_by_factor", "gallery", "labelled", "lengths", "reliability"]


@styled
def curves(rows: Sequence[Mapping[str, Any]], *, kept_epoch: int | None = None) -> "Figure":
    """Losses and errors by epoch, rows of `metrics.csv`, of training and, where images were held out, of validation.

    A vertical line marks the epoch whose weights are kept, from 1, if it is given.
    """
    epochs = [row["epoch"] for row in rows]
    figure = new(10.0, 3.2)
    panels = (
        ("loss", "loss (weighted sum)", "Whole loss"),
        ("classification_loss", "loss", "Classification loss"),
        ("reconstruction_loss", "summed squared error an image", "Reconstruction loss"),
        ("error_percent", "wrong images, %", "Error"),
    )
    shown = [panel for panel in panels if any(row[f"train_{panel[0]}"] for row in rows)]
    for axes, (column, unit, title) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for kind, style, colour in (("train", "o-", ORDER[0]), ("validation", "s--", ORDER[1])):
            if f"{kind}_{column}" in rows[0]:
                values = [row[f"{kind}_{column}"] for row in rows]
                axes.plot(
                    epochs, values, style if len(rows) <= 40 else style[1:], color=colour, label=kind, markersize=3
                )
        if kept_epoch:
            axes.axvline(kept_epoch, color=ORDER[2], linestyle=":", label=f"kept: epoch {kept_epoch}")
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


@styled
def errors_by_factor(wrong: Mapping[str, Tensor], factors: Mapping[str, Tensor], *, bins: int = 8) -> "Figure":
    """Error of several networks against each true pose factor of the same images, with 95 % intervals.

    `wrong` says by network whether each image is wrong, `bool [n]`; `factors` are values `[n]` by name with unit, in
    `bins` of equal width. A factor that does not vary is left out.
    """
    varying = {name: values for name, values in factors.items() if float(values.max() - values.min()) > 0}
    across = min(3, len(varying))
    down = -(-len(varying) // across)
    figure = new(3.4 * across, 2.7 * down + 0.6)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, (name, values) in zip(grid, varying.items(), strict=False):
        low, high = float(values.min()), float(values.max())
        index = ((values - low) / (high - low) * bins).long().clamp(max=bins - 1)
        centres = [low + (k + 0.5) * (high - low) / bins for k in range(bins)]
        counts = index.bincount(minlength=bins).tolist()
        for k, (title, mask) in enumerate(wrong.items()):
            bad = index[mask].bincount(minlength=bins).tolist()
            kept = [(x, 100 * b / n, wilson_interval(b, n)) for x, b, n in zip(centres, bad, counts, strict=True) if n]
            where, middle = [x for x, _, _ in kept], [y for _, y, _ in kept]
            spread = [  # at 0 and 100 %, rounding may leave the middle outside
                [max(y - 100 * lower, 0.0) for _, y, (lower, _) in kept],
                [max(100 * upper - y, 0.0) for _, y, (_, upper) in kept],
            ]
            style = ("o-", "s--", "^:", "d-.")[k % 4]
            axes.errorbar(
                where, middle, spread, fmt=style, color=ORDER[k % 4], label=visible(title), markersize=3, capsize=2
            )
        axes.set_xlabel(name.replace("_", " "))
    for axes in grid[len(varying) :]:
        axes.set_axis_off()
    first = figure.axes[0]
    first.set_ylim(bottom=0)  # of all, which share it; before all were drawn it would cut the others off
    for axes in figure.axes[::across]:
        axes.set_ylabel("wrong images, %")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(wrong))
    count = len(next(iter(varying.values())))
    figure.suptitle(f"Error by true pose factor, {count:,} images; bars are 95 % intervals")
    return figure


@styled
def labelled(images: Float[Tensor, "n channels height width"], labels: Sequence[str]) -> "Figure":
    """Images, intensities in [0, 1], each with its class above it."""
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    figure = new(1.05 * columns + 0.2, 1.25 * rows)
    for each in (axes := figure.subplots(rows, columns, squeeze=False)).flat:
        each.set_axis_off()
    for each, image, label in zip(axes.flat, images, labels, strict=False):
        each.imshow(pixels(image), cmap="gray", vmin=0, vmax=1)
        each.set_title(short(label, 12), fontsize=7)
    return figure


@styled
def gallery(found: Predictions, split: Split, classes: tuple[str, ...], *, most: int = 100) -> "Figure":
    """Wrong images of a split, the surest first, at most `most`, with the two largest scores."""
    wrong = found.wrong.nonzero().flatten()
    shown = wrong[found.winning[wrong].argsort(descending=True)][:most]
    columns = min(10, max(len(shown), 4))
    rows = max(1, -(-len(shown) // columns))
    figure = new(1.05 * columns + 0.2, 1.5 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    for each, index in zip(axes.flat, shown.tolist(), strict=False):
        each.imshow(pixels(to_float(split.images[index])), cmap="gray", vmin=0, vmax=1)
        scores, order = (part[:2].tolist() for part in found.scores[index].sort(descending=True))
        lines = [f"{short(classes[k], 9)} {score:.2f}" for k, score in zip(order, scores, strict=True)]
        each.set_title("\n".join([f"true {short(classes[int(found.labels[index])], 9)}", *lines]), fontsize=7)
    told = f"All {len(wrong)}" if len(shown) == len(wrong) else f"The surest {len(shown)} of {len(wrong):,}"
    figure.suptitle(
        f"{told} wrong images of n = {len(found.labels):,}: true class, then the two largest scores"
        if len(wrong)
        else f"No image of n = {len(found.labels):,} is wrong"
    )
    return figure


@styled
def reliability(found: Calibration) -> "Figure":
    """Share of right predictions by winning score: on the diagonal, a score is the probability of being right."""
    figure = new(4.6, 4.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=ORDER[2], linestyle=":", label="score = accuracy")
    pairs = [(s, a) for s, a in zip(found.scores, found.accuracies, strict=True) if s is not None and a is not None]
    upper.plot([s for s, _ in pairs], [a for _, a in pairs], "o-", color=ORDER[0], label="this network")
    upper.set_ylabel("share of right predictions")
    upper.set_ylim(-0.02, 1.02)
    upper.legend()
    total = sum(found.counts)
    upper.set_title(f"Calibration, n = {total:,}; expected calibration error {found.error:.3f}")
    width = found.edges[1] - found.edges[0]
    lower.bar(found.edges[:-1], found.counts, width=0.9 * width, align="edge", color=ORDER[0])
    _count(lower)
    lower.set_xlabel("winning score (length of the longest capsule)")
    lower.set_xlim(0, 1)
    return figure


@styled
def lengths(found: Predictions) -> "Figure":
    """Histogram of the winning scores of right and of wrong images, and of the runners-up."""
    figure = new(6.0, 3.3)
    axes = figure.subplots()
    bins = np.linspace(0, 1, 41)
    second = found.scores.topk(min(2, found.scores.shape[-1])).values[:, -1]
    kinds = (
        (found.winning[~found.wrong], "winning, right", "-"),
        (found.winning[found.wrong], "winning, wrong", "--"),
        (second, "runner-up", ":"),
    )
    for (values, label, style), colour in zip(kinds, ORDER, strict=False):
        if len(values):
            counts = torch.histogram(values.double().clamp(0, 1), torch.from_numpy(bins)).hist
            named = f"{label}, n = {len(values):,}"
            axes.stairs(counts.numpy(), bins, color=colour, linestyle=style, linewidth=1.6, label=named)
    _count(axes)
    axes.set_xlabel("score (length of the class capsule)")
    axes.set_title("Lengths of the longest capsules")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _count(axes: "Axes") -> None:
    """Make the vertical axis one of numbers of images, logarithmic from below 1."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("images")
