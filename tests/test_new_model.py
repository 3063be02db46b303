"""The proof of the house: a network in one new file, which every verb takes without another edit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from capsnet import models
from capsnet.checkpoints import pretrained
from capsnet.cli import main
from capsnet.demo.viewer import Viewer
from tiny import photos, reading

Capture = pytest.CaptureFixture[str]
TOY = '''
"""A toy: patches as capsules, each voting by one matrix, routed by their softmax agreement with the mean vote."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from capsnet import functional as F
from capsnet.layers import Decoder
from capsnet.models.network import CapsuleNetwork, Output, RoutingTrace
from capsnet.options.schema import AT_LEAST_1


@dataclass(frozen=True)
class Options:
    """Options of the toy."""

    patch: Annotated[int, AT_LEAST_1] = 4
    """Height and width of a patch, in pixels."""
    dim: Annotated[int, AT_LEAST_1] = 3
    """Dimension of a capsule."""


def route(votes):
    mean = votes.mean(1, keepdim=True)
    couplings = (votes * mean).sum(-1).softmax(-1)
    return couplings, F.squash(torch.einsum("bij,bijd->bjd", couplings, votes))


class Toy(CapsuleNetwork):
    narrower = "a smaller --dim"

    def __init__(self, image_shape, num_classes, options):
        super().__init__()
        self.image_shape, self.patch, self.dim = image_shape, options.patch, options.dim
        channels, height, width = image_shape
        self.grid = height // options.patch, width // options.patch
        self.patches = nn.Conv2d(channels, options.dim, options.patch, options.patch)
        self.weight = nn.Parameter(torch.randn(self.in_capsules, options.dim, num_classes, options.dim))
        self.decoder = Decoder(num_classes, options.dim, image_shape, (8,))

    @property
    def in_capsules(self):
        return self.grid[0] * self.grid[1]

    def votes(self, images):
        poses = F.squash(self.patches(images).flatten(2).transpose(1, 2))
        return poses, F.votes(poses, self.weight)

    def forward(self, images, labels=None):
        self.check_images(images)
        couplings, pose = route(self.votes(images)[1])
        scores = F.lengths(pose)
        index = scores.argmax(-1) if labels is None else labels
        return Output(scores, self.decoder(pose, index), pose, couplings)

    def classification_loss(self, output, labels, loss):
        return F.margin_loss(output.scores, self.multi_hot(labels).to(output.scores.dtype))

    def trace_routing(self, images):
        poses, votes = self.votes(images)
        couplings, pose = route(votes)
        return RoutingTrace(F.lengths(poses), votes, couplings[None], pose[None])

    def receptive_fields(self):
        def shares(places, size):
            rows = torch.zeros(places, size)
            for place in range(places):
                rows[place, place * self.patch : (place + 1) * self.patch] = 1 / self.patch
            return rows

        return tuple(shares(n, size) for n, size in zip(self.grid, self.image_shape[1:], strict=True))


def build(image_shape, num_classes, options):
    return Toy(image_shape, num_classes, options)
'''


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


def test_its_routing_is_that_of_loops(toy: None) -> None:
    """The twin of `route` in NumPy."""
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
