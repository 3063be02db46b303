"""The verb `perturb`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from capsnet.cli.parsing import Range, parse
from capsnet.cli.printing import show, show_json
from capsnet.cli.subject import Look, Subject
from capsnet.errors import InputError

__all__ = ["run"]

MOST_SHEETS = 100  # in one figure


@dataclass(frozen=True)
class _Perturb(Look):
    """Change each dimension of a class capsule by itself and draw what the decoder makes of it.

    The paper's Figure 4: a row for each dimension, a column for each change, unchanged in the middle. The images are
    the first of each class that are predicted rightly, if there are any, or one's own.

    Examples:
      capsnet perturb capsnet-mnist --classes 4 7
      capsnet perturb runs/mnist --classes all --gif sweep.gif
      capsnet perturb capsnet-mnist --image my-seven.png --span 0.5 --steps 21
    """

    classes: tuple[str, ...] = ()
    """Names of the classes whose capsules are changed, or all; default: the first, or that of one's own image."""
    images: Annotated[int, Range(1, MOST_SHEETS)] = 1
    """Images of each class."""
    image: tuple[str, ...] = ()
    """Image files of one's own in place of the data set's."""
    span: Annotated[float, Range(0, 10, above=True)] = 0.25
    """Largest change of a dimension (the paper's: 0.25)."""
    steps: Annotated[int, Range(3, 99)] = 11
    """Changes from -span to span; odd (the paper's: 11)."""
    gif: str | None = None
    """Write an animation too, in which all dimensions swing through their range."""


def run(arguments: list[str]) -> int:
    """Draw perturbations, print where."""
    command = parse(_Perturb, arguments, prog="capsnet perturb")
    if command.image and command.data:
        raise InputError("--data must not be given with --image, which takes its place; got both")
    import torch

    from capsnet import plots, runs
    from capsnet.analysis.drawing import decoder_of, perturb
    from capsnet.data.dataset import to_float
    from capsnet.evaluation import predict_split

    subject = Subject(command.model)
    network, _ = decoder_of(subject.network)
    wanted = network.classes if command.classes == ("all",) else command.classes
    unknown = [name for name in wanted if name not in network.classes]
    if unknown:
        raise InputError(f"--classes must be all, or among {', '.join(network.classes)}; got {unknown[0]!r}")
    if command.gif is not None:
        if command.out is not None and Path(command.gif).resolve() == Path(command.out).resolve():
            raise InputError(f"--gif must be another file than --out; got {command.gif} for both")
        animation = subject.place("perturbations", command.gif, suffix="gif", overwrite=command.overwrite)
    chosen = None
    if command.image:
        inputs = subject.images(command.image)
        if wanted:
            inputs = inputs.repeat_interleave(len(wanted), 0)
            chosen = torch.tensor([network.classes.index(name) for name in wanted] * len(command.image))
    else:
        dataset = subject.dataset(command.data, command.data_dir, any_will_do=True)
        split = subject.split(dataset, command.split)
        found = predict_split(network, split)
        rows = []
        for name in wanted or network.classes[:1]:
            of_class = (found.labels == network.classes.index(name)).nonzero().flatten()
            if not len(of_class):
                raise InputError(f"--classes must be ones with images in {dataset.name}; of {name} there is none")
            right_first = of_class[found.wrong[of_class].int().argsort(stable=True)]
            rows.append(right_first[: command.images])
        index = torch.cat(rows)
        inputs, chosen = to_float(split.images[index]), split.labels[index]
    if len(inputs) > MOST_SHEETS:
        raise InputError(f"--images, --image and --classes must make at most {MOST_SHEETS} sheets; got {len(inputs)}")
    result = perturb(network, inputs, chosen, span=command.span, steps=command.steps)
    path = subject.draw(command, "perturbations", plots.perturbations(result, network.classes), ["perturb", *arguments])
    if command.gif is not None:
        content = plots.sweep(result)
        runs.write_atomically(animation, lambda place: place.write_bytes(content))
    if command.json:
        numbers = {
            "classes": [network.classes[k] for k in result.classes.tolist()],
            "poses": result.pose.tolist(),
            "deltas": result.deltas.tolist(),
            "change": result.images.sub(result.images[:, :, command.steps // 2, None])
            .square()
            .flatten(3)
            .sum(-1)
            .tolist(),
            "figure": str(path),
        }
        show_json(numbers)
        return 0
    show(f"{len(inputs)} x {result.images.shape[1]} dimensions x {command.steps} steps of +-{command.span:g}")
    show(f"figure: {path}")
    if command.gif is not None:
        show(f"animation: {animation}")
    return 0
