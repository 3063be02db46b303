"""Figures of what capsules hold: reconstructions, perturbations, couplings, pose factors."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from capsnet.analysis.pose_probe import PoseExplained
from capsnet.analysis.reconstruction import Perturbation, Reconstruction, Separation
from capsnet.analysis.routing_trace import Evidence
from capsnet.errors import InputError
from capsnet.files import visible
from capsnet.plots.style import ORDER, new, picture, pixels, short, show_sheet, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["couplings", "perturbations", "pose_explained", "reconstructions", "separations", "sweep"]

FIRST, SECOND = (1.0, 0.62, 0.10), (0.12, 0.47, 1.0)
"""Colours of two objects drawn over each other, of different lightness; both together are nearly white."""
PER_ROW = 10  # images side by side, at most


@styled
def reconstructions(found: Reconstruction, classes: tuple[str, ...]) -> "Figure":
    """Images above what the decoder makes of them, right and wrong ones apart (Figure 3 of the paper).

    Wrong ones are also drawn as their true class. `found` holds at least one image.
    """
    right = {"input": found.images, "reconstruction": found.of_prediction}
    wrong = {"input": found.images, "from predicted": found.of_prediction, "from true class": found.of_label}
    blocks = []
    for title, chosen, rows in (("Right", ~found.wrong, right), ("Wrong", found.wrong, wrong)):
        index = chosen.nonzero().flatten()
        for start in range(0, len(index), PER_ROW):
            some = index[start : start + PER_ROW]
            labels = [
                _verdict(int(found.labels[k]), int(found.predictions[k]), classes, float(found.lengths[k].amax()))
                for k in some
            ]
            heading = f"{title} ({len(index)} shown)" if start == 0 else ""
            blocks.append((heading, {name: images[some] for name, images in rows.items()}, labels))
    figure = _sheets(blocks, height=0.95 * sum(len(rows) + 0.75 for _, rows, _ in blocks) + 0.5)
    figure.suptitle("Inputs above their reconstructions: true class, and length of the longest capsule")
    return figure


def _sheets(blocks: Sequence[tuple[str, dict[str, Tensor], list[str]]], *, height: float) -> "Figure":
    """Sheets one below the other: of each its heading, its rows of images by name, and the labels of its columns."""
    columns = max(len(labels) for *_, labels in blocks)
    figure = new(1.0 * columns + 1.2, height)
    heights = [len(rows) + 0.75 for _, rows, _ in blocks]
    grid = figure.subplots(len(blocks), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (heading, rows, labels) in zip(grid, blocks, strict=True):
        images = torch.stack(list(rows.values()))
        blank = images.new_ones(len(rows), columns - len(labels), *images.shape[2:])
        show_sheet(axes, torch.cat([images, blank], 1), rows=list(rows), columns=labels)
        axes.set_title(heading, loc="left", weight="bold")
    return figure


def _verdict(label: int, prediction: int, classes: tuple[str, ...], length: float) -> str:
    if label == prediction:
        return f"{short(classes[label])}\n{length:.2f}"
    return f"{short(classes[label])}, not\n{short(classes[prediction])} {length:.2f}"


@styled
def separations(parts: Mapping[str, tuple[Separation, Tensor]], classes: tuple[str, ...]) -> "Figure":
    """Two overlapping objects, each drawn alone from its capsule, in two colours (Figure 5 of the paper).

    `parts` are, by their headings, images with the classes that are truly there, `[batch, 2]`. The name of a drawn
    class that is not there gets a star.
    """
    blocks = []
    for heading, (found, labels) in parts.items():
        if not len(labels):
            continue
        first, second = (_tinted(found.drawn[:, k], colour) for k, colour in enumerate((FIRST, SECOND)))
        grey = found.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        rows = {"input": grey, "both drawn": (first + second).clamp(max=1), "first": first, "second": second}
        told = [_pair_told(*one, classes) for one in zip(labels.tolist(), found.classes.tolist(), strict=True)]
        blocks.append((heading, rows, told))
    figure = _sheets(blocks, height=4.3 * len(blocks) + 0.4)
    figure.suptitle("Overlapping objects drawn apart, under each input what is there (T) and what is drawn (D)")
    return figure


def _tinted(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """Grey of images `[n, channels, height, width]` as a colour."""
    return images.mean(1, keepdim=True) * torch.tensor(colour)[:, None, None]


def _pair_told(labels: list[int], drawn: list[int], classes: tuple[str, ...]) -> str:
    true = ", ".join(short(classes[k], 9) for k in labels)
    return f"T {true}\nD " + ", ".join(short(classes[k], 9) + "*" * (k not in labels) for k in drawn)


@styled
def perturbations(found: Perturbation, classes: tuple[str, ...]) -> "Figure":
    """Each dimension in a row, each change in a column, unchanged in the middle; a sheet for each image (Figure 4)."""
    count, dim, steps = found.images.shape[:3]
    across = min(count, 2)
    down = -(-count // across)
    figure = new((0.52 * steps + 0.9) * across, (0.52 * dim + 0.8) * down)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    values = [f"{delta:+.2f}" if delta else "0" for delta in found.deltas.tolist()]
    for axes, images, k in zip(grid, found.images, found.classes.tolist(), strict=False):
        show_sheet(axes, images, rows=[f"{d + 1}" for d in range(dim)], columns=values)
        axes.set_ylabel("dimension of the class capsule")
        axes.set_title(f"{short(classes[k], 30)}: change of the dimension")
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure


def sweep(found: Perturbation, *, zoom: int = 3) -> bytes:
    """An animated GIF, as bytes: all dimensions of each image swing through their range and back at the same time.

    Each image is a row, each dimension a column; a pixel becomes `zoom` x `zoom`.
    """
    steps = found.images.shape[2]
    forth = list(range(steps // 2, steps)) + list(range(steps - 2, -1, -1)) + list(range(1, steps // 2))
    frames = [picture(found.images[:, :, step], zoom=zoom) for step in forth]
    content = io.BytesIO()
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:], duration=80, loop=0, optimize=True)
    return content.getvalue()


@styled
def couplings(
    found: Evidence,
    images: Float[Tensor, "batch channels height width"],
    labels: Tensor,
    classes: tuple[str, ...],
    *,
    steps: Sequence[str] = (),
    show: int = 6,
) -> "Figure":
    """Where the winning capsules' evidence comes from, and how sure routing is, by its iterations.

    `found` is of `images`, whose intensities are in [0, 1]. So many as `show` are drawn, under their true class where
    it is not the winning one; the curves are of all. `steps` names the iterations, see `CapsuleNetwork.routing_steps`;
    default: their numbers.

    Raises:
        InputError: another number of steps than of iterations.
    """
    iterations, count = found.entropy.shape
    if steps and len(steps) != iterations:
        raise InputError(f"steps must be {iterations}, as many as the routing has; got {len(steps)}")
    shown, names = min(show, count), tuple(steps) or tuple(str(t + 1) for t in range(iterations))
    winners = found.pose[-1].norm(dim=-1).argmax(-1)
    every = torch.arange(count)
    maps, support = found.maps[:, every, winners], found.support[:, every, winners]
    ratio = maps / maps[:1].where(maps[:1] > 0, torch.nan)  # no capsule sees some pixels at the right and bottom

    figure = new(2.3 * iterations + 4.6, 1.35 * shown + 1.4)
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[2.3 * iterations, 4.2]))
    grid = left.subplots(shown, 2 * iterations, squeeze=False)
    seen = ratio[:, :shown].nan_to_num(1.0)
    low, high = float(seen.min()), max(float(seen.max()), 1 + 1e-6)
    top = float(support[:, :shown].max())
    for axes in grid.flat:
        axes.set_axis_off()
    for k in range(shown):
        grid[k, 0].imshow(pixels(images[k]), cmap="gray", vmin=0, vmax=1)
        truth, answer = classes[int(labels[k])], classes[int(winners[k])]
        told = short(answer) if truth == answer else f"{short(answer)}\n({short(truth)})"
        grid[k, 0].set_title(told, fontsize="small")
        for t in range(iterations):
            if t:
                coupled = grid[k, t].imshow(ratio[t, k].numpy(), cmap="cividis", vmin=low, vmax=high)
            supported = grid[k, iterations + t].imshow(support[t, k].numpy(), cmap="cividis", vmin=0, vmax=top)
    numbered = iterations > 1 and names[0] == "1"
    apart = " " if numbered else "\n"  # names are longer than numbers
    for t in range(iterations):
        if t:
            grid[0, t].set_title(f"coupling,{apart}{names[t]}")
        grid[0, iterations + t].set_title(f"support,{apart}{names[t]}" if iterations > 1 else "support")
    if iterations > 1:
        label = "coupling x activation\n(1: uniform couplings)"
        _scale(left, coupled, list(grid[:, 1:iterations].flat), label)
    _scale(left, supported, list(grid[:, iterations:].flat), "support: what votes add to |s|,\nper pixel")
    upper, lower = right.subplots(2, 1, sharex=True)
    _entropy(upper, found, len(classes))
    _agreement(lower, found, winners)
    lower.set_xlabel("routing iteration" if numbered else "")
    lower.set_xticks(range(1, iterations + 1), names)
    title = "The winning class capsule (true class in brackets where it is another)"
    figure.suptitle(title + ", by routing iteration" * numbered)
    return figure


def _scale(figure: Any, shown: Any, axes: "list[Axes]", label: str) -> None:
    """A bar of colours below `axes`, with so few numbers that they lie apart."""
    bar = figure.colorbar(shown, ax=axes, shrink=0.9, location="bottom", aspect=30)
    bar.ax.locator_params(nbins=3)
    bar.set_label(label)


def _entropy(axes: "Axes", found: Evidence, classes: int) -> None:
    iterations, count = found.entropy.shape
    most = float(np.log2(classes))
    mean = found.entropy.mean(1)
    axes.plot(range(1, iterations + 1), mean.numpy(), "o-", color=ORDER[0])
    axes.axhline(most, color=ORDER[2], linestyle=":", label=f"uniform: {most:.4f} bits")
    for t, value in enumerate(mean.tolist()):
        axes.annotate(f"{value:.4f}", (t + 1, value), (0, -12), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(x=0.2, y=0.35)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("bits")
    axes.legend()
    axes.set_title(f"Entropy of couplings, n = {count} images")


def _agreement(axes: "Axes", found: Evidence, winners: Tensor) -> None:
    iterations, count, classes = found.agreement.shape
    won = torch.nn.functional.one_hot(winners, classes).bool()
    steps = range(1, iterations + 1)
    mean = found.agreement[:, won].mean(1)
    axes.plot(steps, mean.numpy(), "o-", color=ORDER[0], label="winning capsule")
    if classes > 1:
        axes.plot(steps, found.agreement[:, ~won].mean(1).numpy(), "s--", color=ORDER[1], label="all others")
    axes.set_ylabel("cosine")
    axes.legend()
    axes.set_title(f"Agreement of votes, n = {count} images")


@styled
def pose_explained(found: dict[str, PoseExplained]) -> "Figure":
    """Held-out R2 of each pose factor for each network by name, and for each dimension of those with at most 32."""
    narrow = {name: one for name, one in found.items() if one.dim <= 32}
    first = next(iter(found.values()))
    names = first.factors
    told = [name.replace("_", " ") for name in names]
    figure = new(5.2 + 5.0 * len(narrow), 0.42 * len(names) + 2.0)
    grid = figure.subplots(1, 1 + len(narrow), squeeze=False, width_ratios=[1, *([1.1] * len(narrow))])[0]
    bars, height = grid[0], 0.8 / len(found)
    for k, (name, one) in enumerate(found.items()):
        place = np.arange(len(names)) + (k - (len(found) - 1) / 2) * height
        bars.barh(
            place,
            [one.mean(factor) for factor in names],
            height,
            xerr=[one.spread(factor) for factor in names],
            color=ORDER[k % len(ORDER)],
            ecolor="black",
            capsize=2,
            label=f"{visible(name)}: {one.dim} dimensions",
        )
    bars.set_yticks(range(len(names)), told)
    bars.invert_yaxis()
    bars.set_xlim(min(0.0, *(one.mean(factor) for one in found.values() for factor in names)), 1)
    bars.set_xlabel("R2, mean over classes; line: standard deviation")
    bars.set_title(f"Linear, held out: n = {first.test_images:,} test images")
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    for axes, (name, one) in zip(grid[1:], narrow.items(), strict=True):
        best = np.array(one.by_dimension).clip(min=0).mean(1)
        heat = axes.imshow(best, cmap="cividis", vmin=0, vmax=max(0.5, float(best.max())), aspect="auto")
        axes.set_yticks(range(len(names)), told)
        axes.set_xticks(range(one.dim), [str(d + 1) for d in range(one.dim)])
        axes.set_xlabel("dimension of the class capsule")
        axes.set_title(f"{visible(name)}: R2 of each dimension alone, mean over classes")
        figure.colorbar(heat, ax=axes)
    return figure
