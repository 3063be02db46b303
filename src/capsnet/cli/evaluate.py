"""The verb `evaluate`."""

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from capsnet.cli.parsing import parse
from capsnet.config import Config
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
    """Run directory, or a folder with config.json and model.safetensors."""
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
    from capsnet import machine, runs, train
    from capsnet.evaluation import evaluate

    network = runs.load(command.run)
    run = runs.Run(command.run)
    if run.config_path.exists():
        trained = run.config()
    elif command.data is None:
        raise InputError(f"--data must be given for {command.run}, which does not say what it was trained on")
    else:
        channels, height, width = network.image_shape
        trained = Config(image_size=height if height == width else None, channels=channels)
    options = replace(
        trained,
        data=command.data or trained.data,
        data_dir=command.data_dir or trained.data_dir,
        validation=trained.validation if command.data is None or command.split == "validation" else 0,
        device=command.device,
        precision=command.precision or trained.precision,
        devices=1,
    )
    dataset = train.prepare_data(options)
    unnamed = network.classes == tuple(str(k) for k in range(len(dataset.classes)))
    if dataset.classes != network.classes and not unnamed:
        raise InputError(
            f"data set {dataset.name} must have the {len(network.classes)} classes of the network, "
            f"{_some(network.classes)}; got {len(dataset.classes)}, {_some(dataset.classes)}"
        )
    split = getattr(dataset, command.split)
    if split is None:
        raise InputError(f"data set {dataset.name} must have a validation split; the run trained on all images")
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


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


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
