"""The images of a run are known: a folder that changes is not divided anew, and what changed is told."""

import csv
import io
import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from capsnet import cli
from capsnet.checkpoints import run_directory
from capsnet.cli.trained_model import TrainedModel
from capsnet.data import Dataset, Split
from capsnet.data.image_folder import scan
from capsnet.data.manifest import Line, Manifest
from capsnet.errors import InputError
from capsnet.training import fit as training
from capsnet.training import prepare
from tiny import photos, tiny


@pytest.fixture
def own(workplace: Path) -> Path:
    """90 colour images of 12 x 13 pixels in 3 classes, to be changed."""
    return photos(workplace / "own")


@pytest.fixture
def trained(own: Path, blank_figure: None) -> Manifest:
    """The manifest of a run on them in `run`."""
    training.fit(tiny(own, out="run", epochs=1))
    found = run_directory.Run("run").manifest()
    assert found is not None
    return found


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--json", *arguments]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_run_keeps_which_file_is_in_which_split(trained: Manifest, own: Path) -> None:
    assert len(trained.lines) == 90
    assert trained.classes == ("a", "b", "c")
    assert {name: [line.split for line in trained.lines].count(name) for name in ("train", "validation", "test")} == {
        "train": 68,
        "validation": 7,
        "test": 15,
    }
    assert all((own / line.path).is_file() and line.path.startswith(line.class_name) for line in trained.lines)
    assert len({line.hash for line in trained.lines}) == 90


def test_files_that_are_added_do_not_divide_a_folder_anew(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, quiet = evaluated(capsys)
    assert "capsnet:" not in quiet
    for number in (7, 400, 500):  # in natural order among the others
        Image.new("RGB", (13, 12), (number % 256,) * 3).save(own / "a" / f"{number}0.png")
    after, told = evaluated(capsys)
    assert after == before
    assert "own is not as it was trained on: 3 new (a/70.png, a/4000.png, a/5000.png)" in told


def test_missing_and_changed_files_are_told_and_the_others_scored(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [line.path for line in trained.lines if line.split == "test"]
    (own / test[0]).unlink()
    Image.new("RGB", (13, 12), "red").save(own / test[1])
    after, told = evaluated(capsys)
    assert after["total"] == 14
    assert f"not as it was trained on: 1 missing ({test[0]})" in told
    assert f"not as it was trained on: 1 changed ({test[1]})" in told


def test_files_that_are_no_images_do_not_keep_a_run_from_its_own(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = evaluated(capsys)
    (own / "a" / "notes.txt").write_bytes(b"text")
    (own / "a" / "new.png").write_bytes((own / "a" / "0.png").read_bytes()[:-120])
    after, told = evaluated(capsys)
    assert after == before
    assert "a/notes.txt" in told
    training.resume("run", epochs=2)
    other = own.with_name("other")
    shutil.copytree(own, other)
    (other / "a" / "0.png").unlink()
    found, told = evaluated(capsys, "--data", "other")
    assert found["total"] == 89
    assert "passed over 2 unreadable: a/notes.txt" in told
    assert "a/new.png (must be a readable image; got: " in told


def test_a_folder_that_moved_is_the_same(trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, _ = evaluated(capsys)
    own.rename(own.with_name("moved"))
    after, told = evaluated(capsys, "--data", "moved")
    assert after == {**before, "data": "moved"}
    assert "were used" not in told
    training.resume("run", epochs=2, data="moved")
    assert run_directory.Run("run").config().data == "moved"


@pytest.mark.parametrize("change", ["renamed class", "exchanged classes", "missing", "changed"])
def test_a_run_does_not_go_on_with_other_images(trained: Manifest, own: Path, change: str) -> None:
    (line, *_) = (line for line in trained.lines if line.split == "train")
    if change == "renamed class":
        (own / "c").rename(own / "0")
    elif change == "exchanged classes":
        for here, there in (("a", "x"), ("b", "a"), ("x", "b")):
            (own / here).rename(own / there)
    elif change == "missing":
        (own / line.path).unlink()
    else:
        Image.new("RGB", (13, 12), "red").save(own / line.path)
    before = Path("run/last.ckpt").read_bytes()
    with pytest.raises(InputError, match=r"own must be the images that the run began with; since then: \d+ [mc]"):
        training.resume("run", epochs=2)
    assert Path("run/last.ckpt").read_bytes() == before


def test_a_run_goes_on_beside_new_images(trained: Manifest, own: Path) -> None:
    Image.new("RGB", (13, 12), "red").save(own / "a" / "new.png")
    training.resume("run", epochs=2)
    assert run_directory.Run("run").manifest() == trained


def test_a_run_without_a_manifest_is_evaluated_and_goes_on_as_it_was_divided(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run/manifest.csv").unlink()
    found, told = evaluated(capsys)
    assert found["total"] == 15
    assert "capsnet: run has no manifest of its images, so " in told
    legacy = prepare.prepare_data(tiny(own), shares=False)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0))
    whole = scan(own).divided(seed=0).of("train")
    assert legacy.validation is not None
    assert legacy.validation.labels.tolist() == [whole[k].label for k in order[:7].sort().values]
    few = prepare.prepare_data(tiny(own, train_images=20), shares=False)
    assert few.validation is not None
    assert torch.equal(few.validation.images, legacy.validation.images)
    order = torch.randperm(68, generator=torch.Generator().manual_seed(0))[:20].sort().values
    assert torch.equal(few.train.images, legacy.train.images[order])


def test_what_was_said_of_each_file_can_be_kept(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = own.with_name("other")
    for place in ("a/0.png", "a/10.png", "b/2.png"):
        (other / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(own / place, other / place)
    for data, files, split in (
        ((), [line.path for line in trained.lines if line.split == "test"], "test"),
        (("--split", "train"), [line.path for line in trained.lines if line.split == "train"], "train"),
        (("--data", "other"), ["a/0.png", "a/10.png", "b/2.png"], "test"),
        (("--data", "other", "--split", "validation"), ["a/0.png", "a/10.png", "b/2.png"], "validation"),
        (("--data", "other", "--split", "train"), ["a/0.png", "a/10.png", "b/2.png"], "train"),
    ):
        found, _ = evaluated(capsys, *data, "--out", "judged", "--overwrite")
        metrics = json.loads(Path("judged/metrics.json").read_text())
        assert metrics == found
        rows = list(csv.DictReader(Path("judged/predictions.csv").read_text().splitlines()))
        assert [row["file"] for row in rows] == files
        assert {row["split"] for row in rows} == {split}
        assert sum(row["true"] != row["predicted"] for row in rows) == found["wrong"]
        for row in rows:
            every = {name: float(row[f"presence of {name}"]) for name in "abc"}
            assert float(row["presence"]) == every[row["predicted"]] == max(every.values())
            assert row["true"] == row["file"][0]
    assert cli.main(["evaluate", "run", "--out", "judged"]) == 2
    assert "--out must be a directory without predictions.csv" in capsys.readouterr().err


def test_a_test_folder_is_scored_whole(trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image of a class, a class that is absent, and one that the network does not know."""
    other = own.with_name("other")
    for place in ("a/0.png", "a/1.png", "b/2.png", "zebra/3.png", "zebra/4.png"):
        (other / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(own / "a" / Path(place).name, other / place)
    found, told = evaluated(capsys, "--data", "other")
    assert found["total"] == 3
    assert [row["images"] for row in found["per_class"]] == [2, 1, 0]
    assert "other: no image of c" in told
    assert "other: left out, classes that the network does not know: zebra (2)" in told
    same = ("a/0.png", "a/1.png", "a/2.png")
    used = sum(line.split == "train" for line in trained.lines if line.path in same)
    assert (f"{used} of 3 images were used to train" in told) == bool(used)


def test_a_test_folder_with_splits_gives_the_one_that_is_asked_for(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, split in enumerate(("train", "test")):
        for name in "ab":
            shutil.copytree(own / name, own.with_name("other") / split / name)
            (own.with_name("other") / split / name / "0.png").unlink() if k else None
    assert evaluated(capsys, "--data", "other")[0]["total"] == 58
    assert evaluated(capsys, "--data", "other", "--split", "train")[0]["total"] == 60


def test_a_network_of_digits_does_not_take_ten_other_classes_for_its_own(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcdefghij":
        (own.with_name("ten") / name).mkdir(parents=True)
        shutil.copy(own / "a" / "0.png", own.with_name("ten") / name)
    assert cli.main(["evaluate", "capsnet-mnist", "--data", "ten"]) == 2
    assert "ten must hold images of the classes 0, 1, 2" in capsys.readouterr().err


def test_the_runs_own_folder_by_name_is_the_runs_own(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / next(line.path for line in trained.lines if line.split == "train")).unlink()
    found, told = evaluated(capsys, "--data", str(own))
    assert found["total"] == 15
    assert "not as it was trained on: 1 missing" in told


def test_a_folder_without_a_known_class_is_refused(trained: Manifest, own: Path) -> None:
    (own.with_name("other") / "zebra").mkdir(parents=True)
    shutil.copy(own / "a" / "0.png", own.with_name("other") / "zebra")
    assert cli.main(["evaluate", "run", "--data", "other"]) == 2


def test_train_and_val_are_trained_and_the_number_is_called_a_validation_error(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = own.with_name("layout")
    for k, split in enumerate(("train", "val")):
        for name in "abc":
            (layout / split / name).mkdir(parents=True)
            for number in range(20 * k, 20 * k + 20 - 10 * k):
                shutil.copy(own / name / f"{number}.png", layout / split / name)
    options = ["--data", str(layout), "--epochs", "1", "--image-size", "24", "--conv-channels", "4", "--out", "run"]
    assert cli.main(["train", *options, "--capsule-types", "2", "--decoder-sizes", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("validation error ")
    assert "of 30 wrong" in shown
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert (result["tested"], result["train_images"], result["test"]["total"]) == ("validation", 60, 30)
    assert result["selection"].endswith("there are no test images")
    assert "validation error" in Path("run/report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"^validation must be left out, or 0, where .* has val/ and no test/; got 5$"):
        prepare.prepare_data(tiny(layout, validation=5))


def layout(own: Path, **splits: range) -> Path:
    """The images divided into folders of these names."""
    place = own.with_name("layout")
    for split, numbers in splits.items():
        for name in "abc":
            (place / split / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(own / name / f"{number}.png", place / split / name)
    return place


def test_what_is_a_test_image_is_what_was_one(
    own: Path, capsys: pytest.CaptureFixture[str], blank_figure: None
) -> None:
    """Where test/ is gone, validation images do not stand in for it; where it came later, they stay what is told."""
    place = layout(own, train=range(10), val=range(10, 15), test=range(15, 20))
    training.fit(tiny(place, out="run", epochs=1, validation=None))
    assert evaluated(capsys)[0]["total"] == 15
    shutil.rmtree(place / "test")
    assert cli.main(["evaluate", "run"]) == 2
    assert f"{place} must hold test images; got none" in capsys.readouterr().err
    shutil.rmtree(place)
    place = layout(own, train=range(10), val=range(10, 15))
    training.fit(tiny(place, out="run", epochs=1, validation=None, overwrite=True))
    before, _ = evaluated(capsys)
    layout(own, test=range(15, 20))
    after, told = evaluated(capsys)
    assert after == before
    assert "15 new (test/a/15.png" in told


def test_looking_at_a_published_set_without_its_validation_images_warns_of_nothing(
    workplace: Path, blank_figure: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("capsnet.training.prepare.load", lambda *arguments, **options: memory(validation=False))
    training.fit(tiny(Path("memory"), out="run", epochs=1, validation=5), memory(validation=False))
    for held_out in (True, False):
        subject = TrainedModel("run")
        subject.dataset(held_out=held_out)
    subject.dataset("memory", held_out=False)
    assert "not as it was trained on" not in capsys.readouterr().err


def test_a_folder_of_which_nothing_can_be_decoded_is_refused(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(stream, "JPEG")
    for name in "ab":
        (own.with_name("other") / name).mkdir(parents=True)
        (own.with_name("other") / name / "x.jpg").write_bytes(stream.getvalue()[:-500])
    assert cli.main(["evaluate", "run", "--data", "other"]) == 2
    assert "other must hold images that can be read; got none" in capsys.readouterr().err


def test_training_tells_what_is_lost_in_its_images(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        Image.new("RGB", (13, 12), "white").save(own / "a" / f"{number}.png")
    notes = prepare.prepare_data(tiny(own)).notes
    assert notes == ("2 of 90 images: blank: one colour all over (a/0.png, a/1.png)",)


def test_names_are_compared_in_one_unicode_form(own: Path) -> None:
    for k, (split, form) in enumerate((("train", "NFC"), ("test", "NFD"))):
        for name in ("Tür", "Öl"):
            place = own.with_name("forms") / split / unicodedata.normalize(form, name)  # type: ignore[arg-type]
            shutil.copytree(own / "ab"[k], place)
    assert prepare.prepare_data(tiny(own.with_name("forms"))).classes == ("Tür", "Öl")


def test_every_split_has_its_share_of_each_class(own: Path) -> None:
    for number in range(27):
        (own / "c" / f"{number}.png").unlink()  # 3 are left
    dataset = prepare.prepare_data(tiny(own, validation=20))
    assert dataset.validation is not None
    assert dataset.train.labels.bincount().tolist()[2] == 1
    assert dataset.validation.labels.bincount(minlength=3).tolist()[2] in (0, 1)
    with pytest.raises(InputError, match=r"^train_images must be 3, one of each class, to the \d+ there are; got 2$"):
        prepare.prepare_data(tiny(own, train_images=2))
    few = prepare.prepare_data(tiny(own, train_images=4))
    assert few.train.labels.bincount().tolist() == [1, 2, 1] or few.train.labels.bincount().tolist() == [2, 1, 1]
    with pytest.raises(InputError, match=r"^validation must be 0 to 49, which leaves an image of each of 3"):
        prepare.prepare_data(tiny(own, validation=50))


# of tensors


def memory(seed: int = 0, *, validation: bool = True) -> Dataset:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (40, 3, 12, 13), dtype=torch.uint8, generator=draw)
    split = Split(images, torch.arange(40) % 3)
    rows = torch.arange(40)
    held_out = split.take(rows[30:35]) if validation else None
    return Dataset("memory", ("a", "b", "c"), split.take(rows[:30]), split.take(rows[35:]), held_out)


def test_of_other_data_the_tensors_are_known() -> None:
    one = Manifest.of(memory())
    assert [line.split for line in one.lines] == ["train", "validation", "test"]
    assert one == Manifest.of(memory())
    assert one.differences(one) == ()
    assert one.differences(Manifest.of(memory(1))) == ("the images of train, validation, test are others",)
    relabelled = memory()
    relabelled = replace(relabelled, test=Split(relabelled.test.images, (relabelled.test.labels + 1) % 3))
    assert one.differences(Manifest.of(relabelled)) == ("the images of test are others",)


def test_a_run_in_memory_does_not_go_on_with_other_images(photos: Path, workplace: Path, blank_figure: None) -> None:
    config = tiny(photos, out="run", epochs=1)
    training.fit(config, memory())
    with pytest.raises(InputError, match=r"data memory must be the images that the run began with; since then: the im"):
        training.resume("run", memory(1), epochs=2)
    training.resume("run", memory(), epochs=2)


# the file


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    names = ("plain", 'quoted "x", y', "line\nbreak", "return\r", "both\r\n", "\udcff\udcfe", "Ü\u202e", "")
    one = Manifest(tuple(Line("train", name, f"{name}/1.png", "ab" * 16) for name in names))
    (tmp_path / "manifest.csv").write_bytes(one.to_bytes())
    assert Manifest.read(tmp_path / "manifest.csv") == one
    assert Manifest.read(tmp_path / "nothing.csv") is None


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"split,class,path,hash\ntrain,a\n", b"\x00"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest.csv must be a manifest that capsnet wrote"):
        Manifest.read(tmp_path / "manifest.csv")


def test_weights_without_a_run_hold_out_the_images_that_the_run_did(
    trained: Manifest, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card says whether each class had its share, as it has since there are manifests."""
    before, _ = evaluated(capsys, "--split", "validation")
    Path("run/manifest.csv").unlink()
    Path("run/config.yaml").unlink()
    after, told = evaluated(capsys, "--split", "validation", "--precision", before["precision"])
    assert after["confusion"] == before["confusion"]
    assert "has no manifest" in told
