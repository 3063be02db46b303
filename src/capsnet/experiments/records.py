"""What was measured, as JSON lines: one line a trained network, or an ensemble of them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capsnet.config import Config, roles, with_defaults
from capsnet.errors import InputError
from capsnet.experiments.plan import MeasureName
from capsnet.files import parse_json, read_text, write_atomically
from capsnet.options import LOCAL
from capsnet.options.schema import checked

__all__ = ["Record", "add", "effective", "fingerprint", "identity", "path_of", "read", "write"]


@dataclass(frozen=True)
class Record:
    """A line of the records.

    Attributes:
        experiment: its name.
        row: key of the row; `ensemble` for networks put together.
        budget: `quick`, `cpu` or `full`.
        fingerprint: of the configuration, see `fingerprint`.
        seed: of the training; None for an ensemble.
        members: seeds of an ensemble's networks.
        measures: by name, see `measures.MEASURES`: errors in percent, and an AUROC in [0, 1].
        epochs: passes over the training images that were made.
        parameters: of the network.
        results: by data set: error in percent, wrong and total test images, and for images of several objects those
            missed.
        wrong_images: by data set: which test images were wrong, rising.
        seconds: of training.
        config: the options with an effect that differ from the defaults.
        environment: versions, commit and hardware.
    """

    experiment: str
    row: str
    budget: str
    fingerprint: str
    seed: int | None
    epochs: int
    parameters: int
    results: dict[str, dict[str, float]]
    wrong_images: dict[str, list[int]]
    seconds: float
    config: dict[str, Any]
    environment: dict[str, Any]
    members: list[int] = field(default_factory=list)
    measures: dict[MeasureName, float] = field(default_factory=dict)

    def error(self, data: str) -> float:
        """Error in percent on the test images of a data set.

        Raises:
            InputError: it was not measured there.
        """
        if data not in self.results:
            raise InputError(f"record of {self.experiment} {self.row}, seed {self.seed}, must have results on {data}")
        return self.results[data]["error_percent"]


def fingerprint(config: Config) -> str:
    """Twelve hexadecimal digits that differ where two configurations would train or measure differently.

    The seed, the place and the machine are left out.
    """
    text = json.dumps(effective(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def effective(config: Config) -> dict[str, Any]:
    """The options with an effect that differ from the defaults, as JSON holds them.

    Without the defaults, so that a new option changes no old fingerprint.
    """
    default = with_defaults(Config(model=config.model)).flat() | {"model": "capsnet"}
    without_effect = {*roles(LOCAL), "preset", "routing_kernel", "seed"}
    chosen = {
        name: value
        for name, value in with_defaults(config).flat().items()
        if name not in without_effect and value != default[name]
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def path_of(folder: Path, experiment: str, budget: str) -> Path:
    """The file with the records of an experiment at a budget."""
    return folder / f"{experiment}-{budget}.jsonl"


def read(folder: Path, experiment: str, budget: str) -> list[Record]:
    """The records of an experiment at a budget; none where there is no file.

    Raises:
        InputError: a line is no record.
    """
    path = path_of(folder, experiment, budget)
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        source = f"{path}, line {number},"
        records.append(checked(parse_json(line, source=source), Record, source=source))
    return records


def identity(record: Record) -> tuple[object, ...]:
    """What the records of one network have in common, wherever and however often it was trained."""
    return record.row, record.fingerprint, record.seed, tuple(record.members)


def add(folder: Path, record: Record) -> list[Record]:
    """Add a record to its file, in place of one of the same network; what others wrote there in the meantime stays.

    Returns:
        All records of the file.

    Raises:
        InputError: it cannot be written, or a line is no record.
    """
    there = read(folder, record.experiment, record.budget)
    kept = [*(one for one in there if identity(one) != identity(record)), record]
    write(folder, kept)
    return kept


def write(folder: Path, records: list[Record]) -> None:
    """Replace the file of these records, which are of one experiment and budget, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    kept = [
        {name: value for name, value in asdict(record).items() if name != "measures" or value} for record in records
    ]
    lines = "".join(json.dumps(each) + "\n" for each in kept)
    path = path_of(folder, records[0].experiment, records[0].budget)
    write_atomically(path, lambda place: place.write_text(lines, encoding="utf-8"))
