"""Stochastic gradient descent with momentum, and a learning rate that falls in steps."""

import shutil
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from capsnet import memory
from capsnet.checkpoints.run_directory import Run
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.models import create
from capsnet.training import schedule
from capsnet.training.fit import fit, resume
from tiny import options, pairs, resumed, tiny, typed, weights

RECIPE: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.05,
    "weight_decay": 0.01,
    "schedule": "steps",
    "lr_milestones": (0.35, 0.75),
    "lr_decay": 0.1,
}


# the step


@pytest.mark.parametrize(
    ("momentum", "nesterov", "decay"), [(0.0, False, 0.0), (0.0, False, 0.1), (0.8, False, 0.1), (0.8, True, 0.1)]
)
def test_a_step_is_its_equation(momentum: float, nesterov: bool, decay: float) -> None:
    """Written in NumPy: the L2 term is part of the gradient, and the first gradient starts the sum as it is."""
    torch.manual_seed(0)
    layer, free = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
    network = nn.Sequential(layer, free.requires_grad_(False))
    before = [parameter.detach().numpy().copy() for parameter in free.parameters()]
    config = Config.of(optimizer="sgd", momentum=momentum, nesterov=nesterov, weight_decay=decay, lr=0.3)
    optimizer = schedule.optimizer_of(network, config)
    w = layer.weight.detach().numpy().copy()
    summed = np.zeros_like(w)
    draw = np.random.default_rng(1)
    for k in range(4):
        gradient = draw.normal(size=w.shape)
        layer.weight.grad, layer.bias.grad = torch.from_numpy(gradient.copy()), torch.zeros(2, dtype=torch.float64)
        optimizer.step()
        g = gradient + decay * w
        summed = g if k == 0 else momentum * summed + g
        w = w - 0.3 * (g + momentum * summed if nesterov else summed)
        np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-12)
    assert all((old == new.numpy()).all() for old, new in zip(before, free.parameters(), strict=True))
    assert set(chain(*optimizer.state_dict()["state"].values())) == set(config.moments)


def test_adam_is_as_it_was() -> None:
    """The default, with the class and options that runs from before there was a choice had."""
    layer = nn.Linear(3, 2)
    for decay, kind in ((0.0, torch.optim.Adam), (0.01, torch.optim.AdamW)):
        found = schedule.optimizer_of(layer, Config.of(weight_decay=decay))
        assert type(found) is kind
        assert found.defaults == kind(layer.parameters(), weight_decay=decay, fused=True).defaults


# the schedule


def test_the_rate_falls_at_each_milestone_and_at_no_other_step() -> None:
    config = Config.of(lr=0.5, epochs=350, schedule="steps", lr_milestones=(150 / 350, 250 / 350), lr_decay=0.1)
    rates = [schedule.learning_rate(config, step, 7) for step in range(350 * 7)]
    assert rates == [0.5] * 150 * 7 + [0.5 * 0.1] * 100 * 7 + [0.5 * 0.1**2] * 100 * 7
    floored = config.changed(lr_floor=0.03)
    assert schedule.learning_rate(floored, 350 * 7 - 1, 7) == 0.03
    warm = config.changed(warmup=0.1)
    assert schedule.learning_rate(warm, 0, 7) == pytest.approx(0.5 / (35 * 7))
    assert schedule.learning_rate(warm, 150 * 7 - 1, 7) == 0.5
    assert schedule.learning_rate(warm, 150 * 7, 7) == 0.05


# options


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"momentum": 0.5}, "momentum must be left out with optimizer adam; got 0.5"),
        ({"nesterov": True}, "nesterov must be left out with optimizer adam; got True"),
        (
            {"optimizer": "sgd", "momentum": 0.0, "nesterov": True},
            "nesterov must be left out with momentum 0; got True",
        ),
        ({"schedule": "steps"}, "lr_milestones must be given with schedule steps, as 0.5 0.75; got none"),
        ({"lr_milestones": (0.5,)}, r"lr_milestones must be left out with schedule exponential; got \(0.5,\)"),
        ({"optimizer": "rmsprop"}, "optimizer must be one of adam, sgd; got 'rmsprop'"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
        *(
            ({"schedule": "steps", "lr_milestones": wrong}, "lr_milestones must be shares of the run in .*; got ")
            for wrong in ((0.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.75, 0.5), (150.0, 250.0), (float("nan"),))
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_without_meaning_are_refused(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rf"^{rule}|^lr_milestones\[0\] must be a finite number; got nan$"):
        Config.of(**given)


def test_the_command_takes_the_options_and_refuses_in_one_line(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train --data {photos} --image-size 28 --dry-run --optimizer sgd --nesterov --schedule steps"
    code, out, _ = typed(capsys, f"{line} --lr-milestones 0.5 0.75")
    assert code == 0
    for said in ("optimizer: sgd", "momentum: 0.9", "nesterov: True", "lr_milestones: (0.5, 0.75)"):
        assert said in out.splitlines()
    code, out, err = typed(capsys, f"train --data {photos} --dry-run --momentum 0.5")
    assert (code, out) == (2, "")
    assert err == "capsnet train: error: --momentum must be left out with optimizer adam; got 0.5\n"


def test_memory_is_that_of_the_moments() -> None:
    """Each of them and, where a checkpoint needs the most, its part of that."""
    with torch.device("meta"):
        network = create("capsnet")
    estimates = [
        memory.training(network, config, torch.device("cpu"), pairs(), precision="32", batch_size=1)
        for config in (Config.of(), Config.of(optimizer="sgd"), Config.of(optimizer="sgd", momentum=0.0))
    ]
    size = 4 * network.parameter_count()
    for more, less in pairwise(estimates):
        assert 1 <= (more - less) / size <= 1.01 + memory.GROWTH


# runs


@pytest.mark.usefixtures("workplace", "blank_figure")
@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "nesterov": True},
        {"micro_batch": 5},
        {"momentum": 0.0, "warmup": 0.2, "checkpoint_steps": 1},
    ],
    ids=str,
)
def test_it_resumes_to_the_same_weights_in_the_middle_of_an_epoch(
    photos: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = tiny(photos, **RECIPE, **changes)
    assert resumed(config, monkeypatch).epochs == 2
    rates = [schedule.learning_rate(config, step, 5) for step in (4, 9)]
    assert [row["learning_rate"] for row in Run("parts").metrics()] == pytest.approx(rates)
    if "warmup" not in changes:
        assert rates == pytest.approx([0.005, 0.0005])


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_what_is_trained_and_written(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(photos, **RECIPE, out="run", epochs=1, report=False)
    fit(config)
    for name, value in {"momentum": 0.5, "weight_decay": 0.0, "lr_decay": 0.2}.items():
        fit(config.changed(out=name, **{name: value}))
        assert not all(torch.equal(ours, theirs) for ours, theirs in zip(*map(_values, ("run", name)), strict=True))
    content: dict[str, Any] = torch.load("run/last.ckpt", weights_only=True)
    assert {key for each in content["optimizer"]["state"].values() for key in each} == {"momentum_buffer"}
    assert "--optimizer sgd --lr 0.05 --schedule steps" in Path("run/README.md").read_text(encoding="utf-8")
    words = [
        "train",
        *options(config),
        "--init-from",
        "run",
        "--optimizer",
        "sgd",
        "--freeze",
        "conv",
        "--out",
        "tuned",
    ]
    capsys.readouterr()
    assert typed(capsys, " ".join(words))[0] == 0
    kept = [torch.equal(weights("run")[name], tensor) for name, tensor in weights("tuned").items()]
    assert any(kept)
    assert not all(kept)


def _values(run: str) -> list[Tensor]:
    return list(weights(run).values())


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_a_checkpoint_of_the_other_optimiser_is_refused(photos: Path) -> None:
    fit(tiny(photos, epochs=1, out="adam", report=False))
    fit(tiny(photos, epochs=1, out="sgd", report=False, **RECIPE))
    for one, other, holds in (
        ("adam", "sgd", "step, exp_avg, exp_avg_sq of conv.weight; got .'momentum_buffer'."),
        ("sgd", "adam", "momentum_buffer of conv.weight; got .'step', 'exp_avg', 'exp_avg_sq'."),
    ):
        ours, theirs = Path(one, "last.ckpt"), Path(other, "last.ckpt")
        content = torch.load(ours, weights_only=True)
        shutil.copytree(one, f"{one}-whole")
        shutil.copy(theirs, Path(f"{one}-whole", "last.ckpt"))
        with pytest.raises(InputError, match=rf"its optimizer is '{other}', not '{one}'$"):
            resume(f"{one}-whole", epochs=2)
        content["optimizer"] = torch.load(theirs, weights_only=True)["optimizer"]
        torch.save(content, Path(f"{one}-whole", "last.ckpt"))
        with pytest.raises(InputError, match=rf"last.ckpt: optimizer must hold {holds}$"):
            resume(f"{one}-whole", epochs=2)
    with pytest.raises(InputError, match=r"^optimizer of a resumed run must stay 'sgd'; got 'adam'"):
        resume("sgd", epochs=2, optimizer="adam")


@pytest.mark.usefixtures("workplace", "blank_figure")
def test_a_checkpoint_from_before_there_was_a_choice_is_one_of_adam(photos: Path) -> None:
    """Without the options that are new, in config.yaml and in the checkpoint."""
    fit(tiny(photos, epochs=1, out="run", report=False))
    content: dict[str, Any] = torch.load("run/last.ckpt", weights_only=True)
    path = Path("run/config.yaml")
    text = path.read_text(encoding="utf-8")
    for name in ("optimizer", "momentum", "nesterov", "lr_milestones"):
        del content["config"][name]
        (line,) = [line for line in text.splitlines(keepends=True) if line.strip().startswith(f"{name}:")]
        text = text.replace(line, "")
    path.write_text(text, encoding="utf-8")
    torch.save(content, "run/last.ckpt")
    assert resume("run", epochs=2).epochs == 2
    assert Run("run").config().optimizer == "adam"
