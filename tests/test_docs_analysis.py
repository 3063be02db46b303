"""The numbers of docs/analysis.md and of the model cards are those of the records and of the weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from capsnet.checkpoints import pretrained

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
RECORDS = ROOT / "results" / "analysis"
WORDS = " ".join(PAGE.split())
RENAMED = {
    "factors": "plot pose",
    "couplings": "plot couplings",
    "strangers": "analyse ood",
    "attack": "analyse attack",
}
"""Verbs of the commands that wrote the records, as they are called now."""


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def factors() -> list[str]:
    networks = record("factors-strokes")["networks"]
    both = [networks[name] for name in ("capsnet", "baseline")]
    mean, spread = "r2_mean_over_classes", "r2_standard_deviation_over_classes"
    return [
        row(factor.replace("_", " "), *(f"{one[mean][factor]:.2f} ± {one[spread][factor]:.2f}" for one in both))
        for factor in both[0][mean]
    ]


def couplings() -> list[str]:
    found = record("couplings-capsnet-mnist")
    columns = (found["entropy_bits"], found["agreement_winning"], found["agreement_others"])
    return [row(t, f"{e:.4f}", f"{w:.4f}", f"{o:.4f}") for t, (e, w, o) in enumerate(zip(*columns, strict=True), 1)]


def out_of_distribution() -> list[str]:
    found = record("strangers-capsnet-mnist")
    return [
        row(name, f"{one['images']:,}", f"{one['auroc']:.4f}", f"{100 * one['flagged']:.2f} %")
        for one in found.get("ood") or found["strangers"]  # as it was called when the record was written
        if (name := one.get("data") or one["strangers"])
    ]


def attacks() -> list[str]:
    capsules, baseline = (model["rates"] for model in record("attack-mnist")["models"])
    return [
        row(
            ours["attack"].upper(),
            f"{ours['epsilon']:g}",
            *(f"{100 * one['success']:.1f}" for one in (ours, theirs)),
            f"{100 * ours['flagged_fooled'] / ours['fooled']:.1f}",
            f"{100 * ours['flagged'] / ours['images']:.1f}",
        )
        for ours, theirs in zip(capsules, baseline, strict=True)
    ]


def exports() -> list[str]:
    found = [record(f"export-{kind}") for kind in ("onnx", "pt2")]
    return [
        row(
            one["format"],
            f"{one['images']:,}",
            one["changed"],
            *(f"{one['differences'][name]:.1e}" for name in ("scores", "reconstruction", "pose")),
        )
        for one in found
    ]


@pytest.mark.parametrize("table", [factors, couplings, out_of_distribution, attacks, exports])
def test_every_line_of_a_table_is_of_its_record(table: Any) -> None:
    lines = table()
    assert len(lines) >= 2
    start = PAGE.index(lines[0])
    assert PAGE[start:].startswith("\n".join(lines) + "\n\n")  # all of them, in order, and no others


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_the_command_of_every_record_is_on_the_page(path: Path) -> None:
    _, verb, words = record(path.stem)["command"].split(maxsplit=2)
    assert f"`capsnet {RENAMED.get(verb, verb)} {words}`" in PAGE
    assert f"(../results/analysis/{path.name})" in PAGE


def half_width(rate: dict[str, Any], name: str) -> float:
    """Half the width of the interval of a share, in percentage points."""
    low, high = rate[f"{name}_interval"]
    return float(50 * (high - low))


def test_the_numbers_in_the_text() -> None:
    found = record("strangers-capsnet-mnist")
    assert f"of which {100 * found['known']['false_alarms']:.2f} % are flagged" in WORDS
    assert found["threshold"] == json.loads(json.dumps(pretrained.load_card("capsnet-mnist").to_dict()["threshold"]))
    assert f"Of {record('couplings-capsnet-mnist')['entropy_bits_of_uniform']:.3f} bits" in WORDS
    attack = record("attack-mnist")
    assert f"PGD in {attack['steps']}" in WORDS
    assert f"first {attack['models'][0]['images']} test images" in WORDS
    rates = attack["models"][0]["rates"]
    most = max(half_width(one, "success") for model in attack["models"] for one in model["rates"])
    assert f"with {rates[0]['images']} images up to {most:.0f} points to either side" in WORDS
    smallest = half_width(rates[0], "flagged_fooled")
    assert f"and {smallest:.0f} for what is flagged of the {rates[0]['fooled']} that the smallest FGSM fooled" in WORDS


@pytest.mark.parametrize("name", pretrained.shipped())
def test_a_model_card_tells_what_card_json_tells(name: str) -> None:
    folder = pretrained.folder_of(name)
    told, card = (folder / "README.md").read_text(encoding="utf-8"), pretrained.load_card(name)
    low, high = card.test["interval"]
    assert f"`{card.command}`" in told
    assert (
        f"Test error: {card.test['error_percent']:.2f} % ({card.test['wrong']:,} of {card.test['total']:,} wrong; "
        f"95 % interval {low:.2f} to {high:.2f} %)"
    ) in told
    assert f"{card.train_images:,} of the" in told
    assert f"{card.epochs} epochs" in told
    (folder_told,) = [word.strip("`).,;") for word in told.split() if word.startswith("`results/")]
    result = json.loads((ROOT / folder_told / "result.json").read_text(encoding="utf-8"))
    assert {key: result["test"][key] for key in card.test} == json.loads(json.dumps(card.test))


def test_the_shipped_weights_stay_small() -> None:
    sizes = [(pretrained.folder_of(name) / "model.safetensors").stat().st_size for name in pretrained.shipped()]
    assert sum(sizes) < 40e6
