"""Exported files as networks: an ONNX or PT2 file that `export` wrote, with what it tells of images and classes."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnet.checkpoints.model_card import Card
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.files import parse_json, read_bytes
from capsnet.models import Network, Output
from capsnet.options import LossOptions
from capsnet.options.schema import brief, checked

__all__ = ["FACTS", "ExportedNetwork", "Runner", "check_installed", "is_exported", "load", "opened", "quiet"]

FACTS = "capsnet.json"
"""Name of what a PT2 file tells; an ONNX file has it in its metadata."""
SUFFIXES = {".onnx": "onnx", ".pt2": "pt2"}
MOST = 16 * 2**30  # bytes of a file
Runner = Callable[[Tensor], dict[str, Tensor]]
"""Images `[batch, channels, height, width]` in, outputs by name."""


class ExportedNetwork(Network):
    """What an exported file computes, as a network on the CPU; its weights and layers are not to be had.

    Args:
        run: computes the outputs.
        facts: what the file tells, see `export`.
        reconstructs: whether there is a reconstruction among the outputs.
    """

    def __init__(self, run: Runner, facts: dict[str, Any], *, reconstructs: bool) -> None:
        super().__init__()
        self.run, self.reconstructs, self.softmax = run, reconstructs, facts["presence"] != "scores"
        self.config = {"name": facts["model"]}
        self.classes, self.image_shape = facts["classes"], facts["image_shape"]
        self.objects_per_image, self.preprocessing = facts["objects_per_image"], facts["preprocessing"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """Outputs for `images`, reconstructed from the capsules of the winners."""
        self.check_images(images)
        if labels is not None:
            raise InputError("labels must be left out for an exported network, which reconstructs the winner")
        found = self.run(images)
        return Output(found["scores"], found.get("reconstruction"), found.get("pose"))

    def presence(self, output: Output) -> Float[Tensor, "batch classes"]:
        """The scores, or their softmax, as the file tells."""
        return output.scores.softmax(-1) if self.softmax else output.scores

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """An exported network cannot be trained."""
        raise InputError("network must be a run or weights to be trained; got an exported file")

    def features(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """An exported network tells its outputs only."""
        raise InputError("network must be a run or weights to look inside; got an exported file")


def is_exported(path: Path) -> bool:
    """Whether a path is that of a file whose name says ONNX or PT2."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def load(path: Path) -> tuple[Network, Card]:
    """The network in a file that `export` wrote, and a card with its threshold.

    A PT2 file is PyTorch's own format, which can hold code: load only those that you trust.

    Raises:
        InputError: it is damaged, or no such file, or from before files told their preprocessing.
    """
    format = SUFFIXES[path.suffix.lower()]
    if format == "onnx":
        check_installed("onnxruntime")
    try:
        with quiet():
            run, told = opened(path, format)
    except InputError:
        raise
    except Exception as error:  # onnxruntime and torch.export answer damaged files with many types
        raise InputError(f"file {path} must be a readable {format} file; got: {brief(str(error))}") from None
    kinds: dict[str, Any] = {
        "model": str,
        "classes": tuple[str, ...],
        "image_shape": tuple[int, int, int],
        "objects_per_image": int,
        "preprocessing": Preprocessing,
        "presence": str,
        "threshold": Threshold | None,
    }
    if missing := [name for name in kinds if name not in told]:
        raise InputError(f"file {path} must be one that `capsnet export` wrote; it does not tell its {missing[0]}")
    facts = {
        name: checked(
            told[name] if kind is str else parse_json(told[name], source=f"file {path}: {name}"),
            kind,
            name=name,
            source=f"file {path}",
        )
        for name, kind in kinds.items()
    }
    shape = facts["image_shape"]
    try:
        with torch.no_grad():
            outputs = run(torch.zeros(1, *shape))
    except Exception as error:
        raise InputError(f"file {path} must take images of {shape}, as it tells; got: {brief(str(error))}") from None
    if outputs["scores"].shape != (1, len(facts["classes"])) or facts["preprocessing"].image_shape != shape:
        raise InputError(f"file {path} must be one that `capsnet export` wrote; what it tells and gives differ")
    network = ExportedNetwork(run, facts, reconstructs="reconstruction" in outputs)
    return network.eval(), Card(threshold=facts["threshold"])


def opened(path: Path, format: str) -> tuple[Runner, dict[str, str]]:
    """What computes the outputs of a file, `onnx` or `pt2`, and what the file tells."""
    if format == "pt2":
        extra = {FACTS: ""}
        module = torch.export.load(io.BytesIO(read_bytes(path, most=MOST)), extra_files=extra).module()
        return lambda images: module(images), checked(json.loads(extra[FACTS] or "{}"), dict[str, str])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run, session.get_modelmeta().custom_metadata_map


def check_installed(*packages: str) -> None:
    """Raise InputError unless the packages are there that ONNX needs."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"format onnx must have {', '.join(packages)}; {missing[0]} is not installed (pip install 'capsnet[onnx]')"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, exporters and readers do not talk of their own affairs."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
