"""What a network says of every image of a split: scores, predictions, how sure and how right it was."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capsnet import functional as F
from capsnet.data.dataset import Split, to_float
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network, evaluation_mode, inference_batch

__all__ = ["Calibration", "Outcomes", "calibration", "outcomes"]


class Outcomes(NamedTuple):
    """One line for each image of a split, on the CPU.

    Attributes:
        scores: `[n, classes]`: lengths of the class capsules, or the softmax of a network without capsules; the
            largest is the prediction. (Of images of several objects the sigmoid.)
        labels: true classes `[n]`; `[n, k]` in rising order where an image shows k objects.
        predictions: as `labels`.
        errors: sum of squared differences between each image and its reconstruction from the longest capsule `[n]`;
            None without a decoder, and for images of several objects.
    """

    scores: Tensor
    labels: Tensor
    predictions: Tensor
    errors: Tensor | None

    @property
    def wrong(self) -> Tensor:
        """Whether the prediction is wrong, `bool [n]`; of several objects, unless it is exactly the true set."""
        wrong = self.predictions != self.labels
        return wrong if wrong.ndim == 1 else wrong.any(-1)

    @property
    def winning(self) -> Tensor:
        """The largest score of each image `[n]`."""
        return self.scores.amax(-1)

    @property
    def confusion(self) -> Tensor:
        """Number of images by true class (rows) and predicted class (columns)."""
        classes = self.scores.shape[-1]
        return torch.bincount(self.labels * classes + self.predictions, minlength=classes**2).view(classes, classes)


@torch.inference_mode()
def outcomes(network: Network, split: Split, *, batch_size: int | None = None) -> Outcomes:
    """Run a network over a split, on the device where its weights are.

    Args:
        network: put in evaluation mode for the time.
        split: images of the shape it was built for, of as many objects each.
        batch_size: images at a time; default: see `models.inference_batch`.

    Raises:
        InputError: images of another shape or of another number of objects.
    """
    network.check_labels(split.labels)
    device, objects = next(network.parameters()).device, network.objects
    scores, errors = [], []
    with evaluation_mode(network), constant_weights():
        for part in torch.split(split.images, batch_size or inference_batch(network)):
            images = to_float(part.to(device))
            output = network(images)
            sure = output.scores.softmax(-1) if objects == 1 else output.scores.sigmoid()
            scores.append((output.scores if output.pose is not None else sure).cpu())
            if output.reconstruction is not None and objects == 1:
                errors.append(F.reconstruction_loss(output.reconstruction, images).cpu())
    all_scores, labels = torch.cat(scores), split.labels.cpu()
    if objects > 1:
        return Outcomes(all_scores, labels.sort(-1).values, all_scores.topk(objects).indices.sort(-1).values, None)
    return Outcomes(all_scores, labels, all_scores.argmax(-1), torch.cat(errors) if errors else None)


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
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    scores: tuple[float | None, ...]
    accuracies: tuple[float | None, ...]
    error: float


def calibration(winning: Float[Tensor, "n"], right: Bool[Tensor, "n"], *, bins: int = 10) -> Calibration:
    """Sort predictions by their winning score into equal bins and compare score and accuracy in each.

    Args:
        winning: largest score of each image, in [0, 1]; at least one.
        right: whether its prediction is right.
        bins: number of bins; a score on an edge belongs to the bin above it, 1 to the last.
    """
    index = (winning.double() * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).tolist()
    scores = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, winning.double()).tolist()
    rights = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double()).tolist()
    gaps = sum(abs(ours - theirs) for ours, theirs in zip(rights, scores, strict=True))
    return Calibration(
        edges=tuple(k / bins for k in range(bins + 1)),
        counts=tuple(counts),
        scores=tuple(s / n if n else None for s, n in zip(scores, counts, strict=True)),
        accuracies=tuple(r / n if n else None for r, n in zip(rights, counts, strict=True)),
        error=gaps / len(winning),
    )
