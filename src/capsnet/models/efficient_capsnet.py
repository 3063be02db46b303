"""Efficient-CapsNet of Mazzia, Salvetti, Chiaberge (2021, arXiv 2101.12491): small layers, self-attention routing.

Sizes, initialisation and the place of the prior are those of the authors' code
(https://github.com/EscVM/Efficient-CapsNet).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels import fused
from capsnet.kernels.select import resolve_routing_kernel, routing_kernel_for, sweeps_for
from capsnet.layers import BatchNorm, Convolution, Decoder, each_capsule, windows
from capsnet.models.network import VectorCapsuleNetwork
from capsnet.options.schema import AT_LEAST_1, FRACTION, SIZES
from capsnet.routing import RoutingResult, attention_routing, dynamic_routing, uniform_routing

__all__ = [
    "PRESETS",
    "ClassCapsules",
    "EfficientCapsNet",
    "Options",
    "PrimaryCapsules",
    "StemOptions",
    "build",
    "stem_of",
]

PRESETS: dict[str, dict[str, Any]] = {
    "authors": {
        "batch_size": 16,
        "lr": 5e-4,
        "lr_decay": 0.97,
        "lr_decay_steps": 0,
        "lr_floor": 5e-5,
        "margin_scale": 1.0,  # not that of capsnet
        "reconstruction_weight": 0.0005,
    },
    "fast": {"lr": 0.005, "epochs": 10},
}
"""`authors`: their code for MNIST; its epochs, of all images, are given as `--epochs 150 --validation 0`. The learning
rate falls smoothly, in the code after each epoch. Of the augmentation `--rotation 12 --erase 4` come near: angles with
the same standard deviation of 7 degrees, and squares of the same size. Its squeeze of the width has no option. Three
things are left out: the code keeps the epoch with the lowest error on the test images; it divides intensities by 256;
and its pairs of digits may be of one class, with a target of 2. `fast` is ours.
"""
SIDE = 28
"""Pixels of the shorter side for each pixel of the first convolution's stride."""


@dataclass(frozen=True)
class StemOptions:
    """Options of the convolutions."""

    conv_channels: Annotated[tuple[int, ...], SIZES] = (32, 64, 64, 128)
    """Number of channels of each convolution."""
    conv_kernel_sizes: Annotated[tuple[int, ...], SIZES] = (5, 3, 3, 3)
    """Kernel size of each convolution, in pixels."""
    conv_strides: Annotated[tuple[int, ...] | None, SIZES] = None
    """Stride of each convolution, in pixels. Default: 2 in the last; and in the first 1, but 2, 3, ... for images of
    two, three, ... times 28 pixels."""
    padding: Literal["valid", "same"] = "valid"
    """Padding of the convolutions; the depthwise one of the primary capsules has none."""
    normalization: Literal["batch", "instance"] = "batch"
    """Normalisation after each convolution. The paper has instance for smallNORB."""
    negative_slope: Annotated[float, FRACTION] = 0.0
    """Slope of the activation below 0. The paper has a leaky one for smallNORB."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


@dataclass(frozen=True)
class Options(StemOptions):
    """Options of Efficient-CapsNet."""

    primary_dim: Annotated[int, AT_LEAST_1] = 8
    """Dimension of a primary capsule."""
    primary_kernel_size: Annotated[int | None, AT_LEAST_1] = None
    """Kernel size of the primary capsules, in places of the last convolution. Default: all of them."""
    primary_stride: Annotated[int, AT_LEAST_1] = 1
    """Stride of the primary capsules, where their kernel is smaller."""
    class_dim: Annotated[int, AT_LEAST_1] = 16
    """Dimension of a class capsule."""
    routing: Literal["attention", "dynamic", "uniform"] = "attention"
    """How the class capsules get their poses: by self-attention; by dynamic routing of three iterations with its
    squash, as a comparison; or with uniform couplings, the control."""
    reconstruction: bool = True
    """Train a decoder and add its loss."""
    decoder_sizes: Annotated[tuple[int, ...], SIZES] = (512, 1024)
    """Widths of the decoder's hidden layers."""
    share_decoder: bool = False
    """Let the decoder see the vector of one class capsule only, so that all classes share it (DeepCaps)."""


class PrimaryCapsules(nn.Module):
    """A depthwise convolution whose channels are grouped into vectors and squashed.

    Where the kernel is as large as the input, each channel becomes one number: a learned template, not a pooling.
    Capsule `i = (y * columns + x) * types + type` has the channels `type * dim ... type * dim + dim - 1` of a place.

    Args:
        channels: of the input, `types * dim`.
        dim: length of a capsule's vector.
        kernel_size: height and width of the kernel.
        stride: its step.
        in_size: height and width of the input.

    Weights:
        weight `[channels, 1, height, width]`, uniform as Keras starts a depthwise kernel; bias `[channels]`, 0.

    Raises:
        InputError: channels that `dim` does not divide, or a kernel larger than the input.
    """

    def __init__(
        self, channels: int, *, dim: int, kernel_size: tuple[int, int], stride: int, in_size: tuple[int, int]
    ) -> None:
        super().__init__()
        if channels % dim:
            raise InputError(f"primary_dim must divide the {channels} channels of the last convolution; got {dim}")
        rows, columns = ((size - kernel) // stride + 1 for size, kernel in zip(in_size, kernel_size, strict=True))
        if min(rows, columns) < 1:
            raise InputError(
                f"primary_kernel_size must be at most the {in_size[0]}x{in_size[1]} places of the last convolution; "
                f"got {kernel_size[0]}"
            )
        self.dim, self.stride, self.in_size, self.out_size = dim, stride, in_size, (rows, columns)
        bound = math.sqrt(6 / (math.prod(kernel_size) * (channels + 1)))
        self.weight = nn.Parameter(torch.empty(channels, 1, *kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels))

    @property
    def capsules(self) -> int:
        """Number of capsules."""
        return len(self.bias) // self.dim * math.prod(self.out_size)

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch in dim"]:
        """Poses of the primary capsules, each of length in [0, 1), in float32."""
        with F.full_precision(x.device):
            x = F.at_least_float32(x)
            if self.out_size == (1, 1):  # a sum of products; PyTorch's depthwise convolution is slow on a CPU
                grid = (x * self.weight[:, 0]).sum((-2, -1)) + self.bias
                return F.exponential_squash(grid.view(x.shape[0], -1, self.dim))
            grid = nn.functional.conv2d(x, self.weight, self.bias, self.stride, groups=x.shape[1])
            return F.exponential_squash(grid.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.dim))

    def windows(self, axis: int) -> Float[Tensor, "out in"]:
        """1 where a place of the input is in the window of a place of the output; rows (0) or columns (1)."""
        kernel_size = self.weight.shape[2 + axis]
        return windows(self.out_size[axis], self.in_size[axis], kernel_size=kernel_size, stride=self.stride)


class ClassCapsules(nn.Module):
    """One capsule a class, routed by self-attention from the capsules below, or in one of the ways it is compared with.

    Args:
        in_capsules: number of capsules below.
        in_dim: length of their vectors.
        out_capsules: number of classes.
        out_dim: length of the class capsules' vectors.
        routing: `attention`, `dynamic` or `uniform`, see `Options`.
        types: number of transformations, which the capsules below share as in `layers.ClassCapsules`; None for one
            for each.
        routing_kernel: how attention reads the votes, as in `layers.ClassCapsules`; the few capsules of
            Efficient-CapsNet take the plain one.

    Weights:
        weight `W [types or in_capsules, in_dim, out_capsules, out_dim]`, truncated normal as Keras's `he_normal`; prior
        `[in_capsules, out_capsules]`, 0, of attention only.

    Raises:
        InputError: an unknown routing kernel.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        routing: str = "attention",
        types: int | None = None,
        routing_kernel: str = "plain",
    ) -> None:
        super().__init__()
        resolve_routing_kernel(routing_kernel, torch.device("cpu"))
        self.routing, self.in_capsules, self.routing_kernel = routing, in_capsules, routing_kernel
        self.weight = nn.Parameter(torch.empty(types or in_capsules, in_dim, out_capsules, out_dim))
        _he_normal(self.weight, fan_in=in_capsules * in_dim * out_capsules)  # Keras takes all axes but the last
        self.prior = nn.Parameter(torch.zeros(in_capsules, out_capsules)) if routing == "attention" else None

    def forward(self, u: Float[Tensor, "batch in in_dim"]) -> RoutingResult:
        """Route the poses `u`; in float32 or better whatever the precision around it."""
        with F.full_precision(u.device):
            u = F.at_least_float32(u)
            weight = self.transforms().to(u.dtype)
            if self.routing == "attention" and routing_kernel_for(self.routing_kernel, u, weight) == "fused":
                weight = weight.contiguous()  # of shared transformations one for each capsule
                return fused.votes_and_attention(sweeps_for(u, weight), u, weight, prior=self.prior)
            return self.steps(F.votes(u, weight))[-1]()

    def transforms(self) -> Float[Tensor, "in in_dim out dim"]:
        """`W_ij` of each capsule below, also where they share it."""
        return each_capsule(self.weight, self.in_capsules)

    def steps(self, votes: Float[Tensor, "batch in out dim"]) -> list[Callable[[], RoutingResult]]:
        """What computes the routing after each of its steps, of which the first is uniform."""
        uniform = partial(uniform_routing, votes, squash=F.exponential_squash)
        if self.routing == "dynamic":
            return [partial(dynamic_routing, votes, iterations=t) for t in (1, 2, 3)]
        return (
            [uniform] if self.routing == "uniform" else [uniform, partial(attention_routing, votes, prior=self.prior)]
        )


class EfficientCapsNet(VectorCapsuleNetwork):
    """Convolutions, each with activation and normalisation; primary and class capsules; a decoder if there is one."""

    primary: PrimaryCapsules
    class_capsules: ClassCapsules
    narrower = "fewer --conv-channels, or larger --conv-strides"

    def __init__(
        self,
        stem: nn.Sequential,
        primary: PrimaryCapsules,
        class_capsules: ClassCapsules,
        decoder: Decoder | None,
        image_shape: tuple[int, int, int],
        *,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.standardize = image_shape, standardize
        self.stem, self.primary, self.class_capsules, self.decoder = stem, primary, class_capsules, decoder
        self.couplings_sum_to_one = class_capsules.prior is None
        self.routing_iterations = {"uniform": 1, "attention": 2, "dynamic": 3}[class_capsules.routing]

    def primary_poses(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch capsules dim"]:
        """Poses of the primary capsules."""
        u: Tensor = self.primary(self.stem(self.standardized(images)))
        return u

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The share of a pixel is the number of paths from it through all convolutions to the capsule."""
        fields = []
        for axis in (0, 1):
            paths = self.primary.windows(axis)
            for layer in reversed(self.stem):
                paths = paths @ layer.windows(axis) if isinstance(layer, Convolution) else paths
            fields.append(paths / paths.sum(1, keepdim=True))
        return fields[0], fields[1]


def stem_of(image_shape: tuple[int, int, int], options: StemOptions) -> tuple[nn.Sequential, int, tuple[int, int]]:
    """The convolutions, each with activation and normalisation; the channels and the size of what they make.

    Args:
        image_shape: channels, height and width.
        options: sizes.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    count, strides = len(options.conv_channels), options.conv_strides
    if not count:
        raise InputError("conv_channels must be one number or more; got none")
    if strides is None:
        first = max(1, min(image_shape[1:]) // SIDE)
        strides = (first, *(1 for _ in range(count - 2)), 2)[-count:] if count > 1 else (2 * first,)
    for name, values in (("conv_kernel_sizes", options.conv_kernel_sizes), ("conv_strides", strides)):
        if len(values) != count:
            raise InputError(f"{name} must be one for each of the {count} conv_channels; got {len(values)}")
    stem = nn.Sequential()
    channels, size = image_shape[0], image_shape[1:]
    for k, (width, kernel, stride) in enumerate(
        zip(options.conv_channels, options.conv_kernel_sizes, strides, strict=True), 1
    ):
        layer = Convolution(
            channels, width, kernel, stride, in_size=size, padding=options.padding, name=f"convolution {k} of {count}"
        )
        _he_normal(layer.weight, fan_in=kernel * kernel * channels)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if options.normalization == "batch":
            norm: nn.Module = BatchNorm(width, eps=1e-3)  # at Keras's momentum a short run never forgets its start
        else:
            if layer.out_size == (1, 1):
                raise InputError(f"normalization must be batch for one place, as of convolution {k}; got instance")
            norm = nn.InstanceNorm2d(width, eps=1e-3, affine=True)
        stem.extend([layer, nn.LeakyReLU(options.negative_slope) if options.negative_slope else nn.ReLU(), norm])
        channels, size = width, layer.out_size
    return stem, channels, size


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> EfficientCapsNet:
    """Efficient-CapsNet with new weights: 161,824 parameters for MNIST, 1,573,168 with the decoder.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    stem, channels, size = stem_of(image_shape, options)
    side = options.primary_kernel_size
    primary = PrimaryCapsules(
        channels,
        dim=options.primary_dim,
        kernel_size=size if side is None else (side, side),
        stride=options.primary_stride,
        in_size=size,
    )
    class_capsules = ClassCapsules(
        primary.capsules, options.primary_dim, num_classes, options.class_dim, routing=options.routing
    )
    decoder = None
    if options.reconstruction:
        drawn = None if options.share_decoder else num_classes
        decoder = Decoder(drawn, options.class_dim, image_shape, options.decoder_sizes)
        *hidden, last = [layer for layer in decoder.layers if isinstance(layer, nn.Linear)]
        for linear in hidden:
            _he_normal(linear.weight, fan_in=linear.in_features)
        _truncated_normal(last.weight, std=math.sqrt(2 / (last.in_features + last.out_features)))  # Glorot
        for linear in (*hidden, last):
            nn.init.zeros_(linear.bias)
    return EfficientCapsNet(stem, primary, class_capsules, decoder, image_shape, standardize=options.standardize)


def _he_normal(tensor: Tensor, *, fan_in: int) -> None:
    _truncated_normal(tensor, std=math.sqrt(2 / fan_in))


def _truncated_normal(tensor: Tensor, *, std: float) -> None:
    """Normal, cut off at two of its standard deviations; the result has the standard deviation `std`, as in Keras."""
    if not tensor.is_meta:  # where it changes nothing
        wide = std / 0.8796256610342398
        nn.init.trunc_normal_(tensor, std=wide, a=-2 * wide, b=2 * wide)
