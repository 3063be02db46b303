"""Figures and tables of each class: its error, and what it is taken for; of many classes those that are worst."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from capsnet.evaluation import Predictions
from capsnet.plots.style import ORDER, new, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MOST", "class_errors", "class_rows", "confused", "confusion"]

MOST = 30
"""Classes that a figure shows, a row each; of more the worst ones, so that no figure grows with their number."""


def confused(found: Predictions) -> list[tuple[int, int, int]]:
    """Pairs of classes that were confused: true class, predicted class, number of images, the most frequent first.

    Of images of one object each. Nothing here grows with the square of the number of classes.
    """
    classes = found.scores.shape[-1]
    pairs, counts = torch.unique((found.labels * classes + found.predictions)[found.wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [(int(pairs[k]) // classes, int(pairs[k]) % classes, int(counts[k])) for k in order]


def class_rows(found: Predictions, classes: tuple[str, ...]) -> Iterator[tuple[str, int, int, str]]:
    """Of each class its name, images, wrong ones, and what it was most often taken for, empty where for nothing."""
    wrong, totals = _counts(found)
    first: dict[int, str] = {}
    for true, said, count in confused(found):
        first.setdefault(true, f"{classes[said]} ({count})")
    for k, name in enumerate(classes):
        yield name, int(totals[k]), int(wrong[k]), first.get(k, "")


def _counts(found: Predictions) -> tuple[Tensor, Tensor]:
    """Wrong images and all images of each class."""
    classes = found.scores.shape[-1]
    return found.labels[found.wrong].bincount(minlength=classes), found.labels.bincount(minlength=classes)


@styled
def class_errors(found: Predictions, classes: tuple[str, ...]) -> "Figure":
    """Error of each class, with the number of wrong images and of all; of more than `MOST` classes the worst ones."""
    wrong, totals = _counts(found)
    share = 100 * wrong / totals.clamp(min=1)
    order = torch.arange(len(classes))
    if len(classes) > MOST:
        order = share.argsort(descending=True, stable=True)[:MOST]
    percent = share[order].tolist()
    figure, axes = _bars(percent, [short(classes[k], 24) for k in order.tolist()])
    for k, (value, bad, total) in enumerate(zip(percent, wrong[order].tolist(), totals[order].tolist(), strict=True)):
        axes.annotate(f"{bad} of {total:,}", (value, k), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.25 * max([*percent, 0.01]))
    axes.set_xlabel("wrong images of the class, %")
    which = "each class" if len(classes) <= MOST else f"the {MOST} worst of {len(classes):,} classes"
    axes.set_title(f"Error of {which}, n = {len(found.labels):,} images")
    return figure


@styled
def confusion(found: Predictions, classes: tuple[str, ...]) -> "Figure":
    """True class in rows, predicted class in columns; shade is the share of the row, off the diagonal.

    Of more than `MOST` classes the pairs that were confused most often, a bar each.
    """
    if len(classes) > MOST:
        return _most_confused(found, classes)
    matrix = found.confusion
    share = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy().copy()
    np.fill_diagonal(share, 0)
    size = max(4.2, 0.42 * len(classes) + 1.6)
    figure = new(size + 0.9, size)
    axes = figure.subplots()
    heat = axes.imshow(100 * share, cmap="Greys", vmin=0, vmax=max(0.1, 100 * float(share.max())))
    figure.colorbar(heat, ax=axes, shrink=0.8).set_label("share of the true class, %; diagonal left out")
    names = [short(name, 12) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(len(names)), names)
    if len(classes) <= 20:
        darkest = float(share.max()) or 1.0
        for row, column in matrix.nonzero().tolist():
            colour = "white" if share[row, column] > 0.55 * darkest else "black"
            weight = "bold" if row == column else "normal"
            count = str(int(matrix[row, column]))
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color=colour, weight=weight)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"Confusion: number of images, n = {len(found.labels):,}")
    return figure


def _bars(values: Sequence[int | float], labels: Sequence[str]) -> "tuple[Figure, Axes]":
    """Horizontal bars from top to bottom."""
    figure = new(6.4, 0.28 * max(len(values), 1) + 1.1)
    axes = figure.subplots()
    axes.barh(range(len(values)), values, color=ORDER[0])
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    return figure, axes


def _most_confused(found: Predictions, classes: tuple[str, ...]) -> "Figure":
    pairs, wrong = confused(found), int(found.wrong.sum())
    shown = pairs[:MOST]
    told = [f"{short(classes[true], 20)}, taken for {short(classes[said], 20)}" for true, said, _ in shown]
    figure, axes = _bars([count for *_, count in shown], told)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("images")
    axes.set_title(
        f"The {len(shown)} most confused of {len(pairs):,} pairs of {len(classes):,} classes, "
        f"{wrong:,} wrong images of n = {len(found.labels):,}"
    )
    return figure
