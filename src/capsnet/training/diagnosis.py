"""Why a training does not learn: it is at chance, or something is not finite; each in one line with what to change."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from capsnet.config import Config
from capsnet.models import Network
from capsnet.objective import Losses

__all__ = ["Chance", "first_not_finite"]

EARLIEST = 50
"""Steps before which a training may well be at chance; or all of them, where it has fewer."""
FEW_STEPS, FEW_IMAGES = 200, 20
FALLS = {"exponential": "--lr-decay-steps", "steps": "--lr-milestones"}
"""What changes how fast the learning rate falls; in other schedules the number of epochs does."""
ALIKE = 0.02
"""Standard deviation of a class capsule's length over a batch, below which all images look alike to it."""


class Chance:
    """Says once when a training is no better than always naming the most frequent class.

    That has an error of so many `percent`; where images show k objects of different classes, always naming any one set
    of k classes. Of classes that count alike (`balance`) it is the error of guessing: naming the most frequent class is
    then no better than naming another. Labels are `[n]` or `[n, k]`, `steps` those of each epoch.
    """

    def __init__(self, labels: Tensor, *, classes: int, objects_per_image: int, config: Config, steps: int) -> None:
        counts = labels.flatten().bincount(minlength=classes)
        single = objects_per_image == 1
        most = counts.max().item() / labels.numel() if single else 1 / math.comb(classes, objects_per_image)
        if config.balance:
            most = 1 / int((counts > 0).sum())
        self.percent = 100 * (1 - most)
        self.rarest = int(counts[counts > 0].min())
        self.config, self.steps, self.said = config, steps, False

    def line(self, row: dict[str, Any], losses: Losses | None) -> str | None:
        """What is to be said after an epoch; None where there is nothing, or it was said before.

        `row` is that of `metrics.csv`; `losses` of the last step are None where the run was resumed after it.
        """
        done = row["epoch"] * self.steps
        early = done < min(EARLIEST, (self.config.epochs or 0) * self.steps)
        if self.said or early or row["train_error_percent"] < self.percent - 1e-9:
            return None
        self.said = True
        otherwise = "guessing" if self.config.balance else "always naming the most frequent class"
        return (
            f"at chance: {row['train_error_percent']:.2f} % of the training images wrong in epoch {row['epoch']}, and "
            f"{otherwise} has {self.percent:.2f} %; likely causes: {'; '.join(self._causes(row, losses, done))}"
        )

    def _causes(self, row: dict[str, Any], losses: Losses | None, done: int) -> list[str]:
        """The likely ones first, each with the options to change."""
        config, causes = self.config, list[str]()
        if losses is not None and losses.output.pose is not None:
            scores = losses.output.scores.detach().float().cpu()
            if float(scores.min()) > config.m_pos:
                scale = "--primary-scale 0, " if getattr(config.options, "primary_scale", 0) != 0 else ""
                causes.append(
                    f"every class capsule is longer than m+ = {config.m_pos:g} for every image, where squash has "
                    f"hardly a gradient ({scale}a smaller --lr)"
                )
            elif float(scores.max()) < config.m_neg:
                scale = "--primary-scale 1, " if hasattr(config.options, "primary_scale") else ""
                causes.append(
                    f"every class capsule is shorter than m- = {config.m_neg:g} for every image, as routing divides "
                    f"among {scores.shape[-1]} classes (more --epochs, {scale}a larger --lr)"
                )
            elif len(scores) > 1 and float(scores.std(0).max()) < ALIKE:
                causes.append("all images look alike to the class capsules (more --epochs, --standardize)")
        if row["learning_rate"] < config.lr / 10:
            causes.append(
                f"the learning rate has fallen from {config.lr:g} to {row['learning_rate']:.2g} "
                f"({FALLS.get(config.schedule, '--epochs')})"
            )
        if done < FEW_STEPS:
            causes.append(f"only {done} step{'s' * (done > 1)} (more --epochs, a smaller --batch-size)")
        if self.rarest < FEW_IMAGES:
            causes.append(f"{self.rarest} images of the rarest class (more images; --shift, --rotation, --flip)")
        if config.reconstruction_weight * row["train_reconstruction_loss"] > row["train_classification_loss"]:
            causes.append(
                f"the decoder's loss outweighs the classes' (--reconstruction-weight, now "
                f"{config.reconstruction_weight:g})"
            )
        return [*causes, f"--lr, now {config.lr:g}, too high or too low; or labels that do not follow from the images"]


def first_not_finite(network: Network, images: Tensor | None) -> str:
    """The first thing on the way through the network that is NaN or infinite: images, a weight, or a layer's output.

    The network is run once more on the images of the step, unless these are None.
    """
    if images is not None and not images.isfinite().all():
        return "the images of the step"
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name}"
    found = list[str]()

    def note(name: str, module: nn.Module, inputs: object, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if any(isinstance(part, Tensor) and not part.isfinite().all() for part in parts):
            found.append(f"the output of {name} ({type(module).__name__})")

    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in network.named_modules() if name]
    try:
        if images is not None:
            with network.plain(), torch.no_grad():
                network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss or a gradient, for all weights and outputs are finite"
