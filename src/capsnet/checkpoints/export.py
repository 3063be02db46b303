"""Networks for other programs: ONNX, torch.export's PT2, and a folder of safetensors; written only when they agree.

Each file takes any number of images: input `images`, `float32 [batch, channels, height, width]` in [0, 1]; outputs
`scores`, `reconstruction` (of the winning capsule, with a decoder) and `pose` (with capsules), see `models.Output`.
Before a file is put in place it is read again, run on images and compared with the network it was made from.
"""

import copy
import io
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet.checkpoints import exported, pretrained
from capsnet.checkpoints.exported import Runner
from capsnet.checkpoints.model_card import Card
from capsnet.errors import InputError
from capsnet.files import write_atomically
from capsnet.models import Network, Output

__all__ = ["FORMATS", "Export", "compare", "export"]

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ""}
"""Format and the ending of its files; safetensors is a folder."""
TOLERANCE = 1e-3  # largest difference, relative to the largest value: rounding is 1e-6 to 1e-4, a wrong graph 1e-1


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with the network."""

    path: str  # the file, or the folder for safetensors
    format: str  # one of `FORMATS`
    images: int  # number of images that were compared
    changed: int  # number of images with another prediction; 0, as nothing is written otherwise
    differences: dict[str, float]  # largest absolute difference of each output

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return asdict(self)

    def summary(self) -> str:
        """One line: `model.onnx: the same predictions on 256 images; largest difference 1.2e-07 in scores`."""
        found = ", ".join(f"{value:.2g} in {name}" for name, value in self.differences.items())
        return (
            f"{self.path}: {self.changed:,} of {self.images:,} predictions differ from the network's; "
            f"largest difference {found}"
        )


def export(
    network: Network,
    path: str | Path,
    *,
    format: str,
    images: Float[Tensor, "n channels height width"],
    batch_size: int = 256,
    card: Card | None = None,
    overwrite: bool = False,
) -> Export:
    """Write `network` for other programs, checked.

    Args:
        network: made by `create` or `load`; it is left as it is, wherever it is.
        path: file to write, or the folder for safetensors.
        format: `onnx` (for onnxruntime and others; needs the extra `onnx`), `pt2` (`torch.export.load(path).module()`,
            without this package), or `safetensors` (for `capsnet.from_pretrained`).
        images: intensities in [0, 1] to compare on; at least one. They go through in batches of 1, 2, 7 and then
            `batch_size`, as the number must be free.
        batch_size: images at a time; at least 1.
        card: what is told of the weights: written beside safetensors; its threshold into the other files.
        overwrite: replace what is at `path`.

    Returns:
        What was written and how it compares.

    Raises:
        InputError: an unknown format, a path that is taken or cannot be written, packages that are missing, images of
            another shape or none; or what was made does not predict as the network does: then nothing is written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if len(images) < 1 or batch_size < 1:
        raise InputError(f"images and batch_size must be at least 1; got {len(images)} and {batch_size}")
    network.check_images(images)
    _check_free(path, format, overwrite=overwrite)
    if format == "onnx":
        exported.check_installed("onnx", "onnxscript", "onnxruntime")
    network = copy.deepcopy(network).cpu().eval()
    results: list[Export] = []

    def checked(run: Runner) -> None:
        changed, differences = compare(network, run, images.cpu(), batch_size=batch_size)
        results.append(Export(str(path), format, len(images), changed, differences))

    if format == "safetensors":
        with tempfile.TemporaryDirectory() as folder:
            pretrained.save_pretrained(network, folder)
            checked(partial(_outputs, pretrained.load(folder, **copy.deepcopy(network.given))))
        pretrained.save_pretrained(network, path, card)
    else:
        with exported.quiet():
            facts = _facts(network, card)
            with network.plain():
                content = (_onnx if format == "onnx" else _pt2)(network, facts)

            def write(temporary: Path) -> None:
                temporary.write_bytes(content)
                checked(exported.opened(temporary, format)[0])

            write_atomically(path, write)
    return results[0]


def compare(
    network: Network, run: Runner, images: Float[Tensor, "n channels height width"], *, batch_size: int = 256
) -> tuple[int, dict[str, float]]:
    """Largest absolute difference of each output of `run` from the network's, over all images.

    Returns:
        The number of images whose prediction changed, which is 0, and the differences by output.

    Raises:
        InputError: a prediction changed, an output is missing, or differs by more than 0.1 % of its largest value.
    """
    changed, start = 0, 0
    differences: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for size in itertools.chain((1, 2, 7), itertools.repeat(batch_size)):
        if start >= len(images):
            break
        batch = images[start : start + size]
        start += size
        with torch.no_grad():
            wanted, got = _outputs(network, batch), run(batch)
        if got.keys() != wanted.keys() or any(got[name].shape != wanted[name].shape for name in wanted):
            raise InputError(f"outputs must be those of the network, {_shapes(wanted)}; got {_shapes(got)}")
        changed += int((got["scores"].argmax(-1) != wanted["scores"].argmax(-1)).sum())
        for name, values in wanted.items():  # torch's maximum, unlike Python's, keeps what is no number
            difference, height = (got[name] - values).abs().max(), values.abs().max()
            differences[name] = torch.maximum(differences.get(name, difference), difference)
            largest[name] = torch.maximum(largest.get(name, height), height)
    for name, difference in differences.items():
        if changed or not difference <= TOLERANCE * largest[name].clamp(min=1):
            raise InputError(
                f"what is exported must predict as the network does, within {TOLERANCE:g}; got {changed:,} of "
                f"{len(images):,} predictions changed, difference {difference:.2g} in {name}; nothing is written"
            )
    return changed, {name: float(difference) for name, difference in differences.items()}


def _outputs(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What there is of scores, reconstruction and pose."""
    output: Output = network(images)
    found = {"scores": output.scores, "reconstruction": output.reconstruction, "pose": output.pose}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _shapes(outputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in outputs.items())


def _check_free(path: Path, format: str, *, overwrite: bool) -> None:
    if format == "safetensors":
        if path.exists() and not path.is_dir():
            raise InputError(f"out must be a folder for safetensors; got the file {path}")
        taken = [name for name in pretrained.PRETRAINED if (path / name).exists()]
        if taken and not overwrite:
            raise InputError(f"out must be a folder without {taken[0]}, or be replaced with --overwrite; got {path}")
    elif path.is_dir():
        raise InputError(f"out must be a file for {format}; got the folder {path}")
    elif path.exists() and not overwrite:
        raise InputError(f"out must be a new file, or be replaced with --overwrite; got {path}")


class _Named(nn.Module):
    """The network with its outputs by name and without couplings, which nobody else can use."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return _outputs(self.network, images)


def _program(network: Network) -> torch.export.ExportedProgram:
    """The network as a graph for any number of images."""
    example = torch.zeros(2, *network.image_shape)  # a batch of 1 would be taken for always 1
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(_Named(network), (example,), dynamic_shapes=shapes)
    # Without decomposing anything this dissolves the regions of `full_precision`, which a PT2 file cannot hold.
    graph: torch.export.ExportedProgram = program.run_decompositions({})
    return graph


def _facts(network: Network, card: Card | None) -> dict[str, str]:
    """What a user of the file needs to know: how an image file becomes its input, and what its outputs mean."""
    with torch.no_grad():
        output = network(torch.zeros(1, *network.image_shape))
    softmax = not torch.equal(network.presence(output), output.scores)
    threshold = None if card is None or card.threshold is None else asdict(card.threshold)
    return {
        "model": str(network.config["name"]),
        "classes": json.dumps(network.classes),
        "image_shape": json.dumps(network.image_shape),
        "objects_per_image": json.dumps(network.objects_per_image),
        "intensities": "float32 in [0, 1]",
        "preprocessing": json.dumps(None if network.preprocessing is None else asdict(network.preprocessing)),
        "presence": "softmax of scores" if softmax else "scores",
        "threshold": json.dumps(threshold),
        "capsnet": version("capsnet"),
    }


def _pt2(network: Network, facts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(network), file, extra_files={exported.FACTS: json.dumps(facts)})
    return file.getvalue()


def _onnx(network: Network, facts: dict[str, str]) -> bytes:
    import onnx

    names = list(_outputs(network, torch.zeros(1, *network.image_shape)))
    program = torch.onnx.export(
        _program(network), (), dynamo=True, input_names=["images"], output_names=names, verbose=False
    )
    assert program is not None
    model = program.model_proto
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == batch:
                size.dim_param = "batch"
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
