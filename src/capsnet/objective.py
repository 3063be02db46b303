"""A network with its loss as one module: what is differentiated, in whole, by `forward`.

Mixed precision and data-parallel wrappers see `forward` only, so a training step is one call of it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.config import Config
from capsnet.models import Network, Output

__all__ = ["Batch", "Losses", "Objective", "class_weights"]


class Batch(NamedTuple):
    """What an Objective is given.

    Attributes:
        images: `float32 [batch, channels, height, width]` in [0, 1].
        labels: true classes `[batch]`, or `[batch, k]` where every image shows k objects.
        single_images: each of k objects alone, `[batch, k, channels, height, width]`, or None.
    """

    images: Tensor
    labels: Tensor
    single_images: Tensor | None = None


class Losses(NamedTuple):
    """Losses of a batch, one number for each example, and what was predicted.

    Attributes:
        total: what is minimised, `[batch]`.
        classification: scaled margin loss, or cross-entropy for a network without capsules, `[batch]`.
        reconstruction: sum of squared pixel errors, unweighted, of all objects of an image, `[batch]`; 0 without a
            decoder.
        output: the network's Output.
    """

    total: Tensor
    classification: Tensor
    reconstruction: Tensor
    output: Output

    def detached(self) -> "Losses":
        """The same without gradients, and of the output the scores and poses only: what a finished step keeps."""
        pose = self.output.pose
        output = Output(self.output.scores.detach(), pose=None if pose is None else pose.detach())
        return Losses(self.total.detach(), self.classification.detach(), self.reconstruction.detach(), output)


def class_weights(labels: Int[Tensor, "n"], classes: int) -> Float[Tensor, "classes"]:
    """Weight of the images of each class by which all classes count alike; 1 on average over the images `labels`.

    Examples:
        >>> class_weights(torch.tensor([0, 0, 0, 1]), 2)  # each image of class 1 counts three times as much
        tensor([0.6667, 2.0000])
    """
    counts = labels.bincount(minlength=classes)
    return len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1))


class Objective(nn.Module):
    """`margin_scale * margin loss + reconstruction_weight * sum of squared errors`, or cross-entropy.

    In training the decoder sees the capsule of the label (`mask="label"`, Section 4.1); in evaluation always the
    longest. Where images show k objects, the decoder draws each alone, and the cross-entropy is that of a sigmoid for
    each class (Section 6).

    Examples:
        >>> objective = Objective(create("capsnet"), Config())
        >>> objective(torch.rand(2, 1, 28, 28), torch.tensor([3, 7])).total.shape
        torch.Size([2])
    """

    def __init__(self, network: Network, config: Config) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, "batch *k"],
        single_images: Float[Tensor, "batch k channels height width"] | None = None,
    ) -> Losses:
        """Losses of a batch.

        Args:
            images: intensities in [0, 1].
            labels: their true classes, `[batch]`, or `[batch, k]` where each shows k objects.
            single_images: each of the k objects alone, in the order of the labels; needed to train their decoder.
        """
        config = self.config
        by_label = self.training and config.mask == "label"
        output: Output = self.network(images, labels if by_label else None)
        with F.full_precision(images.device):
            classification = self.network.classification_loss(output, labels, config)
            if output.reconstruction is None:
                return Losses(classification, classification, torch.zeros_like(classification), output)
            if single_images is None:
                reconstruction = F.reconstruction_loss(output.reconstruction, images)
            else:
                drawn = output.reconstruction if by_label else _by_class(output.reconstruction, output.scores)
                shown = single_images if by_label else _in_order(single_images, labels.argsort(-1))
                reconstruction = F.reconstruction_loss(drawn, shown).sum(-1)
            total = classification + config.reconstruction_weight * reconstruction
            return Losses(total, classification, reconstruction, output)


def _by_class(reconstruction: Tensor, scores: Tensor) -> Tensor:
    """Drawings of the longest capsules `[batch, k, channels, height, width]` in the order of their classes."""
    return _in_order(reconstruction, scores.topk(reconstruction.shape[1]).indices.argsort(-1))


def _in_order(images: Tensor, order: Tensor) -> Tensor:
    """`images[b, order[b, i]]` for images `[batch, k, channels, height, width]`."""
    return images.take_along_dim(order[..., None, None, None], dim=1)
