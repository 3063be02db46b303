"""One preprocessing: what a file becomes is what the training images became, for every kind of data set."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from capsnet import cli, data
from capsnet.checkpoints import run_directory
from capsnet.checkpoints.model_card import Card
from capsnet.config import Config
from capsnet.data import Split, available, describe, load
from capsnet.data.photo import Frame
from capsnet.data.preprocessing import MNIST_FRAME, Preprocessing
from capsnet.data.registry import entry
from capsnet.errors import InputError
from capsnet.evaluation import evaluate
from capsnet.training import fit as training
from capsnet.training import prepare
from tiny import REAL, SIZES, reading


def saved(pixels: torch.Tensor, path: Path) -> Path:
    """A tensor `[channels, height, width]` as an image file."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


KINDS: dict[str, dict[str, Any]] = {
    "strokes": {},
    "strokes, larger": {"image_size": 40},
    "mnist": {},
    "mnist, larger and in colour": {"image_size": 36, "channels": 3},
    "mnist, cropped": {"crop": 24},
    "mnist, neither square": {"image_size": "20x30"},
    "mnist, padded": {"image_size": "20x30", "resize": "pad"},
    "fashion-mnist": {},
    "expanded-mnist": {},
    "cifar10": {"crop": 24},
    "cifar10, smaller and grey": {"image_size": 20, "channels": 1},
}


def test_proportions_are_kept_or_lost_as_it_is_said(tmp_path: Path) -> None:
    wide = torch.full((3, 20, 40), 200, dtype=torch.uint8)
    wide[:, 4:16, 14:26] = torch.tensor([250, 0, 10], dtype=torch.uint8)[:, None, None]  # a square in the middle
    path = saved(wide, tmp_path / "wide.png")
    read = {how: Preprocessing(20, 20, 3, resize=how)(path).image.int() for how in ("pad", "crop", "squash")}
    ink = {how: ((image - 200).abs().amax(0) > 25).nonzero() for how, image in read.items()}
    size = {how: tuple((found.amax(0) - found.amin(0) + 1).tolist()) for how, found in ink.items()}
    assert size == {"pad": (6, 6), "crop": (12, 12), "squash": (12, 6)}  # rows and columns
    assert all((found.float().mean(0) - 9.5).abs().max() < 0.6 for found in ink.values()), "in the middle"
    around = read["pad"][:, :4]
    assert set(around.flatten().tolist()) == {200}, "the colour of its edge"
    tall = saved(wide.transpose(1, 2).contiguous(), tmp_path / "tall.png")
    turned = Preprocessing(20, 20, 3, resize="pad")(tall).image.transpose(1, 2)
    assert (turned.int() - read["pad"]).abs().max() <= 4, "but for rounding between rows and columns"


@pytest.mark.parametrize("how", ["pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (7, 7), (1000, 3)])
def test_an_image_of_any_proportions_becomes_one_of_the_size(how: Any, size: tuple[int, int], tmp_path: Path) -> None:
    path = saved(torch.full((1, *size), 77, dtype=torch.uint8), tmp_path / "x.png")
    image = Preprocessing(12, 9, 1, resize=how)(path).image
    assert (image.shape, set(image.flatten().tolist())) == ((1, 12, 9), {77})


def test_an_image_of_the_size_stays_as_it_is_and_one_in_proportion_gets_no_edge(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    exact = torch.randint(256, (3, 10, 14), dtype=torch.uint8, generator=draw)
    twice = exact.repeat_interleave(2, 1).repeat_interleave(2, 2)
    paths = saved(exact, tmp_path / "exact.png"), saved(twice, tmp_path / "twice.png")
    for how in ("pad", "crop", "squash"):
        assert torch.equal(Preprocessing(10, 14, 3, resize=how)(paths[0]).image, exact)
    read = [Preprocessing(10, 14, 3, resize=how)(paths[1]).image.int() for how in ("pad", "crop", "squash")]
    assert all((one - read[2]).abs().max() <= 1 for one in read)


@pytest.mark.usefixtures("workplace")
def test_what_is_chosen_of_proportions_is_told_and_stored(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("red", "blue"):
        for number in range(4):
            saved(torch.full((3, 10, 20 + number), 90, dtype=torch.uint8), Path("photos") / name / f"{number}.png")
    asked = {"data": "photos", "image_size": 16, "epochs": 1, "batch_size": 4, **SIZES, "report": False}
    training.fit(Config.of(**asked, out="padded"))
    told = capsys.readouterr().err
    assert "images resized to 16 x 16 pixels in proportion, with the colour of their edge around them" in told
    assert "(--resize changes it)" in told
    training.fit(Config.of(**asked, out="cropped", resize="crop"))
    assert "images resized" not in capsys.readouterr().err
    for name, how in (("padded", "pad"), ("cropped", "crop")):
        run = run_directory.Run(Path(name))
        assert run.config().resize == how
        assert json.loads((run.directory / "config.json").read_text())["preprocessing"]["resize"] == how
    whole = run_directory.Run(Path("cropped")).config().flat()
    before = Config.of(**{**whole, "resize": "crop"}), {key: value for key, value in whole.items() if key != "resize"}
    assert Config.of(**before[1]).resize == "squash", "runs from before there was a choice"
    assert Config.of(image_size=20, data_seed=1).resize is None


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first images of published sets only, each read once."""
    monkeypatch.setattr(data, "entry", lambda name: replace(entry(name), read=partial(first_of, name)))


@cache
def first_of(name: str, split: str, **about: Any) -> Split:
    whole = entry(name).read(split, **about)
    return whole if name == "strokes" else whole.take(torch.arange(50))


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_test_image_becomes_the_test_image(kind: str, tmp_path: Path) -> None:
    name, options = kind.split(",")[0], KINDS[kind]
    config = Config.of(data=name, data_dir=None if name == "strokes" else str(REAL), validation=0, **options)
    if name != "strokes" and (not REAL.is_dir() or describe(name, data_dir=REAL).missing):
        pytest.skip(f"no {name} in {REAL}")
    dataset = prepare.prepare_data(config)
    network = prepare.build(config.changed(**SIZES), dataset)
    read = prepare.reading_of(network, dataset, config)
    assert read.framing == ("digits" if name in ("strokes", "mnist", "expanded-mnist") else "off")
    raw = load(name, data_dir=config.data_dir, image_size=options.get("image_size") if name == "strokes" else None)
    for k in range(5):
        prepared = read(saved(raw.test.images[k], tmp_path / f"{k}.png"))
        if read.framing == "digits" and dataset.train.images.shape[2:] != raw.test.images.shape[2:]:
            assert prepared.framed, "neither of the network's size nor of that of its training images"
            continue
        assert torch.equal(prepared.image, dataset.test.images[k])
        assert (prepared.inverted, prepared.framed) == (False, False)


def discs(root: Path, kind: str) -> Path:
    """Two classes of discs on white, 64 x 64 pixels: large and small ones, or pale and dark ones."""
    draw = np.random.default_rng(0)
    for k, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for number in range(60):
            radius = int(draw.integers(*((18, 26), (6, 11))[k] if kind == "sizes" else (14, 20)))
            shade = int((200, 40)[k] if kind == "shades" else 20) + int(draw.integers(-15, 15))
            x, y = draw.integers(radius + 1, 63 - radius, 2)
            image = Image.new("L", (64, 64), 255)
            ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
            image.save(root / name / f"{number}.png")
    return root


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    capsys.readouterr()
    assert cli.main(["predict", *arguments, "--csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 28},
        {"image_size": 80, "crop": 64},  # the files are 64 x 64
        {"image_size": 32, "crop": 24, "channels": 3},
        {"image_size": "20x30", "framing": "digits"},
        {"image_size": 64, "framing": "digits", "crop": 28},
    ],
    ids=str,
)
def test_a_file_of_a_folder_becomes_what_its_training_image_is(options: dict[str, Any], workplace: Path) -> None:
    config = Config.of(data=str(discs(workplace / "discs", "shades")), validation=10, **options)
    dataset = prepare.prepare_data(config)
    read = prepare.reading_of(prepare.build(config.changed(**SIZES), dataset), dataset, config)
    for name in ("train", "validation", "test"):
        split, files = dataset.shown(name), [file for file in dataset.files if file.split == name]
        assert split is not None
        for k in range(0, len(files), 7):
            assert torch.equal(read(workplace / "discs" / files[k].path).image, split.images[k])


@pytest.mark.parametrize("kind", ["sizes", "shades"])
def test_predict_and_evaluate_agree_to_the_image(
    kind: str, workplace: Path, capsys: pytest.CaptureFixture[str], blank_figure: None
) -> None:
    """On white paper, where only the size or the shade tells the classes apart; 28 pixels, so that all is resized."""
    folder = discs(workplace / "discs", kind)
    small = {**SIZES, "conv_channels": 16, "decoder_sizes": (32,)}
    config = Config.of(data=str(folder), image_size=28, shift=0, epochs=8, batch_size=16, threads=1, **small)
    fitted = training.fit(replace(config, out="run", report=False))
    assert fitted.test.wrong <= 1
    manifest, dataset = run_directory.Run("run").manifest(), prepare.prepare_data(run_directory.Run("run").config())
    assert manifest is not None
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split is not None
        name = next(name for name in ("train", "validation", "test") if getattr(dataset, name) is split)
        lines = [line for line in manifest.lines if line.split == name]
        rows = predicted(capsys, "run", *(str(folder / line.path) for line in lines))
        wrong = sum(row["class"] != line.class_name for row, line in zip(rows, lines, strict=True))
        assert wrong == evaluate(fitted.network, split).wrong
    every = predicted(capsys, "run", str(folder))
    assert {(row["inverted"], row["framed"]) for row in every} == {("False", "False")}
    assert sum(row["ood"] == "True" for row in every) <= 40, "a threshold of the 95th of a hundred, of 10 images"
    assert predicted(capsys, "run", str(folder), "--framing", "digits")[0]["framed"] == "True"


def test_framing_is_by_the_data_set_and_can_be_chosen() -> None:
    assert {name for name in available() if describe(name).framing == "digits"} == {
        "strokes",
        "mnist",
        "expanded-mnist",
        "affnist",
        "affnist-generated",
    }
    plain = reading((1, 20, 30))
    framed = plain.with_framing("digits")
    assert framed.frame == MNIST_FRAME
    assert framed.with_framing("off") == plain
    assert framed.with_framing(None) is framed


def test_digits_of_a_folder_are_framed_if_asked_for(workplace: Path) -> None:
    for name, place in (("one", 10), ("two", 60)):
        for number in range(4):
            sheet = Image.new("L", (90, 70), 255)
            sheet.paste(0, (place, 20, place + 5, 50 + number))
            (workplace / "sheets" / name).mkdir(parents=True, exist_ok=True)
            sheet.save(workplace / "sheets" / name / f"{number}.png")
    config = Config.of(data="sheets", image_size=28, validation=0, framing="digits")
    whole, plain = prepare.prepare_data(config), prepare.prepare_data(replace(config, framing=None))
    assert whole.preprocessing == Preprocessing(28, 28, 1, framing="digits", frame=MNIST_FRAME, resize="pad")
    ink = whole.train.images.float()
    columns = (ink.sum(2) * torch.arange(28)).sum(-1) / ink.sum((2, 3))
    assert (columns - 14).abs().max() < 1, "in the middle wherever they were"
    assert ink[:, 0, 0, 0].max() == 0
    assert plain.train.images[:, 0, 0, 0].min() > 250


@pytest.mark.parametrize(
    ("config", "frame", "expected"),
    [
        ({"data": "mnist"}, Frame(0.0, 0.7), reading((1, 9, 8), Frame(0.0, 0.7))),
        ({"data": "fashion-mnist"}, Frame(0.0, 0.9), reading((1, 9, 8))),
        ({"data": "my/photos"}, Frame(1.0, 0.9), reading((1, 9, 8))),
        ({"data": "cifar10", "crop": 8}, None, Preprocessing(32, 32, 1, 8)),
        ({"data": "photos", "crop": 8, "image_size": 20}, None, Preprocessing(20, 20, 1, 8)),
        ({}, Frame(0.0, 0.7), reading((1, 9, 8))),
    ],
    ids=str,
)
def test_a_card_of_before_is_read_as_it_was_meant(
    config: dict[str, Any], frame: Frame | None, expected: Preprocessing, tmp_path: Path
) -> None:
    values = Card(config=config, frame=frame).to_dict()
    del values["preprocessing"]
    (tmp_path / "card.json").write_text(json.dumps(values), encoding="utf-8")
    assert Card.read(tmp_path / "card.json").reading((1, 9, 8)) == expected


def test_a_card_of_today_tells_it(tmp_path: Path) -> None:
    for one in (reading((3, 20, 30)), reading((1, 28, 28), MNIST_FRAME, bits=12, crop=24)):
        card = Card(config={"data": "mnist"}, preprocessing=one)
        (tmp_path / "card.json").write_text(card.to_json(), encoding="utf-8")
        assert Card.read(tmp_path / "card.json") == card
        assert card.reading(one.image_shape) == one


@pytest.mark.parametrize("size", [(24, 24), (32, 32), (50, 41)])
def test_every_image_loses_its_edge_but_one_that_is_what_the_network_is_to_see(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """The page of the demo sends what is drawn in the network's own size."""
    draw = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path, read = saved(draw, tmp_path / "x.png"), Preprocessing(32, 32, 3, crop=24)
    whole = Preprocessing(32, 32, 3)(path).image
    assert torch.equal(read(path).image, whole[:, 4:28, 4:28])
    assert torch.equal(read(path, seen=True).image, draw if size == (24, 24) else whole[:, 4:28, 4:28])


BLANK = "blank: one colour all over"


@pytest.mark.parametrize(
    ("make", "frame", "note"),
    [
        (lambda: Image.new("L", (50, 60), 255), MNIST_FRAME, "no ink"),
        (lambda: Image.new("RGB", (50, 60), (90, 70, 80)), MNIST_FRAME, "no ink"),
        (lambda: Image.new("L", (28, 28), 0), MNIST_FRAME, BLANK),
        (lambda: Image.new("RGB", (50, 60), "white"), None, BLANK),
        (lambda: Image.new("RGBA", (50, 60), (0, 0, 0, 0)), None, BLANK),
    ],
)
def test_an_image_with_nothing_in_it_is_noted(make: Callable[[], Image.Image], frame: Frame | None, note: str) -> None:
    file = io.BytesIO()
    make().save(file, "PNG")
    assert note in reading((1, 28, 28), frame)(file.getvalue()).notes


def test_predict_says_that_a_sheet_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (300, 200), 255).save(tmp_path / "sheet.png")
    assert cli.main(["predict", "capsnet-mnist", str(tmp_path / "sheet.png")]) == 0
    assert "no ink" in capsys.readouterr().out
    assert predicted(capsys, "capsnet-mnist", str(tmp_path / "sheet.png"))[0]["notes"] == "no ink"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 9, 1), "channels, height and width of a preprocessing must be from 1 on; got \\(1, 0, 9\\)"),
        ((9, 9, 1, 10), "crop of a preprocessing must be 1 to the shorter side; got 10"),
        ((9, 9, 1, None, 7), "bits of a preprocessing must be 8 to 32; got 7"),
        ((9, 9, 1, None, None, "digits"), "frame of a preprocessing must go with framing digits; got digits"),
        ((9, 9, 1, None, None, "off", MNIST_FRAME), "frame of a preprocessing must go with framing digits; got off"),
    ],
)
def test_values_that_do_not_exist_are_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Preprocessing(*values)


@pytest.mark.slow
def test_photographs_are_trained_evaluated_and_predicted(
    workplace: Path, capsys: pytest.CaptureFixture[str], blank_figure: None
) -> None:
    """2,000 x 3,000 pixels, JPEG, half of them stored turned as EXIF says, names with spaces: sky above, or below."""
    for name, upper, lower in (("sky above", 220, 60), ("sky below", 60, 220)):
        (workplace / "my photos" / name).mkdir(parents=True)
        for number in range(8):
            photo = Image.new("RGB", (3000, 2000), (lower, 90, 80))
            photo.paste((upper, 160, 200), (0, 0, 3000, 900 + 20 * number))
            exif = Image.Exif()
            if number % 2:
                photo, exif[0x0112] = photo.transpose(Image.Transpose.ROTATE_90), 6
            photo.save(workplace / "my photos" / name / f"IMG {number} copy.JPG", exif=exif)
    words = ("--conv-channels", "16", "--capsule-types", "2", "--decoder-sizes", "32", "--threads", "1")
    assert cli.main(["train", "--data", "my photos", "--shift", "0", "--out", "my run", *words]) == 0
    assert "validation" not in capsys.readouterr().out.splitlines()[0]
    assert run_directory.Run("my run").config().image_size == 32
    assert cli.main(["evaluate", "my run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["wrong"] == 0
    rows = predicted(capsys, "my run", "my photos")
    assert [Path(row["file"]).parent.name for row in rows] == [row["class"] for row in rows]
    assert len(rows) == 16
