"""MultiMNIST: two overlapping digits of different classes in one image (Section 6 of Sabour et al. 2017).

"We generate MultiMNIST by overlaying a digit on top of another digit from the same set (training or test) but different
class": intensities are added and cut off at white. Training pairs are made anew in every step; every test image is the
first digit of one pair, drawn once and for all. (The paper draws 1,000 pairs for each digit of both.)
"""

from dataclasses import replace

from torch.nn import functional as F

from capsnet.data.dataset import Split
from capsnet.data.download import DataDir
from capsnet.data.sets import mnist
from capsnet.errors import InputError

__all__ = ["ENTRY", "SHIFT", "read"]

SHIFT = 4
"""Largest shift of each digit in pixels, so that images are 36 x 36: "each digit is shifted up to 4 pixels"."""
_TEST_SEED = 0


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The digits of `train` with a margin, one an image, or the pairs of `test`."""
    singles = mnist.read(split, data_dir=data_dir)
    singles = replace(singles, images=F.pad(singles.images, (SHIFT,) * 4))
    return singles if split == "train" else singles.paired(shift=SHIFT, seed=_TEST_SEED)


def _check(channels: int, height: int, width: int, seed: int) -> None:
    if (channels, height, width) != ENTRY.image_shape:
        raise InputError(
            f"image_size and channels of multimnist must be 36 and 1; got {height} x {width} and {channels}"
        )


ENTRY = replace(
    mnist.ENTRY,
    name="multimnist",
    image_shape=(1, 36, 36),
    licence="that of mnist, of which its images are made",
    source="made of mnist by capsnet: two digits of different classes laid over each other, as in Sabour, Frosst, "
    "Hinton, Dynamic Routing Between Capsules, NIPS 2017, Section 6",
    framing="off",
    read=read,
    check=_check,
    shift=SHIFT,
    objects_per_image=2,
)
