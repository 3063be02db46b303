"""What the page shows, as numbers: a network looked at with one image or one capsule at a time."""

import base64
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from capsnet import functional as F
from capsnet.analysis.reconstruction import decoder_of
from capsnet.analysis.routing_trace import evidence
from capsnet.data.dataset import to_float
from capsnet.data.preprocessing import Invert, Preprocessing
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.files import visible
from capsnet.models import Network, evaluation_mode

__all__ = ["MAX_PIXELS", "Viewer"]

MAX_PIXELS = 32_000_000  # of an image file, half a gigabyte while it is read; telephones take 12 or 24 million


class Viewer:
    """A trained network and what is known of its training images.

    Images go out as base64 of their bytes, row by row and channel by channel.

    Args:
        network: with capsules and a decoder, on the CPU, in evaluation mode.
        name: what the page calls it.
        reading: how image files become what it sees.
        threshold: above which reconstruction error an image belongs to none of the classes, if known.

    Raises:
        InputError: no capsules, no decoder, or images that are neither grey nor in colour, or of several objects.
    """

    def __init__(self, network: Network, name: str, *, reading: Preprocessing, threshold: Threshold | None) -> None:
        self.network, self.decoder = decoder_of(network)
        if network.image_shape[0] not in (1, 3):
            raise InputError(f"model must take images of 1 or 3 channels; got {network.image_shape[0]}")
        if network.objects_per_image > 1:
            raise InputError(
                f"model must be of images that show one object each; got one that finds {network.objects_per_image}"
            )
        self.name, self.reading, self.threshold = name, reading, threshold
        self.classes, self.image_shape = network.classes, network.image_shape
        with torch.inference_mode():
            self.dim = int(self.network.trace_routing(torch.zeros(1, *network.image_shape)).pose.shape[-1])

    def describe(self) -> dict[str, Any]:
        """All that the page must know before the first image; names as they can be shown."""
        channels, height, width = self.image_shape
        return {
            "name": visible(self.name),
            "classes": [visible(name) for name in self.classes],
            "channels": channels,
            "height": height,
            "width": width,
            "dim": self.dim,
            "steps": list(self.network.routing_steps),
            "frame": None if self.reading.frame is None else asdict(self.reading.frame),
            "threshold": self.threshold.value if self.threshold else None,
        }

    @torch.inference_mode()
    def look(self, file: bytes, *, invert: Invert, index: int | None) -> dict[str, Any]:
        """Prepare an image as the training images are, recognise it, and draw it again.

        Args:
            file: the content of an image file. The page sends a drawing as PGM or PPM of the network's own size, with
                its ink already scaled and centred: it knows what is ink, which `frame_digit` would have to find.
            invert: whether light and dark are exchanged, see `data.preprocessing`.
            index: the capsule to draw, in [0, classes); None for the longest.

        Raises:
            InputError: not an image that can be read, or a giant one.
        """
        prepared = self.reading(file, invert=invert, name="image", seen=True, most=MAX_PIXELS)
        images = to_float(prepared.image)[None]
        with evaluation_mode(self.network):
            output = self.network(images, None if index is None else torch.tensor([index]))
        winner = int(output.scores[0].argmax())
        best = output.reconstruction
        assert output.pose is not None
        assert best is not None
        if index not in (None, winner):
            best = self.decoder(output.pose, torch.tensor([winner]))
        return {
            "image": _encoded(prepared.image),
            "inverted": prepared.inverted,
            "framed": prepared.framed,
            "notes": list(prepared.notes),
            "lengths": output.scores[0].tolist(),
            "poses": output.pose[0].tolist(),
            "winner": winner,
            "reconstruction": _encoded(_to_bytes(output.reconstruction[0])),
            "error": float(F.reconstruction_loss(best, images)),  # of the winner, as the threshold is
        }

    @torch.inference_mode()
    def imagine(self, poses: Float[Tensor, "n dim"], index: int) -> dict[str, Any]:
        """Draw what capsule `index` describes when its vector is each of `poses`."""
        whole = torch.zeros(len(poses), len(self.classes), self.dim)
        whole[:, index] = poses
        images = self.decoder(whole, torch.full((len(poses),), index))
        return {"images": [_encoded(_to_bytes(image)) for image in images]}

    def evidence(self, image: UInt8[Tensor, "channels height width"], index: int) -> dict[str, Any]:
        """Where on `image` the evidence of capsule `index` comes from, at each routing iteration.

        The votes' support, coupling times vote along the capsule's direction, as trained couplings by themselves are
        almost uniform.

        Returns:
            `maps`: base64 of float32 `[iterations, height, width]`, little-endian; `lengths` of the capsule and
            `entropy` of all couplings (bits), one an iteration.
        """
        found = evidence(self.network, to_float(image)[None])
        maps = found.support[:, 0, index].numpy().astype("<f4")
        return {
            "maps": base64.b64encode(maps.tobytes()).decode(),
            "lengths": F.lengths(found.pose)[:, 0, index].tolist(),
            "entropy": found.entropy[:, 0].tolist(),
        }


def _to_bytes(image: Tensor) -> Tensor:
    return image.mul(255).round().to(torch.uint8)


def _encoded(image: Tensor) -> str:
    return base64.b64encode(image.contiguous().numpy().tobytes()).decode()
