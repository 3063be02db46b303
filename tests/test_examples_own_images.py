"""The worked example of one's own photographs: a tiny one runs here, and its page says what was measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capsnet.evaluation.statistics import mcnemar
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
@pytest.mark.timeout(3000)
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
    assert f"{sum(one['seconds'] for one in RECORD['commands'][8:]) / 60:.1f} more for `--study`" in PAGE


def test_the_page_says_what_two_threads_measured() -> None:
    path = ROOT / "results" / "examples" / "own-images-2-threads.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    scratch, _, tuned = (one["test"]["error_percent"] for one in record["commands"] if "test" in one)
    minutes = sum(one["seconds"] for one in record["commands"]) / 60
    words = " ".join(PAGE.split())
    assert record["threads"] == 2
    assert f"on two threads, which round otherwise, took {minutes:.0f} minutes" in words
    assert f"and ended at {scratch:.2f} and {tuned:.2f} % ([record](../results/examples/{path.name}))" in words


def test_the_comparison_on_the_page_adds_up() -> None:
    """`tuned` and `scratch` share their other mistakes, and the p value is that of these counts."""
    tuned, scratch = (int(each) for each in re.findall(r"\(seed 0\): error .* % \((\d+) of 1,500 wrong", PAGE))
    ((only, other, p),) = re.findall(r"(\d+) images mistaken only by tuned, (\d+) only by scratch, p = (\S+)\n", PAGE)
    assert tuned - int(only) == scratch - int(other)
    found = mcnemar(set(range(int(only))), set(range(10_000, 10_000 + int(other))))
    assert f"{found.p:.1e}" == p


def test_one_line_each_for_mlflow_and_wandb_reads_the_metrics() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert [("mlflow" in block, "wandb" in block) for block in blocks] == [(True, False), (False, True)]
    for block in blocks:
        compile(block, "own-images.md", "exec")
