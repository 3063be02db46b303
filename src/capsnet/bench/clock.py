"""Time: several tasks in turn, garbage collection off, the device waited for, medians with their spread."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Spread", "Tape", "clock", "interleaved", "timed"]

Task = Callable[[], Mapping[str, float]]
"""Does its work once and tells the seconds of its parts by name."""
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median, smallest, largest and number of some measurements."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values), len(values))


def clock(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call until its result is there, and the result."""
    _wait(device)
    start = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - start, result


def timed(function: Callable[[], Any], device: torch.device, *, at_least: float = 0.02) -> Task:
    """A task of as many calls of `function` as take `at_least` seconds; it tells the mean of one call, under ""."""
    calls = 0

    def task() -> Mapping[str, float]:
        nonlocal calls
        if not calls:
            function()  # the first call compiles and allocates
            calls = max(1, math.ceil(at_least / clock(function, device)[0]))
        seconds, _ = clock(lambda: [function() for _ in range(calls)][-1], device)
        return {"": seconds / calls}

    return task


def interleaved(tasks: Sequence[Task], repeats: int, *, warm_up: int = 2) -> list[dict[str, list[float]]]:
    """Seconds of every task by name of the part, measured in turn, A B A B, so that a slow moment meets all alike.

    Args:
        tasks: what to measure.
        repeats: measurements of each.
        warm_up: rounds before, which do not count.
    """
    samples: list[dict[str, list[float]]] = [{} for _ in tasks]
    with _no_collection():
        for _ in range(warm_up):
            for task in tasks:
                task()
        for _ in range(repeats):
            for sample, task in zip(samples, tasks, strict=True):
                for name, seconds in task().items():
                    sample.setdefault(name, []).append(seconds)
    return samples


class Tape:
    """A training step cut into functions, each timed forward and backward.

    A function gets leaves, not the graph of the one before it, so that its backward is its own; the gradients of the
    leaves hand the chain on, and the parameters end with the gradients of the whole.

    Attributes:
        seconds: by name: `conv1 forward`, `conv1 backward`, ...
    """

    def __init__(self, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.device, self.autocast = device, autocast
        self.seconds: dict[str, float] = {}
        self._chain: list[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]] = []

    def alone(self, name: str, function: Callable[[], T]) -> T:
        """Time a function that has no backward."""
        self.seconds[name], result = clock(function, self.device)
        return result

    def forward(self, name: str, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Time a function's forward; its results are returned as leaves."""
        with self.autocast():
            outputs = self.alone(f"{name} forward", function)
        self.seconds[f"{name} backward"] = 0.0  # its place in the order
        leaves = tuple(output.detach().requires_grad_() for output in outputs)
        self._chain.append((name, outputs, leaves))
        return leaves

    def backward(self, *gradients: Tensor) -> None:
        """Time all backwards, last function first, from `gradients` of its results."""
        for leaf, gradient in zip(self._chain[-1][2], gradients, strict=True):
            leaf.grad = gradient
        for name, outputs, leaves in reversed(self._chain):
            reached = [(output, leaf.grad) for output, leaf in zip(outputs, leaves, strict=True)]
            tensors, grads = zip(*[pair for pair in reached if pair[1] is not None], strict=True)
            self.alone(f"{name} backward", lambda: torch.autograd.backward(tensors, grads))  # noqa: B023


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
