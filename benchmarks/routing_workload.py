"""What is timed: votes and routing alone, without the layers around them."""

import torch
from torch import Tensor, nn

from benchmarks import correctness
from benchmarks.correctness import Check
from benchmarks.flops import Flops
from benchmarks.timing import Stopwatch, Task
from benchmarks.training_workload import random_images
from capsnet import devices
from capsnet import functional as F
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.kernels.select import resolve_routing_kernel
from capsnet.layers import ClassCapsules
from capsnet.models import Network
from capsnet.training import prepare

__all__ = ["RoutingWorkload"]


class RoutingWorkload:
    """The class capsules of the network of `config` on random poses: votes, routing and their backward.

    Its attributes are those of `TrainingWorkload`.
    """

    checked: Check

    def __init__(self, config: Config, classes: int, *, label: str = "") -> None:
        self.config, self.classes, self.label, self.images = config, classes, label, config.batch_size
        self.device = devices.resolve_device(config)
        torch.manual_seed(config.seed)
        self.layer = self._layer(config).to(self.device)
        ins, in_dim, outs, out_dim = self.layer.weight.shape
        self.u = F.squash(torch.randn(self.images, ins, in_dim)).to(self.device)
        self.gradient = torch.randn(self.images, outs, out_dim).to(self.device)
        self.flops = Flops.of(self._network(config))
        self.flop = 3 * self.images * self.flops.forward("class_capsules")  # the poses get a gradient too
        self.threads = config.threads or torch.get_num_threads()
        self.resolved = {
            "routing_kernel": resolve_routing_kernel(self.layer.routing_kernel, self.device),
            "threads": self.threads,
        }

    def _network(self, config: Config) -> Network:
        return prepare.layout(config, random_images(config, self.classes))

    def _layer(self, config: Config) -> ClassCapsules:
        """The class capsules of the network of `config`, with random weights."""
        layer = getattr(self._network(config), "class_capsules", None)
        if not isinstance(layer, ClassCapsules):
            raise InputError(f"model must be one with dynamic routing; got {config.model}")
        layer = layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        return layer

    def step(self) -> None:
        """Votes and routing, forward and backward."""
        self._run()

    def task(self) -> Task:
        """Seconds of the forward, of the backward, and of both."""
        return lambda: (seconds := self._run()[0]) | {"": sum(seconds.values())}

    def part_flop(self, part: str) -> int:
        """FLOP of the forward or backward, or of both."""
        return {"forward": self.flop // 3, "backward": self.flop // 3 * 2}.get(part, self.flop)

    def check(self) -> Check:
        """Compare with plain routing in float64, on a few of the poses; see `correctness.check`."""
        count = max(1, min(8, self.images, 2 * 10**9 * self.images // self.flop))  # float64 is slow
        _, found = self._run(count)
        plain = self._layer(self.config.changed(routing_kernel="plain")).double()
        plain.load_state_dict(self.layer.state_dict())
        u = self.u[:count].cpu().double().requires_grad_()
        pose = plain(u).pose
        pose.backward(self.gradient[:count].cpu().double())
        truth = {"pose": pose.detach(), **_gradients(plain, u)}
        who = self.label or f"routing_kernel {self.resolved['routing_kernel']}"
        allowed = correctness.TOLERANCES["float32"]
        return correctness.check(found, truth, allowed=allowed, images=count, who=who)

    def _run(self, count: int | None = None) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Seconds of forward and backward, and their results."""
        u = self.u[:count].detach().requires_grad_()
        self.layer.zero_grad()
        watch = Stopwatch(self.device)
        pose = self.layer(u).pose
        watch("forward")
        pose.backward(self.gradient[:count])
        watch("backward")
        return watch.seconds, {"pose": pose.detach(), **_gradients(self.layer, u)}


def _gradients(layer: nn.Module, u: Tensor) -> dict[str, Tensor]:
    named = [("u", u), *layer.named_parameters()]
    return {f"gradient of {name}": tensor.grad for name, tensor in named if tensor.grad is not None}
