"""MNIST, handwritten digits."""

from functools import partial

from capsnet.data import idx
from capsnet.data.download import Source, here
from capsnet.data.registry import Entry

__all__ = ["CLASSES", "ENTRY", "SOURCE", "read"]

CLASSES = tuple("0123456789")
SOURCE = Source(
    name="mnist",
    files={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    most=idx.MNIST_BYTES,
)


read = partial(idx.read, SOURCE)

ENTRY = Entry(
    name="mnist",
    image_shape=(1, 28, 28),
    classes=CLASSES,
    train=60_000,
    test=10_000,
    licence="not stated by its authors, usually given as CC BY-SA 3.0",
    source="LeCun, Cortes, Burges; cite LeCun et al., Gradient-based learning applied to document "
    "recognition, Proc. IEEE 86(11), 1998",
    framing="digits",
    read=read,
    files=partial(here, SOURCE),
)
