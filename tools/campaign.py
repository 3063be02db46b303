"""Work through `campaign.yaml`, trainings in order of worth, one after the other on one thread; or merge its records.

    python -m tools.campaign                 train what has no record yet; stopped or killed, the same command goes on
    python -m tools.campaign --list          what is done, and the hours that each item takes
    python -m tools.campaign --merge FOLDER  add the records of another clone (its results/experiments)

Then `make tables` rewrites the tables.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.experiments import BUDGETS, available, experiment, records
from capsnet.experiments.reproduce import RECORDS, RUNS, reproduce
from capsnet.files import read_yaml
from capsnet.options.schema import checked

__all__ = ["Item", "items", "main", "merge", "missing"]

CAMPAIGN = Path(__file__).with_name("campaign.yaml")


@dataclass(frozen=True)
class Item:
    """Trainings of some or all rows of an experiment: with seeds 0 to `seeds` - 1, in about `hours` of one thread."""

    experiment: str
    budget: str
    seeds: int
    hours: float
    rows: tuple[str, ...] = ()


def items(path: Path = CAMPAIGN) -> list[Item]:
    """The campaign, in order of worth.

    Raises:
        InputError: the file is no list of trainings that can be reproduced.
    """
    found: list[Item] = checked(read_yaml(path, what="campaign"), list[Item], source=f"campaign {path}")
    whole = [replace(one, rows=one.rows or tuple(row.key for row in experiment(one.experiment).rows)) for one in found]
    for one in whole:
        plan = experiment(one.experiment)
        for row in one.rows:
            plan.config(plan.row(row), one.budget, one.seeds - 1)
    return whole


def missing(one: Item, folder: Path) -> list[tuple[str, int]]:
    """Rows and seeds of an item that have no record in `folder`."""
    plan, there = experiment(one.experiment), records.read(folder, one.experiment, one.budget)
    known = {(record.row, record.seed, record.fingerprint) for record in there}
    return [
        (row, seed)
        for seed in range(one.seeds)
        for row in one.rows
        if (row, seed, records.fingerprint(plan.config(plan.row(row), one.budget, seed))) not in known
    ]


def merge(others: Path, folder: Path) -> int:
    """Take the records in the folder `others` that `folder` lacks or that say more, and return how many those were.

    Raises:
        InputError: a file of records is damaged, or cannot be written.
    """
    added = 0
    for name in available():
        for budget in BUDGETS:
            known = {records.identity(record): _measured(record) for record in records.read(folder, name, budget)}
            for record in records.read(others, name, budget):
                if known.get(records.identity(record), set()) < _measured(record):
                    records.add(folder, record)
                    added += 1
    return added


def _measured(record: records.Record) -> set[str]:
    """What a record says of its network: data sets it was tested on, and further measures."""
    return {*record.results, *record.measures}


def main(arguments: Sequence[str]) -> int:
    """Train, list or merge; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.campaign", description=str(__doc__).splitlines()[0])
    parser.add_argument("--list", action="store_true", help="train nothing")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="add the records of another clone")
    parser.add_argument("--results", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the run directories")
    given = parser.parse_args(arguments)
    try:
        if given.merge is not None:
            if not given.merge.is_dir():
                raise InputError(f"--merge must be a folder of records; got {given.merge}")
            print(f"{merge(given.merge, given.results)} records added")
            return 0
        for one in items():
            left = missing(one, given.results)
            what = f"{one.experiment} {', '.join(one.rows)} ({one.budget}), {one.seeds} seeds: "
            print(
                what + (f"{len(left)} to train (the item takes about {one.hours:g} h)" if left else "done"), flush=True
            )
            if left and not given.list:
                reproduce(
                    experiment(one.experiment),
                    budget=one.budget,
                    seeds=one.seeds,
                    rows=one.rows,
                    folder=given.results,
                    runs_folder=given.runs,
                    say=print,
                    threads=1,
                )
    except (InputError, Diverged) as error:
        print(f"tools.campaign: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Interrupted as stop:
        print(f"tools.campaign: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
