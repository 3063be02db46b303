"""What is measured: ceilings, step, inference, parts, routing, scaling, each a method that adds rows of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks import roofline
from benchmarks.memory import peak
from benchmarks.routing_workload import RoutingWorkload
from benchmarks.timing import Spread, Task, interleaved
from benchmarks.training_workload import TrainingWorkload
from capsnet import devices
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.kernels.select import resolve_routing_kernel
from capsnet.models import options_of

__all__ = ["FULL", "QUICK", "SECTIONS", "Benchmark", "Plan", "measured"]

SECTIONS = ("ceilings", "step", "inference", "parts", "routing", "scaling")
"""What can be measured, in this order: each is a method of `Benchmark`."""
Workload = TrainingWorkload | RoutingWorkload
Made = TypeVar("Made", TrainingWorkload, RoutingWorkload)
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Number of measurements, and all sizes that the configuration does not say."""

    repeats: int = 7
    inference: tuple[int, ...] = (1, 128, 512)  # images
    matrices: tuple[int, ...] = (1024, 1536, 2048)  # sides; on a GPU four times as large
    copied: int = 2**28  # bytes; the same
    batches: tuple[int, ...] = (1, 8, 32, 128, 512)  # these and the following ones are scaled
    image_sizes: tuple[int, ...] = (28, 48, 64, 96)
    capsule_types: tuple[int, ...] = (32, 128, 512)
    output_capsules: tuple[int, ...] = (10, 100, 1000)
    iterations: tuple[int, ...] = (1, 2, 3, 4, 5)


FULL = Plan()
QUICK = Plan(2, (1, 8), (256,), 2**24, (1, 8), (28, 32), (4, 32), (2, 10), (1, 3))


def measured(section: str, model: str) -> set[str]:
    """The options of a run that the numbers of a section depend on."""
    machine_options = {"device", "threads"}
    options = {each.name for each in fields(options_of(model))} - {"init"}
    network = {"model", "data", "image_size", "channels"} | options | machine_options
    unrouted = {"data", "channels", "conv_channels", "primary_scale", "convolution"}
    unrouted |= {"reconstruction", "decoder_sizes", "standardize"}
    augmentation = {"augment", "crop", "shift", "flip", "rotation", "scale", "shear", "brightness", "contrast", "erase"}
    parts = network | augmentation | {"batch_size", "precision", "mask", "weight_decay", "ema"}
    scaled = {"batch_size", "image_size", "capsule_types", "routing_iterations"}
    routing = network - unrouted | {"batch_size"}
    return {
        "ceilings": machine_options,
        "step": parts | {"cuda_graph"},
        "inference": network - {"detach_routing", "dropout"} | {"precision"},
        "parts": parts,
        "routing": routing,
        "scaling": (routing if _has_dynamic_routing(model) else parts) - scaled,
    }[section]


@dataclass
class Benchmark:
    """The sections, a method each, and what they share: `rows` of numbers, and networks `checked` against float64.

    Routing is measured with every kernel unless variants were asked for (`compared`).
    """

    config: Config
    classes: int
    variants: Sequence[tuple[str, Config]]
    plan: Plan
    say: Callable[[str], object]
    compared: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    checked: list[dict[str, Any]] = field(default_factory=list)
    _ceilings: dict[tuple[str, int, str], float] = field(default_factory=dict)
    _networks: list[TrainingWorkload] = field(default_factory=list)

    def ceilings(self) -> None:
        """The best matrix products and the copy, for every device and number of threads among the variants."""
        self.say("ceilings: matrix products and a copy ...")
        places = dict.fromkeys(
            (devices.resolve_device(c), c.threads or torch.get_num_threads()) for _, c in self.variants
        )
        for device, threads in places:
            where = f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if len(places) > 1 else ""
            factor = 4 if device.type == "cuda" else 1
            torch.set_num_threads(threads)
            for precision, kind in roofline.TYPES.items():
                sizes = [factor * size for size in self.plan.matrices]
                size, rates = roofline.matrix_product(precision, sizes, device=device, repeats=self.plan.repeats)
                name = f"{str(kind).removeprefix('torch.')} matrix product, {size} x {size}"
                row = self._row("ceilings", name, where, rates, unit="GFLOP/s")
                self._ceilings[device.type, threads, precision] = row["median"]
            rates = roofline.copy(factor * self.plan.copied, device=device, repeats=self.plan.repeats)
            self._row("ceilings", f"copy of {factor * self.plan.copied // 2**20} MiB", where, rates, unit="GB/s")

    def step(self) -> None:
        """A training step of every variant, and its memory."""
        made = self._trained()
        self.say("step: training steps, and their memory in fresh processes ...")
        name = f"training step, {self.config.batch_size} images"
        self._measure("step", name, made, TrainingWorkload.task, memory=True)

    def inference(self) -> None:
        """Scores of batches of several sizes."""
        made = self._trained()
        for count in self.plan.inference:
            name = f"inference, {count} image{'s' if count > 1 else ''}"
            self.say(f"{name} ...")
            self._measure("inference", name, made, partial(TrainingWorkload.inference, count=count), inferred=count)

    def parts(self) -> None:
        """A training step by its parts."""
        made = self._trained()
        self.say("parts: a training step, part by part ...")
        self._measure("parts", "", made, lambda workload: workload.parts)

    def routing(self) -> None:
        """Votes and routing alone: every kernel of this device, with and without a gradient through the couplings."""
        named = self.variants if self.compared or not _has_dynamic_routing(self.config.model) else self._kernels()
        made = [self._checked(RoutingWorkload, config, label) for label, config in named]
        self.say("routing: votes and routing alone ...")
        name = f"votes + routing, {self.config.batch_size} images"
        self._measure("routing", name, made, RoutingWorkload.task, memory=True)

    def scaling(self) -> None:
        """Step or routing time against one size at a time."""
        batch = self.config.batch_size
        few, some = {"batch_size": min(4, batch)}, {"batch_size": min(16, batch)}
        self._scale("batch", self.plan.batches, TrainingWorkload, "batch_size", {})
        if _has_dynamic_routing(self.config.model):
            self._scale("image size", self.plan.image_sizes, TrainingWorkload, "image_size", few)
            self._scale("primary capsules", self.plan.capsule_types, RoutingWorkload, "capsule_types", some)
            self._scale("output capsules", self.plan.output_capsules, RoutingWorkload, "classes", few)
            self._scale("iterations", self.plan.iterations, RoutingWorkload, "routing_iterations", {})

    def _scale(self, what: str, values: Sequence[int], kind: type[Made], option: str, options: dict[str, Any]) -> None:
        for value in values:
            self.say(f"scaling: {what}, {option.replace('_', ' ')} {value:,} ...")
            changes = options if option == "classes" else {**options, option: value}
            classes = value if option == "classes" else self.classes
            made = [self._checked(kind, c.changed(**changes), label, classes) for label, c in self.variants]
            first = made[0]
            size = first.u.shape[1] if isinstance(first, RoutingWorkload) and what == "primary capsules" else value
            images = "" if what == "batch" else f" ({first.images} images)"
            name = f"{'step' if isinstance(first, TrainingWorkload) else 'routing'}, {what} {size:,}{images}"
            self._measure("scaling", name, made, kind.task)

    def _trained(self) -> list[TrainingWorkload]:
        """The variants' networks, made and checked when they are first asked for."""
        if not self._networks:
            self.say("checking results against float64 ...")
            self._networks = [self._checked(TrainingWorkload, config, label) for label, config in self.variants]
            self.checked = [
                {
                    "variant": w.label,
                    "parameters": w.network.parameter_count(),
                    "forward_gflop_per_image": w.flops.forward() / 1e9,
                    **w.resolved,
                    **asdict(w.checked),
                }
                for w in self._networks
            ]
        return self._networks

    def _checked(self, kind: type[Made], config: Config, label: str, classes: int = 0) -> Made:
        workload = kind(config, classes or self.classes, label=label)
        workload.checked = _on_threads(workload, workload.check)()
        return workload

    def _kernels(self) -> list[tuple[str, Config]]:
        named: list[tuple[str, Config]] = []
        for kernel in ("plain", "fused"):
            try:
                resolve_routing_kernel(kernel, devices.resolve_device(self.config))
            except InputError:
                continue
            if kernel == "plain" or not self.config.options.squash_epsilon:  # which only plain routing has
                config = self.config.changed(routing_kernel=kernel)
                named += [(kernel, config.changed(detach_routing=False))]
                named += [(f"{kernel}, detached", config.changed(detach_routing=True))]
        return named

    def _measure(
        self,
        section: str,
        name: str,
        made: Sequence[Made],
        task_of: Callable[[Made], Task],
        *,
        inferred: int = 0,
        memory: bool = False,
    ) -> None:
        """Time workloads in turn and add a row for each part that their tasks name.

        `inferred` images are not trained on; with `memory`, peaks are measured too.
        """
        repeats = min(3, self.plan.repeats) if section == "scaling" else self.plan.repeats
        samples = interleaved([_on_threads(workload, task_of(workload)) for workload in made], repeats)
        for part in dict.fromkeys(part for sample in samples for part in sample):
            for workload, sample in zip(made, samples, strict=True):
                if part not in sample or (part and section == "scaling"):
                    continue
                row = self._row(section, ": ".join(filter(None, (name, part))), workload.label, sample[part])
                if not part:
                    row["images"] = inferred or workload.images
                    row["images_per_second"] = 1000 * row["images"] / row["median"]
                if flop := inferred * workload.flops.forward() or workload.part_flop(part):
                    row["gflop_per_second"] = flop / row["median"] / 1e6
                    key = (workload.device.type, workload.threads, str(workload.resolved.get("precision", "32")))
                    if key in self._ceilings:
                        row["share_of_ceiling"] = row["gflop_per_second"] / self._ceilings[key]
                if section == "parts":
                    row["share_of_step"] = row["median"] / 1000 / Spread.of(sample["whole step"]).median
                else:
                    row["error"] = workload.checked.error
                if memory and not part:
                    row |= peak(workload)

    def _row(self, section: str, name: str, label: str, values: Sequence[float], *, unit: str = "ms") -> dict[str, Any]:
        """Add a number; `values` are seconds where the unit is ms."""
        scaled = [1000 * value for value in values] if unit == "ms" else values
        row: dict[str, Any] = {"section": section, "name": name, "variant": label, "unit": unit}
        row |= asdict(Spread.of(scaled))
        base = next((r for r in self.rows if (r["section"], r["name"]) == (section, name)), None)
        if base and unit == "ms":
            base["ratio"], row["ratio"] = 1.0, row["median"] / base["median"]
        self.rows.append(row)
        return row


def _has_dynamic_routing(model: str) -> bool:
    return hasattr(options_of(model), "routing_iterations")


def _on_threads(workload: Workload, function: Callable[[], T]) -> Callable[[], T]:
    """`function` on the number of threads that `workload` is to have."""

    def call() -> T:
        torch.set_num_threads(workload.threads)
        return function()

    return call
