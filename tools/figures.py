"""Figures of the experiments, beside their records: overlapping digits drawn apart, errors by a transformation's size.

python -m tools.figures multimnist --budget cpu
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from capsnet import plots
from capsnet.checkpoints import pretrained, run_directory
from capsnet.data import Split
from capsnet.errors import InputError
from capsnet.experiments import records
from capsnet.experiments.plan import BUDGETS, Experiment, experiment
from capsnet.experiments.records import Record, fingerprint
from capsnet.experiments.reproduce import RECORDS, RUNS, place_of, split_of
from capsnet.report import reconstruction_figure

__all__ = ["draw", "main"]

LOOKED_AT = 400  # test images among which right and wrong ones to draw are looked for


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
