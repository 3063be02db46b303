from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capsnet.errors import Interrupted
from capsnet.experiments import Record, experiment, read, records
from tools import campaign

RESULTS = Path(__file__).parents[1] / "results" / "experiments"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked to be trained; every training has a record at once."""
    asked: list[dict[str, Any]] = []

    def at_once(one: Any, *, budget: str, seeds: int, rows: tuple[str, ...], folder: Path, **about: Any) -> None:
        asked.append({"experiment": one.name, "rows": rows, "budget": budget, "seeds": seeds, **about})
        for row in rows:
            for seed in range(seeds):
                records.add(folder, record(one.name, row, budget, seed))

    monkeypatch.setattr(campaign, "reproduce", at_once)
    return asked


def record(name: str, row: str, budget: str, seed: int) -> Record:
    one = experiment(name)
    example = read(RESULTS, "table1", "cpu")[0]
    fingerprint = records.fingerprint(one.config(one.row(row), budget, seed))
    return replace(example, experiment=name, row=row, budget=budget, seed=seed, fingerprint=fingerprint)


def test_every_training_of_the_campaign_can_be_reproduced() -> None:
    found = campaign.items()
    assert len(found) >= 10
    assert all(0 < one.hours / len(one.rows) <= 4 for one in found)


def test_it_is_worked_through_in_order_and_what_is_done_is_not_done_again(
    tmp_path: Path, trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = campaign.items()[0]
    for row in first.rows:
        for seed in range(first.seeds):
            records.add(tmp_path, record(first.experiment, row, first.budget, seed))
    assert campaign.main(["--results", str(tmp_path), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("done")
    assert not trained
    assert campaign.main(["--results", str(tmp_path)]) == 0
    wanted = [(one.experiment, one.rows, one.seeds) for one in campaign.items()[1:]]
    assert [(one["experiment"], one["rows"], one["seeds"]) for one in trained] == wanted
    assert all(one["threads"] == 1 for one in trained)
    capsys.readouterr()
    assert campaign.main(["--results", str(tmp_path)]) == 0
    assert all(line.endswith("done") for line in capsys.readouterr().out.splitlines())
    assert len(trained) == len(wanted)


def test_records_of_another_clone_are_added_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    records.add(ours, record("table1", "capsnet-3", "cpu", 0))
    for seed in (0, 1):
        records.add(theirs, record("table1", "capsnet-3", "cpu", seed))
    for added in (1, 0):
        assert campaign.main(["--results", str(ours), "--merge", str(theirs)]) == 0
        assert capsys.readouterr().out == f"{added} records added\n"
    assert [one.seed for one in read(ours, "table1", "cpu")] == [0, 1]
    records.add(theirs, replace(record("table1", "capsnet-3", "cpu", 0), seconds=1.0))  # trained there too: ours stays
    assert campaign.main(["--results", str(ours), "--merge", str(theirs)]) == 0
    assert capsys.readouterr().out == "0 records added\n"
    assert all(one.seconds != 1.0 for one in read(ours, "table1", "cpu"))
    more = replace(record("table1", "capsnet-3", "cpu", 1), measures={"pgd": 50.0})  # says more than ours
    records.add(theirs, more)
    assert campaign.main(["--results", str(ours), "--merge", str(theirs)]) == 0
    assert capsys.readouterr().out == "1 records added\n"
    assert more in read(ours, "table1", "cpu")


def test_what_stops_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign.main(["--merge", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("tools.campaign: error: --merge must be a folder of records; got ")

    def stopped(*arguments: Any, **about: Any) -> None:
        raise Interrupted("stopped in epoch 1; the same command continues it", 15)

    monkeypatch.setattr(campaign, "reproduce", stopped)
    assert campaign.main(["--results", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "tools.campaign: stopped in epoch 1; the same command continues it\n"
