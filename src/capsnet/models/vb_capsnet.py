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
from typing import Annotated, Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet.matrix_capsules import SIDE, ConvCapsules, MatrixClassCapsules
from capsnet.models.em_capsnet import MatrixCapsNet, layers_of
from capsnet.models.network import Output
from capsnet.options import LossOptions
from capsnet.options.schema import AT_LEAST_1, SIZES, Range
from capsnet.routing import MOST_ITERATIONS, vb_evidence

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
class Options:
    """Options of matrix capsules with VB routing."""

    conv_channels: Annotated[int, AT_LEAST_1] = 64
    """Number of channels of the first convolution."""
    conv_kernel_size: Annotated[int, AT_LEAST_1] = 5
    """Kernel size of the first convolution, in pixels."""
    conv_stride: Annotated[int | None, AT_LEAST_1] = None
    """Stride of the first convolution, in pixels. Default: 2, but 4, 6, ... for images of two, three, ... times 28
    pixels."""
    padding: Literal["valid", "same"] = "valid"
    """Padding of the first convolution."""
    primary_kernel_size: Annotated[int, AT_LEAST_1] = 3
    """Kernel size of the primary capsules, in places."""
    primary_stride: Annotated[int, AT_LEAST_1] = 2
    """Stride of the primary capsules, in places."""
    capsule_types: Annotated[tuple[int, ...], SIZES] = (16,)
    """Numbers of capsule types: primary, then of each layer of convolutional capsules. Default: the network of one
    routing. That of three has 8 16 16, --capsule-kernel-sizes 3 3, --capsule-strides 2 1, --primary-kernel-size 1,
    --primary-stride 1 and --share-class-transform."""
    capsule_kernel_sizes: Annotated[tuple[int, ...], SIZES] = ()
    """Kernel size of each layer of convolutional capsules, in places."""
    capsule_strides: Annotated[tuple[int, ...], SIZES] = ()
    """Stride of each layer of convolutional capsules, in places."""
    share_class_transform: bool = False
    """Let all places share the transformation of a type to a class, and add their coordinates to the votes."""
    routing_iterations: Annotated[int, Range(1, MOST_ITERATIONS)] = 3
    """Number of routing iterations T into each layer; 1 means uniform couplings."""
    routing_slices: Literal["auto", "small", "large"] = "auto"
    """Votes in memory at once in each layer: of as many images as make 8 MiB (small) or 256 MiB (large), computed again
    for the gradient; the results are the same. auto: small on a CPU, large on a GPU."""
    reconstruction: bool = False
    """Train a decoder and add its loss. The paper has none."""
    decoder_sizes: Annotated[tuple[int, ...], SIZES] = (512, 1024)
    """Widths of the decoder's hidden layers."""
    share_decoder: bool = False
    """Let the decoder see the pose of one class capsule only, so that all classes share it (DeepCaps)."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


class VBCapsNet(MatrixCapsNet):
    """Matrix capsules whose routing is followed by batch normalisation, with cross-entropy."""

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """Cross-entropy of the logits of the activations; of a sigmoid for each class where images show several."""
        logits = output.scores.logit(LEAST)
        if labels.ndim == 2:
            present = self.multi_hot(labels).to(logits.dtype)
            return nn.functional.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(-1)
        return nn.functional.cross_entropy(logits, labels, reduction="none")


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> VBCapsNet:
    """Matrix capsules with new weights: 206,154 parameters for 2 x 32 x 32 pixels and 5 classes; three routings 68,714.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes and ways.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    routing = partial(vb_evidence, iterations=options.routing_iterations)
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
