"""Kuzushiji-MNIST, handwritten Japanese characters in the format of MNIST."""

from functools import partial

from capsnet.data import idx
from capsnet.data.dataset import Split
from capsnet.data.download import DataDir, Source, here
from capsnet.data.registry import Entry

__all__ = ["ENTRY", "SOURCE", "read"]

SOURCE = Source(
    name="kmnist",
    # No checksum of the unpacked training files is known to us. The packed files as published are held to
    # the SHA-256 that torchvision-ruby records (ankane/torchvision-ruby,
    # lib/torchvision/datasets/kmnist.rb); never checked by us against the files. An unpacked training
    # file is checked by its counts only, by `read`.
    files={
        "train-images-idx3-ubyte": None,
        "train-labels-idx1-ubyte": None,
        "t10k-images-idx3-ubyte": "76fbd229ce87db80dd281af5e6670de4ad0e42fb30a7bd643972994c47c1f42e",
        "t10k-labels-idx1-ubyte": "a11dc742be8e781a40a92f53d6a4957e7b7d36df2faa097659131ebfd8fd60c6",
    },
    packed={
        "train-images-idx3-ubyte": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "train-labels-idx1-ubyte": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
    },
    mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    most=idx.MNIST_BYTES,
)


def read(split: str, *, data_dir: DataDir = None, side: int = 0, seed: int = 0) -> Split:
    """The split `train` or `test`, see `idx.read`."""
    count = ENTRY.counts[split]
    shape, of_each = (count, *ENTRY.image_shape), count // len(ENTRY.classes)
    return idx.read(SOURCE, split, data_dir=data_dir, shape=shape, of_each=of_each)


ENTRY = Entry(
    name="kmnist",
    image_shape=(1, 28, 28),
    classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    train=60_000,
    test=10_000,
    licence="CC BY-SA 4.0",
    source='"KMNIST Dataset" (created by CODH), adapted from "Kuzushiji Dataset" (created by NIJL and '
    "others), doi:10.20676/00000341; cite Clanuwat et al., 2018, arXiv 1812.01718",
    read=read,
    files=partial(here, SOURCE),
)
