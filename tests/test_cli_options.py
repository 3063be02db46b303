"""Every number that a verb takes: each says its range, and what is outside of it is one line."""

import shutil
import typing
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from capsnet import report
from capsnet.cli import VERBS, main
from capsnet.cli.parsing import Range
from capsnet.config import Config
from capsnet.data.strokes import strokes
from capsnet.train import fit
from tiny import tiny

Capture = pytest.CaptureFixture[str]

POSITIONAL = {"predict": ["x", "y"], "reproduce": ["table1"], "train": [], "list": ["data"]}
NEEDED = {"compare": ["--against", "x"]}


def numbers(hint: Any) -> set[type]:
    """The kinds of number in an annotation."""
    if hint in (int, float):
        return {hint}
    return set().union(*(numbers(part) for part in typing.get_args(hint) if not isinstance(part, Range)))


def options() -> list[tuple[str, str, Any]]:
    """Verb, option and annotation of all that is a number, but for those of Config, which checks its own."""
    found = []
    for verb, module in VERBS.items():
        kind = getattr(import_module(f"capsnet.cli.{module}"), f"_{verb.capitalize()}")
        hints = typing.get_type_hints(kind, include_extras=True)
        names = [field.name for field in fields(kind) if hints[field.name] is not Config]
        found += [(verb, name, hints[name]) for name in names if numbers(hints[name])]
    return found


def ranges(hint: Any) -> list[Range]:
    """The ranges in an annotation, which tyro may have wrapped."""
    if isinstance(hint, Range):
        return [hint]
    return [one for part in getattr(hint, "__metadata__", ()) + typing.get_args(hint) for one in ranges(part)][:1]


OPTIONS = [pytest.param(*one, id=f"{one[0]}-{one[1]}") for one in options()]


def test_the_reader_of_annotations_sees_numbers() -> None:
    assert numbers(tuple[float, ...] | None) == {float}
    assert numbers(typing.Annotated[int | None, Range(1, 2)]) == {int}
    assert numbers(typing.Literal[1] | str) == set()
    assert {("perturb", "span"), ("attack", "epsilons")} <= {(verb, name) for verb, name, _ in options()}


@pytest.mark.parametrize(("verb", "name", "hint"), OPTIONS)
def test_a_number_outside_its_range_is_one_line(capsys: Capture, verb: str, name: str, hint: Any) -> None:
    (within,) = ranges(hint)
    option = f"--{name.replace('_', '-')}"
    words = [verb, *POSITIONAL.get(verb, ["x"]), *NEEDED.get(verb, [])]
    wrong = ["nan", "inf", "-inf", "1e308", str(10**30), str(-(10**30)), "x"]
    wrong += [str(number) for number in (-1, 0) if within.rule(number)]
    for value in wrong:
        assert main([*words, f"{option}={value}"]) == 2, value
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{option} must be " in err
        assert len(err) < 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("options") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda path, *arguments, **about: path.write_text("", encoding="utf-8"))
        fit(tiny(Path("strokes"), epochs=1, out=str(place)), strokes(train=60, validation=0, test=10))
    return place


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("evaluate run --batch-size MOST", 0),
        ("evaluate run --shifts MOST", 2),
        ("predict run image.png --batch-size MOST", 0),
        ("reconstruct run --right MOST --wrong MOST", 0),
        ("reconstruct run --right 1 --wrong 0", 0),
        ("perturb run --span MOST", 0),
        ("perturb run --images MOST", 0),
        ("perturb run --classes all --images MOST", 0),
        ("perturb run --steps MOST", 0),
        ("couplings run --images MOST --show MOST", 0),
        ("attack run --images MOST --batch-size MOST --seed MOST --steps 2 --step-size MOST", 0),
        ("export run --to safetensors --images MOST --batch-size MOST", 0),
        ("compare run --against copy --batch-size MOST", 0),
    ],
)
def test_the_largest_numbers_work(
    trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, line: str, code: int
) -> None:
    few = strokes(train=60, validation=0, test=10)
    monkeypatch.setattr("capsnet.train.load", lambda *arguments, **options: few)
    for name in ("run", "copy"):
        shutil.copytree(trained, workplace / name)
    shutil.copyfile("run/figures/reconstructions.png", "image.png")
    verb, *words = line.split()
    most = {name: str(ranges(hint)[0].high) for of, name, hint in options() if of == verb}
    for k, word in enumerate(words):
        if word == "MOST":
            words[k] = most[words[k - 1][2:].replace("-", "_")]
    assert main([verb, *words]) == code
    assert capsys.readouterr().err.count("\n") <= 20
