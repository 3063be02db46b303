import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capsnet import report
from capsnet.analysis.strangers import Threshold
from capsnet.card import Card
from capsnet.config import Config
from capsnet.data import Dataset, Split
from capsnet.data.strokes import strokes
from capsnet.models import Network, create
from tiny import SIZES

CARD = Card(threshold=Threshold(50.0, 0.05, 77, "validation"), epochs=2, train_images=120)
ROWS = [
    {
        "epoch": epoch,
        **{f"train_{name}": 1.0 for name in ("loss", "classification_loss", "reconstruction_loss", "error_percent")},
    }
    for epoch in (1, 2)
]
RESULT = {"seed": 7, "device": "a <chip> & more", "seconds": 90.0, "validation": {"error_percent": 1.5, "total": 77}}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return strokes(train=120, validation=0, test=40)


def network(name: str = "capsnet", **options: object) -> Network:
    torch.manual_seed(0)
    sizes = SIZES if name == "capsnet" else {}
    return create(name, **{**sizes, **options}).eval()


def page(one: Network, dataset: Dataset, **about: object) -> str:
    config = Config(data="strokes", epochs=2, seed=7)
    return report.report(one, dataset, config=config, card=CARD, title="a <run>", **about)  # type: ignore[arg-type]


def test_the_report_holds_everything_and_loads_nothing(dataset: Dataset) -> None:
    told = page(network(), dataset, rows=ROWS, result=RESULT)
    for heading in ("Training", "Reconstructions", "What each dimension means", "Routing", "Pose", "Errors"):
        assert f"<h2>{heading}</h2>" in told
    assert "a &lt;run&gt;" in told
    assert "a &lt;chip&gt; &amp; more" in told
    assert "<run>" not in told
    assert "capsnet train --epochs 2 --seed 7" in told
    assert "77 validation images" in told
    assert "1.50 % of 77 images" in told
    outside = re.sub(r'src="data:image/[a-z+]+;base64,[^"]+"', "", told)
    assert not re.search(r"https?:|src=|url\(|@import|<link|<script", outside)
    pictures = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', told)
    assert len(pictures) == 10
    for kind, content in pictures:
        start = base64.b64decode(content)[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if kind == "png" else start.startswith(b"<?xml")
    assert told.count("alt=") == 10
    assert '<meta name="viewport"' in told


def test_its_numbers_are_those_of_the_test_split(dataset: Dataset) -> None:
    one = network()
    with torch.no_grad():
        wrong = int((one(dataset.test.images / 255).scores.argmax(-1) != dataset.test.labels).sum())
    told = page(one, dataset)
    assert f"{100 * wrong / 40:.2f} % test error" in told
    assert f"{wrong} of 40 test images wrong" in told
    assert "<h2>Training</h2>" not in told  # no rows


def test_without_decoder_capsules_or_pose_those_parts_are_left_out(dataset: Dataset) -> None:
    told = page(network(reconstruction=False), dataset)
    assert "<h2>Reconstructions</h2>" not in told
    assert "<h2>Routing</h2>" in told
    assert "flagged as strangers" not in told
    bare = Split(dataset.test.images, dataset.test.labels)
    told = page(network("baseline"), replace(dataset, test=bare))
    assert "<h2>Routing</h2>" not in told
    assert "<h2>Pose</h2>" not in told
    assert "<h2>Errors</h2>" in told


def test_a_colour_network_with_few_classes(photos: Path) -> None:
    from capsnet.data import load

    own = load(str(photos))
    one = create("capsnet", image_shape=(3, 12, 13), num_classes=3, classes=own.classes, **SIZES).eval()
    assert "<h2>Reconstructions</h2>" in page(one, own)


def test_write_and_metrics(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "the-run" / "report.html"
    report.write(path, network("baseline"), dataset, config=Config(), card=Card())
    assert "<title>the-run</title>" in path.read_text(encoding="utf-8")
    assert "Not measured: class 0 must have at least 194 training" in path.read_text(encoding="utf-8")
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,validation_loss\n1,0.5,\n", encoding="utf-8")
    assert report.metrics(tmp_path / "metrics.csv") == [{"epoch": 1.0, "train_loss": 0.5}]
    assert report.metrics(tmp_path / "none.csv") == []


def test_draw_reconstructions(dataset: Dataset, tmp_path: Path) -> None:
    report.draw_reconstructions(network(), dataset.test, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
