"""The verb `factors`."""

import shlex
from dataclasses import dataclass

from capsnet.cli.parsing import parse
from capsnet.cli.printing import show, show_json
from capsnet.cli.subject import Look, Subject

__all__ = ["run"]


@dataclass(frozen=True)
class _Factors(Look):
    """How much of each pose factor (slant, rotation, scale, width, x, y) the last layer explains.

    Linear regression class by class, from the class capsule's vector or, without capsules, from the last hidden layer;
    fitted on the training images, judged by R2 on the test images. The data must know the pose of its images, as
    strokes does.

    Examples:
      capsnet factors runs/strokes-capsnet-seed0
      capsnet factors runs/strokes-capsnet-seed0 --against runs/strokes-baseline-seed0 --json
    """

    against: tuple[str, ...] = ()
    """Other networks, beside the first."""


def run(arguments: list[str]) -> int:
    """Draw R2 of pose factors, print the table."""
    command = parse(_Factors, arguments, prog="capsnet factors")
    import torch

    from capsnet import plots, runs
    from capsnet.analysis.factors import pose_explained

    subject = Subject(command.model)
    networks = {model: runs.load(model) for model in (command.model, *command.against)}
    dataset = subject.dataset(command.data, command.data_dir)
    for network in networks.values():
        network.check_images(dataset.test.images[:1].float())
    found = {}
    for model, network in networks.items():
        name = network.config["name"] if not command.against else f"{network.config['name']} ({model})"
        found[name] = pose_explained(network, subject.split(dataset, "train"), subject.split(dataset, command.split))
    plain = [name.split(" (")[0] for name in found]
    if len(set(plain)) == len(plain):
        found = dict(zip(plain, found.values(), strict=True))
    path = subject.draw(command, "factors", plots.factors(found), ["factors", *arguments])
    if command.json:
        numbers = {
            "command": shlex.join(["capsnet", "factors", *arguments]),
            "data": dataset.name,
            "networks": {name: one.to_dict() for name, one in found.items()},
            "figure": str(path),
            **runs.environment(torch.device("cpu")),
        }
        show_json(numbers)
        return 0
    first = next(iter(found.values()))
    show(f"held-out linear R2, mean over {len(first.classes)} classes +- standard deviation, n = {first.test_images:,}")
    show(f"{'':22}" + "".join(f"{f'{name} ({one.dim})':>24}" for name, one in found.items()))
    for factor in first.factors:
        cells = "".join(f"{one.mean(factor):>15.3f} +- {one.spread(factor):.3f}" for one in found.values())
        show(f"{factor.replace('_', ' '):22}{cells}")
    show(f"figure: {path}")
    return 0
