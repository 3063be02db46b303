"""The proof of the house: the network of docs/extending.md, one new file, which every verb takes as it is."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from capsnet import memory, models
from capsnet.checkpoints import pretrained
from capsnet.cli import main
from capsnet.demo.viewer import Viewer
from capsnet.devices import Free
from tiny import photos, reading

Capture = pytest.CaptureFixture[str]
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
TOY = PAGE.split("```python\n")[1].split("```")[0]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file among the models; no other is touched."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "capsnet.models.toy", raising=False)


def test_every_verb_takes_a_new_model(toy: None, workplace: Path, capsys: Capture) -> None:
    data = photos(workplace / "data", count=20, size=(12, 12))
    words = ["--data", str(data), "--model", "toy", "--dim", "5", "--epochs", "6", "--batch-size", "8", "--lr", "0.01"]
    assert main(["train", "--help", "--model", "toy"]) == 0
    assert "--patch" in (told := capsys.readouterr().out)
    assert "--conv-channels" not in told
    assert main(["train", *words, "--dry-run"]) == 0
    assert main(["train", *words, "--out", "run"]) == 0
    assert "Routing" in Path("run/report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] == json.loads(Path("run/result.json").read_text(encoding="utf-8"))["test"]["wrong"]
    assert found["error_percent"] < 40  # chance is 67
    for kind in ("reconstructions", "perturbations", "couplings", "all"):
        assert main(["plot", kind, "run"]) == 0, kind
    assert main(["analyse", "ood", "run", "--against", "noise"]) == 0
    assert main(["analyse", "attack", "run", "--epsilons", "0.1", "--steps", "2", "--images", "4"]) == 0
    assert main(["predict", "run", str(data / "a"), "--csv"]) == 0
    assert main(["export", "run", "--to", "pt2"]) == 0
    assert main(["train", "--resume", "run", "--epochs", "7"]) == 0
    capsys.readouterr()
    assert main(["list", "models"]) == 0
    assert "A toy: patches as capsules" in capsys.readouterr().out
    network = pretrained.load("run")
    assert network.config["dim"] == 5
    viewer = Viewer(network, "run", reading=reading(network.image_shape), threshold=None)
    assert viewer.describe()["dim"] == 5
    assert main(["train", *words, "--patch", "0"]) == 2
    assert capsys.readouterr().err.endswith("patch must be at least 1; got 0\n")
    assert main(["train", "--conv-channels", "3", "--model", "toy"]) == 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("line", "changed", "error"),
    [
        ("    def in_capsules(self):", "    def capsules(self):", "abstract method"),
        ("return mean_routing(self.votes(images)[1])", "return mean_routing(images.mean().item())", "meta tensors"),
        ("self.grid = height // options.patch, width // options.patch", "self.grid = 2, 2", "einsum"),
    ],
)
def test_a_mistake_in_its_file_is_shown_as_python_shows_it(
    toy: None, workplace: Path, line: str, changed: str, error: str
) -> None:
    path = workplace.parent / "more" / "toy.py"
    path.write_text(TOY.replace(line, changed), encoding="utf-8")
    data = photos(workplace / "data", count=6, size=(12, 12))
    with pytest.raises((TypeError, RuntimeError), match=error):
        main(["train", "--data", str(data), "--model", "toy", "--epochs", "1", "--out", "run"])


def test_what_makes_it_smaller_may_be_left_out(
    toy: None, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = workplace.parent / "more" / "toy.py"
    path.write_text(re.sub("    narrower = .*\n", "", TOY), encoding="utf-8")
    monkeypatch.setattr(memory, "free", lambda device: Free(3 * 2**20, "free in a test"))
    data = photos(workplace / "data", count=6, size=(12, 12))
    assert main(["train", "--data", str(data), "--model", "toy", "--epochs", "1", "--out", "run"]) == 2
    assert capsys.readouterr().err.endswith("; choose a smaller --image-size, or a smaller network\n")


def test_the_other_routing_of_the_page_takes_its_place(toy: None, workplace: Path) -> None:
    (block,) = (each.split("```")[0] for each in PAGE.split("```python\n") if "def cosine_routing(votes" in each)
    function = block[block.index("def ") : block.index("routed = cosine_routing(")]
    code = TOY.replace(" mean_routing(votes)", " cosine_routing(votes)").replace("return mean_r", "return cosine_r")
    path = workplace.parent / "more" / "toy.py"
    path.write_text(code.replace("class Toy", f"{function}class Toy"), encoding="utf-8")
    network = models.create("toy", image_shape=(3, 12, 12), num_classes=3)
    images = torch.rand(2, 3, 12, 12)
    _, votes, couplings, _ = network.trace_routing(images)  # type: ignore[operator]
    cosine = torch.cosine_similarity(votes, votes.sum(1, keepdim=True), dim=-1)
    torch.testing.assert_close(couplings[0], (4 * cosine).softmax(-1))
    torch.testing.assert_close(network(images).couplings, couplings[0])


def test_its_routing_is_that_of_loops(toy: None) -> None:
    """The twin of `mean_routing` in NumPy."""
    network = models.create("toy", image_shape=(3, 12, 12), num_classes=3)
    images = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        _, votes, couplings, pose = network.trace_routing(images)  # type: ignore[operator]
    for image, (v, c, p) in enumerate(zip(votes.double().numpy(), couplings[0].numpy(), pose[0].numpy(), strict=True)):
        mean = v.mean(0)
        for j in range(3):
            s = np.zeros(3)
            for i in range(len(v)):
                agreement = np.exp([v[i, k] @ mean[k] for k in range(3)])
                np.testing.assert_allclose(c[i], agreement / agreement.sum(), rtol=1e-5)
                s += agreement[j] / agreement.sum() * v[i, j]
            n = np.linalg.norm(s)
            np.testing.assert_allclose(p[j], s * n / (1 + n * n), rtol=1e-4, atol=1e-6, err_msg=str(image))
