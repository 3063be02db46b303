"""The convolutional baseline of Sabour, Frosst, Hinton 2017 for overlapping digits, Section 6.2."""

from torch import nn

from capsnet.errors import InputError
from capsnet.models.baseline import ConvNet, Options, widths

__all__ = ["Options", "build"]


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> ConvNet:
    """The baseline with new weights: two convolutions, each with pooling.

    512 channels of 9x9 and 256 of 5x5, each followed by 2x2 pooling, then 1,024 units, dropout, and one logit a class.
    Its 24.56 M parameters on MultiMNIST are those of padding `same` (24,563,978). Of affNIST the paper says "a
    traditional convolutional model (with MaxPooling and DropOut)" only: this one, at a `width` that gives as many
    parameters as the capsules have. The paper mentions no dropout on MultiMNIST: there, `dropout=0`.

    Args:
        image_shape: channels, height and width, at least 4 x 4.
        num_classes: number of logits.
        options: width, dropout, standardisation.

    Raises:
        InputError: an image too small to pool twice.
    """
    one, two, three = widths((512, 256, 1024), options.width)
    channels, rows, columns = image_shape
    if min(rows, columns) < 4:
        raise InputError(f"images of baseline-multimnist must be at least 4 x 4 pixels; got {rows} x {columns}")
    layers = nn.Sequential(
        nn.Conv2d(channels, one, 9, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(one, two, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(two * (rows // 4) * (columns // 4), three),
        nn.ReLU(),
        nn.Dropout(options.dropout),
        nn.Linear(three, num_classes),
    )
    return ConvNet(layers, image_shape, standardize=options.standardize)
