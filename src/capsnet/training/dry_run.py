"""What `train --dry-run` prints: configuration, layers with their shapes and parameters, steps, device and memory."""

import math
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from capsnet import devices, memory
from capsnet.checkpoints import pretrained
from capsnet.config import Config
from capsnet.data import Dataset, outline
from capsnet.errors import InputError
from capsnet.kernels import native
from capsnet.models import Network, alike
from capsnet.training import defaults, prepare
from capsnet.training.finetune import frozen_line, name_of, start_from
from capsnet.training.schedule import steps_of

__all__ = ["dry_run", "layer_table"]


def dry_run(config: Config) -> str:
    """Text of the resolved configuration, layer table and memory estimate of a run; nothing is trained or written.

    Nothing is computed, and no image read where sizes and numbers are known without.

    Raises:
        InputError: as `fit.fit` would before it trains.
    """
    device = devices.resolve_device(config)
    dataset = prepare.prepare_data(config, read=False)
    config = defaults.resolved(prepare.as_read(config, dataset), dataset)
    assert config.epochs is not None
    network = prepare.layout(config, dataset)
    precision = devices.resolve_precision(config, device, network)
    lines = []
    if config.init_from is not None:
        source = pretrained.load(config.init_from)
        lines.append(start_from(network, source, name=name_of(config.init_from)))
    steps = steps_of(config, len(dataset.train))
    kernels = network.kernels(device, precision)
    validation = 0 if dataset.validation is None else len(dataset.validation)
    return "\n".join(
        [
            *(f"{name}: {value}" for name, value in config.flat().items()),
            "",
            layer_table(network),
            "",
            *lines,
            f"trained: {frozen_line(network)}",
            f"data: {len(dataset.train):,} training, {validation:,} validation, {len(dataset.test):,} test images of "
            f"{' x '.join(map(str, dataset.image_shape))}; {len(dataset.classes)} classes",
            *(f"note: {note}" for note in dataset.notes),
            f"augmentation: {prepare.augmentation_of(config, dataset)}",
            f"steps: {config.epochs * steps:,} ({config.epochs} epochs of {steps:,})",
            f"device: {config.devices} x {device.type}, precision {precision}"
            + "".join(f", {name} {value}" for name, value in kernels.items())
            + (f"; computed by {native.status()}" if device.type == "cpu" else ""),
            _memory(network, config, device, dataset, precision),
        ]
    )


def layer_table(network: Network) -> str:
    """One row a layer: name, kind, shape of its output for one image, parameters."""
    rows: list[tuple[str, str, str, str]] = []

    def note(name: str, module: nn.Module, inputs: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        shape = " x ".join(map(str, tensor.shape[1:])) if isinstance(tensor, Tensor) else ""
        own = sum(parameter.numel() for parameter in module.parameters())
        rows.append((name, type(module).__name__, shape, f"{own:,}" if own else ""))

    with torch.device("meta"):
        copy = alike(network)
    for name, layer in copy.named_modules():
        whole = name == "primary" or not list(layer.children())
        if name and whole and not name.startswith("primary."):
            layer.register_forward_hook(partial(note, name))
    with copy.plain(), torch.no_grad():
        copy(torch.empty(2, *network.image_shape, device="meta"))
    rows.append(("all", type(network).__name__, "", f"{network.parameter_count():,}"))
    headings = ("layer", "kind", "output", "parameters")
    widths = [max(len(row[k]) for row in [*rows, headings]) for k in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in [headings, *rows]
    )


def _memory(network: Network, config: Config, device: torch.device, dataset: Dataset, precision: str) -> str:
    """What each process takes of the memory of its device, and what is free; or in which parts batches fit there."""
    processes = devices.launch(config.devices)
    with suppress(InputError):  # what fits in no way is told with its size
        fits = memory.check_training(network, config, device, dataset, precision=precision, processes=processes)
        if fits[1]:
            return fits[1]
    batch_size = -(-config.batch_size // processes.world_size)
    needed = memory.training(network, config, device, dataset, precision=precision, batch_size=batch_size)
    if device.type == "cuda":
        needed += dataset.train.images.nbytes
    else:
        needed += outline.nbytes(dataset) + devices.resident()
    there = devices.free(device)
    text = f"memory: about {memory.amount(needed)} in each process"
    return text if there.size == math.inf else f"{text}; {memory.amount(there.size)} are {there.where}"
