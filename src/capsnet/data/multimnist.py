"""MultiMNIST: two overlapping digits of different classes in one image (Section 6 of Sabour et al. 2017)."""

from torch.nn import functional as F

from capsnet.data.dataset import Dataset, Split

__all__ = ["SHIFT", "multimnist"]

SHIFT = 4
"""Largest shift of each digit in pixels, so that images are 36 x 36: "each digit is shifted up to 4 pixels"."""
_TEST_SEED = 0


def multimnist(name: str, classes: tuple[str, ...], train: Split, test: Split) -> Dataset:
    """Pairs of the images of a data set with a black ground.

    "We generate MultiMNIST by overlaying a digit on top of another digit from the same set (training or test) but
    different class": intensities are added and cut off at white. Training pairs are made anew in every step; every test
    image is the first digit of one pair, drawn once and for all. (The paper draws 1,000 pairs for each digit of both.)

    Args:
        name: of the data set that results.
        classes: their names.
        train: images of one object each.
        test: the same, of which the test pairs are made.
    """
    padded = (F.pad(split.images, (SHIFT,) * 4) for split in (train, test))
    singles, alone = (Split(images, split.labels) for images, split in zip(padded, (train, test), strict=True))
    return Dataset(name, classes, singles, alone.paired(shift=SHIFT, seed=_TEST_SEED), shift=SHIFT, objects_per_image=2)
