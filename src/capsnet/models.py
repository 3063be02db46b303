"""Networks of the papers, composed from layers: one small builder each, and the registry that finds them by name."""

import difflib
import fnmatch
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels.stem import minimal_stem
from capsnet.layers import ClassCapsules, Convolution, Decoder, PrimaryCapsules, resolve_stem

__all__ = [
    "CapsNet",
    "ConvNet",
    "Network",
    "Output",
    "available",
    "baseline",
    "baseline_multimnist",
    "builder_options",
    "capsnet",
    "create",
    "evaluation_mode",
    "inference_batch",
]

LARGE_IMAGE = 40 * 40
"""Pixels up to which images go through a network without gradients 256 at a time, and of more pixels fewer."""


class Output(NamedTuple):
    """What a network says of a batch.

    Attributes:
        scores: `[batch, classes]`; the largest is the prediction, or the k largest where images show k objects.
            Lengths in [0, 1) for a capsule network, logits for a convolutional one.
        reconstruction: `[batch, channels, height, width]` in [0, 1], or None without a decoder; `[batch, k, channels,
            height, width]`, each object alone, from a network for images of k objects.
        pose: class capsules' vectors `[batch, classes, dim]`, or None without capsules.
        couplings: of the last routing iteration `[batch, in, classes]`, or None without capsules.
    """

    scores: Tensor
    reconstruction: Tensor | None = None
    pose: Tensor | None = None
    couplings: Tensor | None = None


class Network(nn.Module, ABC):
    """What all networks share: images in, an Output out, and a record of how they were built.

    Attributes:
        config: name, image shape, classes and options; `create(**config)` builds the same network again.
        classes: names of the classes, in the order of the scores.
        objects: how many objects of different classes an image shows.
    """

    config: dict[str, Any]
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    objects: int = 1

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """What the network says of `images`; `labels` choose the capsules to draw, where there are any."""

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless `images` are floating point `[batch, *image_shape]`."""
        if not images.is_floating_point():
            raise InputError(f"images must be floating point in [0, 1] (divide uint8 by 255); got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"images must be [batch, channels, height, width] = [batch, {', '.join(map(str, self.image_shape))}]; "
                f"got {list(images.shape)}"
            )

    def check_labels(self, labels: Tensor) -> None:
        """Raise InputError unless `labels` tell as many objects of each image as the network looks for."""
        told = 1 if labels.ndim == 1 else labels.shape[1]
        if told != self.objects:
            raise InputError(f"images must show {self.objects} object{'s' * (self.objects > 1)} each; got {told}")

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


class CapsNet(Network):
    """Convolution and ReLU, primary capsules, class capsules, and a decoder if there is one (Figures 1 and 2)."""

    def __init__(
        self,
        conv: Convolution,
        primary: PrimaryCapsules,
        class_capsules: ClassCapsules,
        decoder: Decoder | None,
        image_shape: tuple[int, int, int],
        *,
        stem: str,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.stem, self.standardize = image_shape, stem, standardize
        self.conv, self.primary, self.class_capsules, self.decoder = conv, primary, class_capsules, decoder

    def resolved_stem(self, images: Tensor) -> str:
        """How the two convolutions of `images` are computed now, see `layers.resolve_stem`."""
        return resolve_stem(self.stem, self.conv, self.primary, images)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch *objects"] | None = None
    ) -> Output:
        """Recognise `images` and draw them again.

        Args:
            images: intensities in [0, 1].
            labels: the capsules to reconstruct from, as in training, `[batch]` or several for each image,
                `[batch, k]`; None takes the longest, as many as an image shows objects.

        Raises:
            InputError: images of another shape than the network was built for.
        """
        self.check_images(images)
        routed = self.class_capsules(self.primary_poses(images))
        if self.decoder is None:
            return Output(routed.activation, None, routed.pose, routed.couplings)
        index = labels
        if index is None:
            longest = routed.activation.argmax(-1)
            index = longest if self.objects == 1 else routed.activation.topk(self.objects).indices
        return Output(routed.activation, self.decoder(routed.pose, index), routed.pose, routed.couplings)

    def primary_poses(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch capsules dim"]:
        """Poses of the primary capsules: both convolutions and the squash."""
        first, second = self.conv, self.primary.conv
        images = F.standardized(images) if self.standardize else images
        if self.resolved_stem(images) == "direct":
            u: Tensor = self.primary(torch.relu(first(images)))
            return u
        assert first.bias is not None
        grid = minimal_stem(
            images,
            first.filters(),
            first.bias,
            second.filters(),
            stride1=first.stride,
            stride2=second.stride,
            pads1=first.pads,
            pads2=second.pads,
        )
        return self.primary.capsules_of(grid, fused=True)


class ConvNet(Network):
    """A plain stack of layers whose output is a logit a class."""

    def __init__(self, layers: nn.Sequential, image_shape: tuple[int, int, int], *, standardize: bool = False) -> None:
        super().__init__()
        self.image_shape, self.standardize = image_shape, standardize
        self.layers = layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch *objects"] | None = None
    ) -> Output:
        """Logits of `images` (intensities in [0, 1]); `labels` are not needed.

        Raises:
            InputError: images of another shape than the network was built for.
        """
        self.check_images(images)
        logits: Tensor = self.layers(F.standardized(images) if self.standardize else images)
        return Output(logits.float() if logits.dtype != torch.float64 else logits)


def inference_batch(network: Network) -> int:
    """Images at a time without gradients: 256, or as many as take no more memory than 256 of 40 x 40 pixels."""
    _, height, width = network.image_shape
    return max(1, min(256, 256 * LARGE_IMAGE // (height * width)))


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside, `network` is in evaluation mode; afterwards, also after an error, each of its modules is as it was.

    Threads may evaluate one network at the same time: the last one that leaves restores the modes.
    """
    modules = list(network.modules())
    with _lock:
        for module in modules:
            users, training = _evaluated.get(module, (0, module.training))
            _evaluated[module] = users + 1, training
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                users, training = _evaluated.pop(module)
                if users > 1:
                    _evaluated[module] = users - 1, training
                else:
                    module.training = training


_lock = Lock()
_evaluated: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # how many evaluate it, and its mode


def capsnet(
    image_shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    *,
    conv_channels: int = 256,
    conv_kernel: int = 9,
    conv_stride: int = 1,
    capsule_types: int = 32,
    primary_dim: int = 8,
    primary_kernel: int = 9,
    primary_stride: int = 2,
    primary_scale: float = 1.0,
    padding: str = "valid",
    class_dim: int = 16,
    squash_epsilon: float = 0.0,
    routing_iterations: int = 3,
    routing_bias: bool = False,
    leaky: bool = False,
    detach_routing: bool = False,
    kernel: str = "auto",
    stem: str = "auto",
    reconstruction: bool = True,
    decoder_sizes: tuple[int, ...] = (512, 1024),
    standardize: bool = False,
    init: str = "pytorch",
) -> CapsNet:
    """CapsNet of Sabour, Frosst, Hinton 2017 (Section 4; https://arxiv.org/abs/1710.09829).

    6,804,224 parameters for MNIST, 8,215,568 with the decoder. Options are those of the layers, and:

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        conv_channels: of the first convolution.
        conv_kernel: side of its kernel.
        conv_stride: its step.
        capsule_types: kinds of primary capsules.
        primary_dim: length of a primary capsule's vector.
        primary_kernel: side of the primary capsules' kernel.
        primary_stride: their step.
        primary_scale: factor on their convolution; 0 means uniform couplings over the types, 1 / `capsule_types`
            (1 / (`capsule_types` + 1) with the leaky slot).
        padding: of both convolutions, `valid` or `same`.
        class_dim: length of a class capsule's vector.
        squash_epsilon: see `functional.squash`.
        routing_iterations: r.
        routing_bias: biases inside routing.
        leaky: a "none of the above" slot.
        detach_routing: no gradient through the couplings.
        kernel: how votes and routing are computed.
        stem: how the two convolutions are computed.
        reconstruction: with the decoder.
        decoder_sizes: widths of its hidden layers.
        standardize: give each image mean 0 and standard deviation 1 first.
        init: `pytorch` starts the weights as the layers say; `authors` as the first author's code does: all weights
            truncated normal with standard deviation 0.1 (0.05 in the first convolution), all biases 0.1.

    Raises:
        InputError: an image too small for the kernels, a size below 1, or an option out of its range.
    """
    sizes = {
        "channels": image_shape[0],
        "num_classes": num_classes,
        "conv_channels": conv_channels,
        "conv_kernel": conv_kernel,
        "conv_stride": conv_stride,
        "capsule_types": capsule_types,
        "primary_dim": primary_dim,
        "primary_kernel": primary_kernel,
        "primary_stride": primary_stride,
        "class_dim": class_dim,
        "decoder_sizes": min(decoder_sizes, default=1),
    }
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1; got {size}")
    conv = Convolution(
        image_shape[0],
        conv_channels,
        conv_kernel,
        conv_stride,
        in_size=image_shape[1:],
        padding=padding,
        name="first convolution",
    )
    primary = PrimaryCapsules(
        conv_channels,
        types=capsule_types,
        dim=primary_dim,
        kernel=primary_kernel,
        stride=primary_stride,
        in_size=conv.out_size,
        padding=padding,
        scale=primary_scale or 1 / (capsule_types + leaky),
        epsilon=squash_epsilon,
    )
    class_capsules = ClassCapsules(
        primary.capsules,
        primary_dim,
        num_classes,
        class_dim,
        iterations=routing_iterations,
        bias=routing_bias,
        leaky=leaky,
        detach_routing=detach_routing,
        kernel=kernel,
        epsilon=squash_epsilon,
    )
    decoder = Decoder(num_classes, class_dim, image_shape, decoder_sizes) if reconstruction else None
    network = CapsNet(conv, primary, class_capsules, decoder, image_shape, stem=stem, standardize=standardize)
    resolve_stem(stem, conv, primary, torch.empty(0, device="cpu"))
    if init == "authors":
        _start_as_authors(network)
    elif init != "pytorch":
        raise InputError(f"init must be pytorch or authors; got {init!r}")
    return network


def baseline(
    image_shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    standardize: bool = False,
) -> ConvNet:
    """The paper's convolutional baseline (Section 5): three 5x5 convolutions and two fully connected layers.

    256, 256 and 128 channels with stride 1, then 328 and 192 units, then dropout and one logit a class. The paper says
    neither padding nor dropout rate; its 35.4 M parameters on MNIST are those of padding `same` (35,445,522), and 0.5
    is the customary rate. There is no pooling, so the first fully connected layer grows with the image's area.

    Args:
        image_shape: channels, height and width.
        num_classes: number of logits.
        width: factor on all these channels and units.
        dropout: rate before the last layer.
        standardize: give each image mean 0 and standard deviation 1 first.

    Raises:
        InputError: a dropout rate outside [0, 1), or a width not above 0.
    """
    one, two, three, four, five = _widths((256, 256, 128, 328, 192), width, dropout)
    channels, height, breadth = image_shape
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((channels, one), (one, two), (two, three)):
        layers += [nn.Conv2d(fan_in, fan_out, 5, padding="same"), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(three * height * breadth, four), nn.ReLU(), nn.Linear(four, five), nn.ReLU()]
    return ConvNet(
        nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(five, num_classes)), image_shape, standardize=standardize
    )


def baseline_multimnist(
    image_shape: tuple[int, int, int] = (1, 36, 36),
    num_classes: int = 10,
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    standardize: bool = False,
) -> ConvNet:
    """The paper's convolutional baseline for overlapping digits (Section 6.2): two convolutions, each with pooling.

    512 channels of 9x9 and 256 of 5x5, each followed by 2x2 pooling, then 1,024 units, dropout, and one logit a class.
    Its 24.56 M parameters on MultiMNIST are those of padding `same` (24,563,978). Of affNIST the paper says "a
    traditional convolutional model (with MaxPooling and DropOut)" only: this one, at a `width` that gives as many
    parameters as the capsules have. The paper mentions no dropout on MultiMNIST: there, `dropout=0`.

    Args:
        image_shape: channels, height and width, at least 4 x 4.
        num_classes: number of logits.
        width: factor on all these channels and units.
        dropout: rate before the last layer.
        standardize: give each image mean 0 and standard deviation 1 first.

    Raises:
        InputError: a dropout rate outside [0, 1), a width not above 0, or an image too small to pool twice.
    """
    one, two, three = _widths((512, 256, 1024), width, dropout)
    channels, height, breadth = image_shape
    if min(height, breadth) < 4:
        raise InputError(f"images of baseline-multimnist must be at least 4 x 4 pixels; got {height} x {breadth}")
    layers = nn.Sequential(
        nn.Conv2d(channels, one, 9, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(one, two, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(two * (height // 4) * (breadth // 4), three),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(three, num_classes),
    )
    return ConvNet(layers, image_shape, standardize=standardize)


def _widths(full: tuple[int, ...], width: float, dropout: float) -> list[int]:
    """Widths of a baseline's layers."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1); got {dropout}")
    if not 0 < width < float("inf"):
        raise InputError(f"width must be above 0; got {width}")
    return [max(1, round(width * size)) for size in full]


BUILDERS: dict[str, Callable[..., Network]] = {
    "capsnet": capsnet,
    "baseline": baseline,
    "baseline-multimnist": baseline_multimnist,
}


def available(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted: `available("caps*")`."""
    return sorted(fnmatch.filter(BUILDERS, pattern))


def builder_options(name: str) -> dict[str, Any]:
    """Options of the network `name` with their defaults, without image shape and classes.

    Raises:
        InputError: an unknown name.
    """
    if name not in BUILDERS:
        near = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"model must be one of {', '.join(available())}; got {name!r}{hint}")
    parameters = inspect.signature(BUILDERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def create(
    name: str,
    *,
    image_shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    classes: tuple[str, ...] | None = None,
    objects: int = 1,
    **options: Any,
) -> Network:
    """Build the network `name` with new weights.

    Args:
        name: one of `available()`.
        image_shape: channels, height and width of the images.
        num_classes: number of classes.
        classes: their names; "0", "1", ... if not given.
        objects: how many objects of different classes an image shows.
        options: of the builder, see `capsnet` and `baseline`.

    Returns:
        A network in training mode, on the current default device.

    Raises:
        InputError: an unknown name or option, or an option out of its range.

    Example:
        >>> create("capsnet", image_shape=(3, 32, 32))(torch.rand(2, 3, 32, 32)).scores.shape
        torch.Size([2, 10])
    """
    known = builder_options(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"options of model {name} must be among {', '.join(known)}; got {', '.join(unknown)}{hint}")
    if num_classes < 1 or (classes is not None and len(classes) != num_classes):
        raise InputError(f"num_classes must be at least 1 and the number of names in classes; got {num_classes}")
    if not 1 <= objects <= num_classes:
        raise InputError(f"objects must be 1 to the {num_classes} classes; got {objects}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape must be channels, height and width, each at least 1; got {image_shape}")
    shape = (image_shape[0], image_shape[1], image_shape[2])
    network = BUILDERS[name](shape, num_classes, **options)
    network.classes = classes if classes is not None else tuple(str(k) for k in range(num_classes))
    network.objects = objects
    network.config = {
        "name": name,
        "image_shape": shape,
        "num_classes": num_classes,
        "classes": network.classes,
        "objects": objects,
        **known,
        **options,
    }
    return network


def _start_as_authors(network: CapsNet) -> None:
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, 0.1)
        else:
            std = 0.05 if name == "conv.weight" else 0.1
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
