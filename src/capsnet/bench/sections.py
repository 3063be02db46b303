"""What is measured: ceilings, step, inference, parts, routing, scaling, each a method that notes rows of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, get_args

import torch

from capsnet import machine
from capsnet.bench import ceilings, memory, work
from capsnet.bench.alone import RoutingAlone
from capsnet.bench.clock import Spread, interleaved
from capsnet.bench.gate import Check
from capsnet.bench.whole import WholeNetwork, layout
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.layers import resolve_kernel
from capsnet.models import CapsNet, builder_options

__all__ = ["FULL", "QUICK", "SECTIONS", "Bench", "Plan"]

Subject = WholeNetwork | RoutingAlone
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that the configuration does not say.

    Attributes:
        repeats: measurements of each number.
        inference: batch sizes.
        matrices: sides of the matrices of the ceilings; on a GPU four times as large.
        copied: bytes of a copy.
        batches: of the scaling of a step, and so on: image sides in pixels, capsules, routing iterations.
    """

    repeats: int = 7
    inference: tuple[int, ...] = (1, 128, 512)
    matrices: tuple[int, ...] = (1024, 1536, 2048)
    copied: int = 2**28
    batches: tuple[int, ...] = (1, 8, 32, 128, 512)
    image_sizes: tuple[int, ...] = (28, 48, 64, 96)
    primary_capsules: tuple[int, ...] = (1152, 4608, 18432)
    output_capsules: tuple[int, ...] = (10, 100, 1000)
    iterations: tuple[int, ...] = (1, 2, 3, 4, 5)


FULL = Plan()
QUICK = Plan(2, (1, 8), (256,), 2**24, (1, 8), (28, 32), (144, 1152), (2, 10), (1, 3))


class Bench:
    """The sections, a method each, and what they share.

    Args:
        config: what all variants start from.
        classes: number of classes.
        variants: names and configurations, at least one.
        plan: repeats and sizes.
        tell: is given a line before what takes a while.
        compared: whether the variants were asked for; if not, routing is measured with every kernel.

    Attributes:
        rows: the numbers so far.
        checked: how far each variant's network was from float64.
    """

    def __init__(
        self,
        config: Config,
        classes: int,
        variants: Sequence[tuple[str, Config]],
        plan: Plan,
        tell: Callable[[str], object],
        *,
        compared: bool,
    ) -> None:
        self.config, self.classes, self.variants, self.plan, self.tell = config, classes, variants, plan, tell
        self.compared = compared
        self.rows: list[dict[str, Any]] = []
        self.checked: list[dict[str, Any]] = []
        self._ceilings: dict[tuple[str, int, str], float] = {}
        self._networks: list[tuple[WholeNetwork, Check]] = []

    # sections

    def ceilings(self) -> None:
        """The best matrix products and the copy, for every device and number of threads among the variants."""
        self.tell("ceilings: matrix products and a copy ...")
        machines = dict.fromkeys(
            (machine.resolve_device(c), c.threads or torch.get_num_threads()) for _, c in self.variants
        )
        for device, threads in machines:
            where = f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if len(machines) > 1 else ""
            factor = 4 if device.type == "cuda" else 1
            torch.set_num_threads(threads)
            for precision, kind in ceilings.TYPES.items():
                sizes = [factor * size for size in self.plan.matrices]
                size, rates = ceilings.matrix_product(precision, sizes, device=device, repeats=self.plan.repeats)
                name = f"{str(kind).removeprefix('torch.')} matrix product, {size} x {size}"
                row = self._row("ceilings", name, where, rates, unit="GFLOP/s")
                self._ceilings[device.type, threads, precision] = row["median"]
            rates = ceilings.copy(factor * self.plan.copied, device=device, repeats=self.plan.repeats)
            self._row("ceilings", f"copy of {factor * self.plan.copied // 2**20} MiB", where, rates, unit="GB/s")

    def step(self) -> None:
        """A training step of every variant."""
        subjects = self._whole()
        self.tell("step: training steps, and their memory in fresh processes ...")
        self._compare(
            "step", f"training step, {self.config.batch_size} images", subjects, self.plan.repeats, in_full=True
        )

    def inference(self) -> None:
        """Scores of batches of several sizes."""
        subjects = self._whole()
        for count in self.plan.inference:
            name = f"inference, {count} image{'s' if count > 1 else ''}"
            self.tell(f"{name} ...")
            tasks = [_on_threads(subject, subject.inference(count)) for subject, _ in subjects]
            for (subject, check), sample in zip(subjects, interleaved(tasks, self.plan.repeats), strict=True):
                flop = count * work.forward_flop(subject.counts)
                self._row("inference", name, subject, sample[""], images=count, flop=flop, error=check.error)

    def parts(self) -> None:
        """A training step cut into its parts."""
        subjects = self._whole()
        self.tell("parts: a training step, part by part ...")
        tasks = [_on_threads(subject, subject.parts) for subject, _ in subjects]
        samples = interleaved(tasks, self.plan.repeats)
        names = dict.fromkeys(name for sample in samples for name in sample)
        for name in names:
            for (subject, _), sample in zip(subjects, samples, strict=True):
                if name in sample:
                    share = Spread.of(sample[name]).median / Spread.of(sample["whole step"]).median
                    flop = subject.part_flop(name)
                    row = self._row("parts", name, subject, sample[name], flop=flop)
                    row["share_of_step"] = share

    def routing(self) -> None:
        """Votes and routing alone: every kernel of this device, with and without a gradient through the couplings."""
        named = self.variants if self.compared else self._kernels()
        subjects = [self._routing(config, self.classes, label=label) for label, config in named]
        self.tell("routing: votes and routing alone ...")
        self._compare(
            "routing",
            f"votes + routing, {self.config.batch_size} images",
            subjects,
            self.plan.repeats,
            in_full=True,
        )

    def scaling(self) -> None:
        """Step or routing time against one size at a time."""
        plan, repeats = self.plan, min(3, self.plan.repeats)

        def along(what: str, values: Sequence[int], make: Callable[[Config, str, int], tuple[Subject, Check]]) -> None:
            named = [pair for pair in self.variants if what == "batch" or _has_capsules(pair[1])]
            for value in values if named else ():
                self.tell(f"scaling: {what} {value:,} ...")
                subjects = [make(config, label, value) for label, config in named]
                kind = "step" if what in ("batch", "image size") else "routing"
                images = "" if what == "batch" else f" ({subjects[0][0].images} images)"
                self._compare("scaling", f"{kind}, {what} {value:,}{images}", subjects, repeats)

        def step(config: Config, label: str) -> tuple[Subject, Check]:
            subject = WholeNetwork(config, self.classes, label=label)
            return subject, _on_threads(subject, subject.check)()

        batch = self.config.batch_size
        few, some = min(4, batch), min(16, batch)
        along("batch", plan.batches, lambda c, label, x: step(replace(c, batch_size=x), label))
        along("image size", plan.image_sizes, lambda c, label, x: step(replace(c, image_size=x, batch_size=few), label))
        along(
            "primary capsules",
            plan.primary_capsules,
            lambda c, label, x: self._routing(replace(c, batch_size=some), self.classes, x, label=label),
        )
        along(
            "output capsules",
            plan.output_capsules,
            lambda c, label, x: self._routing(replace(c, batch_size=few), x, label=label),
        )
        along(
            "iterations",
            plan.iterations,
            lambda c, label, x: self._routing(replace(c, routing_iterations=x), self.classes, label=label),
        )

    # what they are made of

    def _whole(self) -> list[tuple[WholeNetwork, Check]]:
        """The variants' networks, made and checked when they are first asked for."""
        if not self._networks:
            subjects = [WholeNetwork(config, self.classes, label=label) for label, config in self.variants]
            self.tell("checking results against float64 ...")
            self._networks = [(subject, _on_threads(subject, subject.check)()) for subject in subjects]
            self.checked = [{"variant": s.label, **s.resolved, **asdict(check)} for s, check in self._networks]
        return self._networks

    def _routing(self, config: Config, classes: int, in_capsules: int = 0, *, label: str) -> tuple[RoutingAlone, Check]:
        if not in_capsules:
            network = layout(config, classes)
            if not isinstance(network, CapsNet):
                raise InputError(f"model must be one with capsules to route; got {config.model}")
            in_capsules = network.primary.capsules
        subject = RoutingAlone(config, classes, in_capsules=in_capsules, label=label)
        return subject, _on_threads(subject, subject.check)()

    def _kernels(self) -> list[tuple[str, Config]]:
        named: list[tuple[str, Config]] = []
        device = machine.resolve_device(self.config)
        for kernel in get_args(Config.__dataclass_fields__["kernel"].type):
            if kernel == "auto" or not _runs(kernel, device):
                continue
            for detached in (False, True):
                config = replace(self.config, kernel=kernel, detach_routing=detached)
                named.append((f"{kernel}, detached" if detached else kernel, config))
        return named

    def _compare(
        self,
        section: str,
        name: str,
        subjects: Sequence[tuple[Subject, Check]],
        repeats: int,
        *,
        in_full: bool = False,
    ) -> None:
        """Time subjects in turn and note a row for each; `in_full`: with its memory, and the parts its task tells."""
        samples = interleaved([_on_threads(subject, subject.task()) for subject, _ in subjects], repeats)
        for part in samples[0] if in_full else ("",):
            for (subject, check), sample in zip(subjects, samples, strict=True):
                title = f"{name}: {part}" if part else name
                flop, images = subject.part_flop(part), None if part else subject.images
                row = self._row(section, title, subject, sample[part], images=images, flop=flop, error=check.error)
                if in_full and not part:
                    row |= memory.peak(subject)

    def _row(
        self,
        section: str,
        name: str,
        subject: Subject | str,
        values: Sequence[float],
        *,
        unit: str = "ms",
        images: int | None = None,
        flop: int | None = None,
        error: float | None = None,
    ) -> dict[str, Any]:
        """Note a number; `values` are seconds where the unit is ms."""
        scaled = [1000 * value for value in values] if unit == "ms" else list(values)
        label = subject if isinstance(subject, str) else subject.label
        row: dict[str, Any] = {"section": section, "name": name, "variant": label, "unit": unit}
        row |= asdict(Spread.of(scaled))
        if images:
            row |= {"images": images, "images_per_second": 1000 * images / row["median"]}
        if flop and not isinstance(subject, str):
            row["gflop_per_second"] = flop / row["median"] / 1e6
            key = (subject.device.type, subject.threads, str(subject.resolved.get("precision", "32")))
            if key in self._ceilings:
                row["share_of_ceiling"] = row["gflop_per_second"] / self._ceilings[key]
        if error is not None:
            row["error"] = error
        base = next((r for r in self.rows if (r["section"], r["name"]) == (section, name)), None)
        if base and unit == "ms":
            base["ratio"], row["ratio"] = 1.0, row["median"] / base["median"]
        self.rows.append(row)
        return row


SECTIONS = ("ceilings", "step", "inference", "parts", "routing", "scaling")
"""What can be measured, in this order: each is a method of `Bench`."""


def _has_capsules(config: Config) -> bool:
    return "routing_iterations" in builder_options(config.model)


def _runs(kernel: str, device: torch.device) -> bool:
    try:
        resolve_kernel(kernel, device)
    except InputError:
        return False
    return True


def _on_threads(subject: Subject, function: Callable[[], T]) -> Callable[[], T]:
    """`function` on the number of threads that `subject` is to have."""

    def call() -> T:
        torch.set_num_threads(subject.threads)
        return function()

    return call
