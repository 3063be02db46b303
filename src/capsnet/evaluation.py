"""How good a network is on a split: error with its interval, losses, confusion matrix; each example counted once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.analysis.significance import wilson_interval
from capsnet.config import Config
from capsnet.data import Split
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network, evaluation_mode, inference_batch
from capsnet.objective import Objective

__all__ = ["Evaluation", "evaluate", "measure", "to_float", "wilson_interval"]


@dataclass(frozen=True)
class Evaluation:
    """Results on one split.

    Attributes:
        confusion: number of objects by true class (rows) and predicted class (columns). Where an image shows several,
            those found are on the diagonal, and of the others each missed class stands with one claimed in its place.
        classes: names of the classes.
        loss: mean of the whole loss over the images.
        classification_loss: mean margin loss (scaled) or cross-entropy.
        reconstruction_loss: mean over the images of the sum of squared pixel errors, unweighted.
        wrong: number of images given a wrong class; where they show several, of those whose set of classes is not
            exactly right.
        objects: how many objects of different classes every image shows.
    """

    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    loss: float
    classification_loss: float
    reconstruction_loss: float
    wrong: int
    objects: int = 1

    @property
    def total(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion)) // self.objects

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
        return 100 * self.missed / (self.objects * self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the error in percent: what sampling this many test images leaves open."""
        low, high = wilson_interval(self.wrong, self.total)
        return 100 * low, 100 * high

    def per_class(self) -> list[dict[str, Any]]:
        """For each class: images that show it, those where it was missed, error, and false claims of it."""
        rows: list[dict[str, Any]] = []
        for k, name in enumerate(self.classes):
            images = sum(self.confusion[k])
            wrong = images - self.confusion[k][k]
            mistaken = sum(row[k] for row in self.confusion) - self.confusion[k][k]
            error = 100 * wrong / images if images else None
            rows.append(
                {
                    "class": name,
                    "images": images,
                    "wrong": wrong,
                    "error_percent": error,
                    "taken_for_it": mistaken,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        of_objects = {"objects": self.objects, "missed": self.missed, "missed_percent": self.missed_percent}
        return {
            "error_percent": self.error_percent,
            "wrong": self.wrong,
            "total": self.total,
            "interval": list(self.interval),
            **(of_objects if self.objects > 1 else {}),
            "loss": self.loss,
            "classification_loss": self.classification_loss,
            "reconstruction_loss": self.reconstruction_loss,
            "per_class": self.per_class(),
            "confusion": [list(row) for row in self.confusion],
        }

    def summary(self) -> str:
        """One line: `error 0.41 % (41 of 10,000 wrong; 95 % interval 0.30 to 0.56 %)`.

        Of images with several objects it names both measures: `exact-set error ...; missed objects 2.60 %`.
        """
        low, high = self.interval
        line = (
            f"error {self.error_percent:.2f} % ({self.wrong:,} of {self.total:,} wrong; "
            f"95 % interval {low:.2f} to {high:.2f} %)"
        )
        return line if self.objects == 1 else f"exact-set {line}; missed objects {self.missed_percent:.2f} %"


def evaluate(
    network: Network,
    split: Split,
    *,
    config: Config | None = None,
    batch_size: int | None = None,
    precision: str = "32",
) -> Evaluation:
    """Run `network` over a whole split, on the device where its weights are.

    Args:
        network: put in evaluation mode for the time.
        split: images of the shape it was built for, of as many objects each.
        config: the weights of the losses; the paper's if not given.
        batch_size: images at a time; the result does not depend on it but by rounding. Default: see
            `models.inference_batch`.
        precision: `32`, or `bf16` for convolutions and decoder.

    Raises:
        InputError: no images, images of another shape or of another number of objects, or an unknown precision.
    """
    if not len(split):
        raise InputError("split must hold at least one image; got none")
    if precision not in ("32", "bf16"):
        raise InputError(f"precision must be 32 or bf16; got {precision!r}")
    objective = Objective(network, config or Config())
    device, batch = next(network.parameters()).device, batch_size or inference_batch(network)
    network.check_images(to_float(split.images[:1]))
    network.check_labels(split.labels)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        sums = measure(objective, split, classes=len(network.classes), device=device, batch_size=batch)
    return from_sums(*sums, classes=network.classes, objects=network.objects)


def measure(
    objective: nn.Module,
    split: Split,
    *,
    classes: int,
    device: torch.device,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sums over the examples `rank, rank + world_size, ...` of a split.

    Adding the sums of all ranks gives those of the split, with every example counted once.

    Returns:
        The confusion matrix `int64 [classes, classes]`, and the sums of the three losses with the number of wrong
        images, `float64 [4]`, on `device`.
    """
    images, labels = split.images[rank::world_size], split.labels[rank::world_size]
    objects = None if split.objects is None else split.objects[rank::world_size]
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    losses = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluation_mode(objective), torch.inference_mode(), constant_weights():
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            target = labels[part].to(device)
            alone = () if objects is None else (to_float(objects[part].to(device)),)
            batch = objective(to_float(images[part].to(device)), target, *alone)
            present, predicted = F.found(batch.output.scores, target)
            right, missed, instead = (
                which.nonzero()[:, 1] for which in (present & predicted, present & ~predicted, predicted & ~present)
            )  # an image has as many missed as wrongly claimed classes, so its rows of both stand side by side
            cells = torch.cat([right * (classes + 1), missed * classes + instead])
            confusion += torch.bincount(cells, minlength=classes * classes)
            wrong = (present != predicted).any(-1)
            sums = [batch.total.sum(), batch.classification.sum(), batch.reconstruction.sum(), wrong.sum()]
            losses += torch.stack(sums).double()
    return confusion.view(classes, classes), losses


def from_sums(confusion: Tensor, losses: Tensor, *, classes: tuple[str, ...], objects: int = 1) -> Evaluation:
    """The Evaluation of what `measure` summed up."""
    loss, classification, reconstruction = (losses[:3] * objects / confusion.sum()).tolist()
    rows = tuple(tuple(row) for row in confusion.tolist())
    return Evaluation(rows, classes, loss, classification, reconstruction, int(losses[3]), objects)
