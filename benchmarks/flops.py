"""How much arithmetic a network is, as PyTorch counts its convolutions and matrix products: 2 FLOP per multiply-add.

Counted is the plain network with direct convolutions, whatever computes them. Squash, softmax, losses and optimiser are
left out, as they are small.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from capsnet.checkpoints import pretrained
from capsnet.models import Network

__all__ = ["Flops", "plainly"]


def plainly(network: Network) -> dict[str, Any]:
    """The configuration of the same network, computed in the plain, direct way."""
    plain = {"routing_kernel": "plain", "convolution": "direct"}
    return {**network.config, **{name: way for name, way in plain.items() if name in network.config}}


@dataclass(frozen=True)
class Flops:
    """FLOP of one image.

    Attributes:
        modules: of the forward pass through each module, by its name; "" is the whole network.
        first: the module that gets the image, for which no gradient is needed.
    """

    modules: dict[str, int]
    first: str

    @classmethod
    def of(cls, network: Network) -> "Flops":
        """Count those of a network, which may be without memory."""
        twin = pretrained.outline(**plainly(network))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            twin(torch.empty(1, *twin.image_shape, device="meta"))
        counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
        modules = {name.partition(".")[2]: count for name, count in counts.items() if name != "Global"}
        first = next(name for name in modules if name and not any(other.startswith(f"{name}.") for other in modules))
        return cls(modules, first)

    def forward(self, part: str = "") -> int:
        """FLOP of the forward pass through a module, or several with plus signs between them."""
        return sum(self.modules.get(name, 0) for name in part.split(" + "))

    def backward(self, part: str = "") -> int:
        """The same of the backward pass: twice the forward, as weights and input each get a gradient."""
        begins = any(not name or f"{self.first}.".startswith(f"{name}.") for name in part.split(" + "))
        return 2 * self.forward(part) - (self.modules[self.first] if begins else 0)
