"""What is timed: a whole network with its loss and optimiser."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from capsnet import machine, memory, runs, train
from capsnet.bench import gate, work
from capsnet.bench.clock import Tape, Task, clock, timed
from capsnet.bench.gate import Check
from capsnet.config import Config, size_of, with_defaults
from capsnet.data import Dataset, Split
from capsnet.feed import Feed
from capsnet.graph import GraphedStep, check_graph
from capsnet.layers import resolve_kernel
from capsnet.models import CapsNet, Network, Output, builder_options, create
from capsnet.objective import Batch, Losses, Objective

__all__ = ["PARTS", "WholeNetwork", "image_shape", "layout"]

PARTS: dict[str, tuple[str, ...]] = {
    "conv1": ("conv1",),
    "primary": ("primary",),
    "stem (conv1 + primary)": ("conv1", "primary"),
    "votes + routing": ("votes", "routing"),
    "decoder": ("decoder",),
}
"""Functions that a capsule network's step is cut into, and the layers (`work.multiply_adds`) in each."""


def image_shape(config: Config) -> tuple[int, int, int]:
    """Channels, height and width: those of MNIST where the configuration leaves them open."""
    return config.channels or 1, *(size_of(config.image_size) or (28, 28))


def layout(config: Config, classes: int) -> Network:
    """The network of `config` without memory: its sizes."""
    options = {name: getattr(with_defaults(config), name) for name in builder_options(config.model)}
    return runs.outline(config.model, image_shape=image_shape(config), num_classes=classes, **options)


class WholeNetwork:
    """Network, loss and optimiser of `config` as `train.fit` would have them, with random images in memory.

    Args:
        config: of the run.
        classes: number of classes.

    Attributes:
        label: what the tables call it.
        images: images of one step.
        sizes: what else it takes to make it again.
        flop: of one training step, direct arithmetic.
        resolved: precision, kernel and stem that are used, and the number of threads.

    Raises:
        InputError: what cannot be built or cannot run on this device.
    """

    def __init__(self, config: Config, classes: int, *, label: str = "") -> None:
        config = replace(config, devices=1)
        self.config, self.label, self.images = config, label, config.batch_size
        self.sizes = {"classes": classes}
        self.device = machine.resolve_device(config)
        self.draw = torch.Generator().manual_seed(config.seed)
        pixels = torch.randint(256, (self.images, *image_shape(config)), dtype=torch.uint8, generator=self.draw)
        labels = torch.randint(classes, (self.images,), generator=self.draw)
        split = Split(pixels, labels)
        dataset = Dataset("random", tuple(str(k) for k in range(classes)), split, split)
        outlined = layout(config, classes)
        precision = machine.resolve_precision(config, self.device, outlined)
        memory.check_training(outlined, config, self.device, dataset, precision=precision, processes=1)
        self.network: Network = train.build(config, dataset).to(self.device)
        if config.cuda_graph:
            check_graph(config, self.device, self.network)
        self.fabric = machine.make_fabric(config, self.device, precision)
        plain = Objective(self.network, config)
        adam = torch.optim.Adam(self.network.parameters(), lr=config.lr, fused=True)
        self.objective, self.optimizer = self.fabric.setup(plain, adam)
        for group in self.optimizer.param_groups:
            group["capturable"] = config.cuda_graph
        self.update = GraphedStep(self._update, batch_size=self.images) if config.cuda_graph else self._update
        self.feed = Feed(dataset, config, self.device)
        self.counts = work.multiply_adds(self.network)
        self.flop = self.images * (work.forward_flop(self.counts) + work.backward_flop(self.counts))
        self.threads = config.threads or torch.get_num_threads()
        self.resolved = {"precision": precision, **self._kernels(), "threads": self.threads}

    def _kernels(self) -> dict[str, str]:
        if not isinstance(self.network, CapsNet):
            return {}
        with self.fabric.autocast():
            stem = self.network.resolved_stem(torch.empty(0, device=self.device))
        return {"kernel": resolve_kernel(self.network.class_capsules.kernel, self.device), "stem": stem}

    def data(self) -> Batch:
        """The next batch: drawn, gathered, made float, moved about."""
        order = torch.randperm(self.images, generator=self.draw)
        return self.feed(order, torch.arange(self.images), generator=self.draw)

    def step(self) -> float:
        """One training step; its loss."""
        return float(self.update(self.data()).total.mean().item())

    def _update(self, batch: Batch) -> Losses:
        """Forward, backward and Adam."""
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graph)
        losses: Losses = self.objective(*batch)
        self.fabric.backward(losses.total.mean())
        self.optimizer.step()
        return losses

    def inference(self, count: int) -> Task:
        """Scores of `count` random images, in evaluation mode and without gradients."""
        images = torch.rand(count, *self.network.image_shape).to(self.device)

        def scores() -> Tensor:
            with torch.inference_mode(), self.fabric.autocast():
                output: Output = self.network(images)
            return output.scores

        measure = timed(scores, self.device)

        def task() -> Mapping[str, float]:
            self.network.eval()
            seconds = measure()
            self.network.train()
            return seconds

        return task

    def parts(self) -> Mapping[str, float]:
        """Seconds of a training step cut into its parts, of their sum, and of a whole step beside it."""
        tape = self.cut_step()
        tape.alone("optimiser", self.optimizer.step)
        whole, _ = clock(self.step, self.device)
        return {**tape.seconds, "sum of the parts": sum(tape.seconds.values()), "whole step": whole}

    def cut_step(self) -> Tape:
        """A training step up to its gradients, part by part."""
        tape = Tape(self.device, self.fabric.autocast)
        images, labels, _ = tape.alone("data", self.data)
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graph)
        output = self._cut_network(tape, images, labels)
        objective = Objective(_Said(output), self.config)
        (loss,) = tape.forward("loss", lambda: (objective(images, labels).total.mean(),))
        tape.backward(torch.ones_like(loss))
        return tape

    def _cut_network(self, tape: Tape, images: Tensor, labels: Tensor) -> Output:
        network = self.network
        if not isinstance(network, CapsNet):
            return Output(*tape.forward("network", lambda: (network(images).scores,)))
        if self.resolved["stem"] == "direct":
            (x,) = tape.forward("conv1", lambda: (torch.relu(network.conv(images)),))
            (u,) = tape.forward("primary", lambda: (network.primary(x),))
        else:
            (u,) = tape.forward("stem (conv1 + primary)", lambda: (network.primary_poses(images),))
        pose, scores = tape.forward("votes + routing", lambda: _pose_and_activation(network.class_capsules, u))
        decoder = network.decoder
        if decoder is None:
            return Output(scores, None, pose)
        index = labels if self.config.mask == "label" else scores.argmax(-1)
        (drawn,) = tape.forward("decoder", lambda: (decoder(pose, index),))
        return Output(scores, drawn, pose)

    def part_flop(self, part: str) -> int | None:
        """FLOP of a step in `conv1 forward`, ..., or in all of it; None for a part without matrix products."""
        if part in ("", "sum of the parts", "whole step"):
            return self.flop
        name, _, direction = part.rpartition(" ")
        layers = tuple(self.counts) if name == "network" else PARTS.get(name)
        if layers is None:
            return None
        flop = work.forward_flop if direction == "forward" else work.backward_flop
        return self.images * flop(self.counts, layers)

    def check(self) -> Check:
        """Compare with the plain network of the same weights in float64, on a few images.

        Class capsules start short, and their couplings nearly uniform, so that a wrong routing would hardly show. Here
        their weights are scaled for a mean length of about a half.

        Raises:
            Incorrect: see `gate.check`.
        """
        per_image = max(1, self.flop // self.images)
        count = max(2, min(8, 10**10 // per_image))  # float64 is slow
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(count, *self.network.image_shape, generator=draw)
        labels = torch.arange(count) % len(self.network.classes)
        here = images.to(self.device), labels.to(self.device)
        plainly = {name: how for name, how in _PLAINLY.items() if name in self.network.config}
        reference = create(**{**self.network.config, **plainly}).double()
        with _longer_capsules(self.network, here[0]):
            reference.load_state_dict(self.network.state_dict())
            found = gate.results(self.objective, self.network, *here, backward=self.fabric.backward)
        truth = gate.results(Objective(reference, self.config), reference, images.double(), labels)
        stem = self.resolved.get("stem", "direct")
        allowed = gate.tolerance(precision=str(self.resolved["precision"]), stem=str(stem), device=self.device)
        return gate.check(found, truth, allowed=allowed, images=count, who=self.label or self.config.model)

    def task(self) -> Task:
        """One training step at a time."""
        return lambda: {"": clock(self.step, self.device)[0]}


_PLAINLY = {"kernel": "plain", "stem": "direct"}


@contextmanager
def _longer_capsules(network: Network, images: Tensor) -> Iterator[None]:
    """For the time, scale the vote weights of a capsule network so that |s| is about 1, and so the length a half."""
    if not isinstance(network, CapsNet):
        yield
        return
    weight = network.class_capsules.weight
    before = weight.detach().clone()
    with torch.no_grad():
        length = network(images).scores.mean()
        weight.mul_(((1 - length) / length).sqrt())
    yield
    with torch.no_grad():
        weight.copy_(before)


class _Said(Network):
    """Stands for a network that has said `output`, so that its loss can be taken alone."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        return self.output


def _pose_and_activation(layer: Callable[[Tensor], Any], u: Tensor) -> tuple[Tensor, Tensor]:
    routed = layer(u)
    return routed.pose, routed.activation
