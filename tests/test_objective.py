from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet import reference
from capsnet.config import Config, preset
from capsnet.data.overlay import overlay
from capsnet.errors import InputError
from capsnet.models import Network, Output, create
from capsnet.models.capsnet import CapsNet
from capsnet.objective import Losses, Objective, class_weights

LABELS = torch.tensor([6, 0, 3])


def network(*, reconstruction: bool = True, objects: int = 1) -> Network:
    torch.manual_seed(0)
    built = create(
        "capsnet",
        image_shape=(2, 11, 8),
        num_classes=7,
        conv_channels=5,
        conv_kernel_size=3,
        capsule_types=3,
        primary_dim=4,
        primary_kernel_size=3,
        class_dim=6,
        decoder_sizes=(9,),
        reconstruction=reconstruction,
        objects_per_image=objects,
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
        Config.of(margin_scale=3.0, reconstruction_weight=0.07, m_pos=0.8, m_neg=0.2, down_weight=0.3),
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
    objective = Objective(net, Config.of(mask=mask)).train(training)
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


# several objects in each image

PAIRS = torch.tensor([[6, 0], [1, 3], [3, 2], [5, 4], [0, 6]])


def of_pairs(**options: Any) -> Network:
    """A network whose two longest capsules are not in the order of the classes for every image."""
    built = network(objects=2, **options)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith(("class_capsules", "decoder")):
                parameter.normal_()
    return built


def objects() -> Tensor:
    return torch.from_numpy(np.random.default_rng(4).uniform(-1, 1, size=(5, 2, 2, 11, 8))).float().clamp(min=0)


def expected_of_pairs(losses: Losses, config: Config, *, by_label: bool) -> None:
    """Every loss of every example by loops; each object is compared with a drawing of its own class, if there is one.

    What is drawn is in the order of the lengths or of the labels, and is compared class by class in rising order.
    """
    output = losses.output
    assert output.reconstruction is not None
    for n, (labels, shown) in enumerate(zip(PAIRS.tolist(), objects(), strict=True)):
        scores = output.scores[n].detach().double().numpy()
        margin = reference.margin_loss(scores, set(labels), config.m_pos, config.m_neg, config.down_weight)
        longest = sorted(range(7), key=lambda k: scores[k], reverse=True)[:2]
        drawn_classes = labels if by_label else longest
        drawn = dict(zip(drawn_classes, output.reconstruction[n].detach().double().numpy(), strict=True))
        there = dict(zip(labels, shown.double().numpy(), strict=True))
        squared = sum(
            reference.reconstruction_loss(drawn[ours], there[theirs])
            for ours, theirs in zip(sorted(drawn), sorted(there), strict=True)
        )
        total = config.margin_scale * margin + config.reconstruction_weight * squared
        assert losses.classification[n].item() == pytest.approx(config.margin_scale * margin, rel=1e-5)
        assert losses.reconstruction[n].item() == pytest.approx(squared, rel=1e-5)
        assert losses.total[n].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("config", [Config(), Config.of(margin_scale=3.0, reconstruction_weight=0.07, down_weight=0.3)])
@pytest.mark.parametrize(
    ("training", "mask", "by_label"),
    [(True, "label", True), (True, "prediction", False), (False, "label", False)],
    ids=["train", "train-by-prediction", "eval"],
)
def test_of_several_objects_each_is_compared_with_the_drawing_of_its_class(
    config: Config, training: bool, mask: Literal["label", "prediction"], by_label: bool
) -> None:
    config = replace(config, mask=mask)
    losses = Objective(of_pairs(), config).train(training)(overlay(objects()), PAIRS, objects())
    longest = losses.output.scores.topk(2).indices
    assert (longest[:, 0] > longest[:, 1]).any(), "or the order of drawing is not told apart"
    assert (longest[:, 0] < longest[:, 1]).any()
    expected_of_pairs(losses, config, by_label=by_label)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_which_object_is_named_first_changes_nothing(training: bool) -> None:
    objective = Objective(of_pairs(), Config()).train(training)
    one = objective(overlay(objects()), PAIRS, objects())
    other = objective(overlay(objects()), PAIRS.flip(1), objects().flip(1))
    torch.testing.assert_close(one.reconstruction, other.reconstruction)
    torch.testing.assert_close(one.total, other.total)
    swapped = objective(overlay(objects()), PAIRS, objects().flip(1))
    assert not torch.allclose(swapped.reconstruction, one.reconstruction), "labels and objects belong together"


def test_objects_drawn_perfectly_cost_nothing_in_evaluation_whichever_is_longer() -> None:
    labels = torch.tensor([[3, 1], [0, 2]])
    shown = objects()[:2]
    lengths = torch.tensor([[0.1, 0.8, 0.0, 0.9], [0.7, 0.0, 0.9, 0.1]])  # the first is longer, or not
    drawn = torch.stack([shown[0], shown[1].flip(0)])

    class Perfect(CapsNet):
        def __init__(self) -> None:
            Network.__init__(self)
            self.classes = tuple("abcd")

        def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
            return Output(lengths, drawn, pose=torch.zeros(2, 4, 3))

    objective = Objective(Perfect(), Config()).eval()
    assert objective(overlay(shown), labels, shown).reconstruction.tolist() == [0.0, 0.0]


def test_without_capsules_several_objects_have_the_cross_entropy_of_a_sigmoid_for_each_class() -> None:
    torch.manual_seed(0)
    net = create("baseline", image_shape=(1, 5, 7), num_classes=7, objects_per_image=2, width=0.05)
    shown = torch.rand(5, 2, 1, 5, 7)
    for given in ((), (shown,)):
        losses = Objective(net, Config()).eval()(overlay(shown), PAIRS, *given)
        p = losses.output.scores.detach().double().sigmoid()
        present = torch.zeros(5, 7).scatter(1, PAIRS, 1.0).bool()
        expected = -torch.where(present, p, 1 - p).log().sum(1)
        torch.testing.assert_close(losses.total.double(), expected, rtol=1e-5, atol=0)
        assert torch.equal(losses.total, losses.classification)
        assert torch.equal(losses.reconstruction, torch.zeros(5))


def test_without_a_decoder_the_objects_are_not_needed() -> None:
    objective = Objective(of_pairs(reconstruction=False), Config())
    losses = objective(overlay(objects()), PAIRS)
    assert torch.equal(losses.total, losses.classification)
    assert torch.equal(losses.reconstruction, torch.zeros(5))


@pytest.mark.usefixtures("unchecked")
def test_a_decoder_of_several_objects_needs_each_alone() -> None:
    with pytest.raises(
        InputError, match=r"^reconstruction must have the images' shape \(5, 2, 11, 8\); got \(5, 2, 2,"
    ):
        Objective(of_pairs(), Config())(overlay(objects()), PAIRS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_losses_of_single_objects_are_bit_for_bit_those_of_the_plain_formulas(training: bool) -> None:
    losses = Objective(network(), Config()).train(training)(images(), LABELS)
    assert losses.output.reconstruction is not None
    margin = F.margin_loss(losses.output.scores, nn.functional.one_hot(LABELS, 7).float())
    squared = F.reconstruction_loss(losses.output.reconstruction, images())
    assert torch.equal(losses.classification, margin)
    assert torch.equal(losses.reconstruction, squared)
    assert torch.equal(losses.total, margin + 0.0005 * squared)
    net = create("baseline", image_shape=(2, 11, 8), num_classes=7, width=0.05)
    losses = Objective(net, Config()).train(training)(images(), LABELS)
    assert torch.equal(losses.total, nn.functional.cross_entropy(losses.output.scores, LABELS, reduction="none"))


def test_balanced_classes_count_alike() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])  # and none of class 2
    weights = class_weights(labels, 4)
    assert weights[labels].mean() == pytest.approx(1)
    sums = torch.zeros(4).index_add_(0, labels, weights[labels])
    assert sums.tolist() == pytest.approx([10 / 3, 10 / 3, 0, 10 / 3])
