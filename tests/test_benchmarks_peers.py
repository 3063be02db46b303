"""The measurements beside the package: public implementations, here small stand-ins of theirs, and whole trainings."""

import json
import sys
from pathlib import Path

import pytest
import torch

import tiny
from benchmarks import correctness, peers, time_to_error
from capsnet.errors import InputError
from capsnet.training import prepare
from capsnet.training.fit import fit

MODEL = """
import torch
from torch import nn
from torchvision import transforms
from parts import Body
"""
NAMES = {
    "danielhavir/capsule-network": {
        "trainer.py": "",
        "model.py": MODEL + "class CapsuleNetwork(Body):\n    def __init__(self, *sizes):\n        super().__init__()\n"
        "    def forward(self, x):\n        return self.lengths(x), self.drawn(x)\n",
        "loss.py": "class CapsuleLoss:\n    def __init__(self, **options): pass\n"
        "    def __call__(self, lengths, y, x, drawn): return ((lengths - y) ** 2).sum() + (drawn**2).sum()\n",
    },
    "cedrickchee/capsule-net-pytorch": {
        "conv_layer.py": "",
        "model.py": MODEL + "class Net(Body):\n    def __init__(self, *sizes):\n        super().__init__()\n"
        "    def forward(self, x): return self.lengths(x)[:, :, None, None]\n"
        "    def loss(self, x, out, y): return ((out[..., 0, 0] - y) ** 2).sum(), None, None\n",
    },
    "XifengGuo/CapsNet-Pytorch": {
        "capsulelayers.py": "",
        "capsulenet.py": MODEL
        + "class CapsuleNet(Body):\n    def __init__(self, *sizes):\n        super().__init__()\n"
        "    def forward(self, x, y=None): return self.lengths(x.cuda()), self.drawn(x)\n"
        "def caps_loss(y, lengths, x, drawn, weight): return ((lengths - y) ** 2).sum()\n",
    },
}
PARTS = """
import torch
from torch import nn
class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)
    def lengths(self, x): return self.linear(x.flatten(1)).sigmoid()
    def drawn(self, x): return x * self.linear.weight.mean()
"""


@pytest.fixture
def clones(tmp_path: Path) -> list[Path]:
    """A folder for each of the known implementations, with a network of its interface."""
    for name, files in NAMES.items():
        folder = tmp_path / name.split("/")[1]
        folder.mkdir()
        for file, text in {"parts.py": PARTS, **files}.items():
            (folder / file).write_text(text, encoding="utf-8")
    return sorted(tmp_path.iterdir())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """capsnet with a few thousand weights."""
    build = prepare.build
    monkeypatch.setattr(
        "capsnet.training.prepare.build",
        lambda config, dataset: build(config.changed(conv_channels=4, capsule_types=2), dataset),
    )


@pytest.mark.usefixtures("small")
def test_peers_are_measured_beside_capsnet(
    clones: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules, path = set(sys.modules), list(sys.path)
    out = tmp_path / "peers.json"
    arguments = [*map(str, clones), "--out", str(out), "--batch-size", "3", "--repeats", "2"]
    assert peers.main(arguments) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    ways = {"capsnet", "capsnet without C", "capsnet, plainly"}
    for section in ("step", "inference"):
        rows = [row for row in record["rows"] if row["section"] == section]
        assert {row["variant"] for row in rows} == ways | set(peers.PEERS)
        assert rows[0]["variant"] == "capsnet"
        assert rows[0]["ratio"] == 1
        assert all(row["n"] == 2 and row["ratio"] == pytest.approx(row["median"] / rows[0]["median"]) for row in rows)
    assert {check["name"] for check in record["checked"]} == ways
    assert set(record["peers"]) == set(peers.PEERS)
    assert record["resolved"]["capsnet without C"]["CPU"] == "PyTorch (CAPSNET_NATIVE=off)"
    assert record["command"].startswith("python -m benchmarks.peers ")
    assert "capsule-network" in capsys.readouterr().out
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name in ("model", "parts", "loss", "torchvision")}
    assert peers.main(arguments) == 2
    assert "must be a new file" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_wrong_results_have_no_speed(clones: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "TOLERANCES", dict.fromkeys(correctness.TOLERANCES, 0.0))
    with pytest.raises(correctness.Incorrect):
        peers.measure({peers.name_of(clones[0]): clones[0]}, batch_size=3, repeats=1)


def test_an_unknown_clone_and_wrong_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main([str(tmp_path), "--out", str(tmp_path / "x.json")]) == 2
    assert "must be a clone of danielhavir/capsule-network, " in capsys.readouterr().err
    assert peers.main([str(tmp_path), "--out", str(tmp_path / "x.json"), "--repeats", "0"]) == 2
    assert "--repeats must be at least 1; got 0" in capsys.readouterr().err


def row(epoch: int, error: float) -> dict[str, float]:
    return {"epoch": epoch, "images_per_second": 100.0 * epoch, "validation_error_percent": error}


def test_seconds_count_training_until_the_first_epoch_that_is_good_enough() -> None:
    rows = [row(1, 2.0), row(2, 0.9), row(3, 1.1)]
    assert time_to_error.seconds_to(1.0, rows, 1000, source="x") == (10 + 5, 2)  # type: ignore[arg-type]
    assert time_to_error.seconds_to(2.0, rows, 1000, source="x") == (10, 1)  # type: ignore[arg-type]
    assert time_to_error.seconds_to(0.5, rows, 1000, source="x") == (float("inf"), 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="run x must have validation images and finished epochs; it has not"):
        time_to_error.seconds_to(1.0, [], 1000, source="x")


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_a_run_has_a_row(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny.tiny(photos, out="run", epochs=2, validation=10))
    assert time_to_error.main(["run", "--errors", "100", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | s to 100 % held out (epochs) | s to 0 % held out (epochs) | epochs |")
    assert "(1) |" in lines[2]
    assert f"{torch.get_num_threads()} threads" in lines[2]
    assert time_to_error.main(["nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
