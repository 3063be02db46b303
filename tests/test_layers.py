import math
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capsnet import functional as F
from capsnet import reference
from capsnet.errors import InputError
from capsnet.kernels import fused, sweeps_triton
from capsnet.kernels.select import ROUTING_KERNELS, SMALL_BATCH, resolve_routing_kernel
from capsnet.layers import ClassCapsules, Convolution, Decoder, PrimaryCapsules
from capsnet.routing import dynamic_routing

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same first weights in every run."""
    torch.manual_seed(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def numbers(module: nn.Module) -> dict[str, NDArray[np.float64]]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def in_torch_order(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[kernel, kernel, in, out]` as `[out, in, kernel, kernel]`."""
    return weight.transpose(3, 2, 0, 1)


# convolution


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after", "out"),
    [
        (7, 3, 2, 1, 1, 4),
        (8, 3, 2, 0, 1, 4),  # the odd pixel of padding is at the end
        (5, 9, 2, 4, 4, 3),  # a kernel larger than the image
        (6, 4, 1, 1, 2, 6),
        (9, 2, 3, 0, 0, 3),  # a step larger than the kernel: nothing to pad
        (28, 5, 1, 2, 2, 28),
    ],
)
def test_same_padding_is_that_of_tensorflow(
    size: int, kernel: int, stride: int, before: int, after: int, out: int
) -> None:
    height = 11  # padded by the same rule, not by the same amount
    total = max((math.ceil(height / stride) - 1) * stride + kernel - height, 0)
    layer = Convolution(2, 3, kernel, stride, in_size=(height, size), padding="same", name="layer").double()
    grid = layer.out_size
    assert grid == (math.ceil(height / stride), out)
    image = random(2, height, size).numpy()
    padded = np.pad(image, ((0, 0), (total // 2, total - total // 2), (before, after)))
    weight, bias = in_torch_order(numbers(layer)["weight"]), numbers(layer)["bias"]
    golden = reference.conv2d(padded, weight, bias, stride)
    with torch.no_grad():
        found = layer(torch.from_numpy(image)[None])[0]
    assert tuple(found.shape) == (3, *grid)
    np.testing.assert_allclose(found, golden, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_valid_convolution_equals_the_reference(stride: int) -> None:
    layer = Convolution(2, 3, 4, stride, in_size=(7, 11), padding="valid", name="layer").double()
    grid = layer.out_size
    image = random(2, 7, 11)
    weight, bias = in_torch_order(numbers(layer)["weight"]), numbers(layer)["bias"]
    with torch.no_grad():
        found = layer(image[None])[0]
    assert tuple(found.shape) == (3, *grid) == (3, (7 - 4) // stride + 1, (11 - 4) // stride + 1)
    np.testing.assert_allclose(found, reference.conv2d(image.numpy(), weight, bias, stride), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [(8, 20), (20, 8)])
def test_a_small_image_is_told_the_layer_the_need_and_what_came(size: tuple[int, int]) -> None:
    message = rf"^some layer: its 9x9 kernel needs an input of at least 9x9; got {size[0]}x{size[1]} \(use larger"
    with pytest.raises(InputError, match=message):
        Convolution(1, 2, 9, 1, in_size=size, padding="valid", name="some layer")
    Convolution(1, 2, 9, 1, in_size=size, padding="same", name="some layer")
    Convolution(1, 2, 8, 1, in_size=size, padding="valid", name="some layer")


def test_an_unknown_padding_is_refused() -> None:
    with pytest.raises(InputError, match=r"^padding must be valid or same; got 'full'$"):
        Convolution(1, 2, 9, 1, in_size=(20, 20), padding="full", name="layer")


# primary capsules


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_primary_capsules_are_in_the_documented_order(scale: float, padding: str) -> None:
    """Capsule (y * width + x) * types + type holds channels type * dim ... type * dim + dim - 1 at (y, x)."""
    types, dim = 5, 3
    layer = PrimaryCapsules(
        2, types=types, dim=dim, kernel_size=3, stride=2, in_size=(7, 10), padding=padding, scale=scale
    ).double()
    image = random(2, 7, 10).numpy()
    rows, columns = layer.conv.out_size
    padded = np.pad(image, ((0, 0), (1, 1), (0, 1))) if padding == "same" else image
    weight = in_torch_order(numbers(layer)["conv.weight"])
    bias = numbers(layer)["bias"]
    grid = reference.conv2d(padded, weight, np.zeros(types * dim), 2)
    assert grid.shape[1:] == (rows, columns) == ((3, 4) if padding == "valid" else (4, 5))
    with torch.no_grad():
        pose = layer(torch.from_numpy(image)[None])[0]
    assert tuple(pose.shape) == (layer.capsules, dim) == (rows * columns * types, dim)
    for y in range(rows):
        for x in range(columns):
            for kind in range(types):
                channels = slice(kind * dim, kind * dim + dim)
                golden = reference.squash(scale * grid[channels, y, x] + bias[channels])
                np.testing.assert_allclose(pose[(y * columns + x) * types + kind], golden, rtol=1e-11, atol=1e-13)


def test_primary_capsules_start_as_pytorch_starts_a_convolution() -> None:
    layer = PrimaryCapsules(64, types=7, dim=11, kernel_size=5, in_size=(9, 9))
    bound = 1 / math.sqrt(64 * 5 * 5)
    for parameter in layer.parameters():
        assert float(parameter.detach().abs().max()) <= bound * (1 + 1e-6)
        assert float(parameter.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_primary_capsules_too_small_names_them() -> None:
    with pytest.raises(InputError, match=r"^primary capsules: its 9x9 kernel needs .* at least 9x9; got 8x12"):
        PrimaryCapsules(1, in_size=(8, 12))


def test_primary_capsules_are_float32_under_autocast() -> None:
    layer = PrimaryCapsules(2, types=3, dim=5, kernel_size=3, in_size=(7, 7))
    images = torch.rand(2, 2, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(images)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, layer(images), rtol=0.1, atol=0.02)
    assert not torch.equal(inside, layer(images)), "the convolution itself is done in bfloat16"


# class capsules


@pytest.mark.parametrize("kernel", ROUTING_KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
def test_class_capsules_equal_the_reference(kernel: str, bias: bool, leaky: bool) -> None:
    layer = ClassCapsules(7, 3, 5, 2, iterations=3, bias=bias, leaky=leaky, routing_kernel=kernel).double()
    u = random(2, 7, 3)
    with torch.no_grad():
        layer.weight.mul_(10)
        result = layer(u)
    beta = numbers(layer).get("bias")
    for k in range(2):
        v, c = reference.dynamic_routing(reference.votes(u[k].numpy(), numbers(layer)["weight"]), 3, beta, leaky)
        np.testing.assert_allclose(result.pose[k], v, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(result.couplings[k], c, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_class_capsules_pass_on_iterations_and_detach_routing(kernel: str) -> None:
    layers = {
        options: ClassCapsules(
            7, 3, 5, 2, iterations=options[0], detach_routing=options[1], routing_kernel=kernel
        ).double()
        for options in ((1, False), (3, False), (3, True))
    }
    poses, gradients = {}, {}
    for options, layer in layers.items():
        with torch.no_grad():
            layer.weight.copy_(random(7, 3, 5, 2, seed=1))
        poses[options] = layer(random(2, 7, 3)).pose
        (gradients[options],) = torch.autograd.grad(poses[options].square().sum(), layer.weight)
    assert torch.equal(poses[3, False], poses[3, True])
    assert not torch.allclose(gradients[3, False], gradients[3, True])
    assert not torch.allclose(poses[1, False], poses[3, False])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_class_capsules_work_in_float32_from_half_precision(dtype: torch.dtype, kernel: str) -> None:
    layer = ClassCapsules(7, 3, 5, 2, routing_kernel=kernel)
    u = random(2, 7, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(u)
    for part, expected in zip(result, layer(u.float()), strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, expected)


def test_class_capsules_start_as_documented() -> None:
    layer = ClassCapsules(71, 7, 11, 13, bias=True)
    assert tuple(layer.weight.shape) == (71, 7, 11, 13)
    assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=0.002)
    assert float(layer.weight.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert float(layer.weight.detach().abs().max()) > 0.3, "normal, not truncated"
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.full((11, 13), 0.1))
    assert ClassCapsules(2, 3, 5).bias is None


def test_class_capsules_print_their_sizes() -> None:
    text = repr(ClassCapsules(7, 3, 5, 2, iterations=4, routing_kernel="plain"))
    assert text == "ClassCapsules(7 x 3-D -> 5 x 2-D, iterations=4, routing_kernel=plain)"


def test_class_capsules_refuse_wrong_options_when_built() -> None:
    with pytest.raises(InputError, match=r"^routing iterations must be at least 1; got 0$"):
        ClassCapsules(7, 3, 5, iterations=0)
    with pytest.raises(InputError, match=r"^routing_kernel must be one of auto, plain, fused; got 'fast'$"):
        ClassCapsules(7, 3, 5, routing_kernel="fast")


def test_kernels_resolve_by_device() -> None:
    assert [resolve_routing_kernel("auto", device) for device in (CPU, CUDA)] == ["fused", "plain"]
    assert [resolve_routing_kernel(kernel, CPU, small=True) for kernel in ROUTING_KERNELS] == [
        "plain",
        "plain",
        "fused",
    ]
    assert [resolve_routing_kernel("plain", device) for device in (CPU, CUDA)] == ["plain", "plain"]
    assert [resolve_routing_kernel("fused", device) for device in (CPU, META)] == ["fused", "fused"]
    with pytest.raises(
        InputError, match=r"^routing_kernel fused must run on a CPU or a CUDA GPU; got a tensor on mps$"
    ):
        resolve_routing_kernel("fused", torch.device("mps"))


def test_small_votes_without_gradients_are_routed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ClassCapsules(1152, 8, 10, 16)
    monkeypatch.setattr(fused, "votes_and_routing", mock.Mock(side_effect=AssertionError("fused")))
    five, six = torch.rand(5, 1152, 8), torch.rand(6, 1152, 8)
    with torch.no_grad():
        layer(five)
        with pytest.raises(AssertionError, match="fused"):
            layer(six)
    with pytest.raises(AssertionError, match="fused"):
        layer(five)


def test_the_fused_kernel_on_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps_triton, "available", lambda: False)
    with pytest.raises(
        InputError, match=r"^routing_kernel fused must have Triton on a GPU; it is not installed \(pip install"
    ):
        resolve_routing_kernel("fused", CUDA)
    monkeypatch.setattr(sweeps_triton, "available", lambda: True)
    assert resolve_routing_kernel("fused", CUDA) == "fused"


# convolution


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_small_batch_is_convolved_by_one_product_and_equal(padding: str, stride: int, bias: bool) -> None:
    layer = Convolution(3, 7, 5, stride, in_size=(17, 13), padding=padding, name="it", bias=bias).double()
    images = random(4, 3, 17, 13)
    expected = layer(images)
    with torch.no_grad(), mock.patch.object(nn.functional, "conv2d", side_effect=AssertionError("not one product")):
        found = layer(images)
        with pytest.raises(AssertionError, match="not one product"):
            layer(random(SMALL_BATCH + 1, 3, 17, 13))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


# decoder


def test_decoder_is_relu_layers_and_a_sigmoid_on_the_masked_pose() -> None:
    decoder = Decoder(5, 3, (2, 3, 7), (11, 13)).double()
    pose, index = random(4, 5, 3), torch.tensor([0, 4, 2, 2])
    weights = list(numbers(decoder).values())
    assert [w.shape for w in weights] == [(11, 15), (11,), (13, 11), (13,), (42, 13), (42,)]
    with torch.no_grad():
        found = decoder(pose, index)
    for k in range(4):
        masked = np.zeros((5, 3))
        masked[index[k]] = pose[k, index[k]]
        x = masked.reshape(-1)
        x = np.maximum(weights[0] @ x + weights[1], 0)
        x = np.maximum(weights[2] @ x + weights[3], 0)
        x = 1 / (1 + np.exp(-(weights[4] @ x + weights[5])))
        np.testing.assert_allclose(found[k], x.reshape(2, 3, 7), rtol=1e-12)


def test_decoder_without_hidden_layers_and_of_no_images() -> None:
    decoder = Decoder(5, 3, (2, 3, 7), ())
    assert decoder(torch.rand(0, 5, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 2, 3, 7)
    assert sum(p.numel() for p in decoder.parameters()) == 15 * 42 + 42


def test_decoder_draws_in_float32_under_autocast() -> None:
    decoder = Decoder(5, 3, (2, 3, 7), (11,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(torch.rand(2, 5, 3), torch.tensor([1, 2])).dtype == torch.float32


def test_layers_use_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each equation is in one place: without the function there is no layer."""
    layer = PrimaryCapsules(2, types=3, dim=5, kernel_size=3, in_size=(7, 7))
    monkeypatch.setattr(F, "squash", lambda s, epsilon: s * 0 + 7)
    assert (layer(torch.rand(2, 2, 7, 7)) == 7).all()


def test_the_decoder_draws_each_of_several_capsules_alone() -> None:
    decoder = Decoder(5, 3, (2, 3, 7), (11,)).double()
    pose = random(4, 5, 3)
    index = torch.tensor([[0, 4, 1], [4, 0, 2], [2, 3, 4], [1, 0, 3]])
    with torch.no_grad():
        found = decoder(pose, index)
        alone = torch.stack([decoder(pose, column) for column in index.unbind(1)], dim=1)
    assert found.shape == (4, 3, 2, 3, 7)
    torch.testing.assert_close(found, alone, rtol=1e-13, atol=0)
    assert not torch.allclose(found[:, 0], found[:, 1])


# epsilon


def test_the_layers_pass_the_epsilon_on_to_squash() -> None:
    epsilon = 0.3
    primary = PrimaryCapsules(2, types=3, dim=5, kernel_size=3, in_size=(7, 7), epsilon=epsilon).double()
    images = random(2, 2, 7, 7)
    with torch.no_grad():
        grid = primary.conv(images).permute(0, 2, 3, 1) + primary.bias
        expected = F.squash(grid.reshape(2, -1, 5), epsilon=epsilon)
        torch.testing.assert_close(primary(images), expected, rtol=1e-12, atol=1e-14)
    layer = ClassCapsules(7, 3, 5, 2, bias=True, leaky=True, epsilon=epsilon).double()
    u = random(2, 7, 3)
    with torch.no_grad():
        layer.weight.mul_(10)
        found = layer(u)
        votes = torch.einsum("nip,ipjd->nijd", u, layer.weight)
        routed = dynamic_routing(votes, bias=layer.bias, leaky=True, epsilon=epsilon)
        plain = dynamic_routing(votes, bias=layer.bias, leaky=True)
    torch.testing.assert_close(found.pose, routed.pose, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found.pose, plain.pose)


def test_an_epsilon_is_for_the_plain_kernel_only() -> None:
    assert [
        ClassCapsules(7, 3, 5, routing_kernel=kernel, epsilon=1e-9).routing_kernel for kernel in ("auto", "plain")
    ] == [
        "plain",
        "plain",
    ]
    assert ClassCapsules(7, 3, 5).routing_kernel == "auto"
    message = r"^routing_kernel must be plain or auto with an epsilon in squash, here 1e-09; got fused$"
    with pytest.raises(InputError, match=message):
        ClassCapsules(7, 3, 5, routing_kernel="fused", epsilon=1e-9)
