"""ResNet-20 of He, Zhang, Ren, Sun (CVPR 2016, arXiv 1512.03385, Section 4.2), the control of capsule heads."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.layers import BatchNorm
from capsnet.models.baseline import ConvNet, widths
from capsnet.options.schema import AT_LEAST_1, POSITIVE

__all__ = [
    "LARGE_SIDE",
    "PRESETS",
    "BasicBlock",
    "Options",
    "ResidualStages",
    "build",
    "convolution",
    "residual_stages",
]

PRESETS: dict[str, dict[str, Any]] = {
    "authors": {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "steps",
        "lr_milestones": (0.5, 0.75),
        "lr_decay": 0.1,
        "lr_decay_steps": 0,
        "margin_scale": 1.0,  # these two not as of capsnet
    }
}
"""`authors`: the recipe for CIFAR-10 (Section 4.2): momentum 0.9 and batches of 128, which are the defaults, and a rate
that falls to a tenth after 32,000 and 48,000 of 64,000 steps. On 45,000 images these are `--epochs 182`; the images are
moved and mirrored, `--shift 4 --flip`. The paper also subtracts the mean of each pixel, for which there is no option.
"""
LARGE_SIDE = 64
"""Pixels of the shorter side up to which the first convolution looks at every pixel, as for CIFAR-10."""


@dataclass(frozen=True)
class Options:
    """Options of the residual network."""

    width: Annotated[float, POSITIVE] = 1.0
    """Factor on the number of channels of all layers, which are 16, 32 and 64."""
    blocks: Annotated[int, AT_LEAST_1] = 3
    """Number of blocks of each of the three stages; the network has 6 times as many layers, and two."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to a shortcut, then ReLU (Figure 2 of the paper).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: step of the first convolution.
        shortcut: what is added where the output has another size. `identity`: the input at every `stride`-th place,
            with zeros in the new channels (option A of the paper, no parameters); `projection`: a 1x1 convolution with
            batch normalisation (option B).

    Weights:
        convolutions without bias, normal as He et al. 2015 start them (fan out); batch normalisations 1 and 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, shortcut: Literal["identity", "projection"]
    ) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.norm1 = BatchNorm(out_channels)
        self.conv2 = convolution(out_channels, out_channels, 3, 1)
        self.norm2 = BatchNorm(out_channels)
        self.projection: nn.Module | None = None
        if shortcut == "projection" and (stride > 1 or self.new_channels):
            self.projection = nn.Sequential(convolution(in_channels, out_channels, 1, stride), BatchNorm(out_channels))

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch out _ _"]:
        """The block's output for `x`."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))

    def shortcut(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch out _ _"]:
        """What the two convolutions are added to."""
        if self.projection is not None:
            projected: Tensor = self.projection(x)
            return projected
        if self.stride > 1:
            x = x[..., :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x


class ResidualStages(nn.Sequential):
    """Layers that keep the channels last in memory, which takes a sixth less time on a CPU; see `residual_stages`."""

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out rows columns"]:
        """The feature map of `images`."""
        first, *others = self
        x = _channels_last(first(_channels_last(images)))
        for layer in others:
            x = layer(x)
        return x


def _channels_last(x: Tensor) -> Tensor:
    return x if F.is_transformed() else x.contiguous(memory_format=torch.channels_last)  # torch.func knows no formats


def residual_stages(
    image_shape: tuple[int, int, int],
    channels: tuple[int, ...] = (16, 32, 64),
    depths: tuple[int, ...] = (3, 3, 3),
    *,
    shortcut: Literal["identity", "projection"] = "identity",
) -> "ResidualStages":
    """A 3x3 convolution and stages of blocks, each stage but the first at half of the size: 269,072 parameters.

    Images of more than 64 pixels on their shorter side first go through the 7x7 convolution of stride 2 and the pooling
    of stride 2 that the paper has for ImageNet, in place of the 3x3 convolution.

    Args:
        image_shape: channels, height and width.
        channels: of each stage.
        depths: blocks of each stage.
        shortcut: see `BasicBlock`.

    Returns:
        Images to a feature map `[batch, channels[-1], rows, columns]` of a quarter of their height and width with three
        stages, of a sixteenth if they are large.
    """
    large = min(image_shape[1:]) > LARGE_SIDE
    first = convolution(image_shape[0], channels[0], *((7, 2) if large else (3, 1)))
    stages: OrderedDict[str, nn.Module] = OrderedDict(conv=first, norm=BatchNorm(channels[0]), relu=nn.ReLU())
    if large:
        stages["pool"] = nn.MaxPool2d(3, 2, padding=1)
    for k, ((before, width), count) in enumerate(zip(pairwise((channels[0], *channels)), depths, strict=True)):
        stage = [BasicBlock(before, width, stride=1 if k == 0 else 2, shortcut=shortcut)]
        stage += [BasicBlock(width, width, stride=1, shortcut=shortcut) for _ in range(count - 1)]
        stages[f"stage{k + 1}"] = nn.Sequential(*stage)
    return ResidualStages(stages)


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """A convolution without bias whose output has `ceil(size / stride)` places, as He et al. 2015 start it."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    if not layer.weight.is_meta:  # where `normal_` changes nothing, and imports the compiler in two seconds
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> ConvNet:
    """ResNet-20 with new weights: 269,722 parameters for CIFAR-10 (the paper: 0.27 M).

    Residual stages, the mean of each channel over all places, and one logit a class; the loss is cross-entropy.

    Args:
        image_shape: channels, height and width.
        num_classes: number of logits.
        options: width, blocks, standardisation.
    """
    channels = tuple(widths((16, 32, 64), options.width))
    layers = OrderedDict[str, nn.Module](
        backbone=residual_stages(image_shape, channels, (options.blocks,) * 3),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(channels[-1], num_classes),
    )
    return ConvNet(nn.Sequential(layers), image_shape, standardize=options.standardize)
