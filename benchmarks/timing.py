"""Time: several tasks in turn, garbage collection off, the device waited for, medians with their spread."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

__all__ = ["Spread", "Stopwatch", "Task", "clock", "interleaved", "timed"]

Task = Callable[[], Mapping[str, float]]
"""Does its work once and returns the seconds of its parts by name."""
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


class Stopwatch:
    """Seconds between its calls, each after the work on the device is done, by the name given to the later call."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.start()

    def start(self) -> None:
        """Begin anew: what is between the last call and now counts nowhere."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """Add the seconds since the last call to those of `name`."""
        before = self._last
        self.start()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._last - before


def clock(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call until its result is there, and the result."""
    watch = Stopwatch(device)
    result = function()
    watch("")
    return watch.seconds[""], result


def timed(function: Callable[[], Any], device: torch.device, *, at_least: float = 0.02) -> Task:
    """A task of as many calls of `function` as take `at_least` seconds; its seconds are the mean of one call."""
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
    """Seconds of each task by name of the part, measured in turn, A B A B, so that a slow moment meets all alike."""
    gc.collect()
    gc.disable()
    try:
        rounds = [[task() for task in tasks] for _ in range(warm_up + repeats)][warm_up:]
    finally:
        gc.enable()
    return [{part: [one[k][part] for one in rounds] for part in rounds[0][k]} for k in range(len(tasks))]
