"""The one pass of a network over the images of a split: scores, predictions and losses of each image."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capsnet.config import Config
from capsnet.data.dataset import Split, to_float
from capsnet.errors import InputError
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network, evaluation_mode, inference_batch
from capsnet.objective import Losses, Objective

__all__ = ["Predictions", "predict_split", "shifted", "to_csv"]


class Predictions(NamedTuple):
    """One row for each image of a split, on the CPU.

    Attributes:
        scores: presence of each class, `float32 [n, classes]` in [0, 1], see `Network.presence`.
        labels: true classes `[n]`; `[n, k]` in rising order where an image shows k objects.
        predictions: classes of the largest scores, as `labels`.
        losses: total, classification and unweighted reconstruction loss, see `Losses`, `float32 [n, 3]`.
        reconstruction_errors: sum of squared differences between each image and its reconstruction from the longest
            capsule `[n]`; None without a decoder, and for images of several objects.

    Examples:
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.6, 0.5]])
        >>> found = Predictions(scores, torch.tensor([0, 1, 1]), scores.argmax(-1), torch.zeros(3, 3), None)
        >>> found.wrong
        tensor([False, False,  True])
        >>> found.confusion
        tensor([[1, 0],
                [1, 1]])
    """

    scores: Tensor
    labels: Tensor
    predictions: Tensor
    losses: Tensor
    reconstruction_errors: Tensor | None

    @property
    def wrong(self) -> Bool[Tensor, "n"]:
        """Whether the prediction is wrong; of several objects, unless it is exactly the true set."""
        wrong = self.predictions != self.labels
        return wrong if wrong.ndim == 1 else wrong.any(-1)

    @property
    def winning(self) -> Float[Tensor, "n"]:
        """The largest score of each image."""
        return self.scores.amax(-1)

    @property
    def confusion(self) -> Int[Tensor, "classes classes"]:
        """Number of objects by true class (rows) and predicted class (columns).

        Where an image shows several, those found are on the diagonal, and of the others each missed class stands with
        one claimed in its place.
        """
        true, predicted = self.labels, self.predictions
        if true.ndim == 2:
            found = torch.zeros(self.scores.shape, dtype=torch.bool)
            present, claimed = found.scatter(1, true, True), found.scatter(1, predicted, True)
            right, missed, instead = (
                which.nonzero()[:, 1] for which in (present & claimed, present & ~claimed, claimed & ~present)
            )  # an image has as many missed as wrongly claimed classes, so its rows of both stand side by side
            true, predicted = torch.cat([right, missed]), torch.cat([right, instead])
        classes = self.scores.shape[-1]
        return torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)


def to_csv(found: Predictions, names: Sequence[str], split: str, classes: Sequence[str]) -> bytes:
    """A line for each image: file, split, true and predicted class, presence, and that of every class.

    Several objects of an image are joined by `; `. Names that are no UTF-8 stay as they are.
    """

    def named(labels: Tensor) -> str:
        return "; ".join(classes[label] for label in labels.reshape(-1).tolist())

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("file", "split", "true", "predicted", "presence")
    writer.writerow((*columns, *(f"presence of {name}" for name in classes)))
    for k, name in enumerate(names):
        said = named(found.labels[k]), named(found.predictions[k]), float(found.winning[k])
        writer.writerow((name, split, *said, *found.scores[k].tolist()))
    return text.getvalue().encode("utf-8", "surrogateescape")


def predict_split(
    network: Network,
    split: Split,
    *,
    config: Config | None = None,
    batch_size: int | None = None,
    shifts: int = 0,
    rank: int = 0,
    world_size: int = 1,
    reduced: Callable[[Tensor], Tensor] | None = None,
    each_batch: Callable[[], object] | None = None,
) -> Predictions:
    """Run a network over a split, on the device where its weights are and in the precision of `torch.autocast` there.

    Args:
        network: in evaluation mode during each batch.
        split: images of the shape it was built for, of as many objects each.
        config: the weights of the losses; the paper's if not given.
        batch_size: images at a time; the result does not depend on it but by rounding. Default: see
            `models.inference_batch`.
        shifts: scores are the mean over all shifts of an image by up to this many pixels, see `shifted`; losses and
            reconstructions are those of the image as it is.
        rank: of this process, which sees the images `rank, rank + world_size, ...`.
        world_size: number of processes.
        reduced: the sum of a tensor over the processes. Without it, rows of the images of other processes hold 0.
        each_batch: is called before each batch, equally often in all processes.

    Raises:
        InputError: images of another shape or of another number of objects, or a batch size below 1.

    Examples:
        >>> split = load_split("strokes", "test").take(torch.arange(20))
        >>> predict_split(load("capsnet-mnist"), split).scores.shape
        torch.Size([20, 10])
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    network.check_images(to_float(split.images[:1]))
    network.check_labels(split.labels)
    objective, device = Objective(network, config or Config()), next(network.parameters()).device
    count, together = len(split), (batch_size or inference_batch(network)) * world_size
    scores, losses = torch.zeros(count, len(network.classes)), torch.zeros(count, 3)
    predictions = torch.zeros_like(split.labels, device="cpu")
    with constant_weights():
        for start in range(0, count, together):
            if each_batch is not None:
                each_batch()
            mine = slice(start + rank, min(start + together, count), world_size)
            if mine.start >= count:
                continue
            images, labels = to_float(split.images[mine].to(device)), split.labels[mine].to(device)
            single_images = None if split.single_images is None else to_float(split.single_images[mine].to(device))
            with evaluation_mode(objective), torch.inference_mode():
                answer, sure = _answer(objective, images, labels, single_images, shifts)
                largest = sure if shifts else answer.output.scores  # which a sigmoid near 1 may round to the same
                scores[mine] = sure.cpu()
                predictions[mine] = _largest(largest, network.objects_per_image).view_as(labels).cpu()
                losses[mine] = torch.stack(answer[:3], dim=-1).cpu()
    if reduced is not None and world_size > 1:
        scores, losses, predictions = (reduced(part).cpu() for part in (scores, losses, predictions))
    drawn = network.decoder is not None and network.objects_per_image == 1
    labels = split.labels.cpu() if network.objects_per_image == 1 else split.labels.cpu().sort(-1).values
    return Predictions(scores, labels, predictions, losses, losses[:, 2] if drawn else None)


def shifted(
    images: Float[Tensor, "batch channels height width"], shifts: int
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """`images` at all (2 shifts + 1)^2 shifts by up to `shifts` pixels along both axes, with zeros moving in."""
    height, width = images.shape[-2:]
    framed = torch.nn.functional.pad(images, (shifts,) * 4)
    for top in range(2 * shifts + 1):
        for left in range(2 * shifts + 1):
            yield framed[..., top : top + height, left : left + width].contiguous()


def _answer(
    objective: Objective, images: Tensor, labels: Tensor, single_images: Tensor | None, shifts: int
) -> tuple[Losses, Tensor]:
    """Losses and output for a batch as it is, and the mean presence over its shifted views."""
    sure, as_it_is = [], 2 * shifts * (shifts + 1)  # the place of no shift among the views
    for k, view in enumerate(shifted(images, shifts)):
        here = objective(view, labels, single_images)
        sure.append(objective.network.presence(here.output))
        if k == as_it_is:
            answer: Losses = here
    return answer, torch.stack(sure).mean(0)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Classes of the `count` largest scores in rising order, `[batch, count]`."""
    return scores.argmax(-1, keepdim=True) if count == 1 else scores.topk(count).indices.sort(-1).values
