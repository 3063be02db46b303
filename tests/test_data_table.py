"""Tables of images, their groups, and copies: which class and split each image is in."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsnet import cli
from capsnet.checkpoints.run_directory import Run
from capsnet.config import Config
from capsnet.data import Dataset, is_own, load
from capsnet.data.dataset import ImageFile
from capsnet.data.grouping import drawn, units
from capsnet.data.image_file import Header
from capsnet.data.image_folder import scan
from capsnet.data.manifest import Manifest
from capsnet.data.table import Row, read_table
from capsnet.errors import InputError
from capsnet.training import fit as training
from capsnet.training import prepare
from tiny import photos, tiny

SPLITS = ("train", "validation", "test")
CELLS = (
    "a", ",", ";", "\t", '"', "/", "..", "train", "test", "\0", "\ud800", "\ufeff", "{}", '{"file_name": 3}', "\r", "é",
    "\n",
)  # fmt: skip
Capture = pytest.CaptureFixture[str]


def table(path: Path, *rows: tuple[Any, ...], columns: str = "file_name,label") -> Path:
    """A CSV file of these rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns.split(","), *rows])
    return path


@pytest.fixture
def own(workplace: Path) -> Path:
    """90 images of three classes in the folder `own`."""
    return photos(workplace / "own")


@pytest.fixture
def flat(own: Path) -> list[tuple[str, str]]:
    """The same images in the folder `flat`, not by class; the names of all with their classes."""
    rows = [(f"{file.parent.name}-{file.name}", file.parent.name) for file in sorted(own.glob("*/*.png"))]
    own.with_name("flat").mkdir()
    for name, label in rows:
        shutil.copy(own / label / name.split("-")[1], own.with_name("flat") / name)
    return rows


def parts(dataset: Dataset) -> list[list[int]]:
    """Numbers of images of each class in each split."""
    splits = (dataset.train, dataset.validation, dataset.test)
    return [split.labels.bincount(minlength=3).tolist() for split in splits if split is not None]


# what a table is


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl", "list.csv", "list.JSONL", "elsewhere"])
def test_a_table_tells_what_folders_tell(kind: str, flat: list[tuple[str, str]], own: Path) -> None:
    folder = own.with_name("flat")
    path = folder / kind
    if kind == "elsewhere":
        path = table(own.with_name("list.csv"), *flat)
    elif kind.endswith("csv"):
        table(path, *reversed(flat))
    else:
        path.write_text("".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in flat))
    options: dict[str, Any] = {"data_dir": str(folder)} if kind == "elsewhere" else {}
    data = str(folder) if kind.startswith("metadata") else str(path)
    assert is_own(data)
    found = prepare.prepare_data(Config.of(data=data, **options))
    wanted = prepare.prepare_data(Config.of(data=str(own)))
    assert found.classes == wanted.classes
    assert parts(found) == parts(wanted)
    assert torch.equal(found.test.images, wanted.test.images)
    assert [file.path for file in found.files] == [file.path.replace("/", "-") for file in wanted.files]
    assert load(data, **options).classes == ("a", "b", "c")


def test_a_table_divides_where_it_has_splits(flat: list[tuple[str, str]], own: Path) -> None:
    splits = ["test", "val", "Training", "unused"]
    rows = [(name, label, splits[k % 4], "x") for k, (name, label) in enumerate(flat)]
    table(own.with_name("flat") / "list.csv", *rows, columns="file_name,label,split,colour")
    data = prepare.prepare_data(Config.of(data="flat/list.csv"))
    assert Counter(file.split for file in data.files) == {"train": 22, "validation": 23, "test": 23, "unused": 22}
    assert {file.path for file in data.files if file.split == "test"} == {row[0] for row in rows[::4]}
    without = prepare.prepare_data(Config.of(data="flat/list.csv", validation=0))
    assert without.validation is None
    with pytest.raises(InputError, match=r"test_fraction must be left out where .*flat is divided already; got 0.5"):
        prepare.prepare_data(Config.of(data="flat/list.csv", test_fraction=0.5))


def test_names_come_in_many_forms(own: Path) -> None:
    """From the table's folder on, above it or absolute; with semicolons, a byte-order mark, and numbers for classes."""
    lists = own.with_name("lists")
    lists.mkdir()
    rows = [f"../own/a/{k}.png;10" for k in range(4)] + [f"{own / 'b' / f'{k}.png'};2" for k in range(4)]
    (lists / "x.csv").write_bytes("\r\n".join(["\ufefffile_name; Label", *rows, ""]).encode())
    data = load("lists/x.csv")
    assert data.classes == ("2", "10")  # in natural order
    assert len(data.train) + len(data.test) == 8


def test_without_labels_the_folders_are_the_classes(own: Path) -> None:
    """A table beside class folders may say only what belongs together."""
    rows = [(f"{name}/{k}.png", f"patient {k % 6}") for name in "abc" for k in range(30)]
    table(own / "metadata.csv", *rows, columns="file_name,group")
    data = prepare.prepare_data(Config.of(data="own"))
    assert data.classes == ("a", "b", "c")
    assert data.notes == ("90 images in 6 groups",)
    sides = {
        split: {file.group for file in data.files if file.split == split} for split in ("train", "validation", "test")
    }
    assert sum(map(len, sides.values())) == 6
    assert len(sides["test"]) == 1


def test_what_a_table_does_not_name_is_told(own: Path) -> None:
    table(own / "metadata.csv", *((f"{name}/{k}.png", name) for name in "ab" for k in range(5)))
    found = scan(own)
    assert len(found.files) == 10
    assert found.notes == ("passed over: 80 images that metadata.csv does not name",)


def test_a_table_of_something_else_is_none(own: Path) -> None:
    table(own / "metadata.csv", ("a", 3), columns="camera,height")
    assert len(scan(own).files) == 90
    with pytest.raises(InputError, match=r"metadata.csv must have a column file_name, .*; got camera, height$"):
        scan(own / "metadata.csv")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must have a column file_name, and label, split, group; got none"),
        ("file_name,label\n", "must hold a row for each image; got none"),
        ("file_name,label\n,a\n", "line 2: file_name must be the name of an image; got none"),
        ("file_name,label\na\0b,a\n", r"line 2: file_name must be the name of an image; got a\\x00b"),
        ("file_name,label\na/0.png,\n", "line 2: label must be the name of a class; got none"),
        ("file_name,label\na/0.png,a\n./a/0.png,b\n", "line 3: file_name must be in one row; a/0.png is in line 2 too"),
        ("file_name,label,split\na/0.png,a,trial\n", "split must be train, validation, test or unused; got 'trial'"),
        ("file_name,label,split\na/0.png,a,test\nb/0.png,b,\n", "in each row or in none; got 1 without"),
        ('file_name,label\n"a/0.png,a\n', "must be a CSV file; got in line 2: unexpected end of data"),
        ("file_name\n0.png\n", "must have a column label, or name files in folders of their classes"),
        ("file_name,label\na/0.png,a\na/1.png,a\n", "must hold training images of at least 2 classes; got 1"),
        (
            "file_name,label,split\na/0.png,a,train\nb/1.png,b,train\n",
            "must hold train and test or validation images; got train alone",
        ),
        (
            "file_name,label\na/0.png,a\nb/none.png,b\nc,c\n",
            "2 files are none: b/none.png must be a readable image; got: .*No such file.*; c must be a readable",
        ),
        ("file_name,label\nx.png,a\xff\n", "line 2: label must be UTF-8; it is not"),
    ],
)
def test_a_wrong_table_is_told(text: str, told: str, own: Path) -> None:
    (own / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=told):
        scan(own / "list.csv")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]\n", "must be a JSON object a line; got list in line 1"),
        ('\n{"file_name":\n', "must be a JSON object a line; got in line 2: "),
        ('{"label": "a"}\n', "must have a column file_name"),
        ('{"file_name": "a/0.png", "label": 1.5}\n', "line 1: label must be a text or a whole number; got float"),
        ('{"file_name": "a/0.png", "label": true}\n', "line 1: label must be a text or a whole number; got bool"),
        ('{"file_name": "a/0.png", "label": "\\ud800"}\n', "line 1: label must be UTF-8; it is not"),
    ],
)
def test_a_wrong_table_of_json_is_told(text: str, told: str, own: Path) -> None:
    (own / "list.jsonl").write_text(text)
    with pytest.raises(InputError, match=told):
        read_table(own / "list.jsonl")


def test_missing_files_can_be_passed_over(own: Path) -> None:
    table(own / "list.csv", *((f"{name}/{k}.png", name) for name in "ab" for k in range(28, 33)))
    with pytest.raises(InputError, match="6 files are none"):
        scan(own / "list.csv")
    found = scan(own / "list.csv", skip_unreadable=True)
    assert len(found.files) == 4
    assert found.notes[0].startswith("passed over 6 unreadable: a/30.png (")


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cells=st.lists(st.sampled_from(CELLS), max_size=30), kind=st.sampled_from(["csv", "jsonl"]), end=st.binary())
def test_any_table_is_rows_or_one_line(cells: list[str], kind: str, end: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    head = "file_name,label,split\n" if kind == "csv" else '{"file_name": "a", "label": "b"}\n'
    path.write_bytes((head + "".join(cells)).encode("utf-8", "surrogatepass") + end)
    rows, told = tuple[Row, ...](), ""
    try:
        rows = read_table(path)
    except InputError as error:
        told = str(error)
    assert bool(rows) != bool(told)
    assert "\n" not in told
    assert len(told) < 1000
    assert all(row.file_name and row.split in (*SPLITS, "unused", "") for row in rows)
    assert len({row.file_name for row in rows}) == len(rows)


# what belongs together


def test_groups_are_in_one_split_and_the_shares_near(tmp_path: Path) -> None:
    own = photos(tmp_path / "own", count=40)
    for number, file in enumerate(sorted(own.glob("*/*.png"))):
        file.rename(file.with_name(f"patient{number % 13}-{file.name}"))
    for seed in range(5):
        config = Config.of(data=str(own), group_by=r"patient(\d+)", test_fraction=0.25, validation=0.2, data_seed=seed)
        data = prepare.prepare_data(config)
        sides = {split: {file.group for file in data.files if file.split == split} for split in SPLITS}
        assert sum(map(len, sides.values())) == 13, "no group on two sides"
        assert 20 <= len(data.test) <= 40
        assert data.validation is not None
        assert 10 <= len(data.validation) <= 30
        assert data.notes == ("120 images in 13 groups",)
        again = prepare.prepare_data(config)
        assert again.files == data.files
    whole = prepare.prepare_data(Config.of(data=str(own), group_by="patient[0-9]+"))
    assert whole.files[0].group.startswith("patient")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"group_by": "nowhere"}, "group_by must be found in paths as a/0.png; got nowhere, which is in none"),
        ({"group_by": "("}, r"group_by must be a regular expression; got '?\('?$"),
        ({"group_by": "png"}, "images of .*own must be of 2 groups or more to be divided; they are of one"),
        ({"group_by": "x", "data": "strokes"}, "group_by must be left out for a data set without files; got x"),
    ],
)
def test_groups_that_cannot_be_are_refused(options: dict[str, Any], told: str, own: Path) -> None:
    with pytest.raises(InputError, match=told):
        prepare.prepare_data(Config.of(**{"data": "own", **options}))


def test_groups_of_a_table_are_not_found_again(flat: list[tuple[str, str]], own: Path) -> None:
    table(own.with_name("flat") / "list.csv", *((*row, "x") for row in flat), columns="file_name,label,group")
    with pytest.raises(InputError, match="group_by must be left out where a table has a column group; got -"):
        prepare.prepare_data(Config.of(data="flat/list.csv", group_by="-"))


def test_copies_stay_in_one_split(own: Path) -> None:
    for name in "abc":
        for k in range(0, 30, 3):
            for number in range(3):
                shutil.copy(own / name / f"{k}.png", own / "abc"[number] / f"copy {name} {k}.png")
    data = prepare.prepare_data(Config.of(data="own"))
    places: dict[str, set[str]] = {}
    for file in data.files:
        places.setdefault(file.hash, set()).add(file.split)
    assert all(len(splits) == 1 for splits in places.values())
    assert len(places) == 90
    assert all(20 <= len(part) <= 45 for part in (data.test,))


def test_a_class_of_one_image_many_times_is_divided_all_the_same(own: Path) -> None:
    for k in range(1, 30):
        shutil.copy(own / "a" / "0.png", own / "a" / f"{k}.png")
    assert parts(load("own")) == [[25, 25, 25], [5, 5, 5]]


def test_copies_in_several_splits_or_classes_are_told(tmp_path: Path) -> None:
    whole = photos(tmp_path / "whole", count=8)
    for place in whole.glob("*/*.png"):
        split = tmp_path / ("train" if int(place.stem) < 4 else "test") / place.parent.name
        split.mkdir(parents=True, exist_ok=True)
        place.rename(split / place.name)
    shutil.rmtree(whole)
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "test/a/again.png")
    shutil.copy(tmp_path / "train/b/2.png", tmp_path / "train/c/2.png")
    alike = (
        "files that are in several classes: 1 (train/b/2.png = train/c/2.png)",
        "files that are in several splits: 1 (train/a/1.png = test/a/again.png)",
    )
    assert scan(tmp_path).notes == alike
    assert scan(tmp_path, group_by=r"[0-3]\.png").notes == ("12 images in 4 groups, 13 in none", *alike)
    assert scan(tmp_path, group_by="[abc]/").notes[1] == "groups in several splits: 3 (a/, b/, c/)"


def test_units_and_draws() -> None:
    header, content = Header(4, 4, colour=False, bits=None), [*range(8), 6, *range(9, 12)]
    groups = ["g" if k in (1, 6) else "" for k in range(12)]
    files = [ImageFile(str(k), k % 2, "train", str(content[k]), header, groups[k]) for k in range(12)]
    found = units(files)
    assert found[1] == found[6] == found[8]  # by a group, and a copy of its member
    assert len(set(found)) == 10
    for seed in range(20):
        places = drawn(files, found, 0.4, seed=seed)
        assert len({1, 6, 8} & set(places)) in (0, 3)
        assert 3 <= len(places) <= 6
        assert places == drawn(files, found, 0.4, seed=seed)
    alone = [file._replace(group="all of 0" if file.label == 0 else "") for file in files]
    assert {alone[k].label for k in drawn(alone, units(alone), 0.3, seed=0)} == {1}, "a class keeps its only group"


# a manifest is a data set


def test_a_manifest_is_a_data_set(own: Path, blank_figure: None, capsys: Capture) -> None:
    training.fit(tiny(own, out="run", epochs=1, group_by=r"([0-9]+)\.png", report=False))
    manifest = Run("run").manifest()
    assert manifest is not None
    head, *rows = Path("run/manifest.csv").read_text().splitlines()
    assert head == '"file_name","label","split","group","hash"'
    assert rows[0] == ",".join(f'"{cell}"' for cell in (manifest.lines[0][i] for i in (2, 1, 0, 4, 3)))
    again = prepare.prepare_data(tiny(Path("run/manifest.csv")))
    assert Manifest.of(again) == manifest
    training.fit(tiny(Path("run/manifest.csv"), out="again", epochs=1, report=False))
    assert Run("again").manifest() == manifest
    other = prepare.prepare_data(tiny(Path("again/manifest.csv")))  # of a run whose images a manifest told
    assert Manifest.of(other) == manifest
    shutil.copy("run/manifest.csv", own / "metadata.csv")
    assert Manifest.of(prepare.prepare_data(tiny(own))) == manifest
    capsys.readouterr()
    results = []
    for data in ([], ["--data", "run/manifest.csv"], ["--data", "own/metadata.csv"]):
        assert cli.main(["evaluate", "run", "--json", *data]) == 0
        out, err = capsys.readouterr()
        assert "used to train" not in err
        results.append(json.loads(out)["wrong"])
    assert len(set(results)) == 1


def test_old_manifests_are_read(own: Path) -> None:
    lines = ['"split","class","path","hash"', '"train","a","a/0.png","00"', '"test","b","b/0.png","01"']
    Path("manifest.csv").write_text("\n".join(lines))
    found = Manifest.read(Path("manifest.csv"))
    assert found is not None
    assert [(line.split, line.class_name, line.path, line.hash, line.group) for line in found.lines] == [
        ("train", "a", "a/0.png", "00", ""),
        ("test", "b", "b/0.png", "01", ""),
    ]


def test_a_manifest_of_whole_splits_is_none(workplace: Path, blank_figure: None) -> None:
    training.fit(tiny(Path("strokes"), out="run", epochs=1, train_images=20, report=False))
    told = r"manifest.csv must be of image files that are there; it is of a run on strokes"
    with pytest.raises(InputError, match=told):
        prepare.prepare_data(Config.of(data="run/manifest.csv"))


def test_another_table_of_the_same_folder_is_not_the_runs_own(own: Path, blank_figure: None, capsys: Capture) -> None:
    rows = [(f"{name}/{k}.png", name) for name in "abc" for k in range(30)]
    table(own / "first.csv", *(row for row in rows if len(row[0]) == 7))
    table(own / "second.csv", *(row for row in rows if len(row[0]) == 8))
    training.fit(tiny(Path("own/first.csv"), out="run", epochs=1, report=False))
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--json", "--data", "own/second.csv"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["total"] == sum(len(row[0]) == 8 for row in rows)
    assert "used" not in err
