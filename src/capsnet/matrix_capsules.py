"""Layers of matrix capsules: poses of 4 x 4 numbers, and an activation of its own for each capsule.

Hinton, Sabour, Frosst, "Matrix capsules with EM routing", ICLR 2018 (https://openreview.net/forum?id=HJWLfGWRb). The
routing is an argument of the layers: a function of votes, activations, `beta_u` and `beta_a`, see `routing.em_routing`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels.autograd import first_derivatives
from capsnet.layers import BatchNorm, Convolution, windows
from capsnet.routing import RoutingResult, over_outputs, over_parents

__all__ = [
    "SIDE",
    "SLICES",
    "CapsuleNorm",
    "ConvCapsules",
    "MatrixCapsules",
    "MatrixClassCapsules",
    "MatrixPrimary",
    "Routing",
    "TypeNorm",
    "in_slices",
    "patches",
    "slices_on",
]

SIDE = 4
"""Rows and columns of a pose (Section 3)."""
SLICES = {"small": 2**21, "large": 2**26}
"""Numbers in the votes of as many examples as are routed at once: 8 MiB, which stay in a CPU's cache; or 256 MiB."""
Routing = Callable[..., RoutingResult]
"""`routing(votes, activation, beta_u, beta_a, log_couplings=...)`."""


class MatrixCapsules(NamedTuple):
    """A grid of capsules.

    Attributes:
        pose: `[batch, rows, columns, types, 16]`, row by row.
        activation: `[batch, rows, columns, types]`, in [0, 1].
    """

    pose: Tensor
    activation: Tensor


def patches(
    x: Float[Tensor, "batch rows columns *of_place"], *, kernel_size: int, stride: int
) -> Float[Tensor, "batch _ _ seen *of_place"]:
    """What each window of a grid sees, without padding.

    Args:
        x: something of each place of the grid.
        kernel_size: rows and columns of a window.
        stride: between windows.

    Returns:
        Of each window, of which there are rows and columns, its places, row by row.

    Examples:
        >>> patches(torch.zeros(2, 5, 7, 8, 16), kernel_size=3, stride=2).shape
        torch.Size([2, 2, 3, 9, 8, 16])
    """
    seen = x.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)  # [batch, rows, columns, ..., k, k]
    return seen.movedim((-2, -1), (3, 4)).flatten(3, 4)


class MatrixPrimary(nn.Module):
    """The first capsules: two convolutions without bias, of poses and of activations `sigmoid(... - offset)`.

    Args:
        in_channels: channels of the input.
        types: kinds of capsules.
        kernel_size: of both convolutions (paper: 1).
        stride: of both convolutions.
        in_size: height and width of the input.
        offset: subtracted before the sigmoid (authors' code: 1).
        normalize: batch normalisation of both convolutions, of the poses one for each type (VB routing).

    Weights:
        pose weight `[kernel_size, kernel_size, in_channels, types * 16]`; activation weight `[..., types]`; with
        `normalize` weight and bias of `types` numbers for each.

    Raises:
        InputError: the input is smaller than the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        types: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        in_size: tuple[int, int],
        offset: float = 0.0,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        about: dict[str, Any] = {"in_size": in_size, "padding": "valid", "name": "primary capsules", "bias": False}
        self.pose = Convolution(in_channels, types * SIDE**2, kernel_size, stride, **about)
        self.activation = Convolution(in_channels, types, kernel_size, stride, **about)
        self.types, self.offset, self.out_size = types, offset, self.pose.out_size
        self.pose_norm, self.activation_norm = (TypeNorm(types, affine=True) if normalize else None for _ in range(2))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> MatrixCapsules:
        """Poses and activations, in float32 or better."""
        pose, logit = (F.at_least_float32(conv(x)).permute(0, 2, 3, 1) for conv in (self.pose, self.activation))
        with F.full_precision(x.device):
            pose = pose.reshape(*pose.shape[:3], self.types, SIDE**2)
            if self.pose_norm is not None and self.activation_norm is not None:
                pose, logit = self.pose_norm(pose), self.activation_norm(logit[..., None]).squeeze(-1)
            return MatrixCapsules(pose, (logit - self.offset).sigmoid())


class TypeNorm(BatchNorm):
    """Batch normalisation of each type of capsules, over images, places and dimensions."""

    def forward(self, x: Float[Tensor, "batch *places types dim"]) -> Float[Tensor, "batch *places types dim"]:
        """`x`, normalised."""
        return super().forward(x.reshape(-1, *x.shape[-2:], 1)).reshape(x.shape)


class CapsuleNorm(nn.Module):
    """Capsules after VB routing: poses and logits of activations, each normalised without weights; then the sigmoid.

    Args:
        types: kinds of capsules.
    """

    def __init__(self, types: int) -> None:
        super().__init__()
        self.pose_norm, self.activation_norm = (TypeNorm(types, affine=False) for _ in range(2))

    def forward(self, routed: MatrixCapsules) -> MatrixCapsules:
        """The capsules, of which `routed.activation` is any number, of a grid or of classes."""
        with F.full_precision(routed.pose.device):
            logit = self.activation_norm(routed.activation[..., None]).squeeze(-1)
            return MatrixCapsules(self.pose_norm(routed.pose), logit.sigmoid())


class ConvCapsules(nn.Module):
    """Convolutional capsules: each place of the output is routed to by what its window sees.

    A window's capsules share their couplings over all parents that see them, of all types and at all places. All
    places share their transformations.

    Args:
        in_types: kinds of capsules below.
        out_types: kinds of capsules.
        kernel_size: rows and columns of a window (paper: 3).
        stride: between windows (paper: 2, then 1).
        in_size: rows and columns of the grid below.
        routing: see `Routing`.
        slices: a name of `SLICES`, see there; or `auto`, small on a CPU and large elsewhere.
        name: the layer's name in errors.

    Weights:
        weight `W [kernel_size^2 * in_types, 4, out_types, 4]`, standard normal; beta_u and beta_a `[out_types]`, 0.

    Raises:
        InputError: the grid is smaller than a window.
    """

    def __init__(
        self,
        in_types: int,
        out_types: int,
        kernel_size: int,
        stride: int,
        *,
        in_size: tuple[int, int],
        routing: Routing,
        slices: str = "auto",
        name: str = "convolutional capsules",
    ) -> None:
        super().__init__()
        if min(in_size) < kernel_size:
            shape = f"{kernel_size}x{kernel_size}"
            raise InputError(
                f"{name}: windows of {shape} need a grid of at least {shape} capsules; got {in_size[0]}x{in_size[1]} "
                "(use larger images or smaller kernels and strides)"
            )
        self.kernel_size, self.stride, self.in_size, self.routing, self.slices = (
            kernel_size,
            stride,
            in_size,
            routing,
            slices,
        )
        rows, columns = ((size - kernel_size) // stride + 1 for size in in_size)
        self.out_size, self.in_types = (rows, columns), in_types
        self.weight = nn.Parameter(_normal(kernel_size**2 * in_types, SIDE, out_types, SIDE))
        self.beta_u, self.beta_a = (nn.Parameter(torch.zeros(out_types)) for _ in range(2))

    def forward(self, below: MatrixCapsules) -> MatrixCapsules:
        """The capsules of the output grid; activations are what the routing gives."""
        window: dict[str, int] = {"kernel_size": self.kernel_size, "stride": self.stride}
        about: dict[str, Any] = {"types": self.in_types, "in_size": self.in_size, **window}
        couplings = partial(over_parents, **about)

        def routed(pose: Tensor, activation: Tensor, weight: Tensor, *betas: Tensor) -> tuple[Tensor, Tensor]:
            seen, active = (patches(x, **window).flatten(1, 2).flatten(2, 3) for x in (pose, activation))
            found = self.routing(F.matrix_votes(seen, weight), active, *betas, log_couplings=couplings)
            return found.pose, found.activation

        parameters, votes = (self.weight, self.beta_u, self.beta_a), math.prod(self.out_size) * self.weight.numel()
        pose, activation = in_slices(routed, below, parameters, votes=votes, slices=self.slices)
        places = (pose.shape[0], *self.out_size)
        return MatrixCapsules(pose.reshape(*places, *pose.shape[2:]), activation.reshape(*places, -1))

    def windows(self, axis: int) -> Float[Tensor, "out in"]:
        """1 where a row (0) or column (1) of the grid below is in the window of one of the output, else 0."""
        sizes = self.out_size[axis], self.in_size[axis]
        return windows(*sizes, kernel_size=self.kernel_size, stride=self.stride)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        outs = self.weight.shape[2]
        return f"{self.in_types} -> {outs}, kernel_size={self.kernel_size}, stride={self.stride}"


class MatrixClassCapsules(nn.Module):
    """One capsule a class, routed to by all capsules of a grid.

    Args:
        in_types: kinds of capsules below.
        classes: number of capsules.
        in_size: rows and columns of the grid below.
        routing: see `Routing`.
        share: all places share the transformations of a type, and the place of a capsule is added to its vote,
            see `functional.add_coordinates`; else each capsule has its own.
        rows: the coordinates of the first two rows of the grid, of which the others follow; None adds none.
        columns: the same of its columns.
        slices: see `ConvCapsules`.

    Weights:
        weight `W [in_types, 4, classes, 4]`, or `[rows * columns * in_types, ...]`, standard normal; beta_u and beta_a
        `[classes]`, 0.
    """

    def __init__(
        self,
        in_types: int,
        classes: int,
        *,
        in_size: tuple[int, int],
        routing: Routing,
        share: bool = True,
        rows: tuple[float, float] = (0.0, 0.0),
        columns: tuple[float, float] = (0.0, 0.0),
        slices: str = "auto",
    ) -> None:
        super().__init__()
        self.in_types, self.in_size, self.routing, self.slices = in_types, in_size, routing, slices
        self.share, self.rows, self.columns = share, rows, columns
        transforms = in_types if share else math.prod(in_size) * in_types
        self.weight = nn.Parameter(_normal(transforms, SIDE, classes, SIDE))
        self.beta_u, self.beta_a = (nn.Parameter(torch.zeros(classes)) for _ in range(2))

    @property
    def in_capsules(self) -> int:
        """Number of capsules below."""
        return math.prod(self.in_size) * self.in_types

    def forward(self, below: MatrixCapsules) -> RoutingResult:
        """The class capsules; activations are what the routing gives."""

        def routed(pose: Tensor, activation: Tensor, weight: Tensor, *betas: Tensor) -> RoutingResult:
            return self.routing(self.votes(pose, weight), activation.flatten(1), *betas, log_couplings=over_outputs)

        parameters = self.weight, self.beta_u, self.beta_a
        votes = self.in_capsules // len(self.weight) * self.weight.numel()
        return RoutingResult(*in_slices(routed, below, parameters, votes=votes, slices=self.slices))

    def votes(
        self, pose: Float[Tensor, "batch rows columns types dim"], weight: Float[Tensor, "transforms side out side"]
    ) -> Float[Tensor, "batch in out dim"]:
        """The votes of all capsules of the grid, row by row, with their coordinates."""
        if not self.share:
            return F.matrix_votes(pose.flatten(1, 3), weight)
        votes = F.matrix_votes(pose, weight)
        places = (
            first + (second - first) * torch.arange(size, device=pose.device, dtype=votes.dtype)
            for (first, second), size in zip((self.rows, self.columns), self.in_size, strict=True)
        )
        return F.add_coordinates(votes, *places).flatten(1, 3)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.in_capsules} -> {self.weight.shape[2]}, share={self.share}"


def _normal(*shape: int) -> Tensor:
    """Standard normal numbers; on `meta` none are drawn, which would import the compiler."""
    tensor = torch.empty(shape)
    return tensor if tensor.is_meta else tensor.normal_()


def slices_on(device: torch.device, slices: str) -> str:
    """The name of `SLICES` that `slices`, one of them or `auto`, means on a device: small on a CPU, else large."""
    return ("small" if device.type in ("cpu", "meta") else "large") if slices == "auto" else slices


def in_slices(
    routed: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    *,
    votes: int | None = None,
    slices: str = "auto",
) -> tuple[Tensor, ...]:
    """`routed(*inputs, *parameters)` of a few examples at a time; for the gradient it is computed again.

    So what routing holds is that of a slice, not of the batch. Each example is routed alone, so the result is the same.

    Args:
        routed: of some examples; its results have a batch axis first.
        inputs: with a batch axis first.
        parameters: the first is the weight.
        votes: numbers in the votes of an example. Default: as many as in the weight.
        slices: a name of `SLICES`, or `auto`.
    """
    with F.full_precision(inputs[0].device):
        inputs = tuple(F.at_least_float32(x) for x in inputs)
        parameters = tuple(x.to(inputs[0].dtype) for x in parameters)
        batch = inputs[0].shape[0]
        if not F.is_ordinary(inputs[0]) or batch == 0:  # an export or a transform: any number of examples
            return tuple(routed(*inputs, *parameters))
        at_once = max(1, SLICES[slices_on(inputs[0].device, slices)] // (votes or parameters[0].numel()))
        parts = [
            _Recomputed.apply(routed, *part, *parameters)  # type: ignore[no-untyped-call]
            for part in zip(*(torch.split(x, at_once) for x in inputs), strict=True)
        ]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))


class _Recomputed(torch.autograd.Function):
    """`function(*tensors)`, computed again for the gradient: nothing of it is held in between.

    As `torch.utils.checkpoint`, of which the graphs without contents, in between the large arrays, keep the allocator
    of a CPU from using freed memory again: 5.4 GB in place of 1 at the large published size.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return tuple(function(*tensors))

    @staticmethod
    @first_derivatives("routing in slices", "a function of capsnet.routing", once=False)
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        tensors = [x.detach().requires_grad_(on) for x, on in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            results = ctx.function(*tensors)
        pairs = [pair for pair in zip(results, gradients, strict=True) if pair[0].requires_grad]  # not constant ones
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, [x for x in tensors if x.requires_grad], given))
        return (None, *(next(found) if on else None for on in wanted))
