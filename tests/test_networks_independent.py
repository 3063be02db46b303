"""CapsNets of random options against a network written down again here, in float64, from the papers and not from src.

Every way of computing them (both stems, both routing kernels, both types, few images and many, contiguous and strided)
must give its scores, reconstructions, losses and every gradient.
"""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as tf

from capsnet.config import Config
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from capsnet.objective import Objective

WAYS = list(itertools.product(("direct", "winograd", "auto"), ("plain", "fused", "auto")))
TOLERANCE = {  # of the largest number in a tensor, for results and gradients: five times the most of 400 networks
    (torch.float64, "direct"): (5e-14, 5e-13),
    (torch.float64, "winograd"): (5e-14, 2e-12),
    (torch.float32, "direct"): (1e-5, 5e-4),
    (torch.float32, "winograd"): (3e-5, 1e-3),
}


@dataclass(frozen=True)
class Case:
    """A network, its loss and its images."""

    options: dict[str, Any]
    image_shape: tuple[int, int, int]
    classes: int
    objects: int
    loss: dict[str, Any]
    images: int
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}"


def case(seed: int) -> Case:
    """A random one, of a few thousand weights."""
    draw = random.Random(seed)
    k1, k2, s1, s2 = draw.randint(1, 5), draw.randint(2, 6), draw.randint(1, 2), draw.randint(1, 3)
    padding = draw.choice(("valid", "same"))
    least = k1 + s1 * (k2 - 1)  # that both kernels fit
    height, width = (least + draw.randint(0, 7) for _ in range(2))
    classes = draw.randint(2, 5)
    types = draw.randint(1, 3)
    epsilon = draw.choice((0.0, 0.0, 1e-7))
    options = {
        "conv_channels": draw.choice((1, 3, 7)),
        "conv_kernel_size": k1,
        "conv_stride": s1,
        "capsule_types": types,
        "primary_dim": draw.randint(1, 5),
        "primary_kernel_size": k2,
        "primary_stride": s2,
        "primary_scale": draw.choice((1.0, 0.0, 0.3)),
        "padding": padding,
        "class_dim": draw.randint(1, 6),
        "squash_epsilon": epsilon,
        "routing_iterations": draw.randint(1, 4),
        "routing_bias": draw.random() < 0.5,
        "leaky": draw.random() < 0.5,
        "detach_routing": draw.random() < 0.25,
        "decoder_sizes": draw.choice(((), (5,), (4, 6))),
        "reconstruction": draw.random() < 0.8,
        "standardize": draw.random() < 0.3,
        "init": draw.choice(("pytorch", "authors")),
    }
    more = random.Random(1000 + seed)
    max_min = not options["leaky"] and more.random() < 0.3
    options |= {
        "routing_normalization": "max-min" if max_min else "softmax",
        "share_transform": more.random() < 0.3,
        "share_decoder": more.random() < 0.3,
    }
    loss = {
        "margin_scale": draw.choice((1.0, 0.3)),
        "reconstruction_weight": draw.choice((0.0005, 0.1)),
        "m_pos": draw.choice((0.9, 0.7)),
        "down_weight": draw.choice((0.5, 1.0)),
        "mask": draw.choice(("label", "prediction")),
    }
    shape = (draw.choice((1, 1, 2, 3)), height, width)
    return Case(options, shape, classes, draw.randint(1, min(2, classes - 1)), loss, draw.choice((1, 3, 9)), seed)


def padded(x: Tensor, kernel: int, stride: int, padding: str) -> Tensor:
    """TensorFlow's `SAME`: ceil(size / stride) outputs, the odd zero at the right and bottom."""
    if padding == "valid":
        return x
    height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return tf.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def squashed(s: Tensor, epsilon: float) -> Tensor:
    squared = (s * s).sum(-1, keepdim=True)
    return squared / (1 + squared) * s / (squared + (epsilon or 1e-300)).sqrt()


def independent(
    case: Case, p: dict[str, Tensor], images: Tensor, labels: Tensor, objects: Tensor | None
) -> dict[str, Tensor]:
    """Scores, reconstruction and loss of each image, with parameters `p` in the package's names and order of axes."""
    o, n = case.options, len(images)
    x = images
    if o["standardize"]:
        flat = x.flatten(1)
        deviation = flat.std(1, correction=0).clamp(min=flat.shape[1] ** -0.5)
        x = ((flat - flat.mean(1, keepdim=True)) / deviation[:, None]).view_as(x)
    x = padded(x, o["conv_kernel_size"], o["conv_stride"], o["padding"])
    x = tf.conv2d(x, p["conv.weight"].permute(3, 2, 0, 1), p["conv.bias"], o["conv_stride"]).relu()
    x = padded(x, o["primary_kernel_size"], o["primary_stride"], o["padding"])
    x = tf.conv2d(x, p["primary.conv.weight"].permute(3, 2, 0, 1), None, o["primary_stride"])
    types = o["capsule_types"]
    scale = o["primary_scale"] or 1 / (types + o["leaky"])
    x = (scale * x + p["primary.bias"][:, None, None]).permute(0, 2, 3, 1).reshape(n, -1, o["primary_dim"])
    u = squashed(x, o["squash_epsilon"])

    u_hat = (u[:, :, :, None, None] * p["class_capsules.weight"]).sum(2)
    still = u_hat.detach() if o["detach_routing"] else u_hat
    beta = p.get("class_capsules.bias", torch.zeros(()))
    b = torch.zeros(u_hat.shape[:3], dtype=u_hat.dtype)
    for t in range(o["routing_iterations"]):
        e = b.exp()
        c = e / (e.sum(2, keepdim=True) + (1 if o["leaky"] else 0))
        if o["routing_normalization"] == "max-min":
            low, high = b.min(2, keepdim=True).values, b.max(2, keepdim=True).values
            differ = high > low  # not at first, with one class, and of a capsule of zeros from the border
            c = torch.where(differ, (b - low) / torch.where(differ, high - low, 1), 1)
        last = t == o["routing_iterations"] - 1
        s = (c[..., None] * (u_hat if last else still)).sum(1) + beta
        v = squashed(s, o["squash_epsilon"])
        b = b + (still * (v.detach() if o["detach_routing"] else v)[:, None]).sum(-1)
    lengths = (v.square().sum(-1) + 1e-300).sqrt()  # 0, with a gradient of 0, where max-min gives a class no vote

    present = torch.zeros(n, case.classes, dtype=images.dtype)
    chosen = labels.view(n, -1)
    for row in range(n):
        present[row, chosen[row]] = 1
    loss = case.loss["margin_scale"] * (
        present * (case.loss["m_pos"] - lengths).clamp(min=0) ** 2
        + case.loss["down_weight"] * (1 - present) * (lengths - 0.1).clamp(min=0) ** 2
    ).sum(1)
    found = {"scores": lengths, "pose": v}
    if o["reconstruction"]:
        by_label = case.loss["mask"] == "label"
        longest = lengths.topk(case.objects).indices
        drawn = []
        for k in range(case.objects):
            index = (chosen if by_label else longest)[:, k]
            y = torch.zeros_like(v)
            y[range(n), index] = v[range(n), index]
            y = v[range(n), index] if o["share_decoder"] else y.flatten(1)
            layers = len(o["decoder_sizes"])
            for layer in range(layers + 1):
                y = y @ p[f"decoder.layers.{2 * layer}.weight"].t() + p[f"decoder.layers.{2 * layer}.bias"]
                y = y.relu() if layer < layers else y.sigmoid()
            drawn.append(y.view_as(images))
        pictures = torch.stack(drawn, 1)
        targets = images[:, None] if objects is None else objects
        if not by_label and case.objects > 1:  # both in the order of their classes
            pictures = torch.stack([pictures[i, longest[i].argsort()] for i in range(n)])
            targets = torch.stack([targets[i, chosen[i].argsort()] for i in range(n)])
        loss = loss + case.loss["reconstruction_weight"] * (pictures - targets).square().flatten(1).sum(1)
    found["total"] = loss
    return found


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(case.seed)
    images = torch.rand(case.images, *case.image_shape, generator=draw, dtype=torch.float64)
    order = torch.stack([torch.randperm(case.classes, generator=draw)[: case.objects] for _ in range(case.images)])
    if case.objects == 1:
        return images, order[:, 0], None
    objects = torch.rand(case.images, case.objects, *case.image_shape, generator=draw, dtype=torch.float64)
    return images, order, objects


def strided(x: Tensor) -> Tensor:
    """The same numbers, no two of them side by side in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def build(case: Case, **ways: str) -> CapsNet:
    """The network in float64, with weights so large that its scores differ."""
    torch.manual_seed(case.seed)
    shape, options = case.image_shape, {**case.options, **ways}
    network = create("capsnet", image_shape=shape, num_classes=case.classes, objects_per_image=case.objects, **options)
    assert isinstance(network, CapsNet)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    return network


def check(case: Case, *, ways: list[tuple[str, str]]) -> None:
    images, labels, objects = inputs(case)
    parameters = {name: p.detach().requires_grad_() for name, p in build(case).named_parameters()}
    wanted = independent(case, parameters, images, labels, objects)
    gradients = torch.autograd.grad(wanted["total"].mean(), list(parameters.values()))
    by_name = dict(zip(parameters, gradients, strict=True))

    for (stem, kernel), dtype in itertools.product(ways, (torch.float64, torch.float32)):
        max_min = case.options["routing_normalization"] == "max-min"
        if kernel == "fused" and (case.options["squash_epsilon"] or max_min):
            continue  # refused, see test_layers.py
        network = build(case, convolution=stem, routing_kernel=kernel).to(dtype)
        objective = Objective(network, replace(Config(), **case.loss))
        factor = 100 if max_min else 1  # of near logits, whose differences are made 1
        limit, of_gradients = (factor * x for x in TOLERANCE[dtype, network.resolved_convolution(images.to(dtype))])
        for form in (torch.Tensor.contiguous, strided):
            network.zero_grad()
            given = form(images.to(dtype)), labels, None if objects is None else form(objects.to(dtype))
            losses = objective(*given)
            losses.total.mean().backward()
            where = f"{case}, stem {stem}, kernel {kernel}, {dtype}, {form.__name__}"
            for name, value in (
                ("scores", losses.output.scores),
                ("pose", losses.output.pose),
                ("total", losses.total),
            ):
                near(value, wanted[name], limit, f"{name}: {where}")
            for name, parameter in network.named_parameters():
                near(parameter.grad, by_name[name], of_gradients, f"gradient of {name}: {where}")
            with torch.inference_mode():
                near(network(given[0]).scores, wanted["scores"], limit, f"scores in inference mode: {where}")


def near(got: Tensor | None, wanted: Tensor, limit: float, what: str) -> None:
    assert got is not None, what
    difference, largest = (got.double() - wanted).abs().max(), wanted.abs().max().clamp(min=1e-3)
    assert difference <= limit * largest, f"{what}: {difference:.2g} of {largest:.2g}"


@pytest.mark.parametrize("seed", range(20))
def test_every_way_of_computing_a_random_network(seed: int) -> None:
    check(case(seed), ways=WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(20, 220, 20))
def test_every_way_of_computing_many_random_networks(start: int) -> None:
    for seed in range(start, start + 20):
        check(case(seed), ways=WAYS)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_bf16_convolutions_of_a_random_network(seed: int, kernel: str) -> None:
    one = case(seed)
    if one.options["squash_epsilon"]:
        kernel = "plain"
    (images, labels, objects), network = inputs(one), build(one, routing_kernel=kernel)
    parameters = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    wanted = independent(one, parameters, images, labels, objects)
    network.float()
    objective = Objective(network, replace(Config(), **one.loss))
    alone = None if objects is None else objects.float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(images.float(), labels, alone)
        losses.total.mean().backward()
    gradients = torch.autograd.grad(wanted["total"].mean(), list(parameters.values()))
    near(losses.output.scores, wanted["scores"], 0.02, f"scores: {one}")
    for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
        near(parameter.grad, gradient, 0.1, f"gradient of {name}: {one}")
