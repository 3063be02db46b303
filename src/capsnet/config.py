"""The configuration of a run: one frozen dataclass, its presets, its file. Imports no torch, for an instant --help."""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_origin

from capsnet.errors import InputError
from capsnet.files import is_directory, read_yaml
from capsnet.schema import brief, checked, joined, shown

__all__ = [
    "OPEN",
    "PRESETS",
    "Config",
    "Options",
    "from_dict",
    "out_of_range",
    "preset",
    "preset_differences",
    "read",
    "size_of",
    "with_defaults",
    "write",
]

LARGEST_SEED = 2**62 - 1
"""PyTorch takes seeds of 64 bits, and strokes are drawn from three times a seed and the next two numbers."""
LARGEST_SIDE = 10_000
"""Pixels, of images as a network sees them."""
MOST_ITERATIONS = 100
"""That of `routing`, which is not imported here for the torch it needs."""
Device = Literal["auto", "cpu", "cuda", "mps"]
"""Choices of --device."""
OPEN: dict[str, Any] = {"epochs": 3, "primary_scale": 1.0}
"""Options that may be left open (None), with their values for published data sets; `recipe` chooses for own images."""


@dataclass(frozen=True)
class Options:
    """The fields of a `Config`, unchecked."""

    preset: Literal["paper", "authors"] = "paper"
    """Recipe the other options start from: the paper's text, or its first author's published code."""

    # data
    data: str = "strokes"
    """Data set (see `capsnet list data`), or a folder of your own images with a sub-folder for each class."""
    data_dir: str | None = None
    """The only directory to look for the files of `data` in; without it CAPSNET_DATA, the cache, then the mirrors."""
    image_size: int | str | None = None
    """Resize images to this many pixels square, or to HEIGHTxWIDTH, without regard to their proportions. Default: as
    they are; of a folder 32, unless all are of one size of at most 40 pixels a side."""
    channels: int | None = None
    """Turn images to 1 (grey) or 3 (colour) channels."""
    bit_depth: int | None = None
    """Bit depth of a folder's integer images above 8 bits. Default: that of their tags, else the fewest bits that hold
    all values."""
    framing: Literal["off", "digits"] | None = None
    """digits: cut out the ink of an image file, scale and centre it as in MNIST, unless it has the network's size. Used
    for a folder's images, and for every file that the network is then shown. Default: that of the data set."""
    skip_unreadable: bool = False
    """Skip files of a folder that are no images, and report them."""
    validation: int | None = None
    """Training images held out for validation; 0 trains on all. Default: the data set's own validation split, else a
    tenth of the training images, at most 5,000."""
    train_images: int | None = None
    """Train on this many of the training images only, chosen by `data_seed`; for learning curves and quick looks."""
    data_seed: int = 0
    """Seed of what is drawn or split: strokes, validation images, the test images of a folder without test/."""
    crop: int | None = None
    """Cut a random square of this many pixels out of each training image, and the central one elsewhere."""
    shift: int | None = None
    """Move training images by up to this many pixels in each direction. Default: that of the data set, which is 2
    (Section 5 of the paper), 4 in `multimnist` and 6 where digits are placed on 40 x 40 pixels."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    rotation: float = 0.0
    """Turn training images by up to this many degrees."""
    scale: float = 0.0
    """Enlarge or shrink training images by up to this share: 0.1 is 0.9 to 1.1."""
    shear: float = 0.0
    """Shear training images by up to this much."""
    brightness: float = 0.0
    """Add up to this much to all intensities of a training image, or take it away; they are in [0, 1]."""
    contrast: float = 0.0
    """Change the contrast of training images by up to this share: 0.8 is 0.2 to 1.8."""

    # network
    model: str = "capsnet"
    """Name of the network (see `capsnet list models`)."""
    routing_iterations: int = 3
    """Number of routing iterations r; 1 means uniform couplings."""
    routing_bias: bool = False
    """Add a learned bias to the weighted sum of votes."""
    leaky: bool = False
    """Add a "none of the above" slot to the softmax of every primary capsule."""
    detach_routing: bool = False
    """Stop the gradient at the couplings."""
    kernel: Literal["auto", "plain", "fused"] = "auto"
    """How votes and routing are computed; the results are the same. auto: fused on a CPU, plain on a GPU."""
    stem: Literal["auto", "direct", "minimal"] = "auto"
    """How the two convolutions are computed. minimal saves most multiplications, at about 1e-4 relative rounding in
    float32; auto: minimal on a CPU in precision 32 where it saves half or more, direct elsewhere."""
    conv_channels: int = 256
    """Number of channels of the first convolution."""
    conv_kernel: int = 9
    """Kernel size of the first convolution, in pixels."""
    conv_stride: int = 1
    """Stride of the first convolution, in pixels."""
    capsule_types: int = 32
    """Number of primary capsule types."""
    primary_dim: int = 8
    """Dimension of a primary capsule."""
    primary_kernel: int = 9
    """Kernel size of the primary capsules, in pixels."""
    primary_stride: int = 2
    """Stride of the primary capsules, in pixels."""
    primary_scale: float | None = None
    """Factor on the primary capsules' convolution before its bias; 0 means uniform couplings: 1 / capsule_types, or
    1 / (capsule_types + 1) with the leaky slot. Default: 1 (the paper), but 0 for images of one's own where a class
    capsule gets more votes than the paper's."""
    padding: Literal["valid", "same"] = "valid"
    """Padding of both convolutions."""
    class_dim: int = 16
    """Dimension of a class capsule."""
    squash_epsilon: float = 0.0
    """Added to the squared length where squash divides by the length, as many implementations do; 0 divides by none.
    Above 0 routing is computed plainly."""
    decoder_sizes: tuple[int, ...] = (512, 1024)
    """Widths of the decoder's hidden layers."""
    init: Literal["pytorch", "authors"] = "pytorch"
    """Initial weights. authors: truncated normal 0.1 (0.05 in the first convolution), biases 0.1."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1, as the first author's code does for
    CIFAR-10."""
    width: float = 1.0
    """Factor on the number of channels and units of all layers of a baseline network."""
    dropout: float = 0.5
    """Dropout rate of a baseline network."""

    # loss
    reconstruction: bool = True
    """Train a decoder and add its loss."""
    reconstruction_weight: float = 0.0005
    """Weight of the SUM of squared pixel errors of an image (Section 4.1); 0.0005 is 0.392 on their mean on MNIST."""
    mask: Literal["label", "prediction"] = "label"
    """Class capsule that the decoder sees in training; in evaluation it is always the predicted one."""
    margin_scale: float = 1.0
    """Factor on the margin loss of eq. 4, which is summed over the classes."""
    m_pos: float = 0.9
    """m+ of eq. 4."""
    m_neg: float = 0.1
    """m- of eq. 4."""
    down_weight: float = 0.5
    """lambda of eq. 4."""

    # optimisation
    epochs: int | None = None
    """Passes over the training images. Default: 3, but for few images of one's own as many as make 200 steps, over
    which the learning rate then decays as over 3 epochs."""
    stop_at: float | None = None
    """Stop early, once the error on the validation images is at most this many percent."""
    batch_size: int = 128
    """Images of one step over all devices together (first author's code: 128)."""
    lr: float = 0.001
    """Learning rate of Adam at the start (TensorFlow's default, Section 4)."""
    lr_decay: float = 0.9
    """Factor on the learning rate every `lr_decay_steps` steps, smoothly (Section 4: "exponentially decaying", no
    number; 0.9 an epoch is the habit of re-implementations)."""
    lr_decay_steps: int = 0
    """Steps for one factor; 0 means one epoch."""
    lr_floor: float = 1e-6
    """The learning rate never falls below this (first author's code)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""

    # machine
    device: Device = "auto"
    """auto: a CUDA GPU if there is one. mps (Apple's) is accepted where PyTorch has it, and untested."""
    devices: int = 1
    """Number of processes, one per device; `batch_size` is the total over all."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Precision of convolutions and decoder (routing and losses are float32). auto: bf16 if the hardware has it."""
    cuda_graph: bool = False
    """Launch each training step as one CUDA graph (one GPU, no dropout): about 3 times as fast on an H100."""
    threads: int | None = None
    """CPU threads of each process; default: PyTorch's, or an equal share of the cores for several processes."""

    # output
    out: str | None = None
    """Run directory; default: runs/DATA-MODEL-seedN."""
    overwrite: bool = False
    """Replace an existing run in `out`."""
    log_every: int = 20
    """Steps between updates of the progress line."""
    checkpoint_steps: int = 0
    """Steps between additional checkpoints; 0: only at the end of each epoch."""
    tensorboard: bool = False
    """Write TensorBoard curves and reconstructions too."""
    report: bool = True
    """Write report.html at the end: figures, numbers, and how to repeat the run."""


@dataclass(frozen=True)
class Config(Options):
    """Every choice of a run; saved as `config.yaml` beside its results.

    The defaults are preset `paper`: the text of Sabour, Frosst, Hinton 2017. Where the text is silent the field says
    where its default is from.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        faults = out_of_range(values)
        if not faults and self.lr < self.lr_floor:
            faults.append(f"lr must be at least lr_floor, {self.lr_floor:g}; got {self.lr:g}")
        if not faults and self.preset != "paper" and not self._follows_preset():
            faults.append(f"preset is a name only; start from capsnet.preset({self.preset!r}) to get its options")
        if faults:
            raise InputError(joined(faults))

    def _follows_preset(self) -> bool:
        """Whether any field has the value that the preset gives it."""
        return any(
            getattr(self, name) == value != getattr(Config, name) for name, value in PRESETS[self.preset].items()
        )


_LARGEST = 2**31 - 1
_MOST = {
    "seed": LARGEST_SEED,
    "data_seed": LARGEST_SEED,
    "routing_iterations": MOST_ITERATIONS,
    "threads": 1024,  # OpenMP ends the process where it cannot start as many
}
"""The largest whole number of an option; `_LARGEST` of those that are not named here."""

_AT_LEAST_0 = (lambda x: x >= 0, "at least 0")
_FINITE = (lambda x: 0 <= x < float("inf"), "at least 0 and finite")
_AT_LEAST_1 = (lambda x: x >= 1, "at least 1")
_POSITIVE = (lambda x: 0 < x < float("inf"), "above 0")
_FRACTION = (lambda x: 0 <= x < 1, "in [0, 1)")
_ANY = (lambda x: True, "")
_RULES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        (
            "train_images", "crop", "routing_iterations", "conv_channels", "conv_kernel", "conv_stride",
            "capsule_types", "primary_dim", "primary_kernel", "primary_stride", "class_dim", "batch_size", "devices",
            "threads", "log_every",
        ),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        (
            "validation", "shift", "lr_decay_steps", "checkpoint_steps", "seed", "data_seed", "epochs",
        ),
        _AT_LEAST_0,
    ),
    **dict.fromkeys(
        (
            "shear", "squash_epsilon", "reconstruction_weight", "lr_floor", "primary_scale", "down_weight",
        ),
        _FINITE,
    ),
    **dict.fromkeys(("lr", "margin_scale", "width"), _POSITIVE),
    **dict.fromkeys(("scale", "dropout"), _FRACTION),
    **dict.fromkeys(("brightness", "contrast"), (lambda x: 0 <= x <= 1, "in [0, 1]")),
    "stop_at": (lambda x: 0 <= x <= 100, "0 to 100 percent"),
    "rotation": (lambda x: 0 <= x <= 180, "0 to 180 degrees"),
    "lr_decay": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "channels": (lambda x: x in (1, 3), "1 or 3"),
    "bit_depth": (lambda x: 8 <= x <= 32, "8 to 32"),
    "image_size": (lambda x: size_of(x) is not None, f"pixels, 1 to {LARGEST_SIDE:,}, or HEIGHTxWIDTH, as 48x64"),
    "m_pos": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "m_neg": _FRACTION,
    "decoder_sizes": (lambda x: all(1 <= size <= _LARGEST for size in x), f"widths of 1 to {_LARGEST:,}"),
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "authors": {
        "margin_scale": 0.05,  # the code takes 0.5 x the margin loss and its mean over the 10 classes
        "reconstruction_weight": 0.0005,  # so this is 0.01 relative to eq. 4
        "primary_scale": 0.0,  # primary pre-activations divided by the number of capsule types
        "routing_bias": True,
        "init": "authors",
        "lr_decay": 0.96,
        "lr_decay_steps": 2000,
    },
}
"""Fields in which each recipe differs from the defaults; every one can be switched alone.

`authors` is https://github.com/Sarasra/models/tree/master/research/capsules. Its margin loss is averaged over classes,
ten in all its MNIST experiments; with another number of classes give `margin_scale` as 0.5 divided by that number.
"""


def size_of(image_size: int | str | None) -> tuple[int, int] | None:
    """Height and width that `--image-size` means; None for None, and where it means none."""
    if isinstance(image_size, int):
        return (image_size, image_size) if 1 <= image_size <= LARGEST_SIDE else None
    sides = str(image_size).lower().split("x")
    if image_size is None or not all(side.isascii() and side.isdecimal() and len(side) < 6 for side in sides):
        return None
    height, width = int(sides[0]), int(sides[-1])
    return (height, width) if len(sides) < 3 and 1 <= min(height, width) <= max(height, width) <= LARGEST_SIDE else None


def preset(name: str) -> Config:
    """The configuration that preset `name` stands for.

    Raises:
        InputError: an unknown name.
    """
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {shown(name)}{_nearest(name, PRESETS)}")
    return Config(**{"preset": name, **PRESETS[name]})


def with_defaults(config: Config) -> Config:
    """`config` with the options that it leaves open as they are for published data sets."""
    return replace(config, **{name: value for name, value in OPEN.items() if getattr(config, name) is None})


def preset_differences(config: Config) -> dict[str, Any]:
    """The fields in which `config` is not its preset; for a folder of images, also what is open in the preset."""
    base = preset(config.preset)
    if not is_directory(config.data):
        base, config = with_defaults(base), with_defaults(config)
    return {name: value for name, value in asdict(config).items() if value != getattr(base, name)}


def from_dict(values: dict[str, Any], *, source: str) -> Config:
    """A configuration from the preset that `values` name and the other fields they give.

    Args:
        values: fields by name.
        source: the file they are from, for errors.

    Raises:
        InputError: an unknown field, or a value of the wrong type or out of range; all of them are named.
    """
    base = preset(str(values.get("preset", "paper")))
    known = {field.name: field.type for field in fields(Config)}
    faults, clean = list[str](), dict[str, Any]()
    for name, value in values.items():
        if name not in known:
            faults.append(f"{brief(name)} is no option{_nearest(name, known)}")
            continue
        try:
            clean[name] = checked(_as_written(value, known[name]), known[name], name=name)
        except InputError as error:
            faults.append(str(error))
    faults += out_of_range(clean)
    if faults:
        raise InputError(f"{source}: {joined(faults)}")
    return replace(base, **clean)


def read(path: str | Path) -> Config:
    """Read a configuration from a YAML file; fields that it lacks are those of its preset.

    Raises:
        InputError: no such file, not YAML, or see `from_dict`.
    """
    values = read_yaml(Path(path), what="config file")
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold option: value lines; got {type(values).__name__}")
    return from_dict({str(name): value for name, value in values.items()}, source=f"config file {path}")


def write(config: Config, path: Path) -> None:
    """Write every field of `config` to a YAML file."""
    import yaml

    values = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(config).items()}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def out_of_range(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of options, each of which is of the right type."""
    kinds, faults = {field.name: field.type for field in fields(Config)}, list[str]()
    for name, value in values.items():
        holds, rule = _RULES.get(name, _ANY)
        most = _MOST.get(name, _LARGEST)
        if value is None:
            continue
        if get_origin(kinds.get(name)) is Literal:
            try:
                checked(value, kinds[name], name=name)
            except InputError as error:
                faults.append(str(error))
        elif not holds(value):
            faults.append(f"{name} must be {rule}; got {shown(value)}")
        elif isinstance(value, int) and value > most:
            faults.append(f"{name} must be at most {most:,}; got {shown(value)}")
        elif isinstance(value, str) and "\0" in value:
            faults.append(f"{name} must be text without a NUL character; got {shown(value)}")
    return faults


def _as_written(value: Any, kind: Any) -> Any:
    """What YAML writes otherwise: 2.0 as 2, and 1e-3, which it reads as text."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    return value
