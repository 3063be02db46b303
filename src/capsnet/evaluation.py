"""How good a network is on a split: error with its interval, losses, confusion matrix; each example counted once."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capsnet.config import Config
from capsnet.data import Split
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network
from capsnet.objective import Objective

__all__ = ["Evaluation", "evaluate", "measure", "to_float", "wilson_interval"]


@dataclass(frozen=True)
class Evaluation:
    """Results on one split.

    Attributes:
        confusion: number of images by true class (rows) and predicted class (columns).
        classes: names of the classes.
        loss: mean of the whole loss over the images.
        classification_loss: mean margin loss (scaled) or cross-entropy.
        reconstruction_loss: mean over the images of the sum of squared pixel errors, unweighted.
    """

    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    loss: float
    classification_loss: float
    reconstruction_loss: float

    @property
    def total(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion))

    @property
    def wrong(self) -> int:
        """Number of images given a wrong class."""
        return self.total - sum(row[k] for k, row in enumerate(self.confusion))

    @property
    def error_percent(self) -> float:
        """Share of wrong images in percent."""
        return 100 * self.wrong / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the error in percent: what sampling this many test images leaves open."""
        low, high = wilson_interval(self.wrong, self.total)
        return 100 * low, 100 * high

    def per_class(self) -> list[dict[str, Any]]:
        """For each class: images, wrong ones, error, and how many images of other classes were taken for it."""
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
        return {
            "error_percent": self.error_percent,
            "wrong": self.wrong,
            "total": self.total,
            "interval": list(self.interval),
            "loss": self.loss,
            "classification_loss": self.classification_loss,
            "reconstruction_loss": self.reconstruction_loss,
            "per_class": self.per_class(),
            "confusion": [list(row) for row in self.confusion],
        }

    def summary(self) -> str:
        """One line: `error 0.41 % (41 of 10,000 wrong; 95 % interval 0.30 to 0.56 %)`."""
        low, high = self.interval
        return (
            f"error {self.error_percent:.2f} % ({self.wrong:,} of {self.total:,} wrong; "
            f"95 % interval {low:.2f} to {high:.2f} %)"
        )


def wilson_interval(wrong: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22, 209-212), both ends in [0, 1].

    Args:
        wrong: successes.
        total: trials, at least 1.
        z: normal quantile; the default is that of 95 %.
    """
    p = wrong / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    network: Network,
    split: Split,
    *,
    config: Config | None = None,
    batch_size: int = 256,
    precision: str = "32",
) -> Evaluation:
    """Run `network` over a whole split, on the device where its weights are.

    Args:
        network: put in evaluation mode for the time.
        split: images of the shape it was built for.
        config: the weights of the losses; the paper's if not given.
        batch_size: images at a time; the result does not depend on it but by rounding.
        precision: `32`, or `bf16` for convolutions and decoder.

    Raises:
        InputError: images of another shape, or an unknown precision.
    """
    if precision not in ("32", "bf16"):
        raise InputError(f"precision must be 32 or bf16; got {precision!r}")
    objective = Objective(network, config or Config()).train(network.training)
    device = next(network.parameters()).device
    network.check_images(to_float(split.images[:1]))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        sums = measure(objective, split, classes=len(network.classes), device=device, batch_size=batch_size)
    return from_sums(*sums, classes=network.classes)


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
        The confusion matrix `int64 [classes, classes]` and the sums of the three losses `float64 [3]`, on `device`.
    """
    training = objective.training
    objective.eval()
    images, labels = split.images[rank::world_size], split.labels[rank::world_size]
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    losses = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.inference_mode(), constant_weights():
        for start in range(0, len(labels), batch_size):
            target = labels[start : start + batch_size].to(device)
            batch = objective(to_float(images[start : start + batch_size].to(device)), target)
            pairs = target * classes + batch.output.scores.argmax(-1)
            confusion += torch.bincount(pairs, minlength=classes * classes)
            sums = torch.stack([batch.total.sum(), batch.classification.sum(), batch.reconstruction.sum()])
            losses += sums.double()
    objective.train(training)
    return confusion.view(classes, classes), losses


def from_sums(confusion: Tensor, losses: Tensor, *, classes: tuple[str, ...]) -> Evaluation:
    """The Evaluation of what `measure` summed up."""
    loss, classification, reconstruction = (losses / confusion.sum()).tolist()
    rows = tuple(tuple(row) for row in confusion.tolist())
    return Evaluation(rows, classes, loss, classification, reconstruction)
