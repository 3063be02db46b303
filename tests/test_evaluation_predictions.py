import pytest
import torch

from capsnet.data.dataset import Split, to_float
from capsnet.errors import InputError
from capsnet.evaluation import Predictions, calibration, predict_split
from capsnet.models import create
from tiny import SIZES, pairs


def split(count: int = 11) -> Split:
    images = torch.randint(0, 256, (count, 1, 12, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.arange(count) % 3)


def test_predictions_are_those_of_the_network_whatever_the_batch() -> None:
    network = create("capsnet", image_shape=(1, 12, 13), num_classes=3, **SIZES)
    found = predict_split(network, split(), batch_size=4)
    assert network.training
    with torch.no_grad():
        output = network.eval()(split().images / 255)
    torch.testing.assert_close(found.scores, output.scores, atol=1e-6, rtol=1e-4)
    assert found.reconstruction_errors is not None
    expected = (output.reconstruction - split().images / 255).square().sum((1, 2, 3))
    torch.testing.assert_close(found.reconstruction_errors, expected)
    assert torch.equal(found.predictions, output.scores.argmax(-1))
    assert found.confusion.sum() == 11
    assert int(found.confusion.diagonal().sum()) == 11 - int(found.wrong.sum())


def test_a_network_without_capsules_gives_its_softmax() -> None:
    found = predict_split(create("baseline", image_shape=(1, 12, 13), num_classes=3), split())
    assert found.reconstruction_errors is None
    torch.testing.assert_close(found.scores.sum(-1), torch.ones(11))


def test_confusion_has_true_classes_in_rows() -> None:
    labels, predictions = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 2])
    found = Predictions(torch.eye(3)[predictions], labels, predictions, torch.zeros(4, 3), None)
    assert found.confusion.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert found.wrong.tolist() == [False, True, False, False]


def test_calibration_by_hand() -> None:
    winning = torch.tensor([0.95, 0.85, 0.85, 0.1, 1.0])
    right = torch.tensor([True, True, False, False, True])
    found = calibration(winning, right, bins=10)
    assert found.counts == (0, 1, 0, 0, 0, 0, 0, 0, 2, 2)
    assert found.accuracies[8:] == (0.5, 1.0)
    assert found.scores[8] == pytest.approx(0.85)
    assert found.accuracies[0] is None
    # |0 - 0.1| * 1 + |1 - 1.7| + |2 - 1.95|, over 5
    assert found.error == pytest.approx((0.1 + 0.7 + 0.05) / 5)
    assert found.edges[0] == 0
    assert found.edges[-1] == 1


def test_perfect_calibration_has_no_error() -> None:
    assert calibration(torch.ones(4), torch.ones(4).bool()).error == 0


@pytest.mark.parametrize("model", ["capsnet", "baseline"])
def test_of_several_objects_sets_are_compared(model: str) -> None:
    torch.manual_seed(0)
    sizes = SIZES if model == "capsnet" else {"width": 0.05}
    network = create(model, image_shape=(1, 12, 13), num_classes=4, objects_per_image=2, **sizes).eval()
    test = pairs(test=23).test
    found = predict_split(network, test, batch_size=5)
    with torch.no_grad():
        scores = network(to_float(test.images)).scores
    torch.testing.assert_close(found.scores, scores if model == "capsnet" else scores.sigmoid(), atol=1e-6, rtol=1e-4)
    assert found.reconstruction_errors is None
    assert found.labels.shape == found.predictions.shape == (23, 2)
    wrong = 0
    for k in range(23):
        assert found.labels[k].tolist() == sorted(test.labels[k].tolist())
        largest = sorted(range(4), key=lambda c: float(scores[k, c]), reverse=True)[:2]
        assert found.predictions[k].tolist() == sorted(largest)
        assert bool(found.wrong[k]) == (set(largest) != set(test.labels[k].tolist()))
        wrong += bool(found.wrong[k])
        assert float(found.winning[k]) == float(found.scores[k].max())
    assert 0 < wrong < 23


def test_one_wrong_object_of_two_makes_the_image_wrong() -> None:
    labels, predictions = torch.tensor([[0, 1], [0, 2], [1, 2]]), torch.tensor([[0, 1], [0, 1], [0, 2]])
    assert Predictions(torch.eye(3), labels, predictions, torch.zeros(3, 3), None).wrong.tolist() == [False, True, True]


def test_images_of_another_number_of_objects_are_refused() -> None:
    made = pairs()
    one, two = (create("capsnet", image_shape=(1, 12, 13), num_classes=4, objects_per_image=k, **SIZES) for k in (1, 2))
    with pytest.raises(InputError, match=r"^images must show 1 object each; got 2$"):
        predict_split(one, made.test)
    with pytest.raises(InputError, match=r"^images must show 2 objects each; got 1$"):
        predict_split(two, made.train)


def test_with_shifts_losses_and_reconstructions_are_those_of_the_image_as_it_is() -> None:
    network = create("capsnet", image_shape=(1, 12, 13), num_classes=3, **SIZES)
    plain, views = predict_split(network, split()), predict_split(network, split(), shifts=1)
    torch.testing.assert_close(views.losses, plain.losses, atol=1e-6, rtol=1e-4)
    assert (views.scores - plain.scores).abs().max() > 1e-6
    assert torch.equal(views.predictions, views.scores.argmax(-1))
