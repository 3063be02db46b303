"""What is timed: votes and routing alone, without the layers around them."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet import machine
from capsnet.bench import gate, work
from capsnet.bench.clock import Tape, Task
from capsnet.bench.gate import Check
from capsnet.config import Config
from capsnet.layers import ClassCapsules, resolve_kernel

__all__ = ["RoutingAlone"]


class RoutingAlone:
    """Class capsules of `config` on random poses of `in_capsules` capsules: votes, routing and their backward.

    Args:
        config: of the run.
        classes: number of output capsules.
        in_capsules: number of input capsules.

    Attributes: as of `WholeNetwork`.

    Raises:
        InputError: a kernel that cannot run on this device.
    """

    def __init__(self, config: Config, classes: int, *, in_capsules: int, label: str = "") -> None:
        self.config, self.label, self.images = config, label, config.batch_size
        self.sizes = {"classes": classes, "in_capsules": in_capsules}
        self.device = machine.resolve_device(config)
        torch.manual_seed(config.seed)
        self.layer = self._layer(config, in_capsules, classes).to(self.device)
        self.u = F.squash(torch.randn(self.images, in_capsules, config.primary_dim)).to(self.device)
        self.gradient = torch.randn(self.images, classes, config.class_dim).to(self.device)
        self.counts = work.routing_multiply_adds(self.layer)
        self.flop = 3 * self.images * work.forward_flop(self.counts)  # the poses below get a gradient too
        self.threads = config.threads or torch.get_num_threads()
        self.resolved = {"kernel": resolve_kernel(config.kernel, self.device), "threads": self.threads}

    @staticmethod
    def _layer(config: Config, in_capsules: int, classes: int) -> ClassCapsules:
        return ClassCapsules(
            in_capsules,
            config.primary_dim,
            classes,
            config.class_dim,
            iterations=config.routing_iterations,
            bias=config.routing_bias,
            leaky=config.leaky,
            detach_routing=config.detach_routing,
            kernel=config.kernel,
        )

    def step(self) -> None:
        """Votes and routing, forward and backward."""
        self._run()

    def task(self) -> Task:
        """Forward, backward and both at a time."""

        def task() -> Mapping[str, float]:
            forward, backward = self._run()[0].seconds.values()
            return {"forward": forward, "backward": backward, "": forward + backward}

        return task

    def part_flop(self, part: str) -> int:
        """FLOP of the forward or backward, or of both."""
        return {"forward": self.flop // 3, "backward": self.flop // 3 * 2}.get(part, self.flop)

    def check(self) -> Check:
        """Compare with plain routing in float64, on a few of the poses.

        Raises:
            Incorrect: see `gate.check`.
        """
        count = max(1, min(8, self.images, 2 * 10**9 * self.images // self.flop))  # float64 is slow
        _, found = self._run(count)
        ins, _, outs, _ = self.layer.weight.shape
        plain = self._layer(replace(self.config, kernel="plain"), ins, outs).double()
        plain.load_state_dict(self.layer.state_dict())
        u = self.u[:count].cpu().double().requires_grad_()
        pose = plain(u).pose
        pose.backward(self.gradient[:count].cpu().double())
        truth = {"pose": pose.detach(), **_gradients(plain, u)}
        who = self.label or f"kernel {self.resolved['kernel']}"
        return gate.check(found, truth, allowed=gate.TOLERANCES["float32"], images=count, who=who)

    def _run(self, count: int | None = None) -> tuple[Tape, dict[str, Tensor]]:
        u = self.u[:count].detach().requires_grad_()
        self.layer.zero_grad()
        tape = Tape(self.device, torch.enable_grad)
        (pose,) = tape.forward("votes + routing", lambda: (self.layer(u).pose,))
        tape.backward(self.gradient[:count])
        return tape, {"pose": pose, **_gradients(self.layer, u)}


def _gradients(layer: nn.Module, u: Tensor) -> dict[str, Tensor]:
    named = [("u", u), *layer.named_parameters()]
    return {f"gradient of {name}": tensor.grad for name, tensor in named if tensor.grad is not None}
