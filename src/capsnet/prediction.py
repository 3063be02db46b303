"""Predictions for images as people have them: files, prepared like the training images, through a trained network."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsnet import functional as F
from capsnet.checkpoints.model_card import Card
from capsnet.data.dataset import to_float
from capsnet.data.preprocessing import Framing, Invert, Prepared, Preprocessing
from capsnet.errors import InputError
from capsnet.models import Network, evaluation_mode

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of one image.

    Attributes:
        name: of the file.
        label: name of the predicted class.
        presence: length of its capsule, in [0, 1); for a network without capsules its softmax.
        runner_up: name of the second class; the same as `label` if there is only one.
        runner_up_presence: the same of it.
        scores: presence of every class, by name.
        error: sum of squared differences between the image and its reconstruction, None without a decoder.
        ood: whether `error` is above the card's threshold; None without either.
        inverted: whether dark and light were swapped.
        framed: whether the ink was cut out, scaled and centred.
        notes: what else is to be told: that the image is empty, or what reading it lost or changed.
        image: as the network saw it, `float32 [channels, height, width]` in [0, 1].
        reconstruction: of the same shape, None without a decoder.
    """

    name: str
    label: str
    presence: float
    runner_up: str
    runner_up_presence: float
    scores: Mapping[str, float] = field(repr=False)
    error: float | None
    ood: bool | None
    inverted: bool
    framed: bool
    notes: tuple[str, ...]
    image: Tensor = field(repr=False)
    reconstruction: Tensor | None = field(repr=False)

    def top(self, count: int) -> list[tuple[str, float]]:
        """The `count` classes of the largest scores with these, the largest first."""
        return sorted(self.scores.items(), key=lambda one: -one[1])[:count]

    def to_dict(self) -> dict[str, Any]:
        """All but the images and the other classes' scores, as JSON can hold it."""
        return {
            "file": self.name,
            "class": self.label,
            "presence": self.presence,
            "runner_up": self.runner_up,
            "runner_up_presence": self.runner_up_presence,
            "reconstruction_error": self.error,
            "ood": self.ood,
            "inverted": self.inverted,
            "framed": self.framed,
            "notes": "; ".join(self.notes),
        }


def predict(
    network: Network,
    sources: Iterable[tuple[str, str | Path | bytes]],
    *,
    card: Card | None = None,
    framing: Framing | None = None,
    invert: Invert = "auto",
    batch_size: int = 64,
    precision: str = "32",
) -> Iterator[Prediction | InputError]:
    """Predict images one after the other; a bad file costs no other its prediction.

    Args:
        network: trained, in evaluation mode.
        sources: name of each image, and its place or content.
        card: of the network, see `load_card`; without one, none is out of distribution.
        framing: in place of the network's; see `data.preprocessing`.
        invert: see `data.preprocessing`.
        batch_size: images at a time; only memory and speed depend on it.
        precision: `32`, or `bf16` for convolutions and decoder.

    Yields:
        In the order of `sources`: a prediction, or the InputError of a file that is no readable image.
    """
    if network.objects_per_image > 1:
        raise InputError(
            f"network must be of images that show one object each; got one that finds {network.objects_per_image}"
        )
    card = card or Card()
    reading = (network.preprocessing or card.reading(network.image_shape)).with_framing(framing)
    waiting = iter(sources)
    while batch := list(islice(waiting, batch_size)):
        prepared = [_prepared(reading, name, source, invert) for name, source in batch]
        ready = [one.image for one in prepared if isinstance(one, Prepared)]
        found = iter(_answers(network, torch.stack(ready), precision) if ready else ())
        for (name, _), one in zip(batch, prepared, strict=True):
            if isinstance(one, InputError):
                yield one
                continue
            image, scores, reconstruction, error = next(found)
            values, order = scores.topk(min(2, len(scores)))
            yield Prediction(
                name=name,
                label=network.classes[int(order[0])],
                presence=float(values[0]),
                runner_up=network.classes[int(order[-1])],
                runner_up_presence=float(values[-1]),
                scores=dict(zip(network.classes, scores.tolist(), strict=True)),
                error=error,
                ood=None if card.threshold is None or error is None else error > card.threshold.value,
                inverted=one.inverted,
                framed=one.framed,
                notes=one.notes,
                image=image,
                reconstruction=reconstruction,
            )


def _prepared(reading: Preprocessing, name: str, source: str | Path | bytes, invert: Invert) -> Prepared | InputError:
    try:
        return reading(Path(source) if isinstance(source, str) else source, invert=invert, name=name)
    except InputError as error:
        return error


@torch.inference_mode()
def _answers(
    network: Network, images: Tensor, precision: str
) -> list[tuple[Tensor, Tensor, Tensor | None, float | None]]:
    """For each image: itself, the scores, its reconstruction and the error of that."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    inputs = to_float(images).to(device)
    with evaluation_mode(network), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = network(inputs)
    scores = network.presence(output)
    if output.reconstruction is None:
        return [(image, row, None, None) for image, row in zip(inputs.cpu(), scores.cpu(), strict=True)]
    errors = F.reconstruction_loss(output.reconstruction, inputs).tolist()
    return list(zip(inputs.cpu(), scores.cpu(), output.reconstruction.cpu(), errors, strict=True))
