import json
from typing import Any

import pytest
import torch
from torch import Tensor

from capsnet.data.dataset import Split, to_float
from capsnet.errors import InputError
from capsnet.evaluation import wilson_interval
from capsnet.evaluation.ensemble import Ensemble, check_alike, ensemble_scores
from capsnet.evaluation.predictions import shifted
from capsnet.models import Network, create
from tiny import SIZES

SHAPE = (2, 12, 13)


def capsules(seed: int = 0, **options: Any) -> Network:
    torch.manual_seed(seed)
    return create("capsnet", **{"image_shape": SHAPE, "num_classes": 3, **SIZES, **options})


def convolutions(seed: int = 0, **options: Any) -> Network:
    torch.manual_seed(seed)
    return create("baseline", image_shape=SHAPE, num_classes=3, width=0.02, **options)


def some(count: int = 7) -> Split:
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.arange(count) % 3)


def plain(network: Network, images: Tensor) -> Tensor:
    """What the network says of images, as itself."""
    with torch.no_grad():
        scores: Tensor = network.eval()(images).scores
        return scores


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """The slow way: pixel by pixel."""
    height, width = images.shape[-2:]
    result = torch.zeros_like(images)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[..., y, x] = images[..., y - down, x - right]
    return result


def test_scores_are_the_mean_of_the_lengths_and_the_softmax() -> None:
    one, two, three = capsules(0), capsules(1), convolutions(2)
    images = to_float(some().images)
    expected = (plain(one, images) + plain(two, images) + plain(three, images).softmax(-1)) / 3
    found = ensemble_scores([one, two, three], some())
    assert found.shape == (7, 3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_networks_for_several_objects_give_their_sigmoid() -> None:
    network = convolutions(0, objects_per_image=2)
    images = some().images
    split = Split(images, torch.tensor([[0, 1]] * 7), single_images=torch.stack([images, images], dim=1))
    expected = plain(network, to_float(images)).sigmoid()
    torch.testing.assert_close(ensemble_scores([network], split), expected)


def test_shifted_views_are_all_shifts_with_zeros_moving_in() -> None:
    images = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    views = list(shifted(images, 2))
    assert len(views) == 25
    expected = [moved(images, down, right) for down in (2, 1, 0, -1, -2) for right in (2, 1, 0, -1, -2)]
    assert all(torch.equal(view, slow) for view, slow in zip(views, expected, strict=True))
    (alone,) = shifted(images, 0)
    assert torch.equal(alone, images)


@pytest.mark.parametrize("kind", [capsules, convolutions])
def test_test_time_averaging_is_the_mean_over_the_views(kind: type) -> None:
    network, images = kind(0), to_float(some().images)
    views = [moved(images, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    scores = [plain(network, view) for view in views]
    if network.config["name"] == "baseline":
        scores = [logits.softmax(-1) for logits in scores]
    found = ensemble_scores([network], some(), shifts=1)
    torch.testing.assert_close(found, torch.stack(scores).mean(0), atol=1e-6, rtol=1e-4)
    assert (found - ensemble_scores([network], some())).abs().max() > 1e-5


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_the_size_of_batches_changes_nothing(batch_size: int) -> None:
    networks = [capsules(0), convolutions(1)]
    one, other = (ensemble_scores(networks, some(), shifts=1, batch_size=size) for size in (batch_size, 256))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_networks_are_left_in_the_mode_they_were_in() -> None:
    networks = [convolutions(0).train(), convolutions(1).eval()]
    first = ensemble_scores(networks, some())
    assert [network.training for network in networks] == [True, False]
    assert torch.equal(first, ensemble_scores(networks, some()))  # no dropout


def test_the_largest_score_is_the_prediction() -> None:
    labels = torch.tensor([0, 2, 1])
    found = Ensemble.of(torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.1], [0.1, 0.2, 0.0]]), labels)
    assert found.wrong.tolist() == [False, True, False]
    assert (found.total, found.count) == (3, 1)
    assert found.error_percent == pytest.approx(100 / 3)
    assert found.interval == pytest.approx([100 * end for end in wilson_interval(1, 3)])
    assert found.summary() == "error 33.33 % (1 of 3 wrong; 95 % interval 6.15 to 79.23 %)"
    told = found.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert {"error_percent", "wrong", "total", "interval"} == told.keys()
    assert (told["wrong"], told["total"]) == (1, 3)


def test_of_several_objects_exactly_the_true_set_is_right() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2], [0.0, 0.1, 0.9, 0.2]])
    labels = torch.tensor([[0, 1], [1, 0], [0, 2], [3, 2]])
    found = Ensemble.of(scores, labels)
    assert found.wrong.tolist() == [False, False, True, False]
    assert found.objects_per_image == 2
    assert found.summary().startswith("exact-set error 25.00 % (1 of 4 wrong; ")


def test_networks_that_differ_are_refused_by_a_line_that_names_both() -> None:
    told: dict[str, dict[str, Any]] = {
        r"^network 2 \(capsnet\) must know 3 classes as network 1 \(capsnet\); got 4$": {"num_classes": 4},
        r"^network 2 .* must take images \(2, 12, 13\) as network 1 .*; got \(2, 13, 12\)$": {
            "image_shape": (2, 13, 12)
        },
        r"^network 2 .* must look for 1 objects per image as network 1 .*; got 2$": {"objects_per_image": 2},
        r"^network 2 .* must know the classes of network 1 .*, whose class 2 is 1; got b$": {
            "classes": ("0", "b", "2")
        },
    }
    for message, options in told.items():
        with pytest.raises(InputError, match=message):
            ensemble_scores([capsules(), capsules(**options)], some())
    with pytest.raises(InputError, match=r"^runs/b must know 3 classes as runs/a; got 4$"):
        check_alike({"runs/a": capsules(), "runs/c": capsules(1), "runs/b": capsules(num_classes=4)})


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"^networks must be at least one; got none$"):
        ensemble_scores([], some())
    for shifts in (-1, 12):
        with pytest.raises(InputError, match=rf"^shifts must be 0 to 11 pixels for these images; got {shifts}$"):
            ensemble_scores([capsules()], some(), shifts=shifts)
    with pytest.raises(InputError, match=r"^batch_size must be at least 1; got 0$"):
        ensemble_scores([capsules()], some(), batch_size=0)


@pytest.mark.usefixtures("unchecked")
def test_images_or_labels_that_do_not_belong_are_refused() -> None:
    other = Split(torch.zeros(2, 2, 13, 12, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\[batch, 2, 12, 13\]; got \[1, 2, 13, 12\]"):
        ensemble_scores([capsules()], other)
    for scores, labels in ((torch.rand(3, 4), torch.zeros(2).long()), (torch.rand(0, 4), torch.zeros(0).long())):
        with pytest.raises(InputError, match=r"^labels must be those of the \d images, at least one; got \d$"):
            Ensemble.of(scores, labels)
