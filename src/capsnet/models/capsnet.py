"""CapsNet of Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (NIPS 2017, arXiv 1710.09829), Section 4."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet.kernels.select import is_bare, resolve_convolution, resolve_routing_kernel
from capsnet.kernels.stem import winograd_stem
from capsnet.kernels.winograd import saving
from capsnet.layers import ClassCapsules, Convolution, Decoder, PrimaryCapsules
from capsnet.models.network import VectorCapsuleNetwork
from capsnet.options.schema import AT_LEAST_1, FINITE, SIZES, Range
from capsnet.routing import MOST_ITERATIONS

__all__ = ["PRESETS", "CapsNet", "Options", "build"]

PRESETS: dict[str, dict[str, Any]] = {"fast": {"conv_channels": 64, "capsule_types": 8, "epochs": 20}}
"""`fast` is ours: a quarter of the width. A learning rate of 0.004 draws strokes sharper and errs less on MNIST,
but had half of the test images wrong after 72 photographs, with two of three seeds."""


@dataclass(frozen=True)
class Options:
    """Options of CapsNet."""

    routing_iterations: Annotated[int, Range(1, MOST_ITERATIONS)] = 3
    """Number of routing iterations r; 1 means uniform couplings."""
    routing_bias: bool = False
    """Add a learned bias to the weighted sum of votes."""
    leaky: bool = False
    """Add a "none of the above" slot to the softmax of every primary capsule."""
    routing_normalization: Literal["softmax", "max-min"] = "softmax"
    """How logits become couplings. max-min: scaled to 0 ... 1 for each primary capsule (Zhao et al. 2019)."""
    share_transform: bool = False
    """Let all primary capsules share the transformation to a class (Aff-CapsNets, Gu and Tresp 2020, which have
    --routing-iterations 1 too)."""
    detach_routing: bool = False
    """Stop the gradient at the couplings."""
    routing_kernel: Literal["auto", "plain", "fused"] = "auto"
    """How votes and routing are computed; the results are the same. auto: fused on a CPU, plain on a GPU."""
    convolution: Literal["auto", "direct", "winograd"] = "auto"
    """How the two convolutions are computed. winograd saves most multiplications, at about 1e-4 relative rounding in
    float32; auto: winograd on a CPU in precision 32 where it saves half or more, direct elsewhere."""
    conv_channels: Annotated[int, AT_LEAST_1] = 256
    """Number of channels of the first convolution."""
    conv_kernel_size: Annotated[int, AT_LEAST_1] = 9
    """Kernel size of the first convolution, in pixels."""
    conv_stride: Annotated[int, AT_LEAST_1] = 1
    """Stride of the first convolution, in pixels."""
    capsule_types: Annotated[int, AT_LEAST_1] = 32
    """Number of primary capsule types."""
    primary_dim: Annotated[int, AT_LEAST_1] = 8
    """Dimension of a primary capsule."""
    primary_kernel_size: Annotated[int, AT_LEAST_1] = 9
    """Kernel size of the primary capsules, in pixels."""
    primary_stride: Annotated[int, AT_LEAST_1] = 2
    """Stride of the primary capsules, in pixels."""
    primary_scale: Annotated[float | None, FINITE] = None
    """Factor on the primary capsules' convolution before its bias; 0 means uniform couplings: 1 / capsule_types, or
    1 / (capsule_types + 1) with the leaky slot. Default: 1 (the paper), but 0 for images of one's own where a class
    capsule gets more votes than the paper's."""
    padding: Literal["valid", "same"] = "valid"
    """Padding of both convolutions."""
    class_dim: Annotated[int, AT_LEAST_1] = 16
    """Dimension of a class capsule."""
    squash_epsilon: Annotated[float, FINITE] = 0.0
    """Added to the squared length where squash divides by the length, as many implementations do; 0 divides by none.
    Above 0 routing is computed plainly."""
    reconstruction: bool = True
    """Train a decoder and add its loss."""
    decoder_sizes: Annotated[tuple[int, ...], SIZES] = (512, 1024)
    """Widths of the decoder's hidden layers."""
    share_decoder: bool = False
    """Let the decoder see the vector of one class capsule only, so that all classes share it (DeepCaps)."""
    init: Literal["pytorch", "authors"] = "pytorch"
    """Initial weights. authors: truncated normal 0.1 (0.05 in the first convolution), biases 0.1."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1, as the first author's code does for
    CIFAR-10."""


class CapsNet(VectorCapsuleNetwork):
    """Convolution and ReLU, primary capsules, class capsules, and a decoder if there is one (Figures 1 and 2).

    Examples:
        >>> network = create("capsnet", conv_channels=8, capsule_types=2)
        >>> type(network).__name__, network.in_capsules
        ('CapsNet', 72)
        >>> network(torch.rand(3, 1, 28, 28)).pose.shape
        torch.Size([3, 10, 16])
    """

    primary: PrimaryCapsules
    class_capsules: ClassCapsules
    narrower = "fewer --conv-channels and --capsule-types"

    def __init__(
        self,
        conv: Convolution,
        primary: PrimaryCapsules,
        class_capsules: ClassCapsules,
        decoder: Decoder | None,
        image_shape: tuple[int, int, int],
        *,
        convolution: str,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.convolution, self.standardize = image_shape, convolution, standardize
        self.conv, self.primary, self.class_capsules, self.decoder = conv, primary, class_capsules, decoder
        self.leaky, self.routing_iterations = class_capsules.leaky, class_capsules.iterations
        self.couplings_sum_to_one = class_capsules.normalization == "softmax"

    def resolved_convolution(self, images: Tensor) -> str:
        """How the two convolutions of `images` are computed now, see `kernels.select`."""
        second = self.primary.conv
        saved = partial(saving, second.in_size, second.kernel_size, second.stride, second.pads)
        kinds = ((self.conv, Convolution), (self.primary, PrimaryCapsules), (second, Convolution))
        bare = all(is_bare(module, kind) for module, kind in kinds)
        return resolve_convolution(self.convolution, images, saved=saved, bare=bare)

    def primary_poses(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch capsules dim"]:
        """Poses of the primary capsules: both convolutions and the squash."""
        first, second = self.conv, self.primary.conv
        images = self.standardized(images)
        if self.resolved_convolution(images) == "direct":
            u: Tensor = self.primary(torch.relu(first(images)))
            return u
        assert first.bias is not None
        grid = winograd_stem(
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

    def kernels(self, device: torch.device, precision: str) -> dict[str, str]:
        """The routing kernel, and how the convolutions are computed."""
        return {
            "routing_kernel": resolve_routing_kernel(self.class_capsules.routing_kernel, device),
            "convolution": self.resolved_convolution(torch.empty(0, device=device)) if precision == "32" else "direct",
        }

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the convolutions are direct and the routing kernel is plain."""
        convolution, kernel = self.convolution, self.class_capsules.routing_kernel
        self.convolution, self.class_capsules.routing_kernel = "direct", "plain"
        try:
            yield
        finally:
            self.convolution, self.class_capsules.routing_kernel = convolution, kernel

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The share of a pixel is the number of paths from it through both convolutions to the capsule.

        A pyramid that is highest in the middle of the receptive field.
        """
        rows, columns = (self.primary.conv.windows(axis) @ self.conv.windows(axis) for axis in (0, 1))
        return rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True)


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> CapsNet:
    """CapsNet with new weights: 6,804,224 parameters for MNIST, 8,215,568 with the decoder.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes and ways.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    scale = options.primary_scale
    conv = Convolution(
        image_shape[0],
        options.conv_channels,
        options.conv_kernel_size,
        options.conv_stride,
        in_size=image_shape[1:],
        padding=options.padding,
        name="first convolution",
    )
    primary = PrimaryCapsules(
        options.conv_channels,
        types=options.capsule_types,
        dim=options.primary_dim,
        kernel_size=options.primary_kernel_size,
        stride=options.primary_stride,
        in_size=conv.out_size,
        padding=options.padding,
        scale=1.0 if scale is None else scale or 1 / (options.capsule_types + options.leaky),
        epsilon=options.squash_epsilon,
    )
    class_capsules = ClassCapsules(
        primary.capsules,
        options.primary_dim,
        num_classes,
        options.class_dim,
        iterations=options.routing_iterations,
        bias=options.routing_bias,
        leaky=options.leaky,
        detach_routing=options.detach_routing,
        routing_kernel=options.routing_kernel,
        epsilon=options.squash_epsilon,
        normalization=options.routing_normalization,
        types=1 if options.share_transform else None,
    )
    decoder = None
    if options.reconstruction:
        decoder = Decoder(
            None if options.share_decoder else num_classes, options.class_dim, image_shape, options.decoder_sizes
        )
    network = CapsNet(
        conv,
        primary,
        class_capsules,
        decoder,
        image_shape,
        convolution=options.convolution,
        standardize=options.standardize,
    )
    network.resolved_convolution(torch.empty(0, device="cpu"))
    if options.init == "authors":
        _start_as_authors(network)
    return network


def _start_as_authors(network: CapsNet) -> None:
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, 0.1)
        else:
            std = 0.05 if name == "conv.weight" else 0.1
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
