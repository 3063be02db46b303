from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from capsnet.config import Config
from capsnet.data import Dataset, Split
from capsnet.data.augment import Augmentation, AugmentationParameters, augment
from capsnet.data.overlay import overlay
from capsnet.objective import Batch
from capsnet.training.batches import BatchLoader
from tiny import pairs

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def singles() -> Dataset:
    generator = seeded(5)
    images = torch.randint(0, 256, (30, 3, 9, 11), dtype=torch.uint8, generator=generator)
    one = Split(images, torch.arange(30) % 4)
    return Dataset("singles", tuple("abcd"), one, one, shift=3)


def fed(dataset: Dataset, *, batch: Any = range(8), mine: Any = None, seed: int = 0, **options: Any) -> Batch:
    index = torch.tensor(list(batch))
    mine = torch.arange(len(index)) if mine is None else torch.tensor(list(mine))
    return BatchLoader(dataset, Config.of(**options), CPU)(index, mine, generator=seeded(seed))


def test_images_of_one_object_are_augmented_and_nothing_else() -> None:
    batch = (3, 1, 29, 7)
    options: dict[str, Any] = {"flip": True, "rotation": 20.0, "scale": 0.2, "shear": 0.1}
    options |= {"brightness": 0.2, "contrast": 0.5}
    dataset = singles()
    for given in ({}, {"shift": 1}, options):
        found = fed(dataset, batch=batch, **given)
        wanted = Augmentation(**{"shift": 3, **given}).draw(4, generator=seeded())  # the data set's shift, if not told
        assert torch.equal(found.images, augment(dataset.train.images[list(batch)].float() / 255, wanted))
        assert found.labels.tolist() == [3, 1, 1, 3]
        assert found.single_images is None


def test_the_crop_is_that_of_the_data_set() -> None:
    dataset = singles().cropped(6)
    found = fed(dataset)
    wanted = Augmentation(shift=3, crop=6).draw(8, generator=seeded())
    assert found.images.shape == (8, 3, 6, 6)
    assert torch.equal(found.images, augment(dataset.train.images[:8].float() / 255, wanted))


def test_a_pair_is_two_images_of_different_classes_each_augmented_and_laid_over_each_other() -> None:
    dataset = pairs(shift=1)
    options: dict[str, Any] = {"flip": True, "brightness": 0.1}
    found = fed(dataset, batch=range(20), **options)
    assert found.single_images is not None
    assert found.images.shape == (20, 1, 12, 13)
    assert found.single_images.shape == (20, 2, 1, 12, 13)
    assert torch.equal(found.images, overlay(found.single_images))
    assert torch.equal(found.labels[:, 0], dataset.train.labels[:20])
    assert (found.labels[:, 0] != found.labels[:, 1]).all()
    drawn = Augmentation(shift=1, **options).draw(20, generator=seeded())
    assert torch.equal(found.single_images[:, 0], augment(dataset.train.images[:20].float() / 255, drawn))


@pytest.mark.parametrize("shift", [None, 0, 2])
def test_each_object_is_one_training_image_of_its_class_moved_by_itself(shift: int | None) -> None:
    dataset = pairs(shift=1)
    found = fed(dataset, batch=range(20), shift=shift)
    far = 1 if shift is None else shift
    assert found.single_images is not None
    sources = dataset.train.images.float() / 255
    nothing = Augmentation(shift=0).draw(len(sources), generator=seeded())
    span = torch.arange(-far, far + 1)
    moved = {
        (int(dy), int(dx)): augment(sources, _by(nothing, int(dy), int(dx), len(sources))) for dy in span for dx in span
    }
    moves: list[list[tuple[int, int]]] = [[], []]
    for n in range(20):
        for k in (0, 1):
            hits = [
                (int(which), move)
                for move, images in moved.items()
                for which in (images == found.single_images[n, k]).flatten(1).all(1).nonzero().flatten()
            ]
            assert len(hits) == 1
            assert dataset.train.labels[hits[0][0]] == found.labels[n, k]
            moves[k].append(hits[0][1])
    assert (moves[0] != moves[1]) == bool(far), "the two are moved each by itself"
    for one in moves:
        assert {dy for dy, _ in one} == {dx for _, dx in one} == set(span.tolist())


def _by(nothing: AugmentationParameters, dy: int, dx: int, count: int) -> AugmentationParameters:
    return replace(nothing, dy=torch.full((count,), dy), dx=torch.full((count,), dx))


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and torch.equal(one, other))


def test_pairs_follow_the_generator_alone_and_are_others_in_every_step() -> None:
    dataset = pairs()
    torch.manual_seed(0)
    first = fed(dataset, seed=1)
    torch.manual_seed(1)
    again, next_step = fed(dataset, seed=1), fed(dataset, seed=2)
    assert all(map(same, first, again))
    assert not torch.equal(first.labels[:, 1], next_step.labels[:, 1])
    assert not torch.equal(first.images, next_step.images)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_make_the_rows_that_one_would(objects: int, world_size: int) -> None:
    dataset = pairs() if objects == 2 else singles()
    batch = (9, 4, 0, 17, 5, 3, 11)
    options: dict[str, Any] = {"flip": True, "rotation": 10.0, "contrast": 0.3, "batch": batch}
    whole = fed(dataset, **options)
    for rank in range(world_size):
        mine = range(rank, len(batch), world_size)
        share = fed(dataset, mine=mine, **options)
        for part, all_rows in zip(share, whole, strict=True):
            assert same(part, None if all_rows is None else all_rows[list(mine)])
