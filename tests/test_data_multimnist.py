import torch

from capsnet.data.dataset import Split
from capsnet.data.multimnist import SHIFT, multimnist

CLASSES = ("nought", "one", "two")


def split(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 7, 5), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % 3, {"slant_degrees": torch.rand(count)})


def test_training_images_show_one_digit_in_the_middle_of_black_and_test_images_two() -> None:
    train, test = split(11, 0), split(9, 1)
    made = multimnist("pairs", CLASSES, train, test)
    assert SHIFT == 4
    assert (made.name, made.classes, made.shift, made.objects_per_image) == ("pairs", CLASSES, 4, 2)
    assert (made.validation, made.crop, made.placed) == (None, None, False)
    assert made.image_shape == (1, 15, 13)
    assert torch.equal(made.train.images[:, :, 4:11, 4:9], train.images)
    assert made.train.images.int().sum() == train.images.int().sum()
    assert torch.equal(made.train.labels, train.labels)
    assert made.train.single_images is None
    assert torch.equal(made.test.labels[:, 0], test.labels)
    assert made.test.single_images is not None
    assert made.test.single_images.shape == (9, 2, 1, 15, 13)


def test_no_digit_of_a_test_image_leaves_it() -> None:
    test = split(9, 1)
    made = multimnist("pairs", CLASSES, split(6, 0), test).test
    assert made.single_images is not None
    whole = test.images.int().sum((1, 2, 3))
    assert torch.equal(made.single_images[:, 0].int().sum((1, 2, 3)), whole)
    assert set(made.single_images[:, 1].int().sum((1, 2, 3)).tolist()) <= set(whole.tolist())


def test_test_digits_move_by_up_to_4_pixels_in_each_direction() -> None:
    made = multimnist("pairs", CLASSES, split(6, 0), split(60, 1)).test
    assert made.single_images is not None
    for objects in made.single_images.unbind(1):
        assert objects.amax((0, 1, 3)).all(), "digits of 7 rows reach all 15"
        assert objects.amax((0, 1, 2)).all(), "digits of 5 columns reach all 13"


def test_test_pairs_are_made_of_test_images_once_and_for_all() -> None:
    first, again = (multimnist("pairs", CLASSES, split(count, seed), split(9, 1)) for count, seed in ((6, 0), (8, 2)))
    assert torch.equal(first.test.images, again.test.images)
    assert torch.equal(first.test.labels, again.test.labels)
