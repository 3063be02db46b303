"""Hostile names of classes, files and folders, as a user's images may have them, through all that prints or draws."""

import ast
import csv
import io
import json
import os
import sys
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest

import capsnet.cli
from capsnet.cli import main
from capsnet.cli.printing import say, show, show_table
from capsnet.files import visible
from tiny import options, photos, tiny

Capture = pytest.CaptureFixture[str]

NOT_UTF8 = os.fsdecode(b"\xff")
CLASSES = ("[bold]", "$x^", "a_$b", ":cat:", "\x1b[31mred", "two\nlines\r", "\u202ereversed", NOT_UTF8, "<b>&\"'")
DATA = f"da[red]ta \x1b[2J\n$x^ {NOT_UTF8}"
FILE = f"\x1b]0;title\x07[bold]\r\n{NOT_UTF8}.png"
RUN = f"run of {DATA}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with images and a run on them, and what `capsnet train` printed on stdout and stderr."""
    place = tmp_path_factory.mktemp("names")
    data = photos(place / "plain", count=6, classes="abcdefghi").rename(place / DATA)
    for letter, name in zip("abcdefghi", CLASSES, strict=True):
        (data / letter).rename(data / name)
    (data / CLASSES[0] / "0.png").rename(data / CLASSES[0] / FILE)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        assert main(["train", *options(tiny(Path("plain"), epochs=1)), "--data", DATA, "--out", RUN]) == 0
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return place, printed[0], printed[1]


@pytest.fixture
def place(trained: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained[0])
    return trained[0]


def hidden(text: str) -> set[str]:
    """What a terminal would obey instead of showing it."""
    return {one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


def told(capture: Capture, *words: str) -> str:
    code = main(list(words))
    out, err = capture.readouterr()
    assert (code, err) == (0, "")
    assert not hidden(out)
    return out


def test_what_is_hidden_is_made_visible() -> None:
    assert visible("\x1b[31m\r\n\x9b\u202e\u2028\x7f" + NOT_UTF8) == r"\x1b[31m\r\n\x9b\u202e\u2028\x7f\udcff"
    assert not hidden("".join(visible(chr(code)) for code in range(0x3000) if code not in (0x200C, 0x200D)))
    for plain in ("a\\b", "naïve 日本語 \N{GRINNING FACE}", "می\u200cروم", "9.00\u202fAM", "[bold] $x^ <b>"):
        assert visible(plain) == plain


def test_a_line_stays_one_line(capsys: Capture) -> None:
    show("a\nb", "c\x1b")
    say("d\r\ne")
    assert capsys.readouterr() == ("a\\nb\nc\\x1b\n", "d\\r\\ne\n")


def test_cells_of_tables_are_no_markup(capsys: Capture) -> None:
    show_table(["class", "[/x]"], [["[/x]", "[bold]a"], [":cat:", "\x1b[0m\n"]])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[/x]", "[bold]a", ":cat:", r"\x1b[0m\n"))
    assert not hidden(out)


def test_all_that_the_verbs_print_goes_through_one_file() -> None:
    ways = {"print", "Console", "sys.stdout.write", "sys.stderr.write"}
    for path in Path(capsnet.cli.__file__).parent.glob("*.py"):
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
        }
        assert path.name == "printing.py" or not ways & calls, path.name


def test_train_and_its_report(trained: tuple[Path, str, str]) -> None:
    place, out, err = trained
    assert not hidden(out) | hidden(err)
    assert f"run directory: {visible(RUN)}\n" in out
    page = (place / RUN / "report.html").read_text(encoding="utf-8")
    assert not hidden(page)
    assert f"<h1>{visible(RUN)}</h1>" in page
    assert f"on {visible(DATA)}</p>" in page


@pytest.mark.usefixtures("place")
def test_evaluate(capsys: Capture) -> None:
    out = told(capsys, "evaluate", RUN).partition("per class:")[2]
    for name in CLASSES:
        assert out.count(visible(name)) == 3  # once by class, and on two sides of the confusion matrix
    rows = json.loads(told(capsys, "evaluate", RUN, "--json"))["per_class"]
    assert {row["class"] for row in rows} == set(CLASSES)


@pytest.mark.usefixtures("place")
def test_predict(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    file = f"{DATA}/{CLASSES[0]}/{FILE}"
    _, row, *_ = told(capsys, "predict", RUN, file).splitlines()
    (found,) = json.loads(told(capsys, "predict", RUN, file, "--json"))
    assert found["file"] == file
    assert row.startswith(visible(file))
    assert visible(found["class"]) in row.removeprefix(visible(file))
    assert main(["predict", RUN, file, "--csv"]) == 0
    (exact,) = csv.DictReader(io.StringIO(capsys.readouterr().out, newline=""))
    assert exact["file"] == file.replace(NOT_UTF8, r"\udcff")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert visible(file) in told(capsys, "predict", RUN, file, "--csv")


@pytest.mark.usefixtures("place")
def test_errors_name_files_in_one_line(capsys: Capture) -> None:
    Path(FILE).write_text("no image", encoding="utf-8")
    for words in (
        ("predict", RUN, FILE),
        ("predict", RUN, FILE + "?"),
        ("evaluate", FILE),
        ("train", "--config", FILE),
    ):
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert visible(FILE) in err
        assert not hidden(out + err)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", RUN, "--to", "onnx"], "out must be a name in UTF-8 for onnx; got run of da[red]"),
        (["export", RUN, "--to", "pt2", "--out", NOT_UTF8], "out must be a name in UTF-8 for pt2; got \\udcff"),
        (
            ["train", "--data", DATA, "--out", NOT_UTF8, "--tensorboard"],
            "out must be a name in UTF-8 for TensorBoard; got",
        ),
        (
            ["plot", "perturbations", RUN, "--out", "same.png", "--gif", "./same.png"],
            "--gif must be another file than --out",
        ),
    ],
)
def test_files_that_cannot_be_written_are_told(capsys: Capture, words: list[str], message: str) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not Path(NOT_UTF8).exists()
    assert not Path("same.png").exists()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("words", ["evaluate LONG", "predict RUN LONG", "train --resume LONG", "train --data LONG"])
def test_names_longer_than_a_file_system_takes_are_told_in_one_line(capsys: Capture, words: str) -> None:
    long = "x" * 5_000
    assert main([{"RUN": RUN, "LONG": long}.get(word, word) for word in words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "xxx..." in err
    assert len(err) < 3_000


@pytest.mark.usefixtures("place")
def test_a_stream_that_lacks_a_character_shows_its_escape(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("é.png").write_bytes(Path(DATA, CLASSES[0], FILE).read_bytes())
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["predict", RUN, "é.png"]) == 0
        assert main(["evaluate", RUN]) == 0
    assert rb"\xe9.png" in out.buffer.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_figures(capsys: Capture) -> None:
    out = told(capsys, "plot", "all", RUN, "--format", "svg")
    for name in ("class-errors", "confusion", "gallery"):
        assert visible(f"figure: {RUN}/figures/{name}.svg") in out.splitlines()
    text = Path(RUN, "figures", "confusion.svg").read_text(encoding="utf-8")
    shown = "".join(ElementTree.fromstring(text).itertext())
    assert all(visible(name) in shown for name in ("[bold]", "$x^", "a_$b", "two\nlines\r", NOT_UTF8, "<b>&\"'"))
    for kind, format in (("reconstructions", "pdf"), ("perturbations", "png"), ("couplings", "svg")):
        assert told(capsys, "plot", kind, RUN, "--format", format).endswith(f".{format}\n")


@pytest.mark.parametrize("what", ["models", "weights", "data", "presets", "experiments"])
def test_list(capsys: Capture, what: str) -> None:
    told(capsys, "list", what)
