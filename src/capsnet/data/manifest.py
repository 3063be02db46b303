"""Which images a run is trained, validated and tested on: a line for each file of a folder, or one for each split.

The lines are kept as `manifest.csv` in the run directory, so that a folder that has changed since is not divided anew:
an image that was trained on never becomes a test image. Its columns are those of a table of images, see `table.py`,
with the hash of each; so a manifest is itself a data set.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from capsnet.data.dataset import Dataset, ImageFile, Split
from capsnet.data.image_folder import portable
from capsnet.errors import InputError

__all__ = ["FILE", "Line", "Manifest", "hash_of"]

FILE = "manifest.csv"
_COLUMNS = ("file_name", "label", "split", "group", "hash")
_OLD_COLUMNS = ("split", "class", "path", "hash")
_SPLITS = ("train", "validation", "test")
_TOLD = 5


class Line(NamedTuple):
    """A line of a manifest."""

    split: str  # `train`, `validation`, `test`, or `unused`
    class_name: str  # of a file; empty for a whole split
    path: str  # of a file, from the folder on; empty for a whole split
    hash: str  # BLAKE2b of the file's content, or of the split's images and labels
    group: str = ""  # of a file, see `dataset.ImageFile`


class Manifest(NamedTuple):
    """The images of a run."""

    lines: tuple[Line, ...]  # one for each file, or one for each split

    @classmethod
    def of(cls, dataset: Dataset) -> "Manifest":
        """That of a data set: of every file of its folder, whether it is used or not, or of whole splits."""
        if dataset.files:
            return cls.of_files(dataset.files, dataset.classes)
        splits = {name: getattr(dataset, name) for name in _SPLITS}
        return cls(tuple(Line(name, "", "", hash_of(split)) for name, split in splits.items() if split is not None))

    @classmethod
    def of_files(cls, files: Iterable[ImageFile], classes: tuple[str, ...]) -> "Manifest":
        """That of files of these classes."""
        return cls(tuple(Line(one.split, classes[one.label], portable(one.path), one.hash, one.group) for one in files))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the files, in the order of their labels."""
        return tuple(dict.fromkeys(line.class_name for line in self.lines if line.path and line.split == "train"))

    @property
    def splits(self) -> Mapping[str, str]:
        """The split of each file, by path."""
        return {line.path: line.split for line in self.lines if line.path}

    def differences(self, other: "Manifest") -> tuple[str, ...]:
        """What is new, missing or changed in `other`, in words; nothing if all is the same."""
        if not self.splits or not other.splits:
            ours, theirs = ({line.split: line.hash for line in one.lines} for one in (self, other))
            changed = [name for name in _SPLITS if ours.get(name) != theirs.get(name)]
            return (f"the images of {', '.join(changed)} are others",) if changed else ()
        here, there = ({line.path: line for line in one.lines} for one in (self, other))
        missing = [path for path in here if path not in there]
        new = [path for path in there if path not in here]
        changed = [path for path in here if path in there and here[path].hash != there[path].hash]
        told = (("missing", missing), ("new", new), ("changed", changed))
        return tuple(
            f"{len(paths):,} {what} ({', '.join(paths[:_TOLD])}{', ...' * (len(paths) > _TOLD)})"
            for what, paths in told
            if paths
        )

    def to_bytes(self) -> bytes:
        """The content of the file; names that are no UTF-8 stay as they are."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(_COLUMNS)
        writer.writerows((line.path, line.class_name, line.split, line.group, line.hash) for line in self.lines)
        return text.getvalue().encode("utf-8", "surrogateescape")

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """Read the file; None where there is none.

        Raises:
            InputError: it is no manifest.
        """
        if not path.is_file():
            return None
        try:
            rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline="")))
        except (OSError, csv.Error) as error:
            raise InputError(f"{path} must be a manifest that capsnet wrote; got: {error}") from None
        columns = tuple(rows[0]) if rows else ()
        if columns not in (_COLUMNS, _OLD_COLUMNS) or any(len(row) != len(columns) for row in rows):
            raise InputError(f"{path} must be a manifest that capsnet wrote, of {', '.join(_COLUMNS)}")
        if columns == _OLD_COLUMNS:
            return cls(tuple(Line(*row) for row in rows[1:]))
        return cls(tuple(Line(split, label, name, hash, group) for name, label, split, group, hash in rows[1:]))


def hash_of(split: Split) -> str:
    """BLAKE2b of images and labels, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (split.images, split.labels, split.single_images):
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            for part in torch.split(tensor, 1000):
                digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
