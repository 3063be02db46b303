"""Experiments, one YAML file each beside this one: rows of a table as options that differ from a base.

A new experiment is a new file: its name is the experiment's, and its fields are those of `Experiment`. In place of
`rows`, `rows_of` takes those of another file: the same networks on another data set, or those whose keys `rows` lists.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from capsnet.config import Config, from_dict
from capsnet.errors import InputError
from capsnet.files import read_yaml
from capsnet.options.schema import check_known, checked

__all__ = ["BUDGETS", "Experiment", "Row", "available", "experiment", "read"]

BUDGETS = ("quick", "cpu", "full")
"""From a proof that it works, in minutes, to the published sizes."""
MeasureName = Literal["affine", "pgd", "ood", "views"]
QUICK: dict[str, dict[str, Any]] = {
    "capsnet": {"conv_channels": 16, "capsule_types": 4, "decoder_sizes": [64, 64]},
    "efficient-capsnet": {"conv_channels": [8, 8, 8, 16], "decoder_sizes": [64, 64]},
    "capsule-head": {"capsule_types": 2},
    "em-capsnet": {"conv_channels": 8, "capsule_types": [2, 2, 2]},
    "vb-capsnet": {"conv_channels": 8, "capsule_types": [4]},
    "self-routing-capsnet": {"blocks": 1, "capsule_types": 4},
    "inverted-capsnet": {"backbone_channels": [8], "backbone_blocks": [1], "capsule_types": 4, "grid": 8},
    "resnet": {"blocks": 1, "width": 0.25},
    "efficient-cnn": {"conv_channels": [8, 8, 8, 16]},
    "baseline": {"width": 0.05},
    "baseline-multimnist": {"width": 0.05},
}
"""Options that make each network small; their numbers mean nothing."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a network and its training.

    Attributes:
        key: short name, unique in its experiment.
        title: in tables.
        options: of the training, where they differ from the experiment's base.
        cpu: further options at the CPU budget, beside those of the whole experiment.
        paper: error in percent that the paper reports; None where it reports none.
        spread: its standard deviation over three trainings, in points, where the paper states it (Table 1).
        against: key of the row it is compared with.
        published: by data set, what a paper reports of its own network there and how it was selected, in words.
    """

    key: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None
    spread: float | None = None
    against: str | None = None
    published: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Trainings that belong in one table.

    Attributes:
        name: for `capsnet reproduce`; that of the file.
        title: of its table.
        metric: data set whose test images the table is about.
        rows: what is trained.
        base: options of all rows at the full budget.
        cpu: options that differ at the CPU budget.
        cpu_says: the same in words; empty where only the number of epochs differs.
        short: name in the overview; empty where it is not in there.
        order: place in lists.
        measure: what is counted on the test images, in words.
        split: the images that its numbers are of; `validation` for a study that is to choose something.
        paper_data: test images that the papers' numbers are of, where they are others.
        also: further data sets that every network is tested on; those that are not on this machine are left out.
        measures: further columns, see `measures.MEASURES`, of test images of one object each; left out likewise where
            they take another data set, whose images must have as many channels.
        ensemble: row whose seeds are combined into one more row, and the paper's number for it.
        seeds: trainings of each row in the paper; the default of `capsnet reproduce`.
    """

    name: str
    title: str
    metric: str
    rows: tuple[Row, ...]
    base: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    cpu_says: str = ""
    short: str = ""
    order: int = 1000
    measure: str = "test error"
    split: Literal["test", "validation"] = "test"
    paper_data: str = ""
    also: tuple[str, ...] = ()
    measures: tuple[MeasureName, ...] = ()
    ensemble: tuple[str, float | None] | None = None
    seeds: int = 3

    def row(self, key: str) -> Row:
        """The row of this key.

        Raises:
            InputError: there is none.
        """
        rows = {row.key: row for row in self.rows}
        check_known(key, rows, f"rows of {self.name} must be among")
        return rows[key]

    def config(self, row: Row, budget: str, seed: int) -> Config:
        """The configuration that a row of this experiment is trained with; `budget` is one of `BUDGETS`.

        Where it names no preset, all that it does not state is the default of `Config`, whatever presets a model has.

        Raises:
            InputError: an unknown budget, or options that no training can have.
        """
        if budget not in BUDGETS:
            raise InputError(f"budget must be one of {', '.join(BUDGETS)}; got {budget!r}")
        full = {**self.base, **row.options, "report": False}
        plain = {} if "preset" in full else Config(model=full.get("model", "capsnet")).flat()
        changes = {
            "full": {},
            "cpu": {**self.cpu, **row.cpu},
            "quick": {"epochs": 1, "train_images": 1000, **QUICK.get(full.get("model", "capsnet"), {})},
        }[budget]
        source = f"experiment {self.name}, row {row.key}"
        return replace(from_dict({**plain, **full, **changes}, source=source), seed=seed)


def read(path: Path) -> Experiment:
    """The experiment of a YAML file, each row of which can be trained at each budget.

    Raises:
        InputError: it is no experiment; the message says what is wrong, and where.
    """
    one = _read(path)
    for row in one.rows:
        for budget in BUDGETS:
            one.config(row, budget, 0)
    return one


def _read(path: Path) -> Experiment:
    """The same before its options are looked at, which takes a second for a hundred rows."""
    values, source = read_yaml(path, what="experiment"), f"experiment {path}"
    if isinstance(values, dict):
        values["name"] = path.stem
        if (other := values.pop("rows_of", None)) is not None:
            theirs = _read(path.with_name(f"{other}.yaml"))
            keys = values.get("rows", [row.key for row in theirs.rows])
            values["rows"] = [asdict(theirs.row(key)) for key in checked(keys, list[str], name="rows", source=source)]
    one: Experiment = checked(values, Experiment, source=source)
    if one.measures and one.split != "test":
        raise InputError(f"measures of {source} must be left out with split {one.split}: they are of test images")
    keys = [row.key for row in one.rows]
    if not keys or len(set(keys)) < len(keys):
        raise InputError(f"{source} must have rows of different keys; got {', '.join(keys) or 'none'}")
    for key in [row.against for row in one.rows] + [one.ensemble and one.ensemble[0]]:
        if key is not None:
            one.row(key)
    return one


@cache
def _experiments() -> dict[str, Experiment]:
    found = [_read(path) for path in Path(__file__).parent.glob("*.yaml")]
    return {one.name: one for one in sorted(found, key=lambda one: (one.order, one.name))}


def available() -> tuple[str, ...]:
    """Names of the experiments."""
    return tuple(_experiments())


def experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        InputError: there is none.
    """
    check_known(name, available(), "experiment must be one of")
    return _experiments()[name]
