"""The numbers of docs/performance.md are those of the records in results/bench and results."""

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RECORDS = sorted((ROOT / "results" / "bench").glob("*.json"))


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


def test_every_line_on_the_page_is_of_a_record() -> None:
    known = {line(row) for path in RECORDS for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    shown = [text for text in PAGE.splitlines() if re.match(r"\| .* \[(ms|GFLOP/s|GB/s)\] \|", text)]
    assert len(shown) > 50
    assert set(shown) <= known


def errors(folder: str) -> list[float]:
    paths = sorted((ROOT / "results").glob(f"{folder}-seed*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["test"]["error_percent"] for path in paths]


def test_the_speed_in_the_readme_is_that_of_the_record() -> None:
    rows = json.loads((ROOT / "results" / "bench" / "plain-against-default.json").read_text(encoding="utf-8"))["rows"]
    plain, default = [row["median"] for row in rows if row["name"] == "training step, 128 images"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    told = f"a training step of 128 images takes {default:.0f} ms on two cores of an Intel Xeon, "
    assert f"{told}{plain / default:.1f} times as fast" in readme


@pytest.mark.parametrize("arm", ["fast", "direct"])
def test_the_wrong_images_of_each_seed_are_those_of_the_records(arm: str) -> None:
    start = {"fast": "| default (minimal, fused): ", "direct": "| `--stem direct --precision 32` | "}[arm]
    (row,) = [text for text in PAGE.splitlines() if text.startswith(start)]
    found = [int(cell) for cell in row.split(" | ")[1:4] if cell != "not run"]
    assert found == [round(100 * error) for error in errors(f"mnist-paper-3-epochs-{arm}")]


def test_the_errors_of_the_seeds_are_those_of_the_records() -> None:
    fast = errors("mnist-paper-3-epochs-fast")
    text = " ".join(PAGE.split())
    assert f"{mean(fast):.2f} ± {stdev(fast):.2f} % (n = {len(fast)}" in text
