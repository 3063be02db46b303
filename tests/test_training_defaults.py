"""Without any option: what is chosen for images of one's own, and that a training of few of them leaves chance."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capsnet.cli import main
from capsnet.config import Config, preset, read
from capsnet.data import Dataset, Split
from capsnet.training import defaults, prepare
from capsnet.training import fit as training
from capsnet.training.defaults import resolved, told

SMALL = Config.of(conv_channels=16, capsule_types=2, decoder_sizes=(32,))


def dataset(classes: int, images: int = 10, *, size: int = 28, name: str = "my/folder") -> Dataset:
    labels = torch.arange(classes).repeat_interleave(images)
    split = Split(torch.zeros(len(labels), 1, size, size, dtype=torch.uint8), labels)
    return Dataset(name, tuple(str(k) for k in range(classes)), split, split)


def patterns(root: Path, classes: int, images: int = 10, size: int = 28) -> Path:
    """A folder of noisy images of a coarse pattern for each class, without a black ground, as photographs are."""
    draw = np.random.default_rng(0)
    for k in range(classes):
        pattern = np.kron(draw.random((4, 4)), np.ones((size // 4, size // 4)))
        (root / f"class {k}").mkdir(parents=True)
        for n in range(images):
            pixels = (pattern + draw.normal(0, 0.15, pattern.shape)).clip(0, 1)
            Image.fromarray((255 * pixels).astype(np.uint8)).save(root / f"class {k}" / f"{n}.png")
    return root


@pytest.mark.parametrize(
    ("config", "classes", "images", "size", "epochs", "decay", "scale"),
    [
        (Config(), 3, 10, 28, 200, 67, 0.0),  # 1 step an epoch; 384 votes for a class
        (Config(), 10, 10, 28, 200, 67, 1.0),  # 115.2 votes: the paper's
        (Config(), 10, 10, 32, 200, 67, 0.0),  # 204.8
        (Config(), 100, 10, 28, 25, 67, 1.0),  # 8 steps an epoch
        (Config(), 3, 3_000, 28, 3, 0, 0.0),  # 71 steps an epoch
        (SMALL, 2, 10, 28, 200, 67, 1.0),  # 36 votes
        (Config.of(batch_size=1), 2, 10, 28, 10, 67, 0.0),
        (Config.of(epochs=3, primary_scale=1.0), 3, 10, 28, 3, 0, 1.0),  # what is given stays
        (Config.of(lr_decay_steps=50), 3, 10, 28, 200, 50, 0.0),
        (Config.of(model="baseline"), 3, 10, 28, 200, 67, 1.0),
        (preset("fast"), 3, 10, 28, 200, 0, 1.0),  # 96 votes for a class; linear to zero in any number of steps
        (preset("fast"), 3, 3_000, 28, 20, 0, 1.0),
    ],
)
def test_what_is_chosen(
    config: Config, classes: int, images: int, size: int, epochs: int, decay: int, scale: float
) -> None:
    given = dataset(classes, images, size=size)
    chosen = resolved(config, given)
    assert (chosen.epochs, chosen.lr_decay_steps) == (epochs, decay)
    assert chosen.flat().get("primary_scale", 1.0) == scale
    assert resolved(chosen, dataset(2)) == chosen  # a resumed run stays as it began
    open_options = {
        name: config.flat()[name]
        for name in ("epochs", "keep", "lr_decay_steps", "primary_scale", "augment")
        if name in config.flat()
    }
    assert chosen.changed(**open_options) == config
    line = told(config, chosen, given)
    assert (line is not None and "--epochs" in line) == (config.epochs is None and epochs not in (3, 20))
    assert (line is not None and "--primary-scale 0" in line) == (scale == 0)
    assert chosen.augment == "paper"


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_in_colour_are_augmented_as_such_and_grey_ones_keep_their_sides(
    channels: int, workplace: Path
) -> None:
    for name in "ab":
        for number in range(4):
            (workplace / "photos" / name).mkdir(parents=True, exist_ok=True)
            colour = (10, 90 + number, 200) if channels == 3 else (90 + number,) * 3
            Image.new("RGB", (20, 20), colour).save(workplace / "photos" / name / f"{number}.png")
    given = prepare.prepare_data(Config.of(data="photos"))
    chosen = resolved(Config.of(data="photos"), given)
    assert chosen.augment == ("photo" if channels == 3 else "paper")
    line = told(Config.of(data="photos"), chosen, given) or ""
    parts = "--augment photo, for images in colour: shift 2 pixels, flip, rotation 10 degrees"
    assert (parts in line) == (channels == 3)
    asked = Config.of(data="photos", augment="photo")
    line = told(asked, resolved(asked, given), given) or ""
    assert ("--augment photo without flip, for images in grey (--flip mirrors them)" in line) == (channels == 1)
    whole = chosen.flat()
    before = {name: value for name, value in whole.items() if name not in ("augment", "resize")}
    old = Config.of(**before)
    assert (old.augment, old.flip) == ("paper", None), "runs from before there was a choice"
    old = Config.of(**{**before, "augment": "affine", "flip": False, "rotation": 0.0, "scale": 0.3})
    assert (old.augment, old.flip, old.rotation, old.scale) == ("affine", None, None, 0.3), "whose 0 left the word's"


def test_published_sets_are_trained_as_ever() -> None:
    chosen = resolved(Config(), dataset(2, name="mnist"))
    assert (chosen.epochs, chosen.lr_decay_steps, chosen.options.primary_scale) == (3, 0, 1.0)
    assert told(Config(), chosen, dataset(2, name="mnist")) is None
    assert chosen.augment == "paper"
    assert resolved(preset("fast"), dataset(2, name="mnist")).epochs == 20


def test_the_best_weights_are_kept_where_other_images_are_tested() -> None:
    own = dataset(2)
    judged = replace(own, validation=own.test)
    for made, keep in (
        (judged, "best"),
        (replace(judged, tested="validation"), "last"),
        (own, "last"),
        (replace(judged, name="mnist"), "last"),
    ):
        assert resolved(Config(), made).keep == keep
        assert resolved(Config.of(keep="last"), made).keep == "last"
        if made.validation is not None:
            assert resolved(Config.of(keep="best"), made).keep == "best"


def leaves_chance(data: Path, classes: int, *options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Train without any option of the recipe; the test error is less than half of that of naming one class."""
    assert main(["train", "--data", str(data), "--out", "run", "--threads", "1", "--no-report", *options]) == 0
    out, err = capsys.readouterr()
    found = re.search(r"test error (\S+) %", out)
    assert found is not None
    assert float(found[1]) < 50 * (1 - 1 / classes)
    assert "chosen for these images: --epochs" in err
    assert "at chance" not in err or classes == 100  # which for some epochs it is


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_a_small_network_leaves_chance_with_10_images_a_class(
    workplace: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--conv-channels", "16", "--capsule-types", "2", "--decoder-sizes", "32")
    leaves_chance(patterns(workplace / "data", classes), classes, *sizes, capsys=capsys)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_many_votes_for_few_classes_do_not_saturate(
    workplace: Path, classes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's capsules; the first convolution is narrower, and the steps are fewer, for time alone."""
    monkeypatch.setattr(defaults, "FEWEST_STEPS", 40)
    data = patterns(workplace / "data", classes)
    leaves_chance(data, classes, "--conv-channels", "64", "--decoder-sizes", "32", capsys=capsys)
    assert read(Path("run/config.yaml")).options.primary_scale == 0


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_the_papers_network_leaves_chance_with_10_images_a_class(
    workplace: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    leaves_chance(patterns(workplace / "data", classes), classes, capsys=capsys)


def test_a_resumed_run_goes_on_as_it_began(workplace: Path) -> None:
    data = patterns(workplace / "data", 2, images=4)
    sizes = {"conv_channels": 4, "capsule_types": 2, "decoder_sizes": (4,), "report": False}
    training.fit(Config.of(data=str(data), out="run", **sizes))  # type: ignore[arg-type]
    began = read(Path("run/config.yaml"))
    assert (began.epochs, began.lr_decay_steps, began.options.primary_scale) == (200, 67, 1.0)
    training.resume("run", epochs=201)
    assert read(Path("run/config.yaml")) == replace(began, epochs=201)
