"""Matrix capsules with EM routing (Hinton, Sabour, Frosst, ICLR 2018): poses of 4 x 4, convolutional capsules.

Sizes and initial weights are those of the authors' code (google-research, folder capsule_em). `--cost google` has its
cost too. Not taken over: its convolutional capsules normalise the couplings of each type of parent alone, and find the
parents of a child right at stride 1 only.
"""

import math
from abc import ABC
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.layers import BatchNorm, Convolution, Decoder
from capsnet.matrix_capsules import (
    SIDE,
    CapsuleNorm,
    ConvCapsules,
    MatrixCapsules,
    MatrixClassCapsules,
    MatrixPrimary,
    Routing,
    slices_on,
)
from capsnet.models.network import CapsuleNetwork, Output, RoutingTrace
from capsnet.options import LossOptions
from capsnet.options.schema import AT_LEAST_1, FINITE, POSITIVE, SIZES, Range
from capsnet.routing import MOST_ITERATIONS, RoutingResult, em_routing

__all__ = ["PRESETS", "EMCapsNet", "LayerOptions", "Layers", "MatrixCapsNet", "Options", "build", "layers_of"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"batch_size": 64, "lr": 0.003, "lr_decay": 0.96, "lr_decay_steps": 20_000},
    "authors": {
        "batch_size": 64,
        "lr": 0.003,
        "lr_decay": 0.96,
        "lr_decay_steps": 20_000,
        "cost": "google",
        "margin_schedule": "published",
        "margin_scale": 1.0,  # not that of capsnet
        "reconstruction_weight": 0.0005,
    },
    "fast": {
        "batch_size": 32,
        "lr": 0.01,
        "conv_channels": 32,
        "capsule_types": (8, 8, 8),
        "routing_iterations": 2,
        "final_lambda": 0.5,
        "class_lambda": 0.07,
        "transform_std": 1.0,
    },
}
"""`paper`: batches and learning rate by the authors' answer, quoted in the code of arXiv 1907.00652. `authors`: also
the cost and margin of their published code. Their weight decay, 2e-7 in the gradient, has no option here. `fast` is
ours: inverse temperatures by which costs of either sign and of all layers move the activations from the first step on,
as arXiv 1907.00652 scales costs by the numbers of parents and children; 5 epochs of 5,000 strokes reach an error of 3 %
(one run)."""
SIDE_OF_IMAGE = 28
"""Pixels of the shorter side for every two pixels of the first convolution's stride."""
LAST_MARGIN = F.spread_margin(math.inf)
"""Of the spread loss in evaluation, so that losses of different epochs compare."""
RISES = 8
"""By how much the argument of the margin's sigmoid grows over a run: from -4 to 4, as over the first 400,000 steps."""


@dataclass(frozen=True)
class LayerOptions:
    """Options of the layers of matrix capsules."""

    conv_channels: Annotated[int, AT_LEAST_1] = 64
    """Number of channels of the first convolution, A in the paper."""
    conv_kernel_size: Annotated[int, AT_LEAST_1] = 5
    """Kernel size of the first convolution, in pixels."""
    conv_stride: Annotated[int | None, AT_LEAST_1] = None
    """Stride of the first convolution, in pixels. Default: 2, but 4, 6, ... for images of two, three, ... times 28
    pixels."""
    padding: Literal["valid", "same"] = "valid"
    """Padding of the first convolution."""
    capsule_types: Annotated[tuple[int, ...], SIZES] = (8, 16, 16)
    """Numbers of capsule types: primary, then of each layer of convolutional capsules; B, C and D in the paper. Its
    large network has 32 channels and 32 32 32."""
    capsule_kernel_sizes: Annotated[tuple[int, ...], SIZES] = (3, 3)
    """Kernel size of each layer of convolutional capsules, in places."""
    capsule_strides: Annotated[tuple[int, ...], SIZES] = (2, 1)
    """Stride of each layer of convolutional capsules, in places."""
    routing_iterations: Annotated[int, Range(1, MOST_ITERATIONS)] = 3
    """Number of routing iterations T into each layer; 1 means couplings by the number of parents, never updated."""
    routing_slices: Literal["auto", "small", "large"] = "auto"
    """Votes in memory at once in each layer: of as many images as make 8 MiB (small) or 256 MiB (large), computed again
    for the gradient; the results are the same. auto: small on a CPU, large on a GPU."""
    reconstruction: bool = False
    """Train a decoder and add its loss. The paper has none."""
    decoder_sizes: Annotated[tuple[int, ...], SIZES] = (512, 1024)
    """Widths of the decoder's hidden layers."""
    share_decoder: bool = False
    """Let the decoder see the pose of one class capsule only, so that all classes share it (DeepCaps)."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


@dataclass(frozen=True)
class Options(LayerOptions):
    """Options of matrix capsules with EM routing."""

    cost: Literal["paper", "google"] = "paper"
    """Cost of a parent. google: with the parameters, averaged means and inverse temperatures of the authors' code."""
    final_lambda: Annotated[float, FINITE] = 0.01
    """What the inverse temperature tends to over the iterations: it is 0.05, 0.0975, 0.1426, ... of this."""
    class_lambda: Annotated[float | None, FINITE] = None
    """The same of the class capsules. Default: final_lambda; a quarter of it with --cost google."""
    transform_std: Annotated[float | None, POSITIVE] = None
    """Standard deviation of the initial transformations. Default: that of the authors' code, 0.3 and to the classes
    0.01."""
    margin_schedule: Literal["run", "published"] = "run"
    """How the margin of the spread loss rises, from 0.2 to 0.99. run: over the length of the run, to 0.98 of it.
    published: by 50,000s of steps, however few there are."""


class MatrixCapsNet(CapsuleNetwork, ABC):
    """Convolution, primary capsules, convolutional capsules, class capsules, and a decoder if there is one.

    Args:
        stem: one convolution and what follows it.
        primary: the first capsules.
        capsules: `ConvCapsules`, with what normalises them after each.
        class_capsules: the last ones.
        class_norm: what normalises those, or None.
        decoder: of one or of all class capsules, or None.
        image_shape: channels, height and width.
        standardize: see `Network`.
        iterations: of the routing.
    """

    narrower = "fewer --capsule-types, or a larger --conv-stride"

    def __init__(
        self,
        stem: nn.Sequential,
        primary: MatrixPrimary,
        capsules: nn.Sequential,
        class_capsules: MatrixClassCapsules,
        class_norm: CapsuleNorm | None,
        decoder: Decoder | None,
        image_shape: tuple[int, int, int],
        *,
        standardize: bool,
        iterations: int,
    ) -> None:
        super().__init__()
        self.image_shape, self.standardize = image_shape, standardize
        self.stem, self.primary, self.capsules, self.class_capsules = stem, primary, capsules, class_capsules
        self.class_norm, self.decoder = class_norm, decoder
        self.routing_iterations = iterations

    def below(self, images: Float[Tensor, "batch channels height width"]) -> MatrixCapsules:
        """The grid of capsules below the class capsules."""
        grid: MatrixCapsules = self.capsules(self.primary(self.stem(self.standardized(images))))
        return grid

    def route(self, images: Float[Tensor, "batch channels height width"]) -> RoutingResult:
        """The class capsules, routed from the last grid of capsules."""
        return self.normalized(self.class_capsules(self.below(images)))

    def normalized(self, routed: RoutingResult) -> RoutingResult:
        """The class capsules as they are after what follows their routing."""
        if self.class_norm is None:
            return routed
        pose, activation = self.class_norm(MatrixCapsules(routed.pose, routed.activation))
        return RoutingResult(pose, activation, routed.couplings)

    def kernels(self, device: torch.device, precision: str) -> dict[str, str]:
        """How many votes are in memory at once."""
        return {"routing_slices": slices_on(device, self.class_capsules.slices)}

    @property
    def in_capsules(self) -> int:
        """Number of capsules below the class capsules."""
        return self.class_capsules.in_capsules

    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Votes of the last grid for the classes, with their coordinates, and the routing after 1, 2, ... iterations.

        Iteration t of a longer routing is a routing of t iterations.
        """
        self.check_images(images)
        layer, below = self.class_capsules, self.below(images)
        pose, activation = (x.float() for x in below)
        votes = layer.votes(pose, layer.weight.float())
        routed = [
            self.normalized(layer.routing(votes, activation.flatten(1), layer.beta_u, layer.beta_a, iterations=t))
            for t in range(1, self.routing_iterations + 1)
        ]
        return RoutingTrace.of(activation.flatten(1), votes, routed)

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The share of a pixel is the number of paths from it through all layers to the last grid of capsules."""
        layers = [*self.stem, self.primary.pose, *self.capsules]
        return _receptive_fields(layers, 0), _receptive_fields(layers, 1)


class EMCapsNet(MatrixCapsNet):
    """Matrix capsules with the spread loss, of which the margin rises over the training.

    Args:
        margin_schedule: see `Options`.
    """

    def __init__(self, *layers: Any, margin_schedule: str, **options: Any) -> None:
        super().__init__(*layers, **options)
        self.margin_schedule = margin_schedule
        self.margin: Tensor | float = F.spread_margin(0)

    def begin_step(self, step: int, steps: int) -> None:
        """Set the margin of this step; it stays where it is in memory, as a recorded step needs it."""
        margin = (
            F.spread_margin(step)
            if self.margin_schedule == "published"
            else F.spread_margin(RISES * step / steps, rise=1)
        )
        device = self.class_capsules.weight.device
        if not isinstance(self.margin, Tensor) or self.margin.device != device:
            self.margin = torch.zeros((), device=device)
        self.margin.fill_(margin)

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """The spread loss, summed over the wrong classes and scaled by `loss.margin_scale`.

        With the margin of the step in training, and the last one of the schedule, 0.99, in evaluation.
        """
        margin = self.margin if self.training else LAST_MARGIN
        return loss.margin_scale * F.spread_loss(output.scores, self.multi_hot(labels), margin)


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> EMCapsNet:
    """Matrix capsules with new weights: 68,618 parameters for 2 x 32 x 32 pixels and 5 classes, 316,650 the large ones.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes and ways.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    google, kept = options.cost == "google", options.final_lambda
    class_lambda = options.class_lambda if options.class_lambda is not None else kept / 4 if google else kept
    routing = partial(em_routing, iterations=options.routing_iterations, cost=options.cost)
    stem, primary, capsules, class_capsules, class_norm, decoder = layers_of(
        image_shape,
        num_classes,
        options,
        routing=partial(routing, final_lambda=options.final_lambda),
        class_routing=partial(routing, final_lambda=class_lambda),
    )
    conv = stem[0]
    assert isinstance(conv, Convolution)
    assert conv.bias is not None
    _truncated_normal(conv.weight, 0.05)
    nn.init.constant_(conv.bias, 0.1)
    _truncated_normal(primary.pose.weight, 0.5)
    _truncated_normal(primary.activation.weight, 3.0)
    for layer in (*capsules, class_capsules):
        last = layer is class_capsules
        _truncated_normal(layer.weight, options.transform_std or (0.01 if last else 0.3))
        if google:
            nn.init.constant_(layer.beta_u, 2.0 if last else 0.5)
            nn.init.constant_(layer.beta_a, 1.0 if last else 0.5)
    return EMCapsNet(
        stem,
        primary,
        capsules,
        class_capsules,
        class_norm,
        decoder,
        image_shape,
        standardize=options.standardize,
        iterations=options.routing_iterations,
        margin_schedule=options.margin_schedule,
    )


class Layers(NamedTuple):
    """The parts of a `MatrixCapsNet`, in its order."""

    stem: nn.Sequential
    primary: MatrixPrimary
    capsules: nn.Sequential
    class_capsules: MatrixClassCapsules
    class_norm: CapsuleNorm | None
    decoder: Decoder | None


def layers_of(
    image_shape: tuple[int, int, int],
    num_classes: int,
    options: LayerOptions,
    *,
    routing: Routing,
    class_routing: Routing,
    normalize: bool = False,
    primary_kernel_size: int = 1,
    primary_stride: int = 1,
    share: bool = True,
) -> Layers:
    """The layers of matrix capsules.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: their sizes.
        routing: of the convolutional capsules.
        class_routing: of the class capsules.
        normalize: batch normalisation of the first convolution, which then has no bias, and of all capsules; and
            coordinates as in the code of VB routing.
        primary_kernel_size: of the primary capsules.
        primary_stride: of the primary capsules.
        share: see `MatrixClassCapsules`.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    types = options.capsule_types
    if not types:
        raise InputError("capsule_types must be one number or more; got none")
    for name in ("capsule_kernel_sizes", "capsule_strides"):
        if (count := len(getattr(options, name))) != len(types) - 1:
            raise InputError(
                f"{name} must be one for each of the capsule_types after the first, {len(types) - 1}; got {count}"
            )
    stride = options.conv_stride or 2 * max(1, min(image_shape[1:]) // SIDE_OF_IMAGE)
    conv = Convolution(
        image_shape[0],
        options.conv_channels,
        options.conv_kernel_size,
        stride,
        in_size=image_shape[1:],
        padding=options.padding,
        name="first convolution",
        bias=not normalize,
    )
    stem = nn.Sequential(conv, *([BatchNorm(options.conv_channels)] if normalize else []), nn.ReLU())
    primary = MatrixPrimary(
        options.conv_channels,
        types[0],
        kernel_size=primary_kernel_size,
        stride=primary_stride,
        in_size=conv.out_size,
        offset=0.0 if normalize else 1.0,
        normalize=normalize,
    )
    size, capsules = primary.out_size, nn.Sequential()
    sizes = zip(pairwise(types), options.capsule_kernel_sizes, options.capsule_strides, strict=True)
    for k, ((ins, outs), kernel, step) in enumerate(sizes, 1):
        name = f"convolutional capsules {k} of {len(types) - 1}"
        layer = ConvCapsules(
            ins, outs, kernel, step, in_size=size, routing=routing, slices=options.routing_slices, name=name
        )
        capsules.extend([layer, *([CapsuleNorm(outs)] if normalize else [])])
        size = layer.out_size
    rows, columns = (
        _two(
            [(n + 1) / (10 * places) for n in range(places)]
            if normalize
            else _centres([*stem, primary.pose, *capsules], axis)
        )
        for axis, places in enumerate(size)
    )
    class_capsules = MatrixClassCapsules(
        types[-1],
        num_classes,
        in_size=size,
        routing=class_routing,
        share=share,
        rows=rows,
        columns=columns,
        slices=options.routing_slices,
    )
    decoder = None
    if options.reconstruction:
        drawn = None if options.share_decoder else num_classes
        decoder = Decoder(drawn, SIDE**2, image_shape, options.decoder_sizes)
    return Layers(stem, primary, capsules, class_capsules, CapsuleNorm(num_classes) if normalize else None, decoder)


def _receptive_fields(layers: list[nn.Module], axis: int) -> Float[Tensor, "places pixels"]:
    """Shares of pixels in the places of the last of `layers`, by paths: rows (0) or columns (1)."""
    paths: Tensor | None = None
    for layer in reversed(layers):
        if isinstance(layer, Convolution | ConvCapsules):
            windows = layer.windows(axis)
            paths = windows if paths is None else paths @ windows
    assert paths is not None
    return paths / paths.sum(1, keepdim=True)


def _centres(layers: list[nn.Module], axis: int) -> list[float]:
    """Centres of the receptive fields as shares of the image: 0 at its first edge and 1 at its last."""
    with torch.device("cpu"):
        shares = _receptive_fields(layers, axis).double()
        shares = shares / shares.sum(1, keepdim=True)
        pixels = torch.arange(shares.shape[1], dtype=torch.float64) + 0.5
        centres: list[float] = (shares @ pixels / shares.shape[1]).tolist()
    return centres


def _two(values: list[float]) -> tuple[float, float]:
    """The first two of equally spaced values; of one, it twice."""
    return values[0], values[min(1, len(values) - 1)]


def _truncated_normal(tensor: Tensor, std: float) -> None:
    """Normal, cut off at two standard deviations, as TensorFlow's `truncated_normal`."""
    if not tensor.is_meta:  # where it changes nothing
        nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
