import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capsnet import reference
from capsnet.config import Config, preset
from capsnet.models import Network, create
from capsnet.objective import Losses, Objective

LABELS = torch.tensor([6, 0, 3])


def network(*, reconstruction: bool = True) -> Network:
    torch.manual_seed(0)
    built = create(
        "capsnet",
        image_shape=(2, 11, 8),
        num_classes=7,
        conv_channels=5,
        conv_kernel=3,
        capsule_types=3,
        primary_dim=4,
        primary_kernel=3,
        class_dim=6,
        decoder_sizes=(9,),
        reconstruction=reconstruction,
    )
    for name, parameter in built.named_parameters():
        if name in ("conv.weight", "primary.conv.weight"):  # large enough for capsules of different lengths
            nn.init.normal_(parameter, std=0.5)
    return built


def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).uniform(size=(3, 2, 11, 8))).float()


def check(losses: Losses, config: Config, inputs: Tensor) -> None:
    """Every loss of every example, by the NumPy functions, from what the network put out."""
    output = losses.output
    for k in range(3):
        margin = reference.margin_loss(
            output.scores[k].detach().double().numpy(),
            {int(LABELS[k])},
            config.m_pos,
            config.m_neg,
            config.down_weight,
        )
        assert losses.classification[k].item() == pytest.approx(config.margin_scale * margin, rel=1e-5)
        squared = 0.0
        if output.reconstruction is not None:
            drawn = output.reconstruction[k].detach().double().numpy()
            squared = reference.reconstruction_loss(drawn, inputs[k].double().numpy())
        assert losses.reconstruction[k].item() == pytest.approx(squared, rel=1e-5)
        total = config.margin_scale * margin + config.reconstruction_weight * squared
        assert losses.total[k].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        preset("authors"),
        Config(margin_scale=3.0, reconstruction_weight=0.07, m_pos=0.8, m_neg=0.2, down_weight=0.3),
    ],
    ids=["paper", "authors", "changed"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_total_is_scaled_margin_loss_and_weighted_squared_error(config: Config, training: bool) -> None:
    losses = Objective(network(), config).train(training)(images(), LABELS)
    assert [tuple(x.shape) for x in losses[:3]] == [(3,), (3,), (3,)]
    assert (losses.reconstruction > 1).all()
    check(losses, config, images())


def test_without_a_decoder_the_total_is_the_margin_loss() -> None:
    losses = Objective(network(reconstruction=False), Config())(images(), LABELS)
    assert torch.equal(losses.total, losses.classification)
    assert torch.equal(losses.reconstruction, torch.zeros(3))
    check(losses, Config(), images())


@pytest.mark.parametrize(
    ("training", "mask", "by_label"),
    [(True, "label", True), (True, "prediction", False), (False, "label", False), (False, "prediction", False)],
)
def test_the_label_is_seen_by_the_decoder_in_training_only(training: bool, mask: str, by_label: bool) -> None:
    net = network()
    objective = Objective(net, Config(mask=mask)).train(training)  # type: ignore[arg-type]
    with torch.no_grad():
        found = objective(images(), LABELS).output.reconstruction
        label, longest = net(images(), LABELS).reconstruction, net(images()).reconstruction
    assert not torch.allclose(label, longest)
    assert torch.equal(found, label if by_label else longest)


def test_a_network_without_capsules_has_its_cross_entropy() -> None:
    torch.manual_seed(0)
    net = create("baseline", image_shape=(1, 5, 7), num_classes=7)
    losses = Objective(net, Config()).eval()(torch.rand(3, 1, 5, 7), LABELS)
    logits = losses.output.scores.detach().double()
    expected = logits.exp().sum(1).log() - logits[torch.arange(3), LABELS]
    torch.testing.assert_close(losses.total.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(losses.total, losses.classification)
    assert torch.equal(losses.reconstruction, torch.zeros(3))


@pytest.mark.parametrize("model", ["capsnet", "baseline"])
def test_losses_stay_float32_under_autocast(model: str) -> None:
    torch.manual_seed(0)
    net = network() if model == "capsnet" else create("baseline", image_shape=(2, 11, 8), num_classes=7)
    objective = Objective(net, Config()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(images(), LABELS)
    for name, x in (*zip(losses._fields, losses[:3], strict=False), *losses.output._asdict().items()):
        assert x is None or x.dtype == torch.float32, name
    torch.testing.assert_close(losses.total, objective(images(), LABELS).total, rtol=0.05, atol=0.01)
    if model == "capsnet":
        check(losses, Config(), images())  # to 1e-5: the losses themselves are not computed in bfloat16
    torch.autograd.backward(losses.total.mean())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_one_example_has_the_loss_it_has_in_a_batch() -> None:
    objective = Objective(network(), Config())
    together = objective(images(), LABELS)
    alone = objective(images()[1:2], LABELS[1:2])
    torch.testing.assert_close(alone.total, together.total[1:2])
