"""SR-CapsNet of Hahn, Pyeon, Kim, "Self-Routing Capsule Networks" (NeurIPS 2019), on a residual network.

Sizes and starting values are those of the authors' code (https://github.com/coder3000/SR-CapsNet).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.layers import BatchNorm
from capsnet.matrix_capsules import in_slices, patches
from capsnet.models.network import CapsuleNetwork, Output, RoutingTrace, feature_map, parts_of_image, pooled
from capsnet.models.resnet import convolution, residual_stages
from capsnet.options import LossOptions
from capsnet.options.schema import AT_LEAST_1
from capsnet.routing import RoutingResult, self_routing, uniform_routing

__all__ = ["PRESETS", "ClassGates", "ConvCapsules", "Options", "SelfRoutingCapsNet", "build"]

KERNEL_SIZE = 3
"""Rows and columns of the window of a convolutional capsule; a border of one place of zeros is around the grid."""
PRESETS: dict[str, dict[str, Any]] = {
    "authors": {
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "steps",
        "lr_milestones": (150 / 350, 250 / 350),
        "lr_decay": 0.1,
        "lr_decay_steps": 0,
        "margin_scale": 1.0,  # these two not as of capsnet
    }
}
"""`authors`: the authors' recipe for CIFAR-10, with momentum 0.9, which is the default; its 350 epochs are given as
`--epochs 350`. For SVHN and smallNORB they have 200 epochs, and the rate falls after 100 and 150: `--lr-milestones 0.5
0.75`. Of their code for new viewpoints of smallNORB one thing is left out: it chooses the epoch on the images that it
then tests; here validation images choose, or nothing does.
"""


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
    """Dimension of a primary capsule, and of a convolutional one."""
    routing_layers: Annotated[int, AT_LEAST_1] = 1
    """Number of layers of routed capsules, the depth of the paper: 1 is the classes alone. Below them are convolutional
    capsules of 3x3 places, the first with stride 2, as many types as primary ones."""
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


class ConvCapsules(nn.Module):
    """Convolutional capsules by self-routing, as many types at each place as below; batch normalisation of the poses.

    A window that reaches over the border of the grid sees capsules there whose activation is 0, which send nothing.

    Args:
        types: number of capsules at each place.
        dim: length of their vectors.
        in_size: rows and columns of the grid below.
        stride: between windows.

    Weights:
        weight `W [9 * types, dim, types, dim]`, uniform as the authors' code starts it, of each sign up to
        `sqrt(6 / (types * dim * dim))`; gates `G [9 * types, dim, types]` and `g [9 * types, types]`, both 0, as in
        `ClassGates`; norm weight and bias `[types * dim]`, 1 and 0.
    """

    def __init__(self, *, types: int, dim: int, in_size: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.types, self.dim, self.in_size, self.stride = types, dim, in_size, stride
        self.out_size = (-(-in_size[0] // stride), -(-in_size[1] // stride))
        seen, bound = KERNEL_SIZE**2 * types, math.sqrt(6 / (types * dim * dim))
        self.weight = nn.Parameter(torch.empty(seen, dim, types, dim).uniform_(-bound, bound))
        self.gates = ClassGates(seen, dim, types)
        self.norm = BatchNorm(types * dim)

    def forward(
        self, u: Float[Tensor, "batch in dim"], activation: Float[Tensor, "batch in"]
    ) -> tuple[Float[Tensor, "batch out dim"], Float[Tensor, "batch out"]]:
        """Poses and activations, which sum to 1 at each place, in the order of those below.

        The votes are never all in memory, see `matrix_capsules.in_slices`.
        """
        gates, places = self.gates, math.prod(self.out_size)
        pose, activation = in_slices(
            self._routed,
            (u, activation),
            (self.weight, gates.weight, gates.bias),
            votes=places * self.weight.numel() // self.dim,
        )
        maps: Tensor = self.norm(pose.flatten(-2).permute(0, 3, 1, 2))
        return maps.permute(0, 2, 3, 1).reshape(u.shape[0], -1, self.dim), activation.flatten(1)

    def _routed(
        self, u: Tensor, activation: Tensor, weight: Tensor, gate: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Poses `[batch, rows, columns, types, dim]` and activations, with all votes."""
        border = (0, 0, 1, 1, 1, 1)
        seen = nn.functional.pad(u.reshape(u.shape[0], *self.in_size, self.types, self.dim), (0, 0, *border))
        active = nn.functional.pad(activation.reshape(u.shape[0], *self.in_size, self.types), border)
        seen, active = (patches(x, kernel_size=KERNEL_SIZE, stride=self.stride).flatten(3, 4) for x in (seen, active))
        logits = torch.einsum("...ip,ipj->...ij", seen, gate) + bias
        pose, activation, _ = self_routing(F.votes(seen, weight), active, logits)
        return pose, activation


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
    """Residual stages, primary capsules, convolutional ones if there are any, and the gates of the classes."""

    narrower = "fewer --capsule-types, or a smaller --grid"
    routing_iterations = 2
    routing_steps = ("uniform", "self-routing")

    def __init__(
        self,
        backbone: nn.Module,
        pool: nn.Module,
        primary: PrimaryCapsules,
        capsule_layers: nn.ModuleList,
        class_capsules: ClassGates,
        image_shape: tuple[int, int, int],
        *,
        out_size: tuple[int, int],
        standardize: bool,
    ) -> None:
        super().__init__()
        self.image_shape, self.standardize, self.out_size = image_shape, standardize, out_size
        self.backbone, self.pool, self.primary = backbone, pool, primary
        self.capsule_layers, self.class_capsules = capsule_layers, class_capsules

    def capsules(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch in dim"], Float[Tensor, "batch in"]]:
        """Poses and activations of the capsules below the classes."""
        pose, activation = self.primary(self.pool(self.backbone(self.standardized(images))))
        for layer in self.capsule_layers:
            pose, activation = layer(pose, activation)
        return pose, activation

    def route(self, images: Float[Tensor, "batch channels height width"]) -> RoutingResult:
        """The class capsules, whose vectors are their activations."""
        routed: RoutingResult = self.class_capsules(*self.capsules(images))
        return routed

    @property
    def in_capsules(self) -> int:
        """Number of capsules below the classes."""
        return len(self.class_capsules.weight)

    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Activations of the capsules below the classes as they are shared out: by uniform couplings, by the gates.

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
    """SR-CapsNet with new weights: 931,664 parameters for CIFAR-10, 3,187,536 with two routing layers.

    There is no decoder.

    Args:
        image_shape: channels, height and width.
        num_classes: number of class capsules.
        options: sizes.
    """
    backbone = residual_stages(image_shape, depths=(options.blocks,) * 3)
    channels, rows, columns = feature_map(backbone, image_shape)
    pool, out_size = pooled((rows, columns), options.grid)
    primary = PrimaryCapsules(channels, types=options.capsule_types, dim=options.primary_dim)
    layers = nn.ModuleList()
    for k in range(options.routing_layers - 1):
        layer = ConvCapsules(
            types=options.capsule_types, dim=options.primary_dim, in_size=out_size, stride=2 if k == 0 else 1
        )
        layers.append(layer)
        out_size = layer.out_size
    in_capsules = options.capsule_types * math.prod(out_size)
    return SelfRoutingCapsNet(
        backbone,
        pool,
        primary,
        layers,
        ClassGates(in_capsules, options.primary_dim, num_classes),
        image_shape,
        out_size=out_size,
        standardize=options.standardize,
    )
