from unittest import mock

import pytest
import torch
from torch import Tensor

from capsnet.data.overlay import overlay, pairs, partners
from capsnet.errors import InputError

LABELS = torch.tensor([2, 0, 5, 0, 2, 2, 3, 5, 2, 0, 2])  # 1 and 4 have no image
SHIFT, COUNT = 2, 60


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Different images of 5 x 7 pixels, bright enough that two of them are cut off at white, without a margin."""
    return torch.randint(1, 256, (COUNT, 2, 5, 7), dtype=torch.uint8, generator=seeded(1))


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.randint(0, 4, (COUNT,), generator=seeded(2))


def moved(image: Tensor, dy: int, dx: int) -> Tensor:
    """One image moved down and to the right by loops; zeros move in."""
    height, width = image.shape[1:]
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                result[:, y, x] = image[:, y - dy, x - dx]
    return result


# partners


@pytest.mark.parametrize("image", range(len(LABELS)))
@pytest.mark.parametrize("within", [0.0, 0.5, 1 - 1e-9], ids=["low", "middle", "high"])
def test_equal_parts_of_what_is_drawn_are_the_images_of_all_other_classes(image: int, within: float) -> None:
    """The share [r / m, (r + 1) / m) of the draws belongs to one of the m other images, each to another."""
    others = [k for k in range(len(LABELS)) if LABELS[k] != LABELS[image]]
    m = len(others)
    drawn = (torch.arange(m, dtype=torch.float64) + within) / m
    with mock.patch.object(torch, "rand", return_value=drawn):
        found = partners(LABELS, torch.full((m,), image), generator=seeded())
    assert sorted(found.tolist()) == others


def test_partners_are_drawn_for_each_image_of_a_batch_in_its_order() -> None:
    index = torch.tensor([6, 1, 0, 6, 10])
    found = partners(LABELS, index, generator=seeded(3))
    assert (LABELS[found] != LABELS[index]).all()
    assert torch.equal(found, partners(LABELS, index, generator=seeded(3)))
    generator = seeded(3)
    first = partners(LABELS, index, generator=generator)
    later = [partners(LABELS, index, generator=generator) for _ in range(5)]
    assert torch.equal(first, found)
    assert any(not torch.equal(one, first) for one in later), "the generator must go on"


def test_two_of_the_smallest_and_largest_draws_stay_in_range() -> None:
    for labels in (torch.tensor([0, 1]), torch.tensor([3, 3, 3, 0]), torch.arange(1024) % 2):
        index = torch.tensor([0, len(labels) - 1])
        for value in (0.0, 1 - 2.0**-53):
            with mock.patch.object(torch, "rand", return_value=torch.full((2,), value, dtype=torch.float64)):
                found = partners(labels, index, generator=seeded())
            assert (labels[found] != labels[index]).all()


def test_images_of_one_class_have_no_partners() -> None:
    message = r"^labels of images to be paired must be of at least 2 classes; got 3 of one class$"
    with pytest.raises(InputError, match=message):
        partners(torch.tensor([4, 4, 4]), torch.tensor([0]), generator=seeded())


# overlay


def test_intensities_are_added_and_cut_off_at_white() -> None:
    one, other = torch.tensor([0.0, 0.25, 0.75, 1.0]), torch.tensor([0.0, 0.5, 0.5, 1.0])
    both = torch.stack([one, other]).view(2, 1, 2, 2)
    expected = torch.tensor([0.0, 0.75, 1.0, 1.0]).view(1, 2, 2)
    assert torch.equal(overlay(both), expected)
    assert torch.equal(overlay(both.expand(3, 5, 2, 1, 2, 2)), expected.expand(3, 5, 1, 2, 2))
    three = torch.full((3, 1, 2, 2), 0.25)
    assert torch.equal(overlay(three), torch.full((1, 2, 2), 0.75))


# pairs


def test_each_image_is_moved_and_laid_over_a_moved_one_of_another_class(images: Tensor, labels: Tensor) -> None:
    both, classes, objects = pairs(images, labels, shift=SHIFT, seed=0)
    assert (both.dtype, classes.dtype, objects.dtype) == (torch.uint8, torch.int64, torch.uint8)
    assert both.shape == images.shape
    assert objects.shape == (COUNT, 2, 2, 5, 7)
    assert torch.equal(classes[:, 0], labels)
    assert (classes[:, 0] != classes[:, 1]).all()
    assert torch.equal(both.int(), objects.int().sum(1).clamp(max=255))
    assert (objects.int().sum(1) > 255).any()
    span = range(-SHIFT, SHIFT + 1)
    shifted = {(dy, dx): torch.stack([moved(one, dy, dx) for one in images]) for dy in span for dx in span}
    seen: list[set[tuple[int, int]]] = [set(), set()]
    partner = []
    for n in range(COUNT):
        for k in (0, 1):
            ((which, move),) = [
                (int(source), move)
                for move, all_moved in shifted.items()
                for source in (all_moved == objects[n, k]).flatten(1).all(1).nonzero().flatten()
            ]
            assert labels[which] == classes[n, k], "objects and classes must be in the same order"
            assert which == n or k == 1
            seen[k].add(move)
            partner += [which] * k
    assert len(set(partner)) > COUNT / 3
    for moves in seen:  # 60 draws of 25: about 23 of them are seen
        assert {dy for dy, _ in moves} == {dx for _, dx in moves} == set(span)
        assert len(moves) > 16
        assert any(dy != dx for dy, dx in moves)


def test_both_objects_move_by_themselves() -> None:
    dot = torch.zeros(40, 1, 5, 5, dtype=torch.uint8)
    dot[:, 0, 2, 2] = 100
    both, _, objects = pairs(dot, torch.arange(40) % 2, shift=1, seed=0)
    places = objects.flatten(2).argmax(-1)
    assert (places[:, 0] != places[:, 1]).any()
    assert (places[:, 0] == places[:, 1]).any()
    assert set(both.flatten().tolist()) == {0, 100, 200}


def test_pairs_follow_the_seed_alone(images: Tensor, labels: Tensor) -> None:
    torch.manual_seed(0)
    first = pairs(images, labels, shift=SHIFT, seed=3)
    torch.manual_seed(1)
    again, other = pairs(images, labels, shift=SHIFT, seed=3), pairs(images, labels, shift=SHIFT, seed=4)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_without_a_shift_nothing_moves(images: Tensor, labels: Tensor) -> None:
    _, _, objects = pairs(images, labels, shift=0, seed=0)
    assert torch.equal(objects[:, 0], images)
