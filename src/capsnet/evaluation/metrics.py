"""Numbers made from the predictions for a split: error with its interval, losses, confusion matrix, calibration."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capsnet.config import Config
from capsnet.data import Split
from capsnet.errors import InputError
from capsnet.evaluation.predictions import Predictions, predict_split
from capsnet.evaluation.statistics import wilson_interval
from capsnet.models import Network

__all__ = ["Calibration", "Evaluation", "calibration", "error_line", "evaluate", "percent_interval"]


def percent_interval(wrong: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of an error in percent: what sampling this many images leaves open."""
    low, high = wilson_interval(wrong, total)
    return 100 * low, 100 * high


def error_line(wrong: int, total: int) -> str:
    """An error in words: `error 0.41 % (41 of 10,000 wrong; 95 % interval 0.30 to 0.56 %)`."""
    low, high = percent_interval(wrong, total)
    return f"error {100 * wrong / total:.2f} % ({wrong:,} of {total:,} wrong; 95 % interval {low:.2f} to {high:.2f} %)"


@dataclass(frozen=True)
class Evaluation:
    """Results on one split.

    Attributes:
        confusion: number of objects by true class (rows) and predicted class (columns), see `Predictions.confusion`.
        classes: names of the classes.
        loss: mean of the whole loss over the images.
        classification_loss: mean margin loss (scaled) or cross-entropy.
        reconstruction_loss: mean over the images of the sum of squared pixel errors, unweighted.
        wrong: number of images given a wrong class; where they show several, of those whose set of classes is not
            exactly right.
        objects_per_image: number of objects, of different classes, in every image.

    Examples:
        >>> from capsnet.evaluation import Predictions
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.6, 0.5]])
        >>> found = Predictions(scores, torch.tensor([0, 1, 1]), scores.argmax(-1), torch.zeros(3, 3), None)
        >>> evaluation = Evaluation.of(found, ("cat", "dog"))
        >>> evaluation.wrong, evaluation.confusion
        (1, ((1, 0), (1, 1)))
    """

    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    loss: float
    classification_loss: float
    reconstruction_loss: float
    wrong: int
    objects_per_image: int = 1

    @classmethod
    def of(cls, found: Predictions, classes: tuple[str, ...]) -> "Evaluation":
        """The results that predictions for all images of a split make, at least one; losses are summed in float64."""
        rows = tuple(tuple(row) for row in found.confusion.tolist())
        loss, classification, reconstruction = found.losses.double().mean(0).tolist()
        wrong, objects = int(found.wrong.sum()), found.labels[0].numel()
        return cls(rows, classes, loss, classification, reconstruction, wrong, objects)

    @property
    def total(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion)) // self.objects_per_image

    @property
    def error_percent(self) -> float:
        """Share of wrong images in percent: where they show several objects, the exact-set error."""
        return 100 * self.wrong / self.total

    @property
    def missed(self) -> int:
        """Number of objects that were not found; of single ones, that of wrong images."""
        return sum(map(sum, self.confusion)) - sum(row[k] for k, row in enumerate(self.confusion))

    @property
    def missed_percent(self) -> float:
        """Share of missed objects in percent: the error if each object found counts, whatever is said of the others."""
        return 100 * self.missed / (self.objects_per_image * self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the error, see `percent_interval`."""
        return percent_interval(self.wrong, self.total)

    def per_class(self) -> list[dict[str, Any]]:
        """For each class: images that show it, those where it was missed, error, false claims, precision, recall, F1.

        Precision, recall and F1 are in [0, 1]: 0 where the class was never claimed, None where no image shows it.
        """
        rows: list[dict[str, Any]] = []
        for k, (name, row, column) in enumerate(
            zip(self.classes, self.confusion, zip(*self.confusion, strict=True), strict=True)
        ):
            images, claimed, right = sum(row), sum(column), row[k]
            rows.append(
                {
                    "class": name,
                    "images": images,
                    "wrong": images - right,
                    "error_percent": 100 * (images - right) / images if images else None,
                    "taken_for_it": claimed - right,
                    "precision": (right / claimed if claimed else 0.0) if images else None,
                    "recall": right / images if images else None,
                    "f1": 2 * right / (images + claimed) if images else None,
                }
            )
        return rows

    @property
    def macro(self) -> dict[str, float]:
        """Mean precision, recall and F1 over the classes that any image shows, each counted alike."""
        rows = [row for row in self.per_class() if row["images"]]
        return {name: fmean(row[name] for row in rows) for name in ("precision", "recall", "f1")}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        of_objects = {"objects": self.objects_per_image, "missed": self.missed, "missed_percent": self.missed_percent}
        return {
            "error_percent": self.error_percent,
            "wrong": self.wrong,
            "total": self.total,
            "interval": list(self.interval),
            **(of_objects if self.objects_per_image > 1 else {}),
            "loss": self.loss,
            "classification_loss": self.classification_loss,
            "reconstruction_loss": self.reconstruction_loss,
            "macro": self.macro,
            "per_class": self.per_class(),
            "confusion": [list(row) for row in self.confusion],
        }

    def summary(self) -> str:
        """See `error_line`; of images with several objects both measures: `exact-set ...; missed objects 2.60 %`."""
        line = error_line(self.wrong, self.total)
        return line if self.objects_per_image == 1 else f"exact-set {line}; missed objects {self.missed_percent:.2f} %"


def evaluate(
    network: Network,
    split: Split,
    *,
    config: Config | None = None,
    batch_size: int | None = None,
    precision: str = "32",
) -> Evaluation:
    """Run `network` over a whole split, on the device where its weights are and in evaluation mode.

    `config` has the weights of the losses, the paper's if not given; `batch_size` is by default that of
    `models.inference_batch`, and changes the result by no more than rounding. `precision` is `32`, or `bf16` for
    convolutions and decoder.

    Raises:
        InputError: no images, images of another shape or of another number of objects, or an unknown precision.

    Examples:
        >>> split = load_split("strokes", "test").take(torch.arange(20))
        >>> evaluate(load("capsnet-mnist"), split).summary()
        'error 0.00 % (0 of 20 wrong; 95 % interval 0.00 to 16.11 %)'
    """
    if not len(split):
        raise InputError("split must hold at least one image; got none")
    if precision not in ("32", "bf16"):
        raise InputError(f"precision must be 32 or bf16; got {precision!r}")
    device = next(network.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return Evaluation.of(predict_split(network, split, config=config, batch_size=batch_size), network.classes)


@dataclass(frozen=True)
class Calibration:
    """How far a winning score can be read as the probability of being right.

    Attributes:
        edges: of the bins, `bins + 1` numbers from 0 to 1.
        counts: images in each bin.
        scores: mean winning score in each bin; None where it is empty.
        accuracies: share of right predictions in each bin; None where it is empty.
        error: expected calibration error: mean of |accuracy - score| over the bins, weighted by counts, in [0, 1]
            (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, eq. 3).

    Examples:
        >>> from capsnet.evaluation import calibration
        >>> found = calibration(torch.tensor([0.9, 0.8, 0.6]), torch.tensor([True, True, False]))
        >>> round(found.error, 2)
        0.3
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    scores: tuple[float | None, ...]
    accuracies: tuple[float | None, ...]
    error: float


def calibration(winning: Float[Tensor, "n"], right: Bool[Tensor, "n"], *, bins: int = 10) -> Calibration:
    """Sort predictions by their winning score, in [0, 1], into equal bins and compare score and accuracy in each.

    A score on an edge belongs to the bin above it, 1 to the last. There is at least one prediction.

    Examples:
        >>> round(calibration(torch.tensor([0.95, 0.85]), torch.tensor([True, False])).error, 2)
        0.45
    """
    index = (winning.double() * bins).long().clamp(0, bins - 1)
    counts = index.bincount(minlength=bins).tolist()
    scores, rights = (index.bincount(each.double(), minlength=bins).tolist() for each in (winning, right))
    gaps = sum(abs(ours - theirs) for ours, theirs in zip(rights, scores, strict=True))
    return Calibration(
        edges=tuple(k / bins for k in range(bins + 1)),
        counts=tuple(counts),
        scores=tuple(s / n if n else None for s, n in zip(scores, counts, strict=True)),
        accuracies=tuple(r / n if n else None for r, n in zip(rights, counts, strict=True)),
        error=gaps / len(winning),
    )
