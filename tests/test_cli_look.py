"""The verbs that look at a trained network, and `predict`, as a user types them."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from capsnet import report
from capsnet.checkpoints import pretrained
from capsnet.cli import CAPSNET
from capsnet.data.sets.strokes import strokes
from capsnet.evaluation.ood import auroc, reconstruction_errors
from capsnet.training.fit import fit
from tiny import files, pairs, tiny, typed

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of half an epoch's worth of strokes, with everything a run has but its report."""
    place = tmp_path_factory.mktemp("look") / "run"
    few = strokes(train=300, validation=40, test=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda path, *arguments, **about: path.write_text("", encoding="utf-8"))
        fit(tiny(Path("strokes"), out=str(place)), few)
    return place


@pytest.fixture
def run(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, called `run`, beside 60 test images of strokes."""
    few = strokes(train=300, validation=40, test=60)
    monkeypatch.setattr("capsnet.training.prepare.load", lambda *arguments, **options: few)
    shutil.copytree(trained, workplace / "run")
    (workplace / "images" / "more").mkdir(parents=True)
    for k, image in enumerate(few.test.images[:3, 0]):
        Image.fromarray(image.numpy()).save(workplace / "images" / ("more" if k == 2 else "") / f"{k}.png")
    return Path("run")


def told(capture: Capture, line: str) -> str:
    code, out, err = typed(capture, line)
    assert (code, err) == (0, "")
    return out


def kind(path: Path | str) -> str | None:
    with Image.open(path) as picture:
        return picture.format


def test_plot_reconstructions(run: Path, capsys: Capture) -> None:
    out = told(capsys, "plot reconstructions run --right 3 --wrong 2")
    assert out.endswith("figure: run/figures/reconstructions.png\n")
    with Image.open("run/figures/reconstructions.png") as picture:
        assert picture.info["Description"] == "capsnet plot reconstructions run --right 3 --wrong 2"
    numbers = json.loads(told(capsys, "plot reconstructions run --json --format svg --split train"))
    assert numbers["images"] == 300
    assert numbers["figure"].endswith("reconstructions.svg")
    assert numbers["reconstruction_error_right"] > 0


def test_plot_perturbations(run: Path, capsys: Capture) -> None:
    numbers = json.loads(
        told(capsys, "plot perturbations run --image images/0.png images/1.png --classes 3 8 --span 0.5 --json")
    )
    assert numbers["classes"] == ["3", "8", "3", "8"]
    assert numbers["deltas"][0] == -0.5
    change = torch.tensor(numbers["change"])
    assert change.shape == (4, 4, 11)
    assert (change[:, :, 5] == 0).all()
    assert change[:, :, 0].max() > 0
    told(capsys, "plot perturbations run --image images/0.png --gif sweep.gif --out one.pdf --format pdf --steps 3")
    assert kind("sweep.gif") == "GIF"
    assert Path("one.pdf").read_bytes()[:4] == b"%PDF"


def test_perturb_takes_right_images_of_the_classes(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from capsnet import evaluation

    real = evaluation.predict_split

    def all_right(*arguments: object) -> object:
        found = real(*arguments)  # type: ignore[arg-type]
        return found._replace(predictions=found.labels)

    monkeypatch.setattr(evaluation, "predict_split", all_right)
    assert json.loads(told(capsys, "plot perturbations run --classes 2 --images 2 --json"))["classes"] == ["2", "2"]
    assert len(json.loads(told(capsys, "plot perturbations run --classes all --json"))["classes"]) == 10
    assert json.loads(told(capsys, "plot perturbations run --json"))["classes"] == ["0"]


def test_perturb_draws_no_more_sheets_than_a_figure_holds(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capsnet.cli.plot.MOST_SHEETS", 9)
    code, out, err = typed(capsys, "plot perturbations run --classes all")
    assert (code, out) == (2, "")
    assert err.endswith(": --images, --image and --classes must make at most 9 sheets; got 10\n")


def test_plot_couplings(run: Path, capsys: Capture) -> None:
    numbers = json.loads(told(capsys, "plot couplings run --images 20 --show 2 --json"))
    assert (numbers["data"], numbers["images"]) == ("strokes", 20)
    assert len(numbers["entropy_bits"]) == 3
    assert numbers["entropy_bits"][0] == pytest.approx(numbers["entropy_bits_of_uniform"], abs=1e-5)
    assert kind(numbers["figure"]) == "PNG"
    out = told(capsys, "plot couplings run --image images/0.png")
    assert "images/0.png: mean of 1 images" in out
    assert len(out.splitlines()) == 6
    assert "iteration  entropy" in out


@pytest.mark.usefixtures("run")
def test_couplings_found_in_one_step_are_told_by_name(capsys: Capture) -> None:
    words = "--model efficient-capsnet --conv-channels 8 8 8 16 --data strokes --epochs 1 --no-report"
    assert typed(capsys, f"train {words} --out attention")[0] == 0
    out = told(capsys, "plot couplings attention --images 4")
    assert "iteration" not in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["couplings", "uniform", "attention"]


def test_pose(run: Path, capsys: Capture) -> None:
    out = told(capsys, "analyse pose run --against run")
    assert "slant degrees" in out
    assert "n = 60" in out
    assert told(capsys, "plot pose run --against run") == f"{out}figure: run/figures/pose.png\n"
    networks = json.loads(told(capsys, "analyse pose run --json --out pose.json"))["networks"]
    assert json.loads(Path("pose.json").read_text(encoding="utf-8"))["networks"] == networks
    assert list(networks) == ["capsnet"]
    assert networks["capsnet"]["train_images"] == 300


def test_plot_results(run: Path, capsys: Capture) -> None:
    out = told(capsys, "plot all run")
    paths = [Path(line.removeprefix("figure: ")) for line in out.splitlines()]
    assert [path.stem for path in paths] == ["curves", "class-errors", "confusion", "gallery", "lengths", "reliability"]
    assert all(kind(path) == "PNG" for path in paths)
    numbers = json.loads(told(capsys, "plot confusion run --out c.svg --format svg --json"))
    assert numbers["figures"] == ["c.svg"]
    assert sum(map(sum, numbers["confusion"])) == numbers["images"] == 60
    (run / "metrics.csv").unlink()
    assert typed(capsys, "plot curves run")[2] == (
        "capsnet plot curves: error: curves must be of a run directory with metrics.csv; run has none\n"
    )


@pytest.mark.slow
def test_report(run: Path, capsys: Capture) -> None:
    assert told(capsys, "report run") == "report: run/report.html\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>run</title>" in page
    assert "<h2>Training</h2>" in page
    assert "80 validation images" not in page
    assert "40 validation images" in page


@pytest.mark.slow
def test_ood(run: Path, capsys: Capture) -> None:
    record = json.loads(told(capsys, "analyse ood run --against noise --json --out record.json"))
    assert json.loads(Path("record.json").read_text(encoding="utf-8")) == record
    (row,) = record["ood"]
    assert (row["data"], row["images"]) == ("noise", 10_000)
    network, few = pretrained.load("run"), strokes(train=300, validation=40, test=60)
    noise = torch.randint(0, 256, (10_000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    strange, known = (reconstruction_errors(network, images / 255) for images in (noise, few.test.images))
    assert row["auroc"] == pytest.approx(auroc(known, strange), abs=1e-4)
    limit = record["threshold"]["value"]
    assert row["flagged"] == pytest.approx(float((strange > limit).double().mean()), abs=1e-3)
    assert record["threshold"]["images"] == 40
    assert 0 <= record["known"]["false_alarms"] <= 0.3
    (Path("odd") / "below").mkdir(parents=True)
    for name in ("a.png", "below/b.png"):
        Image.new("L", (40, 50), 90).save(Path("odd") / name)
    (row,) = json.loads(told(capsys, "analyse ood run --against odd --json"))["ood"]
    assert (row["data"], row["images"]) == ("odd", 2)
    out = told(capsys, "analyse ood run --against noise")
    assert "in distribution: 60 test images of strokes" in out


@pytest.mark.parametrize("form", ["", "--json", "--csv"])
def test_predict_files_folders_and_standard_input(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("images/0.png").read_bytes())))
    out = told(capsys, f"predict run - images images/1.png --save-reconstructions seen {form}")
    names = ["-", "images/0.png", "images/1.png", "images/more/2.png", "images/1.png"]
    if form == "--json":
        rows = json.loads(out)
        assert [row["file"] for row in rows] == names
        assert rows[0] == {**rows[1], "file": "-"}
    elif form == "--csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["file"] for row in rows] == names
        assert set(rows[0]) >= {"class", "presence", "runner_up", "reconstruction_error", "ood"}
    else:
        assert [line.split()[0] for line in out.splitlines()[:6]] == ["file", *names]
    assert files("seen") == {"stdin.png", "0.png", "1.png", "2.png", "1-2.png"}
    with Image.open("seen/0.png") as both:
        assert both.size == (2 * 28 + 2, 28)


def test_predict_prints_as_many_classes_as_are_asked_for(run: Path, capsys: Capture) -> None:
    image = "images/0.png"
    plain = json.loads(told(capsys, f"predict run {image} --json"))[0]
    asked = json.loads(told(capsys, f"predict run {image} --json --top 2 --scores"))[0]
    names = [plain["class"], plain["runner_up"]]
    assert [one["class"] for one in asked["top"]] == names
    assert [one["presence"] for one in asked["top"]] == [plain["presence"], plain["runner_up_presence"]]
    assert (len(asked["scores"]), max(asked["scores"], key=asked["scores"].get)) == (10, plain["class"])
    assert {name: value for name, value in asked.items() if name not in ("top", "scores")} == plain
    (row,) = csv.DictReader(io.StringIO(told(capsys, f"predict run {image} --csv --top 2 --scores")))
    assert [row["top_1"], row["top_2"]] == names
    assert float(row[f"presence of {names[1]}"]) == float(row["top_2_presence"]) == plain["runner_up_presence"]
    head, line = told(capsys, f"predict run {image} --top 3").splitlines()[:2]
    assert ("runners-up" in head, line.count(", ")) == (True, 1)
    assert [word for word in line.split() if word in asked["scores"]][:2] == names


def test_predict_goes_on_after_a_bad_file(run: Path, capsys: Capture) -> None:
    Path("images/0.png").write_text("no image", encoding="utf-8")
    code, out, err = typed(capsys, "predict run images")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "images/0.png must be a readable image" in err
    assert "images/1.png" in out
    assert "Traceback" not in err


def test_nothing_is_overwritten_unasked(run: Path, capsys: Capture) -> None:
    Path("mine.png").write_text("mine", encoding="utf-8")
    Path("seen").mkdir()
    Path("seen/0.png").write_text("mine", encoding="utf-8")
    for line in (
        "plot couplings run --images 1 --out mine.png",
        "report run --out mine.png",
        "plot perturbations run --gif mine.png",
        "analyse ood run --against noise --out mine.png",
        "predict run images --save-reconstructions seen",
    ):
        code, out, err = typed(capsys, line)
        assert (code, out) == (2, ""), line
        assert "--overwrite" in err
        assert ("--gif must be a new file" in err) == ("--gif" in line)
    assert Path("mine.png").read_text(encoding="utf-8") == Path("seen/0.png").read_text(encoding="utf-8") == "mine"
    told(capsys, "plot couplings run --images 1 --out mine.png --overwrite")
    assert kind("mine.png") == "PNG"


def test_bad_input_is_told_before_the_work(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.png").touch()
    monkeypatch.setattr("capsnet.analysis.pose_probe.features", None)  # where it is called, a TypeError
    assert typed(capsys, "plot pose run --against nowhere")[0] == 2
    monkeypatch.setattr("capsnet.checkpoints.pretrained.load", None)
    for line in (
        "plot reconstructions run",
        "plot perturbations run",
        "plot couplings run",
        "plot pose run",
        "plot lengths run",
    ):
        code, _, err = typed(capsys, f"{line} --out mine.png")
        assert code == 2
        assert err.endswith("--out must be a new file, or be given with --overwrite; got mine.png\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plot reconstructions run --right 0 --wrong 0", "--right and --wrong must not both be 0; got 0 and 0"),
        ("plot perturbations run --classes 11", "--classes must be all, or among 0, 1, 2"),
        ("plot perturbations run --image images/0.png --steps 4", "steps must be odd and at least 3"),
        ("plot perturbations run --images 0", "--images must be at least 1; got 0"),
        ("plot couplings run --image images/0.png --data strokes", "--data must not be given with --image"),
        ("plot perturbations run --image images/0.png --data strokes", "--data must not be given with --image"),
        ("plot couplings run --show 0", "--show must be at least 1; got 0"),
        ("plot couplings run --image nofile.png", "nofile.png must be a readable image"),
        ("plot all run --out a.png", "--out must be given for one figure; got 6 figures"),
        ("plot pose run --against nowhere", "model folder nowhere must hold config.json; there is none"),
        ("plot pose run --against", "--against must be at least one network; got none"),
        ("analyse pose run --against", "--against must be at least one network; got none"),
        ("analyse ood run --against nope", "--against must be noise, a folder, or among affnist, "),
        ("analyse ood run --against", "--against must be at least one data set"),
        ("predict run", "FILES must be image files, folders or -; got none"),
        ("predict run nofile.png", "got nofile.png, which does not exist"),
        ("predict run run", "folder run must hold images"),
        ("predict run images --json --csv", "--json and --csv must not be given both"),
        ("predict run images --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("predict run - -", "- must be given once at most"),
        ("predict nowhere images", "model folder nowhere must hold config.json; there is none"),
        ("predict capsnet-minst images", "must hold config.json; there is none (did you mean capsnet-mnist?)"),
    ],
)
def test_bad_input_is_one_line(run: Path, capsys: Capture, line: str, message: str) -> None:
    (run / "figures" / "reconstructions.png").unlink()
    before = files(".")
    code, out, err = typed(capsys, line)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert files(".") == before


def test_a_network_without_capsules_is_told(run: Path, capsys: Capture) -> None:
    from capsnet.models import create

    pretrained.save_pretrained(create("baseline"), "plain")
    for verb in ("plot reconstructions", "plot perturbations", "plot couplings", "analyse ood"):
        code, _, err = typed(capsys, f"{verb} plain")
        assert code == 2
        assert "model must have capsules; got baseline, which has none" in err
    assert "slant degrees" not in typed(capsys, "plot pose plain")[1]


def test_shipped_weights_show_strokes_where_their_data_cannot_be_had(workplace: Path, capsys: Capture) -> None:
    code, out, err = typed(capsys, "plot couplings capsnet-mnist --images 2 --show 1")
    assert code == 0
    assert "strokes: mean of 2 images" in out
    assert "mnist cannot be read, so strokes are shown" in err
    assert Path("capsnet-mnist-couplings.png").exists()
    code, _, err = typed(capsys, "plot all capsnet-mnist")
    assert code == 2
    assert len(err.splitlines()) == 1


def test_list_weights(capsys: Capture) -> None:
    rows = json.loads(told(capsys, "list weights --json"))
    assert [row["name"] for row in rows] == pretrained.shipped()
    assert all("95 % interval" in row["test error"] for row in rows)
    assert all(row["command"].startswith("capsnet train --") for row in rows)


# images of several objects


@pytest.fixture(scope="module")
def trained_on_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("look") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda path, *arguments, **about: path.write_text("", encoding="utf-8"))
        fit(tiny(Path("pairs"), out=str(place), epochs=8, lr=0.01), pairs(train=80, test=30))
    return place


@pytest.fixture
def pair_run(trained_on_pairs: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, called `run`."""
    monkeypatch.setattr("capsnet.training.prepare.load", lambda *arguments, **options: pairs(train=80, test=30))
    shutil.copytree(trained_on_pairs, workplace / "run")
    return Path("run")


def test_reconstruct_draws_overlapping_objects_apart(
    pair_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capsnet import plots

    drawn: list[dict[str, int]] = []
    real = plots.separations

    def separations(parts: Any, classes: tuple[str, ...]) -> object:
        drawn.append({heading: len(there) for heading, (_, there) in parts.items()})
        return real(parts, classes)

    monkeypatch.setattr(plots, "separations", separations)
    found = json.loads((pair_run / "result.json").read_text(encoding="utf-8"))["test"]
    wrong = found["wrong"]
    out = told(capsys, "plot reconstructions run --right 3 --wrong 5")
    assert out == f"pairs test: {wrong} of 30 images wrong\nfigure: run/figures/reconstructions.png\n"
    with Image.open("run/figures/reconstructions.png") as picture:
        assert picture.info["Description"] == "capsnet plot reconstructions run --right 3 --wrong 5"
    assert 5 < wrong < 27, "or right and wrong are not told apart"
    assert drawn[-1] == {
        "Right": 3,
        "Wrong, drawn as predicted": 5,
        "Wrong, drawn as what is there": 5,
        "Told of an object that is not there": 3,
    }
    numbers = json.loads(
        told(capsys, "plot reconstructions run --json --right 0 --wrong 2 --split validation --format svg")
    )
    assert set(numbers) == {"data", "split", "images", "wrong", "figure"}
    assert (numbers["split"], numbers["images"]) == ("validation", 8)
    assert all("Right" not in heading for heading in drawn[-1])
    code, out, err = typed(capsys, "plot reconstructions run --split train")  # which show one object each
    assert (code, out) == (2, "")
    assert err == "capsnet plot reconstructions: error: images must show 2 objects each; got 1\n"


def test_report_of_pairs(pair_run: Path, capsys: Capture) -> None:
    assert told(capsys, "report run") == "report: run/report.html\n"
    page = (pair_run / "report.html").read_text(encoding="utf-8")
    assert "exact-set test error" in page
    assert "<h2>Overlapping objects</h2>" in page


@pytest.mark.parametrize(
    "line",
    [
        "plot perturbations run",
        "plot couplings run",
        "plot pose run",
        "plot all run",
        "analyse ood run --against noise",
        "analyse attack run",
        "predict run image.png",
    ],
)
def test_verbs_of_single_objects_refuse_a_network_of_pairs(pair_run: Path, capsys: Capture, line: str) -> None:
    Image.new("L", (13, 12)).save("image.png")
    before = files(".")
    code, out, err = typed(capsys, line)
    assert (code, out) == (2, "")
    verb = " ".join(CAPSNET.named(line.split()))
    assert err == f"capsnet {verb}: error: run must be of images that show one object each; it finds 2\n"
    assert files(".") == before
