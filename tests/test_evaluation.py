from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.config import Config
from capsnet.data import Split
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.evaluation import Evaluation, Predictions, evaluate, predict_split
from capsnet.evaluation.statistics import wilson_interval
from capsnet.models import Network, Output, create
from capsnet.models.baseline import ConvNet
from capsnet.objective import Objective
from tiny import SIZES, pairs


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return create("capsnet", image_shape=(3, 12, 13), num_classes=4, classes=("a", "b", "c", "d"), **SIZES)


@pytest.fixture
def split() -> Split:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 12, 13), dtype=torch.uint8, generator=draw)
    return Split(images, torch.randint(0, 3, (37,), generator=draw))  # no image of the last class


@pytest.mark.parametrize(
    ("wrong", "total", "low", "high"),
    [
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, Statistics in Medicine 17, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_interval(wrong: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(wrong, total) == pytest.approx((low, high), abs=5e-5)


def test_by_hand() -> None:
    result = Evaluation(((3, 1, 0), (2, 4, 0), (0, 0, 0)), ("cat", "dog", "cow"), 0.5, 0.4, 200.0, wrong=3)
    assert (result.total, result.wrong, result.error_percent) == (10, 3, 30.0)
    assert result.interval == pytest.approx([100 * x for x in wilson_interval(3, 10)])
    cat, dog, cow = result.per_class()
    counts = ("class", "images", "wrong", "error_percent", "taken_for_it")
    assert [cat[name] for name in counts] == ["cat", 4, 1, 25.0, 2]
    assert [dog[name] for name in counts] == ["dog", 6, 2, pytest.approx(100 / 3), 1]
    assert (cat["precision"], cat["recall"], cat["f1"]) == pytest.approx((3 / 5, 3 / 4, 2 / 3))
    assert (dog["precision"], dog["recall"], dog["f1"]) == pytest.approx((4 / 5, 2 / 3, 8 / 11))
    assert {cow[name] for name in ("error_percent", "precision", "recall", "f1")} == {None}
    assert result.macro == pytest.approx({"precision": 0.7, "recall": 17 / 24, "f1": 23 / 33})
    never = Evaluation(((2, 0), (3, 0)), ("cat", "dog"), 0.5, 0.4, 200.0, wrong=3).per_class()[1]
    assert (never["precision"], never["recall"], never["f1"]) == (0.0, 0.0, 0.0)
    assert result.summary() == "error 30.00 % (3 of 10 wrong; 95 % interval 10.78 to 60.32 %)"
    told = result.to_dict()
    assert {"error_percent", "wrong", "total", "interval", "macro", "per_class", "confusion"} <= told.keys()
    assert told["confusion"] == [[3, 1, 0], [2, 4, 0], [0, 0, 0]]


def test_evaluate_is_the_plain_sum_over_the_images(network: Network, split: Split) -> None:
    config = Config.of(margin_scale=0.7, reconstruction_weight=0.003)
    result = evaluate(network, split, config=config, batch_size=8)
    confusion = [[0] * 4 for _ in range(4)]
    margin = squared = 0.0
    with torch.no_grad():
        for image, label in zip(to_float(split.images), split.labels.tolist(), strict=True):
            output = network(image[None])
            confusion[label][int(output.scores.argmax())] += 1
            presence = torch.eye(4)[label][None]
            margin += 0.7 * F.margin_loss(output.scores, presence).item() / 37
            squared += ((output.reconstruction - image) ** 2).sum().item() / 37
    assert [list(row) for row in result.confusion] == confusion
    assert result.classification_loss == pytest.approx(margin, rel=1e-5)
    assert result.reconstruction_loss == pytest.approx(squared, rel=1e-5)
    assert result.loss == pytest.approx(margin + 0.003 * squared, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 36, 37, 500])
def test_the_size_of_batches_changes_nothing(network: Network, split: Split, batch_size: int) -> None:
    one, other = evaluate(network, split), evaluate(network, split, batch_size=batch_size)
    assert one.confusion == other.confusion
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def divided(network: Network, split: Split, world_size: int, *, batch_size: int) -> Predictions:
    """What the processes find, each its share and as if the others' rows were added to it."""
    calls, parts = [0] * world_size, []
    for rank in range(world_size):

        def count(rank: int = rank) -> None:
            calls[rank] += 1

        share: dict[str, Any] = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
        parts.append(predict_split(network, split, each_batch=count, **share))
    assert calls == [-(-len(split) // (batch_size * world_size))] * world_size  # it may wait for the other processes
    scores, predictions, losses = (
        torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("scores", "predictions", "losses")
    )
    errors = None if parts[0].reconstruction_errors is None else losses[:, 2]
    return Predictions(scores, parts[0].labels, predictions, losses, errors)


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_the_sums_of_all_processes_count_every_image_once(network: Network, split: Split, world_size: int) -> None:
    found, whole = divided(network, split, world_size, batch_size=5), predict_split(network, split)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-4)
    result = Evaluation.of(found, network.classes)
    assert result.confusion == evaluate(network, split).confusion
    assert result.total == 37


def test_the_network_is_left_as_it_was(network: Network, split: Split) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for training in (True, False):
        network.train(training)
        evaluate(network, split)
        assert network.training == training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_bf16_is_close(network: Network, split: Split) -> None:
    one, other = evaluate(network, split), evaluate(network, split, precision="bf16")
    assert other.loss == pytest.approx(one.loss, rel=0.01)
    assert other.loss != one.loss


@pytest.mark.usefixtures("unchecked")
def test_images_of_another_shape_are_refused(network: Network) -> None:
    wrong = Split(torch.zeros(2, 3, 13, 12, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\[batch, 3, 12, 13\]; got \[1, 3, 13, 12\]"):
        evaluate(network, wrong)


def test_no_images_are_refused(network: Network) -> None:
    nothing = Split(torch.zeros(0, *network.image_shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^split must hold at least one image; got none$"):
        evaluate(network, nothing)


def test_an_unknown_precision_is_refused() -> None:
    network = create("capsnet", image_shape=(3, 12, 13), num_classes=3, **SIZES)
    split = Split(torch.zeros(2, 3, 12, 13, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^precision must be 32 or bf16; got 'bf17'$"):
        evaluate(network, split, precision="bf17")


# several objects in each image


class Told(ConvNet):
    """Says of an image the row of `scores` that its first pixel names."""

    def __init__(self, scores: list[list[float]], objects: int) -> None:
        Network.__init__(self)
        self.scores, self.objects_per_image = nn.Parameter(torch.tensor(scores)), objects
        self.classes, self.image_shape = tuple("abcdefg"[: len(scores[0])]), (1, 2, 3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        return Output(self.scores[(images[:, 0, 0, 0] * 255).round().long()])


def told_of(scores: list[list[float]], labels: list[Any], *, batch_size: int = 2) -> Predictions:
    """Of images of 1 x 2 x 3 pixels, the k-th of intensity k."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 3)
    truth = torch.tensor(labels)
    objects = images[:, None].expand(-1, truth.shape[1], -1, -1, -1) if truth.ndim == 2 else None
    network = Told(scores, truth[0].numel())
    return predict_split(network, Split(images, truth, single_images=objects), batch_size=batch_size)


def measured(scores: list[list[float]], labels: list[Any], *, batch_size: int = 2) -> Evaluation:
    """Of the same, as if the losses of the k-th were k + 1, k + 2 and k + 3."""
    losses = torch.arange(len(labels))[:, None] + torch.arange(1.0, 4)
    found = told_of(scores, labels, batch_size=batch_size)._replace(losses=losses)
    return Evaluation.of(found, tuple("abcdefg"[: len(scores[0])]))


def test_objects_found_are_on_the_diagonal_and_each_missed_one_beside_one_claimed() -> None:
    scores = [
        [0.9, 0.1, 0.2, 0.8, 0.0],  # says 0 and 3, and both are there
        [0.9, 0.1, 0.2, 0.8, 0.0],  # the same, where 3 and 4 are: 4 is missed, 0 claimed
        [0.0, 0.9, 0.8, 0.1, 0.2],  # says 1 and 2, where 0 and 3 are: both missed
        [0.1, 0.0, 0.7, 0.2, 0.6],  # says 2 and 4, and both are there
    ]
    result = measured(scores, [[3, 0], [3, 4], [3, 0], [2, 4]], batch_size=3)
    assert result.confusion == (
        (1, 1, 0, 0, 0),
        (0, 0, 0, 0, 0),
        (0, 0, 1, 0, 0),
        (0, 0, 1, 2, 0),
        (1, 0, 0, 0, 1),
    )
    assert (result.total, result.wrong, result.missed) == (4, 2, 3)
    assert (result.error_percent, result.missed_percent) == (50.0, 37.5)
    assert result.interval == pytest.approx([100 * x for x in wilson_interval(2, 4)])
    assert (result.loss, result.classification_loss, result.reconstruction_loss) == (2.5, 3.5, 4.5)  # of an image
    rows = {row["class"]: row for row in result.per_class()}
    assert rows["d"] == {
        "class": "d",
        "images": 3,
        "wrong": 1,
        "error_percent": pytest.approx(100 / 3),
        "taken_for_it": 0,
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
    }
    assert rows["b"]["taken_for_it"] == 1
    assert result.summary() == (
        "exact-set error 50.00 % (2 of 4 wrong; 95 % interval 15.00 to 85.00 %); missed objects 37.50 %"
    )
    told = result.to_dict()
    assert (told["objects"], told["missed"], told["missed_percent"], told["total"]) == (2, 3, 37.5, 4)


def test_of_single_objects_nothing_is_told_of_sets() -> None:
    result = measured([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], [0, 1, 1])
    assert (result.total, result.wrong, result.missed, result.objects_per_image) == (3, 1, 1, 1)
    assert result.missed_percent == result.error_percent
    assert {"objects", "missed", "missed_percent"}.isdisjoint(result.to_dict())
    assert "missed" not in result.summary()


def test_of_equal_scores_a_single_object_is_the_first_class_as_ever() -> None:
    scores = [[0.0] * 5, [0.1, 0.4, 0.2, 0.4, 0.4], [0.3, 0.3, 0.3, 0.3, 0.3]]
    result = measured(scores, [0, 1, 4])
    assert result.wrong == 1
    assert result.confusion[4][0] == result.confusion[0][0] == result.confusion[1][1] == 1


@pytest.mark.parametrize("k", [2, 3])
def test_the_confusion_of_several_objects_is_that_of_loops(k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    scores = torch.rand(50, 6, generator=draw)
    labels = torch.rand(50, 6, generator=draw).argsort(-1)[:, :k]
    expected, wrong = [[0] * 6 for _ in range(6)], 0
    for row, truth in zip(scores.tolist(), labels.tolist(), strict=True):
        said = sorted(range(6), key=lambda c: row[c], reverse=True)[:k]
        for c in set(truth) & set(said):
            expected[c][c] += 1
        for missed, claimed in zip(sorted(set(truth) - set(said)), sorted(set(said) - set(truth)), strict=True):
            expected[missed][claimed] += 1
        wrong += set(truth) != set(said)
    result = measured(scores.tolist(), labels.tolist(), batch_size=7)
    assert [list(row) for row in result.confusion] == expected
    assert sum(map(sum, result.confusion)) == k * result.total == 50 * k
    assert result.wrong == wrong
    assert result.missed == sum(sum(row) for row in expected) - sum(expected[c][c] for c in range(6))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_sums_of_all_processes_are_those_of_the_pairs(world_size: int) -> None:
    torch.manual_seed(0)
    network = create("capsnet", image_shape=(1, 12, 13), num_classes=4, objects_per_image=2, **SIZES)
    split = pairs().test
    found = Evaluation.of(divided(network, split, world_size, batch_size=4), network.classes)
    whole = evaluate(network, split)
    assert (found.confusion, found.wrong, found.total) == (whole.confusion, whole.wrong, len(split))
    for name in ("loss", "classification_loss", "reconstruction_loss"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_evaluate_of_pairs_is_the_mean_over_the_images() -> None:
    torch.manual_seed(0)
    network = create("capsnet", image_shape=(1, 12, 13), num_classes=4, objects_per_image=2, **SIZES)
    split = pairs().test
    assert split.single_images is not None
    result = evaluate(network, split, batch_size=4)
    with torch.no_grad():
        losses = Objective(network, Config()).eval()(
            to_float(split.images), split.labels, to_float(split.single_images)
        )
    assert result.objects_per_image == 2
    assert result.loss == pytest.approx(float(losses.total.mean()), rel=1e-5)
    assert result.classification_loss == pytest.approx(float(losses.classification.mean()), rel=1e-5)
    assert result.reconstruction_loss == pytest.approx(float(losses.reconstruction.mean()), rel=1e-5)


@pytest.mark.parametrize("reconstruction", [True, False])
def test_images_of_another_number_of_objects_are_refused(reconstruction: bool) -> None:
    made = pairs()
    one, two = (
        create(
            "capsnet",
            image_shape=(1, 12, 13),
            num_classes=4,
            objects_per_image=k,
            reconstruction=reconstruction,
            **SIZES,
        )
        for k in (1, 2)
    )
    with pytest.raises(InputError, match=r"^images must show 1 object each; got 2$"):
        evaluate(one, made.test)
    with pytest.raises(InputError, match=r"^images must show 2 objects each; got 1$"):
        evaluate(two, made.train)


@pytest.mark.parametrize("labels", [[1, 0], [[1, 2], [0, 1]]])
def test_predictions_are_told_apart_where_their_presence_rounds_to_the_same(labels: list[Any]) -> None:
    scores = [[199.0, 200.0, 300.0, -9.0], [99.0, 97.0, 98.0, -9.0]]
    expected = [2, 0] if isinstance(labels[0], int) else [[1, 2], [0, 2]]
    assert told_of(scores, labels).predictions.tolist() == expected


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_images_is_refused(network: Network, split: Split, batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"^batch_size must be at least 1; got {batch_size}$"):
        evaluate(network, split, batch_size=batch_size)


def test_what_is_called_before_each_batch_sees_the_network_as_it_was(network: Network, split: Split) -> None:
    modes: list[bool] = []
    predict_split(
        network, split, batch_size=10, each_batch=lambda: modes.append(network.training and torch.is_grad_enabled())
    )
    assert modes == [True] * 4
