"""The paper's equations in NumPy, float64 and plain loops: slow, obvious, the judge of every other version.

Written from Sabour, Frosst, Hinton 2017 (https://arxiv.org/abs/1710.09829), where a function names no other paper, with
no eye on the torch code, which it does not import. One example at a time: there is no batch axis anywhere.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "attention_routing",
    "conv2d",
    "digamma",
    "dynamic_routing",
    "em_routing",
    "exponential_squash",
    "inverted_attention_routing",
    "margin_loss",
    "matrix_votes",
    "reconstruction_loss",
    "self_routing",
    "spread_loss",
    "squash",
    "vb_routing",
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


def em_routing(
    v: Array,
    activation: Array,
    beta_u: Array,
    beta_a: Array,
    iterations: int,
    final_lambda: float = 0.01,
    *,
    momentum: float = 0.0,
    variance_guard: float = 5e-4,
    sees: NDArray[np.bool_] | None = None,
) -> tuple[Array, Array, Array]:
    """EM routing (Hinton, Sabour, Frosst 2018, Procedure 1) for the votes `v [in, out, dim]` of one example.

    Args:
        v: votes.
        activation: `[in]`, of the children.
        beta_u: `[out]`, the cost of each component of a parent's pose per child.
        beta_a: `[out]`, the cost below which a parent is active.
        iterations: T, at least 1.
        final_lambda: of the inverse temperatures `final_lambda (1 - 0.95^(t + 1))`.
        momentum: share of the former mean, which starts at 0, in each mean.
        variance_guard: added to each variance.
        sees: `[in, out]`, whether a child votes for a parent at all; None where each does.

    Returns:
        Poses `[out, dim]`, activations `[out]`, and the couplings of the last M step `[in, out]`.
    """
    ins, outs, dim = v.shape
    seen = np.ones((ins, outs), dtype=bool) if sees is None else sees
    couplings = np.zeros((ins, outs))
    for i in range(ins):
        for j in range(outs):
            if seen[i, j]:
                couplings[i, j] = 1 / sum(seen[i])
    mu, variance, x = np.zeros((outs, dim)), np.zeros((outs, dim)), np.zeros(outs)
    for t in range(iterations):
        temperature = final_lambda * (1 - 0.95 ** (t + 1))
        for j in range(outs):  # M step
            children = [i for i in range(ins) if seen[i, j]]
            r = {i: couplings[i, j] * activation[i] for i in children}
            mass = max(sum(r.values()), 1e-7)
            for h in range(dim):
                mean = sum(r[i] * v[i, j, h] for i in children) / mass
                mu[j, h] = momentum * mu[j, h] + (1 - momentum) * mean
                variance[j, h] = sum(r[i] * (v[i, j, h] - mu[j, h]) ** 2 for i in children) / mass + variance_guard
            cost = sum((beta_u[j] + np.log(variance[j, h]) / 2) * mass for h in range(dim))
            x[j] = temperature * (beta_a[j] - cost)
        if t == iterations - 1:
            break
        for i in range(ins):  # E step
            logs = {}
            for j in range(outs):
                if seen[i, j]:
                    log_p = 0.0
                    for h in range(dim):
                        log_p -= (v[i, j, h] - mu[j, h]) ** 2 / (2 * variance[j, h])
                        log_p -= np.log(2 * np.pi * variance[j, h]) / 2
                    logs[j] = -np.logaddexp(0, -x[j]) + log_p
            if logs:
                highest = max(logs.values())
                total = sum(np.exp(one - highest) for one in logs.values())
                for j, one in logs.items():
                    couplings[i, j] = np.exp(one - highest) / total
    return mu, 1 / (1 + np.exp(-x)), couplings


def spread_loss(activations: Array, present: set[int], margin: float) -> float:
    """`sum_k max(0, margin - (a_t - a_k))^2` over the classes k that are not in the image, for each t that is."""
    loss = 0.0
    for t in present:
        for k in range(len(activations)):
            if k not in present:
                loss += max(0.0, margin - float(activations[t] - activations[k])) ** 2
    return loss


def digamma(x: float) -> float:
    """The derivative of log Gamma for `x > 0`: by its recurrence to 10 and more, and there its asymptotic series."""
    below = 0.0
    while x < 10:
        below += 1 / x
        x += 1
    series = ((2, 1 / 12), (4, -1 / 120), (6, 1 / 252), (8, -1 / 240), (10, 1 / 132), (12, -691 / 32760))
    return float(np.log(x) - 1 / (2 * x) - sum(factor / x**power for power, factor in series) - below)


def vb_routing(
    v: Array,
    activation: Array,
    iterations: int,
    *,
    start: float | None = None,
    places: int = 1,
    sees: NDArray[np.bool_] | None = None,
) -> tuple[Array, Array, Array]:
    """Variational Bayes routing (De Sousa Ribeiro et al. 2020, arXiv 1905.11455) for the votes of one example.

    Gaussians of diagonal precision, with the priors alpha0 = 1, m0 = 0, kappa0 = 1, Psi0 = I, nu0 = dim + 1.

    Args:
        v: votes `[in, out, dim]`.
        activation: `[in]`, of the children.
        iterations: T, at least 1.
        start: the couplings before the first iteration; 1 / out if not given.
        places: the parents, in order, are those of so many places, which have Dirichlet distributions of their own.
        sees: `[in, out]`, whether a child votes for a parent at all; None where each does.

    Returns:
        Poses `[out, dim]`; the evidence `-exp(E[ln pi_j]) H_j`, of which a layer makes activations, `[out]`; and the
        couplings of the last update of the posteriors `[in, out]`.
    """
    ins, outs, dim = v.shape
    seen = np.ones((ins, outs), dtype=bool) if sees is None else sees
    couplings = np.where(seen, places / outs if start is None else start, 0.0)
    m, scale = np.zeros((outs, dim)), np.zeros((outs, dim))
    alpha, kappa, nu, log_pi, log_det = (np.zeros(outs) for _ in range(5))
    for t in range(iterations):
        for j in range(outs):
            r = [couplings[i, j] * activation[i] for i in range(ins)]
            mass = sum(r)
            alpha[j], kappa[j], nu[j] = 1 + mass, 1 + mass, dim + 1 + mass
            for h in range(dim):
                x = sum(r[i] * v[i, j, h] for i in range(ins)) / max(mass, 1e-7)
                m[j, h] = mass * x / kappa[j]
                around = sum(r[i] * (v[i, j, h] - x) ** 2 for i in range(ins))
                scale[j, h] = 1 + around + mass / kappa[j] * x**2
            log_det[j] = sum(digamma((nu[j] - d) / 2) for d in range(dim)) + dim * np.log(2)
            log_det[j] -= sum(np.log(scale[j, h]) for h in range(dim))
        types = outs // places
        for j in range(outs):
            place = j // types
            log_pi[j] = digamma(alpha[j]) - digamma(sum(alpha[place * types : (place + 1) * types]))
        if t == iterations - 1:
            break
        for i in range(ins):
            logs = {}
            for j in range(outs):
                if seen[i, j]:
                    distance = sum((v[i, j, h] - m[j, h]) ** 2 / scale[j, h] for h in range(dim))
                    logs[j] = log_pi[j] + log_det[j] / 2 - dim * np.log(2 * np.pi) / 2
                    logs[j] -= (dim / kappa[j] + nu[j] * distance) / 2
            if logs:
                highest = max(logs.values())
                total = sum(np.exp(one - highest) for one in logs.values())
                for j, one in logs.items():
                    couplings[i, j] = np.exp(one - highest) / total
    entropy = dim * np.log(2 * np.pi * np.e) / 2 - log_det / 2
    return m, -np.exp(log_pi) * entropy, couplings


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
