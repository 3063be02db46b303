"""The paper's equations in NumPy, float64 and plain loops: slow, obvious, the judge of every other version.

Written from Sabour, Frosst, Hinton 2017 (https://arxiv.org/abs/1710.09829), where a function names no other paper, with
no eye on the torch code, which it does not import. One example at a time: there is no batch axis anywhere.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "attention_routing",
    "conv2d",
    "dynamic_routing",
    "exponential_squash",
    "inverted_attention_routing",
    "margin_loss",
    "matrix_votes",
    "reconstruction_loss",
    "self_routing",
    "squash",
    "votes",
]

Array = NDArray[np.float64]


def squash(s: Array) -> Array:
    """Eq. 1 for one vector `s [dim]`: `(|s|^2 / (1 + |s|^2)) (s / |s|)`; zero stays zero."""
    squared = float(sum(x * x for x in s))
    if squared == 0:
        return np.zeros_like(s)
    return np.asarray(squared / (1 + squared) * s / np.sqrt(squared))


def votes(u: Array, weight: Array) -> Array:
    """Eq. 2: `u_hat_{j|i} = W_ij u_i`, for `u [in, in_dim]` and `weight [in, in_dim, out, dim]`: `[in, out, dim]`."""
    ins, in_dim, outs, dim = weight.shape
    u_hat = np.zeros((ins, outs, dim))
    for i in range(ins):
        for j in range(outs):
            for d in range(dim):
                u_hat[i, j, d] = sum(u[i, p] * weight[i, p, j, d] for p in range(in_dim))
    return u_hat


def dynamic_routing(
    u_hat: Array, iterations: int, bias: Array | None = None, leaky: bool = False, max_min: bool = False
) -> tuple[Array, Array]:
    """Procedure 1 for the votes `u_hat [in, out, dim]` of one example.

    Args:
        u_hat: votes.
        iterations: r, at least 1.
        bias: `[out, dim]`, added to the weighted sum.
        leaky: one more output of logit zero in the softmax, which receives nothing.
        max_min: in place of the softmax (Zhao et al. 2019, arXiv 1903.09662), each child's logits brought to 0 ... 1.

    Returns:
        `v [out, dim]` and the couplings of the last iteration `c [in, out]`.
    """
    ins, outs, dim = u_hat.shape
    b = np.zeros((ins, outs))
    c = np.zeros((ins, outs))
    v = np.zeros((outs, dim))
    for iteration in range(iterations):
        for i in range(ins):
            exponentials = [np.exp(b[i, j]) for j in range(outs)]
            total = sum(exponentials) + (1.0 if leaky else 0.0)
            low, high = min(b[i]), max(b[i])
            for j in range(outs):
                c[i, j] = exponentials[j] / total
                if max_min:
                    c[i, j] = 1.0 if low == high else (b[i, j] - low) / (high - low)
        for j in range(outs):
            s = np.zeros(dim) if bias is None else bias[j].copy()
            for i in range(ins):
                s += c[i, j] * u_hat[i, j]
            v[j] = squash(s)
        if iteration < iterations - 1:
            for i in range(ins):
                for j in range(outs):
                    b[i, j] += float(np.dot(u_hat[i, j], v[j]))
    return v, c


def exponential_squash(s: Array) -> Array:
    """Eq. 2 of Mazzia et al. 2021 for one vector `s [dim]`: `(1 - 1 / e^|s|) s / |s|`; zero stays zero."""
    length = np.sqrt(sum(x * x for x in s))
    return np.zeros_like(s) if length == 0 else np.asarray((1 - np.exp(-length)) * s / length)


def attention_routing(u_hat: Array, prior: Array) -> tuple[Array, Array]:
    """Self-attention routing of Mazzia et al. 2021 for the votes `u_hat [in, out, dim]` of one example.

    Args:
        u_hat: votes.
        prior: `[in, out]`, added to the couplings.

    Returns:
        `v [out, dim]` and the couplings `c [in, out]`.
    """
    ins, outs, dim = u_hat.shape
    logits = np.zeros((ins, outs))
    for j in range(outs):
        for i in range(ins):
            for k in range(ins):  # the authors' matrix of products, and the sum of its row
                logits[i, j] += float(np.dot(u_hat[i, j], u_hat[k, j])) / np.sqrt(dim)
    c = np.zeros((ins, outs))
    for i in range(ins):
        exponentials = [np.exp(logits[i, j]) for j in range(outs)]
        for j in range(outs):
            c[i, j] = exponentials[j] / sum(exponentials) + prior[i, j]
    v = np.zeros((outs, dim))
    for j in range(outs):
        v[j] = exponential_squash(np.asarray(sum(c[i, j] * u_hat[i, j] for i in range(ins))))
    return v, c


def self_routing(u_hat: Array, activation: Array, logits: Array) -> tuple[Array, Array, Array]:
    """Self-routing of Hahn, Pyeon, Kim 2019 for one example, where some activation is above 0.

    Args:
        u_hat: votes `[in, out, dim]`.
        activation: of the children `[in]`.
        logits: of the children's gates `[in, out]`.

    Returns:
        `v [out, dim]`, the activations of the parents `[out]`, and the couplings `c [in, out]`.
    """
    ins, outs, dim = u_hat.shape
    c = np.zeros((ins, outs))
    for i in range(ins):
        exponentials = [np.exp(logits[i, j]) for j in range(outs)]
        for j in range(outs):
            c[i, j] = exponentials[j] / sum(exponentials)
    a, v = np.zeros(outs), np.zeros((outs, dim))
    for j in range(outs):
        sent = sum(activation[i] * c[i, j] for i in range(ins))
        a[j] = sent / sum(activation)
        v[j] = sum(activation[i] * c[i, j] * u_hat[i, j] for i in range(ins)) / sent
    return v, a, c


def matrix_votes(poses: Array, weight: Array) -> Array:
    """`V_ij = P_i W_ij` (Hinton et al. 2018): `poses [in, n * n]`, `weight [in, n, out, n]`; `[in, out, n * n]`."""
    ins, side, outs, _ = weight.shape
    result = np.zeros((ins, outs, side * side))
    for i in range(ins):
        for j in range(outs):
            result[i, j] = (poses[i].reshape(side, side) @ weight[i, :, j]).reshape(-1)
    return result


def inverted_attention_routing(
    u_hat: Array, iterations: int, scale: Array, offset: Array, epsilon: float = 1e-5
) -> tuple[Array, Array]:
    """Inverted dot-product attention of Tsai et al. 2020 for the votes `u_hat [in, out, dim]` of one example.

    Args:
        u_hat: votes.
        iterations: T, at least 1.
        scale: of the layer normalisation `[dim]`.
        offset: of the same `[dim]`.
        epsilon: added to the variance there.

    Returns:
        The parents' poses `[out, dim]` and the couplings of the last iteration `[in, out]`.
    """
    ins, outs, dim = u_hat.shape
    r, pose = np.full((ins, outs), 1 / outs), np.zeros((outs, dim))
    for iteration in range(iterations):
        if iteration:
            for i in range(ins):
                exponentials = [np.exp(float(np.dot(u_hat[i, j], pose[j])) / np.sqrt(dim)) for j in range(outs)]
                for j in range(outs):
                    r[i, j] = exponentials[j] / sum(exponentials)
        for j in range(outs):
            s = np.zeros(dim)
            for i in range(ins):
                s += r[i, j] * u_hat[i, j]
            mean = sum(s) / dim
            variance = sum((x - mean) ** 2 for x in s) / dim
            pose[j] = (s - mean) / np.sqrt(variance + epsilon) * scale + offset
    return pose, r


def margin_loss(
    lengths: Array, present: set[int], m_pos: float = 0.9, m_neg: float = 0.1, down_weight: float = 0.5
) -> float:
    """Eq. 4 summed over the classes, for `lengths [classes]` and the set of classes that are in the image."""
    loss = 0.0
    for k, length in enumerate(lengths):
        if k in present:
            loss += max(0.0, m_pos - float(length)) ** 2
        else:
            loss += down_weight * max(0.0, float(length) - m_neg) ** 2
    return loss


def reconstruction_loss(reconstruction: Array, image: Array) -> float:
    """Sum of squared pixel differences of one image (Section 4.1), without its weight of 0.0005."""
    return float(sum((r - x) ** 2 for r, x in zip(reconstruction.flat, image.flat, strict=True)))


def conv2d(image: Array, weight: Array, bias: Array, stride: int = 1) -> Array:
    """Convolution without padding of `image [in, height, width]` by `weight [out, in, k, k]`, plus `bias [out]`."""
    outs, _, k, _ = weight.shape
    _, height, width = image.shape
    rows, columns = (height - k) // stride + 1, (width - k) // stride + 1
    result = np.zeros((outs, rows, columns))
    for o in range(outs):
        for y in range(rows):
            for x in range(columns):
                patch = image[:, y * stride : y * stride + k, x * stride : x * stride + k]
                result[o, y, x] = float((patch * weight[o]).sum()) + bias[o]
    return result
