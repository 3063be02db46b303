"""The worked example of one's own photographs: a tiny one runs here, and its page says what was measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import REAL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-images.md").read_text(encoding="utf-8")
RECORD: dict[str, Any] = json.loads((ROOT / "results" / "examples" / "own-images.json").read_text(encoding="utf-8"))
STEPS = ("train", "evaluate", "train", "train", "evaluate", "predict", "export", "served/serve.py")


def ran(folder: Path, *words: str) -> dict[str, Any]:
    """The record of a run of the example, which must end well."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    environment = {**os.environ, "CAPSNET_DATA": str(REAL), "CAPSNET_CACHE": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "examples" / "own_images.py"), "--out", str(folder / "own"), *words]
    command += ["--record", str(folder / "record.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert [one["command"].split()[1] for one in found["commands"]][:8] == list(STEPS)
    assert (folder / "own" / "served" / "serve.py").is_file()
    assert (folder / "own" / "judged" / "predictions.csv").is_file()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_one_runs_from_photographs_to_a_served_network(tmp_path: Path) -> None:
    found = ran(tmp_path, "--tiny")
    trained = [one for one in found["commands"] if "test" in one]
    assert [one["fine_tuned_from"] for one in trained] == [None, None, "before"]
    assert all("validation" in one["selection"] for one in trained)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "cifar10").exists(), reason=f"no cifar10 in {REAL}; set CAPSNET_DATA")
def test_the_whole_one_learns(tmp_path: Path) -> None:
    scratch, _, tuned = (one["test"]["error_percent"] for one in ran(tmp_path)["commands"] if "test" in one)
    assert scratch < 55  # chance is 80
    assert tuned < 50


def test_the_page_says_what_was_measured() -> None:
    for one in RECORD["commands"][:8]:
        assert " ".join(one["command"].split()) in " ".join(PAGE.replace("\\\n", " ").split())
    for one in [one["test"] for one in RECORD["commands"][:4] if "test" in one]:
        assert f"test error {one['error_percent']:.2f} % ({one['wrong']} of {one['total']:,} wrong" in PAGE
    study = [one for one in RECORD["commands"] if "--resize" in one["command"]]
    for way in ("pad", "crop", "squash"):
        tests = [one["test"] for one in study if f"--resize {way} " in one["command"]]
        mean = sum(test["error_percent"] for test in tests) / len(tests)
        assert f"| `{way}` | {mean:.2f} % | {', '.join(str(test['wrong']) for test in tests)} |" in PAGE
    minutes = sum(one["seconds"] for one in RECORD["commands"][:8]) / 60
    assert f"{minutes:.1f} minutes" in PAGE


def test_one_line_each_for_mlflow_and_wandb_reads_the_metrics() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert [("mlflow" in block, "wandb" in block) for block in blocks] == [(True, False), (False, True)]
    for block in blocks:
        compile(block, "own-images.md", "exec")
