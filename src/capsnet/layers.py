"""Layers: modules that hold parameters and call the functions, whose arithmetic they do not repeat."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels import fused, native
from capsnet.kernels.select import is_small, resolve_routing_kernel, routing_kernel_for, sweeps_for
from capsnet.kernels.squash import biased_squash
from capsnet.routing import Normalization, RoutingResult, check_iterations, couplings_of, dynamic_routing

__all__ = ["BatchNorm", "ClassCapsules", "Convolution", "Decoder", "PrimaryCapsules", "each_capsule"]


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation, by the running statistics where a batch has but one value for each channel.

    Examples:
        >>> BatchNorm(3)(torch.rand(1, 3, 1, 1)).shape
        torch.Size([1, 3, 1, 1])
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x [batch, channels, rows, columns]`, normalised."""
        if self.training and x[:, 0].numel() == 1:
            assert self.running_mean is not None
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


def windows(
    outputs: int, inputs: int, *, kernel_size: int, stride: int, before: int = 0
) -> Float[Tensor, "outputs inputs"]:
    """1 where a place of the input is in the window of a place of the output, else 0, along one axis.

    `before` zeros stand before the first place of the input.
    """
    start, place = torch.arange(outputs)[:, None] * stride - before, torch.arange(inputs)
    return ((start <= place) & (place < start + kernel_size)).float()


class Convolution(nn.Module):
    """A square convolution for images of one size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel in pixels.
        stride: step in pixels.
        in_size: height and width of the input in pixels.
        padding: `valid` for none; `same` for an output of `ceil(in_size / stride)`, with zeros as evenly as can be, the
            odd one at the right and bottom (TensorFlow's rule, which the papers' code relies on).
        name: the layer's name in errors.
        bias: add a bias to each output channel.

    Attributes:
        in_size: height and width of the input.
        out_size: height and width of the output.
        pads: zeros at the left, right, top and bottom.

    Weights:
        weight `[kernel_size, kernel_size, in_channels, out_channels]`: in this order `kernels.stem` and the optimiser
        use it without a copy; bias `[out_channels]`, if asked for. Both start uniform in +-1 / sqrt(fan in), as
        PyTorch does.

    Raises:
        InputError: the input is smaller than the kernel, or an unknown padding.

    Examples:
        >>> conv = Convolution(1, 256, 9, 1, in_size=(28, 28), padding="valid", name="first convolution")
        >>> conv(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 256, 20, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        *,
        in_size: tuple[int, int],
        padding: str,
        name: str,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if padding not in ("valid", "same"):
            raise InputError(f"padding must be valid or same; got {padding!r}")
        shape = f"{kernel_size}x{kernel_size}"
        if padding == "valid" and min(in_size) < kernel_size:
            raise InputError(
                f"{name}: its {shape} kernel needs an input of at least {shape}; "
                f"got {in_size[0]}x{in_size[1]} (use larger images, a smaller kernel, or padding same)"
            )
        if padding == "valid":
            height, width = ((size - kernel_size) // stride + 1 for size in in_size)
            rows = columns = 0
        else:
            height, width = (math.ceil(size / stride) for size in in_size)
            rows, columns = (
                max((out - 1) * stride + kernel_size - size, 0)
                for out, size in zip((height, width), in_size, strict=True)
            )
        self.kernel_size, self.stride, self.in_size, self.out_size = kernel_size, stride, in_size, (height, width)
        self.pads = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        bound = 1 / math.sqrt(in_channels * kernel_size * kernel_size)
        self.weight = nn.Parameter(
            torch.empty(kernel_size, kernel_size, in_channels, out_channels).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out rows columns"]:
        """The convolution of `x`; in memory the channels of the result come last."""
        weight, padded = self.weight, nn.functional.pad(x, self.pads) if any(self.pads) else x
        if F.is_transformed():  # torch.func knows no memory formats
            return nn.functional.conv2d(padded, weight.permute(3, 2, 0, 1), self.bias, self.stride)
        # of one output channel both formats are the same to PyTorch, whose backward in float64 then takes the wrong one
        layout = torch.channels_last if weight.shape[3] > 1 else torch.contiguous_format
        if is_small(x) and x.dtype == weight.dtype:
            return self._as_product(padded.contiguous(memory_format=torch.channels_last), weight)
        padded, filters = (y.contiguous(memory_format=layout) for y in (padded, weight.permute(3, 2, 0, 1)))
        return nn.functional.conv2d(padded, filters, self.bias, self.stride)

    def _as_product(self, padded: Tensor, weight: Tensor) -> Tensor:
        """One matrix product with the weight as it lies in memory, which `conv2d` would rearrange: half of its time."""
        k, (height, width), s = self.kernel_size, self.out_size, self.stride
        n, channels = padded.shape[:2]
        image, row, column, _ = padded.permute(0, 2, 3, 1).stride()
        windows = padded.as_strided((n, height, width, k, k * channels), (image, s * row, s * column, row, 1))
        result = windows.reshape(-1, k * k * channels) @ weight.flatten(0, 2)
        result = result if self.bias is None else result.add_(self.bias)
        return result.view(n, height, width, -1).permute(0, 3, 1, 2)

    def filters(self) -> Float[Tensor, "out channels kernel kernel"]:
        """The weight with its axes in PyTorch's order."""
        return self.weight.permute(3, 2, 0, 1)

    def windows(self, axis: int) -> Float[Tensor, "out in"]:
        """1 where a place of the input is in the window of a place of the output, else 0; rows (0) or columns (1)."""
        before, sizes = self.pads[2] if axis == 0 else self.pads[0], (self.out_size[axis], self.in_size[axis])
        return windows(*sizes, kernel_size=self.kernel_size, stride=self.stride, before=before)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        _, _, ins, outs = self.weight.shape
        return f"{ins} -> {outs}, kernel_size={self.kernel_size}, stride={self.stride}, pads={self.pads}"


class PrimaryCapsules(nn.Module):
    """The first capsules: a convolution whose channels are grouped into vectors and squashed (Section 4).

    Capsule `i = (y * width + x) * types + type` sees the convolution's channels `type * dim ... type * dim + dim - 1`
    at position (y, x). The squash is of `scale * convolution + bias`.

    Args:
        in_channels: channels of the input.
        types: kinds of capsules, each a `dim`-channel convolution (paper: 32).
        dim: length of a capsule's vector (paper: 8).
        kernel_size: side of the convolution's kernel (paper: 9).
        stride: its step (paper: 2).
        in_size: height and width of the input.
        padding: `valid` (paper) or `same`.
        scale: factor on the convolution before the bias. 1 in the paper; 1 / `types` in the first author's code, where
            these capsules too are made by one routing iteration with uniform couplings.
        epsilon: of `functional.squash`.

    Weights:
        conv weight `[kernel_size, kernel_size, in_channels, types * dim]`; bias `[types * dim]`. Both start as in
        `Convolution`.

    Raises:
        InputError: the input is smaller than the kernel.

    Examples:
        >>> primary = PrimaryCapsules(256, in_size=(20, 20))
        >>> primary(torch.rand(2, 256, 20, 20)).shape
        torch.Size([2, 1152, 8])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        types: int = 32,
        dim: int = 8,
        kernel_size: int = 9,
        stride: int = 2,
        in_size: tuple[int, int],
        padding: str = "valid",
        scale: float = 1.0,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        self.types, self.dim, self.scale, self.epsilon = types, dim, scale, epsilon
        self.conv = Convolution(
            in_channels,
            types * dim,
            kernel_size,
            stride,
            in_size=in_size,
            padding=padding,
            name="primary capsules",
            bias=False,
        )
        bound = 1 / math.sqrt(in_channels * kernel_size * kernel_size)
        self.bias = nn.Parameter(torch.empty(types * dim).uniform_(-bound, bound))

    @property
    def capsules(self) -> int:
        """Number of capsules: types times grid positions."""
        return self.types * math.prod(self.conv.out_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch in dim"]:
        """Poses of the primary capsules, each of length in [0, 1), in float32."""
        return self.capsules_of(self.conv(x).permute(0, 2, 3, 1))

    def capsules_of(
        self, grid: Float[Tensor, "batch rows columns channels"], *, fused: bool = False
    ) -> Float[Tensor, "batch in dim"]:
        """The same from the convolution's output, channels last; `fused` in one pass, with first derivatives only."""
        if fused and not self.epsilon and native.usable(grid, self.bias):
            return biased_squash(grid, self.bias, self.dim, scale=self.scale).view(len(grid), self.capsules, self.dim)
        s = F.at_least_float32(grid)
        s = s * self.scale + self.bias if self.scale != 1 else s + self.bias
        return F.squash(s.reshape(grid.shape[0], self.capsules, self.dim), epsilon=self.epsilon)


class ClassCapsules(nn.Module):
    """One capsule a class, routed by agreement from the capsules below; "DigitCaps" in the paper (Section 4).

    Args:
        in_capsules: number of capsules below.
        in_dim: length of their vectors.
        out_capsules: number of classes.
        out_dim: length of the class capsules' vectors (paper: 16).
        iterations: routing iterations r (paper: 3).
        bias: add a learned bias to the weighted sum of votes. Not in the paper's equations; in the first author's
            code, where it starts at 0.1.
        leaky: a "none of the above" slot in the softmax, see `routing.dynamic_routing`.
        detach_routing: no gradient through the couplings, see there.
        routing_kernel: `plain` (votes of the whole batch in memory), `fused` (never more than a few of them) or `auto`.
        epsilon: of `functional.squash`; above 0 the routing kernel is `plain`.
        normalization: how logits become couplings, see `routing.couplings_of`; with `max-min` the kernel is `plain`.
        types: number of transformations to a class, which capsules of one type share; the types of a place lie side by
            side. None for one for each capsule. 1 for one for all (Gu and Tresp 2020, arXiv 1911.07968): with one
            iteration, the class capsules then see nothing but the sum of all poses, and no vote is formed.

    Weights:
        weight `W [types or in_capsules, in_dim, out_capsules, out_dim]`, normal with standard deviation 0.1 (the paper
        gives none; the first author's code has 0.1, truncated); bias, if asked for, `[out_capsules, out_dim]`, 0.1.

    Raises:
        InputError: fewer than 1 iteration, an unknown routing kernel, `fused` with an epsilon or max-min, or `leaky`
            with max-min.

    Examples:
        >>> digits = ClassCapsules(1152, 8, 10)
        >>> digits(torch.randn(2, 1152, 8)).pose.shape
        torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int = 16,
        *,
        iterations: int = 3,
        bias: bool = False,
        leaky: bool = False,
        detach_routing: bool = False,
        routing_kernel: str = "auto",
        epsilon: float = 0.0,
        normalization: Normalization = "softmax",
        types: int | None = None,
    ) -> None:
        super().__init__()
        check_iterations(iterations)
        resolve_routing_kernel(routing_kernel, torch.device("cpu"))
        couplings_of(torch.zeros(1), leaky=leaky, normalization=normalization)
        plain = f"an epsilon in squash, here {epsilon:g}" if epsilon else "max-min" * (normalization == "max-min")
        if plain and routing_kernel == "fused":
            raise InputError(f"routing_kernel must be plain or auto with {plain}; got fused")
        self.in_capsules, self.normalization = in_capsules, normalization
        self.iterations, self.leaky, self.detach_routing, self.epsilon = iterations, leaky, detach_routing, epsilon
        self.routing_kernel = "plain" if plain else routing_kernel
        weight = torch.empty(types or in_capsules, in_dim, out_capsules, out_dim)
        if not weight.is_meta:  # where `normal_` changes nothing, and imports the compiler in two seconds
            weight.normal_(std=0.1)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.full((out_capsules, out_dim), 0.1)) if bias else None

    def forward(self, u: Float[Tensor, "*batch in in_dim"]) -> RoutingResult:
        """Route the poses `u`; computed in float32 or better whatever the precision around it."""
        with F.full_precision(u.device):
            u = F.at_least_float32(u)
            weight = self.transforms().to(u.dtype)
            bias = None if self.bias is None else self.bias.to(u.dtype)
            if self.sums_poses:
                return self._of_sum(u, bias)
            options: dict[str, Any] = {"leaky": self.leaky, "detach_routing": self.detach_routing, "bias": bias}
            if routing_kernel_for(self.routing_kernel, u, weight) == "fused":
                weight = weight.contiguous()  # of shared transformations one for each capsule
                return fused.votes_and_routing(sweeps_for(u, weight), u, weight, iterations=self.iterations, **options)
            return self.route_votes(F.votes(u, weight), **options)

    def transforms(self) -> Float[Tensor, "in in_dim out dim"]:
        """`W_ij` of each capsule below, also where they share it."""
        return each_capsule(self.weight, self.in_capsules)

    def route_votes(self, votes: Float[Tensor, "*batch in out dim"], **options: Any) -> RoutingResult:
        """Route votes plainly; `options` of `dynamic_routing` are those of the layer unless they are given."""
        given = {"iterations": self.iterations, "bias": self.bias, "leaky": self.leaky} | options
        return dynamic_routing(votes, epsilon=self.epsilon, normalization=self.normalization, **given)

    def steps(self, votes: Float[Tensor, "*batch in out dim"]) -> list[Callable[[], RoutingResult]]:
        """What computes the routing after each iteration: iteration t of a longer routing is one of t iterations."""
        return [partial(self.route_votes, votes, iterations=t) for t in range(1, self.iterations + 1)]

    @property
    def sums_poses(self) -> bool:
        """Whether the class capsules see nothing but the sum of the poses below."""
        return len(self.weight) == 1 < self.in_capsules and self.iterations == 1

    def _of_sum(self, u: Tensor, bias: Tensor | None) -> RoutingResult:
        """`s_j = W_j (sum_i u_i) / J`: what uniform couplings make of shared transformations."""
        outs = self.weight.shape[2] + self.leaky
        share = 1.0 if self.normalization == "max-min" else 1 / outs
        s = torch.einsum("...p,pjd->...jd", u.sum(-2) * share, self.weight[0].to(u.dtype))
        v = F.squash(s if bias is None else s + bias, epsilon=self.epsilon)
        couplings = v.new_full((), share).expand(*u.shape[:-1], self.weight.shape[2])
        return RoutingResult(v, F.lengths(v), couplings)

    def extra_repr(self) -> str:
        """Sizes and routing options, for `print(model)`."""
        _, in_dim, outs, out_dim = self.weight.shape
        sizes = f"{self.in_capsules} x {in_dim}-D -> {outs} x {out_dim}-D"
        return f"{sizes}, iterations={self.iterations}, routing_kernel={self.routing_kernel}"


def each_capsule(weight: Float[Tensor, "types in_dim out dim"], capsules: int) -> Float[Tensor, "in in_dim out dim"]:
    """The transformation of each capsule; capsules of one type share it, and the types of a place lie side by side.

    Examples:
        >>> each_capsule(torch.randn(32, 8, 10, 16), 1152).shape
        torch.Size([1152, 8, 10, 16])
    """
    if len(weight) == capsules:
        return weight
    return weight.expand(capsules // len(weight), *weight.shape).flatten(0, 1)


class Decoder(nn.Module):
    """Image from the vectors of the class capsules, all but one masked (Figure 2): ReLU layers, then a sigmoid.

    Args:
        classes: number of class capsules; None for a decoder that all classes share, which sees the one vector alone
            (the class-independent decoder of DeepCaps, Rajasegaran et al. 2019, arXiv 1904.09546).
        dim: length of their vectors.
        image_shape: channels, height, width of the image to draw.
        sizes: widths of the hidden layers (paper: 512 and 1024).

    Weights:
        fully connected weights and biases as torch.nn.Linear starts them.

    Examples:
        >>> decoder = Decoder(10, 16, (1, 28, 28))
        >>> decoder(torch.randn(2, 10, 16), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self, classes: int | None, dim: int, image_shape: tuple[int, int, int], sizes: tuple[int, ...] = (512, 1024)
    ) -> None:
        super().__init__()
        self.image_shape, self.shared = image_shape, classes is None
        widths = [(classes or 1) * dim, *sizes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(image_shape)), nn.Sigmoid())

    def forward(
        self, pose: Float[Tensor, "batch classes dim"], index: Int[Tensor, "batch *objects"]
    ) -> Float[Tensor, "batch *objects channels height width"]:
        """Draw what capsule `index` of each example describes, intensities in [0, 1], in float32.

        With `index` `[batch, k]` each of k capsules is drawn alone, as Section 6 does for overlapping digits.
        """
        if index.ndim == 2:
            pose = pose[:, None].expand(-1, index.shape[1], -1, -1)
        masked = F.mask(pose, index)
        seen = masked.sum(-2) if self.shared else masked.flatten(-2)
        image: Tensor = self.layers(seen.to(next(self.layers.parameters()).dtype))
        return F.at_least_float32(image).reshape(*index.shape, *self.image_shape)
