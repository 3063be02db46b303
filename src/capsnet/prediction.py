"""Predictions for images as people have them: files, prepared like the training images, through a trained network."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from capsnet import functional as F
from capsnet.checkpoints.model_card import Card
from capsnet.data.dataset import to_float
from capsnet.data.image_folder import image_files
from capsnet.data.in_memory import encoded, is_picture, pixels_of, to_uint8
from capsnet.data.preprocessing import Framing, Invert, Preprocessing
from capsnet.errors import InputError
from capsnet.files import is_directory
from capsnet.models import Network, evaluation_mode

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of one image.

    Attributes:
        name: of the file or image.
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

    Examples:
        >>> from capsnet.prediction import predict
        >>> [found] = predict(load("capsnet-mnist"), load_split("strokes", "test").images[0, 0].numpy())
        >>> found.label, found.runner_up, round(found.presence, 1)
        ('5', '2', 0.9)
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
    sources: Any,
    *,
    card: Card | None = None,
    framing: Framing | None = None,
    invert: Invert = "auto",
    batch_size: int = 64,
    precision: str = "32",
) -> Iterator[Prediction | InputError]:
    """Predict images one after the other; a bad one costs no other its prediction.

    Args:
        network: trained, in evaluation mode.
        sources: an image, or several in a list or another iterable: a path (of a folder, all images in it and below),
            the bytes of a file, a PIL image, or an array or tensor, `[H, W]`, `[C, H, W]` or `[H, W, C]` of 1 or 3
            channels, uint8 or floats in [0, 1]; of 4 axes, several images. A pair (name, image) names it; otherwise a
            file is called by its path, and others "image 1", "image 2", ... by their place. All are prepared as files
            are; floats of the network's own size are not rounded to 8 bits.
        card: of the network, see `load_card`; without one, none is out of distribution.
        framing: in place of the network's; see `data.preprocessing`.
        invert: see `data.preprocessing`.
        batch_size: images at a time; only memory and speed depend on it.
        precision: `32`, or `bf16` for convolutions and decoder.

    Yields:
        In the order of `sources`: a prediction, or the InputError of one that is no readable image.

    Raises:
        InputError: a network for several objects in an image, or `sources` that are neither an image nor several.

    Examples:
        >>> network = load("capsnet-mnist")
        >>> next(predict(network, torch.zeros(28, 28))).name
        'image 1'
    """
    if network.objects_per_image > 1:
        raise InputError(
            f"network must be of images that show one object each; got one that finds {network.objects_per_image}"
        )
    card = card or Card()
    reading = (network.preprocessing or card.reading(network.image_shape)).with_framing(framing)
    return _predictions(network, _named(sources), reading, card, invert, batch_size, precision)


def _predictions(
    network: Network,
    waiting: Iterator[tuple[str, Any]],
    reading: Preprocessing,
    card: Card,
    invert: Invert,
    batch_size: int,
    precision: str,
) -> Iterator[Prediction | InputError]:
    while batch := list(islice(waiting, batch_size)):
        prepared = [_prepared(network, reading, name, source, invert) for name, source in batch]
        ready = [one.image for one in prepared if isinstance(one, _Ready)]
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


class _Ready(NamedTuple):
    """An image as the network sees it, `float32 [channels, height, width]` in [0, 1], and what was done to it."""

    image: Tensor
    inverted: bool = False
    framed: bool = False
    notes: tuple[str, ...] = ()


def _prepared(network: Network, reading: Preprocessing, name: str, source: Any, invert: Invert) -> _Ready | InputError:
    exact, seen = None, False
    try:
        if isinstance(source, InputError):
            raise source
        if isinstance(source, np.ndarray | Tensor):
            pixels = pixels_of(source, name=name)
            seen = tuple(pixels.shape) == network.image_shape
            exact = pixels if seen and pixels.is_floating_point() else None
            content: Path | bytes = encoded(to_uint8(pixels))
        elif is_picture(source):
            content = encoded(source)
        elif isinstance(source, str | os.PathLike | bytes):
            content = source if isinstance(source, bytes) else Path(source)
        else:
            raise InputError(f"{name} must be {IMAGE}; got {type(source).__name__}")
        found = reading(content, invert=invert, name=name, seen=seen)
    except InputError as error:
        return error
    image = to_float(found.image) if exact is None else 1 - exact if found.inverted else exact
    return _Ready(image, found.inverted, found.framed, found.notes)


IMAGE = "a path, the bytes of a file, a PIL image, an array or a tensor"


def _named(sources: Any) -> Iterator[tuple[str, Any]]:
    """Each image with its name; folders as the images in them."""
    if isinstance(sources, str | os.PathLike):
        return _each([sources])
    if isinstance(sources, np.ndarray | Tensor):
        return _each(sources if sources.ndim == 4 else [sources])
    if isinstance(sources, bytes) or is_picture(sources):
        return _each([sources])
    if isinstance(sources, Mapping) or not isinstance(sources, Iterable):
        raise InputError(f"sources must be {IMAGE}, or a list of such; got {type(sources).__name__}")
    return _each([sources] if _is_pair(sources) else sources)


def _in_folder(folder: Path) -> Iterator[tuple[str, Path | InputError]]:
    try:
        found, _ = image_files(folder)
    except InputError as error:
        yield str(folder), error
        return
    yield from ((str(path), path) for path in found)
    if not found:
        yield str(folder), InputError(f"folder {folder} must hold images; got none")


def _is_pair(source: Any) -> TypeGuard[tuple[str, Any]]:
    """Whether this is a name and an image; two paths are two images unless they are an item of a list."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], str)


def _each(sources: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, source in enumerate(sources, 1):
        if _is_pair(source):
            yield source
        elif isinstance(source, str | os.PathLike) and is_directory(source):
            yield from _in_folder(Path(source))
        else:
            yield os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {number}", source


@torch.inference_mode()
def _answers(
    network: Network, images: Tensor, precision: str
) -> list[tuple[Tensor, Tensor, Tensor | None, float | None]]:
    """For each image: itself, the scores, its reconstruction and the error of that."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    inputs = images.to(device)
    with evaluation_mode(network), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = network(inputs)
    scores = network.presence(output)
    if output.reconstruction is None:
        return [(image, row, None, None) for image, row in zip(inputs.cpu(), scores.cpu(), strict=True)]
    errors = F.reconstruction_loss(output.reconstruction, inputs).tolist()
    return list(zip(inputs.cpu(), scores.cpu(), output.reconstruction.cpu(), errors, strict=True))
