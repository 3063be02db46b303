"""Large arrays kept from one training step to the next: fresh memory costs several times the arithmetic done in it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["BufferPool", "pool"]


class BufferPool:
    """At most one free array for each name; whoever acquires it owns it until it is released.

    An array that is never released (a forward without a backward) is freed like any tensor, and the next `acquire`
    makes a new one, so that nothing is ever shared by two owners.
    """

    def __init__(self) -> None:
        self._free: dict[str, Tensor] = {}

    def acquire(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An array of undefined content, of `like`'s type and device."""
        kept = self._free.pop(name, None)
        count = math.prod(shape)
        fits = kept is not None and (kept.numel(), kept.dtype, kept.device) == (count, like.dtype, like.device)
        if kept is None or not fits or (kept.is_inference() and not torch.is_inference_mode_enabled()):
            kept = torch.empty(count, dtype=like.dtype, device=like.device)
        return kept.view(shape)

    def release(self, name: str, array: Tensor) -> None:
        """Keep `array` for the next `acquire`, unless it is a tracer's; its owner must not use it any more."""
        if type(array) is Tensor:
            self._free[name] = array.view(-1)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, nothing is kept but what was released inside; afterwards, what was kept before."""
        before, self._free = self._free, {}
        try:
            yield
        finally:
            self._free = before

    def clear(self) -> None:
        """Free everything that is kept."""
        self._free.clear()


pool = BufferPool()
"""The arrays that the kernels of this process keep; `pool.clear()` frees them."""
