"""The convolutional baseline of Sabour, Frosst, Hinton 2017, Section 5."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.models.network import Logits, Output
from capsnet.options.schema import FRACTION, POSITIVE

__all__ = ["ConvNet", "Options", "build", "widths"]


@dataclass(frozen=True)
class Options:
    """Options of a baseline network."""

    width: Annotated[float, POSITIVE] = 1.0
    """Factor on the number of channels and units of all layers."""
    dropout: Annotated[float, FRACTION] = 0.5
    """Dropout rate before the last layer."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1, as the first author's code does for CIFAR-10."""


class ConvNet(Logits):
    """A plain stack of layers whose output is one logit per class."""

    narrower = "a smaller --width"

    def __init__(self, layers: nn.Sequential, image_shape: tuple[int, int, int], *, standardize: bool = False) -> None:
        super().__init__()
        self.image_shape, self.standardize = image_shape, standardize
        self.layers = layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch *objects"] | None = None
    ) -> Output:
        """Logits of `images` (intensities in [0, 1]); `labels` are not needed.

        Raises:
            InputError: images of another shape than the network was built for.
        """
        self.check_images(images)
        logits: Tensor = self.layers(self.standardized(images))
        return Output(F.at_least_float32(logits))

    def features(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """The last hidden layer."""
        self.check_images(images)
        features: Tensor = self.layers[:-1](self.standardized(images))
        return features.float()


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> ConvNet:
    """The baseline with new weights: three 5x5 convolutions and two fully connected layers.

    256, 256 and 128 channels with stride 1, then 328 and 192 units, then dropout and one logit a class. The paper says
    neither padding nor dropout rate; its 35.4 M parameters on MNIST are those of padding `same` (35,445,522), and 0.5
    is the customary rate. There is no pooling, so the first fully connected layer grows with the image's area.

    Args:
        image_shape: channels, height and width.
        num_classes: number of logits.
        options: width, dropout, standardisation.
    """
    one, two, three, four, five = widths((256, 256, 128, 328, 192), options.width)
    channels, rows, columns = image_shape
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((channels, one), (one, two), (two, three)):
        layers += [nn.Conv2d(fan_in, fan_out, 5, padding="same"), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(three * rows * columns, four), nn.ReLU(), nn.Linear(four, five), nn.ReLU()]
    return ConvNet(
        nn.Sequential(*layers, nn.Dropout(options.dropout), nn.Linear(five, num_classes)),
        image_shape,
        standardize=options.standardize,
    )


def widths(full: tuple[int, ...], width: float) -> list[int]:
    """Channels and units of a baseline's layers."""
    return [max(1, round(width * size)) for size in full]
