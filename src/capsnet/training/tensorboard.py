"""TensorBoard: curves and reconstructions of a run, when asked for."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from capsnet.data import Dataset
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.files import check_utf8
from capsnet.models import Network, evaluation_mode

__all__ = ["check_tensorboard", "tensorboard"]


def check_tensorboard(directory: Path) -> None:
    """Raise InputError unless TensorBoard is installed and can write to `directory`."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "tensorboard must be installed for --tensorboard; it is not (pip install 'capsnet[tensorboard]')"
        )
    check_utf8(directory, "TensorBoard")


@contextmanager
def tensorboard(directory: Path, *, first_epoch: int) -> Iterator[Callable[[dict[str, Any], Network, Dataset], None]]:
    """What writes TensorBoard curves and reconstructions; those of a killed run from `first_epoch` on are forgotten."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory), purge_step=first_epoch)

    def write(row: dict[str, Any], network: Network, dataset: Dataset) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        if network.decoder is not None:
            split = dataset.validation or dataset.shown("train")
            assert split is not None
            examples = to_float(split.images[:8])
            with torch.inference_mode(), evaluation_mode(network):
                output = network(examples.to(next(network.parameters()).device))
            assert output.reconstruction is not None
            drawn = output.reconstruction.float().cpu()
            sheet = torch.cat([examples, *(drawn.unbind(1) if network.objects_per_image > 1 else [drawn])])
            writer.add_images("inputs above, reconstructions below", sheet, row["epoch"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
