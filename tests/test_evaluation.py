import pytest
import torch

from capsnet import functional as F
from capsnet.analysis.significance import wilson_interval
from capsnet.config import Config
from capsnet.data import Split
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.evaluation import Evaluation, evaluate, from_sums, measure
from capsnet.models import Network, create
from capsnet.objective import Objective
from tiny import SIZES


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
    assert cat == {"class": "cat", "images": 4, "wrong": 1, "error_percent": 25.0, "taken_for_it": 2}
    assert dog == {"class": "dog", "images": 6, "wrong": 2, "error_percent": pytest.approx(100 / 3), "taken_for_it": 1}
    assert cow["error_percent"] is None
    assert result.summary() == "error 30.00 % (3 of 10 wrong; 95 % interval 10.78 to 60.32 %)"
    told = result.to_dict()
    assert {"error_percent", "wrong", "total", "interval", "per_class", "confusion"} <= told.keys()
    assert told["confusion"] == [[3, 1, 0], [2, 4, 0], [0, 0, 0]]


def test_evaluate_is_the_plain_sum_over_the_images(network: Network, split: Split) -> None:
    config = Config(margin_scale=0.7, reconstruction_weight=0.003)
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_the_sums_of_all_processes_count_every_image_once(network: Network, split: Split, world_size: int) -> None:
    objective = Objective(network, Config())
    sums = [
        measure(objective, split, classes=4, device=torch.device("cpu"), batch_size=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    confusion, losses = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    result, whole = from_sums(confusion, losses, classes=network.classes), evaluate(network, split)
    assert result.confusion == whole.confusion
    assert result.total == 37
    assert result.loss == pytest.approx(whole.loss, rel=1e-5)


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


def test_an_unknown_precision_is_refused() -> None:
    network = create("capsnet", image_shape=(3, 12, 13), num_classes=3, **SIZES)
    split = Split(torch.zeros(2, 3, 12, 13, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^precision must be 32 or bf16; got 'bf17'$"):
        evaluate(network, split, precision="bf17")
