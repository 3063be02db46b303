"""Figures of the experiments: overlapping digits drawn apart, and errors by the size of a transformation."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from capsnet import plots, runs
from capsnet.data import Split
from capsnet.evaluation import predict_split
from capsnet.experiments import records
from capsnet.experiments.plan import Experiment
from capsnet.experiments.records import Record, fingerprint
from capsnet.experiments.reproduce import place_of, split_of
from capsnet.report import drawn_apart

__all__ = ["draw"]

LOOKED_AT = 400  # test images among which right and wrong ones to draw are looked for


def draw(
    experiment: Experiment, budget: str, folder: Path, runs_folder: Path, *, data_dir: str | None = None
) -> Iterator[Path]:
    """Draw what there is to draw of an experiment, beside its records.

    Args:
        experiment: with records.
        budget: of the records.
        folder: of the records and figures.
        runs_folder: of the run directories, for figures that need a network.
        data_dir: where downloaded files are.

    Returns:
        The files, as each is written.
    """
    path = records.path_of(folder, experiment.name, budget).with_suffix(".png")
    command = f"capsnet reproduce {experiment.name} --budget {budget}"
    if experiment.name == "multimnist":
        row = experiment.rows[0]
        config = experiment.config(row, budget, 0)
        place = place_of(config, runs_folder)
        if not runs.Run(place).result_path.exists():
            return
        network = runs.load(place)
        split = split_of(config, experiment.metric, data_dir).take(torch.arange(LOOKED_AT))
        parts = drawn_apart(network, split, predict_split(network, split))
        yield plots.save(plots.separations(parts, network.classes), path, command=command)
    if experiment.name == "affnist":
        found = [one for one in records.read(folder, experiment.name, budget) if one.seed == 0]
        configs = {row.title: experiment.config(row, budget, 0) for row in experiment.rows}
        ours = {title: _of(found, fingerprint(config)) for title, config in configs.items()}
        wrong = {title: one for title, one in ours.items() if one is not None}
        if not wrong:
            return
        split = split_of(next(iter(configs.values())), experiment.metric, data_dir)
        masks = {title: _mask(one, experiment.metric, split) for title, one in wrong.items()}
        yield plots.save(plots.errors_by_factor(masks, split.factors), path, command=command)


def _of(found: list[Record], wanted: str) -> Record | None:
    return next((one for one in found if one.fingerprint == wanted), None)


def _mask(record: Record, data: str, split: Split) -> Tensor:
    """Which images of the split are wrong, `bool [n]`."""
    mask = torch.zeros(len(split), dtype=torch.bool)
    mask[record.wrong_images[data]] = True
    return mask
