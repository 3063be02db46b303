import pytest
import torch

from capsnet.data.dataset import Split
from capsnet.data.sets import mnist, multimnist


def split(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 7, 5), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % 3, {"slant_degrees": torch.rand(count)})


DIGITS = {"train": split(11, 0), "test": split(60, 1)}


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "read", lambda split, **_: DIGITS[split])


def test_training_images_show_one_digit_in_the_middle_of_black_and_test_images_two() -> None:
    train, test = multimnist.read("train"), multimnist.read("test")
    made = multimnist.ENTRY.dataset({"train": train, "test": test})
    assert (multimnist.SHIFT, multimnist.ENTRY.shift) == (4, 4)
    assert (made.name, made.classes, made.objects_per_image) == ("multimnist", tuple("0123456789"), 2)
    assert (made.validation, made.crop, made.placed) == (None, None, False)
    assert made.image_shape == (1, 15, 13)
    assert torch.equal(train.images[:, :, 4:11, 4:9], DIGITS["train"].images)
    assert train.images.int().sum() == DIGITS["train"].images.int().sum()
    assert torch.equal(train.labels, DIGITS["train"].labels)
    assert train.single_images is None
    assert torch.equal(test.labels[:, 0], DIGITS["test"].labels)
    assert test.single_images is not None
    assert test.single_images.shape == (60, 2, 1, 15, 13)


def test_no_digit_of_a_test_image_leaves_it() -> None:
    single_images = multimnist.read("test").single_images
    assert single_images is not None
    whole = DIGITS["test"].images.int().sum((1, 2, 3))
    assert torch.equal(single_images[:, 0].int().sum((1, 2, 3)), whole)
    assert set(single_images[:, 1].int().sum((1, 2, 3)).tolist()) <= set(whole.tolist())


def test_test_digits_move_by_up_to_4_pixels_in_each_direction() -> None:
    single_images = multimnist.read("test").single_images
    assert single_images is not None
    for objects in single_images.unbind(1):
        assert objects.amax((0, 1, 3)).all(), "digits of 7 rows reach all 15"
        assert objects.amax((0, 1, 2)).all(), "digits of 5 columns reach all 13"


def test_test_pairs_are_made_once_and_for_all() -> None:
    first, again = multimnist.read("test"), multimnist.read("test")
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
