"""README and docs: every block of Python runs and prints what it says, and every command is one that is accepted."""

import json
import re
import shlex
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from capsnet.checkpoints import exported, pretrained
from capsnet.cli import CAPSNET, main
from capsnet.config import Config, preset, read, with_defaults, write
from capsnet.training import fit as training
from tiny import photos, typed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.stem, number, kind, code)
    for page in PAGES
    for number, (kind, code) in enumerate(
        re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL), 1
    )
]
EXAMPLES = [pytest.param(code, id=f"{name}-{number}") for name, number, kind, code in BLOCKS if kind == "python"]


def commands(kind: str, code: str) -> list[str]:
    """The commands of a block: `capsnet ...`, alone or behind another word; in a block of text, those after `$ `."""
    lines = code.replace("\\\n", " ").splitlines()
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or kind != "text"]
    found = [re.search(r"(?:^|\s)capsnet\s+(\w+\b.*)", line.split(" #")[0]) for line in shown]
    return [match[1].strip() for match in found if match]


COMMANDS = sorted({line for _, _, kind, code in BLOCKS if kind != "python" for line in commands(kind, code)})


# Python


@pytest.mark.usefixtures("blank_figure")
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_and_prints_what_it_says(
    example: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from capsnet.data.sets import strokes

    monkeypatch.setattr("capsnet.data.load", lambda name: strokes.strokes(train=64, validation=16, test=16))
    monkeypatch.setenv("CAPSNET_NATIVE", "off")  # it would be compiled for each empty cache
    logged = list[dict[str, float]]()
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_metrics=lambda row, step: logged.append(row)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project: Logging(logged)))
    Path("scratch").mkdir()
    Path("scratch/metrics.csv").write_text("epoch,train_loss\n1,0.5\n2,0.25\n", encoding="utf-8")
    exec(example, {})
    printed = iter(capsys.readouterr().out.splitlines())
    for promised in re.findall(r"^print\(.*\)  # (.+)$", example, re.MULTILINE):
        assert promised in printed  # in this order
    assert bool(logged) == ("metrics.csv" in example)


class Logging:
    """A run of Weights & Biases."""

    def __init__(self, logged: list[dict[str, float]]) -> None:
        self.log = logged.append

    def __enter__(self) -> "Logging":
        return self

    def __exit__(self, *raised: object) -> None:
        pass


def test_there_are_examples_with_promises() -> None:
    pages = {name for name, _, kind, code in BLOCKS if kind == "python" and ")  # " in code}
    assert {"README", "index", "python", "capsules"} <= pages


# commands


class Parsed(Exception):
    """Raised in place of the work that a command would begin."""


def stop(*arguments: object, **options: object) -> None:
    raise Parsed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, names in ((training, ("fit", "resume")), (pretrained, ("load", "options_of")), (exported, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, stop)
    monkeypatch.setenv("CAPSNET_NATIVE", "off")
    arguments = shlex.split(command)
    if "my/images" in arguments:
        photos(Path("my/images"), count=4, size=(20, 20))
    for before, word in pairwise(arguments):
        if before in ("--out", "--serve", "--gif"):
            continue
        if Path(word).suffix in (".jpg", ".png", ".onnx"):
            Path(word).touch()
        elif arguments[0] == "predict" and not word.startswith("-"):
            Path(word).mkdir(parents=True, exist_ok=True)
            (Path(word) / "1.png").touch()
    if "--resume" in arguments:
        run = Path(arguments[arguments.index("--resume") + 1])
        run.mkdir(parents=True)
        write(Config(), run / "config.yaml")
    if arguments[0] == "list" or {"--dry-run", "--list"} & set(arguments):
        assert main(arguments) == 0
        assert capsys.readouterr().out
        return
    with pytest.raises(Parsed):
        main(arguments)


def test_there_is_a_command_of_every_verb() -> None:
    assert {line.split()[0] for line in COMMANDS} == set(CAPSNET.verbs)
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("name", ["data", "migration", "recipes", "troubleshooting"])
def test_the_options_that_prose_names_exist(name: str) -> None:
    from capsnet.models import available, options_of

    known = {each.name for kind in map(options_of, available()) for each in fields(kind)} | Config().flat().keys()
    known |= {"resume", "dry_run", "classes"}  # the last one of `plot perturbations`
    prose = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.MULTILINE | re.DOTALL)
    if name == "migration":
        prose = re.sub(r"^\| .*? \|", "|", prose, flags=re.MULTILINE)  # the first column has theirs
    words = re.findall(r"(?<!\S)--([a-z][a-z-]*)(?!\w)", " ".join(re.findall(r"`([^`]+)`", prose)))
    assert words
    assert {word.removeprefix("no-").replace("-", "_") for word in words} <= known


# the messages that troubleshooting quotes


@pytest.mark.usefixtures("blank_figure")
def test_the_messages_of_troubleshooting_are_ours(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPSNET_NATIVE", "off")
    page = " ".join((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").split())
    photos(Path("small"), size=(16, 16))
    code, _, said = typed(capsys, "train --data small")
    assert code == 2
    assert said.removeprefix("capsnet train: error: ").strip() in page
    words = (
        "train --data small --padding same --conv-channels 4 --capsule-types 2 --no-report --epochs 1 --batch-size 32"
    )
    code, _, said = typed(capsys, f"{words} --lr 1e30 --out nan")
    assert code == 1
    for part in (
        "loss became NaN or infinite in epoch 1 at step ",
        "not finite first: the output of ",
        "(try a smaller --lr",
    ):
        assert part in said
        assert part in page
    code, _, said = typed(capsys, f"{words} --lr 1e-6 --out chance")
    assert code == 0
    for part in (" % of the training images wrong in epoch ", ", and always naming the most frequent class has "):
        assert part in said
        assert part in page


# the README


def test_the_first_screen_is_short() -> None:
    assert len(README.splitlines()) <= 150
    table = README.split("<!-- table overview -->")[1].split("<!-- end of table -->")[0]
    assert "not run" not in table


def test_the_number_of_make_train_is_that_of_the_record() -> None:
    folder = ROOT / "results" / "strokes-fast-20-epochs-seed0"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    test = result["test"]
    assert "wrong on drawn digits, in one and a half minutes" in " ".join(README.split())
    assert round(result["seconds"] / 30) == 3
    assert f"{test['error_percent']:.2f} % ({test['wrong']} of {test['total']:,}) wrong" in " ".join(README.split())
    assert read(folder / "config.yaml").epochs == with_defaults(preset("fast")).epochs
