"""A table of one's own images, a row for each: `metadata.csv` or `.jsonl` in their folder, or a file of its own.

Its columns are `file_name` (from the table's folder on, or absolute) and `label`, and where they are wanted `split` and
`group`; others are passed over. A run's `manifest.csv` is such a table.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from capsnet.errors import InputError
from capsnet.files import LARGEST_TEXT, TABLES, is_directory, is_own_images, is_table, read_bytes, read_yaml, visible

__all__ = ["NAMES", "SPLITS", "NamesNoFiles", "Row", "folder_of", "read_table", "table_in"]

NAMES = tuple(f"metadata{suffix}" for suffix in TABLES)
"""By which a folder's table is known."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "unused": ("unused",),
    "": ("",),
}
"""Of each split, its names in a table; in a table that is not divided they are empty."""
_TOLD = 5  # rows, of which the first faults are told
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}


class NamesNoFiles(InputError):
    """A table without a column `file_name`, which is of something else."""


class Row(NamedTuple):
    """An image of a table."""

    file_name: str  # with `/`
    label: str  # name of its class; empty where the table has no such column, and the image is in its class's folder
    split: str  # of `SPLITS`
    group: str  # images of one group belong to one split; empty for an image of its own


def table_in(folder: Path) -> Path | None:
    """The table of the images in a folder; None where there is none."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def folder_of(data: str | Path, data_dir: str | Path | None = None) -> Path:
    """The folder that the names of one's own images start from.

    That is a folder itself; of a table `data_dir`, or else the table's own folder; but of the manifest of a run the
    folder of its images, as the run's configuration tells.

    Raises:
        InputError: `data_dir` is no directory, or the configuration beside a manifest is not one.
    """
    path = Path(data).expanduser()
    if not is_table(path):
        return path
    if data_dir is not None:
        if not is_directory(data_dir):
            raise InputError(f"data_dir must be an existing directory; got {data_dir}")
        return Path(data_dir).expanduser()
    beside = path.with_name("config.yaml")
    if path.name != "manifest.csv" or not beside.is_file():
        return path.parent
    options = read_yaml(beside)
    options = options.get("data") if isinstance(options, dict) else None
    if not isinstance(options, dict) or not isinstance(options.get("data"), str):
        raise InputError(f"{beside} must be the configuration of a run on one's own images; it names none")
    if not is_own_images(options["data"]):
        raise InputError(f"table {path} must be of image files that are there; it is of a run on {options['data']}")
    if Path(options["data"]).expanduser() == path:
        return path.parent
    place = options.get("data_dir")
    return folder_of(options["data"], place if isinstance(place, str) and is_table(options["data"]) else None)


def read_table(path: Path) -> tuple[Row, ...]:
    """The rows of a table.

    Raises:
        NamesNoFiles: it has no column `file_name`.
        InputError: no table, or rows that are wrong, the first of which are told.
    """
    text = read_bytes(path, most=LARGEST_TEXT, what="table").decode("utf-8-sig", "surrogateescape")
    records = _of_json(text, path) if path.suffix.lower() == ".jsonl" else _of_csv(text, path)
    rows, faults, seen = list[Row](), list[str](), dict[str, str]()
    for place, record in records:
        try:
            row = _row(record)
            if (other := seen.setdefault(row.file_name, place)) != place:
                raise ValueError(f"file_name must be in one row; {row.file_name} is in {other} too")
            rows.append(row)
        except ValueError as error:
            faults.append(f"{place}: {error}")
    divided = {bool(row.split) for row in rows}
    if len(divided) > 1:
        faults.append(f"split must be given in each row or in none; got {sum(not row.split for row in rows):,} without")
    if faults:
        more = f"; and {len(faults) - _TOLD:,} more" if len(faults) > _TOLD else ""
        raise InputError(visible(f"table {path} must hold sound rows only; {'; '.join(faults[:_TOLD])}{more}"))
    if not rows:
        raise InputError(f"table {path} must hold a row for each image; got none")
    return tuple(rows)


def _of_csv(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a CSV file, and where each stands; between columns are commas, semicolons or tabs."""
    head = text.partition("\n")[0].lower()
    between = next((one for one in ",;\t" if "file_name" in (name.strip('" \r') for name in head.split(one))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        _check_columns(columns, path)
        for cells in reader:
            if cells:
                yield f"line {reader.line_num}", dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise InputError(f"table {path} must be a CSV file; got in line {reader.line_num}: {error}") from None


def _of_json(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a file of one JSON object a line, and where each stands."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"table {path} must be a JSON object a line; got in line {number}: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"table {path} must be a JSON object a line; got {type(record).__name__} in line {number}")
        record = {str(name).lower(): value for name, value in record.items()}
        _check_columns(record, path)
        yield f"line {number}", record


def _check_columns(columns: Iterable[str], path: Path) -> None:
    got = list(columns)
    if "file_name" not in got:
        told = ", ".join(got[:20]) or "none"
        raise NamesNoFiles(visible(f"table {path} must have a column file_name, and label, split, group; got {told}"))


def _row(record: Mapping[str, Any]) -> Row:
    """A record as a row; ValueError says what is wrong."""
    values = dict[str, str]()
    for name in Row._fields:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError(f"{name} must be a text or a whole number; got {type(value).__name__}")
        values[name] = "" if value is None else str(value).strip()
    if not values["file_name"] or "\0" in values["file_name"]:
        raise ValueError(f"file_name must be the name of an image; got {values['file_name'] or 'none'}")
    if "label" in record and not values["label"]:
        raise ValueError("label must be the name of a class; got none")
    for name in ("label", "split", "group"):
        if any("\ud800" <= one <= "\udfff" for one in values[name]):
            raise ValueError(f"{name} must be UTF-8; it is not")
    if (split := values["split"].lower()) not in _SPLIT_OF:
        raise ValueError(f"split must be train, validation, test or unused; got {values['split']!r}")
    return Row(PurePosixPath(values["file_name"]).as_posix(), values["label"], _SPLIT_OF[split], values["group"])
