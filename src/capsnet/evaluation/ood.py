"""What is no object of the known classes: its reconstruction from the winning capsule is bad.

Frosst, Sabour, Hinton, "DARCCC: Detecting Adversaries by Reconstruction from Class Conditional Capsules", 2018,
arXiv 1811.06969: an input is flagged when the distance between it and the reconstruction from the winning capsule is
above a threshold, set on validation images for a stated rate of false alarms.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from capsnet import functional as F
from capsnet.analysis.reconstruction import decoder_of
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network, evaluation_mode

__all__ = ["Threshold", "auroc", "reconstruction_errors", "threshold_for"]


@dataclass(frozen=True)
class Threshold:
    """Above which reconstruction error an input is flagged.

    Attributes:
        value: sum of squared differences over the pixels of an image, intensities in [0, 1].
        false_alarm_rate: share of the images it was set on that lie above it, in (0, 1).
        images: number of those images.
        split: which they were: `validation`, or `train` where none were held out (then the rate on new images is
            higher).
    """

    value: float
    false_alarm_rate: float
    images: int
    split: str

    def share_above(self, errors: Float[Tensor, "n"]) -> float:
        """Share of these reconstruction errors that are flagged."""
        return float((errors > self.value).double().mean())


@torch.inference_mode()
def reconstruction_errors(
    network: Network, images: Shaped[Tensor, "batch channels height width"], *, batch_size: int = 256
) -> Float[Tensor, "batch"]:
    """Sum of squared differences between each image and its reconstruction from the winning capsule.

    Images are on the network's device, of intensities in [0, 1], or 0..255 where they are `uint8`.

    Raises:
        InputError: no decoder, or images of another shape.
    """
    network, _ = decoder_of(network)
    with evaluation_mode(network), constant_weights():
        errors = []
        for part in torch.split(images, batch_size):
            seen = to_float(part) if part.dtype == torch.uint8 else part
            errors.append(F.reconstruction_loss(network(seen).reconstruction, seen))
        return torch.cat(errors)


def threshold_for(errors: Float[Tensor, "n"], *, false_alarm_rate: float = 0.05, split: str) -> Threshold:
    """The threshold that flags at most this share, in (0, 1), of known images, at least one, with these errors.

    Raises:
        InputError: a rate outside (0, 1), or no errors.
    """
    if not 0 < false_alarm_rate < 1:
        raise InputError(f"false_alarm_rate must be in (0, 1); got {false_alarm_rate:g}")
    if len(errors) == 0:
        raise InputError("errors must be those of at least one image; got none")
    flagged = int(false_alarm_rate * len(errors) + 1e-9)  # a rate of 0.05 is a little more than 1/20
    value = float(errors.sort(descending=True).values[flagged])
    return Threshold(value, false_alarm_rate, len(errors), split)


def auroc(known: Float[Tensor, "n"], unknown: Float[Tensor, "m"]) -> float:
    """Area under the ROC curve: the chance that an unknown image's error is above a known one's, ties half.

    In [0, 1]; 0.5 is guessing. Neither side may be empty.
    """
    order = known.double().sort().values
    unknown = unknown.double().contiguous()
    below = torch.searchsorted(order, unknown, side="left")
    not_above = torch.searchsorted(order, unknown, side="right")
    return float((below + not_above).double().mean() / (2 * len(order)))
