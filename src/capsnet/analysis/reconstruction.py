"""What the decoder draws: reconstructions of images, and what each dimension of a class capsule means."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnet import functional as F
from capsnet.analysis.routing_trace import with_capsules
from capsnet.errors import InputError
from capsnet.layers import Decoder
from capsnet.models import CapsuleNetwork, Network, Output, evaluation_mode

__all__ = ["Perturbation", "Reconstruction", "Separation", "decoder_of", "perturb", "reconstruct", "separate"]


class Reconstruction(NamedTuple):
    """Images and what the decoder makes of them.

    Attributes:
        images: `[batch, channels, height, width]`, intensities in [0, 1].
        labels: true classes `[batch]`.
        predictions: classes of the longest capsules `[batch]`.
        lengths: of the class capsules `[batch, classes]`, in [0, 1).
        of_prediction: drawn from the longest capsule, of the images' shape.
        of_label: drawn from the capsule of the true class; the same where the prediction is right.
    """

    images: Tensor
    labels: Tensor
    predictions: Tensor
    lengths: Tensor
    of_prediction: Tensor
    of_label: Tensor

    @property
    def wrong(self) -> Tensor:
        """Whether the prediction is wrong, `bool [batch]`."""
        return self.predictions != self.labels


class Separation(NamedTuple):
    """Images of several objects, and each object drawn alone.

    Attributes:
        images: `[batch, channels, height, width]`, intensities in [0, 1].
        classes: those that were drawn `[batch, k]`.
        drawn: each from its capsule alone `[batch, k, channels, height, width]`, in [0, 1].
        lengths: of these capsules `[batch, k]`, in [0, 1).
    """

    images: Tensor
    classes: Tensor
    drawn: Tensor
    lengths: Tensor


class Perturbation(NamedTuple):
    """A class capsule's vector with one dimension changed at a time, drawn.

    Attributes:
        images: `[batch, dim, steps, channels, height, width]`, intensities in [0, 1].
        deltas: what was added to the dimension `[steps]`; 0 in the middle.
        pose: the unchanged vectors `[batch, dim]`.
        classes: whose capsules they are `[batch]`.
    """

    images: Tensor
    deltas: Tensor
    pose: Tensor
    classes: Tensor


def decoder_of(network: Network) -> tuple[CapsuleNetwork, Decoder]:
    """The network and its decoder.

    Raises:
        InputError: it has no capsules or no decoder.
    """
    network = with_capsules(network)
    if network.decoder is None:
        raise InputError("model must have a decoder to draw reconstructions; this one was built without")
    return network, network.decoder


@torch.inference_mode()
def reconstruct(
    network: Network, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
) -> Reconstruction:
    """Recognise images and draw them again, from the predicted and from the true class (Figure 3 of the paper).

    Raises:
        InputError: no decoder, or images of another shape.
    """
    output, pose, decoder = _seen(network, images)
    assert output.reconstruction is not None
    predictions, of_label = output.scores.argmax(-1), decoder(pose, labels)
    return Reconstruction(images, labels, predictions, output.scores, output.reconstruction, of_label)


@torch.inference_mode()
def separate(
    network: Network, images: Float[Tensor, "batch channels height width"], classes: Int[Tensor, "batch k"]
) -> Separation:
    """Draw objects that overlap, each alone (Section 6.2 and Figure 5 of the paper).

    `classes` are those that the network finds, those that are there, or any others.

    Raises:
        InputError: no decoder, or images of another shape.
    """
    output, pose, decoder = _seen(network, images)
    return Separation(images, classes, decoder(pose, classes), output.scores.gather(1, classes))


@torch.inference_mode()
def perturb(
    network: Network,
    images: Float[Tensor, "batch channels height width"],
    classes: Int[Tensor, "batch"] | None = None,
    *,
    span: float = 0.25,
    steps: int = 11,
) -> Perturbation:
    """Change each dimension of a class capsule by itself and draw the results (Section 5.1 and Figure 4).

    The paper's range is [-0.25, 0.25] in steps of 0.05.

    Args:
        network: with a decoder.
        images: intensities in [0, 1].
        classes: the capsules to take; those of the longest if not given.
        span: the largest change, above 0.
        steps: number of changes from -span to span; odd, so that the middle one is unchanged, and at least 3.

    Raises:
        InputError: no decoder, images of another shape, or a range without a middle.
    """
    if span <= 0:
        raise InputError(f"span must be above 0; got {span:g}")
    if steps < 3 or steps % 2 == 0:
        raise InputError(f"steps must be odd and at least 3, for an unchanged middle; got {steps}")
    _, poses, decoder = _seen(network, images)
    classes = F.lengths(poses).argmax(-1) if classes is None else classes
    batch, _, dim = poses.shape
    deltas = torch.linspace(-span, span, steps, device=poses.device)
    deltas[steps // 2] = 0
    change = deltas[:, None] * torch.eye(dim, device=poses.device)[:, None]  # [dim, steps, dim]
    changed = poses[:, None, None] + change[:, :, None]  # [batch, dim, steps, classes, dim], all but one masked below
    index = classes[:, None].expand(batch, dim * steps).flatten()
    drawn = decoder(changed.flatten(0, 2), index)
    pose = poses[torch.arange(batch, device=poses.device), classes]
    return Perturbation(drawn.unflatten(0, (batch, dim, steps)), deltas, pose, classes)


def _seen(network: Network, images: Tensor) -> tuple[Output, Tensor, Decoder]:
    """What a network makes of images, the vectors of its class capsules, and its decoder."""
    network, decoder = decoder_of(network)
    with evaluation_mode(network):
        output: Output = network(images)
    assert output.pose is not None
    return output, output.pose, decoder
