import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from capsnet.checkpoints import pretrained
from capsnet.checkpoints.model_card import Card, command_of
from capsnet.cli import CAPSNET
from capsnet.cli.parsing import config_of, parse
from capsnet.cli.train import Train
from capsnet.config import Config, preset
from capsnet.data.photo import Frame
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.models import create

CARD = Card(
    config={"preset": "paper", "data": "mnist", "epochs": 20},
    epochs=20,
    train_images=55_000,
    test={"error_percent": 0.5, "wrong": 50, "total": 10_000, "interval": (0.4, 0.6)},
    preprocessing=Preprocessing(28, 28, 1, framing="digits", frame=Frame(0.0, 20 / 28)),
    threshold=Threshold(30.0, 0.05, 5_000, "validation"),
)


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    for card in (CARD, Card(), replace(CARD, threshold=None)):
        path.write_text(card.to_json(), encoding="utf-8")
        assert Card.read(path) == card
    assert CARD.data == "mnist"
    assert CARD.trained() == Config.of(data="mnist", epochs=20)
    assert CARD.command == "capsnet train --data mnist --epochs 20"


def test_no_file_is_an_empty_card_and_unknown_parts_are_passed_over(tmp_path: Path) -> None:
    assert Card.read(tmp_path / "card.json") == Card()
    assert Card().data is None
    assert Card().command is None
    with pytest.raises(InputError, match="card must tell the configuration of the run; it does not"):
        Card().trained()
    newer = {**json.loads(CARD.to_json()), "colour_of_the_sky": "blue"}
    (tmp_path / "card.json").write_text(json.dumps(newer), encoding="utf-8")
    assert Card.read(tmp_path / "card.json") == CARD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON; got: Expecting property name"),
        ("[" * 100_000, "must be JSON; got: maximum recursion depth"),
        ("[]", r"must be a mapping of names to values; got \[\]$"),
        ('{"frame": 3}', "frame must be a mapping of names to values or nothing; got 3$"),
        ('{"threshold": {"value": 1}}', "threshold must hold false_alarm_rate; it is missing$"),
        ('{"frame": {"ground": 0, "box": 1, "x": 1}}', "frame must hold ground, box only; got 'x'$"),
        ('{"frame": {"ground": 7, "box": 1}}', r"frame must .*; ground of a frame must be in \[0, 1\]; got 7.0$"),
        ('{"frame": {"ground": NaN, "box": 1}}', "frame.ground must be a finite number; got nan$"),
        ('{"threshold": {"value": "x", "false_alarm_rate": 0, "images": 1, "split": "a"}}', "value must be a number"),
        (CARD.to_json().replace("0.6\n", "0.6, 3\n"), r"interval must be a list of 2 numbers; got \[0.4, 0.6, 3\]$"),
        ('{"test": {"wrong": true}}', "test must hold error_percent; it is missing$"),
        (CARD.to_json().replace('"wrong": 50', '"wrong": true'), "test.wrong must be a whole number; got True$"),
        ('{"epochs": 1.5}', "epochs must be a whole number or nothing; got 1.5$"),
        ('{"config": []}', r"config must be a mapping of names to values; got \[\]$"),
        ('{"config": {"data": 3}}', "data must be text; got 3$"),
        ('{"config": {"colour": "blue"}}', "colour is no option"),
    ],
)
def test_a_damaged_card_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"^file {path}:? .*{message}") as caught:
        Card.read(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config.of(data="my images", epochs=7, flip=True, reconstruction=False, decoder_sizes=(8, 9), lr=0.01),
        preset("authors").changed(seed=3, routing_bias=False),
    ],
)
def test_the_command_makes_the_same_configuration(config: Config) -> None:
    words = shlex.split(command_of(replace(config, out="somewhere", tensorboard=True)))
    assert words[:2] == ["capsnet", "train"]
    command = parse(CAPSNET, words[1:], prog="capsnet")
    assert isinstance(command, Train)
    assert config_of(command) == config


def test_people_read_the_card_without_any_folder_of_the_disk(tmp_path: Path) -> None:
    network = create("baseline", image_shape=(3, 12, 16), num_classes=2, classes=("cat", "dog"), width=0.1)
    network.preprocessing = Preprocessing(12, 16, 3, resize="pad")
    test = {"error_percent": 5.0, "wrong": 5, "total": 100, "interval": (2.15, 11.18), "selection": "none: the last"}
    card = Card(
        config=Config.of(model="baseline", data="/home/somebody/pets", epochs=4).flat(),
        epochs=4,
        train_images=90,
        test=cast(Any, test),
        classes={"cat": 60, "dog": 30},
    )
    pretrained.save_pretrained(network, tmp_path, card)
    readme = tmp_path / "README.md"
    text = readme.read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("capsnet", "image-classification")
    assert "datasets" not in header
    for part in (
        "# baseline, trained on pets",
        "12 x 16 pixels in proportion",
        "cat (60), dog (30)",
        "5.00 % (5 of 100 wrong; 95 % interval 2.15 to 11.18 %)",
        "none: the last",
        "4 epochs on 90 images by `capsnet train",
        "--data pets",
    ):
        assert part in text
    assert "somebody" not in text
    published = replace(card, config=Config.of(model="baseline", data="mnist").flat()).readme(network)
    assert yaml.safe_load(published.split("---")[1])["datasets"] == ["mnist"]
    pretrained.save_pretrained(network, tmp_path, replace(card, epochs=5))
    assert "5 epochs" in readme.read_text(encoding="utf-8"), "ours is replaced"
    readme.write_text("mine", encoding="utf-8")
    pretrained.save_pretrained(network, tmp_path, card)
    assert readme.read_text(encoding="utf-8") == "mine"
