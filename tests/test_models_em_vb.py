"""Matrix capsules with EM and with VB routing: published sizes, twins in loops, slices, margin, and every verb."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet import matrix_capsules, memory, reference
from capsnet.analysis.routing_trace import evidence
from capsnet.checkpoints import pretrained
from capsnet.cli import main
from capsnet.config import Config
from capsnet.demo.viewer import Viewer
from capsnet.errors import InputError
from capsnet.layers import Convolution
from capsnet.matrix_capsules import ConvCapsules, MatrixCapsules, MatrixClassCapsules, TypeNorm
from capsnet.models import create
from capsnet.models.em_capsnet import LAST_MARGIN, EMCapsNet, MatrixCapsNet
from capsnet.objective import Objective
from capsnet.routing import em_routing
from capsnet.training.fit import fit
from tiny import photos, reading, resumed

SMALL: dict[str, Any] = {
    "conv_channels": 3,
    "conv_kernel_size": 3,
    "conv_stride": 2,
    "capsule_types": (2, 3, 2),
    "capsule_kernel_sizes": (2, 2),
    "capsule_strides": (2, 1),
    "decoder_sizes": (5,),
}
FEW = {**SMALL, "capsule_types": (2, 3), "capsule_kernel_sizes": (2,), "capsule_strides": (2,)}
THREE = {
    "capsule_types": (8, 16, 16),
    "capsule_kernel_sizes": (3, 3),
    "capsule_strides": (2, 1),
    "primary_kernel_size": 1,
    "primary_stride": 1,
    "share_class_transform": True,
}
LARGE = {"conv_channels": 32, "capsule_types": (32, 32, 32)}
KINDS: dict[str, dict[str, Any]] = {
    "em": {"name": "em-capsnet", "final_lambda": 1.0},
    "google": {"name": "em-capsnet", "cost": "google", "class_lambda": 0.5},
    "vb": {"name": "vb-capsnet", "primary_kernel_size": 2, "primary_stride": 1},
    "vb, shared": {"name": "vb-capsnet", "primary_kernel_size": 1, "primary_stride": 1, "share_class_transform": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_model = pytest.mark.parametrize("model", ["em-capsnet", "vb-capsnet"])


def built(
    kind: str, image_shape: tuple[int, int, int] = (2, 12, 15), classes: int = 3, **options: Any
) -> MatrixCapsNet:
    """A small network whose weights and statistics are random, and large enough that couplings differ."""
    torch.manual_seed(0)
    network = create(image_shape=image_shape, num_classes=classes, **{**SMALL, **KINDS[kind], **options})
    assert isinstance(network, MatrixCapsNet)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif "norm" in name and tensor.is_floating_point():
                tensor.normal_().mul_(0.1).add_(float(name.endswith("weight")))
            elif "beta_u" in name:
                tensor.uniform_(0.2, 0.5)
            elif name == "class_capsules.weight":
                tensor.normal_()
    return network.eval()


# sizes


@pytest.mark.parametrize(
    ("model", "image_shape", "classes", "options", "count"),
    [
        ("em-capsnet", (2, 32, 32), 5, {}, 68_618),
        ("em-capsnet", (1, 32, 32), 5, {}, 67_018),
        ("em-capsnet", (1, 28, 28), 10, {}, 68_308),
        ("em-capsnet", (2, 32, 32), 5, {"cost": "google"}, 68_618),
        ("em-capsnet", (2, 32, 32), 5, LARGE, 316_650),
        ("em-capsnet", (1, 32, 32), 5, LARGE, 315_850),
        ("em-capsnet", (1, 28, 28), 10, LARGE, 318_420),
        ("vb-capsnet", (2, 32, 32), 5, {}, 206_154),
        ("vb-capsnet", (2, 32, 32), 5, THREE, 68_714),
        ("vb-capsnet", (2, 32, 32), 5, {**THREE, **LARGE}, 316_810),
    ],
)
def test_parameters_of_the_published_networks(
    model: str, image_shape: tuple[int, int, int], classes: int, options: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        network = create(model, image_shape=image_shape, num_classes=classes, **options)
    assert network.parameter_count() == count


@pytest.mark.parametrize(
    ("side", "padding", "grids"), [(32, "valid", [14, 6, 4]), (28, "valid", [12, 5, 3]), (32, "same", [16, 7, 5])]
)
def test_grids_of_the_published_networks(side: int, padding: str, grids: list[int]) -> None:
    with torch.device("meta"):
        network = create("em-capsnet", image_shape=(1, side, side), padding=padding)
    assert isinstance(network, EMCapsNet)
    sizes = [
        network.primary.out_size,
        *(layer.out_size for layer in network.capsules if isinstance(layer, ConvCapsules)),
    ]
    assert sizes == [(size, size) for size in grids]
    assert network.in_capsules == grids[-1] ** 2 * 16


@pytest.mark.parametrize(("side", "stride"), [(20, 2), (28, 2), (32, 2), (56, 4), (96, 6)])
def test_larger_images_are_looked_at_in_larger_steps(side: int, stride: int) -> None:
    with torch.device("meta"):
        network = create("em-capsnet", image_shape=(3, side, side))
    assert isinstance(network, EMCapsNet)
    assert network.stem[0].stride == stride


def layers(network: nn.Module) -> list[ConvCapsules | MatrixClassCapsules]:
    """Those that are routed to, from below."""
    return [layer for layer in network.modules() if isinstance(layer, ConvCapsules | MatrixClassCapsules)]


def test_the_parameters_of_google_start_as_in_its_code() -> None:
    network = create("em-capsnet", cost="google")
    starts = [(layer.beta_u[0].item(), layer.beta_a[0].item()) for layer in layers(network)]
    assert starts == [(0.5, 0.5), (0.5, 0.5), (2.0, 1.0)]
    assert [layer.routing.keywords["final_lambda"] for layer in layers(network)] == [0.01, 0.01, 0.0025]  # type: ignore[attr-defined]
    assert [round(layer.weight.std().item(), 3) for layer in layers(network)] == pytest.approx(
        [0.264, 0.264, 0.0088], rel=0.03
    )
    network = create("em-capsnet", transform_std=1.0)
    assert [layer.weight.std().item() for layer in layers(network)] == pytest.approx([0.88, 0.88, 0.88], rel=0.03)


# twins


def numbers(network: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}


def norm(x: Any, p: dict[str, Any], name: str) -> Any:
    """Batch normalisation by the running statistics, of the last axis."""
    y = (x - p[f"{name}.running_mean"]) / np.sqrt(p[f"{name}.running_var"] + 1e-5)
    return y * p[f"{name}.weight"] + p[f"{name}.bias"] if f"{name}.weight" in p else y


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def in_loops(network: MatrixCapsNet, image: Any, kind: str) -> tuple[Any, Any, Any]:
    """Poses, activations and couplings of the class capsules of one image, by the reference alone."""
    p, vb = numbers(network), kind.startswith("vb")
    none = np.zeros(100)
    x = reference.conv2d(image, p["stem.0.weight"].transpose(3, 2, 0, 1), p.get("stem.0.bias", none), 2)
    if vb:
        x = norm(x.transpose(1, 2, 0), p, "stem.1").transpose(2, 0, 1)
    x = np.maximum(x, 0)
    step = network.primary.pose.stride
    pose, logit = (
        reference.conv2d(x, p[f"primary.{name}.weight"].transpose(3, 2, 0, 1), none, step).transpose(1, 2, 0)
        for name in ("pose", "activation")
    )
    pose = pose.reshape(*pose.shape[:2], 2, 16)
    if vb:
        pose = norm(pose.swapaxes(-1, -2), p, "primary.pose_norm").swapaxes(-1, -2)
        logit = norm(logit, p, "primary.activation_norm")
    active = sigmoid(logit - (0 if vb else 1))

    def routed(v: Any, a: Any, u: Any, b: Any, last: float, norms: str, **seen: Any) -> tuple[Any, Any, Any]:
        if vb:
            m, evidence_, c = reference.vb_routing(v, a, 3, **seen)
            types = len(p[f"{norms}.pose_norm.running_mean"])
            m = norm(m.reshape(-1, types, 16).swapaxes(-1, -2), p, f"{norms}.pose_norm").swapaxes(-1, -2)
            logits = norm((b + evidence_ - u).reshape(-1, types), p, f"{norms}.activation_norm")
            return m.reshape(-1, 16), sigmoid(logits).reshape(-1), c
        seen.pop("places", None)
        if kind == "google":
            u, b = (math.log(2 * math.pi) + 1) / 2 * u, -2500 * b
            return reference.em_routing(v, a, u, b, 3, 2 * last, momentum=0.1, **seen)
        return reference.em_routing(v, a, u, b, 3, last, **seen)

    places = [k for k, layer in enumerate(network.capsules) if isinstance(layer, ConvCapsules)]
    for layer, stride in zip(places, (2, 1), strict=True):
        w, u, b = (p[f"capsules.{layer}.{name}"] for name in ("weight", "beta_u", "beta_a"))
        (rows, columns, ins, _), outs, k = pose.shape, w.shape[2], 2
        high, wide = (rows - k) // stride + 1, (columns - k) // stride + 1
        v = np.zeros((rows * columns * ins, high * wide * outs, 16))
        sees = np.zeros(v.shape[:2], dtype=bool)
        for place in range(high * wide):
            r, c = divmod(place, wide)
            for dy in range(k):
                for dx in range(k):
                    y, x_ = r * stride + dy, c * stride + dx
                    for t in range(ins):
                        of = reference.matrix_votes(pose[y, x_, t][None], w[(dy * k + dx) * ins + t][None])[0]
                        child = (y * columns + x_) * ins + t
                        v[child, place * outs : (place + 1) * outs] = of
                        sees[child, place * outs : (place + 1) * outs] = True
        many = high * wide
        last = 0.01 if kind == "google" else 1.0
        found = routed(
            v,
            active.reshape(-1),
            np.tile(u, many),
            np.tile(b, many),
            last,
            f"capsules.{layer + 1}",
            places=many,
            sees=sees,
        )
        pose, active = found[0].reshape(high, wide, outs, 16), found[1].reshape(high, wide, outs)
    rows, columns, types, _ = pose.shape
    w = p["class_capsules.weight"]
    shared = len(w) == types
    v = reference.matrix_votes(pose.reshape(-1, 16), np.tile(w, (rows * columns, 1, 1, 1)) if shared else w)
    v = v.reshape(rows, columns, types, -1, 16)
    if shared and kind != "vb":  # that has no coordinates
        at = [np.array(centre) for centre in centres(network, vb)]
        v[..., 3] += at[0][:, None, None, None]
        v[..., 7] += at[1][None, :, None, None]
    a, u, b = active.reshape(-1), p["class_capsules.beta_u"], p["class_capsules.beta_a"]
    return routed(v.reshape(rows * columns * types, -1, 16), a, u, b, 0.5 if kind == "google" else 1.0, "class_norm")


def centres(network: MatrixCapsNet, vb: bool) -> list[list[float]]:
    """The coordinates of the last grid: of a convolution 3/2 and capsules 2/2 and 2/1, without padding."""
    if vb:
        return [[(n + 1) / (10 * size) for n in range(size)] for size in network.class_capsules.in_size]
    width = 3 + (2 - 1) * 2 + (2 - 1) * 4  # of a receptive field; they are 4 pixels apart
    sizes = zip(network.class_capsules.in_size, network.image_shape[1:], strict=True)
    return [[(4 * n + width / 2) / pixels for n in range(size)] for size, pixels in sizes]


@every_kind
def test_a_small_network_equals_the_reference(kind: str) -> None:
    network = built(kind).double()
    images = torch.rand(2, *network.image_shape, dtype=torch.float64)
    with torch.no_grad():
        output = network(images)
    assert output.couplings is not None
    assert output.pose is not None
    for k in range(2):
        pose, activation, couplings = in_loops(network, images[k].numpy(), kind)
        np.testing.assert_allclose(output.pose[k], pose, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(output.scores[k], activation, rtol=1e-8)
        np.testing.assert_allclose(output.couplings[k], couplings, rtol=1e-6, atol=1e-10)
    assert float(output.couplings.std()) > 0.05, "couplings near uniform would hide mistakes"


# slices


@every_kind
def test_slices_change_neither_the_result_nor_the_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(5, 2, 12, 15, dtype=torch.float64)
    results, gradients = [], []
    for small in (1, 10**9):
        monkeypatch.setitem(matrix_capsules.SLICES, "small", small)
        network = built(kind).double().train()
        output = network(images)
        results.append(output.scores)
        gradients.append(torch.autograd.grad((output.scores * torch.arange(3)).sum(), list(network.parameters())))
        with torch.no_grad():
            results.append(network.eval()(images).scores)
    torch.testing.assert_close(results[0], results[2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[1], results[3], rtol=1e-10, atol=1e-12)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_more_slices_need_less_memory() -> None:
    dataset, needed = _random(128), []
    for slices in ("small", "large"):
        config = Config.of(model="em-capsnet", batch_size=64, routing_slices=slices)
        network = pretrained.outline("em-capsnet", **vars(config.options))
        needed.append(memory.training(network, config, memory.CPU, dataset, precision="32", batch_size=64))
    assert 4 * needed[0] < needed[1]
    assert needed[0] < 2**29
    config = Config.of(model="em-capsnet")
    automatic = pretrained.outline("em-capsnet")
    assert automatic.kernels(torch.device("cpu"), "32") == {"routing_slices": "small"}
    assert automatic.kernels(torch.device("cuda"), "32") == {"routing_slices": "large"}


def _random(count: int) -> Any:
    from capsnet.data import Dataset, Split

    split = Split(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), torch.arange(count) % 10)
    return Dataset("random", tuple("0123456789"), split, split)


# routing of a network


@every_kind
def test_the_trace_is_the_routing_of_the_network(kind: str) -> None:
    network = built(kind)
    images = torch.rand(2, *network.image_shape)
    with torch.no_grad():
        output, trace = network(images), network.trace_routing(images)
    assert output.couplings is not None
    torch.testing.assert_close(trace.couplings[-1], output.couplings)
    torch.testing.assert_close(trace.pose[-1], output.pose)
    torch.testing.assert_close(trace.couplings[0], torch.full_like(trace.couplings[0], 1 / 3))
    torch.testing.assert_close(trace.couplings.sum(-1), torch.ones(3, 2, network.in_capsules))
    assert trace.votes.shape == (2, network.in_capsules, 3, 16)
    assert trace.activation.shape == (2, network.in_capsules)
    assert all(part.isfinite().all() for part in evidence(network, images))


@every_kind
def test_the_receptive_field_is_where_a_capsule_sees(kind: str) -> None:
    """By the gradient of each place: windows of ones count the paths."""
    network = built(kind).double()
    rows, columns = network.receptive_fields()
    images = torch.rand(1, *network.image_shape, dtype=torch.float64)
    torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
    assert (len(rows), len(columns)) == network.class_capsules.in_size
    below = _receptive(network, images)
    for r in range(len(rows)):
        for c in range(len(columns)):
            (seen,) = torch.autograd.grad(below[0][0, r, c], below[1], retain_graph=True)
            torch.testing.assert_close(seen[0, 0] / seen.sum(), torch.outer(rows[r], columns[c]).double())


def _receptive(network: MatrixCapsNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """The number of paths to each place of the last grid, of windows of ones one after the other, and its input."""
    x = images[:, :1].clone().requires_grad_()
    y: Tensor = x
    for layer in (*network.stem, network.primary.pose, *network.capsules):
        if isinstance(layer, Convolution | ConvCapsules):
            ones = torch.ones(1, 1, layer.kernel_size, layer.kernel_size, dtype=y.dtype)
            y = nn.functional.conv2d(y, ones, stride=layer.stride)
    return y[:, 0], x


def test_coordinates_are_the_centres_of_the_receptive_fields() -> None:
    network = built("em")
    rows, columns = network.receptive_fields()
    for shares, (first, second) in ((rows, network.class_capsules.rows), (columns, network.class_capsules.columns)):
        expected = [first + (second - first) * n for n in range(len(shares))]
        found = shares @ (torch.arange(shares.shape[1]) + 0.5) / shares.shape[1]
        torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["em", "google"])
def test_negated_poses_of_the_primary_capsules_negate_the_poses_above(kind: str) -> None:
    network = built(kind).double()
    below = network.primary(network.stem(torch.rand(2, 2, 12, 15, dtype=torch.float64)))
    one, other = network.capsules(below), network.capsules(MatrixCapsules(-below.pose, below.activation))
    torch.testing.assert_close(one.pose, -other.pose)
    torch.testing.assert_close(one.activation, other.activation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"capsule_strides": (1,)},
            r"^capsule_strides must be one for each of the capsule_types after the first, 2; got 1$",
        ),
        ({"capsule_kernel_sizes": ()}, r"^capsule_kernel_sizes must be one for each .*, 2; got 0$"),
        ({"capsule_types": ()}, r"^capsule_types must be one number or more; got none$"),
        ({"image_shape": (1, 6, 15)}, r"^convolutional capsules 2 of 2: windows of 2x2 need a grid of at least 2x2"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        built("em", **options)


def test_one_value_for_each_type_is_normalised_by_the_running_statistics() -> None:
    layer = TypeNorm(3, affine=False).train()
    x = torch.rand(1, 1, 1, 3, 1)
    torch.testing.assert_close(layer(x), x / math.sqrt(1 + 1e-5))
    assert layer(torch.rand(2, 1, 1, 3, 1)).isfinite().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_capsules_are_float32_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    network = built(kind)
    layer = network.class_capsules
    below = MatrixCapsules(*(x.to(dtype) for x in network.below(torch.rand(2, 2, 12, 15))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = layer(below)
        assert network(torch.rand(2, 2, 12, 15)).scores.dtype == torch.float32
    assert routed.pose.dtype == routed.activation.dtype == torch.float32


def test_a_window_as_large_as_the_grid_is_a_dense_layer() -> None:
    torch.manual_seed(0)
    conv = ConvCapsules(2, 3, 2, 1, in_size=(2, 2), routing=em_routing).double()
    dense = MatrixClassCapsules(2, 3, in_size=(2, 2), routing=em_routing, share=False).double()
    dense.load_state_dict(conv.state_dict())
    below = MatrixCapsules(torch.randn(2, 2, 2, 2, 16).double(), torch.rand(2, 2, 2, 2).double())
    one, other = conv(below), dense(below)
    torch.testing.assert_close(one.pose[:, 0, 0], other.pose)
    torch.testing.assert_close(one.activation[:, 0, 0], other.activation)


# loss


def test_the_margin_rises_over_the_run_or_by_steps() -> None:
    network, published = built("em"), built("em", margin_schedule="published")
    assert isinstance(network, EMCapsNet)
    assert isinstance(published, EMCapsNet)
    assert float(network.margin) == F.spread_margin(0)
    for step, margin in ((0, 0.214), (25, 0.294), (50, 0.595), (100, 0.976)):
        network.begin_step(step, 100)
        assert float(network.margin) == pytest.approx(margin, abs=5e-4)
    place = network.margin.data_ptr()  # type: ignore[union-attr]
    network.begin_step(0, 7)
    assert network.margin.data_ptr() == place, "a recorded step reads it there"  # type: ignore[union-attr]
    published.begin_step(200_000, 10**9)
    assert float(published.margin) == pytest.approx(0.595, abs=5e-4)


def test_the_spread_loss_has_the_last_margin_in_evaluation() -> None:
    network = built("em")
    network.begin_step(1, 4)
    images, labels = torch.rand(4, 2, 12, 15), torch.tensor([0, 2, 1, 1])
    objective = Objective(network, Config.of(model="em-capsnet", margin_scale=2.0))
    for training in (True, False):
        losses = objective.train(training)(images, labels)
        margin = F.spread_margin(2, rise=1) if training else LAST_MARGIN
        expected = [
            2 * reference.spread_loss(scores.double().numpy(), {int(label)}, margin)
            for scores, label in zip(losses.output.scores.detach(), labels, strict=True)
        ]
        torch.testing.assert_close(
            losses.total.detach().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-7
        )


def test_the_loss_of_vb_can_fall_below_that_of_probabilities_as_logits() -> None:
    network = built("vb", classes=5)
    output = network(torch.rand(2, 2, 12, 15))
    sure = output._replace(scores=torch.tensor([[0.999, 0.001, 0.001, 0.001, 0.001]]))
    loss = network.classification_loss(sure, torch.tensor([0]), Config())
    assert float(loss) < 0.01 < math.log(math.e + 4) - 1
    logits = sure.scores.logit()
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([0]), reduction="none"))
    several = network.classification_loss(sure, torch.tensor([[0, 3]]), Config())
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 0, 0, 1, 0]]), reduction="sum")
    torch.testing.assert_close(several, wanted[None])
    edge = output._replace(scores=torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.5]], requires_grad=True))
    loss = network.classification_loss(edge, torch.tensor([0]), Config())
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), edge.scores)[0].isfinite().all()


def test_presence_is_the_activation() -> None:
    for kind in KINDS:
        network = built(kind)
        output = network(torch.rand(2, 2, 12, 15))
        assert torch.equal(network.presence(output), output.scores)
        assert ((output.scores >= 0) & (output.scores <= 1)).all()


# a run


@pytest.mark.slow
@every_model
@pytest.mark.usefixtures("workplace", "blank_figure")
def test_a_stopped_training_resumes_to_the_same_weights(
    model: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**FEW, "primary_kernel_size": 1, "primary_stride": 1} if model == "vb-capsnet" else FEW
    config = Config.of(
        data=str(photos), model=model, epochs=2, batch_size=16, lr=0.01, precision="32", **sizes, report=False
    )
    resumed(config, monkeypatch)


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_training_says_where_each_step_stands(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[int, int]]()
    monkeypatch.setattr(EMCapsNet, "begin_step", lambda self, step, steps: told.append((step, steps)))
    about: dict[str, Any] = {"model": "em-capsnet", "epochs": 2, "batch_size": 32, "out": "run", "report": False}
    fit(Config.of(data=str(photos), **FEW, **about))
    assert told == [(step, len(told)) for step in range(len(told))]
    assert len(told) >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_model
def test_every_verb_takes_it(model: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = photos(workplace / "data", count=12, size=(14, 13))
    sizes = ["--conv-channels", "8", "--conv-kernel-size", "3", "--capsule-types", "3"]
    sizes += ["--capsule-kernel-sizes", "--capsule-strides"]  # none
    sizes += ["--primary-kernel-size", "1"] if model == "vb-capsnet" else ["--final-lambda", "1"]
    words = ["--data", str(data), "--model", model, *sizes, "--epochs", "2", "--batch-size", "8", "--lr", "0.01"]
    assert main(["train", "--help", "--model", model]) == 0
    assert "--routing-slices" in capsys.readouterr().out
    assert main(["train", *words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "MatrixClassCapsules" in told
    assert "memory: about" in told
    assert main(["train", *words, "--out", "plain"]) == 0
    assert main(["train", *words, "--out", "run", "--reconstruction", "--decoder-sizes", "8"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] == json.loads(Path("run/result.json").read_text(encoding="utf-8"))["test"]["wrong"]
    for kind in ("reconstructions", "perturbations", "couplings"):
        assert main(["plot", kind, "run"]) == 0, kind
    assert main(["plot", "couplings", "plain"]) == 0
    assert main(["report", "plain", "--overwrite"]) in (0, 2)
    assert main(["analyse", "attack", "run", "--epsilons", "0.1", "--steps", "2", "--images", "4"]) == 0
    assert main(["analyse", "ood", "run", "--against", "noise"]) == 0
    assert main(["predict", "plain", str(data / "a"), "--csv"]) == 0
    assert main(["train", "--resume", "run", "--epochs", "3"]) == 0
    capsys.readouterr()
    assert main(["plot", "reconstructions", "plain"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "Routing" in Path("plain/report.html").read_text(encoding="utf-8")
    network = pretrained.load("run")
    viewer = Viewer(network, "run", reading=reading(network.image_shape), threshold=None)
    assert viewer.describe()["dim"] == 16
    with pytest.raises(InputError, match="model must have a decoder"):
        Viewer(pretrained.load("plain"), "plain", reading=reading(network.image_shape), threshold=None)
