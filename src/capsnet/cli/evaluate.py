"""The verb `evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from capsnet.cli.parsing import BatchSize, Range, parse
from capsnet.cli.printing import say, show, show_json, show_table
from capsnet.cli.subject import Subject
from capsnet.config import Device
from capsnet.errors import InputError

__all__ = ["Member", "members", "run", "same_split"]

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.data import Dataset, Split
    from capsnet.ensemble import Ensemble
    from capsnet.evaluation import Evaluation
    from capsnet.evaluation.statistics import McNemar, Summary


@dataclass(frozen=True)
class _Evaluate:
    """Error with its 95 % interval, per-class table, confusion matrix and losses of a trained network.

    Of several networks: the error of each, mean and standard deviation, the error of all as an ensemble (the mean of
    their scores), and McNemar's test of the ensemble against the first.

    Examples:
      capsnet evaluate runs/mnist
      capsnet evaluate runs/mnist --split train --json
      capsnet evaluate runs/seed0 runs/seed1 runs/seed2 --shifts 1
    """

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN [RUN ...]")]]
    """Run directories, folders with weights, or names of weights that come with the package."""
    shifts: Annotated[int, Range(0, 1_000)] = 0
    """Also with the mean over all shifts of an image by up to this many pixels along both axes."""
    data: str | None = None
    """Another data set of the same image shape, or a folder of images of any size, read as the run's own were."""
    data_dir: str | None = None
    """Where downloaded files are."""
    split: Literal["test", "validation", "train"] = "test"
    """Which part of the data set."""
    batch_size: BatchSize = 256
    """Images at a time; only memory and speed depend on it."""
    precision: Literal["auto", "32", "bf16"] | None = None
    """Of convolutions and decoder; default: that of the run; 32 for several runs and for --shifts."""
    device: Device = "auto"
    """auto: a CUDA GPU if there is one; mps (untested) on a Mac."""
    json: bool = False
    """Print everything as JSON."""


def run(arguments: list[str]) -> int:
    """Evaluate trained networks, print tables or JSON."""
    command = parse(_Evaluate, arguments, prog="capsnet evaluate")
    if not command.runs:
        raise InputError("RUN must be given; got none")
    if len(command.runs) == 1 and not command.shifts:
        return _one(command)
    if command.precision == "bf16":
        raise InputError("--precision must be 32 for several runs and for --shifts; got bf16")
    return _several(command)


def _one(command: _Evaluate) -> int:
    from capsnet import machine, memory
    from capsnet.evaluation import evaluate

    subject = Subject(command.runs[0], several=True)
    network, trained = subject.network, subject.trained(command.data)
    options = replace(trained, device=command.device, precision=command.precision or trained.precision, devices=1)
    device = machine.resolve_device(options)
    precision = machine.resolve_precision(options, device, network)
    dataset = subject.dataset(command.data, command.data_dir, held_out=command.split == "validation")
    split = subject.split(dataset, command.split)
    _check_shown(subject, split, f"{dataset.name} {command.split}")
    batch_size = min(command.batch_size, len(split))
    memory.check_inference(network, batch_size, device, task="evaluation", precision=precision)
    result = evaluate(network.to(device), split, config=trained, batch_size=command.batch_size, precision=precision)
    if command.json:
        where = {"run": subject.model, "data": dataset.name, "split": command.split, "precision": precision}
        show_json({**where, **result.to_dict()})
    else:
        show(f"{dataset.name} {command.split} {result.summary()}")
        show(_losses(result))
        _print_tables(result)
    return 0


def _several(command: _Evaluate) -> int:
    from capsnet.ensemble import check_shifts
    from capsnet.evaluation.statistics import mcnemar

    found = members(command.runs)
    check_shifts(command.shifts, found[0].subject.network.image_shape)
    dataset, split = same_split(
        found,
        command.split,
        data=command.data,
        data_dir=command.data_dir,
        device=command.device,
        batch_size=command.batch_size,
    )
    parts = [
        _Part.of(found, split, shifts, command.batch_size)
        for shifts in ((0, command.shifts) if command.shifts else (0,))
    ]
    averaging = mcnemar(parts[1].whole.wrong, parts[0].whole.wrong) if command.shifts else None
    if command.json:
        record = {
            "runs": list(command.runs),
            "data": dataset.name,
            "split": command.split,
            "precision": "32",
            "results": [part.to_dict() for part in parts],
            "averaging": averaging and averaging.to_dict(),
        }
        show_json(record)
        return 0
    show(f"{dataset.name} {command.split}, {len(split):,} images")
    for part in parts:
        part.tell()
    if averaging is not None:
        show(f"with shifts against without: {averaging.summary('with shifts', 'without')}")
    return 0


@dataclass(frozen=True)
class _Part:
    """What networks get wrong, each alone and as an ensemble, at one number of shifts."""

    found: list["Member"]
    shifts: int
    alone: list["Ensemble"]
    ensemble: "Ensemble | None"

    @classmethod
    def of(cls, found: list["Member"], split: "Split", shifts: int, batch_size: int) -> "_Part":
        import torch

        from capsnet.ensemble import Ensemble

        scores = [member.scores(split, shifts=shifts, batch_size=batch_size) for member in found]
        alone = [Ensemble.of(each, split.labels) for each in scores]
        together = Ensemble.of(torch.stack(scores).mean(0), split.labels) if len(found) > 1 else None
        return cls(found, shifts, alone, together)

    @property
    def whole(self) -> "Ensemble":
        return self.ensemble or self.alone[0]

    @property
    def views(self) -> int:
        return (2 * self.shifts + 1) ** 2

    def summary(self) -> "Summary | None":
        from capsnet.evaluation.statistics import summarise

        return summarise([each.error_percent for each in self.alone]) if self.ensemble else None

    def against_first(self) -> "McNemar | None":
        from capsnet.evaluation.statistics import mcnemar

        return mcnemar(self.ensemble.wrong, self.alone[0].wrong) if self.ensemble else None

    def to_dict(self) -> dict[str, Any]:
        summary, against = self.summary(), self.against_first()
        return {
            "shifts": self.shifts,
            "views": self.views,
            "members": [member.to_dict(each) for member, each in zip(self.found, self.alone, strict=True)],
            "summary": summary and summary.to_dict(),
            "ensemble": self.ensemble and self.ensemble.to_dict(),
            "ensemble_against_first": against and against.to_dict(),
        }

    def tell(self) -> None:
        if self.shifts:
            pixels = "1 pixel" if self.shifts == 1 else f"{self.shifts} pixels"
            show(f"with shifts, the mean over {self.views} views of each image moved by up to {pixels}:")
        for member, each in zip(self.found, self.alone, strict=True):
            show(f"{member.name}: {each.summary()}")
        if self.ensemble and (summary := self.summary()) and (against := self.against_first()):
            first = self.found[0].run
            show(summary.summary())
            show(f"ensemble of {len(self.found)}: {self.ensemble.summary()}")
            show(f"ensemble against {first}: {against.summary('by the ensemble', f'by {first}')}")


class Member:
    """One of the networks that a command names, and what its run says of it.

    Attributes:
        run: as it was named.
        subject: network and card.
        seed: of its training; None where that is not known.
        held_out: what chose its validation images; empty where that is not known.
    """

    run: str
    subject: Subject
    seed: int | None
    held_out: tuple[object, ...]

    def __init__(self, run: str) -> None:
        self.run, self.subject = run, Subject(run, several=True)
        told = self.subject.is_run or self.subject.card.config
        trained = self.subject.trained() if told else None
        self.seed = trained.seed if trained else None
        self.held_out = (trained.data, trained.data_seed, trained.validation) if trained else ()

    @property
    def name(self) -> str:
        """The run with its seed."""
        return self.run if self.seed is None else f"{self.run} (seed {self.seed})"

    def scores(self, split: "Split", *, shifts: int = 0, batch_size: int = 256) -> "Tensor":
        """Its scores of every image, see `ensemble_scores`; says on stderr what it is doing."""
        from capsnet.ensemble import ensemble_scores

        views = (2 * shifts + 1) ** 2
        say(f"{self.run}: {len(split):,} images" + (f", {views} views of each" if shifts else ""))
        return ensemble_scores([self.subject.network], split, shifts=shifts, batch_size=batch_size)

    def to_dict(self, result: "Ensemble") -> dict[str, Any]:
        """Run, seed and `result` as JSON can hold them."""
        return {"run": self.run, "seed": self.seed, **result.to_dict()}


def members(runs: Sequence[str]) -> list[Member]:
    """The networks of `runs`, on the CPU.

    Raises:
        InputError: one that is named twice or cannot be loaded, or networks that differ in classes or image shape.
    """
    from capsnet.ensemble import check_alike
    from capsnet.runs import folder_of

    folders = [folder_of(name).resolve() for name in runs]
    for k, (name, folder) in enumerate(zip(runs, folders, strict=True)):
        if folder in folders[:k]:
            raise InputError(f"RUN must be named once; got {runs[folders.index(folder)]} and {name}")
    found = [Member(name) for name in runs]
    check_alike({member.run: member.subject.network for member in found})
    return found


def same_split(
    found: Sequence[Member],
    name: Literal["test", "validation", "train"],
    *,
    data: str | None,
    data_dir: str | None,
    device: Device,
    batch_size: int,
) -> tuple["Dataset", "Split"]:
    """The split that all networks are judged on: that of the first one's data set; they go to the device.

    Args:
        found: the networks.
        name: of the split.
        data: another data set or folder, read as the first one's own was.
        data_dir: where downloaded files are.
        device: where the networks go.
        batch_size: images at a time that each is going to be given.

    Raises:
        InputError: the data cannot be had, too little memory, or validation images that another network was trained on.
    """
    from capsnet import machine, memory

    first = found[0].subject
    if name == "validation":
        for member in found:
            if member.held_out != found[0].held_out:
                raise InputError(
                    f"--split must be test or train where {found[0].run} and {member.run} held out other images; "
                    "got validation"
                )
    trained = first.trained(data)
    place = machine.resolve_device(replace(trained, device=device, devices=1))
    copies = len(found) - 1 if place.type == "cuda" else 0
    dataset = first.dataset(data, data_dir, held_out=name == "validation")
    split = first.split(dataset, name)
    _check_shown(first, split, f"{dataset.name} {name}")
    memory.check_inference(first.network, min(batch_size, len(split)), place, task="evaluation", copies=copies)
    for member in found:
        member.subject.network.to(place)
    return dataset, split


def _check_shown(subject: Subject, split: "Split", name: str) -> None:
    """Raise InputError unless the images show as many objects each as the network looks for."""
    wanted, shown = subject.network.objects, split.labels[0].numel()
    if shown != wanted:
        raise InputError(f"images of {name} must show {wanted} of {subject.model}'s classes each; got {shown}")


def _losses(result: "Evaluation") -> str:
    return (
        f"loss {result.loss:.5f}: classification {result.classification_loss:.5f}, "
        f"reconstruction {result.reconstruction_loss:.2f} (summed squared error an image, unweighted)"
    )


def _print_tables(result: "Evaluation") -> None:
    show("per class:")
    show_table(
        ("class", "images", "wrong", "error %", "others taken for it"),
        [
            (
                row["class"],
                f"{row['images']:,}",
                str(row["wrong"]),
                "-" if row["error_percent"] is None else f"{row['error_percent']:.2f}",
                str(row["taken_for_it"]),
            )
            for row in result.per_class()
        ],
    )
    if len(result.classes) > 30:
        show(f"confusion matrix: {len(result.classes)} classes are too many to print; see --json")
        return
    show("confusion matrix, true class in rows and predicted class in columns:")
    show_table(
        ("", *result.classes),
        [
            (name, *(str(count) if count else "." for count in counts))
            for name, counts in zip(result.classes, result.confusion, strict=True)
        ],
    )
