"""The routing and the data set of docs/extending.md: twins that agree, and a file that every command takes."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capsnet import data
from capsnet.data import sets
from tiny import typed

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block(word: str) -> str:
    """The one block that has this word."""
    (found,) = [code for code in BLOCKS if word in code]
    return str(found)


def test_the_routing_and_its_twin_in_loops_agree() -> None:
    fast, slow = dict[str, Any](), dict[str, Any]()
    exec(block("cosine_similarity"), fast)
    exec(block("def cosine_routing(u_hat"), slow)
    u_hat = np.random.default_rng(0).normal(size=(2, 7, 5, 3))
    routed = fast["cosine_routing"](torch.from_numpy(u_hat))
    for k in range(2):
        v, c = slow["cosine_routing"](u_hat[k])
        np.testing.assert_allclose(routed.pose[k], v, rtol=1e-10)
        np.testing.assert_allclose(routed.couplings[k], c, rtol=1e-10)


def test_every_command_takes_the_data_set(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("more").mkdir()
    Path("more/bars.py").write_text(block("ENTRY = Entry("), encoding="utf-8")
    monkeypatch.setattr(sets, "__path__", [*sets.__path__, str(Path("more").resolve())])
    monkeypatch.delitem(sys.modules, "capsnet.data.sets.bars", raising=False)
    monkeypatch.setenv("CAPSNET_NATIVE", "off")
    assert "bars" in data.available()
    code, told, _ = typed(capsys, "list data")
    assert code == 0
    assert "bars" in told
    words = "train --data bars --model efficient-cnn --epochs 2 --batch-size 32 --no-report --out run --json"
    code, told, said = typed(capsys, words)
    assert code == 0, said
    assert json.loads(told)["error_percent"] < 20  # chance is 50
    assert data.load("bars", image_size=32).image_shape == (1, 32, 32)
    sys.modules.pop("capsnet.data.sets.bars")
