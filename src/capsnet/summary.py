"""What `--dry-run` tells: the configuration, the layers with their shapes and parameters, and the memory they need."""

import math
from dataclasses import asdict

import torch
from torch import Tensor, nn

from capsnet import machine, recipe, train
from capsnet.config import Config
from capsnet.kernels import native
from capsnet.layers import ClassCapsules, resolve_kernel
from capsnet.models import CapsNet, Network, create
from capsnet.objective import Objective

__all__ = ["activation_bytes", "dry_run", "layer_table"]


def dry_run(config: Config) -> str:
    """Text of the resolved configuration, layer table and memory estimate of a run; nothing is trained or written.

    Raises:
        InputError: as `train.fit` would before it trains.
    """
    device = machine.resolve_device(config)
    dataset = train.prepare_data(config)
    config = recipe.resolved(config, dataset)
    assert config.epochs is not None
    network = train.build(config, dataset)
    per_process = -(-config.batch_size // config.devices)
    steps = math.ceil(len(dataset.train) / config.batch_size)
    parameters = network.parameter_count()
    kernels = _kernels(network, config, device)
    mebibytes = (16 * parameters + activation_bytes(network, config, per_process, device)) / 2**20
    validation = 0 if dataset.validation is None else len(dataset.validation)
    return "\n".join(
        [
            *(f"{name}: {value}" for name, value in asdict(config).items()),
            "",
            layer_table(network),
            "",
            f"data: {len(dataset.train):,} training, {validation:,} validation, {len(dataset.test):,} test images of "
            f"{' x '.join(map(str, dataset.image_shape))}; {len(dataset.classes)} classes",
            f"steps: {config.epochs * steps:,} ({config.epochs} epochs of {steps:,})",
            f"device: {config.devices} x {device.type}, precision {machine.resolve_precision(config, device, network)}"
            + "".join(f", {name} {value}" for name, value in kernels.items())
            + (f"; computed by {native.status()}" if device.type == "cpu" else ""),
            f"memory: about {mebibytes:,.0f} MiB a process for weights, gradients, Adam and activations in float32, "
            f"and {dataset.train.images.numel() / 2**20:,.0f} MiB of images",
        ]
    )


def layer_table(network: Network) -> str:
    """One row a layer: name, kind, shape of its output for one image, parameters."""
    rows: list[tuple[str, str, str, str]] = []

    def note(name: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            shape = " x ".join(map(str, tensor.shape[1:])) if isinstance(tensor, Tensor) else ""
            own = sum(parameter.numel() for parameter in module.parameters())
            rows.append((name, type(module).__name__, shape, f"{own:,}" if own else ""))

        layer.register_forward_hook(hook)

    copy = _on_meta(network, kernel="plain", stem="direct")  # in which every layer's own forward is called
    for name, layer in copy.named_modules():
        whole = isinstance(layer, ClassCapsules) or name == "primary" or not list(layer.children())
        if name and whole and not name.startswith("primary."):
            note(name, layer)
    with torch.no_grad():
        copy(torch.empty(2, *network.image_shape, device="meta"))
    rows.append(("all", type(network).__name__, "", f"{network.parameter_count():,}"))
    headings = ("layer", "kind", "output", "parameters")
    widths = [max(len(row[k]) for row in [*rows, headings]) for k in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in [headings, *rows]
    )


def activation_bytes(network: Network, config: Config, batch_size: int, device: torch.device) -> int:
    """Bytes that one training step keeps for its backward pass in float32, counted without computing anything."""
    storages: dict[int, tuple[object, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())
        return tensor

    objective = Objective(_on_meta(network, **_kernels(network, config, device)), config)
    weights = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
    images = torch.empty(batch_size, *network.image_shape, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        each = (batch_size,) if network.objects == 1 else (batch_size, network.objects)
        labels = torch.zeros(each, dtype=torch.int64, device="meta")
        alone = None if network.objects == 1 else torch.empty(*each, *network.image_shape, device="meta")
        losses = objective(images, labels, alone)
        del losses
    return sum(size for key, (_, size) in storages.items() if key not in weights)


def _kernels(network: Network, config: Config, device: torch.device) -> dict[str, str]:
    """How a capsule network is computed on `device`, by option; nothing for another network."""
    if not isinstance(network, CapsNet):
        return {}
    in_float32 = machine.resolve_precision(config, device, network) == "32"
    return {
        "kernel": resolve_kernel(network.class_capsules.kernel, device),
        "stem": network.resolved_stem(torch.empty(0, device=device)) if in_float32 else "direct",
    }


def _on_meta(network: Network, **options: str) -> Network:
    """The same network without memory, but for the given options where it has them."""
    changed = {name: value for name, value in options.items() if name in network.config}
    with torch.device("meta"):
        return create(**{**network.config, **changed})
