"""Capsules with inverted dot-product attention (Tsai, Srivastava, Goh, Salakhutdinov, ICLR 2020, arXiv 2002.04764).

Sizes and starting values are those of the authors' code for CIFAR-10
(https://github.com/apple/ml-capsules-inverted-attention-routing), but for its windows, which mix places with the
components of poses.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.matrix_capsules import in_slices, patches
from capsnet.models.network import CapsuleNetwork, Logits, Output, RoutingTrace, feature_map, parts_of_image, pooled
from capsnet.models.resnet import residual_stages
from capsnet.options.schema import AT_LEAST_1, SIZES, Range
from capsnet.routing import MOST_ITERATIONS, RoutingResult, inverted_attention_step

__all__ = ["PRESETS", "CapsuleLayer", "InvertedCapsNet", "Options", "PrimaryCapsules", "build"]

PRESETS: dict[str, dict[str, Any]] = {
    "authors": {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "steps",
        "lr_milestones": (150 / 350, 250 / 350),
        "lr_decay": 0.1,
        "lr_decay_steps": 0,
        "margin_scale": 1.0,  # these two not as of capsnet
    }
}
"""`authors`: the authors' recipe for CIFAR-10, with momentum 0.9 and batches of 128, which are the defaults; its epochs
and augmentation are given as `--epochs 350 --shift 4 --flip`. Two things of their code are left out: its windows (see
above), and the choice of the epoch with the lowest error on the test images. It also normalises each channel by its
mean and deviation over the training images, for which there is no option.
"""


@dataclass(frozen=True)
class Options:
    """Options of the network with inverted dot-product attention."""

    routing_iterations: Annotated[int, Range(1, MOST_ITERATIONS)] = 2
    """Number of routing iterations; 1 means uniform couplings."""
    routing_order: Literal["concurrent", "sequential"] = "concurrent"
    """Which layers an iteration is of. concurrent: all at once, after the first, each from the poses before it.
    sequential: of one layer, which ends before the next begins."""
    grid: Annotated[int, AT_LEAST_1] = 16
    """Most rows and columns of primary capsules; a larger feature map is averaged down to them."""
    capsule_types: Annotated[int, AT_LEAST_1] = 32
    """Number of capsules at each place of a grid."""
    pose_side: Annotated[int, Range(2, words="at least 2")] = 4
    """Rows and columns of a pose."""
    capsule_kernel_sizes: Annotated[tuple[int, ...], SIZES] = (3, 3)
    """Kernel size of each convolutional capsule layer, in places."""
    capsule_strides: Annotated[tuple[int, ...], SIZES] = (2, 1)
    """Stride of each convolutional capsule layer, in places."""
    backbone_channels: Annotated[tuple[int, ...], SIZES] = (64, 128)
    """Number of channels of each residual stage."""
    backbone_blocks: Annotated[tuple[int, ...], SIZES] = (3, 4)
    """Number of blocks of each residual stage."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


class PrimaryCapsules(nn.Module):
    """Poses of a feature map: a 1x1 convolution without bias, and layer normalisation of each pose.

    Weights:
        conv weight `[types * dim, channels, 1, 1]` as torch.nn.Conv2d starts it; norm weight and bias `[dim]`, 1 and 0.
    """

    def __init__(self, channels: int, *, types: int, dim: int) -> None:
        super().__init__()
        self.types, self.dim = types, dim
        self.conv = nn.Conv2d(channels, types * dim, 1, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch rows columns types dim"]:
        """Poses at each place, in float32."""
        with F.full_precision(x.device):
            made = self.conv(F.at_least_float32(x)).permute(0, 2, 3, 1)
            pose: Tensor = self.norm(made.reshape(*made.shape[:-1], self.types, self.dim))
            return pose


class CapsuleLayer(nn.Module):
    """Capsules whose poses are matrices, routed by inverted attention: the types of one place compete.

    Args:
        in_capsules: number of capsules that each place sees.
        out_capsules: types of capsules at a place, or classes.
        side: rows and columns of a pose.

    Weights:
        weight `W [in_capsules, side, out_capsules, side]`, which all places share, normal with a standard deviation of
        `sqrt(out_capsules / (side * in_capsules))`; scale and offset of the layer normalisation `[side^2]`, 1 and 0.
    """

    def __init__(self, in_capsules: int, out_capsules: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_capsules, side, out_capsules, side))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=math.sqrt(out_capsules / (side * in_capsules)))
        self.norm = nn.LayerNorm(side * side)

    def forward(
        self, u: Float[Tensor, "*batch in dim"], pose: Float[Tensor, "*batch out dim"] | None = None
    ) -> RoutingResult:
        """One iteration, in float32 or better: from the poses below, and after the first from the layer's own.

        The votes are never all in memory: the first iteration is a product of matrices, and the others are computed for
        a few places at a time, see `matrix_capsules.in_slices`.
        """
        with F.full_precision(u.device):
            u = F.at_least_float32(u)
            weight, scale, offset = (x.to(u.dtype) for x in (self.weight, self.norm.weight, self.norm.bias))
            if pose is None:
                ins, side, outs, _ = weight.shape
                rows = u.reshape(*u.shape[:-1], side, side).transpose(-3, -2).flatten(-2)  # [..., side, in * side]
                s = rows @ weight.reshape(ins * side, outs * side) / outs
                s = s.reshape(*s.shape[:-1], outs, side).transpose(-3, -2).flatten(-2)  # [..., out, side * side]
                v = nn.functional.layer_norm(s, s.shape[-1:], scale, offset)
                c = u.new_full((), 1 / outs).expand(*u.shape[:-1], outs)
                return RoutingResult(v, torch.ones_like(v[..., 0]), c)
            leading = u.shape[:-2]
            inputs = tuple(x.reshape(-1, *x.shape[-2:]) for x in (u, pose))
            found = in_slices(self._again, inputs, (weight, scale, offset), slices="small")
            return RoutingResult(*(each.reshape(*leading, *each.shape[1:]) for each in found))

    @staticmethod
    def _again(u: Tensor, pose: Tensor, weight: Tensor, scale: Tensor, offset: Tensor) -> RoutingResult:
        """An iteration after the first, with all its votes."""
        return inverted_attention_step(F.matrix_votes(u, weight), pose, scale=scale, offset=offset)


class InvertedCapsNet(Logits, CapsuleNetwork):
    """Residual stages, primary capsules, convolutional capsule layers, class capsules, and one score for each class."""

    narrower = "fewer --capsule-types, or a smaller --grid"

    def __init__(
        self,
        backbone: nn.Module,
        pool: nn.Module,
        primary: PrimaryCapsules,
        capsule_layers: nn.ModuleList,
        class_capsules: CapsuleLayer,
        image_shape: tuple[int, int, int],
        *,
        windows: tuple[tuple[int, int], ...],
        out_size: tuple[int, int],
        iterations: int,
        concurrent: bool,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.standardize, self.out_size, self.windows = image_shape, standardize, out_size, windows
        self.routing_iterations, self.concurrent = iterations, concurrent
        self.backbone, self.pool, self.primary = backbone, pool, primary
        self.capsule_layers, self.class_capsules = capsule_layers, class_capsules
        self.score = nn.Linear(primary.dim, 1)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch *objects"] | None = None
    ) -> Output:
        """Logits of `images`, intensities in [0, 1]; `labels` are not needed.

        Raises:
            InputError: images of another shape than the network was built for.
        """
        self.check_images(images)
        routed = self.route(images)
        with F.full_precision(images.device):
            return Output(self.score(routed.pose)[..., 0], None, routed.pose, routed.couplings)

    def route(self, images: Float[Tensor, "batch channels height width"]) -> RoutingResult:
        """The class capsules; their activation is 1, as they have none."""
        return self.iterations(images)[-1][1]

    def iterations(self, images: Float[Tensor, "batch channels height width"]) -> list[tuple[Tensor, RoutingResult]]:
        """After each iteration of the class capsules: the poses below them that it saw, and its result."""
        primary: Tensor = self.primary(self.pool(self.backbone(self.standardized(images))))
        layers: list[CapsuleLayer] = [*self.capsule_layers, self.class_capsules]
        if not self.concurrent:
            below = primary
            for k, layer in enumerate(layers):
                seen, found = self._seen(k, below), list[tuple[Tensor, RoutingResult]]()
                for _ in range(self.routing_iterations):
                    result = layer(seen, found[-1][1].pose if found else None)
                    found.append((seen, result))
                below = found[-1][1].pose
            return found
        poses, found = [primary], list[tuple[Tensor, RoutingResult]]()
        for k, layer in enumerate(layers):  # the first iteration, from bottom to top
            seen = self._seen(k, poses[k])
            result = layer(seen)
            poses.append(result.pose)
        found.append((seen, result))
        for _ in range(self.routing_iterations - 1):
            before, poses = poses, [primary]
            for k, layer in enumerate(layers):  # all at once: from the poses before, below and of the layer itself
                seen = self._seen(k, before[k])
                result = layer(seen, before[k + 1])
                poses.append(result.pose)
            found.append((seen, result))
        return found

    def _seen(self, k: int, grid: Tensor) -> Tensor:
        """The capsules of a grid that each place of layer `k` sees; the class capsules see all of them."""
        if k == len(self.windows):
            return grid.flatten(1, 3)
        kernel_size, stride = self.windows[k]
        return patches(grid, kernel_size=kernel_size, stride=stride).flatten(3, 4)

    @property
    def in_capsules(self) -> int:
        """Number of capsules below the class capsules."""
        return len(self.class_capsules.weight)

    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Couplings and poses of the class capsules at each iteration, and the votes of the last one.

        The capsules have no activations, so all are 1.
        """
        self.check_images(images)
        found = self.iterations(images)
        votes = F.matrix_votes(found[-1][0], self.class_capsules.weight)
        return RoutingTrace.of(torch.ones_like(votes[:, :, 0, 0]), votes, [result for _, result in found])

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The part of the image that a place of the grid stands for; the backbone may see all of it."""
        return parts_of_image(self.out_size, self.image_shape)


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> InvertedCapsNet:
    """The network with new weights: 1,828,817 parameters for CIFAR-10.

    There is no decoder.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes.

    Raises:
        InputError: an image too small for the kernels, or options that exclude each other.
    """
    windows = tuple(zip(options.capsule_kernel_sizes, options.capsule_strides, strict=False))
    for name, other in (("capsule_strides", "capsule_kernel_sizes"), ("backbone_blocks", "backbone_channels")):
        wanted, got = (len(getattr(options, each)) for each in (other, name))
        if wanted != got:
            raise InputError(f"{name} must be one for each of the {wanted} {other}; got {got}")
    if not options.backbone_channels:
        raise InputError("backbone_channels must be one number or more; got none")
    backbone = residual_stages(image_shape, options.backbone_channels, options.backbone_blocks, shortcut="projection")
    channels, *map_size = feature_map(backbone, image_shape)
    pool, size = pooled((map_size[0], map_size[1]), options.grid)
    types, side = options.capsule_types, options.pose_side
    layers = nn.ModuleList()
    for k, (kernel, stride) in enumerate(windows, 1):
        if min(size) < kernel:
            raise InputError(
                f"capsule_kernel_sizes must be at most the {size[0]}x{size[1]} places below layer {k}; got {kernel} "
                "(use larger images, or smaller or fewer kernels)"
            )
        layers.append(CapsuleLayer(kernel * kernel * types, types, side))
        size = ((size[0] - kernel) // stride + 1, (size[1] - kernel) // stride + 1)
    return InvertedCapsNet(
        backbone,
        pool,
        PrimaryCapsules(channels, types=types, dim=side * side),
        layers,
        CapsuleLayer(math.prod(size) * types, num_classes, side),
        image_shape,
        windows=windows,
        out_size=size,
        iterations=options.routing_iterations,
        concurrent=options.routing_order == "concurrent",
        standardize=options.standardize,
    )
