"""Fashion-MNIST, pictures of clothes in the format of MNIST."""

from functools import partial

from capsnet.data import idx
from capsnet.data.download import Source, here
from capsnet.data.registry import Entry

__all__ = ["ENTRY", "SOURCE", "read"]

SOURCE = Source(
    name="fashion-mnist",
    files={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    most=idx.MNIST_BYTES,
)


read = partial(idx.read, SOURCE)

ENTRY = Entry(
    name="fashion-mnist",
    image_shape=(1, 28, 28),
    classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    train=60_000,
    test=10_000,
    licence="MIT",
    source="Zalando Research; cite Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, arXiv 1708.07747",
    read=read,
    files=partial(here, SOURCE),
)
