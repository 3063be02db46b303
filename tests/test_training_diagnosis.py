"""What is said of a training at chance, and of one that is not finite."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capsnet.config import Config
from capsnet.errors import Diverged
from capsnet.models import Output, create
from capsnet.models.capsnet import CapsNet
from capsnet.objective import Losses
from capsnet.training.diagnosis import Chance, first_not_finite
from capsnet.training.fit import fit
from tiny import SIZES, photos, tiny

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 30)
GOOD = Config.of(epochs=100, primary_scale=1.0)


def row(error: float = 50.0, **changes: Any) -> dict[str, Any]:
    values = {
        "epoch": 100,
        "train_error_percent": error,
        "learning_rate": 0.001,
        "train_classification_loss": 0.5,
        "train_reconstruction_loss": 20.0,
    }
    return {**values, **changes}


def losses(scores: Tensor, *, capsules: bool = True) -> Losses:
    zero = torch.zeros(len(scores))
    return Losses(zero, zero, zero, Output(scores, pose=scores[..., None] if capsules else None))


MIXED = torch.tensor([[0.05, 0.95, 0.5], [0.95, 0.05, 0.5]])


def chance(
    labels: Tensor = LABELS, config: Config = GOOD, steps: int = 2, classes: int = 3, objects: int = 1
) -> Chance:
    return Chance(labels, classes=classes, objects_per_image=objects, config=config, steps=steps)


def test_the_error_of_naming_the_most_frequent_class() -> None:
    assert chance().percent == 50.0
    assert chance(LABELS.flip(0)).percent == 50.0
    assert chance(torch.tensor([[0, 1], [2, 3]]), classes=4, objects=2).percent == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize(("error", "said"), [(49.99, False), (50.0, True), (66.0, True)])
def test_said_where_it_is_no_better_and_only_once(error: float, said: bool) -> None:
    watch = chance()
    line = watch.line(row(error), losses(MIXED))
    assert (line is not None) == said
    assert line is None or line.startswith(
        f"at chance: {error:.2f} % of the training images wrong in epoch 100, and always naming the most frequent "
        "class has 50.00 %; likely causes: "
    )
    assert line is None or "\n" not in line
    again = watch.line(row(50.0), losses(MIXED))
    assert (again is None) == said


def test_of_classes_that_count_alike_it_is_the_error_of_guessing() -> None:
    balanced = chance(config=Config.of(epochs=100, primary_scale=1.0, balance=True))
    assert balanced.percent == pytest.approx(200 / 3)
    assert balanced.line(row(60.0), losses(MIXED)) is None
    assert "guessing has 66.67 %; likely causes" in str(balanced.line(row(67.0), losses(MIXED)))


@pytest.mark.parametrize(("epochs", "epoch", "said"), [(100, 24, False), (100, 25, True), (3, 2, False), (3, 3, True)])
def test_not_before_50_steps_unless_there_are_no_more(epochs: int, epoch: int, said: bool) -> None:
    watch = chance(config=Config.of(epochs=epochs))
    assert (watch.line(row(epoch=epoch), losses(MIXED)) is not None) == said


@pytest.mark.parametrize(
    ("config", "changes", "scores", "cause"),
    [
        (
            GOOD,
            {},
            torch.full((4, 3), 0.97),
            r"longer than m\+ = 0.9 for every image, .*--primary-scale 0, a smaller --lr",
        ),
        (Config.of(epochs=1, primary_scale=0.0), {}, torch.full((4, 3), 0.97), r"gradient \(a smaller --lr"),
        (
            GOOD,
            {},
            torch.full((4, 3), 0.03),
            "shorter than m- = 0.1 for every image, as routing divides among 3 classes",
        ),
        (GOOD, {}, torch.full((4, 3), 0.5), "all images look alike"),
        (GOOD, {"learning_rate": 2e-5}, MIXED, r"has fallen from 0.001 to 2e-05 \(--lr-decay-steps\)"),
        (
            Config.of(epochs=100, schedule="steps", lr_milestones=(0.1,)),
            {"learning_rate": 2e-5},
            MIXED,
            r"has fallen from 0.001 to 2e-05 \(--lr-milestones\)",
        ),
        (GOOD, {"epoch": 60}, MIXED, r"only 120 steps \(more --epochs, a smaller --batch-size\)"),
        (GOOD, {"train_reconstruction_loss": 1500.0}, MIXED, r"decoder's loss outweighs .*--reconstruction-weight"),
        (GOOD, {}, MIXED, r"likely causes: --lr, now 0.001, too high or too low; or labels that do not follow"),
        (GOOD, {}, None, r"likely causes: --lr"),
    ],
)
def test_causes(config: Config, changes: dict[str, Any], scores: Tensor | None, cause: str) -> None:
    told = chance(config=config).line(row(**changes), None if scores is None else losses(scores))
    assert told is not None
    assert re.search(cause, told)


def test_few_images_are_a_cause_and_logits_are_no_lengths() -> None:
    told = chance(torch.tensor([0, 1, 1, 2]), steps=5).line(row(80.0), losses(torch.full((4, 3), 5.0), capsules=False))
    assert told is not None
    assert "1 images of the rarest class (more images; --shift" in told
    assert "class capsule" not in told


def test_a_training_on_labels_that_mean_nothing_says_so_once(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = photos(workplace / "data", count=8, classes="a")
    (data / "b").mkdir()
    for k in range(4):
        (data / "a" / f"{k}.png").rename(data / "b" / f"{k}.png")
    fit(tiny(data, epochs=4, lr=1e-6, validation=0))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("at chance")]
    assert "only 4 steps" in line


def small() -> CapsNet:
    torch.manual_seed(0)
    found = create("capsnet", image_shape=(3, 12, 13), num_classes=3, **SIZES)
    assert isinstance(found, CapsNet)
    return found


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        ("conv", r"the output of conv \(Convolution\)"),
        ("primary.conv", r"the output of primary.conv \(Convolution\)"),
    ],
)
@pytest.mark.parametrize("stem", ["direct", "winograd"])
def test_the_first_layer_whose_output_overflows_is_named(layer: str, first: str, stem: str) -> None:
    network, images = small(), torch.rand(4, 3, 12, 13)
    network.convolution = stem
    assert "all weights and outputs are finite" in first_not_finite(network, images)
    with torch.no_grad():
        network.get_parameter(f"{layer}.weight").fill_(3e38)
    assert re.match(first, first_not_finite(network, images))
    assert network.convolution == stem
    assert not any(module._forward_hooks for module in network.modules())


def test_images_and_weights_come_before_outputs() -> None:
    network = small()
    images = torch.rand(4, 3, 12, 13)
    with torch.no_grad():
        network.class_capsules.weight[0, 0, 0, 0] = math.nan
    assert first_not_finite(network, images) == "the weights class_capsules.weight"
    assert first_not_finite(network, None) == "the weights class_capsules.weight"
    images[0, 0, 0, 0] = math.inf
    assert first_not_finite(network, images) == "the images of the step"


def test_a_run_that_overflows_names_step_layer_and_remedy(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = photos(workplace / "data")
    with pytest.raises(
        Diverged, match=r"in epoch 1 at step 2 of \d; not finite first: the output of \w.*; there is no .*smaller --lr"
    ):
        fit(tiny(data, lr=1e30))
