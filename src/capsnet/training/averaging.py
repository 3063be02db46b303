"""Weights averaged over the steps of a training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from capsnet.models import Network

__all__ = ["averaged"]


def averaged(network: Network, decay: float) -> AveragedModel:
    """A copy of `network`, its batch statistics too, for the exponential moving average of its weights.

    After update n (from 0) it holds `share * average + (1 - share) * weights` with `share = min(decay, (1 + n) / (10 +
    n))`, so that the first steps, far from the end, are soon forgotten; after the first, the weights themselves.

    Args:
        network: being trained, where it is to stay.
        decay: in [0, 1).
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], weights: Sequence[Tensor], _: Any) -> None:
        n = int(copy.n_averaged)  # which is on the CPU: no waiting for a GPU
        if average[0].is_floating_point():
            torch._foreach_lerp_(list(average), list(weights), 1 - min(decay, (1 + n) / (10 + n)))
        else:  # how many batches were seen
            torch._foreach_copy_(list(average), list(weights))

    copy = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    return copy.requires_grad_(False)
