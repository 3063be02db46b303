"""The verb `reconstruct`."""

from dataclasses import dataclass
from typing import Annotated

from capsnet.cli.parsing import Range, parse
from capsnet.cli.printing import show, show_json
from capsnet.cli.subject import Look, Subject
from capsnet.errors import InputError

__all__ = ["run"]


@dataclass(frozen=True)
class _Reconstruct(Look):
    """Draw images beside what the decoder makes of them: right and wrong ones apart.

    For a wrong one also what the capsule of the true class describes, as in the paper's Figure 3. Where two objects
    overlap, each is drawn alone, in two colours, as in its Figure 5.

    Examples:
      capsnet reconstruct runs/mnist
      capsnet reconstruct capsnet-mnist --right 10 --wrong 30 --format svg --out wrong.svg
    """

    right: Annotated[int, Range(0, 1_000)] = 20
    """Right images to draw, at most: the first ones of the split."""
    wrong: Annotated[int, Range(0, 1_000)] = 20
    """Wrong images to draw, at most: the first ones of the split."""


def run(arguments: list[str]) -> int:
    """Draw reconstructions, print where."""
    command = parse(_Reconstruct, arguments, prog="capsnet reconstruct")
    if command.right + command.wrong == 0:
        raise InputError("--right and --wrong must not both be 0; got 0 and 0")
    import torch

    from capsnet import plots
    from capsnet.analysis.drawing import decoder_of, reconstruct
    from capsnet.data.dataset import to_float
    from capsnet.evaluation import predict_split
    from capsnet.report import drawn_apart

    subject = Subject(command.model, several=True)
    network, _ = decoder_of(subject.network)
    dataset = subject.dataset(command.data, command.data_dir, any_will_do=True)
    split = subject.split(dataset, command.split)
    found = predict_split(network, split)
    wrong = found.wrong.nonzero().flatten()
    index = torch.cat([(~found.wrong).nonzero().flatten()[: command.right], wrong[: command.wrong]])
    if not len(index):
        raise InputError(f"data set {dataset.name} must have wrong images to draw with --right 0; all are right")
    some = split.take(index)
    if network.objects > 1:
        parts = drawn_apart(network, some, predict_split(network, some), count=max(command.right, command.wrong))
        figure = plots.separations(parts, network.classes)
    else:
        figure = plots.reconstructions(reconstruct(network, to_float(some.images), some.labels), network.classes)
    path = subject.draw(command, "reconstructions", figure, ["reconstruct", *arguments])
    errors, kinds = found.reconstruction_errors, {"right": ~found.wrong, "wrong": found.wrong}
    means = {} if errors is None else {f"reconstruction_error_{name}": _mean(errors[of]) for name, of in kinds.items()}
    numbers = {
        "data": dataset.name,
        "split": command.split,
        "images": len(split),
        "wrong": len(wrong),
        **means,
        "figure": str(path),
    }
    if command.json:
        show_json(numbers)
        return 0
    show(f"{dataset.name} {command.split}: {len(wrong):,} of {len(split):,} images wrong")
    for name, mean in means.items():
        kind = name.removeprefix("reconstruction_error_")
        what = f"summed squared error of the reconstruction, mean of the {kind} images"
        show(f"{what}: {mean:.2f}" if mean else f"{what}: -")
    show(f"figure: {path}")
    return 0


def _mean(values: "torch.Tensor") -> float | None:  # type: ignore[name-defined]
    return float(values.mean()) if len(values) else None
