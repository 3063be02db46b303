"""The tables of README and docs are those of the records, and are written between their marks only."""

from pathlib import Path

import pytest

from capsnet.errors import InputError
from capsnet.experiments import available
from tools.tables import PAGES, main, rewritten

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "results" / "experiments"
TABLE = "<!-- table svhn -->\nold\n<!-- end of table -->\n"


def test_a_page_is_rewritten_between_its_marks_only(tmp_path: Path) -> None:
    page = "above\n<!-- table table1 -->\nold\n<!-- end of table -->\nbelow\n"
    fresh = rewritten(page, tmp_path, source="page")
    assert fresh.startswith("above\n<!-- table table1 -->\n| network |")
    assert fresh.endswith("<!-- end of table -->\nbelow\n")
    assert "old" not in fresh
    assert rewritten(fresh, tmp_path, source="page") == fresh
    with pytest.raises(InputError, match=r"page: a table must be one of overview, table1, .*; got table9"):
        rewritten(page.replace("table1", "table9"), tmp_path, source="page")


@pytest.mark.parametrize(
    ("lost", "got"),
    [("<!-- end of table -->", "2 begun and 1 ended"), ("<!-- table table1 -->", "1 begun and 2 ended")],
)
def test_a_lost_mark_loses_nothing_else(tmp_path: Path, lost: str, got: str) -> None:
    page = "".join(f"<!-- table {n} -->\n<!-- end of table -->\nprose\n" for n in ("table1", "svhn"))
    with pytest.raises(InputError, match=f"page must have each table between <!-- table NAME --> and .*; got {got}"):
        rewritten(page.replace(lost, "", 1), tmp_path, source="page")


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_the_pages_are_those_of_the_records(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert rewritten(text, RECORDS, source=page) == text


def test_every_experiment_has_its_table_in_the_docs() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name in available():
        assert f"<!-- table {name} -->" in text


# the command line


@pytest.fixture
def place(workplace: Path) -> Path:
    """A folder with an empty folder of records, a page with a table, and one without."""
    Path("results/experiments").mkdir(parents=True)
    Path("marked.md").write_text(TABLE, encoding="utf-8")
    Path("plain.md").write_text("no table", encoding="utf-8")
    return workplace


@pytest.mark.usefixtures("place")
def test_pages_are_written_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["marked.md", "--check"]) == 1
    assert capsys.readouterr().out == "not that of the records: marked.md\n"
    assert Path("marked.md").read_text(encoding="utf-8") == TABLE
    assert main(["marked.md"]) == 0
    assert capsys.readouterr().out == "written: marked.md\n"
    assert "| CapsNet, smaller | 4.3 % | not run |" in Path("marked.md").read_text(encoding="utf-8")
    assert main(["marked.md", "--check"]) == 0
    assert capsys.readouterr().out == "all tables are those of the records\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "plain.md",
            "page plain.md must have each table between <!-- table NAME --> and <!-- end of table -->; got none",
        ),
        ("marked.md plain.md", "page plain.md must have each table between "),
        ("plain.md --check", "page plain.md must have each table between "),
        ("nowhere.md", "page nowhere.md must be readable; got: No such file"),
        ("marked.md --results nowhere", "--results must be a folder of records; got nowhere"),
        ("marked.md --results plain.md", "--results must be a folder of records; got plain.md"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_input_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert Path("marked.md").read_text(encoding="utf-8") == TABLE
