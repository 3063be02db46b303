"""The ceilings of this machine: its fastest matrix product, and how fast it copies memory."""

from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.timing import interleaved, timed

__all__ = ["TYPES", "copy", "matrix_product"]

TYPES = {"32": torch.float32, "bf16": torch.bfloat16}
"""Type of the matrix products by precision."""


def matrix_product(
    precision: str, sizes: Sequence[int], *, device: torch.device, repeats: int
) -> tuple[int, list[float]]:
    """The size of square matrices with the best median, and the GFLOP/s of each of its `repeats` products."""
    rates: dict[int, list[float]] = {}
    for size in sizes:
        a, b, c = (torch.rand(size, size, device=device).to(TYPES[precision]) for _ in range(3))
        (sample,) = interleaved([timed(lambda: torch.mm(a, b, out=c), device)], repeats)  # noqa: B023
        rates[size] = [2 * size**3 / seconds / 1e9 for seconds in sample[""]]
    best = max(rates, key=lambda size: median(rates[size]))
    return best, rates[best]


def copy(size: int, *, device: torch.device, repeats: int) -> list[float]:
    """GB/s of copying `size` bytes between two arrays in memory; each byte is read and written, so it counts twice."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    (sample,) = interleaved([timed(lambda: target.copy_(source), device)], repeats)
    return [2 * size / seconds / 1e9 for seconds in sample[""]]
