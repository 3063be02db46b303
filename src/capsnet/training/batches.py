"""Batches of a training, made on its device: augmented images, or pairs of them laid over each other."""

import torch
from torch import Tensor

from capsnet.config import Config
from capsnet.data import Dataset
from capsnet.data.augment import augment
from capsnet.data.dataset import to_float
from capsnet.data.overlay import overlay, partners
from capsnet.objective import Batch
from capsnet.training.prepare import augmentation_of

__all__ = ["BatchLoader"]


class BatchLoader:
    """The training images of a data set on a device, and how batches are made of them, augmented as `config` says.

    Where the images of the set show two objects, every one of a batch is laid over a random one of another class, each
    augmented for itself (Section 6 of Sabour et al. 2017).
    """

    def __init__(self, dataset: Dataset, config: Config, device: torch.device) -> None:
        self.augmentation = augmentation_of(config, dataset)
        self.objects_per_image = dataset.objects_per_image
        self.images, self.labels = dataset.train.images.to(device), dataset.train.labels.to(device)
        self.classes = dataset.train.labels.cpu()

    def __call__(self, batch: Tensor, mine: Tensor, *, generator: torch.Generator) -> Batch:
        """One process's share of a batch.

        Args:
            batch: training images of the batch over all processes, `int64 [n]`.
            mine: which of these are this process's.
            generator: of everything random in the batch, the same in all processes.
        """
        images, labels = self._augmented(batch, mine, generator)
        if self.objects_per_image == 1:
            return Batch(images, labels)
        others, their_labels = self._augmented(partners(self.classes, batch, generator=generator), mine, generator)
        single_images = torch.stack([images, others], dim=1)
        return Batch(overlay(single_images), torch.stack([labels, their_labels], dim=1), single_images)

    def _augmented(self, batch: Tensor, mine: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = self.augmentation.draw(len(batch), generator=generator)
        index = batch[mine].to(self.images.device, non_blocking=True)
        return augment(to_float(self.images[index]), drawn[mine]), self.labels[index]
