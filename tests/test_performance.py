"""The numbers of docs/performance.md are those of the records in results/bench and results."""

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from benchmarks import time_to_error

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
PEERS = json.loads((ROOT / "results" / "bench" / "peers.json").read_text(encoding="utf-8"))
RECORDS = sorted(path for path in (ROOT / "results" / "bench").glob("*.json") if path.stem != "peers")


def line(row: dict[str, Any]) -> str:
    """A measurement as a line of the page's tables."""
    memory = f"{row['added_mib']:,.0f}" if "added_mib" in row else ""
    ratio = f"{1 / row['ratio']:.2f}" if "ratio" in row else ""
    numbers = [*(f"{row[name]:,.4g}" for name in ("median", "min", "max")), row["n"], ratio, memory]
    name = f"{row['name']}, {row['variant']}" if row["variant"] else row["name"]
    return " | ".join(["", f"{name} [{row['unit']}]", *map(str, numbers), ""]).strip()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_line_of_a_record_is_on_the_page(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert f"`{record['command']}`" in PAGE
    assert f"../results/bench/{path.name}" in PAGE
    missing = [line(row) for row in record["rows"] if line(row) not in PAGE]
    assert not missing, "\n".join(missing)


def test_the_table_of_peers_is_the_record() -> None:
    rows = {(row["section"], row["variant"]): row for row in PEERS["rows"]}
    names = [variant for section, variant in rows if section == "step"]
    assert f"`{PEERS['command']}`" in PAGE
    expected = []
    for name in names:
        label = f"[{name}](https://github.com/{name}) at {PEERS['peers'][name]}" if name in PEERS["peers"] else name
        cells = [label]
        for section in ("step", "inference"):
            row = rows[section, name]
            cells += [*(f"{row[key]:,.4g}" for key in ("median", "min", "max")), str(row["n"]), f"{row['ratio']:.2f}"]
        expected.append(f"| {' | '.join(cells)} |")
    start = PAGE.splitlines().index(expected[0])
    assert PAGE.splitlines()[start : start + len(names) + 1] == [*expected, ""]


def test_every_line_on_the_page_is_of_a_record() -> None:
    known = {line(row) for path in RECORDS for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    shown = [text for text in PAGE.splitlines() if re.match(r"\| .* \[(ms|GFLOP/s|GB/s)\] \|", text)]
    assert len(shown) > 40
    assert set(shown) <= known


def errors(folder: str) -> list[float]:
    paths = sorted((ROOT / "results").glob(f"{folder}-seed*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["test"]["error_percent"] for path in paths]


def test_the_speed_in_the_readme_is_that_of_the_record() -> None:
    rows = json.loads((ROOT / "results" / "bench" / "plain-against-default.json").read_text(encoding="utf-8"))["rows"]
    plain, default = [row["median"] for row in rows if row["name"] == "training step, 128 images"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    steps = {row["variant"]: row["ratio"] for row in PEERS["rows"] if row["section"] == "step"}
    fastest = min(ratio for name, ratio in steps.items() if name in PEERS["peers"])
    assert f"a training step of 128 images takes {default:.0f} ms on two cores of an AMD EPYC." in readme
    assert f"That is {plain / default:.1f} times as fast as plain float32 PyTorch beside it" in readme
    assert f"and {fastest:.1f} times as fast as the fastest public PyTorch implementation" in readme


def test_the_rounding_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "results" / "bench" / "plain-against-default.json").read_text(encoding="utf-8"))
    plain, default = (one["error"] for one in record["variants"])
    words, readme = " ".join(PAGE.split()), " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"of the default are within {default:.1e}, and those of plain PyTorch within {plain:.1e}." in words
    assert f"The gradients are within {default:.1e} of float64." in readme


def test_the_words_on_the_gpu_are_those_of_the_records() -> None:
    def rows(name: str) -> dict[tuple[str, str], dict[str, Any]]:
        record = json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
        return {(row["name"], row["variant"]): row for row in record["rows"]}

    words = " ".join(PAGE.split())
    speed = {", ".join(part for part in name if part): row["median"] for name, row in rows("gpu-training").items()}
    fastest = max(speed.values())
    assert f"With one it is the GPU's, {128 / fastest:.1f} ms." in words
    assert f"So 60,000 images take {60 / fastest:.1f} s." in words
    tuned = "CUDA graph (cudnn.benchmark)"
    bf16 = speed[f"training, bf16, fused, {tuned}"] / speed[f"training, bf16, plain, {tuned}"]
    float32 = speed["training, float32, fused, CUDA graph"] / speed["training, float32, plain, CUDA graph"]
    steps = [row for (name, _), row in rows("gpu-kernels").items() if name == "training step, 128 images"]
    assert "gain a fifth over plain routing, in bf16 and in float32, with half of the memory" in words
    assert [round(gain - 1, 1) for gain in (bf16, float32)] == [0.2, 0.2]
    assert round(steps[1]["added_mib"] / steps[0]["added_mib"], 1) == 0.5
    low, high = sorted(round(row["median"]) for row in steps)
    assert f"{low} to {high} ms, whatever the kernels" in words


@pytest.mark.parametrize("arm", ["native", "fast", "direct"])
def test_the_wrong_images_of_each_seed_are_those_of_the_records(arm: str) -> None:
    start = {
        "native": "| default (minimal, fused, C): ",
        "fast": "| the same before the C library: ",
        "direct": "| `--convolution direct --precision 32` | ",
    }[arm]
    (row,) = [text for text in PAGE.splitlines() if text.startswith(start)]
    found = [int(cell) for cell in row.split(" | ")[1:4] if cell != "not run"]
    assert found == [round(100 * error) for error in errors(f"mnist-paper-3-epochs-{arm}")]


@pytest.mark.parametrize("arm", ["native", "fast"])
def test_the_errors_of_the_seeds_are_those_of_the_records(arm: str) -> None:
    found = errors(f"mnist-paper-3-epochs-{arm}")
    assert len(found) > 1
    assert f": {mean(found):.2f} ± {stdev(found):.2f} % (n = {len(found)})" in " ".join(PAGE.split())


def test_the_times_to_a_given_error_are_those_of_the_runs() -> None:
    (command,) = re.findall(r"`python -m benchmarks.time_to_error (.*)`", PAGE)
    assert time_to_error.table([ROOT / run for run in command.split()], [1.0, 0.7]).replace(f"{ROOT}/", "") in PAGE
