"""CapsNet of Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (NIPS 2017, arXiv 1710.09829), Section 4."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels.stem import minimal_stem
from capsnet.layers import ClassCapsules, Convolution, Decoder, PrimaryCapsules, resolve_kernel, resolve_stem
from capsnet.models.network import CapsuleNetwork, Output, RoutingTrace
from capsnet.routing import dynamic_routing

if TYPE_CHECKING:
    from capsnet.config import Config

__all__ = ["CapsNet", "capsnet"]


class CapsNet(CapsuleNetwork):
    """Convolution and ReLU, primary capsules, class capsules, and a decoder if there is one (Figures 1 and 2)."""

    narrower = "fewer --conv-channels and --capsule-types"

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
        self.leaky, self.routing_iterations = class_capsules.leaky, class_capsules.iterations

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
            index = longest if self.objects_per_image == 1 else routed.activation.topk(self.objects_per_image).indices
        return Output(routed.activation, self.decoder(routed.pose, index), routed.pose, routed.couplings)

    def primary_poses(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch capsules dim"]:
        """Poses of the primary capsules: both convolutions and the squash."""
        first, second = self.conv, self.primary.conv
        images = F.per_image_standardize(images) if self.standardize else images
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

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], config: "Config"
    ) -> Float[Tensor, "batch"]:
        """The margin loss (eq. 4), scaled by `config.margin_scale`."""
        present = self.multi_hot(labels).to(output.scores.dtype)
        loss = F.margin_loss(
            output.scores, present, m_pos=config.m_pos, m_neg=config.m_neg, down_weight=config.down_weight
        )
        return config.margin_scale * loss

    def kernels(self, device: torch.device, precision: str) -> dict[str, str]:
        """The routing kernel, and how the convolutions are computed."""
        return {
            "kernel": resolve_kernel(self.class_capsules.kernel, device),
            "stem": self.resolved_stem(torch.empty(0, device=device)) if precision == "32" else "direct",
        }

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the convolutions are direct and the routing kernel is plain."""
        stem, kernel = self.stem, self.class_capsules.kernel
        self.stem, self.class_capsules.kernel = "direct", "plain"
        try:
            yield
        finally:
            self.stem, self.class_capsules.kernel = stem, kernel

    @property
    def in_capsules(self) -> int:
        """Number of primary capsules."""
        return self.primary.capsules

    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Votes of the primary capsules, and dynamic routing after 1, 2, ... iterations.

        Iteration t of a longer routing is a routing of t iterations. About 1 MB of votes per image at the paper's size.
        """
        self.check_images(images)
        layer = self.class_capsules
        u = self.primary_poses(images).float()
        u_hat = F.votes(u, layer.weight)
        routed = [
            dynamic_routing(u_hat, iterations=t, bias=layer.bias, leaky=layer.leaky, epsilon=layer.epsilon)
            for t in range(1, layer.iterations + 1)
        ]
        couplings, pose = (torch.stack([getattr(each, name) for each in routed]) for name in ("couplings", "pose"))
        return RoutingTrace(F.lengths(u), u_hat, couplings, pose)

    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """The share of a pixel is the number of paths from it through both convolutions to the capsule.

        A pyramid that is highest in the middle of the receptive field.
        """
        rows, columns = (self.primary.conv.windows(axis) @ self.conv.windows(axis) for axis in (0, 1))
        return rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True)


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


def _start_as_authors(network: CapsNet) -> None:
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, 0.1)
        else:
            std = 0.05 if name == "conv.weight" else 0.1
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
