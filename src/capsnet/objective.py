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

__all__ = ["Losses", "Objective"]


class Losses(NamedTuple):
    """Losses of a batch, one number for each example, and what was predicted.

    Attributes:
        total: what is minimised, `[batch]`.
        classification: scaled margin loss, or cross-entropy for a network without capsules, `[batch]`.
        reconstruction: sum of squared pixel errors, unweighted, `[batch]`; 0 without a decoder.
        output: the network's Output.
    """

    total: Tensor
    classification: Tensor
    reconstruction: Tensor
    output: Output


class Objective(nn.Module):
    """`margin_scale * margin loss + reconstruction_weight * sum of squared errors`, or cross-entropy.

    In training the decoder sees the capsule of the label (`mask="label"`, Section 4.1); in evaluation always the
    longest.
    """

    def __init__(self, network: Network, config: Config) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]) -> Losses:
        """Losses of `images` (intensities in [0, 1]) whose true classes are `labels`."""
        config = self.config
        by_label = self.training and config.mask == "label"
        output: Output = self.network(images, labels if by_label else None)
        with F.full_precision(images.device):
            if output.pose is None:
                classification = nn.functional.cross_entropy(output.scores, labels, reduction="none")
            else:
                presence = nn.functional.one_hot(labels, output.scores.shape[-1]).to(output.scores.dtype)
                classification = config.margin_scale * F.margin_loss(
                    output.scores,
                    presence,
                    m_pos=config.m_pos,
                    m_neg=config.m_neg,
                    down_weight=config.down_weight,
                )
            if output.reconstruction is None:
                return Losses(classification, classification, torch.zeros_like(classification), output)
            reconstruction = F.reconstruction_loss(output.reconstruction, images)
            total = classification + config.reconstruction_weight * reconstruction
            return Losses(total, classification, reconstruction, output)
