"""Figures of the experiments, beside their records: digits drawn apart, errors by a transformation's size or by time.

python -m tools.figures multimnist --budget cpu
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capsnet import plots
from capsnet.checkpoints import pretrained, run_directory
from capsnet.data import Split, describe
from capsnet.errors import InputError
from capsnet.experiments import records
from capsnet.experiments.plan import BUDGETS, Experiment, available, experiment
from capsnet.experiments.records import Record, effective, fingerprint
from capsnet.experiments.reproduce import RECORDS, RUNS, place_of, split_of
from capsnet.experiments.tables import EPOCH, SHOWN, benchmark_of
from capsnet.plots.style import ORDER, new, styled
from capsnet.report import reconstruction_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "error_by_cost", "error_by_time", "main"]

LOOKED_AT = 400  # test images among which right and wrong ones to draw are looked for
CLAIMED = {"CapsNet-Keras, its own claim": ("CapsNet", 50, 0.34)}
"""Network, epochs and error in percent that others state: https://github.com/XifengGuo/CapsNet-Keras, whose validation
images are the test images."""
FAR = 5.0
"""Times the median, above which an error is far from the others."""
PLACES = [
    (side, right * reach, up * reach - 3)
    for reach in (1, 2, 4)
    for side, right, up in (
        *(("left", 5, 0), ("right", -5, 0), ("center", 0, 8), ("center", 0, -8)),
        *(("left", 5, 6), ("right", -5, 6), ("left", 5, -6), ("right", -5, -6)),
    )
]
"""Places of a name beside its point, nearest first: alignment, and points to the right and up."""
NEAR = 12
"""Points up to which a name stands by its point without a line."""


def draw(
    one: Experiment, budget: str, folder: Path, runs_folder: Path, *, data_dir: str | None = None
) -> Iterator[Path]:
    """Draw what there is to draw of an experiment, beside its records in `folder`; yields each file written.

    Figures that need a network find it in `runs_folder`.
    """
    path = records.path_of(folder, one.name, budget).with_suffix(".png")
    command = f"python -m tools.figures {one.name} --budget {budget}"
    if one.name == "multimnist":
        row = one.rows[0]
        config = one.config(row, budget, 0)
        place = place_of(config, runs_folder)
        if not run_directory.Run(place).result_path.exists():
            return
        network = pretrained.load(place)
        split = split_of(config, one.metric, data_dir).take(torch.arange(LOOKED_AT))
        yield plots.save(reconstruction_figure(network, split), path, command=command)
    if one.name == "affnist":
        found = {kept.fingerprint: kept for kept in records.read(folder, one.name, budget) if kept.seed == 0}
        configs = {row.title: one.config(row, budget, 0) for row in one.rows}
        ours = {title: found.get(fingerprint(config)) for title, config in configs.items()}
        if not any(ours.values()):
            return
        split = split_of(next(iter(configs.values())), one.metric, data_dir)
        masks = {title: _mask(kept, one.metric, split) for title, kept in ours.items() if kept}
        yield plots.save(plots.errors_by_factor(masks, split.factors), path, command=command)
    if (speed := benchmark_of(folder, one.name)).is_file():
        drawn = error_by_time if one.name == "cost" else error_by_cost
        yield plots.save(drawn(one, budget, folder, speed=speed), path, command=command)


@styled
def error_by_time(one: Experiment, budget: str, folder: Path, *, speed: Path) -> "Figure":
    """Error on the test images against minutes of one core, a curve for each network of the experiment `one`.

    A curve is of all records in `folder` that differ in epochs and seed only, of whatever experiment. Minutes are those
    of the training steps, at the speed that the benchmark of the record `speed` measured on one thread.
    """
    rates = _rates(speed)
    curves: dict[str, dict[int, dict[int | None, float]]] = {}
    found = [
        record
        for name in available()
        for kind in ("quick",) * (budget == "quick") or SHOWN
        for record in records.read(folder, name, kind)
        if experiment(name).split == "test" and experiment(name).metric == one.metric and not record.members
    ]
    minutes = defaultdict[str, list[float]](list)
    for row in one.rows:
        config = one.config(row, budget, 0)
        label, alike = row.title.partition(",")[0], _but_for_epochs(effective(config))
        errors = curves.setdefault(label, defaultdict(dict))
        for record in found:
            if _but_for_epochs(record.config) == alike:
                errors[record.epochs][record.seed] = record.error(one.metric)
        if row.key not in rates:
            raise InputError(f"{speed} must have a variant of each row; got none of {row.key}")
        minutes[label].append(EPOCH / rates[row.key] / 60)
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new(6.4, 3.8)
    axes = figure.add_subplot()
    for k, (label, errors) in enumerate(curves.items()):
        if not errors:
            continue
        epochs = sorted(errors)
        values = [list(errors[epoch].values()) for epoch in epochs]
        where, means = [fmean(minutes[label]) * epoch for epoch in epochs], [fmean(each) for each in values]
        spread = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        style = ("o-", "s--", "^:", "d-.")[k % 4]
        axes.errorbar(where, means, spread, fmt=style, color=ORDER[k % 4], label=label, markersize=4, capsize=2)
        for x, y, epoch in zip(where, means, epochs, strict=True):
            axes.annotate(f"{epoch}", (x, y), (4, 4), textcoords="offset points", fontsize=7, color=ORDER[k % 4])
    for label, (network, epoch, error) in CLAIMED.items():
        if network in minutes:
            axes.plot(fmean(minutes[network]) * epoch, error, "kx", markersize=6, label=label)
    paper = experiment("table1").rows[0].paper
    assert paper is not None
    axes.axhline(paper, color="k", linewidth=0.8, linestyle=":", label="Sabour et al. 2017, epochs unknown")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("minutes of one core; beside each point its epochs")
    axes.set_ylabel("test error on MNIST, %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend()
    return figure


@styled
def error_by_cost(one: Experiment, budget: str, folder: Path, *, speed: Path) -> "Figure":
    """Error on the test images against minutes of one core, a point for each row, a colour and mark for each network.

    Minutes are those of the training steps, at the speed that the benchmark of the record `speed` measured. An error of
    more than `FAR` times the median stands at the upper edge, with its number, so that the others lie apart.
    """
    rates, errors = _rates(speed), defaultdict[str, list[float]](list)
    for record in records.read(folder, one.name, budget):
        if record.row in rates and record.fingerprint == fingerprint(one.config(one.row(record.row), budget, 0)):
            errors[record.row].append(record.error(one.metric))
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new(8, 5.4)
    axes = figure.add_subplot()
    models = list(dict.fromkeys(one.config(row, budget, 0).model for row in one.rows))
    points = dict[str, tuple[float, float, str]]()
    far = FAR * median(map(fmean, errors.values())) if errors else 0.0
    for row in one.rows:
        if row.key not in errors:
            continue
        config, found = one.config(row, budget, 0), errors[row.key]
        images = (config.train_images or describe(config.data).train) * (config.epochs or 0)
        x, y, k = images / rates[row.key] / 60, fmean(found), models.index(config.model)
        spread = stdev(found) if len(found) > 1 else 0.0
        color = ORDER[k % len(ORDER)]
        mark = "os^Dv"[k // len(ORDER)]
        if y > far:
            axes.plot(x, far, mark, color=color, markersize=4, clip_on=False)
            points[f"{row.key}: {y:.0f} %"] = x, far, color
        else:
            axes.errorbar(x, y, spread, fmt=mark, color=color, markersize=4, capsize=2)
            points[row.key] = x, y, color
    axes.set_xlabel("minutes of one core")
    axes.set_ylabel(f"test error on {one.title.partition(',')[0]}, %")
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("log")
        axis.set_major_formatter("{x:g}")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    if any(y == far for _, y, _ in points.values()):
        axes.set_ylim(top=far)
    _label(axes, points)
    return figure


def _label(axes: Any, points: Mapping[str, tuple[float, float, str]]) -> None:
    """Write the name of each point beside it, where it lies on no other name and no point if there is such a place.

    A line leads to a name that is farther away.
    """
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    at = axes.transData.transform([point[:2] for point in points.values()])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    for name, (x, y, color) in points.items():
        text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=7, color=color)
        for side, right, up in PLACES:
            text.set_horizontalalignment(side)
            text.xyann = right, up
            box = text.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                break
        if max(abs(right), abs(up)) > NEAR:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0}
            axes.annotate("", (x, y), (right, up + 3), textcoords="offset points", arrowprops=line)
        taken.append(box)


def _but_for_epochs(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "epochs"}


def _rates(speed: Path) -> dict[str, float]:
    """Images a second of each row, in the record of a benchmark."""
    return {row["variant"]: row["images_per_second"] for row in json.loads(speed.read_text())["rows"]}


def _mask(record: Record, data: str, split: Split) -> Tensor:
    """Which images of the split are wrong, `bool [n]`."""
    mask = torch.zeros(len(split), dtype=torch.bool)
    mask[record.wrong_images[data]] = True
    return mask


def main(arguments: Sequence[str]) -> int:
    """Draw the figures of an experiment; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=str(__doc__).splitlines()[0])
    parser.add_argument("name", help="experiment, as of `capsnet reproduce`")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="of the records")
    parser.add_argument("--results", type=Path, default=RECORDS, help="folder of the records and figures")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the run directories")
    parser.add_argument("--data-dir", default=None, help="where downloaded files are")
    given = parser.parse_args(arguments)
    try:
        for path in draw(experiment(given.name), given.budget, given.results, given.runs, data_dir=given.data_dir):
            print(f"written: {path}")
    except InputError as error:
        print(f"tools.figures: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
