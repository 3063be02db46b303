"""The search for habits of language finds them, and nothing in code, tables or addresses; most pages have none."""

from pathlib import Path

import pytest

from tools.words import LONGEST, findings, main, sentences

ROOT = Path(__file__).parents[1]
LONGER = {"experiments.md", "models.md"}
"""Pages that may still have some."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in LONGER], ids=lambda page: page.name)
def test_a_page_has_no_habits_and_no_long_sentences(page: Path) -> None:
    assert findings(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "The error is told at the end.",
        "The file tells what it holds.",
        "It keeps a score an image.",
        "One row a layer is printed.",
        "A stopped training goes on with the same weights.",
        "It is left out for want of a test.",
        "Strangers are detected by their error.",
        "It is changed in silence.",
        "Nobody may change the weights.",
    ],
)
def test_a_habit_is_found(sentence: str) -> None:
    (found,) = findings(f"# Title\n\n{sentence}\n")
    assert found.line == 3
    assert found.words.lower() in sentence.lower()


@pytest.mark.parametrize(
    "text",
    [
        "`told` and `a score an image` are code.",
        "```\nthe error is told\n```\n",
        "| is told | a score an image |",
        "A [page](https://x.org/is/told/) of one class.",
        "A batch is a number of images of a class.",
        "<!-- the error is told -->",
    ],
)
def test_code_tables_and_addresses_are_not_prose(text: str) -> None:
    assert findings(text) == []


def test_long_sentences_are_counted_by_words() -> None:
    assert findings(" ".join(["word"] * LONGEST) + ".") == []
    (found,) = findings("A short one. " + " ".join(["Word"] * (LONGEST + 1)) + ".")
    assert f"{LONGEST + 1} words" in found.instead


def test_sentences_of_paragraphs_and_items() -> None:
    text = "# Head\n\nOne. Two\nand on.\n\n- item one\n- item two\n"
    assert list(sentences(text)) == [(3, "One."), (3, "Two and on."), (6, "- item one"), (7, "- item two")]


def test_what_is_found_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("Fine.\n", encoding="utf-8")
    assert main([str(page)]) == 0
    page.write_text("It is told.\n", encoding="utf-8")
    assert main([str(page)]) == 1
    assert capsys.readouterr().out == f"{page}:1: is told (say, report, log)\n"
    assert main([str(tmp_path / "nowhere.md")]) == 2
    assert "page " in capsys.readouterr().err
