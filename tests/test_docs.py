"""The README's code runs, its commands parse, its links exist and its numbers are those of the records."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from capsnet.checkpoints import exported, pretrained
from capsnet.cli import main
from capsnet.config import Config, read, with_defaults
from capsnet.training import fit as training

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip()
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if "capsnet " in line
]


class Parsed(Exception):
    """Raised in place of the work that a command would begin."""


def stop(*arguments: object, **options: object) -> None:
    raise Parsed


EXAMPLES = [block for kind, block in BLOCKS if kind == "python"]


def test_the_first_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    example = EXAMPLES[0]
    exec(example, {})
    promised = re.findall(r"torch\.Size\(\[[\d, ]+\]\)", example)
    assert capsys.readouterr().out.split("\n")[:-1] == promised
    assert len(promised) == 3


def test_the_other_examples_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capsnet.data.sets import strokes

    few = strokes.strokes(train=64, validation=16, test=16)
    monkeypatch.setattr("capsnet.data.load", lambda name: few)
    assert len(EXAMPLES) == 3
    for example in EXAMPLES[1:]:
        names: dict[str, Any] = {}
        exec(example, names)
        assert names["network"] is not None
    assert (workplace / "runs").is_dir()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("capsnet")])
def test_commands_parse(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "fit", stop)
    monkeypatch.setattr(training, "resume", stop)
    monkeypatch.setattr(pretrained, "load", stop)
    monkeypatch.setattr(exported, "load", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    (tmp_path / "photos").mkdir()
    for file in ("photo.jpg", "photo-of-a-digit.jpg", "scans/1.png", "photos/1.png", "capsnet-mnist.onnx"):
        (tmp_path / file).touch()
    arguments = shlex.split(command)[1:]
    if "--resume" in arguments:
        from capsnet.config import write

        arguments[arguments.index("--resume") + 1] = str(tmp_path)
        write(Config(), tmp_path / "config.yaml")
    if arguments[0] == "list" or "--dry-run" in arguments:
        assert main(arguments) == 0
        assert capsys.readouterr().out
        return
    with pytest.raises(Parsed):
        main(arguments)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_number_of_make_train_is_that_of_the_record() -> None:
    folder = ROOT / "results" / "strokes-fast-3-epochs-seed0"
    test = json.loads((folder / "result.json").read_text(encoding="utf-8"))["test"]
    assert f"{test['error_percent']:.2f} % ({test['wrong']} of {test['total']:,}) wrong" in " ".join(README.split())
    assert read(folder / "config.yaml").epochs == with_defaults(Config()).epochs
