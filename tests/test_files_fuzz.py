"""Every file that is read of a run, altered in any way: a right result, or one short line that says what is wrong."""

import copy
import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capsnet.checkpoints import pretrained, run_directory
from capsnet.cli import main
from capsnet.data import Dataset
from capsnet.errors import InputError
from capsnet.experiments import records
from capsnet.models import Network
from capsnet.training import fit as training
from capsnet.training import prepare
from tiny import tiny

RECORD = Path(__file__).parents[1] / "results" / "experiments" / "table1-cpu.jsonl"
FILES = ("config.yaml", "config.json", "card.json", "result.json", "metrics.csv", "model.safetensors", "last.ckpt")
WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 7, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e308, math.nan, math.inf, "", "x", "2", "\0",
    "\ud800", "[bold]\x1b[31m\n", "capsnet", "x" * 3000, [], [0], [[]], [1] * 1000, ["a", "b", "c"], {}, {"x": 1},
]  # fmt: skip
TENSORS = [
    torch.zeros(()), torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.full((8,), math.nan), torch.zeros(0),
    torch.zeros(1).expand(10**12), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64),
    torch.eye(3).to_sparse(), torch.zeros(8, dtype=torch.complex64),
]  # fmt: skip
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
MANY = settings(FEW, max_examples=2_000, derandomize=False)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch of 5 steps, and a file of records beside it."""
    run = training.fit(tiny(photos, epochs=1, out=str(tmp_path_factory.mktemp("fuzz") / "run"), report=False)).directory
    (run / "x-quick.jsonl").write_text(RECORD.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def dataset(photos: Path) -> Dataset:
    return prepare.prepare_data(tiny(photos))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@cache
def network_of(dataset: Dataset) -> Network:
    return prepare.build(tiny(Path("photos")), dataset)


def read(run: Path, name: str, dataset: Dataset) -> None:
    """Read the file `name` of a run as the package does."""
    here = run_directory.Run(run)
    if name == "last.ckpt":
        training._checkpoint(here, here.config(), network_of(dataset), dataset)
    elif name in ("model.safetensors", "config.json"):
        network = pretrained.load(run)
        assert all(
            parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in network.parameters()
        )
    elif name == "card.json":
        card = pretrained.load_card(run)
        assert card.data is None or card.command
        json.dumps(card.to_dict())
    elif name == "x-quick.jsonl":
        records.read(run, "x", "quick")
    else:
        {"config.yaml": here.config, "result.json": here.result, "metrics.csv": here.metrics}[name]()


def check(what: Callable[[], object], run: Path) -> None:
    """Whether `what` succeeds or says in one short line what is wrong."""
    try:
        what()
    except InputError as error:
        told = str(error).replace(str(run.parent), "")
        assert "\n" not in told
        assert 10 < len(told) < 1000, told


@dataclass(frozen=True)
class Altered:
    """A tree with one place in it changed, removed or added, and which."""

    how: str
    tree: Any = field(repr=False)


def alterations(tree: Any, wrong: list[Any]) -> st.SearchStrategy[Altered]:
    """Copies of nested lists and mappings, each altered in one place."""

    @st.composite
    def altered(draw: st.DrawFn) -> Altered:
        inside = whole = copy.deepcopy(tree)
        path: list[Any] = []
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            how = draw(st.sampled_from(["change", "change", "remove", "add"])) if keys else "add"
            new = draw(st.sampled_from(["x", "", "epochs", "preset", "a" * 2000])) if how == "add" else None
            path.append(new if how == "add" else draw(st.sampled_from(keys)))
            key = path[-1]
            if how == "remove":
                del inside[key]
            elif how == "add" and isinstance(inside, list):
                inside.append(draw(st.sampled_from(wrong)))
            elif how == "add" or not isinstance(inside[key], dict | list) or draw(st.integers(0, 2)) == 0:
                inside[key] = draw(st.sampled_from(wrong))
            else:
                inside = inside[key]
                continue
            return Altered(f"{how} {path}", whole)

    return altered()


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some of them changed, cut off, taken out or put in."""

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        at = draw(st.integers(0, len(content)))
        until = min(len(content), at + draw(st.sampled_from([0, 1, 2, 8, 100, 10**9])))
        put = draw(
            st.sampled_from(["", "\0", "\xff", "[", "{", '"', ",", "\n", "9" * 50, "PK", "\x80\x02", "[" * 5000])
        )
        return content[:at] + put.encode("latin-1") + content[until:]

    return damaged()


def tree_of(path: Path) -> Any:
    """What a file holds, as lists and mappings."""
    if path.name == "config.yaml":
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".safetensors":
        size = struct.unpack("<Q", path.read_bytes()[:8])[0]
        return json.loads(path.read_bytes()[8 : 8 + size])
    return json.loads(path.read_text(encoding="utf-8"))


def put(path: Path, tree: Any, finished: Path) -> None:
    """Write such a tree as the file."""
    if path.suffix == ".ckpt":
        torch.save(tree, path)
    elif path.suffix == ".safetensors":
        whole = (finished / path.name).read_bytes()
        header = json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + struct.unpack("<Q", whole[:8])[0] :])
    else:
        path.write_text(yaml.safe_dump(tree) if path.name == "config.yaml" else json.dumps(tree), encoding="utf-8")


TREES = [name for name in (*FILES, "x-quick.jsonl") if name != "metrics.csv"]


def change_values(name: str, how: settings, run: Path, finished: Path, dataset: Dataset) -> None:
    tree, wrong = tree_of(run / name), WRONG + TENSORS * (name == "last.ckpt")

    @how
    @given(alterations(tree, wrong))
    def change(altered: Altered) -> None:
        put(run / name, altered.tree, finished)
        check(lambda: read(run, name, dataset), run)

    change()


def change_bytes(name: str, how: settings, run: Path, dataset: Dataset) -> None:
    @how
    @given(damages((run / name).read_bytes()))
    @example(b"")
    @example(b"[" * 60_000)
    @example(b'{"a":' * 10_000)
    @example(b"9" * 6000)
    def change(content: bytes) -> None:
        (run / name).write_bytes(content)
        check(lambda: read(run, name, dataset), run)

    change()


@pytest.mark.usefixtures("unchecked")  # a whole number where there is one with a fraction is right, and no float
@pytest.mark.parametrize("name", TREES)
def test_wrong_values_are_one_line(name: str, run: Path, finished: Path, dataset: Dataset) -> None:
    change_values(name, FEW, run, finished, dataset)


@pytest.mark.parametrize("name", [*FILES, "x-quick.jsonl"])
def test_damaged_bytes_are_one_line(name: str, run: Path, dataset: Dataset) -> None:
    change_bytes(name, FEW, run, dataset)


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.usefixtures("workplace", "blank_figure")
def test_commands_answer_with_0_or_2_and_lose_nothing(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """`evaluate` reads weights, card and configuration; `--resume` the checkpoint, and what it refuses it leaves."""

    @settings(FEW, max_examples=count)
    @given(st.data())
    def change(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(FILES))
        content = data.draw(damages((finished / name).read_bytes()))
        shutil.rmtree(run)
        shutil.copytree(finished, run)
        (run / name).write_bytes(content)
        for arguments in (["evaluate", str(run)], ["train", "--resume", str(run), "--epochs", "2", "--no-report"]):
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            code, (_, err) = main(arguments), capsys.readouterr()
            assert code in (0, 2), err
            if code == 2:
                *notes, error = err.splitlines()  # notes are of how the images were read
                assert error.startswith(f"capsnet {arguments[0]}: error: ")
                assert all(note.startswith("capsnet: ") for note in notes)
                assert len(err) < 1500
                assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    change()


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_many_wrong_values_are_one_line(name: str, run: Path, finished: Path, dataset: Dataset) -> None:
    change_values(name, MANY, run, finished, dataset)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "x-quick.jsonl"])
def test_many_damaged_bytes_are_one_line(name: str, run: Path, dataset: Dataset) -> None:
    change_bytes(name, MANY, run, dataset)
