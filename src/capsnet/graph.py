"""A training step as a CUDA graph: recorded once, then launched as a whole, with no Python between its kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from capsnet.objective import Losses

__all__ = ["GraphedStep"]

WARM_UP = 3  # steps before the recording: libraries choose their algorithms and allocate in the first ones


class GraphedStep:
    """`step(images, labels)` of one batch size as a CUDA graph; other batch sizes run as they are.

    The first steps run as they are too, on a stream of their own. Every step counts: none is run twice, and recording
    one runs nothing. The Losses of a step are overwritten by the next one.

    Args:
        step: forward, backward and update. It must ask the device nothing (no `.item()`), keep its random state and
            its learning rate on the device, and leave the gradients where they are.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Losses]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Losses:
        """One training step."""
        if self.done == 0:
            self.images, self.labels = images.clone(), labels.clone()
        if len(images) != len(self.images):
            return self.step(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.done += 1
        if self.done <= WARM_UP:
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                losses = self.step(self.images, self.labels)
            here.wait_stream(self.stream)
            return losses
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.losses = self.step(self.images, self.labels)
        self.graph.replay()
        return self.losses
