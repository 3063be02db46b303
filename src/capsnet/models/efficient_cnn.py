"""The convolutions of Efficient-CapsNet (Mazzia et al. 2021) with a linear layer in place of capsules, a control."""

import math
from collections import OrderedDict

from torch import nn

from capsnet.models.baseline import ConvNet
from capsnet.models.efficient_capsnet import StemOptions as Options
from capsnet.models.efficient_capsnet import stem_of

__all__ = ["Options", "build"]


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> ConvNet:
    """The network with new weights: 234,378 parameters for MNIST.

    One logit a class from all places and channels of the last convolution; the loss is cross-entropy.

    Args:
        image_shape: channels, height and width.
        num_classes: number of logits.
        options: sizes.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    stem, channels, size = stem_of(image_shape, options)
    layers = OrderedDict[str, nn.Module](
        stem=stem, flatten=nn.Flatten(), head=nn.Linear(channels * math.prod(size), num_classes)
    )
    return ConvNet(nn.Sequential(layers), image_shape, standardize=options.standardize)
