"""The paper's functions: squash (eq. 1), lengths, masking, margin loss (eq. 4), reconstruction loss (Section 4.1).

Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", NIPS 2017, https://arxiv.org/abs/1710.09829. Pure functions
of tensors: no parameters, no device, no randomness; leading axes are free. Routing lives in `routing.py`.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from capsnet.errors import InputError

__all__ = [
    "add_coordinates",
    "at_least_float32",
    "cross_entropy",
    "exponential_squash",
    "full_precision",
    "is_ordinary",
    "is_transformed",
    "lengths",
    "margin_loss",
    "mask",
    "matrix_votes",
    "misclassified",
    "multi_hot",
    "per_image_standardize",
    "reconstruction_loss",
    "spread_loss",
    "spread_margin",
    "squash",
    "top_k_mask",
    "votes",
]

LARGE = 2.0**32
"""Components up to this have squares that float32 can add up in any number of dimensions."""


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast leaves the types alone, for what must be computed in float32.

    Examples:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        torch.float32
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 where it is of half precision, else as it is.

    Examples:
        >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def is_ordinary(tensor: Tensor) -> bool:
    """Whether `tensor` holds numbers that can be looked at: nothing exports, compiles or transforms it.

    Examples:
        >>> is_ordinary(torch.ones(2))
        True
    """
    tracing = torch.compiler.is_compiling() or is_transformed()
    return type(tensor) in (Tensor, nn.Parameter) and not tracing


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) or `torch.jit.trace` is under way.

    Examples:
        >>> is_transformed()
        False
    """
    traced = not torch.compiler.is_compiling() and torch._C._is_tracing()  # the compiler cannot ask this
    return bool(torch._C._are_functorch_transforms_active() or traced)


def squash(s: Float[Tensor, "*batch dim"], *, epsilon: float = 0.0) -> Float[Tensor, "*batch dim"]:
    """Shrink vectors to a length below 1 and keep their direction: `v = (|s|^2 / (1 + |s|^2)) * s / |s|` (eq. 1).

    Written as `s * n / (1 + n^2)` with `n = |s|`, the same function without the division by the length: no epsilon,
    and a finite gradient at zero. Half precision is computed in float32 and cast back, as `n^2` overflows float16.
    Vectors so long that `n^2` overflows float32 are scaled down first: they come out with length 1.

    Args:
        s: total inputs of capsules.
        epsilon: for comparison with other implementations, which divide by `sqrt(n^2 + epsilon)` instead of `n`.

    Returns:
        Vectors of length in [0, 1); in float32 lengths above about 3,000 round to 1.

    Examples:
        >>> squash(torch.tensor([3.0, 4.0]))  # length 5 becomes 25 / 26
        tensor([0.5769, 0.7692])
    """
    x = at_least_float32(s)
    n: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    one: float | Tensor = 1.0
    if _may_overflow(n):
        largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True)
        scale = largest.clamp(min=LARGE) / LARGE  # 1, so that no number changes, unless squares may overflow
        x, one = x / scale, scale**-2
        n = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    factor = n / (one + n * n)
    if epsilon:
        factor = factor * n * (n * n + epsilon).rsqrt()
    return (x * factor).to(s.dtype)


def exponential_squash(s: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Shrink vectors to a length below 1 and keep their direction: `v = (1 - exp(-|s|)) s / |s|`.

    Of Mazzia, Salvetti, Chiaberge 2021 (arXiv 2101.12491, eq. 2). Its slope at zero is 1, where that of `squash` is 0.
    Computed in float32 or better and cast back.

    Args:
        s: total inputs of capsules.

    Returns:
        Vectors of length in [0, 1); in float32 lengths above about 17 become 1. A zero stays zero, with a gradient.

    Examples:
        >>> exponential_squash(torch.tensor([3.0, 4.0]))  # length 5 becomes 1 - exp(-5)
        tensor([0.5960, 0.7946])
    """
    x = at_least_float32(s)
    n = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    if _may_overflow(n):
        largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True)
        scale = largest.clamp(min=LARGE) / LARGE  # 1 unless squares may overflow
        x = x / scale
        n = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    squashed: Tensor = x * (-torch.expm1(-n) / n)  # of vectors that long the length is 1 all the same
    return squashed.to(s.dtype)


def _may_overflow(lengths: Tensor) -> bool:
    """Whether a square in `lengths` may have overflowed; asked only where the answer costs nothing, on a CPU."""
    if lengths.device.type == "cpu" and is_ordinary(lengths):
        return bool(lengths.isinf().any())
    return lengths.device.type != "meta"


def votes(
    u: Float[Tensor, "*batch in in_dim"], weight: Float[Tensor, "in in_dim out dim"]
) -> Float[Tensor, "*batch in out dim"]:
    """Prediction vectors `u_hat_{j|i} = W_ij u_i` (eq. 2).

    Args:
        u: poses of the input capsules.
        weight: `W_ij`; with these axes the votes are one matrix product for each input capsule.

    Returns:
        The vote of every input capsule for every output capsule.

    Examples:
        >>> votes(torch.randn(2, 1152, 8), torch.randn(1152, 8, 10, 16)).shape
        torch.Size([2, 1152, 10, 16])
    """
    return torch.einsum("...ip,ipjd->...ijd", u, weight)


def matrix_votes(
    pose: Float[Tensor, "*batch in dim"], weight: Float[Tensor, "in side out side"]
) -> Float[Tensor, "*batch in out dim"]:
    """Votes of matrix capsules: `V_ij = P_i W_ij`, a product of two square matrices (Hinton, Sabour, Frosst 2018).

    Args:
        pose: `P_i`, row by row; `dim` is the square of `side`, 16 in the paper.
        weight: `W_ij`.

    Returns:
        The vote of every input capsule for every output capsule, row by row; in memory the output capsules come before
        the input capsules, as `routing.em_routing` reads them.

    Raises:
        InputError: a dimension of the poses that is not the square of the weight's side.

    Examples:
        >>> matrix_votes(torch.randn(2, 144, 16), torch.randn(144, 4, 10, 4)).shape
        torch.Size([2, 144, 10, 16])
    """
    side = weight.shape[1]
    if pose.shape[-1] != side * side:
        raise InputError(
            f"poses must have dimension {side * side}, the square of the weight's side {side}; got {pose.shape[-1]}"
        )
    matrices = pose.reshape(*pose.shape[:-1], side, side)
    votes = torch.einsum("...iap,ipjd->...jiad", matrices, weight)
    return votes.flatten(-2).transpose(-3, -2)


def add_coordinates(
    votes: Float[Tensor, "*batch rows columns types out dim"],
    rows: Float[Tensor, "rows"],
    columns: Float[Tensor, "columns"],
) -> Float[Tensor, "*batch rows columns types out dim"]:
    """Add to each vote where its capsule stands: coordinate addition (Hinton, Sabour, Frosst 2018, Section 4.1).

    The row is added to the first and the column to the second element of the right-hand column of the vote, a matrix
    of `n x n`: to its components n - 1 and 2 n - 1.

    Args:
        votes: of the capsules of a grid, `dim` a square of at least 4.
        rows: the coordinate of each row of the grid, as a share of the image.
        columns: that of each column.

    Returns:
        The votes with the coordinates.

    Raises:
        InputError: votes that are no matrices of at least 2 x 2.

    Examples:
        >>> share = torch.tensor([0.25, 0.75])  # of the image, of both rows and of both columns
        >>> add_coordinates(torch.zeros(1, 2, 2, 1, 1, 4), share, share)[0, 1, 0, 0, 0]
        tensor([0.0000, 0.7500, 0.0000, 0.2500])
    """
    side = math.isqrt(votes.shape[-1])
    if side * side != votes.shape[-1] or side < 2:
        raise InputError(f"votes must be square matrices of at least 2 x 2, row by row; got {votes.shape[-1]} numbers")
    component = torch.arange(votes.shape[-1], device=votes.device)
    row, column = (component == k * side - 1 for k in (1, 2))
    offset = rows[:, None, None] * row + columns[:, None] * column  # [rows, columns, dim]
    return votes + offset[:, :, None, None]


def lengths(pose: Float[Tensor, "*batch capsules dim"]) -> Float[Tensor, "*batch capsules"]:
    """Length of each capsule's vector: the probability that its entity is present (Section 2).

    Args:
        pose: output vectors of capsules.

    Returns:
        Lengths, in [0, 1) where `pose` is squashed; the gradient at a zero vector is zero.

    Examples:
        >>> lengths(torch.tensor([[0.6, 0.0], [0.3, 0.4]]))
        tensor([0.6000, 0.5000])
    """
    length: Tensor = torch.linalg.vector_norm(pose, dim=-1)
    return length


def mask(
    pose: Float[Tensor, "*batch capsules dim"], index: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch capsules dim"]:
    """Keep the vector of one capsule and set all others to zero, as the decoder's input (Section 4.1).

    Args:
        pose: output vectors of the class capsules.
        index: the capsule to keep, in `[0, capsules)`: the true class, or the longest capsule.

    Returns:
        `pose` with one non-zero row an example.

    Raises:
        InputError: not one index for each example.

    Examples:
        >>> mask(torch.ones(1, 3, 2), torch.tensor([1]))
        tensor([[[0., 0.],
                 [1., 1.],
                 [0., 0.]]])
    """
    if index.shape != pose.shape[:-2]:
        raise InputError(f"index must be of shape {tuple(pose.shape[:-2])}, one an example; got {tuple(index.shape)}")
    kept = torch.arange(pose.shape[-2], device=pose.device) == index[..., None]
    return pose * kept[..., None]


def multi_hot(labels: Int[Tensor, "batch *objects"], num_classes: int) -> Bool[Tensor, "batch classes"]:
    """Whether each class is among the true classes of an image.

    Args:
        labels: true classes `[batch]`, or `[batch, k]` for k different ones in every image.
        num_classes: number of classes.

    Examples:
        >>> multi_hot(torch.tensor([2, 0]), 3)
        tensor([[False, False,  True],
                [ True, False, False]])
    """
    mask = torch.zeros(len(labels), num_classes, dtype=torch.bool, device=labels.device)
    return mask.scatter(-1, labels if labels.ndim == 2 else labels[:, None], True)


def top_k_mask(scores: Float[Tensor, "*batch classes"], k: int) -> Bool[Tensor, "*batch classes"]:
    """Whether each score is among the `k` largest.

    Examples:
        >>> top_k_mask(torch.tensor([0.2, 0.9, 0.4]), 2)
        tensor([False,  True,  True])
    """
    largest = scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, largest, True)


def cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch *objects"]
) -> Float[Tensor, "batch"]:
    """Cross-entropy of a softmax; of several labels for each image, that of a sigmoid for each class, summed.

    Examples:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4
        tensor([1.3863])
    """
    if labels.ndim == 1:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    present = multi_hot(labels, logits.shape[-1]).to(logits.dtype)
    return nn.functional.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(-1)


def misclassified(
    scores: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch *objects"]
) -> Bool[Tensor, "batch"]:
    """Whether the classes of the largest scores, as many as there are labels, are not exactly the true ones.

    Examples:
        >>> misclassified(torch.tensor([[0.9, 0.1], [0.8, 0.3]]), torch.tensor([0, 1]))
        tensor([False,  True])
    """
    predicted = top_k_mask(scores, labels[:1].numel() if len(labels) else 1)
    return (predicted != multi_hot(labels, scores.shape[-1])).any(-1)


def per_image_standardize(images: Float[Tensor, "*batch channels height width"]) -> Tensor:
    """Each image with mean 0 and standard deviation 1 over its pixels and channels.

    The standard deviation is taken to be at least 1 / sqrt(number of intensities), so an image of one intensity becomes
    zeros (as `per_image_standardization` of TensorFlow, which the first author's code calls for CIFAR-10).

    Examples:
        >>> image = per_image_standardize(torch.rand(1, 3, 32, 32))
        >>> f"{image.mean():.1f}, {image.std(correction=0):.1f}".removeprefix("-")
        '0.0, 1.0'
    """
    if is_ordinary(images) and not images.numel():  # of which PyTorch warns that it has no deviation
        return images
    mean = images.mean((-3, -2, -1), keepdim=True)
    deviation = images.std((-3, -2, -1), correction=0, keepdim=True)
    return (images - mean) / deviation.clamp(min=math.prod(images.shape[-3:]) ** -0.5)


def margin_loss(
    lengths: Float[Tensor, "*batch classes"],
    presence: Float[Tensor, "*batch classes"],
    *,
    m_pos: float = 0.9,
    m_neg: float = 0.1,
    down_weight: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """Separate margin loss of every class, summed over the classes (eq. 4).

    `L_k = T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`.

    Args:
        lengths: `|v_k|`, in [0, 1).
        presence: `T_k`, 1 where the class is in the image and 0 elsewhere; several may be present.
        m_pos: m+, the length above which a present class costs nothing (eq. 4: 0.9).
        m_neg: m-, the length below which an absent class costs nothing (eq. 4: 0.1).
        down_weight: lambda, the weight of absent classes, "which stops the initial learning from shrinking the
            lengths of the activity vectors of all the digit capsules" (Section 3: 0.5).

    Returns:
        The loss of each example, at least 0.

    Raises:
        InputError: the two shapes differ (labels become `presence` by `torch.nn.functional.one_hot`).

    Examples:
        >>> margin_loss(torch.tensor([0.5, 0.3]), torch.tensor([1.0, 0.0]))  # 0.4^2 + 0.5 * 0.2^2
        tensor(0.1800)
    """
    if presence.shape != lengths.shape:
        raise InputError(f"presence must have the lengths' shape {tuple(lengths.shape)}; got {tuple(presence.shape)}")
    present = presence * (m_pos - lengths).clamp(min=0).square()
    absent = down_weight * (1 - presence) * (lengths - m_neg).clamp(min=0).square()
    return (present + absent).sum(-1)


def spread_loss(
    scores: Float[Tensor, "*batch classes"], presence: Bool[Tensor, "*batch classes"], margin: float | Float[Tensor, ""]
) -> Float[Tensor, "*batch"]:
    """Spread loss (Hinton, Sabour, Frosst 2018, eq. 3): `sum_{k != t} max(0, m - (a_t - a_k))^2`, t the true class.

    Args:
        scores: activations of the class capsules, in [0, 1].
        presence: whether the class is in the image; of several, each is compared with all that are not.
        margin: m, in [0, 1], see `spread_margin`.

    Returns:
        The loss of each example, at least 0. All activations equal cost `(classes - 1) m^2`.

    Raises:
        InputError: the two shapes differ.

    Examples:
        >>> spread_loss(torch.tensor([0.75, 0.5]), torch.tensor([True, False]), 0.5)  # (0.5 - 0.25)^2
        tensor(0.0625)
    """
    if presence.shape != scores.shape:
        raise InputError(f"presence must have the scores' shape {tuple(scores.shape)}; got {tuple(presence.shape)}")
    gap = scores[..., :, None] - scores[..., None, :]
    counted = presence[..., :, None] & ~presence[..., None, :]
    return ((margin - gap).clamp(min=0).square() * counted).sum((-2, -1))


def spread_margin(step: int | float, *, rise: int | float = 50_000) -> float:
    """The margin of the spread loss at a step of the training: `0.2 + 0.79 sigmoid(min(10, step / rise - 4))`.

    As in the authors' code (google-research, capsule_em): 0.214 at the start, 0.595 after 4 `rise`, towards 0.99.

    Args:
        step: finished steps, of 64 images in the paper.
        rise: steps in which the argument of the sigmoid grows by 1.

    Examples:
        >>> [round(spread_margin(step), 3) for step in (0, 200_000)]
        [0.214, 0.595]
    """
    return 0.2 + 0.79 / (1 + math.exp(-min(10.0, step / rise - 4)))


def reconstruction_loss(
    reconstruction: Float[Tensor, "*batch channels height width"],
    images: Float[Tensor, "*batch channels height width"],
) -> Float[Tensor, "*batch"]:
    """Sum of squared differences over the pixels of each image, not their mean (Section 4.1).

    The paper scales it "down by 0.0005 so that it does not dominate the margin loss"; the weight is the caller's, as
    is the mean over the batch. A weight of 0.0005 on this sum is 0.392 on the mean over 784 pixels.

    Args:
        reconstruction: the decoder's output, in [0, 1].
        images: what it should show, in [0, 1].

    Returns:
        The loss of each image, in [0, channels * height * width].

    Raises:
        InputError: the two shapes differ.

    Examples:
        >>> reconstruction_loss(torch.zeros(2, 1, 28, 28), torch.ones(2, 1, 28, 28))
        tensor([784., 784.])
    """
    if reconstruction.shape != images.shape:
        raise InputError(
            f"reconstruction must have the images' shape {tuple(images.shape)}; got {tuple(reconstruction.shape)}"
        )
    return (reconstruction - images).square().flatten(-3).sum(-1)
