"""No number for a wrong result: what is timed is first compared with the plain, direct way in float64."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capsnet.models import evaluation_mode
from capsnet.objective import Losses

__all__ = ["TOLERANCES", "Check", "Incorrect", "check", "errors_of", "results", "tolerance"]

TOLERANCES = {"float32": 1e-4, "winograd": 1e-2, "TF32": 5e-2, "bf16": 0.2}
"""Largest relative error allowed in any result (see `check`), by the coarsest arithmetic on the way to it.

Measured, over both presets, two seeds and 28 to 48 pixels: 3e-6 in float32; 7e-5 with Winograd convolutions, but 3e-3
where their rounding flips a ReLU; up to 0.09 in bf16. TF32 (convolutions of a GPU in precision 32) is between, by its
10 bits.
"""


MOST_ROUNDING = {"float32": 0.03, "bf16": 0.75}
"""Largest error that is taken for rounding: of eight images the first gradients of ResNet-20 are half of it in bf16."""
ZERO = 1e-9
"""A result in float64 with a norm of at most this share of the largest is rounding of 0."""


class Incorrect(RuntimeError):
    """A variant whose results are wrong, and so has no speed."""


@dataclass(frozen=True)
class Check:
    """The relative RMS error against float64 of the result that comes closest to what is allowed for it."""

    error: float
    result: str
    tolerance: float
    images: int


def tolerance(*, precision: str, convolution: str, device: torch.device) -> float:
    """The largest error that a variant may have (`TOLERANCES`)."""
    if precision == "bf16":
        return TOLERANCES["bf16"]
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TOLERANCES["TF32"]
    return TOLERANCES["winograd" if convolution == "winograd" else "float32"]


def results(
    objective: Callable[[Tensor, Tensor], Losses],
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    backward: Callable[[Tensor], object] = torch.autograd.backward,
) -> dict[str, Tensor]:
    """Training losses and inference scores of each image, and the gradients of the mean loss, without dropout."""
    network.zero_grad()
    with ExitStack() as without_dropout:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                without_dropout.enter_context(evaluation_mode(module))
        losses = objective(images, labels).total
        backward(losses.mean())
    found = {"losses": losses.detach()}
    found |= {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    with torch.inference_mode(), evaluation_mode(network):
        found["scores"] = objective(images, labels).output.scores.clone()
    return found


def errors_of(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative RMS error of each result against float64; that of zeros is against the largest of the others."""
    norms = {name: float(tensor.norm()) for name, tensor in truth.items()}
    largest = max(norms.values())
    return {
        name: float((found[name].detach().cpu().double() - tensor).norm())
        / (norms[name] if norms[name] > ZERO * largest else largest)
        for name, tensor in truth.items()
    }


def check(
    found: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    allowed: float,
    images: int,
    who: str,
    rounding: Mapping[str, float] | None = None,
    most_rounding: float = 0.0,
) -> Check:
    """Compare each result of `who` with the same in float64.

    Args:
        found: results of `results`.
        truth: the same in float64.
        allowed: the largest error.
        images: of which they are.
        who: for the error.
        rounding: errors of the plain network in the same precision; three times that of a result is allowed for it
            too. Where normalisations follow several ReLUs, a rounding that flips one moves a gradient by half a
            percent.
        most_rounding: up to which this is so, see `MOST_ROUNDING`.

    Raises:
        Incorrect: a result is missing, not finite, or further away than is allowed.
    """
    if missing := truth.keys() ^ found.keys():
        raise Incorrect(f"{who}: results must be those of float64; {', '.join(sorted(missing))} is in one only")
    errors, rounding = errors_of(found, truth), rounding or {}
    limits = {name: max(allowed, min(most_rounding, 3 * rounding.get(name, 0.0))) for name in errors}
    excess = {name: float("inf") if math.isnan(errors[name]) else errors[name] / limits[name] for name in errors}
    worst = max(excess, key=lambda name: excess[name])
    if excess[worst] > 1:
        raise Incorrect(
            f"{who}: {worst} must be within {limits[worst]:g} of float64 (relative RMS); it is {errors[worst]:.2g} "
            f"away, so no speed is reported"
        )
    return Check(errors[worst], worst, limits[worst], images)
