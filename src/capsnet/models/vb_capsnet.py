"""Matrix capsules with variational Bayes routing (De Sousa Ribeiro, Leontidis, Kollias, AAAI 2020, arXiv 1905.11455).

Sizes and layers are those of the authors' code (https://github.com/fabio-deep/Variational-Capsule-Routing). Its loss is
not: it gives activations, which are probabilities, to a cross-entropy that takes logits, so that the loss of 5 classes
cannot fall below 0.905. Here the cross-entropy takes the logits. Two facts of the published network are kept: the
normalisation of the activations takes away what `beta_u` and `beta_a` add, so these matter in evaluation only; and it
makes what is learned of an image depend on its batch.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.matrix_capsules import SIDE, ConvCapsules, MatrixClassCapsules
from capsnet.models.em_capsnet import LayerOptions, MatrixCapsNet, layers_of
from capsnet.models.network import Output
from capsnet.options import LossOptions
from capsnet.options.schema import AT_LEAST_1, SIZES
from capsnet.routing import vb_routing

__all__ = ["PRESETS", "Options", "VBCapsNet", "build"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"lr_decay": 0.96, "lr_decay_steps": 20_000},
    "fast": {"batch_size": 64, "lr": 0.005},
}
"""`paper`: Adam at 0.001 and batches of 128, which are the defaults, and EM's decay, by the authors' answer; their
300 epochs are given as `--epochs 300`."""
LEAST = 1e-6
"""Activations are at least this far from 0 and 1 where logits are made of them."""


@dataclass(frozen=True)
class Options(LayerOptions):
    """Options of matrix capsules with VB routing."""

    capsule_types: Annotated[tuple[int, ...], SIZES] = (16,)
    """Numbers of capsule types: primary, then of each layer of convolutional capsules. Default: the network of one
    routing. That of three has 8 16 16, --capsule-kernel-sizes 3 3, --capsule-strides 2 1, --primary-kernel-size 1,
    --primary-stride 1 and --share-class-transform."""
    capsule_kernel_sizes: Annotated[tuple[int, ...], SIZES] = ()
    capsule_strides: Annotated[tuple[int, ...], SIZES] = ()
    primary_kernel_size: Annotated[int, AT_LEAST_1] = 3
    """Kernel size of the primary capsules, in places."""
    primary_stride: Annotated[int, AT_LEAST_1] = 2
    """Stride of the primary capsules, in places."""
    share_class_transform: bool = False
    """Let all places share the transformation of a type to a class, and add their coordinates to the votes."""


class VBCapsNet(MatrixCapsNet):
    """Matrix capsules whose routing is followed by batch normalisation, with cross-entropy."""

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """Cross-entropy of the logits of the activations; of a sigmoid for each class where images show several."""
        return F.cross_entropy(output.scores.logit(LEAST), labels)


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> VBCapsNet:
    """Matrix capsules with new weights: 206,154 parameters for 2 x 32 x 32 pixels and 5 classes; three routings 68,714.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes and ways.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    routing = partial(vb_routing, iterations=options.routing_iterations, before_sigmoid=True)
    layers = layers_of(
        image_shape,
        num_classes,
        options,
        routing=routing,
        class_routing=routing,
        normalize=True,
        primary_kernel_size=options.primary_kernel_size,
        primary_stride=options.primary_stride,
        share=options.share_class_transform,
    )
    for layer in (*layers.capsules, layers.class_capsules):
        if isinstance(layer, ConvCapsules | MatrixClassCapsules):
            seen, _, types, _ = layer.weight.shape
            fans = SIDE**2 * (seen + seen // layer.in_types * types)
            bound = math.sqrt(6 / fans)
            nn.init.uniform_(layer.weight, -bound, bound)
    return VBCapsNet(*layers, image_shape, standardize=options.standardize, iterations=options.routing_iterations)
