"""How much arithmetic a network is, counted from the sizes of its layers.

One multiply-add is 2 FLOP. Convolutions are counted as direct ones, whatever computes them; squash, softmax, losses and
optimiser are left out, as they are small.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from capsnet.layers import ClassCapsules
from capsnet.models import CapsNet, Network, create

__all__ = ["backward_flop", "forward_flop", "multiply_adds", "routing_multiply_adds"]


def multiply_adds(network: Network) -> dict[str, int]:
    """Multiply-adds of the forward pass of one image, by layer, the first layer first.

    A capsule network has `conv1`, `primary`, `votes`, `routing` and, if there is one, `decoder`: 8.3, 191.1, 1.5, 0.9
    and 1.4 million for the paper's on MNIST. Another network has the names of its layers.
    """
    if not isinstance(network, CapsNet):
        return _of_layers(network)
    counts = {
        name: math.prod(layer.out_size) * layer.weight.numel()
        for name, layer in (("conv1", network.conv), ("primary", network.primary.conv))
    }
    counts |= routing_multiply_adds(network.class_capsules)
    if network.decoder is not None:
        weights = [layer.weight.numel() for layer in network.decoder.layers if isinstance(layer, nn.Linear)]
        counts["decoder"] = sum(weights)
    return counts


def routing_multiply_adds(layer: ClassCapsules) -> dict[str, int]:
    """The same of class capsules alone: `votes`, and in `routing` r weighted sums and r - 1 agreements."""
    ins, _, outs, out_dim = layer.weight.shape
    return {"votes": layer.weight.numel(), "routing": (2 * layer.iterations - 1) * ins * outs * out_dim}


def forward_flop(counts: dict[str, int], layers: Collection[str] | None = None) -> int:
    """FLOP of the forward pass of one image through `layers`, or all."""
    return 2 * sum(count for name, count in counts.items() if layers is None or name in layers)


def backward_flop(counts: dict[str, int], layers: Collection[str] | None = None) -> int:
    """FLOP of the backward pass: twice the forward, as weights and input each get a gradient; but images get none."""
    first = next(iter(counts))
    unneeded = counts[first] if layers is None or first in layers else 0
    return 2 * forward_flop(counts, layers) - 2 * unneeded


def _of_layers(network: Network) -> dict[str, int]:
    counts: dict[str, int] = {}

    def note(name: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            assert isinstance(module.weight, Tensor)
            counts[name] = math.prod(output.shape[2:]) * module.weight.numel()

        layer.register_forward_hook(hook)

    with torch.device("meta"), torch.no_grad():
        copy = create(**network.config)
        for name, layer in copy.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                note(name, layer)
        copy(torch.empty(1, *network.image_shape))
    return counts
