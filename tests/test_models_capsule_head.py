"""Capsules on a backbone, and the convolutional networks that they are compared with."""

import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import capsnet
from capsnet import functional as F
from capsnet import memory, reference
from capsnet.analysis.routing_trace import evidence, fold
from capsnet.checkpoints import pretrained
from capsnet.checkpoints.export import export
from capsnet.config import Config, read
from capsnet.errors import InputError, Interrupted
from capsnet.kernels import fused
from capsnet.layers import ClassCapsules
from capsnet.models import create, efficient_capsnet
from capsnet.models.baseline import ConvNet
from capsnet.models.capsule_head import CapsuleHead
from capsnet.models.network import parts_of_image
from capsnet.models.resnet import BasicBlock, residual_stages
from capsnet.training.fit import fit, resume
from tiny import at_step, same_weights, typed

ROUTINGS = ("dynamic", "attention", "uniform")
FEW: dict[str, Any] = {"grid": 3, "capsule_types": 2, "primary_dim": 3, "class_dim": 5}


class Net(nn.Module):
    """A backbone of one's own: 7 channels, half of the height and a third of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, stride=(2, 3), padding=1)
        self.norm = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(x))
        return found


def head(shape: tuple[int, int, int] = (3, 12, 13), classes: int = 4, **options: Any) -> CapsuleHead:
    torch.manual_seed(0)
    network = create("capsule-head", image_shape=shape, num_classes=classes, **{**FEW, **options})
    assert isinstance(network, CapsuleHead)
    return network


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# residual networks


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 269_722), ({"blocks": 5}, 464_154), ({"blocks": 9}, 853_018)],  # 0.27, 0.46, 0.85 M in Table 6
    ids=["ResNet-20", "ResNet-32", "ResNet-56"],
)
def test_residual_networks_have_the_published_sizes(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        assert create("resnet", image_shape=(3, 32, 32), **options).parameter_count() == parameters


def test_a_block_is_its_equation() -> None:
    """In loops, with batch statistics away from where they start."""
    torch.manual_seed(0)
    for shortcut in ("identity", "projection"):
        block = BasicBlock(2, 3, stride=2, shortcut=shortcut).double().eval()
        for name, tensor in block.state_dict().items():
            if tensor.is_floating_point() and "norm" in name:
                tensor.uniform_(0.5, 1.5)
        p = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
        x = random(1, 2, 5, 6)

        def convolved(image: Any, weight: Any, stride: int) -> Any:
            pad = weight.shape[-1] // 2
            padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
            return reference.conv2d(padded, weight, np.zeros(len(weight)), stride)

        def normed(image: Any, name: str, p: Any = p) -> Any:
            mean, variance, weight, bias = (
                p[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
            )
            return (image - mean) / np.sqrt(variance + 1e-5) * weight + bias

        image = x[0].numpy()
        y = np.maximum(normed(convolved(image, p["conv1.weight"], 2), "norm1"), 0)
        y = normed(convolved(y, p["conv2.weight"], 1), "norm2")
        if shortcut == "identity":
            y[:2] += image[:, ::2, ::2]
        else:
            y += normed(convolved(image, p["projection.0.weight"], 2), "projection.1")
        with torch.no_grad():
            np.testing.assert_allclose(block(x)[0], np.maximum(y, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("side", "size"),
    [((8, 8), (2, 2)), ((9, 33), (3, 9)), ((64, 64), (16, 16)), ((65, 90), (5, 6)), ((224, 224), (14, 14))],
)
def test_the_map_is_a_quarter_of_the_image_and_a_sixteenth_of_a_large_one(
    side: tuple[int, int], size: tuple[int, int]
) -> None:
    with torch.device("meta"):
        stages = residual_stages((3, *side))
        assert stages(torch.empty(2, 3, *side)).shape == (2, 64, *size)


def test_the_convolutions_of_efficient_capsnet_with_a_linear_layer() -> None:
    torch.manual_seed(0)
    network = create("efficient-cnn")
    assert isinstance(network, ConvNet)
    assert network.parameter_count() == 130_688 + 9 * 9 * 128 * 10 + 10
    theirs = create("efficient-capsnet", reconstruction=False)
    assert isinstance(theirs.stem, nn.Module)
    network.get_submodule("layers.stem").load_state_dict(theirs.stem.state_dict())
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        seen = network.eval().features(images, torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(seen, theirs.stem.eval()(images).flatten(1))
    with pytest.raises(InputError, match=r"^convolution 4 of 4: its 3x3 kernel needs"):
        create("efficient-cnn", image_shape=(1, 10, 10))


# the head


@pytest.mark.parametrize(
    ("options", "parameters", "capsules"),
    [
        ({}, 269_072 + 8_448 + 1024 * 8 * 10 * 16, 1024),
        ({"share_transform": True}, 269_072 + 8_448 + 16 * 8 * 10 * 16, 1024),
        ({"share_transform": True, "routing": "attention"}, 269_072 + 8_448 + 16 * 8 * 10 * 16 + 10_240, 1024),
        ({"image_shape": (3, 224, 224)}, 269_072 + 49 * 48 - 432 + 8_448 + 784 * 8 * 10 * 16, 784),
        ({"backbone": "efficient-capsnet"}, 132_288 + 16_384 + 256 + 36 * 16 * 8 * 10 * 16, 576),
        ({"reconstruction": True}, 1_588_240 + 160 * 512 + 512 + 512 * 1024 + 1024 + 1024 * 3072 + 3072, 1024),
    ],
    ids=str,
)
def test_sizes(options: dict[str, Any], parameters: int, capsules: int) -> None:
    with torch.device("meta"):
        network = create("capsule-head", **{"image_shape": (3, 32, 32), **options})
    assert isinstance(network, CapsuleHead)
    assert (network.parameter_count(), network.in_capsules) == (parameters, capsules)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_class_capsules_start_at_half_of_their_length(classes: int) -> None:
    network = head((3, 32, 32), classes, capsule_types=8, primary_dim=8, class_dim=16, grid=8)
    lengths = network(torch.rand(8, 3, 32, 32)).scores
    assert 0.3 < float(lengths.detach().mean()) < 0.7


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("share", [False, True])
def test_the_head_is_the_one_written_in_loops(routing: str, share: bool) -> None:
    """From the feature map on, in float64 and evaluation mode, which a grid of 3 averages in windows of 2 x 2."""
    network = head(routing=routing, share_transform=share, backbone=Net(), grid=4).double().eval()
    for name, tensor in network.state_dict().items():
        if name.startswith("primary.norm") and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
        if name.endswith("prior"):
            tensor.normal_(std=0.2)
    images = random(2, 3, 12, 13).abs()
    p = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        maps, output = network.backbone(images), network(images)
    assert maps.shape == (2, 7, 6, 5)
    squash = reference.exponential_squash if routing == "attention" else reference.squash
    for image, scores, couplings in zip(maps.numpy(), output.scores, output.couplings, strict=True):
        u = []
        for y in range(3):
            for x in range(3):
                places = [(r, c) for r in (2 * y, 2 * y + 1) for c in ((0, 1), (1, 2, 3), (3, 4))[x]]
                seen = np.mean([image[:, r, c] for r, c in places], axis=0)
                made = p["primary.conv.weight"][:, :, 0, 0] @ seen
                made = (made - p["primary.norm.running_mean"]) / np.sqrt(p["primary.norm.running_var"] + 1e-5)
                made = made * p["primary.norm.weight"] + p["primary.norm.bias"]
                u += [squash(made[3 * kind : 3 * kind + 3]) for kind in range(2)]
        weight = p["class_capsules.weight"]
        votes = reference.votes(np.array(u), np.concatenate([weight] * 9) if share else weight)
        if routing == "attention":
            v, c = reference.attention_routing(votes, p["class_capsules.prior"])
        else:
            v, c = reference.dynamic_routing(votes, 1 if routing == "uniform" else 3)
        np.testing.assert_allclose(scores, np.linalg.norm(v, axis=-1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(couplings, c, rtol=1e-9, atol=1e-12)


def _gradients(network: Any, images: Tensor) -> tuple[Tensor, ...]:
    """Of the weights that route, by a sum that sees direction and length of every pose."""
    pose = network(images).pose
    weights = torch.linspace(-1, 1, pose[0].numel()).view(pose[0].shape)
    return torch.autograd.grad((pose * weights).sum(), [*network.class_capsules.parameters()])


def test_attention_takes_the_kernel_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is `fused` on a CPU, but for few votes without gradients."""
    monkeypatch.setattr(fused, "votes_and_attention", mock.Mock(side_effect=AssertionError("fused")))
    images = torch.rand(2, 3, 12, 13)
    head(routing="attention", routing_kernel="plain")(images)
    with torch.no_grad():
        head(routing="attention").eval()(images)
    for kernel in ("auto", "fused"):
        with pytest.raises(AssertionError, match="fused"):
            head(routing="attention", routing_kernel=kernel)(images)
    with pytest.raises(InputError, match="routing_kernel must be one of auto, plain, fused; got 'c'"):
        efficient_capsnet.ClassCapsules(3, 2, 4, 5, routing_kernel="c")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("share", [False, True])
def test_both_kernels_and_the_trace_agree(routing: str, share: bool) -> None:
    networks = [
        head(routing=routing, share_transform=share, routing_kernel=kernel).eval() for kernel in ("plain", "fused")
    ]
    images = torch.rand(5, 3, 12, 13)
    if routing == "attention":
        for network in networks:
            nn.init.normal_(
                network.get_parameter("class_capsules.prior"), std=0.1, generator=torch.Generator().manual_seed(0)
            )
    plain, swept = (network(images) for network in networks)
    torch.testing.assert_close(plain.pose, swept.pose, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(_gradients(network, images) for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    with networks[1].plain():
        assert torch.equal(networks[1](images).pose, plain.pose)
    with torch.no_grad():
        trace = networks[0].trace_routing(images)
    torch.testing.assert_close(trace.pose[-1], plain.pose)
    torch.testing.assert_close(trace.couplings[-1], plain.couplings)
    assert len(trace.pose) == networks[0].routing_iterations == {"dynamic": 3, "attention": 2, "uniform": 1}[routing]
    assert evidence(networks[0], images).entropy.isfinite().all()


def test_types_share_their_transformation_over_the_places() -> None:
    layer = ClassCapsules(6, 3, 4, 5, types=2)
    assert layer.weight.shape == (2, 3, 4, 5)
    whole = ClassCapsules(6, 3, 4, 5)
    with torch.no_grad():
        whole.weight.copy_(layer.weight.repeat(3, 1, 1, 1))
    u = F.squash(random(7, 6, 3).float())
    torch.testing.assert_close(layer(u), whole(u))
    one = ClassCapsules(6, 3, 4, 5, types=2, iterations=1)
    with torch.no_grad():
        one.weight.copy_(layer.weight)
    whole.iterations = 1
    torch.testing.assert_close(one(u), whole(u))


# places and pixels


@pytest.mark.parametrize(("places", "pixels"), [(1, 5), (3, 7), (8, 32), (7, 224), (5, 3)])
def test_the_parts_of_an_image_share_all_pixels(places: int, pixels: int) -> None:
    shares, columns = parts_of_image((places, 2), (1, pixels, 3))
    torch.testing.assert_close(shares.sum(1), torch.ones(places))
    torch.testing.assert_close(shares.sum(0), torch.full((pixels,), places / pixels))
    torch.testing.assert_close(shares.flip(0, 1), shares)
    torch.testing.assert_close(columns, torch.tensor([[2.0, 1, 0], [0, 1, 2]]) / 3)


def test_what_a_place_says_is_drawn_on_its_part_of_the_image() -> None:
    network = head((3, 12, 12))
    assert network.primary.out_size == (3, 3)
    values = torch.zeros(1, 18, 4)
    values[0, (1 * 3 + 2) * 2 + 1, 3] = 1  # row 1, column 2, type 1
    drawn = fold(network, values)
    expected = torch.zeros(1, 4, 12, 12)
    expected[0, 3, 4:8, 8:12] = 1 / 16
    torch.testing.assert_close(drawn, expected)


# a backbone of one's own


def test_a_module_is_a_backbone_and_comes_back_from_disk(tmp_path: Path) -> None:
    network = head(backbone=Net()).eval()
    assert network.config["backbone"] == f"{Net.__module__}.Net"
    assert network.primary.conv.weight.shape == (6, 7, 1, 1)
    assert network.given == {"backbone": network.backbone}
    images = torch.rand(3, 3, 12, 13)
    capsnet.save_pretrained(network, tmp_path / "net")
    module = Net()
    again = capsnet.load(tmp_path / "net", backbone=module)
    with torch.no_grad():
        assert torch.equal(again(images).scores, network(images).scores)
    assert again.get_submodule("backbone") is module
    assert again.config == network.config
    with pytest.raises(InputError, match=r"backbone must be given in Python, as in capsnet.load\(path, backbone=mo"):
        capsnet.load(tmp_path / "net")
    wrong = Net()
    wrong.conv = nn.Conv2d(3, 7, 3)
    wrong.norm = nn.BatchNorm2d(7, affine=False)
    with pytest.raises(
        InputError, match=r"primary.norm|weights must fit model capsule-head, which has no backbone.nor"
    ):
        capsnet.load(tmp_path / "net", backbone=wrong)
    capsnet.save_pretrained(head(), tmp_path / "other")
    for about in ({"backbone": Net()}, {"nothing": Net()}):
        with pytest.raises(InputError, match=rf"{next(iter(about))} must be left out; the network was made without"):
            capsnet.load(tmp_path / "other", **about)
    again.eval()(images)


def test_commands_say_that_a_module_must_be_given(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsnet.save_pretrained(head(backbone=Net()), tmp_path / "net")
    for line in (f"predict NET {photos / 'a' / '0.png'}", "evaluate NET", "export NET --to pt2"):
        code, out, err = typed(capsys, line.replace("NET", str(tmp_path / "net")))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "backbone must be given in Python" in err


@pytest.mark.usefixtures("workplace")
def test_the_example_of_the_page_works() -> None:
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    exec(page.split("## A backbone")[1].split("```python\n")[1].split("```")[0], found)
    assert isinstance(found["again"], CapsuleHead)
    assert found["again"].get_submodule("backbone") is found["backbone"]


def test_a_module_is_counted_exported_and_described(tmp_path: Path) -> None:
    network = head(backbone=Net()).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small, large = (memory.inference(network, count, torch.device("cpu")) for count in (1, 64))
    assert small < large
    images = torch.rand(8, 3, 12, 13)
    done = export(network, tmp_path / "there", format="safetensors", images=images)
    assert done.changed == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class Flat(nn.Module):
    """Vectors, not maps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Pair(nn.Module):
    """Two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Flat(), r"^backbone must make feature maps \[batch, channels, rows, columns\]; got \[1, 468\]$"),
        (Pair(), r"^backbone must make feature maps \[batch, channels, rows, columns\]; got tuple$"),
        (nn.Conv2d(1, 2, 3), r"^backbone must take images of 3 x 12 x 13; got: .*channels"),
    ],
    ids=["vectors", "tuple", "channels"],
)
def test_a_module_that_makes_no_maps_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        head(backbone=module)


@pytest.mark.usefixtures("unchecked")
def test_other_options_take_no_module() -> None:
    with pytest.raises(InputError, match=r"^routing must be one of dynamic, attention, uniform; got "):
        head(routing=nn.Identity())
    with pytest.raises(InputError, match=r"^backbone must be one of resnet20, efficient-capsnet; got 'resnet50'$"):
        head(backbone="resnet50")


def test_seeing_the_size_of_a_map_changes_no_statistics() -> None:
    module = Net()
    head(backbone=module)
    assert module.norm.num_batches_tracked == torch.zeros(())
    assert module.training
    with torch.device("meta"):
        head(backbone=nn.Conv2d(3, 2, 3))


def floats(count: int = 24) -> tuple[Tensor, Tensor]:
    """Images of 3 x 16 x 16 in [0, 1], whose class is their brightest channel."""
    draw = torch.Generator().manual_seed(3)
    images, labels = 0.3 * torch.rand(count, 3, 16, 16, generator=draw), torch.arange(count) % 3
    images[torch.arange(count), labels] += 0.6
    return images, labels


OWN: dict[str, Any] = {"model": "capsule-head", "batch_size": 8, "epochs": 2, "precision": "32", "report": False}


def module() -> Net:
    torch.manual_seed(7)
    return Net()


@pytest.mark.usefixtures("workplace", "blank_figure", "unchecked")
def test_a_module_is_trained_kept_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = module()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    images, labels = floats()
    result = capsnet.fit(
        dataset=(images, labels), backbone=backbone, out="run", **OWN | FEW | {"lr": 0.01, "epochs": 8}
    )
    assert result.test.error_percent < 20  # chance is 67
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items()), "a copy is trained"
    trained = result.network.get_submodule("backbone")
    assert isinstance(trained, Net)
    assert not torch.equal(trained.conv.weight, backbone.conv.weight)
    again = capsnet.load("run", backbone=backbone)
    with torch.no_grad():
        assert torch.equal(again(images).scores, result.network(images).scores)
    assert again.get_submodule("backbone") is backbone
    found = capsnet.predict(again, [("one", images[1].mul(255).to(torch.uint8).permute(1, 2, 0).numpy())])
    assert [getattr(one, "label", one) for one in found] == [result.network.classes[1]]
    kind = f"{Net.__module__}.Net"
    readme = Path("run/README.md").read_text(encoding="utf-8")
    assert "by `capsnet.fit(model='capsule-head', data='in-memory', image_size=16, " in readme
    assert ", backbone=backbone, grid=3, " in readme
    assert 'capsnet.load("this/folder", backbone=backbone)' in readme
    assert "capsnet predict" not in readme
    assert read("run/config.yaml").modules == {"backbone": kind}
    made = f"the network was made with a module of class {kind}"
    said = f"backbone must be given in Python, as in CALL, backbone=module); {made}"
    with pytest.raises(InputError, match=re.escape(said.replace("CALL", "capsnet.load(path"))):
        capsnet.load("run")
    with pytest.raises(InputError, match=re.escape(said.replace("CALL", "capsnet.fit(config"))):
        capsnet.fit(read("run/config.yaml"), (images, labels))
    with pytest.raises(InputError, match=re.escape(said.replace("CALL", "capsnet.resume(directory"))):
        capsnet.resume("run", (images, labels), epochs=9)
    capsys.readouterr()
    for line, call in (
        ("train --resume run", "capsnet.resume(directory"),
        ("train --config run/config.yaml", "capsnet.fit(config"),
        ("train --init-from run", "capsnet.load(path"),
        ("evaluate run", "capsnet.load(path"),
    ):
        code, out, err = typed(capsys, line)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said.replace("CALL", call) in err


@pytest.mark.usefixtures("workplace", "blank_figure", "unchecked")
def test_a_training_of_a_module_resumes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of an epoch, with a module of other weights: those of the checkpoint take their place."""
    images = floats()
    options, given = OWN | FEW | {"ema": 0.9}, module()
    fit(dataset=images, backbone=given, out="whole", **options)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(dataset=images, backbone=module(), out="parts", **options)
    resume("parts", images, backbone=Net())
    assert same_weights("whole", "parts")
    fit(dataset=images, backbone=given, out="twice", **options)
    assert same_weights("whole", "twice"), "the module that was given is not changed by a training"


@pytest.mark.usefixtures("workplace", "blank_figure", "unchecked")
def test_a_trained_module_is_fine_tuned() -> None:
    images, labels = floats()
    first = fit(dataset=(images, labels), backbone=module(), out="run", **OWN | FEW)
    two = (images[labels < 2], labels[labels < 2])
    about: dict[str, Any] = {"freeze": ("backbone",), "epochs": 1, "batch_size": 8, "report": False}
    kept = first.network.state_dict()["backbone.conv.weight"]
    for source, given in ((first.network, {}), ("run", {"backbone": module()})):
        tuned = fit(dataset=two, init_from=source, **{**about, **given})
        assert torch.equal(tuned.network.state_dict()["backbone.conv.weight"], kept)
        assert not torch.equal(module().conv.weight, kept)
        assert len(tuned.network.classes) == 2
        assert tuned.network.config["primary_dim"] == FEW["primary_dim"]


@pytest.mark.usefixtures("workplace", "unchecked")
def test_modules_that_no_training_takes_are_refused() -> None:
    images = floats()
    for options, message in (
        ({"routing": nn.Identity()}, "^routing must be one of dynamic, attention, uniform; got 'torch.nn"),
        ({"backbone": Flat()}, r"^backbone must make feature maps \[batch, channels, rows, columns\]; got \[1, 768\]"),
        ({"backbone": Net(), "model": "capsnet"}, "^backbone is an option of model capsule-head, not of capsnet$"),
        ({"backbone": nn.Conv2d(1, 2, 3)}, "^backbone must take images of 3 x 16 x 16; got: .*channel"),
    ):
        with pytest.raises(InputError, match=message):
            fit(dataset=images, **OWN | options)
    assert not Path("runs").exists()
    fit(dataset=images, **OWN | FEW | {"epochs": 0}, out="run")
    with pytest.raises(InputError, match=r"^run run: backbone must be left out; the network was made without a module"):
        resume("run", images, backbone=Net(), epochs=1)


# training and every verb


@pytest.mark.usefixtures("workplace", "blank_figure")
@pytest.mark.parametrize("model", ["capsule-head", "resnet"])
def test_it_learns_photographs(photos: Path, model: str) -> None:
    options = FEW | {"capsule_types": 4, "lr": 0.003} if model == "capsule-head" else {"width": 0.5}
    config = Config.of(data=str(photos), model=model, epochs=6, batch_size=16, precision="32", **options)
    result = fit(config, out="run")
    assert result.test.error_percent < 20  # chance is 67
    assert pretrained.load("run").config["name"] == model


@pytest.mark.slow
@pytest.mark.usefixtures("workplace", "blank_figure")
def test_every_verb(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--data {photos} --model capsule-head --grid 3 --capsule-types 2 --epochs 1 --batch-size 32"
    assert typed(capsys, f"train {words} --out run")[0] == 0
    for line in (
        "evaluate run",
        "plot couplings run",
        f"predict run {photos / 'a'}",
        "analyse attack run --epsilons 0.1 --steps 1 --images 4",
        f"train {words} --init-from run --freeze backbone --out again",
    ):
        assert typed(capsys, line)[0] == 0, line
    code, _, err = typed(capsys, "plot reconstructions run")
    assert (code, err.count("\n")) == (2, 1)
    assert "model must have a decoder to draw reconstructions" in err
    for name in ("backbone", "primary", "class_capsules"):
        same = [
            torch.equal(ours, pretrained.load("run").state_dict()[key])
            for key, ours in pretrained.load("again").state_dict().items()
            if key.startswith(name)
        ]
        assert all(same) == (name == "backbone"), name
