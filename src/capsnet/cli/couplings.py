"""The verb `couplings`."""

import math
import shlex
from dataclasses import dataclass
from typing import Annotated

from capsnet.cli.parsing import Images, Range, parse
from capsnet.cli.printing import show, show_json
from capsnet.cli.subject import Look, Subject
from capsnet.errors import InputError

__all__ = ["run"]


@dataclass(frozen=True)
class _Couplings(Look):
    """Draw where each winning capsule's evidence comes from, by routing iteration.

    Maps on the image: coupling times activation of the primary capsules, beside that of uniform couplings; and what
    their votes add to the winner. Curves: entropy of the couplings, agreement of votes and outcome.

    Examples:
      capsnet couplings capsnet-mnist
      capsnet couplings runs/mnist --images 500 --show 8 --json
    """

    images: Images = 100
    """Images that the curves are the mean of: the first ones of the split."""
    show: Annotated[int, Range(1, 1_000)] = 6
    """Images that maps are drawn of."""
    image: tuple[str, ...] = ()
    """Image files of one's own in place of the data set's."""


def run(arguments: list[str]) -> int:
    """Draw coupling maps, print entropy and agreement."""
    command = parse(_Couplings, arguments, prog="capsnet couplings")
    if command.image and command.data:
        raise InputError("--data must not be given with --image, which takes its place; got both")
    import torch

    from capsnet import plots, runs
    from capsnet.analysis.couplings import Evidence, evidence, with_capsules
    from capsnet.data.dataset import to_float

    subject = Subject(command.model)
    network = with_capsules(subject.network)
    if command.image:
        inputs = subject.images(command.image)
        labels = network(inputs).scores.argmax(-1)
        name = ", ".join(command.image)
    else:
        dataset = subject.dataset(command.data, command.data_dir, any_will_do=True)
        split = subject.split(dataset, command.split)
        inputs, labels, name = to_float(split.images[: command.images]), split.labels[: command.images], dataset.name
    parts = [evidence(network, part) for part in torch.split(inputs, 16)]
    found = Evidence(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))
    figure = plots.couplings(found, inputs, labels, network.classes, show=command.show)
    path = subject.draw(command, "couplings", figure, ["couplings", *arguments])
    won = torch.nn.functional.one_hot(found.pose[-1].norm(dim=-1).argmax(-1), len(network.classes)).bool()
    uniform = math.log2(len(network.classes) + network.class_capsules.leaky)
    entropies, winners, others = (
        each.mean(1).tolist() for each in (found.entropy, found.agreement[:, won], found.agreement[:, ~won])
    )
    if command.json:
        numbers = {
            "command": shlex.join(["capsnet", "couplings", *arguments]),
            "data": name,
            "images": len(inputs),
            "entropy_bits": entropies,
            "entropy_bits_of_uniform": uniform,
            "agreement_winning": winners,
            "agreement_others": others,
            "coupling_winning_largest": found.couplings.transpose(2, 3)[:, won].amax((1, 2)).tolist(),
            "figure": str(path),
            **runs.environment(torch.device("cpu")),
        }
        show_json(numbers)
        return 0
    show(f"{name}: mean of {len(inputs)} images; uniform couplings have {uniform:.4f} bits")
    show("iteration  entropy, bits  agreement of the winner  of the others")
    for t, (entropy, winner, other) in enumerate(zip(entropies, winners, others, strict=True), 1):
        show(f"{t:9}  {entropy:13.4f}  {winner:23.4f}  {other:13.4f}")
    show(f"figure: {path}")
    return 0
