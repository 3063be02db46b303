import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capsnet.checkpoints.model_card import Card
from capsnet.config import Config
from capsnet.data import Dataset, Split
from capsnet.data.dataset import ImageFile
from capsnet.data.image_file import Header
from capsnet.data.sets.strokes import strokes
from capsnet.evaluation import Predictions, predict_split
from capsnet.evaluation.ood import Threshold
from capsnet.models import CapsuleNetwork, Network, create
from capsnet.plots.classes import MOST
from capsnet.report import report
from tiny import SIZES, pairs

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
    config = Config.of(data="strokes", epochs=2, seed=7)
    found = predict_split(one, dataset.test)
    return report.render(one, dataset, found, config=config, card=CARD, title="a <run>", **about)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_report_holds_everything_and_loads_nothing(dataset: Dataset) -> None:
    told = page(network(), dataset, rows=ROWS, result=RESULT)
    for heading in (
        "Training images",
        "Training",
        "Reconstructions",
        "What each dimension means",
        "Routing",
        "Pose",
        "Errors",
    ):
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
    assert len(pictures) == 11
    for kind, content in pictures:
        start = base64.b64decode(content)[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if kind == "png" else start.startswith(b"<?xml")
    assert told.count("alt=") == 11
    assert "As the network gets them, augmentation included: shift 2 pixels." in told
    assert '<meta name="viewport"' in told


@pytest.mark.slow
def test_wrong_files_are_named_the_surest_first_and_the_most_confused_classes(dataset: Dataset) -> None:
    one = network("baseline", width=0.03)
    found = predict_split(one, dataset.test)
    header = Header(28, 28, False, None)
    images = [ImageFile(f"{k}<.png", int(label), "test", "", header) for k, label in enumerate(dataset.test.labels)]
    told = page(one, replace(dataset, files=tuple(images)))
    wrong = [k for k in found.winning.argsort(descending=True).tolist() if found.wrong[k]]
    rows = re.findall(r"<tr><td>(\d+)&lt;.png</td><td>(\d)</td><td>(\d)</td><td>", told)
    assert [int(name) for name, *_ in rows] == wrong[: len(rows)]
    assert [(int(a), int(b)) for _, a, b in rows] == [
        (int(found.labels[k]), int(found.predictions[k])) for k in wrong[: len(rows)]
    ]
    assert len(rows) == min(len(wrong), MOST)
    counts = found.confusion.clone().fill_diagonal_(0)
    times = re.findall(r"<tr><td>(\d)</td><td>(\d)</td><td>(\d+)</td><td>(\d+)</td></tr>", told)
    assert [int(n) for *_, n, _ in times] == counts.flatten().sort(descending=True).values[: len(times)].tolist()
    assert all(int(counts[int(a), int(b)]) == int(n) for a, b, n, _ in times)
    assert "Wrong files" not in page(one, dataset)


@pytest.mark.slow
def test_the_epoch_that_validation_chose_is_said(dataset: Dataset) -> None:
    one = network("baseline", width=0.03)
    told = page(one, dataset, result={**RESULT, "selection": "none: weights after the last epoch, and so on"})
    assert " %. Weights after the last epoch, and so on.</p>" in told
    assert "1.50 % of 77 images</td>" in told
    about = {**RESULT, "selection": "weights after epoch 1 of 2; and so on", "kept_epoch": 1}
    told = page(one, dataset, rows=ROWS, result=about)
    assert " %. Weights after epoch 1 of 2; and so on.</p>" in told
    assert "1.50 % of 77 images, which chose the epoch</td>" in told
    (curves,) = re.findall(r'base64,([^"]+)" alt="Losses and error by epoch"', told)
    assert "kept: epoch 1" in base64.b64decode(curves).decode()


@pytest.mark.slow
def test_its_numbers_are_those_of_the_test_split(dataset: Dataset) -> None:
    one = network()
    with torch.no_grad():
        wrong = int((one(dataset.test.images / 255).scores.argmax(-1) != dataset.test.labels).sum())
    told = page(one, dataset)
    assert f"{100 * wrong / 40:.2f} % test error" in told
    assert f"{wrong} of 40 test images wrong" in told
    assert "<h2>Training</h2>" not in told  # no rows


@pytest.mark.slow
def test_without_decoder_capsules_or_pose_those_parts_are_left_out(dataset: Dataset) -> None:
    assert "mean summed squared error per test image" in page(network(), dataset)
    told = page(network(reconstruction=False), dataset)
    assert "mean summed squared error per test image" not in told
    assert "<h2>Reconstructions</h2>" not in told
    assert "<h2>Routing</h2>" in told
    assert "flagged as out of distribution" not in told
    bare = Split(dataset.test.images, dataset.test.labels)
    told = page(network("baseline"), replace(dataset, test=bare))
    assert "<h2>Routing</h2>" not in told
    assert "<h2>Pose</h2>" not in told
    assert "<h2>Errors</h2>" in told


@pytest.mark.slow
def test_a_colour_network_with_few_classes(photos: Path) -> None:
    from capsnet.data import load

    own = load(str(photos))
    one = create("capsnet", image_shape=(3, 12, 13), num_classes=3, classes=own.classes, **SIZES).eval()
    assert "<h2>Reconstructions</h2>" in page(one, own)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [30, 31])
def test_of_more_than_30_classes_the_worst_are_drawn_and_a_table_has_all(classes: int) -> None:
    split = Split(torch.randint(256, (2 * classes, 1, 28, 28), dtype=torch.uint8), torch.arange(classes).repeat(2))
    names = tuple(f"<name {k}>" for k in range(classes))
    made = Dataset("own", names, split, split)
    told = page(network(num_classes=classes, classes=names), made)
    many = classes > 30
    assert ("There are 31 classes: the figures show the 30 with the largest error" in told) == many
    assert ("<details><summary>All 31 classes</summary>" in told) == many
    table = told.partition("<summary>All 31 classes")[2].partition("</details>")[0]
    assert table.count("<tr>") == (32 if many else 0)
    assert ("<td>&lt;name 30&gt;</td><td>2</td>" in table) == many
    assert ('alt="Confusion matrix"' in told) == (not many)


def test_routing_is_followed_for_fewer_images_where_there_are_many_classes() -> None:
    def followed(classes: int, **sizes: int) -> int:
        with torch.device("meta"):
            one = create("capsnet", num_classes=classes, **sizes)  # type: ignore[arg-type]
            assert isinstance(one, CapsuleNetwork)
            return report._routed(one, torch.empty(1, 1, 28, 28))

    assert followed(10) == 48
    assert followed(1000, conv_channels=16, capsule_types=2) == 5
    assert followed(1000) == 1


@pytest.mark.slow
def test_write(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "the-run" / "report.html"
    one = network("baseline")
    report.write(path, one, dataset, predict_split(one, dataset.test), config=Config(), card=Card())
    assert "<title>the-run</title>" in path.read_text(encoding="utf-8")
    assert "Not measured: class 0 must have at least 194 training" in path.read_text(encoding="utf-8")


def test_draw_reconstructions(dataset: Dataset, tmp_path: Path) -> None:
    report.draw_reconstructions(network(), dataset.test, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_pose_is_measured_on_cropped_images_too(dataset: Dataset) -> None:
    section = report._pose(network(image_shape=(1, 20, 20)), dataset.cropped(20))
    assert "linear regression for each class on 120 training images" in section.text


# images of several objects


def of_pairs(name: str = "capsnet", classes: int = 4) -> Network:
    options = {"width": 0.05} if name == "baseline-multimnist" else {}
    return network(name, image_shape=(1, 12, 13), num_classes=classes, objects_per_image=2, **options)


def test_the_report_of_pairs_tells_the_exact_set_error_and_draws_objects_apart() -> None:
    made, one = pairs(), of_pairs()
    found = predict_split(one, made.test)
    wrong = int(found.wrong.sum())
    told = page(one, made, rows=ROWS, result=RESULT)
    assert f"{100 * wrong / 15:.2f} % exact-set test error" in told
    assert f"{wrong} of 15 test images wrong" in told
    for heading, there in {"Training": True, "Overlapping objects": True, "Errors": False, "Routing": False}.items():
        assert (f"<h2>{heading}</h2>" in told) == there
    assert 'alt="Each of two overlapping objects drawn alone"' in told
    assert told.count("alt=") == 2
    assert "mean summed squared error per test image" not in told
    bare = page(of_pairs("baseline-multimnist"), made)
    assert "exact-set test error" in bare
    assert "alt=" not in bare


def all_pairs(classes: int) -> tuple[Split, Predictions]:
    """An image of every ordered pair of classes; in every third the second object is taken for another."""
    labels = torch.tensor([[a, b] for a in range(classes) for b in range(classes) if a != b])
    generator = torch.Generator().manual_seed(0)
    objects = torch.randint(0, 256, (len(labels), 2, 1, 12, 13), dtype=torch.uint8, generator=generator)
    split = Split(objects.amax(1), labels, single_images=objects)
    said = labels.clone()
    if classes > 2:
        for n in range(0, len(labels), 3):
            said[n, 1] = next(k for k in range(classes) if k not in labels[n].tolist())
    scores, losses = torch.zeros(len(labels), classes), torch.zeros(len(labels), 3)
    return split, Predictions(scores, labels.sort(-1).values, said.sort(-1).values, losses, None)


@pytest.mark.parametrize("classes", [3, 4, 7])
def test_objects_are_drawn_as_they_are_as_predicted_and_as_one_that_is_not_there(classes: int) -> None:
    split, found = all_pairs(classes)
    parts = report.drawn_apart(of_pairs(classes=classes), split, found, count=1000)
    right, wrong = (~found.wrong).nonzero().flatten(), found.wrong.nonzero().flatten()
    assert len(wrong) == -(-len(split) // 3)
    asked = {
        "Right": (right, split.labels[right]),
        "Wrong, drawn as predicted": (wrong, found.predictions[wrong]),
        "Wrong, drawn as what is there": (wrong, split.labels[wrong]),
    }
    absent = "Told of an object that is not there"
    assert list(parts) == [*asked, absent]
    for heading, (index, drawn) in asked.items():
        part, there = parts[heading]
        assert torch.equal(part.classes, drawn)
        assert torch.equal(there, split.labels[index])
        assert torch.equal(part.images, split.images[index] / 255)
    part, there = parts[absent]
    assert torch.equal(there, split.labels[right])
    assert torch.equal(part.classes[:, 0], there[:, 0])
    assert (part.classes[:, 1:] != there).all(), "the starred class must not be there"
    assert int(part.classes.min()) >= 0
    assert int(part.classes.max()) < classes


def test_of_two_classes_none_is_absent_and_of_right_images_none_is_wrong() -> None:
    split, found = all_pairs(2)
    assert list(report.drawn_apart(of_pairs(classes=2), split, found)) == ["Right"]


def test_objects_of_the_first_images_of_each_kind_are_drawn() -> None:
    split, found = all_pairs(5)
    parts = report.drawn_apart(of_pairs(classes=5), split, found, count=3)
    assert [len(there) for _, there in parts.values()] == [3, 3, 3, 3]
    assert torch.equal(parts["Right"][1], split.labels[[1, 2, 4]])


def test_the_picture_of_a_run_of_pairs_is_of_objects_drawn_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = report.drawn_apart

    def counted(one: Network, split: Split, found: Predictions, *, count: int) -> object:
        seen.append(len(split))
        assert len(found.predictions) == len(split)
        return real(one, split, found, count=count)

    monkeypatch.setattr(report, "drawn_apart", counted)
    report.draw_reconstructions(of_pairs(), pairs().test, tmp_path / "a.png", count=4)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert seen == [4]
