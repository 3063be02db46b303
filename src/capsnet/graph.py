"""A training step as a CUDA graph: recorded once, then launched as a whole, with no Python between its kernels."""

from collections.abc import Callable

import torch

from capsnet.objective import Batch, Losses

__all__ = ["GraphedStep"]

WARM_UP = 3  # steps before the recording: libraries choose their algorithms and allocate in the first ones


class GraphedStep:
    """`step(batch)` of one batch size as a CUDA graph; batches of another size run as they are.

    The first steps run as they are too, on a stream of their own. Every step counts: none is run twice, and recording
    one runs nothing. The Losses of a step are overwritten by the next one.

    Args:
        step: forward, backward and update. It must ask the device nothing (no `.item()`), keep its random state and
            its learning rate on the device, and leave the gradients where they are.
        batch_size: images of the batches that are graphed, whichever comes first: a run may go on at a smaller one.
    """

    def __init__(self, step: Callable[[Batch], Losses], *, batch_size: int) -> None:
        self.step, self.batch_size = step, batch_size
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0

    def __call__(self, batch: Batch) -> Losses:
        """One training step."""
        if len(batch.images) != self.batch_size:
            return self.step(batch)
        if self.done == 0:
            objects = None if batch.objects is None else batch.objects.clone()
            self.batch = Batch(batch.images.clone(), batch.labels.clone(), objects)
        for kept, given in zip(self.batch, batch, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        self.done += 1
        if self.done <= WARM_UP:
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                losses = self.step(self.batch)
            here.wait_stream(self.stream)
            return losses
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.losses = self.step(self.batch)
        self.graph.replay()
        return self.losses
