"""Every number that a verb takes: each says its range, and what is outside of it is one line."""

import shutil
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from capsnet import report
from capsnet.cli import CAPSNET, main
from capsnet.cli.parsing import Group
from capsnet.data.sets.strokes import strokes
from capsnet.options.schema import Range
from capsnet.training.fit import fit
from tiny import tiny

Capture = pytest.CaptureFixture[str]

POSITIONAL = {"predict": ["x", "y"], "reproduce": ["table1"], "train": [], "list": ["data"]}


def numbers(hint: Any) -> set[type]:
    """The kinds of number in an annotation."""
    if hint in (int, float):
        return {hint}
    return set().union(*(numbers(part) for part in typing.get_args(hint) if not isinstance(part, Range)))


def options() -> list[tuple[str, str, Any]]:
    """Verb, option and annotation of all that is a number, but for those of Config, which checks its own."""
    found = []
    for verb, kind in commands(CAPSNET).items():
        hints = typing.get_type_hints(kind, include_extras=True)
        found += [(verb, field.name, hints[field.name]) for field in fields(kind) if numbers(hints[field.name])]
    return found


def commands(group: Group) -> dict[str, Any]:
    """Each command by its words."""
    found: dict[str, Any] = {}
    for name, verb in group.verbs.items():
        inside = commands(verb) if isinstance(verb, Group) else {"": verb}
        found |= {f"{name} {word}".strip(): kind for word, kind in inside.items()}
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
    assert {("plot perturbations", "span"), ("analyse attack", "epsilons")} <= {
        (verb, name) for verb, name, _ in options()
    }


@pytest.mark.parametrize(("verb", "name", "hint"), OPTIONS)
def test_a_number_outside_its_range_is_one_line(capsys: Capture, verb: str, name: str, hint: Any) -> None:
    (within,) = ranges(hint)
    option = f"--{name.replace('_', '-')}"
    words = [*verb.split(), *POSITIONAL.get(verb, ["x"])]
    wrong = [str(10**30), str(-(10**30)), *(str(number) for number in (-1, 0) if within.fault(number))]
    wrong += ["nan", "inf", "-inf", "1e308"] if float in numbers(hint) else []
    for value in wrong:
        assert main([*words, f"{option}={value}"]) == 2, value
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{option} must be " in err
        assert len(err) < 200
    for value in ("x", "" if float in numbers(hint) else "1.5"):
        assert main([*words, f"{option}={value}"]) == 2, value
        out, err = capsys.readouterr()
        assert out == ""
        assert f"Error parsing {option}" in err


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
        ("plot reconstructions run --right MOST --wrong MOST", 0),
        ("plot reconstructions run --right 1 --wrong 0", 0),
        ("plot perturbations run --span MOST", 0),
        ("plot perturbations run --images MOST", 0),
        ("plot perturbations run --classes all --images MOST", 0),
        ("plot perturbations run --steps MOST", 0),
        ("plot couplings run --images MOST --show MOST", 0),
        ("analyse attack run --images MOST --batch-size MOST --seed MOST --steps 2 --step-size MOST", 0),
        ("export run --to safetensors --images MOST --batch-size MOST", 0),
        ("evaluate run --against copy --batch-size MOST", 0),
    ],
)
def test_the_largest_numbers_work(
    trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, line: str, code: int
) -> None:
    few = strokes(train=60, validation=0, test=10)
    monkeypatch.setattr("capsnet.training.prepare.load", lambda *arguments, **options: few)
    for name in ("run", "copy"):
        shutil.copytree(trained, workplace / name)
    shutil.copyfile("run/figures/reconstructions.png", "image.png")
    words = line.split()
    verb = " ".join(CAPSNET.named(words))
    most = {name: str(ranges(hint)[0].high) for of, name, hint in options() if of == verb}
    for k, word in enumerate(words):
        if word == "MOST":
            words[k] = most[words[k - 1][2:].replace("-", "_")]
    assert main(words) == code
    assert capsys.readouterr().err.count("\n") <= 20
