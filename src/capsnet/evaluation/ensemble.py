"""Several networks as one, and the mean over shifted views of an image: scores, and how often they are wrong.

Sabour et al. 2017 (Section 7) report an ensemble of 7 networks on CIFAR-10 without saying how they are combined; here
it is the mean of their class capsules' lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capsnet import functional as F
from capsnet.data.dataset import Split
from capsnet.errors import InputError
from capsnet.evaluation.metrics import error_line, percent_interval
from capsnet.evaluation.predictions import predict_split
from capsnet.models import Network

__all__ = ["Ensemble", "check_alike", "check_shifts", "ensemble_scores"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """How often the largest scores are wrong.

    Attributes:
        wrong: for each image, whether it is given a wrong class, `bool [n]`; where it shows k objects, whether the k
            classes are not exactly the true ones.
        objects_per_image: number of objects, of different classes, in every image.
    """

    wrong: Bool[Tensor, "n"]
    objects_per_image: int = 1

    @classmethod
    def of(cls, scores: Float[Tensor, "n classes"], labels: Int[Tensor, "n *objects"]) -> "Ensemble":
        """What `scores` get wrong, of which the largest is the prediction; the k largest where labels are `[n, k]`.

        Raises:
            InputError: no images, or as many labels as are not those of the scores.
        """
        if not 0 < len(scores) == len(labels):
            raise InputError(f"labels must be those of the {len(scores)} images, at least one; got {len(labels)}")
        return cls(F.misclassified(scores, labels.to(scores.device)).cpu(), labels[0].numel())

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.wrong)

    @property
    def count(self) -> int:
        """Number of wrong images."""
        return int(self.wrong.sum())

    @property
    def error_percent(self) -> float:
        """Share of wrong images in percent."""
        return 100 * self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the error, see `percent_interval`."""
        return percent_interval(self.count, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Error, counts and interval as JSON can hold them."""
        return {
            "error_percent": self.error_percent,
            "wrong": self.count,
            "total": self.total,
            "interval": list(self.interval),
        }

    def summary(self) -> str:
        """See `error_line`."""
        return "exact-set " * (self.objects_per_image > 1) + error_line(self.count, self.total)


def ensemble_scores(
    networks: Sequence[Network], split: Split, *, shifts: int = 0, batch_size: int = 256
) -> Float[Tensor, "n classes"]:
    """Mean score of each class over networks and over shifted views of each image, in [0, 1], on the CPU.

    A network's score is the length of its class capsule; without capsules the softmax, or where images show several
    objects the sigmoid, of its logits. Each is run in evaluation mode and float32, on the device where its weights are.
    Each image is seen at all shifts by up to `shifts` pixels along both axes, (2 shifts + 1)^2 views, with zeros moving
    in. The result does not depend on `batch_size` but by rounding.

    Raises:
        InputError: no networks, networks that differ in classes or image shape, images of another shape, a batch size
            below 1, or shifts that move an image out of itself.
    """
    check_alike({f"network {k} ({network.config['name']})": network for k, network in enumerate(networks, start=1)})
    check_shifts(shifts, networks[0].image_shape)
    found = [predict_split(network, split, shifts=shifts, batch_size=batch_size) for network in networks]
    return torch.stack([each.scores for each in found]).mean(0)


def check_shifts(shifts: int, image_shape: tuple[int, int, int]) -> None:
    """Raise InputError unless something of an image (channels, height, width) stays in it."""
    largest = min(image_shape[1:]) - 1
    if not 0 <= shifts <= largest:
        raise InputError(f"shifts must be 0 to {largest} pixels for these images; got {shifts}")


def check_alike(networks: Mapping[str, Network]) -> None:
    """Raise InputError, naming both, unless all networks know the same as the first; keys are what they are called."""
    if not networks:
        raise InputError("networks must be at least one; got none")
    (first, model), *others = networks.items()
    for name, other in others:
        if other.image_shape != model.image_shape:
            raise InputError(f"{name} must take images {model.image_shape} as {first}; got {other.image_shape}")
        if len(other.classes) != len(model.classes):
            raise InputError(f"{name} must know {len(model.classes)} classes as {first}; got {len(other.classes)}")
        for k, (wanted, got) in enumerate(zip(model.classes, other.classes, strict=True), start=1):
            if got != wanted:
                raise InputError(f"{name} must know the classes of {first}, whose class {k} is {wanted}; got {got}")
        if other.objects_per_image != model.objects_per_image:
            raise InputError(
                f"{name} must look for {model.objects_per_image} objects per image as {first}; "
                f"got {other.objects_per_image}"
            )
