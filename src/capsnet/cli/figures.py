"""The verb `figures`."""

from dataclasses import dataclass
from typing import Literal

from capsnet.cli.parsing import parse
from capsnet.cli.printing import show, show_json
from capsnet.cli.subject import Look, Subject
from capsnet.errors import InputError

__all__ = ["run"]

Name = Literal["curves", "class-errors", "confusion", "gallery", "lengths", "reliability"]


@dataclass(frozen=True)
class _Figures(Look):
    """Draw how a training went and how good its network is.

    curves (losses and errors by epoch), class-errors, confusion, gallery (all wrong images), lengths (histogram of the
    winning capsules), reliability (are lengths probabilities?).

    Examples:
      capsnet figures runs/mnist
      capsnet figures runs/mnist --only gallery confusion --format pdf
    """

    only: tuple[Name, ...] = ()
    """These figures; default: all."""


def run(arguments: list[str]) -> int:
    """Draw the figures, print where."""
    command = parse(_Figures, arguments, prog="capsnet figures")
    if command.out is not None and len(command.only) != 1:
        raise InputError(f"--out must be given for one figure, with --only; got {len(command.only) or 'all'} figures")
    from capsnet import runs
    from capsnet.evaluation import calibration, predict_split
    from capsnet.report import result_figures

    subject = Subject(command.model)
    dataset = subject.dataset(command.data, command.data_dir)
    split = subject.split(dataset, command.split)
    found = predict_split(subject.network, split)
    makers = result_figures(found, split, subject.network.classes, runs.Run(subject.folder).metrics())
    missing = [name for name in command.only if name not in makers]
    if missing:
        raise InputError(f"{missing[0]} must be of a run directory with metrics.csv; {command.model} has none")
    paths = [
        subject.draw(command, name, make(), ["figures", *arguments])
        for name, make in makers.items()
        if not command.only or name in command.only
    ]
    if command.json:
        calibrated = calibration(found.winning, ~found.wrong)
        numbers = {
            "data": dataset.name,
            "split": command.split,
            "images": len(split),
            "wrong": int(found.wrong.sum()),
            "confusion": found.confusion.tolist(),
            "winning_score_mean": float(found.winning.mean()),
            "expected_calibration_error": calibrated.error,
            "figures": [str(path) for path in paths],
        }
        show_json(numbers)
        return 0
    show(*map(str, paths))
    return 0
