"""A training step in parts: the gradient of a batch as the sum of those of its micro-batches, in less memory."""

from collections.abc import Callable

import torch

from capsnet.models import Output
from capsnet.objective import Batch, Losses

__all__ = ["accumulated", "parts"]


def parts(batch: Batch, size: int | None) -> list[Batch]:
    """A batch in as few parts as have at most `size` images each, whose sizes differ by at most one; None: whole."""
    count = -(-len(batch.images) // size) if size else 1
    if count == 1:
        return [batch]
    columns = [[None] * count if each is None else each.tensor_split(count) for each in batch]
    return [Batch(*column) for column in zip(*columns, strict=True)]


def accumulated(batch: Batch, size: int | None, backward: Callable[[Batch, float, bool], Losses]) -> Losses:
    """Add the gradient of a batch, part by part, to the gradients that there are.

    Args:
        batch: of one process.
        size: images at once, at most; None: all.
        backward: of a part, its share of the images of the batch, and whether it is the last one. The shares sum to 1:
            it is to add the gradient of that many times the mean loss of the part.

    Returns:
        The losses of all images of the batch, with scores and poses and no gradient.
    """
    each, count = parts(batch, size), len(batch.images)
    found = [backward(part, len(part.images) / count, part is each[-1]).detached() for part in each]
    if len(found) == 1:
        return found[0]
    poses = [losses.output.pose for losses in found if losses.output.pose is not None]
    return Losses(
        torch.cat([losses.total for losses in found]),
        torch.cat([losses.classification for losses in found]),
        torch.cat([losses.reconstruction for losses in found]),
        Output(torch.cat([losses.output.scores for losses in found]), pose=torch.cat(poses) if poses else None),
    )
