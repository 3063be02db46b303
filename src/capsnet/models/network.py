"""The interface of every network: `Network`, `CapsuleNetwork`, and their `Output`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.options import LossOptions
from capsnet.options.schema import check_known
from capsnet.routing import RoutingResult

if TYPE_CHECKING:
    from capsnet.layers import Decoder

__all__ = [
    "CapsuleNetwork",
    "Logits",
    "Network",
    "Output",
    "RoutingTrace",
    "VectorCapsuleNetwork",
    "evaluation_mode",
    "feature_map",
    "inference_batch",
    "parts_of_image",
    "pooled",
]

N = TypeVar("N", bound="Network")
LARGE_IMAGE = 40 * 40
"""Pixels up to which images go through a network without gradients 256 at a time, and of more pixels fewer."""


class Output(NamedTuple):
    """Output of a network for a batch.

    Attributes:
        scores: `[batch, classes]`; the largest is the prediction, or the k largest where images show k objects.
            Lengths in [0, 1) for a capsule network, logits for a convolutional one.
        reconstruction: `[batch, channels, height, width]` in [0, 1], or None without a decoder; `[batch, k, channels,
            height, width]`, each object alone, from a network for images of k objects.
        pose: class capsules' vectors `[batch, classes, dim]`, or None without capsules.
        couplings: of the last routing iteration `[batch, in, classes]`, or None without capsules.

    Examples:
        >>> output = create("capsnet", conv_channels=8, capsule_types=2)(torch.rand(2, 1, 28, 28))
        >>> output.scores.shape, output.pose.shape, output.couplings.shape
        (torch.Size([2, 10]), torch.Size([2, 10, 16]), torch.Size([2, 72, 10]))
    """

    scores: Tensor
    reconstruction: Tensor | None = None
    pose: Tensor | None = None
    couplings: Tensor | None = None


class RoutingTrace(NamedTuple):
    """A routing, iteration by iteration.

    Attributes:
        activation: activations of the capsules below `[batch, in]`, in [0, 1].
        votes: `[batch, in, classes, dim]`.
        couplings: `[iterations, batch, in, classes]`; what they sum to is said by the routing function.
        pose: class capsules after each iteration `[iterations, batch, classes, dim]`.

    Examples:
        >>> network = create("capsnet", conv_channels=8, capsule_types=2)
        >>> trace = network.trace_routing(torch.rand(2, 1, 28, 28))
        >>> trace.votes.shape, trace.pose.shape
        (torch.Size([2, 72, 10, 16]), torch.Size([3, 2, 10, 16]))
    """

    activation: Tensor
    votes: Tensor
    couplings: Tensor
    pose: Tensor

    @classmethod
    def of(cls, activation: Tensor, votes: Tensor, routed: list[RoutingResult]) -> "RoutingTrace":
        """The trace whose iterations have these results."""
        couplings, pose = (torch.stack([getattr(each, name) for each in routed]) for name in ("couplings", "pose"))
        return cls(activation, votes, couplings, pose)


class Network(nn.Module, ABC):
    """Images in, an `Output` out, and a record of how the network was built.

    Attributes:
        config: name, image shape, classes and options; `create(**config)` builds the same network again.
        classes: names of the classes, in the order of the scores.
        image_shape: channels, height and width.
        objects_per_image: number of objects, of different classes, that an image shows.
        standardize: whether each image is given mean 0 and standard deviation 1 first.
        decoder: reconstructs images from class capsules, or None.
        narrower: the options that make the network smaller, for errors.
        preprocessing: how image files become what it sees, a `data.preprocessing.Preprocessing`; None until trained.
        frozen: names of the parts that are not trained, see `freeze`.
        given: modules that `create` was given, by option; `create(**config, **given)` has the same ones in it.

    Examples:
        >>> network = create("capsnet", image_shape=(1, 20, 20), num_classes=2, conv_channels=4, capsule_types=1)
        >>> list(network.parts())
        ['conv', 'primary', 'class_capsules', 'decoder']
        >>> network.freeze("conv")
        >>> output = network(torch.rand(3, 1, 20, 20))
        >>> network.presence(output).shape, output.pose.shape
        (torch.Size([3, 2]), torch.Size([3, 2, 16]))
        >>> create(**network.config).parameter_count() == network.parameter_count()
        True
    """

    config: dict[str, Any]
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    objects_per_image: int = 1
    standardize: bool = False
    decoder: "Decoder | None"
    narrower: str = "a smaller network"
    preprocessing: Any = None
    frozen: tuple[str, ...] = ()
    given: dict[str, nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.given = None, {}

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """Scores of `images`; `labels` choose the capsules to reconstruct from, if there is a decoder."""

    @abstractmethod
    def presence(self, output: Output) -> Float[Tensor, "batch classes"]:
        """How surely each class is in an image, in [0, 1]."""

    @abstractmethod
    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """The loss of the scores of each image, in float32 or better, with the options of the loss."""

    @abstractmethod
    def features(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """The last layer's representation of each image, of which `labels` are the true classes."""

    def begin_step(self, step: int, steps: int) -> None:
        """Called before each step of a training, of all of whose `steps` so many are done, for what changes with them.

        What is set here must depend on these numbers alone: a run that goes on then ends as one that never stopped.
        """

    def kernels(self, device: torch.device, precision: str) -> dict[str, str]:
        """The options that choose how the network is computed, and what they mean on `device`."""
        return {}

    def plain(self) -> AbstractContextManager[None]:
        """Inside, every layer is computed by its own `forward`, which hooks and tracers see."""
        return nullcontext()

    def standardized(self, images: Tensor) -> Tensor:
        """Images as the first layer sees them, see `standardize`."""
        return F.per_image_standardize(images) if self.standardize else images

    def multi_hot(self, labels: Int[Tensor, "batch *objects"]) -> Bool[Tensor, "batch classes"]:
        """Whether each class is among the true classes of an image."""
        return F.multi_hot(labels, len(self.classes))

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless `images` are floating point `[batch, *image_shape]`."""
        if not images.is_floating_point():
            raise InputError(f"images must be floating point in [0, 1] (divide uint8 by 255); got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"images must be [batch, channels, height, width] = [batch, {', '.join(map(str, self.image_shape))}]; "
                f"got {list(images.shape)}"
            )

    def check_labels(self, labels: Tensor) -> None:
        """Raise InputError unless there are `objects_per_image` labels for each image."""
        count = 1 if labels.ndim == 1 else labels.shape[1]
        if count != self.objects_per_image:
            plural = "s" * (self.objects_per_image > 1)
            raise InputError(f"images must show {self.objects_per_image} object{plural} each; got {count}")

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parts(self) -> dict[str, nn.Module]:
        """The parts that have parameters, by name: the children, or of an only child its children."""
        parts = dict(self.named_children())
        if len(parts) == 1:
            ((name, only),) = parts.items()
            parts = {f"{name}.{inner}": module for inner, module in only.named_children()} or parts
        return {name: module for name, module in parts.items() if any(True for _ in module.parameters())}

    def freeze(self, *names: str) -> None:
        """Train all parts but these: they get no gradient, and stay in evaluation mode whatever `train` says.

        Args:
            names: of `parts()`; none trains all.

        Raises:
            InputError: an unknown part, or all of them.
        """
        parts = self.parts()
        for name in names:
            check_known(name, parts, f"freeze must name parts of {self.config['name']}, which are")
        if parts.keys() <= set(names):
            raise InputError(f"freeze must leave a part to train; got all of {', '.join(parts)}")
        self.frozen = tuple(name for name in parts if name in names)
        self.requires_grad_(True)
        for name in self.frozen:
            parts[name].requires_grad_(False)
        self.train(self.training)

    def train(self: N, mode: bool = True) -> N:
        """Set training or evaluation mode; frozen parts are always in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self


class Logits(Network, ABC):
    """A network whose scores are logits, with cross-entropy."""

    def presence(self, output: Output) -> Float[Tensor, "batch classes"]:
        """Softmax of the logits, or where images show several objects their sigmoid."""
        return output.scores.softmax(-1) if self.objects_per_image == 1 else output.scores.sigmoid()

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """Cross-entropy; where images show several objects that of a sigmoid for each class."""
        return F.cross_entropy(output.scores, labels)


class CapsuleNetwork(Network):
    """A network whose last layer is a capsule for each class: `Output.pose` and `Output.couplings` are there.

    Attributes:
        in_capsules: number of capsules below the class capsules.
        routing_iterations: number of routing iterations; 2 for couplings found in one step, which follow uniform ones.
        leaky: whether the couplings of a capsule may sum to less than 1, the rest going to "none of the above".
        couplings_sum_to_one: whether they are shares; else they may be negative.

    Examples:
        >>> network = create("capsnet", conv_channels=8, capsule_types=2)
        >>> isinstance(network, CapsuleNetwork), network.routing_iterations
        (True, 3)
        >>> network.trace_routing(torch.rand(2, 1, 28, 28)).couplings.shape
        torch.Size([3, 2, 72, 10])
    """

    leaky: bool = False
    couplings_sum_to_one: bool = True
    routing_iterations: int = 1

    @property
    @abstractmethod
    def in_capsules(self) -> int:
        """Number of capsules below the class capsules."""

    @property
    def routing_steps(self) -> tuple[str, ...]:
        """What the couplings of `trace_routing` are called, one by one: the number of an iteration, or a name."""
        return tuple(str(step + 1) for step in range(self.routing_iterations))

    @abstractmethod
    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Votes, and couplings and poses at each routing iteration, computed plainly in float32."""

    @abstractmethod
    def receptive_fields(self) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
        """Share of each pixel row in each row of the grid of capsules, and of each pixel column in each column.

        The capsules below the class capsules stand on a grid, those of one place side by side. The shares of a place
        sum to 1 over the pixels.
        """

    @abstractmethod
    def route(self, images: Float[Tensor, "batch channels height width"]) -> RoutingResult:
        """The class capsules of images: pose, activation and couplings."""

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch *objects"] | None = None
    ) -> Output:
        """Recognise `images` and, with a decoder, draw them again.

        Args:
            images: intensities in [0, 1].
            labels: the capsules to reconstruct from, as in training, `[batch]` or several for each image,
                `[batch, k]`; None takes the most active, as many as an image shows objects.

        Raises:
            InputError: images of another shape than the network was built for.
        """
        self.check_images(images)
        pose, activation, couplings = self.route(images)
        if self.decoder is None:
            return Output(activation, None, pose, couplings)
        if labels is None:
            single = self.objects_per_image == 1
            labels = activation.argmax(-1) if single else activation.topk(self.objects_per_image).indices
        return Output(activation, self.decoder(pose, labels), pose, couplings)

    def presence(self, output: Output) -> Float[Tensor, "batch classes"]:
        """The activations of the class capsules."""
        return output.scores

    def classification_loss(
        self, output: Output, labels: Int[Tensor, "batch *objects"], loss: LossOptions
    ) -> Float[Tensor, "batch"]:
        """The margin loss (eq. 4 of Sabour et al. 2017), scaled by `loss.margin_scale`."""
        present = self.multi_hot(labels).to(output.scores.dtype)
        margin = F.margin_loss(output.scores, present, m_pos=loss.m_pos, m_neg=loss.m_neg, down_weight=loss.down_weight)
        return loss.margin_scale * margin

    def features(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """The pose of the class capsule of each image's true class."""
        pose = self(images).pose
        features: Tensor = pose[torch.arange(len(labels), device=pose.device), labels]
        return features


class VectorCapsuleNetwork(CapsuleNetwork):
    """A network whose primary capsules are vectors, each with a vote for every class capsule.

    Attributes:
        primary: a layer with the number of its `capsules`.
        class_capsules: a layer that routes their poses; with the transformation of each, `transforms()`, and `steps`,
            which computes the routing of votes after each of its steps.
    """

    primary: Any
    class_capsules: Any

    @abstractmethod
    def primary_poses(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch capsules dim"]:
        """Poses of the primary capsules."""

    def route(self, images: Float[Tensor, "batch channels height width"]) -> RoutingResult:
        """The class capsules, routed from the primary capsules."""
        routed: RoutingResult = self.class_capsules(self.primary_poses(images))
        return routed

    @property
    def in_capsules(self) -> int:
        """Number of primary capsules."""
        count: int = self.primary.capsules
        return count

    @property
    def routing_steps(self) -> tuple[str, ...]:
        """Attention has no iterations: its couplings are found in one step, from uniform ones."""
        attention = getattr(self.class_capsules, "prior", None) is not None
        return ("uniform", "attention") if attention else super().routing_steps

    def trace_routing(self, images: Float[Tensor, "batch channels height width"]) -> RoutingTrace:
        """Votes of the primary capsules, and the routing after each of its steps, of which the first is uniform."""
        self.check_images(images)
        u = self.primary_poses(images).float()
        u_hat = F.votes(u, self.class_capsules.transforms())
        return RoutingTrace.of(F.lengths(u), u_hat, [step() for step in self.class_capsules.steps(u_hat)])


def parts_of_image(
    grid: tuple[int, int], image_shape: tuple[int, int, int]
) -> tuple[Float[Tensor, "rows height"], Float[Tensor, "columns width"]]:
    """Receptive fields for a deep network: each place of a grid stands for its part of the image.

    The theoretical ones of such a network are the whole image; as in class activation maps, a place of the last feature
    map stands for what lies under it. The shares of a part sum to 1 over the pixels.
    """
    fields = []
    for places, pixels in zip(grid, image_shape[1:], strict=True):
        edges, pixel = torch.arange(places + 1) * (pixels / places), torch.arange(pixels)
        overlap = torch.minimum(edges[1:, None], pixel + 1.0) - torch.maximum(edges[:-1, None], pixel)
        fields.append(overlap.clamp(min=0) * (places / pixels))
    return fields[0], fields[1]


def pooled(size: tuple[int, int], grid: int) -> tuple[nn.Module, tuple[int, int]]:
    """What averages feature maps of `size` to at most `grid` rows and columns, and their number.

    The windows are the smallest ones that make so few, all alike where that is possible: 14 places become 7.
    """
    rows, columns = (math.ceil(each / math.ceil(each / grid)) for each in size)
    smaller = (rows, columns) != size
    return nn.AdaptiveAvgPool2d((rows, columns)) if smaller else nn.Identity(), (rows, columns)


def feature_map(backbone: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channels, rows and columns of the feature map that `backbone` makes of one image of zeros.

    Raises:
        InputError: it takes no such images, or makes no feature maps of them.
    """
    weight = next((each for each in backbone.parameters() if each.is_floating_point()), torch.empty(0, device="cpu"))
    image = torch.zeros(1, *image_shape, device=weight.device, dtype=weight.dtype)
    try:
        with torch.device(weight.device), evaluation_mode(backbone), torch.no_grad():
            found = backbone(image)
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(f"backbone must take images of {' x '.join(map(str, image_shape))}; got: {reason}") from None
    if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != 1:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"backbone must make feature maps [batch, channels, rows, columns]; got {got}")
    return found.shape[1], found.shape[2], found.shape[3]


def inference_batch(network: Network, *, at_most: int | None = None) -> int:
    """Images at a time without gradients: 256, or as many as take no more memory than 256 of 40 x 40 pixels.

    No more than `at_most`, if it is given.

    Examples:
        >>> inference_batch(create("capsnet", conv_channels=8, capsule_types=2))
        256
    """
    _, height, width = network.image_shape
    return max(1, min(256, 256 * LARGE_IMAGE // (height * width), at_most or 256))


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside, `network` is in evaluation mode; afterwards, also after an error, each of its modules is as it was.

    Threads may evaluate one network at the same time: the last one that leaves restores the modes.

    Examples:
        >>> network = create("capsnet", conv_channels=8, capsule_types=2)
        >>> with evaluation_mode(network):
        ...     print(network.training)
        False
        >>> network.training
        True
    """
    modules = list(network.modules())
    with _lock:
        for module in modules:
            users, training = _evaluated.get(module, (0, module.training))
            _evaluated[module] = users + 1, training
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                users, training = _evaluated.pop(module)
                if users > 1:
                    _evaluated[module] = users - 1, training
                else:
                    module.training = training


_lock = Lock()
_evaluated: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # how many evaluate it, and its mode
