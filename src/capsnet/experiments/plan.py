"""What each experiment trains: its rows, the papers' numbers, and how much of it a machine is given to do."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from capsnet.config import Config, preset
from capsnet.errors import InputError

__all__ = ["BUDGETS", "Experiment", "Row", "available", "experiment"]

BUDGETS = ("quick", "cpu", "full")
"""From a proof that it works, in minutes, to the published sizes."""
QUICK: dict[str, Any] = {"epochs": 1, "train_images": 1000}
TINY: dict[str, dict[str, Any]] = {
    "capsnet": {"conv_channels": 16, "capsule_types": 4, "decoder_sizes": (64, 64)},
    "baseline": {"width": 0.05},
    "baseline-multimnist": {"width": 0.05},
}
"""What makes any row small, and each network; their numbers mean nothing."""
HALF: dict[str, Any] = {"conv_channels": 128, "capsule_types": 16}
"""Half the width of both convolutions of the capsule network, a quarter of the work."""
QUARTER: dict[str, Any] = {"conv_channels": 64, "capsule_types": 8}


@dataclass(frozen=True)
class Row:
    """One line of a table: a network and its training.

    Attributes:
        key: short name, unique in its experiment.
        title: in tables.
        config: at the full budget.
        cpu: what is different at the CPU budget, beside what is for the whole experiment.
        paper: error in percent that the paper reports; None where it reports none.
        spread: its standard deviation over three trainings, in points, where the paper states it (Table 1).
        against: key of the row it is compared with.
    """

    key: str
    title: str
    config: Config
    cpu: Mapping[str, Any] = field(default_factory=dict)
    paper: float | None = None
    against: str | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Experiment:
    """Trainings that belong in one table.

    Attributes:
        name: for `capsnet reproduce`.
        title: of its table.
        short: what the overview calls it; empty where it is not in there.
        rows: what is trained.
        metric: data set whose test images the table is about.
        measure: what is counted on it, in words.
        paper_data: test images that the papers' numbers are of, where they are others.
        cpu: what is different at the CPU budget.
        cpu_says: the same in words; empty where only the number of epochs is.
        also: further data sets that every network is tested on; those that are not on this machine are left out.
        ensemble: row whose seeds are put together as one more row; its paper's number, and of how many.
        seeds: that the paper has, or that are asked for unless told otherwise.
    """

    name: str
    title: str
    short: str
    rows: tuple[Row, ...]
    metric: str
    measure: str = "test error"
    cpu: Mapping[str, Any] = field(default_factory=dict)
    cpu_says: str = ""
    also: tuple[str, ...] = ()
    paper_data: str = ""
    ensemble: tuple[str, float | None] | None = None
    seeds: int = 3

    def row(self, key: str) -> Row:
        """The row of this key.

        Raises:
            InputError: there is none.
        """
        keys = [row.key for row in self.rows]
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"rows of {self.name} must be among {', '.join(keys)}; got {key!r}{hint}")
        return self.rows[keys.index(key)]

    def config(self, row: Row, budget: str, seed: int) -> Config:
        """What a row is trained with.

        Args:
            row: of this experiment.
            budget: one of `BUDGETS`.
            seed: of weights, order and augmentation.

        Raises:
            InputError: an unknown budget.
        """
        if budget not in BUDGETS:
            raise InputError(f"budget must be one of {', '.join(BUDGETS)}; got {budget!r}")
        tiny = {**QUICK, **TINY[row.config.model]}
        changes: dict[str, Any] = {"full": {}, "cpu": {**self.cpu, **row.cpu}, "quick": tiny}[budget]
        return replace(row.config, **changes, seed=seed, report=False)


def available() -> tuple[str, ...]:
    """Names of the experiments."""
    return tuple(one.name for one in _EXPERIMENTS)


def experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        InputError: there is none.
    """
    if name not in available():
        near = difflib.get_close_matches(name, available(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"experiment must be one of {', '.join(available())}; got {name!r}{hint}")
    return _EXPERIMENTS[available().index(name)]


_MAIN = "capsnet-3-reconstruction"
_MNIST = Config(data="mnist", validation=0, epochs=70)
"""After 66 epochs of x 0.9 the learning rate is at its floor of 1e-6."""


def _table1() -> Experiment:
    def capsules(
        iterations: int,
        reconstruction: bool,
        paper: float | None = None,
        spread: float | None = None,
        *,
        against: str | None = _MAIN,
    ) -> Row:
        drawn = "with reconstruction" if reconstruction else "without reconstruction"
        return Row(
            key=f"capsnet-{iterations}" + ("-reconstruction" if reconstruction else ""),
            title=f"CapsNet, {iterations} routing iteration{'s' * (iterations > 1)}, {drawn}",
            config=replace(_MNIST, routing_iterations=iterations, reconstruction=reconstruction),
            paper=paper,
            against=against,
            spread=spread,
        )

    return Experiment(
        name="table1",
        title="MNIST, Table 1 of Sabour et al. 2017, and other numbers of routing iterations",
        short="MNIST",
        rows=(
            capsules(3, True, 0.25, 0.005, against=None),
            capsules(3, False, 0.35, 0.036),
            capsules(1, True, 0.29, 0.011),
            capsules(1, False, 0.34, 0.032),
            Row("baseline", "Convolutional baseline", replace(_MNIST, model="baseline"), {}, 0.39, _MAIN),
            *(capsules(iterations, True) for iterations in (2, 4, 5)),
        ),
        metric="mnist",
        cpu={"epochs": 20},
    )


def _recipes() -> Experiment:
    authors = preset("authors")
    alone: dict[str, tuple[str, dict[str, Any]]] = {
        "loss-scale": ("margin loss x 0.05", {"margin_scale": authors.margin_scale}),
        "reconstruction-weight": ("reconstruction loss x 20", {"reconstruction_weight": 0.01}),
        "routing-bias": ("biases inside routing", {"routing_bias": True}),
        "primary-scale": ("primary pre-activations / 32", {"primary_scale": authors.primary_scale}),
        "detached": ("no gradient through the couplings", {"detach_routing": True}),
        "epsilon": ("epsilon of 1e-7 in squash", {"squash_epsilon": 1e-7}),
        "schedule": (
            "learning rate x 0.96 every 2,000 steps",
            {"lr_decay": authors.lr_decay, "lr_decay_steps": authors.lr_decay_steps},
        ),
        "init": ("first weights of the authors' code", {"init": authors.init}),
        "no-shift": ("no shifts", {"shift": 0}),
        "shift-4": ("shifts by up to 4 pixels", {"shift": 4}),
    }
    base = _MNIST
    return Experiment(
        name="recipes",
        title="MNIST, the paper's text and its first author's code, and each difference by itself",
        short="",
        rows=(
            Row("paper", "`paper`: the text", base),
            Row(
                "authors",
                "`authors`: the code",
                replace(authors, data="mnist", validation=0, epochs=70),
                against="paper",
            ),
            *(
                Row(key, f"`paper`, but {title}", replace(base, **changes), against="paper")
                for key, (title, changes) in alone.items()
            ),
        ),
        metric="mnist",
        cpu={"epochs": 10},
    )


def _multimnist() -> Experiment:
    base = Config(data="multimnist", validation=0, epochs=100, lr_decay_steps=4690)  # "10 times larger" than an epoch
    return Experiment(
        name="multimnist",
        title="MultiMNIST, two overlapping digits in an image (Section 6)",
        short="MultiMNIST, exact set",
        rows=(
            Row("capsnet-3", "CapsNet, 3 routing iterations", base, HALF, 5.2, "baseline"),
            Row(
                "capsnet-1", "CapsNet, 1 routing iteration", replace(base, routing_iterations=1), HALF, 7.5, "baseline"
            ),
            Row(
                "baseline",
                "Convolutional baseline with pooling",
                replace(base, model="baseline-multimnist", dropout=0.0),
                {"width": 0.5},
                8.1,
            ),
        ),
        metric="multimnist",
        measure="exact-set error: not exactly both digits found",
        cpu={"epochs": 4, "lr_decay_steps": 0},
        cpu_says="both convolutions of the capsule networks and all layers of the baseline of half the width",
    )


def _affnist() -> Experiment:
    base = Config(data="expanded-mnist", epochs=50, stop_at=0.77)  # "99.23 % accuracy on the expanded MNIST test set"
    return Experiment(
        name="affnist",
        title="affNIST, digits under small affine transformations after training without (Section 5.2)",
        short="affNIST, generated",
        rows=(
            Row("capsnet", "CapsNet", base, QUARTER, 21.0, "baseline"),
            Row(
                "baseline",
                "Convolutional network with pooling and dropout",
                replace(base, model="baseline-multimnist", width=0.675),
                {"width": 0.37},
                34.0,
            ),
        ),
        metric="affnist-generated",
        measure="test error on generated transformations",
        cpu={"epochs": 10, "stop_at": 1.5},
        cpu_says="convolutions of a quarter of the width, a baseline of as many parameters, each trained to the first "
        "epoch with at least 98.5 % of 5,000 validation images right, 10 at most",
        also=("affnist-generated", "affnist"),
        paper_data="affnist",
    )


def _cifar10() -> Experiment:
    config = Config(
        data="cifar10",
        validation=0,
        epochs=100,
        crop=24,
        shift=0,
        flip=True,
        brightness=63 / 255,
        contrast=0.8,
        standardize=True,
        capsule_types=64,
        padding="same",
        leaky=True,
        reconstruction=False,
    )
    return Experiment(
        name="cifar10",
        title="CIFAR-10, alone and as an ensemble (Section 7)",
        short="CIFAR-10",
        rows=(Row("capsnet", "CapsNet, one network", config),),
        metric="cifar10",
        cpu={"epochs": 5, "conv_channels": 64, "capsule_types": 16},
        cpu_says="both convolutions of a quarter of the width",
        ensemble=("capsnet", 10.6),
        seeds=7,
    )


def _others() -> tuple[Experiment, ...]:
    garments = Config(data="fashion-mnist", flip=True, epochs=70)
    numbers = Config(
        data="svhn",
        validation=0,
        epochs=70,
        conv_channels=64,
        capsule_types=16,
        primary_dim=6,
        class_dim=8,
        reconstruction=False,
    )
    toys = Config(data="smallnorb", validation=0, epochs=70, image_size=48, crop=32, shift=0)
    return (
        Experiment(
            "fashion-mnist",
            "Fashion-MNIST, which came after the paper",
            "Fashion-MNIST",
            (Row("capsnet", "CapsNet, mirrored images", garments),),
            "fashion-mnist",
            cpu={"epochs": 20},
        ),
        Experiment(
            "svhn",
            "Street View House Numbers, 73,257 training images (Section 7)",
            "SVHN",
            (Row("capsnet", "CapsNet, smaller", numbers, paper=4.3),),
            "svhn",
            cpu={"epochs": 5},
        ),
        Experiment(
            "smallnorb",
            "smallNORB, toys in other poses than those of training (Section 7)",
            "smallNORB",
            (Row("capsnet", "CapsNet", toys, paper=2.7),),
            "smallnorb",
            cpu={"epochs": 5},
        ),
    )


_EXPERIMENTS = (_table1(), _recipes(), _multimnist(), _affnist(), _cifar10(), *_others())
