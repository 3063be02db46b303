"""What is timed: a whole network with its loss and optimiser, in training and in inference."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import correctness
from benchmarks.correctness import Check
from benchmarks.flops import Flops, plainly
from benchmarks.timing import Stopwatch, Task, clock, timed
from capsnet import devices, memory
from capsnet.config import Config
from capsnet.data import Dataset, Split, describe
from capsnet.models import Network, Output, create, evaluation_mode
from capsnet.objective import Batch, Losses, Objective
from capsnet.options import size_of
from capsnet.training import prepare
from capsnet.training.averaging import averaged
from capsnet.training.batches import BatchLoader
from capsnet.training.cuda_graph import GraphedStep, check_graph
from capsnet.training.micro_batches import accumulated
from capsnet.training.schedule import optimizer_of

__all__ = ["TrainingWorkload", "random_images"]


def random_images(config: Config, classes: int, *, count: int = 1) -> Dataset:
    """Random images of the size and channels that `config` asks for; those of its data set where it asks for none."""
    draw = torch.Generator().manual_seed(config.seed)
    channels, *size = describe(config.data).image_shape
    shape = (count, config.channels or channels, *(size_of(config.image_size) or size))
    labels = torch.randint(classes, (count,), generator=draw)
    split = Split(torch.randint(256, shape, dtype=torch.uint8, generator=draw), labels)
    return Dataset("random", tuple(map(str, range(classes))), split, split)


class TrainingWorkload:
    """Network, loss and optimiser of `config` as `fit.fit` would have them, with random images in memory.

    Attributes:
        label: name in tables.
        images: images of one step.
        flop: of one step.
        resolved: precision and kernels that are used, and the number of threads.
        checked: what `check` found, once it is known.
    """

    checked: Check

    def __init__(self, config: Config, classes: int, *, label: str = "") -> None:
        self.config = config = replace(config, devices=1)
        self.classes, self.label, self.images = classes, label, config.batch_size
        self.device = devices.resolve_device(config)
        self.draw = torch.Generator().manual_seed(config.seed)
        dataset = random_images(config, classes, count=self.images)
        outline = prepare.layout(config, dataset)
        precision = devices.resolve_precision(config, self.device, outline)
        self.micro_batch, _ = memory.check_training(
            outline, config, self.device, dataset, precision=precision, processes=devices.launch()
        )
        self.network: Network = prepare.build(config, dataset).to(self.device)
        if config.cuda_graph:
            check_graph(config, self.device, self.network)
        self.fabric = devices.make_fabric(config, self.device, precision)
        self.average = averaged(self.network, config.ema) if config.ema else None
        optimizer = optimizer_of(self.network, config)
        self.objective, self.optimizer = self.fabric.setup(Objective(self.network, config), optimizer)
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = config.cuda_graph
        self.update = GraphedStep(self._update, batch_size=self.images) if config.cuda_graph else self._update
        self.batches = BatchLoader(dataset, config, self.device)
        self.flops = Flops.of(outline)
        self.flop = self.images * (self.flops.forward() + self.flops.backward())
        self.threads = config.threads or torch.get_num_threads()
        kernels = self.network.kernels(self.device, precision)
        self.resolved: dict[str, Any] = {"precision": precision, **kernels, "threads": self.threads}
        if self.micro_batch:
            self.resolved["micro_batch"] = self.micro_batch

    def data(self) -> Batch:
        """The next batch: drawn, gathered, converted to float, augmented."""
        order = torch.randperm(self.images, generator=self.draw)
        return self.batches(order, torch.arange(self.images), generator=self.draw)

    def step(self) -> float:
        """One training step; its loss."""
        losses = self.update(self.data())
        self._averaged()
        return float(losses.total.mean().item())

    def _update(self, batch: Batch) -> Losses:
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graph)
        losses = accumulated(batch, self.micro_batch, self._backward)
        self.optimizer.step()
        return losses

    def _backward(self, part: Batch, share: float, last: bool) -> Losses:
        losses: Losses = self.objective(*part)
        self.fabric.backward(losses.total.mean() * share)
        return losses

    def _averaged(self) -> None:
        """Add the weights to their average, if there is one."""
        if self.average is not None:
            self.average.update_parameters(self.network)

    def task(self) -> Task:
        """One training step at a time."""
        return lambda: {"": clock(self.step, self.device)[0]}

    def inference(self, count: int) -> Task:
        """Scores of `count` random images, in evaluation mode and without gradients."""
        images = torch.rand(count, *self.network.image_shape).to(self.device)

        def scores() -> Tensor:
            with torch.inference_mode(), self.fabric.autocast():
                output: Output = self.network(images)
            return output.scores

        measure = timed(scores, self.device)

        def task() -> Mapping[str, float]:
            with evaluation_mode(self.network):
                return measure()

        return task

    def parts(self) -> Mapping[str, float]:
        """Seconds of a training step by its parts, of their sum, and of another step that is not interrupted.

        Each part of the network ends where the next begins, and its backward where the gradient of its input is there.
        """
        watch = Stopwatch(self.device)
        batch = self.data()
        watch("data")
        with self._interrupted(watch) as names:
            self.optimizer.zero_grad(set_to_none=not self.config.cuda_graph)
            losses: Losses = self.objective(*batch)
            total = losses.total.mean()
            watch("loss forward")
            self.fabric.backward(total)
            watch(f"{names[0]} backward")
        self.optimizer.step()
        watch("optimiser")
        order = [f"{name} {way}" for name in (*names, "loss") for way in ("forward", "backward")]
        seconds = {name: watch.seconds[name] for name in ("data", *order, "optimiser")}
        return {**seconds, "sum of the parts": sum(seconds.values()), "whole step": clock(self.step, self.device)[0]}

    @contextmanager
    def _interrupted(self, watch: Stopwatch) -> Iterator[list[str]]:
        """Inside, a forward and backward of the network stop the watch at the boundaries of its parts, named here."""
        parts = {
            name: child for name, child in self.network.named_children() if next(child.parameters(), None) is not None
        }
        if self.resolved.get("convolution") == "winograd":  # which calls neither, and is not used where one has a hook
            parts = {"conv + primary": parts.pop("conv"), **{name: parts[name] for name in parts if name != "primary"}}
        names = list(parts)

        def at(name: str, before: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                watch(f"{before} forward")
                _on_gradient(inputs[0], lambda: watch(f"{name} backward"))

            return hook

        def end(module: nn.Module, inputs: object, output: Output) -> None:
            watch(f"{names[-1]} forward")
            last = output.scores if output.reconstruction is None else output.reconstruction
            _on_gradient(last, lambda: watch("loss backward"))

        handles = [
            self.network.register_forward_pre_hook(lambda *_: watch.start()),
            self.network.register_forward_hook(end),
        ]
        for before, (name, part) in zip(names, list(parts.items())[1:], strict=False):
            handles.append(part.register_forward_pre_hook(at(name, before)))
        try:
            yield names
        finally:
            for handle in handles:
                handle.remove()

    def part_flop(self, part: str) -> int | None:
        """FLOP of a part of a step, or of all of it; None for a part without matrix products."""
        name, _, way = part.rpartition(" ")
        if part in ("data", "optimiser") or name == "loss":
            return None
        each = {"forward": self.flops.forward, "backward": self.flops.backward}.get(way)
        return self.images * each(name) if each else self.flop

    def check(self) -> Check:
        """Compare with the plain network of the same weights in float64, on a few images; see `correctness.check`.

        Class capsules start short, and their couplings nearly uniform, so that a wrong routing would hardly show. Here
        their weights are scaled for a mean length of about a half.
        """
        count = max(2, min(8, 10**10 * self.images // self.flop))  # float64 is slow
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(count, *self.network.image_shape, generator=draw)
        labels = torch.arange(count) % len(self.network.classes)
        here = images.to(self.device), labels.to(self.device)
        reference, plain = (create(**plainly(self.network)) for _ in range(2))
        with _longer_capsules(self.network, here[0]):
            for copy in (reference.double(), plain):
                copy.load_state_dict(self.network.state_dict())
            found = correctness.results(self.objective, self.network, *here, backward=self.fabric.backward)
        truth = correctness.results(Objective(reference, self.config), reference, images.double(), labels)
        objective = self.fabric.setup_module(Objective(plain.to(self.device), self.config))
        rounded = correctness.results(objective, plain, *here, backward=self.fabric.backward)
        precision, convolution = self.resolved["precision"], self.resolved.get("convolution", "direct")
        return correctness.check(
            found,
            truth,
            allowed=correctness.tolerance(precision=precision, convolution=convolution, device=self.device),
            images=count,
            who=self.label or self.config.model,
            rounding=correctness.errors_of(rounded, truth),
            most_rounding=correctness.MOST_ROUNDING["bf16" if precision == "bf16" else "float32"],
        )


def _on_gradient(tensor: Tensor, act: Callable[[], None]) -> None:
    """Act when the gradient of a tensor is there."""
    tensor.register_hook(lambda _: act())  # type: ignore[no-untyped-call]


@contextmanager
def _longer_capsules(network: Network, images: Tensor) -> Iterator[None]:
    """Inside, scale the vote weights of a network whose scores are lengths so that |s| is about 1, and those a half."""
    with torch.no_grad():
        output: Output = network(images)
    if output.pose is None or not torch.allclose(output.scores, output.pose.norm(dim=-1), rtol=1e-2):
        yield
        return
    layer: Any = network.class_capsules
    before = layer.weight.detach().clone()
    with torch.no_grad():
        length = output.scores.mean()
        layer.weight.mul_(((1 - length) / length).sqrt())
    try:
        yield
    finally:
        with torch.no_grad():
            layer.weight.copy_(before)
