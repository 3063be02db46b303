"""The verb `plot`: a figure of a trained network."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from capsnet.cli.analyse import pose_table, probe_poses
from capsnet.cli.parsing import DataDir, Group, Images, Model, Range
from capsnet.cli.printing import show, show_json
from capsnet.cli.trained_model import TrainedModel, WritesFile
from capsnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.plots.style import Figure

__all__ = ["PLOT"]

MOST_SHEETS = 100  # perturbation sheets in one figure


@dataclass(frozen=True)
class _FigureOptions(WritesFile):
    model: Model
    data: str | None = None
    """Data set or folder; default: the network's own. It is read as the network's own was."""
    data_dir: DataDir = None
    split: Literal["test", "validation", "train"] = "test"
    """Split of the data set."""
    format: Literal["png", "svg", "pdf"] = "png"
    """File format of the figure."""
    out: str | None = None
    """File to write; default: figures/ in the run directory, otherwise the working directory."""
    overwrite: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print the numbers as JSON."""

    def save(self, trained: TrainedModel, name: str, figure: "Figure", line: str) -> Path:
        """Write the figure, with the command that made it in its metadata."""
        from capsnet import plots

        path = trained.place(name, self.out, suffix=self.format, overwrite=self.overwrite)
        return plots.save(figure, path, format=self.format, command=line)

    def finish(self, numbers: dict[str, Any], *lines: str) -> int:
        """Print the numbers as JSON, or the lines and where the figure is."""
        if self.json:
            show_json(numbers)
        else:
            show(*lines, f"figure: {numbers['figure']}")
        return 0

    def of_own(self, files: tuple[str, ...]) -> bool:
        """Whether image files are given, which must then not be with --data."""
        if files and self.data:
            raise InputError("--data must not be given with --image, which replaces it; got both")
        return bool(files)


@dataclass(frozen=True)
class _Reconstructions(_FigureOptions):
    """Images beside their reconstructions, correctly and wrongly classified ones apart.

    A wrongly classified image is also reconstructed from the capsule of its true class, as in Figure 3 of the paper.
    Overlapping objects are reconstructed one by one, in two colours, as in Figure 5.

    Examples:
      capsnet plot reconstructions runs/mnist
      capsnet plot reconstructions capsnet-mnist --right 10 --wrong 30 --format svg --out wrong.svg
    """

    right: Annotated[int, Range(0, 1_000)] = 20
    """Number of correctly classified images, at most: the first ones of the split."""
    wrong: Annotated[int, Range(0, 1_000)] = 20
    """Number of wrongly classified images, at most: the first ones of the split."""

    def work(self, line: str) -> int:
        if self.right + self.wrong == 0:
            raise InputError("--right and --wrong must not both be 0; got 0 and 0")
        import torch

        from capsnet.analysis.reconstruction import decoder_of
        from capsnet.report import reconstruction_figure

        trained = TrainedModel(self.model, several=True)
        decoder_of(trained.network)
        dataset = trained.dataset(self.data, self.data_dir, any_will_do=True)
        split = trained.split(dataset, self.split)
        found = trained.predictions(split)
        wrong = found.wrong.nonzero().flatten()
        index = torch.cat([(~found.wrong).nonzero().flatten()[: self.right], wrong[: self.wrong]])
        if not len(index):
            raise InputError(f"data set {dataset.name} must have wrong images to draw with --right 0; all are right")
        figure = reconstruction_figure(trained.network, split.take(index), count=max(self.right, self.wrong))
        errors, means = found.reconstruction_errors, {}
        if errors is not None:
            means = {"right": _mean(errors[~found.wrong]), "wrong": _mean(errors[found.wrong])}
        return self.finish(
            {
                "data": dataset.name,
                "split": self.split,
                "images": len(split),
                "wrong": len(wrong),
                **{f"reconstruction_error_{kind}": mean for kind, mean in means.items()},
                "figure": str(self.save(trained, "reconstructions", figure, line)),
            },
            f"{dataset.name} {self.split}: {len(wrong):,} of {len(split):,} images wrong",
            *(
                f"summed squared error of the reconstruction, mean of the {kind} images: "
                + ("-" if mean is None else f"{mean:.2f}")
                for kind, mean in means.items()
            ),
        )


@dataclass(frozen=True)
class _Perturbations(_FigureOptions):
    """Reconstructions with one dimension of a class capsule changed at a time (Figure 4 of the paper).

    One row per dimension, one column per change, unchanged in the middle. Of the data set the first correctly
    classified images of each class are taken.

    Examples:
      capsnet plot perturbations capsnet-mnist --classes 4 7
      capsnet plot perturbations runs/mnist --classes all --gif sweep.gif
      capsnet plot perturbations capsnet-mnist --image my-seven.png --span 0.5 --steps 21
    """

    classes: tuple[str, ...] = ()
    """Names of the classes whose capsules are changed, or all; default: the first, or the predicted one of --image."""
    images: Annotated[int, Range(1, MOST_SHEETS)] = 1
    """Number of images per class."""
    image: tuple[str, ...] = ()
    """Your own image files instead of those of the data set."""
    span: Annotated[float, Range(0, 10, above=True)] = 0.25
    """Largest change of a dimension (in the paper 0.25)."""
    steps: Annotated[int, Range(3, 99)] = 11
    """Number of changes from -span to span, odd (in the paper 11)."""
    gif: str | None = None
    """Write also an animation in which all dimensions go through their range."""

    def work(self, line: str) -> int:
        own = self.of_own(self.image)
        import torch

        from capsnet import plots
        from capsnet.analysis.reconstruction import decoder_of, perturb
        from capsnet.data.dataset import to_float
        from capsnet.files import write_atomically

        trained = TrainedModel(self.model)
        network, _ = decoder_of(trained.network)
        wanted = network.classes if self.classes == ("all",) else self.classes
        unknown = [name for name in wanted if name not in network.classes]
        if unknown:
            raise InputError(f"--classes must be all, or among {', '.join(network.classes)}; got {unknown[0]!r}")
        if self.gif is not None:
            if self.out is not None and Path(self.gif).resolve() == Path(self.out).resolve():
                raise InputError(f"--gif must be another file than --out; got {self.gif} for both")
            animation = trained.place("perturbations", self.gif, suffix="gif", overwrite=self.overwrite, option="--gif")
        chosen = None
        if own:
            inputs = trained.images(self.image)
            if wanted:
                inputs = inputs.repeat_interleave(len(wanted), 0)
                chosen = torch.tensor([network.classes.index(name) for name in wanted] * len(self.image))
        else:
            dataset = trained.dataset(self.data, self.data_dir, any_will_do=True)
            split = trained.split(dataset, self.split)
            found = trained.predictions(split)
            rows = []
            for name in wanted or network.classes[:1]:
                of_class = (found.labels == network.classes.index(name)).nonzero().flatten()
                if not len(of_class):
                    raise InputError(f"--classes must be ones with images in {dataset.name}; of {name} there is none")
                right_first = of_class[found.wrong[of_class].int().argsort(stable=True)]
                rows.append(right_first[: self.images])
            index = torch.cat(rows)
            inputs, chosen = to_float(split.images[index]), split.labels[index]
        if len(inputs) > MOST_SHEETS:
            raise InputError(
                f"--images, --image and --classes must make at most {MOST_SHEETS} sheets; got {len(inputs)}"
            )
        result = perturb(network, inputs, chosen, span=self.span, steps=self.steps)
        path = self.save(trained, "perturbations", plots.perturbations(result, network.classes), line)
        lines = [f"{len(inputs)} x {result.images.shape[1]} dimensions x {self.steps} steps of +-{self.span:g}"]
        if self.gif is not None:
            content = plots.sweep(result)
            write_atomically(animation, lambda place: place.write_bytes(content))
            lines.append(f"animation: {animation}")
        change = result.images - result.images[:, :, self.steps // 2, None]
        return self.finish(
            {
                "classes": [network.classes[k] for k in result.classes.tolist()],
                "poses": result.pose.tolist(),
                "deltas": result.deltas.tolist(),
                "change": change.square().flatten(3).sum(-1).tolist(),
                "figure": str(path),
            },
            *lines,
        )


@dataclass(frozen=True)
class _Couplings(_FigureOptions):
    """Where the evidence of each winning capsule comes from, step by step of the routing.

    Maps on the image: coupling times activation of the primary capsules, beside that of uniform couplings; and what
    their votes add to the winner. Curves: entropy of the couplings, agreement of votes and outcome.

    Examples:
      capsnet plot couplings capsnet-mnist
      capsnet plot couplings runs/mnist --images 500 --show 8 --json
    """

    images: Images = 100
    """Number of images in the mean of the curves: the first ones of the split."""
    show: Annotated[int, Range(1, 1_000)] = 6
    """Number of images with maps."""
    image: tuple[str, ...] = ()
    """Your own image files instead of those of the data set."""

    def work(self, line: str) -> int:
        own = self.of_own(self.image)
        import torch

        from capsnet import environment, plots
        from capsnet import functional as F
        from capsnet.analysis.routing_trace import Evidence, evidence, with_capsules
        from capsnet.data.dataset import to_float

        trained = TrainedModel(self.model)
        network = with_capsules(trained.network)
        if own:
            inputs, labels, name = trained.images(self.image), None, ", ".join(self.image)
        else:
            dataset = trained.dataset(self.data, self.data_dir, any_will_do=True)
            split = trained.split(dataset, self.split)
            inputs, labels, name = to_float(split.images[: self.images]), split.labels[: self.images], dataset.name
        parts = [evidence(network, part) for part in torch.split(inputs, 16)]
        found = Evidence(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))
        strongest = F.lengths(found.pose[-1]).argmax(-1)
        labels = strongest if labels is None else labels
        steps = network.routing_steps
        figure = plots.couplings(found, inputs, labels, network.classes, steps=steps, show=self.show)
        won = F.multi_hot(strongest, len(network.classes)).bool()
        uniform = math.log2(len(network.classes) + network.leaky)
        entropies, winners, others = (
            each.mean(1).tolist() for each in (found.entropy, found.agreement[:, won], found.agreement[:, ~won])
        )
        rows, wide = zip(steps, entropies, winners, others, strict=True), max(map(len, ("iteration", *steps)))
        head = "iteration" if steps[0] == "1" else "couplings"
        return self.finish(
            {
                "command": line,
                "data": name,
                "images": len(inputs),
                "steps": list(steps),
                "entropy_bits": entropies,
                "entropy_bits_of_uniform": uniform,
                "agreement_winning": winners,
                "agreement_others": others,
                "coupling_winning_largest": found.couplings.transpose(2, 3)[:, won].amax((1, 2)).tolist(),
                "figure": str(self.save(trained, "couplings", figure, line)),
                **environment.describe(torch.device("cpu")),
            },
            f"{name}: mean of {len(inputs)} images; uniform couplings have {uniform:.4f} bits",
            f"{head:>{wide}}  entropy, bits  agreement of the winner  of the others",
            *(
                f"{step:>{wide}}  {entropy:13.4f}  {winner:23.4f}  {other:13.4f}"
                for step, entropy, winner, other in rows
            ),
        )


@dataclass(frozen=True)
class _Pose(_FigureOptions):
    """R2 of the pose factors that `analyse pose` measures.

    Examples:
      capsnet plot pose runs/strokes-capsnet-seed0 --against runs/strokes-baseline-seed0
    """

    against: tuple[str, ...] | None = None
    """Other networks to draw beside the first."""

    def work(self, line: str) -> int:
        from capsnet import plots

        trained, numbers, found = probe_poses(
            self.model, against=self.against, data=self.data, data_dir=self.data_dir, split=self.split, line=line
        )
        numbers["figure"] = str(self.save(trained, "pose", plots.pose_explained(found), line))
        return self.finish(numbers, *pose_table(found))


@dataclass(frozen=True)
class _Results(_FigureOptions):
    names: ClassVar[tuple[str, ...]]

    def work(self, line: str) -> int:
        from capsnet.evaluation import calibration
        from capsnet.report import result_figures

        if self.out is not None and len(self.names) > 1:
            raise InputError(f"--out must be given for one figure; got {len(self.names)} figures")
        trained = TrainedModel(self.model)
        dataset = trained.dataset(self.data, self.data_dir)
        split = trained.split(dataset, self.split)
        found = trained.predictions(split)
        kept = trained.run.result().get("kept_epoch") if trained.run.result_path.is_file() else None
        rows = trained.run.metrics()
        makers = result_figures(found, split, trained.network.classes, rows, kept_epoch=kept)
        if self.names == ("curves",) and "curves" not in makers:
            raise InputError(f"curves must be of a run directory with metrics.csv; {self.model} has none")
        paths = [self.save(trained, name, makers[name](), line) for name in self.names if name in makers]
        if not self.json:
            show(*(f"figure: {path}" for path in paths))
            return 0
        calibrated = calibration(found.winning, ~found.wrong)
        show_json(
            {
                "data": dataset.name,
                "split": self.split,
                "images": len(split),
                "wrong": int(found.wrong.sum()),
                "confusion": found.confusion.tolist(),
                "winning_score_mean": float(found.winning.mean()),
                "expected_calibration_error": calibrated.error,
                "figures": [str(path) for path in paths],
            }
        )
        return 0


def _result(help: str, *names: str) -> "type[_Results]":
    """The command that draws these of `report.result_figures`."""
    return dataclass(frozen=True)(type("_Result", (_Results,), {"names": names, "__doc__": help}))


def _mean(values: "Tensor") -> float | None:
    return float(values.mean()) if len(values) else None


_RESULTS = {
    "curves": "Losses and errors by epoch.",
    "class-errors": "Error of each class.",
    "confusion": "Confusion matrix.",
    "gallery": "All wrongly classified images.",
    "lengths": "Histogram of the lengths of the winning capsules.",
    "reliability": "Reliability diagram: are lengths probabilities?",
}

PLOT = Group(
    "Draw a figure of a trained network.",
    {
        "reconstructions": _Reconstructions,
        "perturbations": _Perturbations,
        "couplings": _Couplings,
        "pose": _Pose,
        **{name: _result(help, name) for name, help in _RESULTS.items()},
        "all": _result(f"The last six: {', '.join(_RESULTS)}.", *_RESULTS),
    },
)
