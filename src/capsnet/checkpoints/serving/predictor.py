"""Predictions of an ONNX file that `capsnet export` wrote, with numpy, Pillow and onnxruntime only."""

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capsnet.data.image_preparation import ImagePreparation, Invert
from capsnet.data.photo import Frame
from capsnet.errors import InputError

__all__ = ["Answer", "Predictor", "data_url"]


class Answer(NamedTuple):
    """What a network says of one image."""

    fields: dict[str, Any]  # those of `capsnet predict --json --scores`
    image: NDArray[np.floating[Any]]  # as the network saw it, float32 [channels, height, width] in [0, 1]
    reconstruction: NDArray[np.floating[Any]] | None  # of the same shape, None without a decoder


class Predictor:
    """A network in an ONNX file with what the file tells of images and classes.

    Raises:
        InputError: not a readable ONNX file, or none that `capsnet export` wrote of a trained network.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many types
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"file {path} must be a readable ONNX file; got: {reason}") from None
        self.outputs = [output.name for output in self.session.get_outputs()]
        facts = self.session.get_modelmeta().custom_metadata_map
        try:
            reading = json.loads(facts["preprocessing"])
            frame = None if reading["frame"] is None else Frame(**reading["frame"])
            self.preparation = ImagePreparation(**{**reading, "frame": frame})
            self.classes: list[str] = json.loads(facts["classes"])
            self.softmax: bool = facts["presence"] != "scores"
            threshold = json.loads(facts["threshold"])
            self.threshold: float | None = None if threshold is None else threshold["value"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"file {path} must be one that `capsnet export` wrote; got: {error!r}") from None

    def __call__(self, source: Path | bytes, name: str, *, invert: Invert = "auto", most: int | None = None) -> Answer:
        """Predict one image, a file or what it holds.

        Args:
            source: the image.
            name: what the answer and errors call it.
            invert: swap dark and light; `auto` where a digit's ground is the opposite of the training images'.
            most: pixels that it may have, if fewer than an image may have anyway.

        Raises:
            InputError: not a readable image, or too large.
        """
        prepared = self.preparation.pixels(source, invert=invert, name=name, most=most)
        image = prepared.image.astype(np.float32) / 255
        found = dict(zip(self.outputs, self.session.run(self.outputs, {"images": image[None]}), strict=True))
        scores = found["scores"][0]
        if self.softmax:
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        order = np.argsort(-scores, kind="stable")[:2].tolist()
        reconstruction = found["reconstruction"][0] if "reconstruction" in found else None
        error = None if reconstruction is None else float(((reconstruction - image) ** 2).sum())
        fields = {
            "file": name,
            "class": self.classes[order[0]],
            "presence": float(scores[order[0]]),
            "runner_up": self.classes[order[-1]],
            "runner_up_presence": float(scores[order[-1]]),
            "reconstruction_error": error,
            "ood": None if self.threshold is None or error is None else error > self.threshold,
            "inverted": prepared.inverted,
            "framed": prepared.framed,
            "notes": "; ".join(prepared.notes),
            "scores": dict(zip(self.classes, scores.tolist(), strict=True)),
        }
        return Answer(fields, image, reconstruction)


def data_url(image: NDArray[np.floating[Any]]) -> str:
    """An image `[channels, height, width]` in [0, 1] as a PNG file in a URL."""
    from PIL import Image

    pixels = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
