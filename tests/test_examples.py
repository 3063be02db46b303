"""The notebook in examples/ runs from top to bottom, says what is true, and holds outputs of this very code."""

import ast
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import files

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"
UNSTEADY = {"train", "slant-others"}  # rounding grows in a training, and decides the order of near equals
NUMBER = re.compile(r"-?\d+(?:[\d,]*\d)?(?:\.\d+)?")


def text_of(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


CONTENT: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = CONTENT["cells"]
CODE = {cell["id"]: text_of(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
OUTPUTS: dict[str, list[dict[str, Any]]] = {c["id"]: c["outputs"] for c in CELLS if c["cell_type"] == "code"}
PROSE = "\n".join(text_of(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def printed(name: str) -> str:
    """What the stored output of a cell says on stdout."""
    return "".join(text_of(each["text"]) for each in OUTPUTS[name] if each.get("name") == "stdout")


# the file


def test_it_was_executed_from_top_to_bottom() -> None:
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_its_metadata_tell_nothing_of_a_machine() -> None:
    assert CONTENT["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in CELLS)


def test_it_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 600_000


@pytest.mark.parametrize("name", CODE)
def test_each_cell_that_shows_something_has_its_output(name: str) -> None:
    kinds = [each["output_type"] for each in OUTPUTS[name]]
    assert "error" not in kinds
    pictures = sum("image/png" in each.get("data", {}) for each in OUTPUTS[name])
    assert pictures == len(re.findall(r"plt\.subplots\(|^plots\.", CODE[name], re.MULTILINE))
    assert bool(printed(name)) == ("print(" in CODE[name])
    told = json.dumps([{**each, "data": {**each.get("data", {}), "image/png": ""}} for each in OUTPUTS[name]])
    assert not re.search(r"/(home|root|tmp|work|usr|Users|var)\b|[A-Z]:\\|Warning|Traceback", told)


@pytest.mark.parametrize("name", CODE)
def test_its_code_is_plain_python_of_this_package_and_matplotlib(name: str) -> None:
    tree = ast.parse(CODE[name])  # no magic, no shell
    assert max(map(len, CODE[name].splitlines())) <= 120
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {f"{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {"capsnet", "matplotlib", "torch", "csv", "math", "tempfile"}
    assert {each.partition(".")[0] for each in imported} <= ours


def test_the_files_it_speaks_of_are_there() -> None:
    import capsnet
    from capsnet.cli import CAPSNET

    package = Path(capsnet.__file__).parent
    assert all((package / name).is_file() for name in re.findall(r"`([\w/]+\.py)`", PROSE))
    commands = set(re.findall(r"`capsnet (\w+)", PROSE))
    assert {"train", "demo", "report", "plot"} <= commands <= set(CAPSNET.verbs)
    assert NOTEBOOK.name in (EXAMPLES / "README.md").read_text(encoding="utf-8")


# its code


def run(code: str, names: dict[str, Any]) -> object:
    """Execute a cell; the value of a last expression is what a notebook would show."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


@contextlib.contextmanager
def without_a_window() -> Iterator[Any]:
    """pyplot that draws into memory, and none of its settings or figures left behind."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        plt.switch_backend("Agg")
        try:
            yield plt
        finally:
            plt.close("all")


def numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in NUMBER.findall(text)]


@pytest.mark.slow
def test_it_runs_says_what_is_stored_and_what_it_claims_is_true(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    names: dict[str, Any] = {"__name__": "__main__"}
    told: dict[str, str] = {}
    after: dict[str, dict[str, Any]] = {}
    with without_a_window() as plt:
        from matplotlib.figure import Figure

        for name, code in CODE.items():
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                shown = run(code, names)
            told[name], after[name] = out.getvalue(), dict(names)
            figures = [plt.figure(number) for number in plt.get_fignums()]
            figures += [shown] if isinstance(shown, Figure) else []
            assert len(figures) == sum("image/png" in each.get("data", {}) for each in OUTPUTS[name]), name
            for figure in figures:
                figure.savefig(io.BytesIO())  # what a warning would come from
            plt.close("all")
    assert files(workplace) == set() == files(temporary)

    for name in CODE.keys() - UNSTEADY:
        assert NUMBER.sub("#", told[name]) == NUMBER.sub("#", printed(name)), name
        assert numbers(told[name]) == pytest.approx(numbers(printed(name)), rel=0.02, abs=0.021), name
    for name in ("squash", "network", "support"):
        assert "False" not in told[name]
        assert "True" in told[name]

    # 2: where votes agree, couplings and length grow
    to_a, toy = names["to_a"], names["toy"]
    assert (to_a[0] == 0.5).all()
    assert (to_a.diff(dim=0)[:, :9] > 0).all()
    assert (to_a.diff(dim=0)[:, 9:] < 0).all()
    assert toy[0].activation[0] < toy[1].activation[0] < toy[2].activation[0] < 1
    assert all(routed.activation[1] < 0.1 for routed in toy)
    # 3: flat beyond the margins
    length = torch.linspace(0, 1, 200)
    assert (names["present"][length >= 0.9] == 0).all()
    assert (names["present"][length < 0.9] > 0).all()
    assert (names["absent"][length <= 0.1] == 0).all()
    assert (names["absent"][length > 0.1] > 0).all()
    # 5: it learned
    rows = names["epochs"]
    assert rows[0]["train_error_percent"] > rows[0]["validation_error_percent"]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    assert names["result"].test.error_percent < 10
    # 6: all ten are recognised, by one long capsule each
    lengths, digits = after["shipped"]["found"].lengths, names["digits"]
    assert lengths.argmax(-1).tolist() == digits.tolist()
    assert lengths.amax(-1).min() > 0.8
    assert lengths.topk(2).values[:, 1].max() < 0.3
    # 7: every dimension draws something else; a slant moves several, differently in each digit
    swept = names["swept"].images
    assert swept.shape == (1, 16, 5, 1, 28, 28)
    assert (swept[:, :, 0] - swept[:, :, -1]).abs().amax((0, 2, 3, 4)).min() > 0.05
    moved, share = names["moved"], names["share"]
    assert (share > 0.02).sum() > 2
    assert share.max() < 0.5
    assert moved[:, names["first"]].diff().sign().unique().numel() == 1
    strongest = [tuple(numbers(line.split("dimensions")[1])) for line in told["slant-others"].splitlines()]
    assert len(strongest) == 10
    assert max(each[1] for each in strongest) < 50
    assert len({each[0] for each in strongest}) > 3
    assert lean(after["slant"]["read"].images) > 1
    assert lean(after["slant"]["read"].of_prediction) > 1
    # 8: couplings stay almost uniform; support grows, as votes for and against nearly cancel
    found = after["support"]["found"]
    assert found.entropy[-1].mean() > 0.99 * torch.tensor(10.0).log2()
    assert found.entropy.mean(1).diff().max() < 0
    assert ((found.couplings[-1] - 0.1).abs() < 0.02).float().mean() > 0.95
    support = found.support[:, digits, names["winner"]].sum((-2, -1))
    assert (support.diff(dim=0) > 0).all()
    balance = torch.tensor(names["balance"])
    assert balance.sum(1)[0] < 0.25 * balance[0, 0]
    assert (balance.diff(dim=0) > 0).all()
    assert balance.sum(1)[-1] > 2 * balance.sum(1)[0]
    # 9: strangers
    flagged = {kind: (values > names["threshold"].value).tolist() for kind, values in names["errors"].items()}
    assert all(flagged["noise"] + flagged["pixels scrambled"])
    assert [digit for digit in range(10) if not flagged["upside down"][digit]] == [0, 1, 8]
    assert 0 < sum(flagged["upright"]) < 5
    assert flagged["a dot"] == [False]


def lean(images: torch.Tensor) -> float:
    """How far, in pixels, the top of the last image stands to the right of its bottom, beyond that of the first."""
    ink, columns = images[:, 0], torch.arange(28.0)
    halves = [(half * columns).sum((1, 2)) / half.sum((1, 2)) for half in (ink[:, :14], ink[:, 14:])]
    top = halves[0] - halves[1]
    return float(top[-1] - top[0])
