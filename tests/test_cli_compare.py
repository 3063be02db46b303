"""`capsnet evaluate` of several networks, and of some against others, whose answers are known beforehand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capsnet.checkpoints import pretrained
from capsnet.config import Config, write
from capsnet.data import Split
from capsnet.evaluation import ensemble, wilson_interval
from capsnet.evaluation.statistics import mcnemar, paired_t, welch_t
from capsnet.models import Network, create
from tiny import photos, typed

Capture = pytest.CaptureFixture[str]

TESTED = {"a": 5, "b": 4, "c": 3}
"""Test images of each class: a sixth of the folder's."""


@pytest.fixture
def place(workplace: Path) -> Path:
    """A folder `images` of 72 images in classes a, b and c, of which 5, 4 and 3 are for the test."""
    photos(workplace / "images")
    for name, tested in TESTED.items():
        for file in sorted((workplace / "images" / name).iterdir())[6 * tested :]:
            file.unlink()
    return workplace


def constant(name: str, *sure: float, seed: int | None = 0, **trained: Any) -> str:
    """A run whose network says the same of every image: these logits of the classes."""
    torch.manual_seed(0)
    network = create("baseline", image_shape=(3, 12, 13), num_classes=3, classes=("a", "b", "c"), width=0.02)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(sure))
    pretrained.save_pretrained(network, name)
    if seed is not None:
        write(Config.of(data="images", seed=seed, model="baseline", **trained), Path(name, "config.yaml"))
    return name


def told(capture: Capture, line: str) -> str:
    code, out, err = typed(capture, line)
    assert code == 0, err
    assert all(row.endswith(("images", "views of each", "is divided anew")) for row in err.splitlines())
    return out


def error(wrong: int) -> str:
    low, high = wilson_interval(wrong, 12)
    return f"error {100 * wrong / 12:.2f} % ({wrong} of 12 wrong; 95 % interval {100 * low:.2f} to {100 * high:.2f} %)"


@pytest.mark.usefixtures("place")
def test_evaluate_several_runs(capsys: Capture) -> None:
    constant("one", 1.0, 0.0, 0.0, seed=3)  # a
    constant("two", 2.0, 0.0, 0.0, seed=4)  # a
    constant("three", 0.0, 4.0, 0.0, seed=5)  # b
    assert told(capsys, "evaluate one two three").splitlines() == [
        "images test, 12 images",
        f"one (seed 3): {error(7)}",
        f"two (seed 4): {error(7)}",
        f"three (seed 5): {error(8)}",
        "mean 61.111 %, standard deviation 4.811 over 3 runs",
        f"ensemble of 3: {error(7)}",  # the mean of the logits would say b
        "ensemble against one: exact McNemar test: 0 images mistaken only by the ensemble, 0 only by one, p = 1",
    ]
    numbers = json.loads(told(capsys, "evaluate one two three --json"))
    assert (numbers["runs"], numbers["data"], numbers["split"]) == (["one", "two", "three"], "images", "test")
    assert (numbers["precision"], numbers["averaging"], len(numbers["results"])) == ("32", None, 1)
    (result,) = numbers["results"]
    assert (result["shifts"], result["views"]) == (0, 1)
    assert [(row["run"], row["seed"], row["wrong"]) for row in result["members"]] == [
        ("one", 3, 7),
        ("two", 4, 7),
        ("three", 5, 8),
    ]
    assert result["summary"]["sd"] == pytest.approx(100 / 12 / math.sqrt(3))
    assert result["ensemble"]["error_percent"] == pytest.approx(700 / 12)


@pytest.mark.usefixtures("place")
def test_the_ensemble_is_compared_with_the_first_run(capsys: Capture) -> None:
    constant("one", 1.0, 0.0, 0.0)
    constant("two", 0.0, 4.0, 0.0)
    line = "ensemble against one: exact McNemar test: 5 images mistaken only by the ensemble, 4 only by one, p = 1"
    assert told(capsys, "evaluate one two").splitlines()[-1] == line  # it says b: right of 4 images in place of 5
    (result,) = json.loads(told(capsys, "evaluate one two --json"))["results"]
    assert result["ensemble_against_first"] == {"test": "exact McNemar test", "b": 5, "c": 4, "p": 1.0}


@pytest.fixture
def helpful(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """With shifts, every network says the truth; what was asked for is listed as shifts and batch size."""
    asked: list[tuple[int, int]] = []
    real = ensemble.ensemble_scores

    def scores(networks: Sequence[Network], split: Split, *, shifts: int = 0, batch_size: int = 256) -> Tensor:
        asked.append((shifts, batch_size))
        return torch.eye(3)[split.labels] if shifts else real(networks, split, batch_size=batch_size)

    monkeypatch.setattr(ensemble, "ensemble_scores", scores)
    return asked


def test_evaluate_with_and_without_shifts(capsys: Capture, helpful: list[tuple[int, int]]) -> None:
    constant("one", 1.0, 0.0, 0.0)
    assert told(capsys, "evaluate one --shifts 2 --batch-size 5").splitlines() == [
        "images test, 12 images",
        f"one (seed 0): {error(7)}",
        "with shifts, the mean over 25 views of each image moved by up to 2 pixels:",
        f"one (seed 0): {error(0)}",
        "with shifts against without: exact McNemar test: "
        "0 images mistaken only with shifts, 7 only without, p = 0.016",
    ]
    assert helpful == [(0, 5), (2, 5)]
    numbers = json.loads(told(capsys, "evaluate one --shifts 1 --json"))
    assert [(part["shifts"], part["views"]) for part in numbers["results"]] == [(0, 1), (1, 9)]
    assert [part["members"][0]["wrong"] for part in numbers["results"]] == [7, 0]
    assert [part["ensemble"] or part["summary"] or part["ensemble_against_first"] for part in numbers["results"]] == [
        None,
        None,
    ]
    assert numbers["averaging"] == {"test": "exact McNemar test", "b": 0, "c": 7, "p": 2 / 2**7}


@pytest.mark.usefixtures("helpful")
def test_several_runs_with_shifts(capsys: Capture) -> None:
    constant("one", 1.0, 0.0, 0.0)
    constant("two", 0.0, 4.0, 0.0)
    lines = told(capsys, "evaluate one two --shifts 1").splitlines()
    assert [line for line in lines if line.startswith("ensemble of")] == [
        f"ensemble of 2: {error(8)}",
        f"ensemble of 2: {error(0)}",
    ]
    assert lines[-1].endswith("0 images mistaken only with shifts, 8 only without, p = 0.0078")


@pytest.mark.usefixtures("place")
def test_compare_one_run_with_one(capsys: Capture) -> None:
    constant("one", 1.0, 0.0, 0.0, seed=3)
    constant("two", 0.0, 0.0, 1.0, seed=3)  # c
    assert told(capsys, "evaluate one --against two").splitlines() == [
        "images test, 12 images",
        "networks:",
        f"  one (seed 3): {error(7)}",
        "against:",
        f"  two (seed 3): {error(9)}",
        "over the images: each side is one network",
        "exact McNemar test: 3 images mistaken only by one, 5 only by two, p = 0.73",
    ]
    numbers = json.loads(told(capsys, "evaluate one --against two --json"))
    assert numbers["test"] == mcnemar(set(range(3)), set(range(3, 8))).to_dict()
    assert numbers["runs"]["members"][0]["run"] == "one"
    assert numbers["against"]["members"][0]["wrong"] == 9


def test_compare_takes_so_many_images_at_a_time(capsys: Capture, helpful: list[tuple[int, int]]) -> None:
    constant("one", 1.0, 0.0, 0.0)
    constant("two", 0.0, 1.0, 0.0)
    told(capsys, "evaluate one --against two --batch-size 5")
    assert helpful == [(0, 5), (0, 5)]


@pytest.mark.usefixtures("place")
def test_compare_runs_with_the_same_seeds(capsys: Capture) -> None:
    a, b, c = (7 / 0.12, 8 / 0.12, 9 / 0.12)
    for name, seed, sure in (("p", 0, (1, 0, 0)), ("q", 1, (0, 1, 0)), ("r", 2, (0, 0, 1))):
        constant(name, *map(float, sure), seed=seed)
    for name, seed, sure in (("s", 2, (1, 0, 0)), ("t", 0, (0, 1, 0)), ("u", 1, (0, 0, 1))):
        constant(name, *map(float, sure), seed=seed)
    expected = paired_t([a, b, c], [b, c, a])
    lines = told(capsys, "evaluate p q r --against s t u").splitlines()
    assert lines[-2:] == ["paired by seed: both sides have the seeds 0, 1, 2", expected.summary()]
    assert lines[2:6] == [
        f"  p (seed 0): {error(7)}",
        f"  q (seed 1): {error(8)}",
        f"  r (seed 2): {error(9)}",
        "  mean 66.667 %, standard deviation 8.333 over 3 runs",
    ]
    numbers = json.loads(told(capsys, "evaluate r p q --against s t u --json"))
    assert numbers["test"] == pytest.approx(expected.to_dict() | {"interval": pytest.approx(expected.interval)})
    assert numbers["reason"] == lines[-2]
    assert numbers["runs"]["summary"]["mean"] == pytest.approx(800 / 12)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("seeds", "reason"),
    [
        ((0, 1, 0, 2), "not paired, because the seeds differ: 0, 1 against 0, 2"),
        ((0, 1, 3, 3), "not paired, because seed 3 occurs 2 times on one side"),
        ((0, 1, 1, None), "not paired, because the seed of s is not known"),
    ],
)
def test_compare_runs_that_cannot_be_paired(capsys: Capture, seeds: tuple[int | None, ...], reason: str) -> None:
    for name, seed, sure in zip("pqrs", seeds, ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 0)), strict=True):
        constant(name, *map(float, sure), seed=seed)
    expected = welch_t([7 / 0.12, 8 / 0.12], [9 / 0.12, 8 / 0.12])
    assert told(capsys, "evaluate p q --against r s").splitlines()[-2:] == [reason, expected.summary()]


@pytest.mark.usefixtures("place")
def test_other_data_and_other_splits(capsys: Capture) -> None:
    constant("one", 1.0, 0.0, 0.0, seed=None)
    constant("two", 0.0, 1.0, 0.0, validation=6)
    photos(Path("others"), count=12)  # all of which are scored
    numbers = json.loads(told(capsys, "evaluate one --against two --data others --json"))
    assert (numbers["data"], numbers["test"]["b"], numbers["test"]["c"]) == ("others", 12, 12)
    assert numbers["runs"]["members"][0]["seed"] is None
    numbers = json.loads(told(capsys, "evaluate two --split validation --shifts 1 --json"))
    assert numbers["results"][0]["members"][0]["total"] == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate one two one/", "MODEL must be named once; got one and one/"),
        ("evaluate one --against images/../one", "MODEL must be named once; got one and images/../one"),
        ("evaluate one four", "four must know 3 classes as one; got 4"),
        ("evaluate one --against capsnet-mnist", "capsnet-mnist must take images (3, 12, 13) as one; got (1, 28, 28)"),
        ("evaluate one two --precision bf16", "--precision must be 32 for several networks and for --shifts; got bf16"),
        ("evaluate one --shifts 1 --precision bf16", "--precision must be 32 for several networks and for --shifts"),
        ("evaluate one --shifts 12", "shifts must be 0 to 11 pixels for these images; got 12"),
        ("evaluate one --shifts -1", "--shifts must be at least 0; got -1"),
        ("evaluate one two --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("evaluate one three --split validation", "where one and three held out other images; got validation"),
        (
            "evaluate one --against three --split validation",
            "where one and three held out other images; got validation",
        ),
        ("evaluate two one nowhere", "model folder nowhere must hold config.json; there is none"),
        ("evaluate pair", "images of images test must show 2 of pair's classes each; got 1"),
        ("evaluate pair --shifts 1", "images of images test must show 2 of pair's classes each; got 1"),
        ("evaluate", "MODEL must be given; got none"),
        ("evaluate one --against", "--against must be at least one network; got none"),
        (
            "evaluate one two --against three",
            "at least two for several, because the variance of one is not known; got 1 for 2",
        ),
        ("evaluate one --against two three", "--against must be one network for one MODEL, and at least two"),
        ("evaluate one --against two --batch-size 0", "--batch-size must be at least 1; got 0"),
    ],
)
@pytest.mark.usefixtures("place")
def test_bad_input_is_one_line(capsys: Capture, line: str, message: str) -> None:
    constant("one", 1.0, 0.0, 0.0)
    constant("two", 0.0, 1.0, 0.0)
    constant("three", 0.0, 0.0, 1.0, data_seed=1)
    for name, options in (("four", {"num_classes": 4}), ("pair", {"classes": ("a", "b", "c"), "objects_per_image": 2})):
        chosen: dict[str, Any] = {"image_shape": (3, 12, 13), "num_classes": 3, "width": 0.02, **options}
        pretrained.save_pretrained(create("baseline", **chosen), name)
        write(Config.of(data="images"), Path(name, "config.yaml"))
    code, out, err = typed(capsys, line)
    faults = [row for row in err.splitlines() if not row.endswith("is divided anew")]
    assert (code, out, len(faults)) == (2, "", 1)
    assert faults[0].startswith(f"capsnet {line.split()[0]}: error: ")
    assert message in faults[0]
