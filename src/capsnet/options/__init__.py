"""The options that every run has, in groups: each option with its default, range, role and one sentence of help.

Those of a model live with it, see `models`. Imports no torch.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from capsnet.options.schema import AT_LEAST_0, AT_LEAST_1, FINITE, FRACTION, LARGEST, POSITIVE, Range, Rule

__all__ = [
    "GROUPS",
    "LARGEST_SEED",
    "LOCAL",
    "RESUMABLE",
    "DataOptions",
    "Device",
    "LossOptions",
    "MachineOptions",
    "OptimisationOptions",
    "OutputOptions",
    "Role",
    "size_of",
]

LARGEST_SEED = 2**62 - 1
"""PyTorch takes seeds of 64 bits, and strokes are drawn from three times a seed and the next two numbers."""
LARGEST_SIDE = 10_000
"""Pixels, of images as a network sees them."""
Device = Literal["auto", "cpu", "cuda", "mps"]
"""Choices of --device."""


@dataclass(frozen=True)
class Role:
    """What an option is for, beside its value."""

    name: str


LOCAL = Role("local")
"""Of the machine or the display: no measured number depends on it, but for rounding."""
RESUMABLE = Role("resumable")
"""May change when a run is resumed, `data` where its images are the same; any other option makes it another run."""


def size_of(image_size: int | str | None) -> tuple[int, int] | None:
    """Height and width that `--image-size` means; None for None, and where it means none."""
    if isinstance(image_size, int):
        return (image_size, image_size) if 1 <= image_size <= LARGEST_SIDE else None
    sides = str(image_size).lower().split("x")
    if image_size is None or not all(side.isascii() and side.isdecimal() and len(side) < 6 for side in sides):
        return None
    height, width = int(sides[0]), int(sides[-1])
    return (height, width) if len(sides) < 3 and 1 <= min(height, width) <= max(height, width) <= LARGEST_SIDE else None


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


COUNT_OR_SHARE = Rule(
    lambda x: 0 <= x <= LARGEST if isinstance(x, int) else 0 < x < 1,
    f"a whole number, 0 to {LARGEST:,}, or a share in (0, 1)",
)
SEED = Range(0, LARGEST_SEED)
PATTERN = Rule(_compiles, "a regular expression")
MILESTONES = Rule(
    lambda x: all(before < share for before, share in pairwise((0, *x, 1))),
    "shares of the run in (0, 1), each above the one before",
)
IMAGE_SIZE = Rule(lambda x: size_of(x) is not None, f"pixels, 1 to {LARGEST_SIDE:,}, or HEIGHTxWIDTH, as 48x64")


@dataclass(frozen=True)
class DataOptions:
    """Images, their preprocessing, splits and augmentation."""

    data: Annotated[str, RESUMABLE] = "strokes"
    """Data set (see `capsnet list data`); or a folder of your own images with a sub-folder for each class, or with a
    metadata.csv or .jsonl; or such a table: file_name, label and, where wanted, split and group."""
    data_dir: Annotated[str | None, LOCAL, RESUMABLE] = None
    """The only directory to look for the files of `data` in; without it CAPSNET_DATA, the cache, then the mirrors. Of a
    table: where its file names start from, in place of its own folder."""
    image_size: Annotated[int | str | None, IMAGE_SIZE] = None
    """Resize images to this many pixels square, or to HEIGHTxWIDTH. Default: as they are; of a folder 32, unless all
    are of one size of at most 40 pixels a side."""
    resize: Literal["pad", "crop", "squash"] | None = None
    """What becomes of their proportions. pad: kept, with the colour of the image's edge around it. crop: kept, and the
    middle cut out. squash: lost. Default: pad for a folder, squash for published sets."""
    channels: Annotated[int | None, Rule(lambda x: x in (1, 3), "1 or 3")] = None
    """Turn images to 1 (grey) or 3 (colour) channels."""
    bit_depth: Annotated[int | None, Range(8, 32, words="8 to 32")] = None
    """Bit depth of a folder's integer images above 8 bits. Default: that of their tags, else the fewest bits that hold
    all values."""
    framing: Literal["off", "digits"] | None = None
    """digits: cut out the ink of an image file, scale and centre it as in MNIST, unless it has the network's size. Used
    for a folder's images, and for every file that the network is then shown. Default: that of the data set."""
    skip_unreadable: bool = False
    """Skip files of a folder that are no images, and report them."""
    validation: Annotated[int | float | None, COUNT_OR_SHARE] = None
    """Training images held out for validation, their number or share; 0 trains on all. Default: the data set's own
    validation split, else a tenth of the training images, at most 5,000."""
    test_fraction: Annotated[int | float | None, COUNT_OR_SHARE] = None
    """Images of a folder without test/ that are tested, their share of each class or their number. Default: a sixth of
    each class."""
    group_by: Annotated[str | None, PATTERN] = None
    """Keep images of one patient, video or place in one split: those in whose paths this regular expression finds the
    same, or its first group: `patient_([0-9]+)`. Default: the column group of a table."""
    train_images: Annotated[int | None, AT_LEAST_1] = None
    """Train on this many of the training images only, chosen by `data_seed`; for learning curves and quick looks."""
    data_seed: Annotated[int, SEED] = 0
    """Seed of what is drawn or split: strokes, validation images, the test images of a folder without test/."""
    crop: Annotated[int | None, AT_LEAST_1] = None
    """Cut a random square of this many pixels out of each training image, and the central one elsewhere."""
    augment: Literal["paper", "none", "affine", "photo"] | None = None
    """What is done to training images, in one word. none: nothing. paper: shift. affine: shift, rotation 15, scale 0.1,
    shear 0.1. photo: shift by a tenth, rotation 10, scale 0.1, brightness 0.2, contrast 0.2, and flip where images are
    in colour. Default: photo for a folder of images in colour, else paper. Options below take the place of the
    word's."""
    shift: Annotated[int | None, AT_LEAST_0] = None
    """Move training images by up to this many pixels in each direction. Default: that of the data set, which is 2
    (Section 5 of the paper), 4 in `multimnist` and 6 where digits are placed on 40 x 40 pixels."""
    flip: bool | None = None
    """Mirror half of the training images left to right."""
    rotation: Annotated[float | None, Range(0, 180, words="0 to 180 degrees")] = None
    """Turn training images by up to this many degrees."""
    scale: Annotated[float | None, FRACTION] = None
    """Enlarge or shrink training images by up to this share: 0.1 is 0.9 to 1.1."""
    shear: Annotated[float | None, FINITE] = None
    """Shear training images by up to this much."""
    brightness: Annotated[float | None, Range(0, 1, words="in [0, 1]")] = None
    """Add up to this much to all intensities of a training image, or take it away; they are in [0, 1]."""
    contrast: Annotated[float | None, Range(0, 1, words="in [0, 1]")] = None
    """Change the contrast of training images by up to this share: 0.8 is 0.2 to 1.8."""
    erase: Annotated[int | None, AT_LEAST_0] = None
    """Set a random square of this many pixels of each training image to 0."""


@dataclass(frozen=True)
class LossOptions:
    """The loss that is minimised."""

    reconstruction_weight: Annotated[float, FINITE] = 0.0005
    """Weight of the SUM of squared pixel errors of an image (Section 4.1); 0.0005 is 0.392 on their mean on MNIST."""
    mask: Literal["label", "prediction"] = "label"
    """Class capsule that the decoder sees in training; in evaluation it is always the predicted one."""
    margin_scale: Annotated[float, POSITIVE] = 1.0
    """Factor on the margin loss of eq. 4, which is summed over the classes."""
    m_pos: Annotated[float, Range(0, 1, above=True, words="in (0, 1]")] = 0.9
    """m+ of eq. 4."""
    m_neg: Annotated[float, FRACTION] = 0.1
    """m- of eq. 4."""
    balance: bool = False
    """Count all classes alike: the loss of each image is divided by the share of its class among the training images,
    times the number of classes."""
    down_weight: Annotated[float, FINITE] = 0.5
    """lambda of eq. 4."""


@dataclass(frozen=True)
class OptimisationOptions:
    """How long and how fast."""

    epochs: Annotated[int | None, AT_LEAST_0, RESUMABLE] = None
    """Passes over the training images. Default: 3, or what the preset of the model says; for few images of one's own as
    many as make 200 steps, over which the learning rate falls as far as over the default ones."""
    stop_at: Annotated[float | None, Range(0, 100, words="0 to 100 percent")] = None
    """Stop early, once the error on the validation images is at most this many percent."""
    patience: Annotated[int | None, AT_LEAST_1] = None
    """Stop early, after this many epochs in a row without a new best one, as `keep` judges them."""
    keep: Literal["last", "best"] | None = None
    """Weights that are kept: of the last epoch, or of the best, which has the lowest validation error, of equal ones
    the lowest loss. Default: best for images of your own; last for published sets, without validation images, and for
    train/ and val/ without test/, where the images that choose would also be those of the reported error."""
    batch_size: Annotated[int, AT_LEAST_1] = 128
    """Images of one step over all devices together (first author's code: 128)."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam: Adam (Section 4), or AdamW with `weight_decay`. sgd: stochastic gradient descent with momentum, as residual
    networks are trained; it needs a larger `lr`, often 0.1."""
    lr: Annotated[float, POSITIVE] = 0.001
    """Learning rate at the start, or after the warm-up (TensorFlow's default for Adam, Section 4)."""
    momentum: Annotated[float, FRACTION] = 0.9
    """Of sgd: factor on the sum of the earlier gradients, to which each step adds its own."""
    nesterov: bool = False
    """Of sgd: Nesterov's momentum, in the form of torch.optim.SGD."""
    schedule: Literal["exponential", "linear", "cosine", "steps"] = "exponential"
    """How the learning rate falls. exponential: by `lr_decay`, smoothly. linear, cosine: to `lr_floor` at the end of
    the run. steps: by `lr_decay` at each of `lr_milestones`."""
    warmup: Annotated[float, FRACTION] = 0.0
    """Share of the run over which the learning rate rises from 0 to `lr`."""
    lr_decay: Annotated[float, Range(0, 1, above=True, words="in (0, 1]")] = 0.9
    """Of the exponential schedule: factor on the learning rate every `lr_decay_steps` steps, smoothly (Section 4:
    "exponentially decaying", no number; 0.9 an epoch is the habit of re-implementations). Of steps: factor at each
    milestone, for which residual networks have 0.1."""
    lr_decay_steps: Annotated[int, AT_LEAST_0] = 0
    """Of the exponential schedule: steps for one factor; 0 means one epoch."""
    lr_milestones: Annotated[tuple[float, ...], MILESTONES] = ()
    """Of steps: where the learning rate falls, as shares of the run: 0.5 0.75 is after half and three quarters."""
    lr_floor: Annotated[float, FINITE] = 1e-6
    """The learning rate never falls below this once it has risen (first author's code)."""
    weight_decay: Annotated[float, FINITE] = 0.0
    """With adam the share of every weight, times the learning rate, that each step takes away (AdamW); 0 is Adam. With
    sgd the L2 term of torch.optim.SGD, as recipes of residual networks have it: the gradient of each weight gets this
    times the weight."""
    ema: Annotated[float, FRACTION] = 0.0
    """Decay per step of an exponential moving average of all weights and batch statistics; it is what is evaluated and
    kept. At step t at most (1 + t) / (10 + t). 0: the weights of the last step."""
    seed: Annotated[int, SEED] = 0
    """Seed of weights, order and augmentation."""
    init_from: str | None = None
    """Start from trained weights (a run directory, a folder, or a name of `capsnet list weights`): layers of the same
    shape are kept; for other classes the class capsules and the decoder start anew. Without --model and --config the
    network has the model and options of these weights."""
    freeze: tuple[str, ...] = ()
    """Parts of the network that are not trained, as --dry-run names them: conv primary, or conv,primary."""


@dataclass(frozen=True)
class MachineOptions:
    """Where and in which precision."""

    device: Annotated[Device, LOCAL] = "auto"
    """auto: a CUDA GPU if there is one. mps (Apple's) is accepted where PyTorch has it, and untested."""
    devices: Annotated[int, AT_LEAST_1, LOCAL, RESUMABLE] = 1
    """Number of processes, one per device; `batch_size` is the total over all."""
    micro_batch: Annotated[int | None, AT_LEAST_1, LOCAL, RESUMABLE] = None
    """Compute at most this many images of a batch at once, over all devices together, and add up their gradients: less
    memory, the same step. Default: the whole batch, or as many as fit into memory."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Precision of convolutions and decoder (routing and losses are float32). auto: bf16 if the hardware has it."""
    cuda_graph: Annotated[bool, LOCAL, RESUMABLE] = False
    """Launch each training step as one CUDA graph (one GPU, no dropout): about 3 times as fast on an H100."""
    threads: Annotated[int | None, Range(1, 1024), LOCAL, RESUMABLE] = None
    """CPU threads of each process; default: PyTorch's, or an equal share of the cores for several processes."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written and shown."""

    out: Annotated[str | None, LOCAL] = None
    """Run directory; default: runs/DATA-MODEL-seedN."""
    overwrite: Annotated[bool, LOCAL] = False
    """Replace an existing run in `out`."""
    log_every: Annotated[int, AT_LEAST_1, LOCAL, RESUMABLE] = 20
    """Steps between updates of the progress line."""
    checkpoint_steps: Annotated[int, AT_LEAST_0, LOCAL, RESUMABLE] = 0
    """Steps between additional checkpoints; 0: only at the end of each epoch."""
    tensorboard: Annotated[bool, LOCAL, RESUMABLE] = False
    """Write TensorBoard curves and reconstructions too."""
    report: Annotated[bool, LOCAL, RESUMABLE] = True
    """Write report.html at the end: figures, numbers, and how to repeat the run."""


GROUPS: dict[str, Any] = {
    "data": DataOptions,
    "loss": LossOptions,
    "optimisation": OptimisationOptions,
    "machine": MachineOptions,
    "output": OutputOptions,
}
"""The groups that every run has, in the order of `config.yaml`; that of the model stands between data and loss."""
