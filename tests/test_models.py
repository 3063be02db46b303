import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capsnet import functional as F
from capsnet import reference
from capsnet.checkpoints import pretrained
from capsnet.errors import InputError
from capsnet.models import Network, available, create, options_of
from capsnet.models.capsnet import CapsNet

Array = NDArray[np.float64]
SMALL: dict[str, Any] = {
    "conv_channels": 5,
    "conv_kernel_size": 3,
    "capsule_types": 3,
    "primary_dim": 4,
    "primary_kernel_size": 3,
    "class_dim": 6,
    "decoder_sizes": (8, 9),
}
SHAPE = (2, 11, 8)
CLASSES = 7


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same first weights in every run."""
    torch.manual_seed(0)


def small(image_shape: tuple[int, int, int] = SHAPE, num_classes: int = CLASSES, **options: Any) -> CapsNet:
    network = create("capsnet", image_shape=image_shape, num_classes=num_classes, **{**SMALL, **options})
    assert isinstance(network, CapsNet)
    return network


def images_for(network: Network, count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    pixels = np.random.default_rng(5).uniform(size=(count, *network.image_shape))
    return torch.from_numpy(pixels).to(dtype)


def fill(network: nn.Module) -> None:
    """Weights from a formula: irregular, about normal in size, the same on every machine."""
    with torch.no_grad():
        for k, parameter in enumerate(network.parameters()):
            count = parameter.numel()
            values = np.sin(1.7 * np.arange(count) ** 1.1 + k) * 1.5 / math.sqrt(max(parameter[0].numel(), 4))
            parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
        for name, parameter in network.named_parameters():
            if name == "class_capsules.weight":
                parameter.mul_(12)  # far from uniform couplings


# parameters


@pytest.mark.parametrize(
    ("model", "options", "count"),
    [
        ("capsnet", {"reconstruction": False}, 6_804_224),
        ("capsnet", {}, 8_215_568),
        ("capsnet", {"routing_bias": True}, 8_215_568 + 160),
        ("baseline", {}, 35_445_522),
    ],
)
def test_mnist_networks_have_the_published_number_of_parameters(
    model: str, options: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        assert create(model, **options).parameter_count() == count


def test_parameter_count_by_hand() -> None:
    """11 x 8 pixels: 9 x 6 after the first convolution, 4 x 2 after the second."""
    conv, primary = 5 * (2 * 9 + 1), 12 * (5 * 9 + 1)
    weights = (4 * 2 * 3) * 4 * 7 * 6
    decoder = (42 * 8 + 8) + (8 * 9 + 9) + (9 * 176 + 176)
    assert small().parameter_count() == conv + primary + weights + decoder


# golden


def forward_by_reference(
    network: CapsNet, image: Array, *, padding: str, scale: float, leaky: bool, label: int | None
) -> tuple[Array, Array, Array, Array]:
    """Lengths, image, poses and couplings of one image by the NumPy functions alone."""
    weights = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
    first, first_bias = weights["conv.weight"].transpose(3, 2, 0, 1), weights["conv.bias"]
    second, second_bias = weights["primary.conv.weight"].transpose(3, 2, 0, 1), weights["primary.bias"]
    if padding == "same":  # 11 x 8 -> 11 x 8 -> 6 x 4
        image = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    hidden = np.maximum(reference.conv2d(image, first, first_bias), 0)
    if padding == "same":
        hidden = np.pad(hidden, ((0, 0), (1, 1), (0, 1)))
    grid = scale * reference.conv2d(hidden, second, np.zeros(12), 2) + second_bias[:, None, None]
    u = [
        reference.squash(grid[4 * kind : 4 * kind + 4, y, x])
        for y in range(grid.shape[1])
        for x in range(grid.shape[2])
        for kind in range(3)
    ]
    u_hat = reference.votes(np.stack(u), weights["class_capsules.weight"])
    v, c = reference.dynamic_routing(u_hat, 3, weights.get("class_capsules.bias"), leaky)
    lengths = np.linalg.norm(v, axis=-1)
    kept = int(lengths.argmax()) if label is None else label
    x = np.zeros_like(v)
    x[kept] = v[kept]
    x = x.reshape(-1)
    layers = [w for name, w in weights.items() if name.startswith("decoder.")]
    x = np.maximum(layers[0] @ x + layers[1], 0)
    x = np.maximum(layers[2] @ x + layers[3], 0)
    x = 1 / (1 + np.exp(-(layers[4] @ x + layers[5])))
    return lengths, x.reshape(SHAPE), v, c


@pytest.mark.parametrize("kernel", ["plain", "fused"])
@pytest.mark.parametrize("recipe", ["paper", "authors", "leaky"])
@pytest.mark.parametrize(("padding", "stem"), [("valid", "direct"), ("valid", "winograd"), ("same", "direct")])
def test_a_small_capsnet_equals_the_reference(kernel: str, recipe: str, padding: str, stem: str) -> None:
    options: dict[str, Any] = {"paper": {}, "authors": {"routing_bias": True, "primary_scale": 0.0}}.get(
        recipe, {"leaky": True}
    )
    network = small(routing_kernel=kernel, padding=padding, convolution=stem, **options).double()
    fill(network)
    images = images_for(network, dtype=torch.float64)
    labels = torch.tensor([6, 0, 3])
    with torch.no_grad():
        by_label, by_length = network(images, labels), network(images)
    assert by_length.scores.argmax(-1).tolist() != labels.tolist(), "or the two masks are not told apart"
    scale = 1 / 3 if recipe == "authors" else 1.0
    for output, chosen in ((by_label, labels.tolist()), (by_length, [None] * 3)):
        assert output.pose is not None
        assert output.couplings is not None
        assert output.reconstruction is not None
        for k in range(3):
            golden = forward_by_reference(
                network,
                images[k].numpy(),
                padding=padding,
                scale=scale,
                leaky=recipe == "leaky",
                label=chosen[k],
            )
            found = (output.scores[k], output.reconstruction[k], output.pose[k], output.couplings[k])
            for part, expected in zip(found, golden, strict=True):
                np.testing.assert_allclose(part, expected, rtol=1e-10, atol=1e-12)
    assert float(by_length.couplings.max()) > 0.3, "couplings near uniform would hide mistakes"


def test_the_baseline_is_three_convolutions_and_three_linear_layers() -> None:
    network = create("baseline", image_shape=(3, 7, 5), num_classes=4)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (256, 3, 5, 5),
        (256, 256, 5, 5),
        (128, 256, 5, 5),
        (328, 128 * 35),
        (192, 328),
        (4, 192),
    ]
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.5]
    images = images_for(network, 2)
    with torch.no_grad():
        x = images
        for layer in layers:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x.flatten(1))
            x = x.relu() if layer is not layers[-1] else x
        torch.testing.assert_close(network.eval()(images).scores, x)


# every registered model


def sizes_of(name: str) -> dict[str, Any]:
    """Options that make a network small."""
    stem = {"conv_channels": (8, 8, 8, 16), "conv_kernel_sizes": (3, 2, 1, 2)}
    matrix = {"conv_channels": 4, "conv_kernel_size": 3, "capsule_types": (2, 3), "capsule_kernel_sizes": (2,)}
    few = {
        "capsnet": SMALL,
        "efficient-capsnet": {**stem, "class_dim": 4},
        "efficient-cnn": stem,
        "em-capsnet": {**matrix, "capsule_strides": (1,)},
        "vb-capsnet": {**matrix, "capsule_strides": (1,), "primary_kernel_size": 1},
        "resnet": {"width": 0.2},
        "inverted-capsnet": {
            "capsule_types": 3,
            "pose_side": 2,
            "capsule_kernel_sizes": (2,),
            "capsule_strides": (1,),
            "backbone_channels": (4, 6),
            "backbone_blocks": (1, 1),
        },
        "self-routing-capsnet": {"blocks": 1, "grid": 3, "capsule_types": 2, "primary_dim": 3},
        "capsule-head": {"grid": 3, "capsule_types": 2, "primary_dim": 3, "class_dim": 5, "decoder_sizes": (8,)},
    }
    return few.get(name, {"width": 0.02})


every_model = pytest.mark.parametrize("name", available())


def built(name: str, **options: Any) -> Network:
    torch.manual_seed(0)
    return moved(create(name, image_shape=(1, 19, 23), num_classes=3, **options))


def moved(network: Network) -> Network:
    """The same with parameters in place of those that start at 0, by which the gates of classes are all alike."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.uniform_(-0.5, 0.5)
    return network


def test_models_are_found_by_pattern() -> None:
    assert available() == sorted(available())
    assert {"capsnet", "baseline"} <= set(available())
    assert available("base*") == ["baseline", "baseline-multimnist"]
    assert available("nothing*") == []


@every_model
def test_a_model_recognises_and_learns_with_all_its_parameters(name: str) -> None:
    network = built(name)
    output = network(images_for(network), torch.tensor([2, 0, 1]))
    assert output.scores.shape == (3, 3)
    assert output.scores.dtype == torch.float32
    loss = (output.scores * torch.arange(9.0).reshape(3, 3)).sum()
    if output.reconstruction is not None:
        assert output.reconstruction.shape == (3, 1, 19, 23)
        assert 0 <= float(output.reconstruction.detach().min()) <= float(output.reconstruction.detach().max()) <= 1
        loss = loss + output.reconstruction.square().sum()
    torch.autograd.backward(loss)
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), f"{parameter_name} is dead"


@every_model
def test_a_model_without_labels_treats_each_image_alone(name: str) -> None:
    network = built(name).eval()
    images = images_for(network)
    with torch.no_grad():
        together, alone = network(images), network(images[1:2])
    for part, whole in zip(alone, together, strict=True):
        if whole is not None:
            torch.testing.assert_close(part[0], whole[1], rtol=1e-4, atol=1e-6)


@every_model
def test_a_model_is_the_same_again_from_its_config_and_state(name: str) -> None:
    network = built(name).eval()
    torch.manual_seed(1)
    again = create(**network.config).eval()
    images = images_for(network)
    with torch.no_grad():
        before, other = network(images).scores, again(images).scores
        again.load_state_dict(network.state_dict())
        after = again(images).scores
    assert not torch.equal(before, other), "its weights must come from the state, not from a fixed start"
    assert torch.equal(before, after)
    assert again.config == network.config


@every_model
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(2, 1, 23, 19), (2, 3, 19, 23), (1, 19, 23), (2, 1, 19, 22)], ids=str)
def test_a_model_refuses_images_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = built(name)
    need = re.escape("[batch, 1, 19, 23]; got " + str(list(shape)))
    with pytest.raises(InputError, match=rf"^images must be \[batch, channels, height, width\] = {need}$"):
        network(torch.zeros(shape, device="meta"))


@every_model
def test_a_model_refuses_an_unknown_option_and_names_the_nearest(name: str) -> None:
    option = fields(options_of(name))[0].name
    message = rf"^options of model {name} must be among .*{option}.*; got {option}x \(did you mean {option}\?\)$"
    with pytest.raises(InputError, match=message):
        create(name, **{option + "x": 1})  # type: ignore[arg-type]


@every_model
def test_a_model_is_named_by_its_classes(name: str) -> None:
    with torch.device("meta"):
        network = create(name, image_shape=(1, 19, 23), num_classes=3, classes=("ant", "bee", "cat"))
        assert built(name).classes == ("0", "1", "2")
    assert network.classes == network.config["classes"] == ("ant", "bee", "cat")
    assert network.image_shape == network.config["image_shape"] == (1, 19, 23)
    assert network.config["name"] == name
    assert set(network.config) == {
        "name",
        "image_shape",
        "num_classes",
        "classes",
        "objects_per_image",
        *(each.name for each in fields(options_of(name))),
    }


@every_model
@pytest.mark.parametrize(("num_classes", "classes"), [(0, None), (3, ("a", "b"))])
def test_a_model_needs_a_name_for_each_class(name: str, num_classes: int, classes: tuple[str, ...] | None) -> None:
    with pytest.raises(
        InputError, match=rf"^num_classes must be at least 1 and the number of names.*got {num_classes}"
    ):
        create(name, num_classes=num_classes, classes=classes)


def test_an_unknown_model_is_refused_and_the_nearest_named() -> None:
    message = rf"^model must be one of {', '.join(available())}; got 'capsnett' \(did you mean capsnet\?\)$"
    with pytest.raises(InputError, match=message):
        create("capsnett")
    with pytest.raises(InputError, match=r"; got 'xyz'$"):
        options_of("xyz")


def test_options_of_a_model() -> None:
    assert vars(options_of("baseline")()) == {"width": 1.0, "dropout": 0.5, "standardize": False}
    assert options_of("capsnet")().routing_iterations == 3


# capsnet's sizes and options


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("image_shape", [(1, 11, 8), (3, 8, 13)], ids=str)
@pytest.mark.parametrize("types", [1, 64])
def test_sizes_follow_from_the_image_the_classes_and_the_options(
    num_classes: int, image_shape: tuple[int, int, int], types: int
) -> None:
    network = small(image_shape, num_classes, capsule_types=types)
    output = network(images_for(network))
    ins = types * ((image_shape[1] - 2 - 3) // 2 + 1) * ((image_shape[2] - 2 - 3) // 2 + 1)
    assert output.scores.shape == (3, num_classes)
    assert output.pose is not None
    assert output.pose.shape == (3, num_classes, 6)
    assert output.couplings is not None
    assert output.couplings.shape == (3, ins, num_classes)
    assert output.reconstruction is not None
    assert output.reconstruction.shape == (3, *image_shape)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 28, 20), (3, 32, 32)], ids=str)
def test_published_sizes_on_published_images(shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = create("capsnet", image_shape=shape)
        output = network(torch.zeros(2, *shape, device="meta"))
    height, width = ((size - 8 - 9) // 2 + 1 for size in shape[1:])
    assert output.couplings is not None
    assert output.couplings.shape == (2, 32 * height * width, 10)


def test_an_image_too_small_is_told_which_layer_needs_what() -> None:
    with pytest.raises(InputError, match=r"^first convolution: its 9x9 kernel .* at least 9x9; got 8x30 "):
        create("capsnet", image_shape=(1, 8, 30))
    with pytest.raises(InputError, match=r"^primary capsules: its 9x9 kernel .* at least 9x9; got 8x12 "):
        create("capsnet", image_shape=(1, 16, 20))
    with torch.device("meta"):
        create("capsnet", image_shape=(1, 17, 17))
        create("capsnet", image_shape=(1, 3, 5), padding="same")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capsule_types": 0}, "^capsule_types must be at least 1; got 0$"),
        ({"conv_kernel_size": -1}, "^conv_kernel_size must be at least 1; got -1$"),
        ({"decoder_sizes": (8, 0)}, "^decoder_sizes must be numbers of 1 to"),
        ({"routing_iterations": 0}, "^routing_iterations must be at least 1; got 0$"),
        ({"padding": "full"}, "^padding must be one of valid, same; got 'full'$"),
        ({"routing_kernel": "fast"}, "^routing_kernel must be one of auto, plain, fused; got 'fast'$"),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**options)


def test_a_dropout_rate_out_of_its_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"^dropout must be in \[0, 1\); got 1.0$"):
        create("baseline", dropout=1.0)


def test_the_decoder_draws_the_capsule_of_the_label_or_else_the_longest() -> None:
    network = small()
    fill(network)
    assert network.decoder is not None
    images = images_for(network)
    with torch.no_grad():
        output = network(images)
        assert output.pose is not None
        longest = output.scores.argmax(-1)
        labels = (longest + 1) % CLASSES
        torch.testing.assert_close(output.reconstruction, network.decoder(output.pose, longest))
        by_label = network(images, labels)
        torch.testing.assert_close(by_label.reconstruction, network.decoder(output.pose, labels))
        assert not torch.allclose(by_label.reconstruction, output.reconstruction)
        assert torch.equal(by_label.scores, output.scores)


def test_without_a_decoder_there_is_no_reconstruction() -> None:
    network = small(reconstruction=False)
    output = network(images_for(network), torch.tensor([0, 1, 2]))
    assert network.decoder is None
    assert output.reconstruction is None
    assert output.pose is not None


def test_authors_options_do_what_they_say() -> None:
    network = small(routing_bias=True, init="authors", primary_scale=0.0, conv_channels=61, capsule_types=13)
    assert network.primary.scale == 1 / 13
    assert small(primary_scale=0.0, capsule_types=13, leaky=True).primary.scale == 1 / 14
    assert network.class_capsules.bias is not None
    for name, parameter in network.named_parameters():
        values = parameter.detach()
        if name.endswith("bias"):
            assert torch.equal(values, torch.full_like(values, 0.1)), name
            continue
        std = 0.05 if name == "conv.weight" else 0.1
        assert float(values.abs().max()) <= 2 * std * (1 + 1e-6)
        if values.numel() > 1000:  # a normal truncated at two deviations has 0.88 of its deviation
            assert float(values.std()) == pytest.approx(0.88 * std, rel=0.06), name
    with pytest.raises(InputError, match=r"^init must be one of pytorch, authors; got 'keras'$"):
        small(init="keras")


def test_by_default_nothing_of_the_authors_is_there() -> None:
    network = small()
    assert network.primary.scale == 1
    assert network.class_capsules.bias is None
    bound = 1 / math.sqrt(2 * 9)  # PyTorch's: uniform in +-1 / sqrt(fan in)
    for parameter in network.conv.parameters():
        assert float(parameter.detach().abs().max()) <= bound * (1 + 1e-6)


def test_detach_routing_and_kernel_reach_the_class_capsules() -> None:
    network = small(detach_routing=True, routing_kernel="plain", leaky=True, routing_iterations=4)
    layer = network.class_capsules
    assert (layer.detach_routing, layer.routing_kernel, layer.leaky, layer.iterations) == (True, "plain", True, 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28, 5), (1, 0, 28)])
def test_an_image_shape_is_three_sizes(shape: Any) -> None:
    with pytest.raises(InputError, match=r"^image_shape must be channels, height and width, each at least 1; got"):
        create("capsnet", image_shape=shape)


@pytest.mark.usefixtures("unchecked")
def test_images_of_whole_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"images must be floating point in \[0, 1\] \(divide uint8 by 255\)"):
        small()(torch.zeros(1, 2, 11, 8, dtype=torch.uint8))


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_network_is_the_same_network() -> None:
    """By torch.compile's tracer, without a C++ compiler: the kernels step aside."""
    network = create("capsnet", num_classes=3, conv_channels=5, capsule_types=2, primary_dim=3)
    images = torch.rand(9, 1, 28, 28)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    found = compiled(images).scores
    torch.testing.assert_close(found, network(images).scores, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    assert dict(network.named_parameters())["class_capsules.weight"].grad is not None
    with torch.no_grad():
        torch.testing.assert_close(compiled(images[:2]).scores, network(images[:2]).scores, rtol=1e-4, atol=1e-6)


# images of several objects


@pytest.mark.parametrize(("model", "count"), [("baseline-multimnist", 24_563_978), ("capsnet", 11_361_808)])
def test_multimnist_networks_have_the_published_number_of_parameters(model: str, count: int) -> None:
    with torch.device("meta"):
        assert create(model, image_shape=(1, 36, 36), objects_per_image=2).parameter_count() == count


def test_the_baseline_of_multimnist_is_two_convolutions_with_pooling_and_two_linear_layers() -> None:
    network = create("baseline-multimnist", image_shape=(3, 11, 6), num_classes=4, width=0.01, dropout=0.25)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(5, 3, 9, 9), (3, 5, 5, 5), (10, 3 * 2), (4, 10)]
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.25]
    images = images_for(network, 2)
    with torch.no_grad():
        x = nn.functional.max_pool2d(layers[0](images).relu(), 2)
        x = nn.functional.max_pool2d(layers[1](x).relu(), 2)
        x = layers[3](layers[2](x.flatten(1)).relu())
        torch.testing.assert_close(network.eval()(images).scores, x)


def test_the_width_is_a_factor_on_every_layer_of_a_baseline() -> None:
    with torch.device("meta"):
        for name, sizes in (
            ("baseline", (128, 128, 64, 164, 96)),
            ("baseline-multimnist", (256, 128, 512)),
        ):
            network = create(name, image_shape=(1, 8, 8), width=0.5)
            layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
            assert tuple(len(layer.weight) for layer in layers) == (*sizes, 10)
        least = create("baseline-multimnist", image_shape=(1, 8, 8), width=1e-6)
        assert min(len(parameter) for parameter in least.parameters()) == 1
    for width, rule in (
        (0.0, "above 0"),
        (-1.0, "above 0"),
        (math.inf, "a finite number"),
        (math.nan, "a finite number"),
    ):
        with pytest.raises(InputError, match=rf"^width must be {rule}; got {width}$"):
            create("baseline-multimnist", width=width)
    with pytest.raises(InputError, match=r"^dropout must be in \[0, 1\); got -0.1$"):
        create("baseline-multimnist", dropout=-0.1)


@pytest.mark.parametrize("shape", [(1, 3, 9), (1, 9, 3)], ids=str)
def test_an_image_too_small_to_pool_twice_is_refused(shape: tuple[int, int, int]) -> None:
    message = rf"^images of baseline-multimnist must be at least 4 x 4 pixels; got {shape[1]} x {shape[2]}$"
    with pytest.raises(InputError, match=message):
        create("baseline-multimnist", image_shape=shape)
    create("baseline-multimnist", image_shape=(1, 4, 4), width=0.01)


@pytest.mark.parametrize("k", [2, 3])
def test_of_several_objects_each_is_drawn_from_one_of_the_longest_capsules_or_of_the_labels(k: int) -> None:
    network = small(objects_per_image=k)
    fill(network)
    assert network.objects_per_image == network.config["objects_per_image"] == k
    assert network.decoder is not None
    images = images_for(network)
    labels = torch.tensor([[6, 0, 3], [1, 2, 0], [0, 5, 6]])[:, :k]
    with torch.no_grad():
        output, by_label = network(images), network(images, labels)
        assert output.pose is not None
        longest = output.scores.argsort(-1, descending=True)[:, :k]
        for found, index in ((output, longest), (by_label, labels)):
            assert found.reconstruction is not None
            assert found.reconstruction.shape == (3, k, *SHAPE)
            torch.testing.assert_close(found.reconstruction, network.decoder(output.pose, index))


@pytest.mark.parametrize("objects", [0, 8])
def test_there_are_not_more_objects_than_classes(objects: int) -> None:
    with pytest.raises(InputError, match=rf"^objects_per_image must be 1 to the 7 classes; got {objects}$"):
        small(objects_per_image=objects)


@every_model
def test_objects_and_every_option_come_back_from_disk(name: str, tmp_path: Path) -> None:
    sizes = {"squash_epsilon": 1e-7, **SMALL} if name == "capsnet" else sizes_of(name)
    network = create(name, image_shape=SHAPE, num_classes=5, objects_per_image=2, standardize=True, **sizes).eval()
    pretrained.save_pretrained(network, tmp_path / "net")
    again = pretrained.load(tmp_path / "net")
    assert again.objects_per_image == 2
    assert again.config == network.config
    images = images_for(network)
    with torch.no_grad():
        assert torch.equal(again(images).scores, network(images).scores)


def test_labels_must_tell_as_many_objects_as_the_network_looks_for() -> None:
    one, two = small(), small(objects_per_image=2)
    one.check_labels(torch.zeros(5, dtype=torch.int64))
    two.check_labels(torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^images must show 1 object each; got 2$"):
        one.check_labels(torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^images must show 2 objects each; got 1$"):
        two.check_labels(torch.zeros(5, dtype=torch.int64))


# standardize


@every_model
def test_standardized_images_are_what_a_network_sees_that_standardizes(name: str) -> None:
    sizes = sizes_of(name)
    plain, ours = (
        moved(create(name, image_shape=SHAPE, num_classes=5, standardize=on, **sizes)).eval() for on in (False, True)
    )
    ours.load_state_dict(plain.state_dict())
    images = images_for(plain)
    with torch.no_grad():
        found, expected = ours(images), plain(F.per_image_standardize(images))
        torch.testing.assert_close(found.scores, expected.scores)
        assert not torch.allclose(found.scores, plain(images).scores)
        torch.testing.assert_close(ours(images * 0.5 + 0.5).scores, found.scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stem", ["direct", "winograd"])
def test_both_stems_standardize(stem: str) -> None:
    ours = small(standardize=True, convolution=stem).double()
    plain = small(convolution=stem).double()
    plain.load_state_dict(ours.state_dict())
    images = images_for(ours, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images).scores, plain(F.per_image_standardize(images)).scores, rtol=1e-10, atol=1e-12
        )


def test_the_epsilon_of_squash_reaches_both_layers_of_capsules() -> None:
    network = small(squash_epsilon=1e-3)
    assert (network.primary.epsilon, network.class_capsules.epsilon) == (1e-3, 1e-3)
    assert (small().primary.epsilon, small().class_capsules.epsilon) == (0.0, 0.0)
