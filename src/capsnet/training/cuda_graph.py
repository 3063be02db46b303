"""A training step as a CUDA graph: recorded once, then launched as a whole, with no Python between its kernels."""

from collections.abc import Callable

import torch
from torch import nn

from capsnet.config import Config
from capsnet.devices import launch
from capsnet.errors import InputError
from capsnet.models import Network
from capsnet.objective import Batch, Losses

__all__ = ["GraphedStep", "check_graph"]

WARM_UP = 3  # steps before the recording: libraries choose their algorithms and allocate in the first ones


class GraphedStep:
    """`step(batch)` of one batch size as a CUDA graph; batches of another size run as they are.

    The first steps run as they are too. All of them, and the recording, are on one stream of their own, for autograd
    accumulates a gradient on the stream that first asked for it. Every step counts: none is run twice, and recording
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
            return self._at_once(batch)
        if self.done == 0:
            single_images = None if batch.single_images is None else batch.single_images.clone()
            self.batch = Batch(batch.images.clone(), batch.labels.clone(), single_images)
        for kept, given in zip(self.batch, batch, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        self.done += 1
        if self.done <= WARM_UP:
            return self._at_once(self.batch)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.losses = self.step(self.batch)
        self.graph.replay()
        return self.losses

    def _at_once(self, batch: Batch) -> Losses:
        """One step that is not recorded."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            losses = self.step(batch)
        here.wait_stream(self.stream)
        return losses


def check_graph(config: Config, device: torch.device, network: Network) -> None:
    """Raise InputError unless training steps of `network` on `device` can be recorded: one GPU, and no dropout."""
    dropout = any(isinstance(module, nn.Dropout) for module in network.modules())
    processes = launch(config.devices).world_size
    if device.type != "cuda" or processes > 1 or dropout:
        what = f"{processes} x {device.type}" + (" and a network with dropout" if dropout else "")
        raise InputError(f"cuda_graph must have one GPU and a network without dropout; got {what}")
