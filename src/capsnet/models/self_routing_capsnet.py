"""SR-CapsNet of Hahn, Pyeon, Kim, "Self-Routing Capsule Networks" (NeurIPS 2019), on a residual network.

Sizes and starting values are those of the authors' code (https://github.com/coder3000/SR-CapsNet).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.layers import BatchNorm
from capsnet.models.network import CapsuleNetwork, Output, RoutingTrace, feature_map, parts_of_image, pooled
from capsnet.models.resnet import convolution, residual_stages
from capsnet.options import LossOptions
from capsnet.options.schema import AT_LEAST_1
from capsnet.routing import RoutingResult, self_routing, uniform_routing

__all__ = ["ClassGates", "Options", "SelfRoutingCapsNet", "build"]


@dataclass(frozen=True)
class Options:
    """Options of SR-CapsNet."""

    blocks: Annotated[int, AT_LEAST_1] = 3
    """Number of blocks of each of the three residual stages; the paper has ResNet-20."""
    grid: Annotated[int, AT_LEAST_1] = 8
    """Most rows and columns of capsules; a larger feature map is averaged down to them."""
    capsule_types: Annotated[int, AT_LEAST_1] = 32
    """Number of capsules at each place of the grid."""
    primary_dim: Annotated[int, AT_LEAST_1] = 16
    """Dimension of a primary capsule."""
    standardize: bool = False
    """Give each input image mean 0 and standard deviation 1."""


class PrimaryCapsules(nn.Module):
    """Poses and activations of a feature map, each by a 3x3 convolution and batch normalisation.

    The poses are not squashed; an activation is a sigmoid. Capsule `i = (y * columns + x) * types + type` has the
    channels `type * dim ... type * dim + dim - 1` of a place.

    Weights:
        weights as `models.resnet.convolution` starts them; batch normalisations 1 and 0.
    """

    def __init__(self, channels: int, *, types: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.activation, self.pose = convolution(channels, types, 3, 1), convolution(channels, types * dim, 3, 1)
        self.activation_norm, self.pose_norm = BatchNorm(types), BatchNorm(types * dim)

    def forward(
        self, x: Float[Tensor, "batch channels rows columns"]
    ) -> tuple[Float[Tensor, "batch in dim"], Float[Tensor, "batch in"]]:
        """Poses, and activations in [0, 1], in float32."""
        pose = F.at_least_float32(self.pose_norm(self.pose(x))).permute(0, 2, 3, 1)
        activation = F.at_least_float32(self.activation_norm(self.activation(x))).permute(0, 2, 3, 1)
        return pose.reshape(x.shape[0], -1, self.dim), activation.flatten(1).sigmoid()


class ClassGates(nn.Module):
    """One capsule a class with an activation only, by self-routing: each capsule below has a gate of its own.

    Args:
        in_capsules: number of capsules below.
        in_dim: length of their vectors.
        out_capsules: number of classes.

    Weights:
        weight `G [in_capsules, in_dim, out_capsules]`, bias `g [in_capsules, out_capsules]`; both 0, so that all
        classes start alike.
    """

    def __init__(self, in_capsules: int, in_dim: int, out_capsules: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_capsules, in_dim, out_capsules))
        self.bias = nn.Parameter(torch.zeros(in_capsules, out_capsules))

    def forward(self, u: Float[Tensor, "batch in in_dim"], activation: Float[Tensor, "batch in"]) -> RoutingResult:
        """Route poses and activations; in float32 or better whatever the precision around it."""
        with F.full_precision(u.device):
            u = F.at_least_float32(u)
            logits = torch.einsum("bip,ipj->bij", u, self.weight.to(u.dtype)) + self.bias.to(u.dtype)
            return self_routing(None, activation, logits)


class SelfRoutingCapsNet(CapsuleNetwork):
    """Residual stages, primary capsules with poses and activations, and the gates of the classes."""

    narrower = "fewer --capsule-types, or a smaller --grid"
    routing_iterations = 2

    def __init__(
        self,
        backbone: nn.Module,
        pool: nn.Module,
        primary: PrimaryCapsules,
        class_capsules: ClassGates,
        image_shape: tuple[int, int, int],
        *,
        out_size: tuple[int, int],
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.standardize, self.out_size = image_shape, standardize, out_size
        self.backbone, self.pool, self.primary, self.class_capsules = backbone, pool, primary, class_capsules

    def capsules(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch in dim"], Float[Tensor, "batch in"]]:
        """Poses and activations of the primary capsules."""
        pose, activation = self.primary(self.pool(self.backbone(self.standardized(images))))
        return pose, activation

    def route(self, images: Float[Tensor, "batch channels height width"]) -> RoutingResult:
        """The class capsules, whose vectors are their activations."""
        routed: RoutingResult = self.class_capsules(*self.capsules(images))
        return routed

    @property
    def in_capsules(self) -> int:
        """Number of primary capsules."""
        return len(self.class_capsules.weight)

    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Activations of the primary capsules as they are shared out: by uniform couplings, and by the gates.

        A vote is a capsule's share of all activation, one number, and the same for each class.
        """
        self.check_images(images)
        pose, activation = self.capsules(images)
        routed = self.class_capsules(pose, activation)
        shares = activation / activation.sum(-1, keepdim=True)
        votes = shares[..., None, None].expand(*routed.couplings.shape, 1)
        return RoutingTrace.of(activation, votes, [uniform_routing(votes, squash=torch.positive), routed])

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The part of the image that a place of the grid stands for; the backbone may see all of it."""
        return parts_of_image(self.out_size, self.image_shape)

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """The negative logarithm of the activation of the true class, of several their sum: they are a distribution."""
        each = -output.scores.clamp(min=torch.finfo(output.scores.dtype).tiny).log()
        return each.gather(-1, labels.reshape(len(labels), -1)).sum(-1)


def build(image_shape: tuple[int, int, int], num_classes: int, options: Options) -> SelfRoutingCapsNet:
    """SR-CapsNet with new weights: 931,664 parameters for CIFAR-10.

    There is no decoder. The paper's recipe for CIFAR-10 is 350 epochs of stochastic gradient descent with a learning
    rate of 0.1 that falls to a tenth after 150 and 250, momentum 0.9, weight decay 1e-4 and 64 images at a time.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes.
    """
    backbone = residual_stages(image_shape, depths=(options.blocks,) * 3)
    channels, rows, columns = feature_map(backbone, image_shape)
    pool, out_size = pooled((rows, columns), options.grid)
    primary = PrimaryCapsules(channels, types=options.capsule_types, dim=options.primary_dim)
    in_capsules = options.capsule_types * math.prod(out_size)
    return SelfRoutingCapsNet(
        backbone,
        pool,
        primary,
        ClassGates(in_capsules, options.primary_dim, num_classes),
        image_shape,
        out_size=out_size,
        standardize=options.standardize,
    )
