"""What a table says of a trained network beside its test error: a column each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from capsnet.config import Config
from capsnet.data import Split
from capsnet.data.dataset import to_float
from capsnet.data.sets import affnist_generated
from capsnet.evaluation import predict_split
from capsnet.evaluation.adversarial import attack_rates
from capsnet.evaluation.ensemble import Ensemble, ensemble_scores
from capsnet.evaluation.ood import auroc
from capsnet.evaluation.statistics import summarise
from capsnet.experiments.plan import MeasureName
from capsnet.models import Network

__all__ = ["MEASURES", "SHIFTS", "Measure"]

ATTACKED = 1_000
EPSILON = 0.1
STEPS = 10
SHIFTS = 1
VIEWS = (2 * SHIFTS + 1) ** 2
SEED = 0


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        head: over it.
        said: what it is, under the table.
        digits: after the point of a cell.
        of: its value, in `unit`, for a network, the configuration of its training, its test images of one object each,
            and those of `other`.
        other: data set whose test images it takes beside; None if none.
        unit: percent, or empty for a share.
    """

    head: str
    said: str
    digits: int
    of: Callable[..., float]
    other: str | None = None
    unit: str = " %"

    def cell(self, values: Sequence[float]) -> str:
        """Mean and standard deviation of what several seeds have; empty of none."""
        if not values:
            return ""
        found = summarise(values)
        spread = "" if found.sd is None else f" ± {found.sd:.{self.digits}f}"
        return f"{found.mean:.{self.digits}f}{spread}{self.unit}"


def _transformed(network: Network, _: Config, split: Split) -> float:
    wrong = predict_split(network, affnist_generated.in_place(split, seed=SEED)).wrong
    return 100 * float(wrong.double().mean())


def _attacked(network: Network, config: Config, split: Split) -> float:
    device = next(network.parameters()).device
    images, labels = to_float(split.images[:ATTACKED]).to(device), split.labels[:ATTACKED].to(device)
    rates = attack_rates(network, images, labels, attack="pgd", epsilon=EPSILON, steps=STEPS, seed=SEED, config=config)
    return 100 * rates.wrong_after / rates.images


def _viewed(network: Network, _: Config, split: Split) -> float:
    return Ensemble.of(ensemble_scores([network], split, shifts=SHIFTS), split.labels).error_percent


def _separated(network: Network, _: Config, split: Split, other: Split) -> float:
    known, unknown = (predict_split(network, images).winning for images in (split, other))
    return auroc(-known, -unknown)


MEASURES: dict[MeasureName, Measure] = {
    "affine": Measure(
        "transformed",
        "Transformed: error on the test images turned, sheared and scaled within affNIST's ranges.",
        1,
        _transformed,
    ),
    "pgd": Measure(
        "attacked",
        f"Attacked: error on the first {ATTACKED:,} test images after {STEPS} steps of PGD, epsilon {EPSILON:g}.",
        1,
        _attacked,
    ),
    "ood": Measure(
        "AUROC",
        "AUROC: how well the presence of the predicted class tells the images from Fashion-MNIST's; 0.5 is guessing.",
        3,
        _separated,
        "fashion-mnist",
        "",
    ),
    "views": Measure(
        f"{VIEWS} views",
        f"{VIEWS} views: error with the mean of the scores over all shifts of an image by up to {SHIFTS} pixel.",
        3,
        _viewed,
    ),
}
"""By the names in the files of experiments."""
