"""The verb `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from capsnet.cli.parsing import BatchSize, DataDir, Images, Model
from capsnet.cli.printing import say, show, show_json
from capsnet.cli.trained_model import TrainedModel
from capsnet.errors import InputError
from capsnet.files import check_utf8

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """Write a trained network for other programs: ONNX, PyTorch's PT2, or a folder of safetensors.

    Any number of images at a time; outputs scores, reconstruction and pose. Written only if it predicts on the
    network's own test images (strokes or noise where they cannot be had) as the network does.

    Examples:
      capsnet export capsnet-mnist --to onnx
      capsnet export runs/mnist --to pt2 --out mnist.pt2 --check-all
      capsnet export runs/mnist --serve digits/    # then: python digits/serve.py
    """

    model: Model
    to: Literal["onnx", "pt2", "safetensors"] = "onnx"
    """Format; onnx needs: pip install 'capsnet[onnx]'."""
    out: str | None = None
    """File, or folder for safetensors; default: named after the model, in the working directory."""
    serve: str | None = None
    """New folder for the ONNX file and a serve.py, which predicts files or serves a page without PyTorch."""
    overwrite: bool = False
    """Replace --out, or the files of --serve."""
    data: str | None = None
    """Another data set or folder to compare on, read as the network's own was."""
    data_dir: DataDir = None
    images: Images = 256
    """Test images to compare on: the first ones."""
    check_all: bool = False
    """Compare on all test images."""
    batch_size: BatchSize = 256
    """Images at a time in the comparison, after batches of 1, 2 and 7; fewer of images above 40 x 40 pixels."""
    json: bool = False
    """Print the result as JSON."""

    def run(self, line: str) -> int:
        """Export a network, say how it compares."""
        import torch

        from capsnet import environment, memory
        from capsnet.checkpoints import serving
        from capsnet.checkpoints.export import FORMATS, export
        from capsnet.models import inference_batch

        if self.serve is not None:
            if self.to != "onnx" or self.out is not None:
                got = "--out" if self.out is not None else f"--to {self.to}"
                raise InputError(f"--serve must go with --to onnx and without --out; got {got}")
            check_utf8(Path(self.serve), "onnx")
            serving.check_folder(Path(self.serve), overwrite=self.overwrite)
        trained = TrainedModel(self.model, several=True)
        batch_size = min(self.batch_size, inference_batch(trained.network))
        memory.check_export(trained.network, batch_size, self.to)
        name, images = _images(trained, self)
        path = Path(self.out or f"{trained.folder.resolve().name}{FORMATS[self.to] or '-safetensors'}")
        if self.to != "safetensors":
            check_utf8(path, self.to)
        card = trained.card if trained.card.config else None
        how: dict[str, Any] = {
            "images": images,
            "batch_size": batch_size,
            "card": card,
            "overwrite": self.overwrite,
        }
        if self.serve is not None:
            result = serving.write_folder(trained.network, Path(self.serve), **how)
        else:
            result = export(trained.network, path, format=self.to, **how)
        if self.json:
            record = {
                "command": line,
                "model": self.model,
                "data": name,
                **result.to_dict(),
                **environment.describe(torch.device("cpu")),
            }
            show_json(record)
        else:
            show(f"{result.summary()} ({name})")
            if self.serve is not None:
                place = Path(self.serve) / "serve.py"
                show(f"python {place} photo.jpg  predicts files, without a file it serves a page")
        return 0


def _images(trained: TrainedModel, command: Export) -> tuple[str, "Tensor"]:
    """What to compare on, and its name."""
    import torch

    from capsnet.data.dataset import to_float

    try:
        dataset = trained.dataset(command.data, command.data_dir, held_out=False, any_will_do=not command.check_all)
    except InputError as error:
        if command.data or command.check_all:
            raise
        say(f"capsnet export: compared on noise ({error})")
        count = min(command.images, 256)
        noise = torch.rand(count, *trained.network.image_shape, generator=torch.Generator().manual_seed(0))
        return "noise", noise
    images = dataset.test.images if command.check_all else dataset.test.images[: command.images]
    return f"{dataset.name} test", to_float(images)
