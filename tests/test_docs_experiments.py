"""The numbers in the text of docs/experiments.md, beside its tables, are those of the records."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from capsnet.experiments import experiment

ROOT = Path(__file__).parent.parent
WORDS = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())


def records(path: str, row: str = "") -> list[dict[str, Any]]:
    """The records of a file under results/, of one row if it is given."""
    lines = (ROOT / "results" / path).read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if row in ("", record["row"])]


def wrong(record: dict[str, Any], data: str = "mnist") -> int:
    return int(record["results"][data]["wrong"])


def test_twenty_epochs_on_a_cpu() -> None:
    counts = [wrong(one) for one in records("experiments/table1-cpu.jsonl", "capsnet-3-reconstruction")]
    error = f"{mean(counts) / 100:.3f} ± {stdev(counts) / 100:.3f} %"
    said = "{}: {}, {} and {} of 10,000 wrong".format(error, *counts)
    assert f"20 epochs on a CPU in float32 three seeds had {said}" in WORDS


def test_efficient_capsnet() -> None:
    found = records("experiments/efficient-capsnet-full.jsonl", "efficient-capsnet")
    minutes, error = min(one["seconds"] for one in found) / 60, mean(wrong(one) for one in found) / 100
    assert len(found) == 5
    assert f"30 epochs took {minutes:.0f} minutes of one thread in the quickest of five trainings" in WORDS
    assert f"The mean of the five is {error - 0.25:.2f} points above the 0.25 % of 2017." in WORDS
    assert abs(mean(one["measures"]["views"] for one in found) - error) < 0.01
    (together,) = records("experiments/efficient-capsnet-full.jsonl", "ensemble")
    count = wrong(together)
    assert f"as one ensemble have {count / 100:.2f} %, or {count} of 10,000 wrong" in WORDS
    (ten,) = records("experiments/cost-cpu.jsonl", "efficient-capsnet-10")
    assert f"After 10 epochs one seed had {wrong(ten) / 100:.2f} %" in WORDS


def test_recipes_after_three_epochs() -> None:
    found = {one["row"]: wrong(one) for one in records("recipes-3-epochs.jsonl")}
    assert len(found) == 8
    assert sorted(found, key=lambda row: found[row])[:2] == ["loss-scale", "reconstruction-weight"]
    fewest = f"({found['loss-scale']} and {found['reconstruction-weight']} against {found['paper']} of the text)"
    assert f"made the fewest errors {fewest}" in WORDS
    assert max(found.values()) == found["primary-scale"]
    assert f"dividing the primary capsules by 32 the most ({found['primary-scale']})" in WORDS


def test_affnist() -> None:
    ours, theirs = (records("experiments/affnist-cpu.jsonl", row)[0] for row in ("capsnet", "baseline"))
    placed = [wrong(one, "expanded-mnist") / 100 for one in (ours, theirs)]
    lead = (wrong(theirs, "affnist-generated") - wrong(ours, "affnist-generated")) / 100
    assert f"({placed[0]:.2f} % wrong against {placed[1]:.2f} %), and by {lead:.2f} points on transformed ones" in WORDS


def test_what_the_successors_show() -> None:
    """Each claim of the page, for the data sets on which both rows were run."""

    def errors(data: str, row: str) -> float | None:
        suffix = "" if data == "mnist" else f"-{data}"
        counts = [wrong(one, data) for one in records(f"experiments/successors{suffix}-cpu.jsonl", row)]
        return mean(counts) if counts else None

    def fewer(row: str, other: str, *sets: str) -> bool:
        pairs = [(errors(data, row), errors(data, other)) for data in sets]
        return all(one < two for one, two in pairs if one is not None and two is not None)

    three = "mnist", "fashion-mnist", "cifar10"
    assert fewer("efficient-capsnet", "efficient-uniform", *three)
    assert fewer("head-attention", "head-uniform", *three)
    assert fewer("capsnet", "capsnet-uniform", *three)
    assert fewer("efficient-dynamic", "efficient-uniform", *three)
    assert fewer("head-uniform", "head-dynamic", *three)
    assert fewer("vb", "vb-uniform", *three)
    assert fewer("inverted-uniform", "inverted", *three)
    assert fewer("efficient-capsnet", "efficient-cnn", "mnist")
    assert fewer("head-attention", "resnet", "mnist", "cifar10")
    for row in ("head-dynamic", "head-uniform", "self-routing"):
        assert fewer("resnet", row, "fashion-mnist", "cifar10"), row
    assert fewer("efficient-cnn", "efficient-capsnet", "fashion-mnist")
    assert errors("fashion-mnist", "head-attention") is None
    for data in ("mnist", "fashion-mnist"):
        found = {row.key: errors(data, row.key) for row in experiment("successors").rows}
        ran = {key: error for key, error in found.items() if error is not None}
        best = {"mnist": "efficient-capsnet", "fashion-mnist": "inverted-uniform"}[data]
        assert min(ran, key=lambda key: ran[key]) == best
    assert errors("mnist", "capsnet-shared") == max(
        errors("mnist", key) or 0 for key in found if not key.startswith("em")
    )
    assert (errors("mnist", "em") or 0) > 1000


def test_what_transformed_and_attacked_digits_show() -> None:
    def measured(name: str) -> dict[str, float]:
        """Mean over the seeds of each row."""
        found = records("experiments/successors-cpu.jsonl")
        rows = {one["row"] for one in found if name in one.get("measures", {})}
        return {row: mean(one["measures"][name] for one in found if one["row"] == row) for row in rows}

    affine, attacked = measured("affine"), measured("pgd")
    assert set(sorted(affine, key=lambda row: affine[row])[:2]) == {"head-attention", "self-routing"}
    routed = max(affine["efficient-capsnet"], affine["efficient-dynamic"])
    assert routed < min(affine["efficient-uniform"], affine["efficient-cnn"])
    assert min(attacked.values()) > 45
    told = measured("ood")
    for row in ("head-dynamic", "head-attention", "head-uniform", "self-routing"):
        assert attacked[row] < attacked["resnet"], row
        assert row == "self-routing" or told[row] < told["resnet"], row
    assert max(told, key=lambda row: told[row]) == "capsnet-max-min"
    assert f"an AUROC of {told['capsnet-max-min']:.2f}" in WORDS
