"""Networks to which users attach things: hooks, pruning, norms and parametrizations of weights, torch.func, threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from capsnet.data import Split
from capsnet.errors import InputError
from capsnet.evaluation import evaluate
from capsnet.kernels.select import is_bare
from capsnet.layers import Convolution
from capsnet.models import Network, create, evaluation_mode
from capsnet.models.capsnet import CapsNet
from tiny import in_threads

SHAPE = (1, 20, 20)


def network(seed: int = 0, *, stem: str = "auto", kernel: str = "auto") -> CapsNet:
    torch.manual_seed(seed)
    made = create(
        "capsnet",
        image_shape=SHAPE,
        num_classes=4,
        conv_channels=6,
        conv_kernel_size=5,
        capsule_types=2,
        primary_dim=4,
        primary_kernel_size=5,
        class_dim=5,
        decoder_sizes=(16,),
        convolution=stem,
        routing_kernel=kernel,
    )
    assert isinstance(made, CapsNet)
    with torch.no_grad():
        for parameter in made.parameters():  # or scores are so small that nothing is compared
            parameter.add_(0.2 * torch.rand_like(parameter))
    return made


IMAGES = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(1))


def module(net: CapsNet, name: str) -> nn.Module:
    return net.get_submodule(name)


@pytest.mark.parametrize("name", ["conv", "primary", "primary.conv", "class_capsules", "decoder"])
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
def test_hooks_fire_on_every_module(name: str, gradients: bool) -> None:
    net, seen = network(), []
    module(net, name).register_forward_hook(lambda *_: seen.append("forward"))
    module(net, name).register_forward_pre_hook(lambda *_: seen.append("before"))
    with torch.set_grad_enabled(gradients):
        net(IMAGES)
    assert seen == ["before", "forward"]


@pytest.mark.parametrize("name", ["conv", "primary", "primary.conv"])
def test_backward_hooks_fire(name: str) -> None:
    net, seen = network(), []
    module(net, name).register_full_backward_hook(lambda *_: seen.append(name))
    net(IMAGES.clone().requires_grad_()).scores.sum().backward()
    assert seen == [name]


def test_features_of_a_hook_are_those_of_the_convolution() -> None:
    net, seen = network(), list[Tensor]()
    handle = net.primary.conv.register_forward_hook(lambda _, __, output: seen.append(output))
    hooked = net(IMAGES).scores
    handle.remove()
    torch.testing.assert_close(
        net.primary(torch.relu(net.conv(IMAGES))), net.primary_poses(IMAGES), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(seen[0], net.primary.conv(torch.relu(net.conv(IMAGES))))
    torch.testing.assert_close(hooked, net(IMAGES).scores, rtol=1e-3, atol=1e-5)


def test_a_counter_of_operations_sees_each_module() -> None:
    net = network()
    counter = FlopCounterMode(display=False)
    with counter:
        net(IMAGES)
    counts = counter.get_flop_counts()
    out, k, channels = 16 * 16, 5 * 5, 6
    assert sum(counts["CapsNet.conv"].values()) == 2 * 9 * out * k * channels


def _prune(net: CapsNet) -> None:
    prune.random_unstructured(net.primary.conv, "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.random_unstructured(net.conv, "weight", 0.5)  # type: ignore[no-untyped-call]


def _parametrize(make: Callable[..., nn.Module]) -> Callable[[CapsNet], None]:
    def change(net: CapsNet) -> None:
        make(net.conv, "weight")
        make(net.primary.conv, "weight")

    return change


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


CHANGES: dict[str, Callable[[CapsNet], None]] = {
    "prune": _prune,
    "weight_norm": _parametrize(parametrizations.weight_norm),
    "spectral_norm": _parametrize(parametrizations.spectral_norm),
    "old weight_norm": _parametrize(nn.utils.weight_norm),
    "old spectral_norm": _parametrize(nn.utils.spectral_norm),
    "parametrization": _parametrize(lambda m, name: nn.utils.parametrize.register_parametrization(m, name, _Half())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_changed_weights_train_and_are_used_as_they_are_now(change: Callable[[CapsNet], None]) -> None:
    """Against the plain way: before and after a step, whose second one fails where an old weight is used."""
    results = []
    for stem, kernel in (("auto", "auto"), ("direct", "plain")):
        net = network(stem=stem, kernel=kernel)
        torch.manual_seed(1)
        change(net.double())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scores = []
        for _ in range(3):
            output = net(IMAGES.double())
            scores.append(output.scores.detach())
            optimizer.zero_grad()
            output.scores.square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            scores.append(net.eval()(IMAGES.double()).scores)
        results.append(torch.stack(scores))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-10)
    assert (results[0][0] - results[0][1]).abs().max() > 1e-4


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_evaluation_of_changed_weights(change: Callable[[CapsNet], None]) -> None:
    """One network after the other, as an average over folds does."""
    split = Split((255 * IMAGES).to(torch.uint8), torch.arange(9) % 4)
    for seed in range(3):
        losses = []
        for stem in ("auto", "direct"):
            net = network(seed, stem=stem)
            torch.manual_seed(1)
            change(net)
            losses.append(evaluate(net, split, batch_size=9).loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_another_forward_is_called() -> None:
    class Louder(Convolution):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net, wanted = network(), network(stem="direct")
    for one in (net, wanted):
        one.conv.__class__ = Louder
    torch.testing.assert_close(net(IMAGES).scores, wanted(IMAGES).scores)

    net, forward = network(), Convolution.forward
    net.primary.conv.forward = lambda x: 0 * forward(net.primary.conv, x)  # type: ignore[method-assign]
    lengths = net.primary_poses(IMAGES).reshape(9, -1, 4)
    assert torch.equal(lengths[:, 0], lengths[:, 2])  # of the bias alone: at every position the same


def test_minimal_refuses_modules_that_are_not_bare() -> None:
    net = network(stem="winograd")
    handle = net.primary.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"convolution winograd got .* with hooks, .*; use convolution direct"):
        net(IMAGES)
    handle.remove()
    assert net.resolved_convolution(IMAGES) == "winograd"


def test_hooks_of_all_modules_count() -> None:
    net = network()
    assert is_bare(net.conv, Convolution)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_bare(net.conv, Convolution)
    finally:
        handle.remove()


# torch.func


@pytest.mark.parametrize(("stem", "kernel"), [("auto", "auto"), ("direct", "plain")])
def test_vmap_over_images_is_a_loop_over_them(stem: str, kernel: str) -> None:
    net = network(stem=stem, kernel=kernel)
    stack = torch.rand(3, 2, *SHAPE)
    mapped = torch.func.vmap(lambda images: net(images).reconstruction)(stack)
    torch.testing.assert_close(
        mapped, torch.stack([net(images).reconstruction for images in stack]), rtol=1e-4, atol=1e-5
    )


def test_gradients_of_each_image_are_those_of_a_loop() -> None:
    net, images = network(), torch.rand(3, *SHAPE)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def score(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        output = torch.func.functional_call(net, parameters, (image[None],))
        return torch.as_tensor(output.scores.square().sum())

    together = torch.func.vmap(torch.func.grad(score), (None, 0))(parameters, images)
    for k, image in enumerate(images):
        net.zero_grad()
        net(image[None]).scores.square().sum().backward()
        for name, p in net.named_parameters():
            if not name.startswith("decoder"):
                assert p.grad is not None
                torch.testing.assert_close(together[name][k], p.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_forward_mode_is_the_difference_quotient() -> None:
    net = network().double()
    x, direction = IMAGES.double(), torch.rand(9, *SHAPE).double()
    slope = torch.func.jvp(lambda x: net(x).scores, (x,), (direction,))[1]
    step = 1e-6
    wanted = (net(x + step * direction).scores - net(x - step * direction).scores) / (2 * step)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("images", [3, 12])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_traced_network_is_the_same_network(images: int, gradients: bool) -> None:
    """While it traces, sizes are tensors, which no kernel may take for numbers."""
    net, given = network().eval(), torch.rand(images, *SHAPE)
    for parameter in net.parameters():
        parameter.requires_grad_(gradients)
    traced = torch.jit.trace(_Scores(net), given, check_trace=False)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(given), net(given).scores, rtol=1e-3, atol=1e-5)


class _Scores(nn.Module):
    def __init__(self, net: CapsNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.net(images).scores)


def test_the_fused_kernel_names_what_to_use_in_transforms() -> None:
    net = network(kernel="fused")
    with pytest.raises(
        InputError, match=r"routing_kernel fused must run outside torch.func and torch.jit.trace; use plain"
    ):
        torch.func.vmap(lambda images: net(images).scores)(torch.rand(3, 2, *SHAPE))


# evaluation mode


def dropout() -> Network:
    torch.manual_seed(0)
    return create("baseline", image_shape=SHAPE, num_classes=4, width=0.05)


def test_evaluation_mode_gives_each_module_its_own_mode_back() -> None:
    net = dropout()
    frozen = next(iter(net.children()))
    frozen.eval()
    before = {name: one.training for name, one in net.named_modules()}
    with evaluation_mode(net), evaluation_mode(frozen):
        assert not any(one.training for one in net.modules())
    assert {name: one.training for name, one in net.named_modules()} == before
    assert set(before.values()) == {True, False}


def test_evaluation_mode_ends_when_something_raises() -> None:
    net = dropout()
    split = Split((255 * IMAGES).to(torch.uint8), torch.full((9,), 77))  # no such class
    with pytest.raises((IndexError, RuntimeError)):
        evaluate(net, split)
    assert all(one.training for one in net.modules())


def tasks(networks: list[Network], split: Split, found: dict[int, list[Any]]) -> list[Callable[[], object]]:
    def task(k: int) -> Callable[[], object]:
        return lambda: found.setdefault(k, []).extend(
            evaluate(networks[k % len(networks)], split, batch_size=4 + k).to_dict() for _ in range(12)
        )

    return [task(k) for k in range(4)]


@pytest.mark.parametrize("count", [1, 4], ids=["one network", "four networks"])
@pytest.mark.parametrize("kind", ["capsnet", "baseline"])
def test_four_threads_evaluate_as_one_does(kind: str, count: int) -> None:
    """In training mode, so that the dropout of the baseline would show a mode that is not kept."""
    images = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    split = Split(images, torch.arange(40) % 4)
    networks: list[Network] = [network(k) if kind == "capsnet" else dropout() for k in range(count)]
    wanted = [evaluate(net, split).to_dict() for net in networks]
    found: dict[int, list[dict[str, Any]]] = {}
    in_threads(tasks([net.train() for net in networks], split, found))
    for k, results in found.items():
        for result in results:
            assert result["confusion"] == wanted[k % count]["confusion"]
            assert result["loss"] == pytest.approx(wanted[k % count]["loss"], rel=1e-4)
    assert all(one.training for net in networks for one in net.modules())


def test_four_threads_train_their_own_networks_as_one_does() -> None:
    def trained(k: int) -> Tensor:
        torch.manual_seed(0)
        net = networks[k]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step in range(6):
            optimizer.zero_grad()
            net(IMAGES[: 9 - step % 2]).scores.square().sum().backward()
            optimizer.step()
        return net.class_capsules.weight.detach().clone()

    networks = [network(k) for k in range(4)]
    alone = [trained(k) for k in range(4)]
    networks = [network(k) for k in range(4)]
    found: dict[int, Tensor] = {}
    in_threads([lambda k=k: found.update({k: trained(k)}) for k in range(4)])  # type: ignore[misc]
    for k, weight in enumerate(alone):
        torch.testing.assert_close(found[k], weight, rtol=1e-4, atol=1e-6)
