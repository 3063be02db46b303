"""How much of an image's true pose a network's last layer holds: linear regression, judged on held-out images.

Needs a data set that knows the pose of its images (`strokes`). A class capsule's dimensions are meant to say how the
entity looks (Section 2 of Sabour, Frosst, Hinton 2017), so a class's factors are read from the vector of its capsule;
for a network without capsules, from the last hidden layer. Classes are regressed apart, as a dimension means something
else in each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet.data.dataset import Split, to_float
from capsnet.errors import InputError
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network, evaluation_mode

__all__ = ["PoseExplained", "features", "pose_explained", "r2_linear"]

PENALTIES = tuple(10.0**k for k in range(-4, 3))


@dataclass(frozen=True)
class PoseExplained:
    """Held-out R2 of each pose factor.

    Attributes:
        factors: names of the factors, with units.
        classes: names of the classes.
        r2: by factor and class, all dimensions together, `[factors][classes]`; 1 is perfect, 0 no better than the
            training images' mean, below 0 worse.
        by_dimension: by factor, class and dimension, each dimension alone, `[factors][classes][dim]`.
        dim: number of dimensions.
        train_images: that the regressions were fitted on.
        test_images: that they were judged on.
    """

    factors: tuple[str, ...]
    classes: tuple[str, ...]
    r2: tuple[tuple[float, ...], ...]
    by_dimension: tuple[tuple[tuple[float, ...], ...], ...]
    dim: int
    train_images: int
    test_images: int

    def mean(self, factor: str) -> float:
        """Mean R2 of a factor over the classes."""
        return float(torch.tensor(self.r2[self.factors.index(factor)]).mean())

    def spread(self, factor: str) -> float:
        """Standard deviation of a factor's R2 over the classes (n - 1); 0 for a single class."""
        values = torch.tensor(self.r2[self.factors.index(factor)])
        return float(values.std()) if len(values) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "r2_mean_over_classes": {name: self.mean(name) for name in self.factors},
            "r2_standard_deviation_over_classes": {name: self.spread(name) for name in self.factors},
            "r2": {
                name: dict(zip(self.classes, row, strict=True)) for name, row in zip(self.factors, self.r2, strict=True)
            },
            "r2_of_each_dimension": {
                name: {label: list(row) for label, row in zip(self.classes, rows, strict=True)}
                for name, rows in zip(self.factors, self.by_dimension, strict=True)
            },
            "dimensions": self.dim,
            "train_images": self.train_images,
            "test_images": self.test_images,
        }


@torch.inference_mode()
def features(network: Network, split: Split, *, batch_size: int = 256) -> Float[Tensor, "n dim"]:
    """The last layer's representation of every image, see `Network.features`, on the CPU.

    A capsule's 16 numbers an image for CapsNet, 192 for the baseline of the paper.

    Raises:
        InputError: images of another shape.
    """
    device, found = next(network.parameters()).device, []
    with evaluation_mode(network), constant_weights():
        for start in range(0, len(split), batch_size):
            part = slice(start, start + batch_size)
            inputs, labels = to_float(split.images[part].to(device)), split.labels[part].to(device)
            found.append(network.features(inputs, labels).cpu())
    return torch.cat(found)


def pose_explained(network: Network, train: Split, test: Split) -> PoseExplained:
    """Regress each pose factor on a network's last layer, class by class; fit on `train`, judge on `test`.

    Both have the same `factors`, `train` at least 2 more images of each class than the layer has dimensions, `test` at
    least 2.

    Raises:
        InputError: the images' true pose is not known, or a class has too few images.
    """
    if not train.factors or set(train.factors) != set(test.factors):
        raise InputError("data must know the true pose of its images, as strokes does; these images have no factors")
    x_train, x_test = (features(network, split) for split in (train, test))
    y_train, y_test = (torch.stack([split.factors[name] for name in train.factors], -1) for split in (train, test))
    dim, together, alone = x_train.shape[1], list[Tensor](), list[Tensor]()
    for k, label in enumerate(network.classes):
        ours, theirs = train.labels == k, test.labels == k
        if int(ours.sum()) < dim + 2 or int(theirs.sum()) < 2:
            raise InputError(
                f"class {label} must have at least {dim + 2} training and 2 test images for a regression on "
                f"{dim} dimensions; got {int(ours.sum())} and {int(theirs.sum())}"
            )
        fitted, held_out, targets, judged = x_train[ours], x_test[theirs], y_train[ours], y_test[theirs]
        together.append(r2_linear(fitted, targets, held_out, judged))  # [factors]
        each = [r2_linear(fitted[:, [d]], targets, held_out[:, [d]], judged) for d in range(dim)]
        alone.append(torch.stack(each, -1))  # [factors, dim]
    return PoseExplained(
        factors=tuple(train.factors),
        classes=network.classes,
        r2=tuple(map(tuple, torch.stack(together, 1).tolist())),
        by_dimension=tuple(tuple(map(tuple, rows)) for rows in torch.stack(alone, 1).tolist()),
        dim=dim,
        train_images=len(train),
        test_images=len(test),
    )


def r2_linear(
    x_train: Float[Tensor, "n dim"],
    y_train: Float[Tensor, "n targets"],
    x_test: Float[Tensor, "m dim"],
    y_test: Float[Tensor, "m targets"],
    *,
    penalties: tuple[float, ...] = PENALTIES,
) -> Float[Tensor, "targets"]:
    """Held-out coefficient of determination of a linear regression with intercept.

    `R2 = 1 - sum (y - prediction)^2 / sum (y - mean of y_train)^2` on the test examples, in float64. Ridge regression,
    its penalty chosen for each target by leaving out one training example at a time, and never zero: units that are
    hardly ever active would get coefficients that ruin the prediction where they are.

    Each target must vary over the test examples. Penalties are on the squared coefficients, as shares of the mean
    squared singular value of `x_train`.
    """
    mean, centre = x_train.double().mean(0), y_train.double().mean(0)
    a, b, y = x_train.double() - mean, x_test.double() - mean, y_train.double() - centre
    u, s, vt = torch.linalg.svd(a, full_matrices=False)  # [n, k], [k], [k, dim]; k = min(n, dim)
    left_out, predictions = [], []
    for penalty in penalties:
        energy = s.square() + penalty * s.square().mean()
        kept = torch.where(s > s[0] * 1e-12, s.square() / energy, 0)  # of each singular direction
        fitted = u @ (kept[:, None] * (u.T @ y))  # [n, targets]
        leverage = (u.square() * kept).sum(1) + 1 / len(a)  # [n]
        left_out.append(((y - fitted) / (1 - leverage)[:, None]).square().sum(0))
        predictions.append(b @ vt.T @ (torch.where(kept > 0, kept / s, 0)[:, None] * (u.T @ y)))  # [m, targets]
    best = torch.stack(left_out).argmin(0)  # [targets]
    prediction = torch.stack(predictions)[best, :, torch.arange(y.shape[1])].T  # [m, targets]
    judged = y_test.double() - centre
    r2: Tensor = 1 - (judged - prediction).square().sum(0) / judged.square().sum(0)
    return r2
