"""A trained network as a command names it: its weights, its data, and where its figures go."""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from capsnet.cli.printing import say
from capsnet.config import Config
from capsnet.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from capsnet.checkpoints.model_card import Card
    from capsnet.checkpoints.run_directory import Run
    from capsnet.data import Dataset, Split
    from capsnet.data.image_folder import ImageFolder
    from capsnet.data.manifest import Manifest
    from capsnet.evaluation import Predictions
    from capsnet.models import Network

__all__ = ["TrainedModel", "WritesFile"]


class TrainedModel:
    """A trained network as a command names it; unless `several`, its images must show one object each.

    It may be an `exported` file where the command needs no more than what goes in and comes out.

    Attributes:
        model: as given.
        folder: where its weights are.
        run: the same folder as a run directory, which it need not be.
        network: on the CPU, in evaluation mode.
        card: what is told of it; empty where nothing is.
        config: that it was trained with; None where that is not known.
    """

    model: str
    folder: Path
    run: "Run"
    network: "Network"
    card: "Card"
    config: Config | None

    def __init__(self, model: str, *, several: bool = False, exported: bool = False) -> None:
        from capsnet.checkpoints import exported as exported_files
        from capsnet.checkpoints import pretrained, run_directory

        self.model, self.folder = model, pretrained.folder_of(model)
        self.run = run_directory.Run(self.folder)
        if exported_files.is_exported(self.folder):
            if not exported:
                raise InputError(
                    f"MODEL must be a run directory or a folder with weights; got the file {model}, which "
                    "`capsnet predict` takes"
                )
            self.network, self.card = exported_files.load(self.folder)
        else:
            self.network, self.card = pretrained.load(model), pretrained.load_card(model)
        if self.network.objects_per_image > 1 and not several:
            raise InputError(
                f"{model} must be of images that show one object each; it finds {self.network.objects_per_image}"
            )
        self.config = self.run.config() if self.is_run else self.card.trained() if self.card.config else None

    @property
    def is_run(self) -> bool:
        """Whether it is a run directory, where its figures then go."""
        return self.run.config_path.exists()

    def trained(self, data: str | None = None) -> Config:
        """The configuration it was trained with; for other weights, one that reads `data` in their images' shape.

        Raises:
            InputError: it is not known, and `data` is not given.
        """
        if self.config is not None:
            return self.config
        if data is None:
            raise InputError(f"--data must be given for {self.model}, which does not say what it was trained on")
        channels, height, width = self.network.image_shape
        return Config(image_size=f"{height}x{width}", channels=channels if channels in (1, 3) else None)

    def dataset(
        self, data: str | None = None, data_dir: str | None = None, *, held_out: bool = True, any_will_do: bool = False
    ) -> "Dataset":
        """Its data set, or `data` read as its own was; `held_out`, with the validation split of the run.

        With `any_will_do`, where its own cannot be had and it knows digits of 28 x 28: `strokes`, and say so.

        Raises:
            InputError: the data cannot be had, or other classes.
        """
        from capsnet.data import describe, is_own
        from capsnet.training import prepare

        trained, recorded = self.trained(data), self.run.manifest()
        options = replace(
            trained,
            data=data or trained.data,
            data_dir=data_dir or (None if data and is_own(data) else trained.data_dir),
            validation=trained.validation if held_out or data is None else 0,
            test_fraction=trained.test_fraction if data is None else None,
            devices=1,
            skip_unreadable=True,
        )
        if data is not None and is_own(data) and not self._is_own(options, recorded):
            return self._of_others(options, recorded)
        own = data is None or is_own(data)
        now = "resize" in self.card.config or self.card.preprocessing is not None  # neither was there in old runs
        shares = recorded is not None or now
        try:
            dataset = prepare.prepare_data(options, recorded=recorded if own else None, shares=shares, tell=say)
        except InputError as error:
            strokes = describe("strokes")
            known = (strokes.image_shape, strokes.classes)
            if data or not any_will_do or (self.network.image_shape, self.network.classes) != known:
                raise
            say(f"capsnet: {trained.data} cannot be read, so strokes are shown ({error})")
            dataset = prepare.prepare_data(replace(options, data="strokes", validation=None))
            own = False
        if own:
            self._tell_differences(dataset, recorded)
        unnamed = self._unnamed and len(self.network.classes) == len(dataset.classes)
        if dataset.classes != self.network.classes and not unnamed:
            raise InputError(
                f"data set {dataset.name} must have the {len(self.network.classes)} classes of the network, "
                f"{_some(self.network.classes)}; got {len(dataset.classes)}, {_some(dataset.classes)}"
            )
        self.network.check_images(dataset.test.images[:1].float())
        return dataset

    @property
    def _unnamed(self) -> bool:
        """Whether its classes have numbers for want of names: of weights that do not say what they were trained on."""
        return self.config is None and self.network.classes == tuple(map(str, range(len(self.network.classes))))

    def precision(self, device: "torch.device") -> str:
        """The precision that it is run in on a device: that of its training, as far as the device has it."""
        from capsnet import devices

        return devices.resolve_precision(replace(self.config or Config(), devices=1), device, self.network)

    def _is_own(self, options: Config, recorded: "Manifest | None") -> bool:
        """Whether a folder holds the images of the run, wherever it is."""
        from capsnet.data.image_folder import portable, scan
        from capsnet.data.table import folder_of

        if recorded is None or not recorded.splits:
            return False
        if Path(options.data).expanduser().resolve() == Path(self.trained().data).expanduser().resolve():
            return True
        root = folder_of(options.data, options.data_dir)
        if not all((root / line.path).is_file() for line in recorded.lines):
            return False
        folder = scan(options.data, skip_unreadable=True, classes=recorded.classes, data_dir=options.data_dir)
        there = {portable(file.path): file.hash for file in folder.files}
        return all(there.get(line.path) == line.hash for line in recorded.lines)

    def _of_others(self, options: Config, recorded: "Manifest | None") -> "Dataset":
        """A folder that it was not trained on, as far as it has its classes: all images, or those of each split."""
        from capsnet.data.dataset import Dataset
        from capsnet.data.image_folder import Unreadable

        reading, folder = self.network.preprocessing, self._scanned(options)
        whole = replace(reading, crop=None)
        try:
            splits, notes = folder.decoded(whole, tell=say)
        except Unreadable as error:
            folder = folder.without(error.faults)
            if not folder.files:
                raise InputError(f"{folder.root} must hold images that can be read; got none") from None
            splits, notes = folder.decoded(whole, tell=say)
        for note in (*folder.notes, *notes):
            say(f"capsnet: {folder.root}: {note}")
        if recorded is not None:
            for split, use in (("train", "to train"), ("validation", "for validation")):
                used = {line.hash for line in recorded.lines if line.split == split}
                if seen := sum(file.hash in used for file in folder.files):
                    say(f"capsnet: {folder.root}: {seen:,} of {len(folder.files):,} images were used {use}")
        every = splits.get("")  # of a folder that is not divided
        test = every or splits.get("test") or splits.get("validation") or splits["train"]
        validation = every or splits.get("validation")
        tested = next(name for name in ("", "test", "validation", "train") if name in splits)
        shown = {"train": "train" if "train" in splits else tested, "test": tested}
        shown["validation"] = tested if every else "validation"
        files = tuple(file._replace(split=name) for name, split in shown.items() for file in folder.of(split))
        train = splits.get("train", test)
        dataset = Dataset(str(folder.root), self.network.classes, train, test, validation, files=files)
        return dataset if reading.crop is None else dataset.cropped(reading.crop)

    def _scanned(self, options: Config) -> "ImageFolder":
        """A folder's images of the network's classes; of one that numbers them, of the folder's own, if as many."""
        from capsnet.data.image_folder import one_form, scan

        if self._unnamed:
            with suppress(InputError):
                folder = scan(options.data, skip_unreadable=True, data_dir=options.data_dir)
                if len(folder.classes) == len(self.network.classes):
                    return folder
        classes = tuple(map(one_form, self.network.classes))
        return scan(options.data, skip_unreadable=True, classes=classes, data_dir=options.data_dir)

    def _tell_differences(self, dataset: "Dataset", recorded: "Manifest | None") -> None:
        """Say what of the data is no longer as it was when the run began, and what was passed over."""
        from capsnet.data import is_own
        from capsnet.data.manifest import Manifest

        for note in dataset.notes:
            say(f"capsnet: {dataset.name}: {note}")
        if recorded is None:
            if is_own(dataset.name):
                say(f"capsnet: {self.model} has no manifest of its images, so {dataset.name} is divided anew")
            return
        for difference in recorded.differences(Manifest.of(dataset)):
            say(f"capsnet: {dataset.name} is not as it was trained on: {difference}")

    def split(self, dataset: "Dataset", name: str) -> "Split":
        """The split `test`, `validation` or `train` of a data set.

        Raises:
            InputError: there is no validation split.
        """
        split = dataset.shown(name)
        if split is None:
            raise InputError(f"data set {dataset.name} must have a validation split; the run trained on all images")
        return split

    def predictions(self, split: "Split") -> "Predictions":
        """Predictions for a split: those of the run itself, as in its `result.json`, where it kept them."""
        from capsnet.evaluation import predict_split

        found = self.run.predictions(split)
        return predict_split(self.network, split, config=self.config) if found is None else found

    def images(self, files: tuple[str, ...], *, invert: Literal["auto", "yes", "no"] = "auto") -> "Tensor":
        """One's own image files as the network takes them, `float32 [n, channels, height, width]`.

        Raises:
            InputError: a file that is no image.
        """
        import torch

        from capsnet.data.dataset import to_float

        reading = self.network.preprocessing
        return to_float(torch.stack([reading(Path(file), invert=invert).image for file in files]))

    def place(self, name: str, out: str | None, *, suffix: str, overwrite: bool, option: str = "--out") -> Path:
        """Where a figure goes: `out`, or `figures/` of the run, or the working directory.

        Only a figure in its run's own directory is replaced unasked, as the same command made it.

        Raises:
            InputError: the file exists.
        """
        if out is None and self.is_run:
            return self.folder / "figures" / f"{name}.{suffix}"
        path = Path(out) if out else Path(f"{self.folder.name}-{name}.{suffix}")
        _check_free(path, overwrite=overwrite, option=option)
        return path


class WritesFile(ABC):
    """A command with the options --out and --overwrite, whose file is checked before anything is computed."""

    out: str | None
    overwrite: bool

    def run(self, line: str) -> int:
        """Work, unless the file must not be written."""
        if self.out is not None:
            _check_free(Path(self.out), overwrite=self.overwrite)
        return self.work(line)

    @abstractmethod
    def work(self, line: str) -> int:
        """Compute, print and write; `line` is the command as it was typed. Returns the exit code."""


def _check_free(path: Path, *, overwrite: bool, option: str = "--out") -> None:
    """Raise InputError where a file must not be written."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{option} must be a new file, or be given with --overwrite; got {path}")


def _some(names: tuple[str, ...]) -> str:
    """The first names of many."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
