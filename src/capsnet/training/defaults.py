"""What a run's options are that its configuration leaves open: the paper's, or what images of one's own need.

Three epochs are enough for tens of thousands of images, and are three steps for thirty. And the paper's primary
capsules fit 1,152 votes for ten classes: the first step of Adam moves all of them by the same sign, and where a class
capsule adds up more votes, its length is then 1 for every image, where squash has no gradient. Uniform couplings over
the capsule types, as in the first author's code, keep the primary capsules short.

Of images of one's own the best weights on the validation images are kept. Not where the same images are tested at the
end: the smallest of many errors is too low an estimate of any.
"""

import math
from dataclasses import replace
from typing import Any

from capsnet.checkpoints import pretrained
from capsnet.config import Config, open_values, with_defaults
from capsnet.data import Dataset, available
from capsnet.errors import InputError
from capsnet.models import CapsuleNetwork
from capsnet.training.prepare import augmentation_of
from capsnet.training.schedule import steps_of

__all__ = ["as_begun", "resolved", "told"]

FEWEST_STEPS = 200
"""Steps after which 2 to 100 classes of 10 images each were well above chance (`tests/test_training_defaults.py`)."""
MOST_VOTES = 1152 / 10
"""Primary capsules for each class of the paper's network. With 1.8 times as many, and images without black ground, it
stayed at chance for 40 steps and longer; with uniform couplings it had no training image wrong after 21."""


def resolved(config: Config, dataset: Dataset) -> Config:
    """`config` with its open options (`config.open_values`) chosen for these images; what is given stays.

    Images of a published name get what such sets always got.

    Raises:
        InputError: an option that needs validation images, of which there are none; or see `pretrained.outline`.
    """
    if dataset.validation is None:
        for name in ("stop_at", "patience"):
            if (value := getattr(config, name)) is not None:
                raise InputError(f"{name} must be given with validation images to judge by; got {value} without any")
        if config.keep == "best":
            raise InputError("keep must be last without validation images to judge by; got best")
    if dataset.name in available():
        return with_defaults(config)
    usual, chosen = open_values(config.preset, config.model), dict[str, Any]()
    if config.keep is None:
        chosen["keep"] = "last" if dataset.validation is None or dataset.tested == "validation" else "best"
    if config.epochs is None:
        steps = steps_of(config, len(dataset.train))
        epochs = max(usual["epochs"], math.ceil(FEWEST_STEPS / steps))
        chosen["epochs"] = epochs
        if epochs > usual["epochs"] and not config.lr_decay_steps and config.schedule == "exponential":
            chosen["lr_decay_steps"] = math.ceil(epochs * steps / usual["epochs"])
    if getattr(config.options, "primary_scale", 1) is None:
        chosen["primary_scale"] = 0.0 if _votes(config, dataset) > MOST_VOTES else usual["primary_scale"]
    if config.augment is None:
        read = dataset.preprocessing is not None  # from files, or what a program held
        chosen["augment"] = "photo" if read and dataset.image_shape[0] == 3 else usual["augment"]
    return config.changed(**chosen)


def as_begun(config: Config) -> Config:
    """The configuration of a run that goes on: one that does not say which weights it keeps keeps the last ones."""
    return config if config.keep else replace(config, keep="last")


def told(config: Config, chosen: Config, dataset: Dataset) -> str | None:
    """One line on what `resolved` chose that is not the paper's, and on what photo leaves off; None where all is."""
    parts, usual = [], open_values(config.preset, config.model)
    if config.epochs is None and chosen.epochs != usual["epochs"]:
        parts.append(f"--epochs {chosen.epochs}, at least {FEWEST_STEPS} steps for few images")
    given, resolved_ = (getattr(one.options, "primary_scale", 1) for one in (config, chosen))
    if given is None and resolved_ != usual["primary_scale"]:
        parts.append("--primary-scale 0, for many capsules and few classes")
    about = augmentation_of(chosen, dataset)
    if config.augment is None and chosen.augment != usual["augment"]:
        parts.append(f"--augment {chosen.augment}, for images in colour: {about}")
    if config.augment == "photo" and not about.flip:
        parts.append(f"--augment photo without flip, for images in grey (--flip mirrors them): {about}")
    return f"chosen for these images: {'; '.join(parts)}" if parts else None


def _votes(config: Config, dataset: Dataset) -> float:
    """Votes that each class capsule gets; 0 where there are no capsules."""
    shape, classes = dataset.image_shape, len(dataset.classes)
    network = pretrained.outline(config.model, image_shape=shape, num_classes=classes, **vars(config.options))
    return network.in_capsules / classes if isinstance(network, CapsuleNetwork) else 0.0
