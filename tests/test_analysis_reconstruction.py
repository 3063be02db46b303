import pytest
import torch

from capsnet.analysis.reconstruction import perturb, reconstruct, separate
from capsnet.errors import InputError
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from tiny import SIZES


@pytest.fixture(scope="module")
def network() -> CapsNet:
    torch.manual_seed(0)
    made = create("capsnet", image_shape=(3, 12, 15), num_classes=5, **SIZES).eval()
    assert isinstance(made, CapsNet)
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(7, 3, 12, 15, generator=torch.Generator().manual_seed(1))


def test_reconstruct_draws_from_the_prediction_and_from_the_label(network: CapsNet, images: torch.Tensor) -> None:
    with torch.no_grad():
        predictions = network(images).scores.argmax(-1)
        labels = (predictions + torch.tensor([0, 1, 0, 2, 0, 0, 3])) % 5
        by_prediction, by_label = network(images).reconstruction, network(images, labels).reconstruction
    found = reconstruct(network, images, labels)
    assert found.wrong.tolist() == [False, True, False, True, False, False, True]
    assert torch.equal(found.predictions, predictions)
    torch.testing.assert_close(found.of_prediction, by_prediction)
    torch.testing.assert_close(found.of_label, by_label)
    assert not torch.equal(found.of_label[found.wrong], found.of_prediction[found.wrong])


@pytest.mark.parametrize("steps", [3, 11])
def test_perturb_changes_one_dimension_at_a_time(network: CapsNet, images: torch.Tensor, steps: int) -> None:
    assert network.decoder is not None
    classes = torch.tensor([0, 4, 2])
    found = perturb(network, images[:3], classes, span=0.3, steps=steps)
    assert found.images.shape == (3, 4, steps, 3, 12, 15)
    torch.testing.assert_close(found.deltas, torch.linspace(-0.3, 0.3, steps), atol=1e-7, rtol=0)
    with torch.no_grad():
        pose = network(images[:3]).pose
        torch.testing.assert_close(found.pose, pose[torch.arange(3), classes])
        for image, dim, step in ((0, 0, 0), (1, 2, steps - 1), (2, 3, steps // 2)):
            changed = pose[image].clone()
            changed[classes[image], dim] += found.deltas[step]
            expected = network.decoder(changed[None], classes[image : image + 1])[0]
            torch.testing.assert_close(found.images[image, dim, step], expected, atol=1e-6, rtol=1e-5)


def test_the_middle_is_unchanged_and_the_longest_capsule_the_default(network: CapsNet, images: torch.Tensor) -> None:
    found = perturb(network, images)
    with torch.no_grad():
        output = network(images)
    assert found.deltas[5] == 0
    assert torch.equal(found.classes, output.scores.argmax(-1))
    for dim in range(4):
        torch.testing.assert_close(found.images[:, dim, 5], output.reconstruction, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found.images[:, :, 0], found.images[:, :, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": 0.0}, "span must be above 0; got 0"),
        ({"steps": 10}, "steps must be odd and at least 3, for an unchanged middle; got 10"),
        ({"steps": 1}, "steps must be odd and at least 3"),
    ],
)
def test_a_range_without_a_middle_is_refused(
    network: CapsNet, images: torch.Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        perturb(network, images, **options)  # type: ignore[arg-type]


def test_it_needs_a_decoder(images: torch.Tensor) -> None:
    bare = create("capsnet", image_shape=(3, 12, 15), num_classes=5, reconstruction=False, **SIZES)
    with pytest.raises(InputError, match=r"model must have a decoder to draw"):
        perturb(bare, images)
    with pytest.raises(InputError, match=r"model must have capsules; got baseline"):
        reconstruct(create("baseline", image_shape=(3, 12, 15), num_classes=5), images, torch.zeros(7).long())
    with pytest.raises(InputError, match=r"model must have a decoder to draw"):
        separate(bare, images, torch.zeros(7, 2).long())


def test_separate_draws_each_asked_capsule_alone_with_its_length(network: CapsNet, images: torch.Tensor) -> None:
    classes = torch.tensor([[0, 4, 2], [3, 1, 0], [1, 2, 3], [4, 4, 0], [2, 0, 1], [0, 1, 4], [3, 2, 1]])
    found = separate(network, images, classes)
    assert torch.equal(found.images, images)
    assert torch.equal(found.classes, classes)
    assert found.drawn.shape == (7, 3, 3, 12, 15)
    with torch.no_grad():
        scores = network(images).scores
        for k in range(3):
            torch.testing.assert_close(found.drawn[:, k], network(images, classes[:, k]).reconstruction)
    for n in range(7):
        assert found.lengths[n].tolist() == scores[n, classes[n]].tolist()
