"""The page of the networks: its table is what the networks are, and its code runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from capsnet import create
from capsnet.cli import main
from capsnet.config import Config, preset
from capsnet.models import CapsuleNetwork, available
from capsnet.training import fit as training

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
SHAPES = ((1, 28, 28), (3, 32, 32), (3, 224, 224))
SCORES = {  # what the loss sees; of others a logit
    "capsnet": "length",
    "efficient-capsnet": "length",
    "capsule-head": "length",
    "em-capsnet": "activation",
    "vb-capsnet": "activation",
    "self-routing-capsnet": "activation",
}
DECODERS = {"capsnet": "yes", "efficient-capsnet": "yes"}  # and of others, where they have the option, if asked for


class Parsed(Exception):
    """Raised in place of a training."""


def table() -> str:
    """Each network but for the one of pairs of digits: parameters, capsules that vote for the classes, and so on."""
    rows = ["| network | 1 x 28 x 28 | 3 x 32 x 32 | 3 x 224 x 224 | voting capsules | score | steps | decoder |"]
    rows.append("| --- " * 8 + "|")
    for name in (*SCORES, "inverted-capsnet", "resnet", "efficient-cnn", "baseline"):
        without: dict[str, Any] = {"reconstruction": False} if "reconstruction" in create(name).config else {}
        with torch.device("meta"):
            built = [create(name, image_shape=shape, **without) for shape in SHAPES]
        counts = [f"{network.parameter_count():,}" for network in built]
        first, voting, steps = built[0], "", ""
        if isinstance(first, CapsuleNetwork):
            voting, steps = f"{first.in_capsules:,}", str(first.routing_iterations)
        decoder = DECODERS.get(name, "if asked for" if without else "no")
        cells = [f"`{name}`", *counts, voting, SCORES.get(name, "logit"), steps, decoder]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_is_what_the_networks_are() -> None:
    found = re.search(r"<!-- networks -->\n(.*?)\n<!-- end of networks -->", PAGE, re.DOTALL)
    assert found is not None
    assert found[1] == table()
    assert set(available()) - {"baseline-multimnist"} == set(re.findall(r"^\| `([\w-]+)` \|", found[1], re.MULTILINE))


def test_the_code_of_the_page_runs() -> None:
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, {})


def test_the_published_recipes_are_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command says what depends on the images only, and no option of the optimiser."""
    asked = list[Config]()

    def fit(config: Config) -> None:
        asked.append(config)
        raise Parsed

    monkeypatch.setattr(training, "fit", fit)
    rows = re.findall(r"^\| `([\w-]+)` \| `capsnet (train [^`]*)` \|", PAGE, re.MULTILINE)
    for name, command in rows:
        with pytest.raises(Parsed):
            main(shlex.split(command))
        assert asked[-1].model == name
        recipe = preset(asked[-1].preset, model=name)
        assert recipe != Config(model=name)
        for option in ("optimizer", "lr", "schedule", "lr_decay", "lr_milestones", "weight_decay", "batch_size"):
            assert getattr(asked[-1], option) == getattr(recipe, option)
    ours = {"capsule-head", "efficient-cnn", "baseline", "baseline-multimnist"}
    assert {name for name, _ in rows} == set(available()) - ours
