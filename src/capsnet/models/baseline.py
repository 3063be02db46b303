"""The convolutional baseline of Sabour, Frosst, Hinton 2017, Section 5."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.models.network import Network, Output

if TYPE_CHECKING:
    from capsnet.config import Config

__all__ = ["ConvNet", "baseline", "widths"]


class ConvNet(Network):
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
        logits: Tensor = self.layers(F.per_image_standardize(images) if self.standardize else images)
        return Output(logits.float() if logits.dtype != torch.float64 else logits)

    def presence(self, output: Output) -> Float[Tensor, "batch classes"]:
        """Softmax of the logits, or where images show several objects their sigmoid."""
        return output.scores.softmax(-1) if self.objects_per_image == 1 else output.scores.sigmoid()

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], config: "Config"
    ) -> Float[Tensor, "batch"]:
        """Cross-entropy; where images show several objects that of a sigmoid for each class (Section 6)."""
        if labels.ndim == 1:
            return nn.functional.cross_entropy(output.scores, labels, reduction="none")
        present = self.multi_hot(labels).to(output.scores.dtype)
        each = nn.functional.binary_cross_entropy_with_logits(output.scores, present, reduction="none")
        return each.sum(-1)

    def features(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """The last hidden layer."""
        self.check_images(images)
        features: Tensor = self.layers[:-1](F.per_image_standardize(images) if self.standardize else images)
        return features.float()


def baseline(
    image_shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    standardize: bool = False,
) -> ConvNet:
    """The paper's convolutional baseline (Section 5): three 5x5 convolutions and two fully connected layers.

    256, 256 and 128 channels with stride 1, then 328 and 192 units, then dropout and one logit a class. The paper says
    neither padding nor dropout rate; its 35.4 M parameters on MNIST are those of padding `same` (35,445,522), and 0.5
    is the customary rate. There is no pooling, so the first fully connected layer grows with the image's area.

    Args:
        image_shape: channels, height and width.
        num_classes: number of logits.
        width: factor on all these channels and units.
        dropout: rate before the last layer.
        standardize: give each image mean 0 and standard deviation 1 first.

    Raises:
        InputError: a dropout rate outside [0, 1), or a width not above 0.
    """
    one, two, three, four, five = widths((256, 256, 128, 328, 192), width, dropout)
    channels, rows, columns = image_shape
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((channels, one), (one, two), (two, three)):
        layers += [nn.Conv2d(fan_in, fan_out, 5, padding="same"), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(three * rows * columns, four), nn.ReLU(), nn.Linear(four, five), nn.ReLU()]
    return ConvNet(
        nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(five, num_classes)), image_shape, standardize=standardize
    )


def widths(full: tuple[int, ...], width: float, dropout: float) -> list[int]:
    """Widths of a baseline's layers."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1); got {dropout}")
    if not 0 < width < float("inf"):
        raise InputError(f"width must be above 0; got {width}")
    return [max(1, round(width * size)) for size in full]
