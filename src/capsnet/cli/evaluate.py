"""The verb `evaluate`: the error of trained networks, of several as an ensemble, and against others."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from capsnet.cli.parsing import BatchSize, DataDir, Device, Models, Range
from capsnet.cli.printing import say, show, show_json, show_table
from capsnet.cli.trained_model import TrainedModel
from capsnet.errors import InputError

__all__ = ["Evaluate"]

WRITTEN = ("predictions.csv", "metrics.json")

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.data import Dataset, Split
    from capsnet.evaluation import Evaluation, Predictions
    from capsnet.evaluation.ensemble import Ensemble
    from capsnet.evaluation.statistics import McNemar, Summary, TTest


@dataclass(frozen=True)
class Evaluate:
    """Error with its 95 % interval, precision, recall and F1, confusion matrix and losses of a trained network.

    Of several networks: the error of each, mean and standard deviation, the error of their ensemble (mean of the
    scores), and McNemar's test of the ensemble against the first network.

    With --against, whether two errors differ by more than chance. One network against one: the exact McNemar test over
    the images that only one of them gets wrong; it does not cover the variance between trainings. Several against
    several: a t test over the trainings, paired by seed if both sides have the same seeds, otherwise Welch's.

    Examples:
      capsnet evaluate runs/mnist
      capsnet evaluate runs/mine --data more/photos --out judged
      capsnet evaluate runs/seed0 runs/seed1 runs/seed2 --shifts 1
      capsnet evaluate runs/mnist --against capsnet-mnist
      capsnet evaluate runs/r3-seed0 runs/r3-seed1 --against runs/r1-seed0 runs/r1-seed1 --json
    """

    models: Models
    against: tuple[str, ...] | None = None
    """Other networks to compare with, of the same classes and image shape."""
    shifts: Annotated[int, Range(0, 1_000)] = 0
    """Also average the scores over all shifts of an image by up to this many pixels along both axes."""
    data: str | None = None
    """Data set, or folder of images of any size, read as the network's own was; default: that of the first network."""
    data_dir: DataDir = None
    split: Literal["test", "validation", "train"] = "test"
    """Split of the data set."""
    batch_size: BatchSize = 256
    """Images per batch; affects only memory and speed."""
    precision: Literal["auto", "32", "bf16"] | None = None
    """Precision of convolutions and decoder; default: that of the run; 32 for several networks and for --shifts."""
    device: Device = "auto"
    out: str | None = None
    """Of one network, write predictions.csv, a line for each image, and metrics.json to this directory."""
    overwrite: bool = False
    """Replace them."""
    json: bool = False
    """Print everything as JSON."""

    def run(self, line: str) -> int:
        """Evaluate, print tables or JSON."""
        if not self.models:
            raise InputError("MODEL must be given; got none")
        if self.against == ():
            raise InputError("--against must be at least one network; got none")
        if len(self.models) == 1 and not self.shifts and self.against is None:
            return self._one()
        if self.out is not None:
            raise InputError("--out must be given for one network, without --against and --shifts; got more")
        if self.precision == "bf16":
            raise InputError("--precision must be 32 for several networks and for --shifts; got bf16")
        if self.against and (len(self.models) == 1) != (len(self.against) == 1):
            raise InputError(
                "--against must be one network for one MODEL, and at least two for several, because the variance of "
                f"one is not known; got {len(self.against)} for {len(self.models)}"
            )
        from capsnet.evaluation.ensemble import check_shifts

        runs = _evaluated_runs([*self.models, *(self.against or ())])
        check_shifts(self.shifts, runs[0].trained.network.image_shape)
        for run in runs if self.split == "validation" else ():
            if run.held_out != runs[0].held_out:
                raise InputError(
                    f"--split must be test or train where {runs[0].model} and {run.model} held out other images; "
                    "got validation"
                )
        dataset, split, precision = _prepared([run.trained for run in runs], self, "32")
        record = {"data": dataset.name, "split": self.split, "precision": precision}
        if not self.json:
            show(f"{dataset.name} {self.split}, {len(split):,} images")
        return (self._compare if self.against else self._ensemble)(runs, split, record)

    def _one(self) -> int:
        import torch

        from capsnet.evaluation import Evaluation, predict_split

        if self.out is not None:
            _check_free(Path(self.out), overwrite=self.overwrite)
        trained = TrainedModel(self.models[0], several=True)
        dataset, split, precision = _prepared([trained], self, self.precision)
        config, device = trained.trained(self.data), next(trained.network.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            found = predict_split(trained.network, split, config=config, batch_size=self.batch_size)
        result = Evaluation.of(found, trained.network.classes)
        where = {"run": trained.model, "data": dataset.name, "split": self.split, "precision": precision}
        told = {**where, **result.to_dict()}
        if self.out is not None:
            _write(found, told, dataset, self.split, Path(self.out))
        if self.json:
            show_json(told)
        else:
            show(f"{dataset.name} {self.split} {result.summary()}")
            _print_details(result)
        return 0

    def _ensemble(self, runs: list["_EvaluatedRun"], split: "Split", record: dict[str, Any]) -> int:
        from capsnet.evaluation.statistics import mcnemar

        parts = [_Part.of(runs, split, shifts, self.batch_size) for shifts in sorted({0, self.shifts})]
        averaging = mcnemar(parts[1].ensemble.wrong, parts[0].ensemble.wrong) if self.shifts else None
        if self.json:
            record |= {"results": [part.to_dict() for part in parts], "averaging": averaging and averaging.to_dict()}
            show_json({"runs": list(self.models), **record})
            return 0
        for part in parts:
            part.show()
        if averaging is not None:
            show(f"with shifts against without: {averaging.summary('with shifts', 'without')}")
        return 0

    def _compare(self, runs: list["_EvaluatedRun"], split: "Split", record: dict[str, Any]) -> int:
        from capsnet.evaluation.statistics import McNemar

        count = len(self.models)
        ours, theirs = (_Part.of(side, split, self.shifts, self.batch_size) for side in (runs[:count], runs[count:]))
        test, reason = _test(ours, theirs)
        if self.json:
            sides = {
                name: {"members": side.members(), "summary": side.summary().to_dict()}
                for name, side in (("runs", ours), ("against", theirs))
            }
            show_json({**record, "shifts": self.shifts, **sides, "reason": reason, "test": test.to_dict()})
            return 0
        for name, side in (("networks", ours), ("against", theirs)):
            show(f"{name}:", *(f"  {line}" for line in side.lines()))
        show(reason)
        show(test.summary(*(f"by {run.model}" for run in runs)) if isinstance(test, McNemar) else test.summary())
        return 0


@dataclass(frozen=True)
class _Part:
    """What some networks get wrong, each alone and as an ensemble, at one number of shifts."""

    runs: list["_EvaluatedRun"]
    shifts: int
    alone: list["Ensemble"]
    ensemble: "Ensemble"

    @classmethod
    def of(cls, runs: list["_EvaluatedRun"], split: "Split", shifts: int, batch_size: int) -> "_Part":
        import torch

        from capsnet.evaluation.ensemble import Ensemble

        scores = [run.scores(split, shifts=shifts, batch_size=batch_size) for run in runs]
        alone = [Ensemble.of(each, split.labels) for each in scores]
        return cls(runs, shifts, alone, Ensemble.of(torch.stack(scores).mean(0), split.labels))

    @property
    def errors(self) -> list[float]:
        return [each.error_percent for each in self.alone]

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    def by_seed(self) -> list[float]:
        """Errors in the order of the seeds, which are known."""
        order = sorted(zip(self.seeds, self.errors, strict=True), key=lambda pair: pair[0] or 0)
        return [error for _, error in order]

    def summary(self) -> "Summary":
        from capsnet.evaluation.statistics import summarise

        return summarise(self.errors)

    def against_first(self) -> "McNemar":
        from capsnet.evaluation.statistics import mcnemar

        return mcnemar(self.ensemble.wrong, self.alone[0].wrong)

    def members(self) -> list[dict[str, Any]]:
        return [run.to_dict(each) for run, each in zip(self.runs, self.alone, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        several = len(self.runs) > 1
        return {
            "shifts": self.shifts,
            "views": (2 * self.shifts + 1) ** 2,
            "members": self.members(),
            "summary": self.summary().to_dict() if several else None,
            "ensemble": self.ensemble.to_dict() if several else None,
            "ensemble_against_first": self.against_first().to_dict() if several else None,
        }

    def lines(self) -> list[str]:
        """The error of each network, and of several their mean."""
        each = [f"{run.name}: {one.summary()}" for run, one in zip(self.runs, self.alone, strict=True)]
        return [*each, self.summary().summary()] if len(each) > 1 else each

    def show(self) -> None:
        if self.shifts:
            views, pixels = (2 * self.shifts + 1) ** 2, "1 pixel" if self.shifts == 1 else f"{self.shifts} pixels"
            show(f"with shifts, the mean over {views} views of each image moved by up to {pixels}:")
        show(*self.lines())
        if len(self.runs) > 1:
            first = self.runs[0].model
            show(f"ensemble of {len(self.runs)}: {self.ensemble.summary()}")
            show(f"ensemble against {first}: {self.against_first().summary('by the ensemble', f'by {first}')}")


class _EvaluatedRun:
    """One of several networks.

    Attributes:
        model: as it was named.
        trained: network and model card.
        seed: seed of its training; None if it is not known.
        held_out: the options that chose its validation images; empty if they are not known.
    """

    def __init__(self, model: str) -> None:
        self.model, self.trained = model, TrainedModel(model, several=True)
        config = self.trained.config
        self.seed = config.seed if config else None
        self.held_out = (config.data, config.data_seed, config.validation) if config else ()

    @property
    def name(self) -> str:
        return self.model if self.seed is None else f"{self.model} (seed {self.seed})"

    def scores(self, split: "Split", *, shifts: int, batch_size: int) -> "Tensor":
        """Its scores of every image, see `ensemble_scores`."""
        from capsnet.evaluation.ensemble import ensemble_scores

        views = (2 * shifts + 1) ** 2
        say(f"{self.model}: {len(split):,} images" + (f", {views} views of each" if shifts else ""))
        return ensemble_scores([self.trained.network], split, shifts=shifts, batch_size=batch_size)

    def to_dict(self, result: "Ensemble") -> dict[str, Any]:
        return {"run": self.model, "seed": self.seed, **result.to_dict()}


def _evaluated_runs(models: Sequence[str]) -> list[_EvaluatedRun]:
    """The networks, on the CPU; each must be named once, with the same classes and image shape."""
    from capsnet.checkpoints.pretrained import folder_of
    from capsnet.evaluation.ensemble import check_alike

    folders = [folder_of(name).resolve() for name in models]
    for k, (name, folder) in enumerate(zip(models, folders, strict=True)):
        if folder in folders[:k]:
            raise InputError(f"MODEL must be named once; got {models[folders.index(folder)]} and {name}")
    runs = [_EvaluatedRun(name) for name in models]
    check_alike({run.model: run.trained.network for run in runs})
    return runs


def _prepared(
    trained: Sequence[TrainedModel], options: Evaluate, precision: Literal["auto", "32", "bf16"] | None
) -> tuple["Dataset", "Split", str]:
    """The split of the first network's data set, and the precision to compute in. Moves all networks to the device.

    Raises:
        InputError: the data cannot be had, too little memory, or images of another number of objects.
    """
    from capsnet import devices, memory

    first = trained[0]
    config = first.trained(options.data)
    config = replace(config, device=options.device, precision=precision or config.precision, devices=1)
    device = devices.resolve_device(config)
    resolved = devices.resolve_precision(config, device, first.network)
    dataset = first.dataset(options.data, options.data_dir, held_out=options.split == "validation")
    split = first.split(dataset, options.split)
    wanted, there = first.network.objects_per_image, split.labels[0].numel()
    if there != wanted:
        name = f"{dataset.name} {options.split}"
        raise InputError(f"images of {name} must show {wanted} of {first.model}'s classes each; got {there}")
    batch_size, copies = min(options.batch_size, len(split)), len(trained) - 1 if device.type == "cuda" else 0
    memory.check_inference(first.network, batch_size, device, task="evaluation", precision=resolved, copies=copies)
    for each in trained:
        each.network.to(device)
    return dataset, split, resolved


def _check_free(directory: Path, *, overwrite: bool) -> None:
    """Raise InputError where results must not be written."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out must be a directory; got the file {directory}")
    for name in WRITTEN:
        if (directory / name).exists() and not overwrite:
            raise InputError(f"--out must be a directory without {name}, or be given with --overwrite; got {directory}")


def _write(
    found: "Predictions",
    told: dict[str, Any],
    dataset: "Dataset",
    split: Literal["test", "validation", "train"],
    to: Path,
) -> None:
    """Write the predictions, and all numbers."""
    from capsnet.evaluation.predictions import to_csv
    from capsnet.files import write_atomically

    table = to_csv(found, dataset.names(split), split, dataset.classes)
    text = json.dumps(told, indent=2) + "\n"
    predictions, metrics = (to / name for name in WRITTEN)
    write_atomically(predictions, lambda place: place.write_bytes(table))
    write_atomically(metrics, lambda place: place.write_text(text, encoding="utf-8"))
    say(f"written: {predictions} and {metrics}")


def _print_details(result: "Evaluation") -> None:
    show(
        f"loss {result.loss:.5f}: classification {result.classification_loss:.5f}, "
        f"reconstruction {result.reconstruction_loss:.2f} (summed squared error an image, unweighted)"
    )
    show("per class:")
    show_table(
        ("class", "images", "wrong", "error %", "others taken for it", "precision", "recall", "F1"),
        [
            (
                row["class"],
                f"{row['images']:,}",
                str(row["wrong"]),
                "-" if row["error_percent"] is None else f"{row['error_percent']:.2f}",
                str(row["taken_for_it"]),
                *("-" if row[name] is None else f"{row[name]:.3f}" for name in ("precision", "recall", "f1")),
            )
            for row in result.per_class()
        ],
    )
    macro = result.macro
    show(f"macro means: precision {macro['precision']:.3f}, recall {macro['recall']:.3f}, F1 {macro['f1']:.3f}")
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


def _test(ours: _Part, theirs: _Part) -> tuple["TTest | McNemar", str]:
    """The test that these runs allow, and why it is this one."""
    from capsnet.evaluation.statistics import mcnemar, paired_t, welch_t

    if len(ours.runs) == 1:
        return mcnemar(ours.alone[0].wrong, theirs.alone[0].wrong), "over the images: each side is one network"
    hindrance = _hindrance(ours, theirs)
    if hindrance is None:
        seeds = _listed(ours.seeds)
        return paired_t(ours.by_seed(), theirs.by_seed()), f"paired by seed: both sides have the seeds {seeds}"
    return welch_t(ours.errors, theirs.errors), f"not paired, because {hindrance}"


def _hindrance(ours: _Part, theirs: _Part) -> str | None:
    """Why runs cannot be paired by seed; None if they can."""
    for run in (*ours.runs, *theirs.runs):
        if run.seed is None:
            return f"the seed of {run.model} is not known"
    for side in (ours, theirs):
        seed, times = Counter(side.seeds).most_common(1)[0]
        if times > 1:
            return f"seed {seed} occurs {times} times on one side"
    if set(ours.seeds) != set(theirs.seeds):
        return f"the seeds differ: {_listed(ours.seeds)} against {_listed(theirs.seeds)}"
    return None


def _listed(seeds: Sequence[int | None]) -> str:
    return ", ".join(map(str, sorted(seed for seed in seeds if seed is not None)))
