"""A capsule head on any backbone: the feature map of a network becomes primary capsules, routed to the classes.

The layers are those of Sabour, Frosst, Hinton 2017 (arXiv 1710.09829, Section 4) behind another stem; the batch
normalisation before the squash of the primary capsules is ours.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.kernels.select import resolve_routing_kernel
from capsnet.layers import BatchNorm, ClassCapsules, Decoder
from capsnet.models import efficient_capsnet
from capsnet.models.network import VectorCapsuleNetwork, feature_map, parts_of_image, pooled
from capsnet.models.resnet import residual_stages
from capsnet.options.schema import AT_LEAST_1, SIZES, Range
from capsnet.routing import MOST_ITERATIONS

__all__ = ["CapsuleHead", "FeatureCapsules", "Options", "build"]


@dataclass(frozen=True)
class Options:
    """Options of the capsule head."""

    backbone: Literal["resnet20", "efficient-capsnet"] = "resnet20"
    """Network that makes the feature map. resnet20: the residual stages of He et al. 2016 for CIFAR-10.
    efficient-capsnet: the four convolutions of Mazzia et al. 2021."""
    grid: Annotated[int, AT_LEAST_1] = 8
    """Most rows and columns of capsules; a larger feature map is averaged down to them."""
    capsule_types: Annotated[int, AT_LEAST_1] = 16
    """Number of capsules at each place of the grid."""
    primary_dim: Annotated[int, AT_LEAST_1] = 8
    """Dimension of a primary capsule."""
    class_dim: Annotated[int, AT_LEAST_1] = 16
    """Dimension of a class capsule."""
    routing: Literal["dynamic", "attention", "uniform"] = "dynamic"
    """How the class capsules get their poses: by dynamic routing (Sabour et al. 2017); by self-attention with its
    squash (Mazzia et al. 2021); or with uniform couplings, the control."""
    routing_iterations: Annotated[int, Range(1, MOST_ITERATIONS)] = 3
    """Number of iterations of dynamic routing."""
    routing_kernel: Literal["auto", "plain", "fused"] = "auto"
    """How votes and routing are computed; the results are the same. auto: fused on a CPU, plain on a GPU."""
    share_transform: bool = False
    """Let the capsules of one type share their transformations over all places."""
    reconstruction: bool = False
    """Train a decoder and add its loss; it has three fully connected layers, made for small images."""
    decoder_sizes: Annotated[tuple[int, ...], SIZES] = (512, 1024)
    """Widths of the decoder's hidden layers."""
    share_decoder: bool = False
    """Let the decoder see the vector of one class capsule only, so that all classes share it (DeepCaps)."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


class FeatureCapsules(nn.Module):
    """Primary capsules of a feature map: a 1x1 convolution, batch normalisation, and the squash.

    Without the normalisation a deep map makes all capsules long, and routing then starts where squash has no gradient.
    Capsule `i = (y * columns + x) * types + type` has the channels `type * dim ... type * dim + dim - 1` of a place.

    Args:
        channels: of the feature map.
        types: number of capsules at each place.
        dim: length of a capsule's vector.
        map_size: rows and columns of the feature map.
        grid: most rows and columns of capsules, see `network.pooled`.
        exponential: squash by `functional.exponential_squash`, as self-attention routing does.

    Weights:
        conv weight `[types * dim, channels, 1, 1]` as torch.nn.Conv2d starts it; norm weight and bias `[types * dim]`,
        1 and 0.
    """

    def __init__(
        self, channels: int, *, types: int, dim: int, map_size: tuple[int, int], grid: int, exponential: bool = False
    ) -> None:
        super().__init__()
        self.types, self.dim, self.exponential = types, dim, exponential
        self.pool, self.out_size = pooled(map_size, grid)
        self.conv = nn.Conv2d(channels, types * dim, 1, bias=False)
        self.norm = BatchNorm(types * dim)

    @property
    def capsules(self) -> int:
        """Number of capsules: types times places."""
        return self.types * math.prod(self.out_size)

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch in dim"]:
        """Poses of the capsules of a feature map, each of length in [0, 1), in float32."""
        s = F.at_least_float32(self.norm(self.conv(self.pool(x))))
        s = s.permute(0, 2, 3, 1).reshape(x.shape[0], self.capsules, self.dim)
        return F.exponential_squash(s) if self.exponential else F.squash(s)


class CapsuleHead(VectorCapsuleNetwork):
    """A backbone, primary capsules of its feature map, class capsules, and a decoder if there is one."""

    primary: FeatureCapsules
    class_capsules: ClassCapsules | efficient_capsnet.ClassCapsules
    narrower = "fewer --capsule-types, or a smaller --grid"

    def __init__(
        self,
        backbone: nn.Module,
        primary: FeatureCapsules,
        class_capsules: ClassCapsules | efficient_capsnet.ClassCapsules,
        decoder: Decoder | None,
        image_shape: tuple[int, int, int],
        *,
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.standardize = image_shape, standardize
        self.backbone, self.primary, self.class_capsules, self.decoder = backbone, primary, class_capsules, decoder
        self.couplings_sum_to_one = isinstance(class_capsules, ClassCapsules)
        self.routing_iterations = class_capsules.iterations if isinstance(class_capsules, ClassCapsules) else 2

    def primary_poses(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch capsules dim"]:
        """Poses of the primary capsules."""
        u: Tensor = self.primary(self.backbone(self.standardized(images)))
        return u

    def kernels(self, device: torch.device, precision: str) -> dict[str, str]:
        """The kernel of the routing."""
        return {"routing_kernel": resolve_routing_kernel(self.class_capsules.routing_kernel, device)}

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the routing kernel is plain."""
        kernel, self.class_capsules.routing_kernel = self.class_capsules.routing_kernel, "plain"
        try:
            yield
        finally:
            self.class_capsules.routing_kernel = kernel

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The part of the image that a place of the grid stands for; the backbone may see all of it."""
        return parts_of_image(self.primary.out_size, self.image_shape)


def build(
    image_shape: tuple[int, int, int], num_classes: int, options: Options, *, backbone: nn.Module | None = None
) -> CapsuleHead:
    """A capsule head with new weights, on a backbone of this package or on `backbone`.

    With ResNet-20 for CIFAR-10: 269,072 parameters of the backbone, 8,448 of the primary capsules, and 1,310,720
    of the transformations, or 20,480 if they are shared over the places. The transformations of dynamic and uniform
    routing start normal with a standard deviation of `classes / sqrt(capsules * class_dim)`, by which the total inputs
    of the class capsules have a length of about 1 and their poses of about 1/2, and at most the 0.1 of the paper: with
    0.1 and few classes the poses would start at 1, where squash has no gradient.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes.
        backbone: any module that makes feature maps `[batch, channels, rows, columns]` of images; it is run on one
            image of zeros to see their size, and trained with the head.

    Raises:
        InputError: an image too small for the backbone, or a backbone that makes no feature maps of such images.
    """
    if backbone is None:
        if options.backbone == "resnet20":
            backbone = residual_stages(image_shape)
        else:
            backbone = efficient_capsnet.stem_of(image_shape, efficient_capsnet.StemOptions())[0]
    channels, *map_size = feature_map(backbone, image_shape)
    attention = options.routing == "attention"
    primary = FeatureCapsules(
        channels,
        types=options.capsule_types,
        dim=options.primary_dim,
        map_size=(map_size[0], map_size[1]),
        grid=options.grid,
        exponential=attention,
    )
    sizes = primary.capsules, options.primary_dim, num_classes, options.class_dim
    same: dict[str, Any] = {
        "types": options.capsule_types if options.share_transform else None,
        "routing_kernel": options.routing_kernel,
    }
    class_capsules: ClassCapsules | efficient_capsnet.ClassCapsules
    if attention:
        class_capsules = efficient_capsnet.ClassCapsules(*sizes, **same)
    else:
        iterations = 1 if options.routing == "uniform" else options.routing_iterations
        class_capsules = ClassCapsules(*sizes, iterations=iterations, **same)
        if not class_capsules.weight.is_meta:
            scale = num_classes / math.sqrt(primary.capsules * options.class_dim)
            nn.init.normal_(class_capsules.weight, std=min(0.1, scale))
    decoder = None
    if options.reconstruction:
        drawn = None if options.share_decoder else num_classes
        decoder = Decoder(drawn, options.class_dim, image_shape, options.decoder_sizes)
    return CapsuleHead(backbone, primary, class_capsules, decoder, image_shape, standardize=options.standardize)
