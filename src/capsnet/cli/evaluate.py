"""The verb `evaluate`."""

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from capsnet.cli.parsing import parse
from capsnet.cli.subject import Subject
from capsnet.errors import InputError

__all__ = ["run"]

if TYPE_CHECKING:
    from capsnet.evaluation import Evaluation


@dataclass(frozen=True)
class _Evaluate:
    """Error with its 95 % interval, per-class table, confusion matrix and losses of a trained network.

    Examples:
      capsnet evaluate runs/mnist
      capsnet evaluate runs/mnist --split train --json
    """

    run: Positional[str]
    """Run directory, folder with weights, or the name of weights that come with the package."""
    data: str | None = None
    """Another data set or folder with as many classes, read as the run's own was; images must be of the same shape."""
    data_dir: str | None = None
    """Where downloaded files are."""
    split: Literal["test", "validation", "train"] = "test"
    """Which part of the data set."""
    batch_size: int = 256
    """Images at a time; only memory and speed depend on it."""
    precision: Literal["auto", "32", "bf16"] | None = None
    """Of convolutions and decoder; default: that of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    json: bool = False
    """Print everything as JSON."""


def run(arguments: list[str]) -> int:
    """Evaluate a trained network, print tables or JSON."""
    command = parse(_Evaluate, arguments, prog="capsnet evaluate")
    if command.batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {command.batch_size}")
    from capsnet import machine
    from capsnet.evaluation import evaluate

    subject = Subject(command.run)
    network, trained = subject.network, subject.trained(command.data)
    held_out = command.data is None or command.split == "validation"
    dataset = subject.dataset(command.data, command.data_dir, held_out=held_out)
    split = subject.split(dataset, command.split)
    options = replace(trained, device=command.device, precision=command.precision or trained.precision, devices=1)
    device = machine.resolve_device(options)
    precision = machine.resolve_precision(options, device, network)
    result = evaluate(network.to(device), split, config=trained, batch_size=command.batch_size, precision=precision)
    if command.json:
        where = {"run": command.run, "data": dataset.name, "split": command.split, "precision": precision}
        print(json.dumps({**where, **result.to_dict()}, indent=2))
    else:
        print(f"{dataset.name} {command.split} {result.summary()}")
        print(_losses(result))
        _print_tables(result)
    return 0


def _losses(result: "Evaluation") -> str:
    return (
        f"loss {result.loss:.5f}: classification {result.classification_loss:.5f}, "
        f"reconstruction {result.reconstruction_loss:.2f} (summed squared error an image, unweighted)"
    )


def _print_tables(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table()
    for heading in ("class", "images", "wrong", "error %", "others taken for it"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in result.per_class():
        error = "-" if row["error_percent"] is None else f"{row['error_percent']:.2f}"
        table.add_row(row["class"], f"{row['images']:,}", str(row["wrong"]), error, str(row["taken_for_it"]))
    print("per class:")
    console.print(table)
    if len(result.classes) > 30:
        print(f"confusion matrix: {len(result.classes)} classes are too many to print; see --json")
        return
    print("confusion matrix, true class in rows and predicted class in columns:")
    matrix = Table()
    for heading in ("", *result.classes):
        matrix.add_column(heading, justify="right")
    for name, counts in zip(result.classes, result.confusion, strict=True):
        matrix.add_row(name, *(str(count) if count else "." for count in counts))
    console.print(matrix)
