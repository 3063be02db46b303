"""The verb `attack`."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from capsnet.cli.parsing import BatchSize, Images, Range, Seed, parse
from capsnet.cli.printing import say, show, show_json, show_table
from capsnet.cli.subject import Subject
from capsnet.config import Device
from capsnet.errors import InputError

__all__ = ["run"]


@dataclass(frozen=True)
class _Attack:
    """Attack networks with their own gradients: how often that fools them, and how often it is noticed.

    Every pixel may change by epsilon (intensities are in [0, 1]). Success: of the images recognised before, the share
    that is not recognised any more. Flagged: the reconstruction error is above the threshold stored with the weights.

    Examples:
      capsnet attack capsnet-mnist
      capsnet attack runs/mnist runs/baseline --attacks pgd --epsilons 0.05 0.1 --steps 40 --out attack.json
    """

    models: Positional[tuple[str, ...]]
    """Run directories, folders with weights, or names of weights that come with the package."""
    attacks: tuple[Literal["fgsm", "pgd"], ...] = ("fgsm", "pgd")
    """fgsm: one step; pgd: many, from a random start."""
    epsilons: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    """Largest change of a pixel, whose intensities are in [0, 1]."""
    steps: Annotated[int, Range(1, 10_000)] = 20
    """Of pgd."""
    step_size: Annotated[float | None, Range(0, 1, above=True)] = None
    """Of pgd, change of a pixel in a step; default: 2.5 epsilon / steps."""
    margins: Literal["open", "own"] = "open"
    """Of the margin loss that is ascended: own has no gradient for what is recognised beyond its margins."""
    images: Images = 1000
    """Test images: the first ones, fewer if there are no more."""
    data: str | None = None
    """Another data set or folder, read as the network's own was."""
    data_dir: str | None = None
    """Where downloaded files are."""
    seed: Seed = 0
    """Of the random start."""
    batch_size: BatchSize = 128
    """Images at a time; only memory and speed depend on it."""
    device: Device = "auto"
    """auto: a CUDA GPU if there is one; mps (untested) on a Mac."""
    json: bool = False
    """Print everything as JSON."""
    out: str | None = None
    """Write everything to this JSON file."""
    overwrite: bool = False
    """Replace --out."""


def run(arguments: list[str]) -> int:
    """Attack networks, print tables or JSON, write a record."""
    command = parse(_Attack, arguments, prog="capsnet attack")
    _check(command)
    import torch

    from capsnet import machine, runs

    subjects = [Subject(model) for model in command.models]
    device = machine.resolve_device(replace(subjects[0].trained(command.data), device=command.device, devices=1))
    record: dict[str, Any] = {
        "command": shlex.join(["capsnet", "attack", *arguments]),
        "environment": runs.environment(torch.device(device)),
        "seed": command.seed,
        "epsilons": list(command.epsilons),
        "steps": command.steps,
        "step_size": command.step_size,
        "margins": command.margins,
        "models": [],
    }
    for subject in subjects:
        record["models"].append(_attacked(subject, command, torch.device(device)))
        if not command.json:
            _print(record["models"][-1])
    if command.json:
        show_json(record)
    if command.out:
        text = json.dumps(record, indent=2)
        runs.write_atomically(Path(command.out), lambda path: path.write_text(text + "\n", encoding="utf-8"))
        say(f"record: {command.out}")
    return 0


def _check(command: _Attack) -> None:
    for name, values in (("MODEL", command.models), ("--attacks", command.attacks), ("--epsilons", command.epsilons)):
        if not values:
            raise InputError(f"{name} must be given at least once; got none")
    if command.out and Path(command.out).exists() and (Path(command.out).is_dir() or not command.overwrite):
        raise InputError(f"--out must be a new file, or be given with --overwrite; got {command.out}")


def _attacked(subject: Subject, command: _Attack, device: Any) -> dict[str, Any]:
    """The rates of one network, as they are recorded."""
    from capsnet.analysis.attack import attack_rates
    from capsnet.data.dataset import to_float
    from capsnet.evaluation import wilson_interval

    trained = subject.trained(command.data)
    dataset = subject.dataset(command.data, command.data_dir, held_out=False)
    split, threshold = dataset.test, subject.card.threshold
    images = to_float(split.images[: command.images]).to(device)
    labels = split.labels[: command.images].to(device)
    network = subject.network.to(device)
    rows = []
    for attack in command.attacks:
        for epsilon in command.epsilons:
            say(f"{subject.model}: {attack}, epsilon {epsilon:g}, {len(images):,} images")
            rates = attack_rates(
                network,
                images,
                labels,
                attack=attack,
                epsilon=epsilon,
                threshold=threshold,
                steps=command.steps,
                step_size=command.step_size,
                seed=command.seed,
                margins=command.margins,
                config=trained,
                batch_size=command.batch_size,
            )
            row = rates.to_dict()
            for name, part, whole in (
                ("success", rates.fooled, rates.right),
                ("flagged", rates.flagged, rates.images),
                ("flagged_fooled", rates.flagged_fooled, rates.fooled),
            ):
                row[f"{name}_interval"] = list(wilson_interval(part, whole)) if part is not None and whole else None
            rows.append(row)
    return {
        "model": subject.model,
        "name": network.config["name"],
        "data": dataset.name,
        "split": "test",
        "images": len(images),
        "threshold": None if threshold is None else threshold.to_dict(),
        "rates": rows,
    }


def _print(found: dict[str, Any]) -> None:
    threshold = found["threshold"]
    show(f"{found['model']}: first {found['images']:,} test images of {found['data']}")
    headings = ("attack", "epsilon", "fooled", "success %", "95 % interval", "wrong %", "flagged %", "of the fooled %")
    show_table(headings, [_cells(row) for row in found["rates"]])
    if threshold is not None:
        show(
            f"flagged: reconstruction error above {threshold['value']:.2f}, set for "
            f"{100 * threshold['false_alarm_rate']:g} % false alarms on {threshold['images']:,} "
            f"{threshold['split']} images"
        )


def _cells(row: dict[str, Any]) -> list[str]:
    interval = row["success_interval"]
    return [
        row["attack"],
        f"{row['epsilon']:g}",
        f"{row['fooled']:,} of {row['right']:,}",
        _percent(row["fooled"], row["right"]),
        "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
        _percent(row["wrong_after"], row["images"]),
        _percent(row["flagged"], row["images"]),
        _percent(row["flagged_fooled"], row["fooled"]),
    ]


def _percent(part: int | None, whole: int) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.1f}"
