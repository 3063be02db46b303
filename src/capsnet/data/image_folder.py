"""One's own images as a data set: a folder for each class, below train/ and test/ (or val/), or divided here by seed.

Or a table tells the class of each image, see `table.py`. `scan` lists them and tells every fault at once; nothing is
decoded. `ImageFolder.divided` says which image is in which split, `read` decodes them, see `preprocessing.py`. Nothing
is passed over in silence: hidden files and what operating systems leave behind (Thumbs.db, desktop.ini, __MACOSX) are
counted, and beside the class folders whatever is no image; a file that is no readable image is refused by name, or with
`skip_unreadable` passed over and told.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import torch

from capsnet.data import grouping
from capsnet.data.dataset import Dataset, ImageFile, Split, stratified
from capsnet.data.image_cache import cores, decoded
from capsnet.data.image_file import SUFFIXES, Header, Resize, read_header, version
from capsnet.data.preprocessing import Preprocessing
from capsnet.data.table import NamesNoFiles, folder_of, read_table, table_in
from capsnet.errors import InputError
from capsnet.files import is_directory, is_table, visible

__all__ = ["ImageFolder", "Unreadable", "image_files", "one_form", "portable", "scan"]

KEPT_SIDE = 40  # pixels: images of one size up to this are kept as they are
SIDE = 32  # of all others, unless it is chosen
TOLD = 20  # faults, of which the first are told by name
_SPLITS = ("train", "validation", "test", "unused", "")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")
_VALIDATION = ("validation", "valid", "val")
_THREADS = min(8, cores())


class Unreadable(InputError):
    """Files of a folder that cannot be decoded; `faults` says why, by path."""

    def __init__(self, root: Path, faults: dict[str, str]) -> None:
        super().__init__(_told(root, faults))
        self.faults = faults


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, listed but not decoded."""

    root: Path
    classes: tuple[str, ...]  # names, in natural order ("2" before "10") and one Unicode form
    files: tuple[ImageFile, ...]  # by split, class and name
    tested: Literal["test", "validation"] = "test"  # `validation` where there is train/ and val/ but no test/
    notes: tuple[str, ...] = ()  # what was passed over, and what its owner should know

    def of(self, split: str) -> list[ImageFile]:
        """The files of a split."""
        return [file for file in self.files if file.split == split]

    def divided(self, *, seed: int, test: int | float | None = None) -> "ImageFolder":
        """The same with a test split: the folder's own, or a sixth of each class, at least one image.

        Another share than a sixth is `test`, or, if it is a whole number, so many images, of each class its share. The
        same seed always chooses the same images.

        Raises:
            InputError: a class of fewer than two images to divide, or `test` that leaves a class nothing to train on,
                or is given where there is a test split.
        """
        if any(file.split for file in self.files):
            if test is not None:
                raise InputError(f"test_fraction must be left out where {self.root} is divided already; got {test}")
            there = {file.label for file in self.of("train")}
            if lacking := [name for label, name in enumerate(self.classes) if label not in there]:
                raise InputError(f"{self.root} must hold training images of each class; got none of {_some(lacking)}")
            return self._sorted(self.files)
        counts = self._counts()
        for name, count in zip(self.classes, counts, strict=True):
            if count < 2:
                raise InputError(f"class {name} must have at least 2 images, one to train and one to test; got {count}")
        most = len(self.files) - len(self.classes)
        if isinstance(test, int) and not 1 <= test <= most:
            raise InputError(
                f"test_fraction must be a share, or 1 to {most} of the {len(self.files)} images; got {test}"
            )
        files = [file._replace(split="train") for file in sorted(self.files, key=lambda file: file.label)]
        if isinstance(test, int) or grouping.belong_together(grouping.units(files)):
            tested = test if isinstance(test, int) else max(1, round(len(files) * (test or 1 / 6)))
            return self._moved(files, tested, "test", seed)
        generator, start = torch.Generator().manual_seed(seed), 0
        for count in counts:
            tested = min(max(round(count * (test or 1 / 6)), 1), count - 1)
            for place in torch.randperm(count, generator=generator)[:tested].tolist():
                files[start + place] = files[start + place]._replace(split="test")
            start += count
        return self._sorted(files)

    def _counts(self) -> list[int]:
        """Number of files of each class."""
        counts = Counter(file.label for file in self.files)
        return [counts[label] for label in range(len(self.classes))]

    def with_validation(self, count: int, *, seed: int) -> "ImageFolder":
        """The same with so many training images held out, of each class its share; 0: not even the folder's own.

        Raises:
            InputError: `count` leaves a class nothing to train on.
        """
        if self.tested == "validation" and count == 0:
            return self  # they are what is tested
        if self.tested == "validation":
            raise InputError(f"validation must be left out, or 0, where {self.root} has val/ and no test/; got {count}")
        files = [file._replace(split="unused") if file.split == "validation" else file for file in self.files]
        return self._moved(files, count, "validation", seed)

    def with_train(self, count: int, *, seed: int) -> "ImageFolder":
        """The same with so many of the training images only, of each class its share.

        Raises:
            InputError: there are not so many.
        """
        fewest, there = len(self.classes), len(self.of("train"))
        if not fewest <= count <= there:
            raise InputError(f"train_images must be {fewest}, one of each class, to the {there} there are; got {count}")
        return self._moved(list(self.files), there - count, "unused", seed)

    def _moved(self, files: list[ImageFile], count: int, to: str, seed: int) -> "ImageFolder":
        """The same with so many training images in another split; about as many where some belong together."""
        place = [k for k, file in enumerate(files) if file.split == "train"]
        train = [files[k] for k in place]
        labels, units = torch.tensor([file.label for file in train]), grouping.units(train)
        notes = self.notes
        if to == "unused":
            moved = sorted(set(range(len(place))) - set(stratified(labels, len(place) - count, seed=seed).tolist()))
        elif count and grouping.belong_together(units):
            moved = grouping.drawn(train, units, count / len(train), seed=seed)
            absent = {file.label for file in train} - {train[k].label for k in moved}
            if to == "test" and not moved:
                raise InputError(f"images of {self.root} must be of 2 groups or more to be divided; they are of one")
            if absent:
                classes = _some(self.classes[label] for label in sorted(absent))
                notes = (*notes, visible(f"no {to} image of {classes}, whose images all belong together"))
        else:
            moved = stratified(labels, count, seed=seed, held_out=True).tolist()
        for k in moved:
            files[place[k]] = files[place[k]]._replace(split=to)
        return replace(self, notes=notes)._sorted(files)

    def recorded(self, splits: Mapping[str, str]) -> "ImageFolder":
        """The files in the splits that they were in, by path; others are unused."""
        tested: Literal["test", "validation"] = "test" if "test" in splits.values() else "validation"
        files = (file._replace(split=splits.get(portable(file.path), "unused")) for file in self.files)
        return replace(self._sorted(files), tested=tested)

    def size(self) -> tuple[int, int]:
        """Height and width that the images are brought to unless it is chosen: their own, if one and small; else 32."""
        sizes = {(file.header.height, file.header.width) for file in self.files}
        own = next(iter(sizes))
        return own if len(sizes) == 1 and max(own) <= KEPT_SIDE else (SIDE, SIDE)

    def preprocessing(
        self,
        *,
        size: tuple[int, int] | None = None,
        resize: Resize | None = None,
        channels: int | None = None,
        bits: int | None = None,
    ) -> Preprocessing:
        """How its images are read, with what is chosen, else padded; channels of images that may be in colour are 3."""
        height, width = size or self.size()
        deep = [file.header.bits for file in self.files if file.header.bits is not None]
        colour = any(file.header.colour for file in self.files)
        channels, bits = channels or (3 if colour else 1), bits or max(deep, default=None)
        return Preprocessing(height, width, channels, bits=bits, resize=resize or "pad")

    def read(
        self, preprocessing: Preprocessing, *, channels: int | None = None, tell: Callable[[str], object] | None = None
    ) -> Dataset:
        """Decode the images of all splits; in grey where no `channels` were asked for and every image turns out grey.

        `tell` is given the place of decoded images that do not fit into memory.

        Raises:
            InputError: files that are no readable images, all of them told; or a split without images.
        """
        splits, notes = self.decoded(preprocessing, tell=tell)
        parts = [part for split in splits.values() for part in torch.split(split.images, 1000)]
        if channels is None and all((part == part[:, :1]).all() for part in parts):
            splits = {name: replace(split, images=split.images[:, :1]) for name, split in splits.items()}
            preprocessing = replace(preprocessing, channels=1)
        return replace(self, notes=(*self.notes, *notes)).dataset(splits, preprocessing)

    def dataset(self, splits: dict[str, Split], preprocessing: Preprocessing) -> Dataset:
        """The data set of these images.

        Raises:
            InputError: a split without images.
        """
        if self.tested == "validation" and "validation" in splits:
            splits["test"] = splits["validation"]
        for name in ("train", "test"):
            if name not in splits:
                raise InputError(f"{self.root} must hold {name} images; got none")
        return Dataset(
            str(self.root),
            self.classes,
            splits["train"],
            splits["test"],
            splits.get("validation"),
            tested=self.tested,
            files=self.files,
            preprocessing=preprocessing,
            notes=self.notes,
        )

    def decoded(
        self, preprocessing: Preprocessing, *, tell: Callable[[str], object] | None = None
    ) -> tuple[dict[str, Split], tuple[str, ...]]:
        """The images of each split that has any; `unused` ones are not decoded.

        Returns:
            The splits, and what is to be told of how their images were read, unless they were in the cache.

        Raises:
            Unreadable: files that cannot be decoded.
        """
        wanted = [file for file in self.files if file.split != "unused"]
        noted = dict[str, list[int]]()

        def decode(index: int) -> torch.Tensor:
            prepared = preprocessing(self.root / wanted[index].path)
            for note in prepared.notes:
                noted.setdefault(note, []).append(index)
            return prepared.image

        key = hashlib.blake2b(repr((version(), preprocessing, [file.hash for file in wanted])).encode(), digest_size=16)
        try:
            images = decoded(len(wanted), preprocessing.image_shape, decode, key=key.hexdigest(), tell=tell)
        except InputError:
            if faults := self._faults(preprocessing):
                raise Unreadable(self.root, faults) from None
            raise
        splits, start = dict[str, Split](), 0
        for name, files in groupby(wanted, key=lambda file: file.split):
            labels = torch.tensor([file.label for file in files])
            splits[name] = Split(images[start : start + len(labels)], labels)
            start += len(labels)
        notes = (
            f"{len(places):,} of {len(wanted):,} images: {note} "
            f"({_some((wanted[k].path for k in sorted(places)), most=3)})"
            for note, places in sorted(noted.items())
        )
        return splits, tuple(map(visible, notes))

    def _faults(self, preprocessing: Preprocessing) -> dict[str, str]:
        """Why files cannot be decoded, by path; decodes them all."""

        def fault(file: ImageFile) -> str:
            try:
                preprocessing(self.root / file.path)
            except InputError as error:
                return _reason(error)
            return ""

        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip((file.path for file in self.files), pool.map(fault, self.files), strict=True))
        return {path: reason for path, reason in found.items() if reason}

    def without(self, faults: Mapping[str, str]) -> "ImageFolder":
        """The same without the files of these paths, and a note of them."""
        if not faults:
            return self
        note = f"passed over {len(faults):,} unreadable: {_some(f'{path} ({why})' for path, why in faults.items())}"
        return replace(
            self,
            files=tuple(file for file in self.files if file.path not in faults),
            notes=(*self.notes, visible(note)),
        )

    def grouped(self, pattern: str | None) -> "ImageFolder":
        """The same with the groups that a regular expression finds in the paths, and with notes of what is alike.

        Raises:
            InputError: it is found in no path, or the files have groups already.
        """
        files, notes = self.files, list(self.notes)
        if pattern is not None:
            if any(file.group for file in files):
                raise InputError(f"group_by must be left out where a table has a column group; got {pattern}")
            found = [re.search(pattern, file.path) for file in files]
            names = ["" if one is None else (one[1] or "") if one.re.groups else one[0] for one in found]
            if not any(names):
                raise InputError(f"group_by must be found in paths as {files[0].path}; got {pattern}, which is in none")
            files = tuple(file._replace(group=name) for file, name in zip(files, names, strict=True))
        groups = dict[str, set[str]]()
        for file in files:
            groups.setdefault(file.group, set()).add(file.split)
        alone = sum(not file.group for file in files)
        groups.pop("", None)
        if groups:
            none = f", {alone:,} in none" if alone else ""
            notes.append(f"{len(files) - alone:,} images in {len(groups):,} groups{none}")
        if several := [name for name, splits in groups.items() if len(splits - {"unused"}) > 1]:
            notes.append(f"groups in several splits: {len(several):,} ({_some(several, most=3)})")
        alike = grouping.copies(file for file in files if file.split != "unused")
        for kind in ("classes", "splits"):
            values = [{file.label if kind == "classes" else file.split for file in same} for same in alike]
            mixed = [same for same, found in zip(alike, values, strict=True) if len(found) > 1]
            if mixed:
                told = _some((" = ".join(file.path for file in same[:3]) for same in mixed), most=3)
                notes.append(f"files that are in several {kind}: {len(mixed):,} ({told})")
        return replace(self, files=files, notes=tuple(map(visible, notes)))

    def _sorted(self, files: Iterable[ImageFile]) -> "ImageFolder":
        return replace(self, files=tuple(sorted(files, key=lambda file: (_SPLITS.index(file.split), file.label))))


def scan(
    path: str | os.PathLike[str],
    *,
    skip_unreadable: bool = False,
    classes: Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    group_by: str | None = None,
) -> ImageFolder:
    """List a folder of images, a sub-folder for each class; read what the files' heads tell, and their hashes.

    Args:
        path: holds train/ and test/ or val/ (or all three; validation/ and valid/ are val/) with the same class folders
            in each; or the class folders themselves; or a table of its images; or is such a table, see `table.py`.
        skip_unreadable: pass over files that are no images, and tell of them, instead of refusing the folder.
        classes: those of a trained network that is to be judged: the folder may then lack some, which is told, as are
            others, whose images are left out.
        data_dir: where the names of a table start from, in place of its own folder.
        group_by: a regular expression; files in whose paths it finds the same (its first group, if it has one) belong
            together.

    Raises:
        InputError: the folder is not of this form, or holds files that are no images; all of them are told.
    """
    table = Path(path).expanduser() if is_table(path) else None
    root = folder_of(Path(path), None if data_dir is None else Path(data_dir))
    if not is_directory(root):
        raise InputError(f"path of an image folder must be an existing directory; got {path}")
    listing = _Listing(root, lenient=classes is not None)
    listed = None
    if inside := None if table else table_in(root):
        with suppress(NamesNoFiles):  # of something else
            listed = listing.of_table(inside, whole=True)
    listed = listed or (listing.of_table(table, whole=False) if table else listing.of_folders())
    divided = any(one.split for one in listed)
    trained = [one.class_name for one in listed if one.split in ("train", "")]
    names = tuple(dict.fromkeys(trained)) if classes is None else tuple(classes)
    if classes is None:
        listing.check(names, {one.split for one in listed})
    label_of = {name: label for label, name in enumerate(names)}
    places = [one for one in listed if one.class_name in label_of]
    with ThreadPoolExecutor(_THREADS) as pool:
        heads = list(pool.map(_head, (one.file for one in places)))
    files, faults = list[ImageFile](), dict(listing.faults)
    for one, head in zip(places, heads, strict=True):
        if isinstance(head, InputError):
            faults[one.path] = _reason(head)
        else:
            files.append(ImageFile(one.path, label_of[one.class_name], one.split, *head, one.group))
    if faults and not skip_unreadable:
        raise InputError(_told(root, faults))
    if all(file.split == "unused" for file in files):
        raise InputError(
            _told(root, faults) if faults else f"{root} must hold images of the classes {_some(names)}; got none"
        )
    tested: Literal["test", "validation"] = "test"
    if divided and not any(one.split == "test" for one in listed):
        tested = "validation"
    notes = listing.notes(listed, names, judged=classes is not None)
    return ImageFolder(root, names, tuple(files), tested, notes).grouped(group_by).without(faults)


def image_files(directory: Path) -> tuple[list[Path], tuple[str, ...]]:
    """All image files in a directory and below, told by their names, in natural order, each once; what was passed over.

    Raises:
        InputError: a directory that cannot be read.
    """
    listing = _Listing(directory, lenient=True)
    found = listing.images(directory, set())
    return found, listing.notes((), (), judged=True)


def one_form(name: str) -> str:
    """A name in the form in which names are compared: macOS writes an umlaut as two characters."""
    return unicodedata.normalize("NFC", portable(name))


def portable(name: str) -> str:
    """A file's name as it is read where names are UTF-8, whatever the locale here; other bytes stay what they are."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


class _Listed(NamedTuple):
    """An image that is listed, but not read."""

    path: str  # from the root on, with `/`
    file: Path
    class_name: str
    split: str
    group: str = ""


@dataclass
class _Listing:
    """What is found while a folder is listed."""

    root: Path
    lenient: bool  # it is to be looked at only: one class will do, and other files are passed over
    faults: dict[str, str] = field(default_factory=dict)  # by path from the root on
    passed: Counter[str] = field(default_factory=Counter)  # kinds of files that were passed over
    listed: dict[Path, tuple[list[Path], list[Path]]] = field(default_factory=dict)  # directories and files of each

    def of_folders(self) -> list[_Listed]:
        """The images in folders of the classes, or in those of the splits."""
        return [
            _Listed(self._name(file), file, name, split)
            for split, directory in (self.splits() or {"": self.root}).items()
            for name, files in self.classes(directory, lenient=self.lenient or split in ("validation", "test")).items()
            for file in files
        ]

    def of_table(self, table: Path, *, whole: bool) -> list[_Listed]:
        """The images of a table; of a `whole` folder, whose other images are told.

        Raises:
            InputError: see `table.read_table`; or no label, and no folder that may be a class.
        """
        listed = list[_Listed]()
        for row in read_table(table):
            name = row.label or PurePosixPath(row.file_name).parent.name
            if not name:
                raise InputError(f"table {table} must have a column label, or name files in folders of their classes")
            listed.append(_Listed(row.file_name, self.root / row.file_name, one_form(name), row.split, row.group))
        if whole:
            named = {one.file for one in listed}
            if others := sum(file not in named for file in self.images(self.root, set())):
                self.passed[f"images that {table.name} does not name"] += others
            self.passed[f"{table.suffix} files"] -= 1
        return sorted(listed, key=lambda one: (_SPLITS.index(one.split), _natural(one.class_name), _natural(one.path)))

    def splits(self) -> dict[str, Path] | None:
        """The folders of the splits, None where the root holds the classes themselves."""
        directories, _ = self.entries(self.root)
        by_name = {directory.name.lower(): directory for directory in directories}
        validation = [name for name in _VALIDATION if name in by_name]
        found = [name for name in ("train", "test", *validation[:1]) if name in by_name]
        if not {"train", "test"} & set(found) or (len(found) == 1 and not self.entries(by_name[found[0]])[0]):
            return None  # a class may happen to be called train
        places = {"validation" if name in validation else name: by_name[name] for name in found}
        if "train" not in found or len(found) < 2:
            if self.lenient:
                return places
            raise InputError(
                f"{self.root} must hold train/ and test/ or val/, or the classes only; got {found[0]}/ alone"
            )
        others = [name for name in by_name if name not in found]
        if others:
            raise InputError(
                f"{self.root} must hold train/, test/ and at most one validation/ only; got {others[0]}/ as well"
            )
        return places

    def classes(self, directory: Path, *, lenient: bool) -> dict[str, list[Path]]:
        """The images of each class, in natural order; unless `lenient`, of two classes or more, none of them empty."""
        directories, loose = self.entries(directory)
        for file in loose:
            if _is_image(file):
                self.faults[self._name(file)] = (
                    "must be in the folder of its class; got an image beside the class folders"
                )
            else:
                self.passed[_kind(file)] += 1
        if len(directories) < 2 and not lenient:
            images = sum(map(_is_image, loose))
            among = f", and {images:,} image{'s' * (images != 1)} outside of them" if images else ""
            raise InputError(
                f"{directory} must hold a folder for each of at least 2 classes; got {len(directories)}{among}"
            )
        classes, visited = dict[str, list[Path]](), dict[tuple[int, int], Path]()
        for one in directories:
            state = one.stat()
            other = visited.setdefault((state.st_dev, state.st_ino), one)
            if other != one:
                self.faults[self._name(one) + "/"] = f"must be a folder of its own; got another name of {other.name}/"
                continue
            name, (inner, files) = one_form(one.name), self.entries(one)
            if name in classes:
                raise InputError(f"{directory} must hold one folder for each class; got two called {name}")
            for folder in inner:
                self.faults[self._name(folder) + "/"] = "must be an image; got a folder in a class folder"
            for file in files:
                if not _is_image(file):
                    self.faults[self._name(file)] = f"must be an image ({' '.join(SUFFIXES)}); got another name"
            classes[name] = [file for file in files if _is_image(file)]
            if not classes[name] and not lenient:
                raise InputError(f"class folder {one} must hold at least one image; got none")
        return classes

    def check(self, names: Sequence[str], splits: set[str]) -> None:
        """Raise InputError unless there are at least two classes, and something to train on and to judge by."""
        if len(names) < 2:
            raise InputError(f"{self.root} must hold training images of at least 2 classes; got {len(names)}")
        if splits != {""} and not {"test", "validation"} & splits:
            raise InputError(
                f"{self.root} must hold train and test or validation images; got {', '.join(splits)} alone"
            )

    def images(self, directory: Path, visited: set[tuple[int, int]]) -> list[Path]:
        """All images in a directory and below, no directory twice, whatever links lead to it."""
        state = directory.stat()
        if (state.st_dev, state.st_ino) in visited:
            self.passed["links to what was visited"] += 1
            return []
        visited.add((state.st_dev, state.st_ino))
        directories, files = self.entries(directory)
        found = [file for file in files if _is_image(file)]
        for file in files:
            if not _is_image(file):
                self.passed[_kind(file)] += 1
        return found + [file for inner in directories for file in self.images(inner, visited)]

    def entries(self, directory: Path) -> tuple[list[Path], list[Path]]:
        """Directories and files in `directory`, without clutter, in natural order."""
        if directory in self.listed:
            return self.listed[directory]
        try:
            every = list(directory.iterdir())
        except OSError as error:
            raise InputError(f"{directory} must be a readable directory; got: {error.strerror}") from error
        hidden = [one for one in every if one.name.startswith(".") or one.name.lower() in _CLUTTER]
        self.passed["hidden"] += len(hidden)
        kept = sorted(set(every) - set(hidden), key=lambda entry: _natural(entry.name))
        found = [entry for entry in kept if entry.is_dir()], [entry for entry in kept if not entry.is_dir()]
        self.listed[directory] = found
        return found

    def notes(self, listed: Sequence[_Listed], names: Sequence[str], *, judged: bool) -> tuple[str, ...]:
        """What was passed over; which of the classes `names` are absent, and which others are left out.

        They are those that training knows, and may be absent from any split, or those of a network that is `judged` on
        all images together.
        """
        notes = []
        if passed := [f"{count:,} {kind}" for kind, count in self.passed.items() if count > 0]:
            notes.append(f"passed over: {', '.join(passed)}")
        used = [one for one in listed if one.split != "unused"]
        for split in [""] if judged else dict.fromkeys(one.split for one in used):
            found = {one.class_name for one in used if judged or one.split == split}
            if absent := [name for name in names if name not in found]:
                notes.append(f"no {split}{' ' * bool(split)}image of {_some(absent)}")
        if others := Counter(one.class_name for one in used if one.class_name not in names):
            told = _some(f"{name} ({count:,})" for name, count in others.items())
            notes.append(f"left out, classes that {'the network' if judged else 'training'} does not know: {told}")
        return tuple(map(visible, notes))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _head(path: Path) -> tuple[str, Header] | InputError:
    """Hash and header of a file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return digest.hexdigest(), read_header(path)
    except InputError as error:
        return error
    except OSError as error:
        return InputError(f"{path} must be a readable image; got: {error.strerror}")


def _reason(error: InputError) -> str:
    """What a file must be and is, without its name."""
    return f"must {str(error).split(' must ', 1)[-1]}"


def _told(root: Path, faults: Mapping[str, str]) -> str:
    """One line for all files that cannot be used."""
    (path, reason), *_ = faults.items()
    hint = "; --skip-unreadable passes over such files"
    if len(faults) == 1:
        return visible(f"{root / path} {reason}{hint}")
    told = _some((f"{path} {reason}" for path, reason in faults.items()), "; ")
    return visible(f"{root} must hold images of its classes only; {len(faults):,} files are none: {told}{hint}")


def _some(parts: Iterable[str], between: str = ", ", *, most: int = TOLD) -> str:
    every = list(parts)
    more = f"{between}and {len(every) - most:,} more" if len(every) > most else ""
    return between.join(every[:most]) + more


def _is_image(file: Path) -> bool:
    """Whether its name is that of an image."""
    return file.suffix.lower() in SUFFIXES


def _kind(file: Path) -> str:
    return f"{file.suffix} files" if file.suffix else "files without suffix"


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sorting key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part.lower()) for part in parts], name
