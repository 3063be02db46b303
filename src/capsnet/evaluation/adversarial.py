"""Adversarial images: how small a change, made with the network's own gradient, makes it err; and what gives it away.

Two white-box attacks within a distance of epsilon in every pixel (L-infinity): one step (FGSM: Goodfellow, Shlens,
Szegedy 2015, "Explaining and Harnessing Adversarial Examples", arXiv 1412.6572, Section 4) and many (PGD: Madry et al.
2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv 1706.06083, Section 2.1). An attacked image
is flagged when its reconstruction from the winning capsule is bad (Frosst, Sabour, Hinton 2018, arXiv 1811.06969).

What both ascend is the loss the network was trained with: cross-entropy, or for capsules the margin loss (eq. 4 of
Sabour et al. 2017), without reconstruction. Eq. 4 is flat where an image is recognised with lengths beyond its margins
of 0.9 and 0.1: no gradient, and no attack, though a small change might do. So `open` margins, 1 and 0, are the default,
which are never reached; `own` keeps those of training, and then measures that flatness, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold, reconstruction_errors
from capsnet.models import Network, evaluation_mode
from capsnet.objective import Objective

__all__ = ["ATTACKS", "MARGINS", "Rates", "attack_rates", "fgsm", "loss_of", "pgd"]

ATTACKS = ("fgsm", "pgd")
MARGINS = ("open", "own")


@dataclass(frozen=True)
class Rates:
    """What an attack did to a set of images.

    Attributes:
        attack: one of `ATTACKS`.
        epsilon: largest change of a pixel; intensities are in [0, 1].
        images: number of images.
        right: of these, recognised before.
        fooled: of the right ones, not recognised any more.
        wrong_after: of all images, not recognised after the attack.
        flagged: of all attacked images, with a reconstruction error above the threshold; None without one.
        flagged_fooled: the same of the fooled ones.
        loss: mean of the loss that was ascended, before.
        attacked_loss: and after.
    """

    attack: str
    epsilon: float
    images: int
    right: int
    fooled: int
    wrong_after: int
    flagged: int | None
    flagged_fooled: int | None
    loss: float
    attacked_loss: float

    @property
    def success(self) -> float | None:
        """Share of the right ones that were fooled; None where nothing was right."""
        return self.fooled / self.right if self.right else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {**asdict(self), "success": self.success}


def fgsm(
    network: Network,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, "batch"],
    *,
    epsilon: float,
    margins: str = "open",
    config: Config | None = None,
    batch_size: int = 128,
) -> Float[Tensor, "batch channels height width"]:
    """Images in [0, 1] after one step of `epsilon` in every pixel along the sign of the loss's gradient.

    Args:
        network: left as it is, without gradients in its weights; computed in evaluation mode.
        images: intensities in [0, 1], on the network's device.
        labels: the true classes.
        epsilon: largest change of a pixel, in [0, 1].
        margins: of the margin loss, `open` or `own`; see the head of this file.
        config: the weights of the loss; the paper's if not given.
        batch_size: images at a time; the result does not depend on it but by rounding.

    Raises:
        InputError: an argument outside its range, or images of another shape.
    """
    _check(network, images, epsilon, batch_size)
    with _attacked(network, margins, config) as objective:
        parts = []
        for x, y in _batches(batch_size, images, labels):
            _, gradient = _ascent(objective, x, y)
            parts.append((x + epsilon * gradient.sign()).clamp(0, 1))
    return torch.cat(parts)


def pgd(
    network: Network,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, "batch"],
    *,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int = 0,
    margins: str = "open",
    config: Config | None = None,
    batch_size: int = 128,
) -> Float[Tensor, "batch channels height width"]:
    """Projected gradient ascent: many small steps of FGSM from a random start, never farther than `epsilon`.

    Of the places on the way the one with the largest loss is kept, image by image; the last one is not always it.
    Arguments and result are those of `fgsm`, and: `steps`, at least 1; `step_size`, the change of a pixel in a step,
    above 0, None for 2.5 `epsilon` / `steps`, which can cross the whole range; `seed`, which draws the start, uniform
    within `epsilon`.

    Raises:
        InputError: an argument outside its range, or images of another shape.
    """
    _check(network, images, epsilon, batch_size)
    if steps < 1 or (step_size is not None and step_size <= 0):
        raise InputError(f"steps must be at least 1 and step_size above 0; got {steps} and {step_size}")
    size = 2.5 * epsilon / steps if step_size is None else step_size
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).to(images) * 2 - 1
    with _attacked(network, margins, config) as objective:
        parts = []
        for x, y, start in _batches(batch_size, images, labels, noise):
            lowest, highest = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
            place = (x + epsilon * start).clamp(lowest, highest)
            best, most = place, torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)
            for step in range(steps + 1):
                loss, gradient = _ascent(objective, place, y)
                better = loss > most
                best, most = torch.where(better[:, None, None, None], place, best), torch.where(better, loss, most)
                if step < steps:
                    place = (place + size * gradient.sign()).clamp(lowest, highest)
            parts.append(best)
    return torch.cat(parts)


def loss_of(
    network: Network,
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, "n"],
    *,
    margins: str = "open",
    config: Config | None = None,
    batch_size: int = 128,
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """The loss that the attacks ascend, of each image, and the predictions."""
    losses, predictions = [], []
    with _attacked(network, margins, config) as objective, torch.no_grad():
        for x, y in _batches(batch_size, images, labels):
            found = objective(x, y)
            losses.append(found.classification)
            predictions.append(found.output.scores.argmax(-1))
    return torch.cat(losses), torch.cat(predictions)


def attack_rates(
    network: Network,
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, "n"],
    *,
    attack: str,
    epsilon: float,
    threshold: Threshold | None = None,
    steps: int = 20,
    step_size: float | None = None,
    seed: int = 0,
    margins: str = "open",
    config: Config | None = None,
    batch_size: int = 128,
) -> Rates:
    """Attack all images, at least one, and count.

    `attack` is one of `ATTACKS`, and the other arguments are theirs. An `epsilon` of 0 changes nothing and gives the
    rates of the images as they are. An attacked image is flagged when its reconstruction error is above `threshold`;
    nothing is flagged without one, or without a decoder.

    Raises:
        InputError: an unknown attack, no images, or an argument outside its range.
    """
    if attack not in ATTACKS:
        raise InputError(f"attack must be one of {', '.join(ATTACKS)}; got {attack!r}")
    if len(images) < 1:
        raise InputError("images must be at least one; got none")
    common: dict[str, Any] = {"margins": margins, "config": config, "batch_size": batch_size}
    if attack == "fgsm":
        attacked = fgsm(network, images, labels, epsilon=epsilon, **common)
    else:
        attacked = pgd(network, images, labels, epsilon=epsilon, steps=steps, step_size=step_size, seed=seed, **common)
    loss, before = loss_of(network, images, labels, **common)
    attacked_loss, after = loss_of(network, attacked, labels, **common)
    fooled = (before == labels) & (after != labels)
    flagged = None
    if threshold is not None and network.decoder is not None:
        flagged = reconstruction_errors(network, attacked, batch_size=batch_size) > threshold.value
    return Rates(
        attack,
        epsilon,
        images=len(images),
        right=int((before == labels).sum()),
        fooled=int(fooled.sum()),
        wrong_after=int((after != labels).sum()),
        flagged=None if flagged is None else int(flagged.sum()),
        flagged_fooled=None if flagged is None else int((flagged & fooled).sum()),
        loss=float(loss.double().mean()),
        attacked_loss=float(attacked_loss.double().mean()),
    )


def _check(network: Network, images: Tensor, epsilon: float, batch_size: int) -> None:
    network.check_images(images)
    if not 0 <= epsilon <= 1:
        raise InputError(f"epsilon must be in [0, 1], the range of the intensities; got {epsilon:g}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")


def _batches(size: int, *arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(arrays[0]), size):
        yield tuple(array[start : start + size] for array in arrays)


@contextmanager
def _attacked(network: Network, margins: str, config: Config | None) -> Iterator[Objective]:
    """The loss to ascend; meanwhile the network is in evaluation mode and its weights take no gradient."""
    if margins not in MARGINS:
        raise InputError(f"margins must be one of {', '.join(MARGINS)}; got {margins!r}")
    config = config or Config()
    if margins == "open":
        config = replace(config, m_pos=1.0, m_neg=0.0)
    objective = Objective(network, config)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluation_mode(objective):
            yield objective
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _ascent(objective: Objective, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each image, and its gradient with respect to the pixels."""
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        loss = objective(x, labels).classification
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient
