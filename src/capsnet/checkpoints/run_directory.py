"""The run directory: what a training writes, how it is read again, and what is refused.

Nothing here unpickles what came from outside: checkpoints are read with `torch.load(weights_only=True)`, which builds
tensors and plain containers only.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from capsnet import config as config_file
from capsnet.checkpoints.model_card import README, Tested, is_ours
from capsnet.checkpoints.pretrained import PRETRAINED
from capsnet.config import Config
from capsnet.data import Split, manifest
from capsnet.data.manifest import Manifest
from capsnet.errors import InputError
from capsnet.evaluation import Predictions
from capsnet.files import locked, read_json, read_text, write_atomically
from capsnet.options.schema import checked, shown

__all__ = ["CHECKPOINT_VERSION", "WRITTEN", "Checkpoint", "Row", "Run", "RunResult"]

CHECKPOINT_VERSION = 1
DRAWN = (
    "class-errors",
    "confusion",
    "couplings",
    "curves",
    "factors",  # the pose probe of runs from before it was called pose
    "gallery",
    "lengths",
    "perturbations",
    "pose",
    "reconstructions",
    "reliability",
)
RESULTS = (
    "result.json",
    "predictions.npz",
    *PRETRAINED,
    README,
    "report.html",
    *(f"figures/{name}.*" for name in DRAWN),
)
"""What is made from the weights that are kept."""
WRITTEN = ("last.ckpt", "metrics.csv", manifest.FILE, "tensorboard/events.out.tfevents.*", *RESULTS)
"""What a run writes beside its config.yaml; `--overwrite` removes these and nothing else."""


class Row(TypedDict):
    """A line of `metrics.csv`, which is an epoch; all lines have the columns of validation, or none has."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_classification_loss: float
    train_reconstruction_loss: float
    train_error_percent: float
    images_per_second: float
    validation_loss: NotRequired[float]
    validation_classification_loss: NotRequired[float]
    validation_reconstruction_loss: NotRequired[float]
    validation_error_percent: NotRequired[float]
    seconds: float


class RunResult(TypedDict):
    """What is read again of `result.json`; it holds more."""

    epochs: int
    kept_epoch: NotRequired[int]
    seconds: float
    selection: NotRequired[str]
    test: Tested
    train_images: int
    validation: NotRequired[Tested | None]


class OptimizerState(TypedDict):
    """The moments of each parameter, by its number; the options of the optimiser are those of the configuration."""

    state: dict[int, dict[str, Tensor]]


class Checkpoint(TypedDict):
    """What `last.ckpt` holds beside its version."""

    config: dict[str, Any]
    train_images: int
    network: dict[str, Tensor]
    optimizer: OptimizerState
    state: dict[str, Any]
    rows: list[Row]
    sums: Tensor
    kernels: NotRequired[str]
    average: NotRequired[dict[str, Tensor]]
    best: NotRequired[dict[str, Tensor]]


class Run:
    """Paths of one run directory, and its files."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config_path = self.directory / "config.yaml"
        self.checkpoint_path = self.directory / "last.ckpt"
        self.metrics_path = self.directory / "metrics.csv"
        self.manifest_path = self.directory / manifest.FILE
        self.result_path = self.directory / "result.json"
        self.predictions_path = self.directory / "predictions.npz"
        self.figures = self.directory / "figures"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config_path.exists() or self.checkpoint_path.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory, which is made if it is not there, for this process.

        The lock is on the directory itself: there is no file to be left behind, and it goes with the process, however
        that ends. Windows and some network drives have no such lock; there nobody is kept out.

        Raises:
            InputError: another process is training here.
        """
        handle: int | None = None
        with contextlib.suppress(OSError):  # of which `create` tells; Windows opens no directory
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.directory, os.O_RDONLY)
        try:
            if handle is not None and not locked(handle, exclusive=True, wait=False):
                raise InputError(f"run directory {self.directory} must be free; another process trains in it")
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def create(self, config: Config, images: Manifest, *, overwrite: bool) -> None:
        """Make the directory and write which images the run uses, then the configuration, with which it has begun.

        The configuration is written without the place: the file also repeats the run elsewhere.

        Raises:
            InputError: there is a run already (and not `overwrite`), other files, or the directory cannot be made.
        """
        self._check_free(overwrite=overwrite)
        self._remove(*WRITTEN)
        write_atomically(self.manifest_path, lambda path: path.write_bytes(images.to_bytes()))
        self.reopen(config)

    def reopen(self, config: Config) -> None:
        """Write the configuration of a run that begins or goes on, and remove what a kill left half-written.

        Results of fewer epochs than the run is now to have are removed: they would pass for its own.

        Raises:
            InputError: the directory is not writable.
        """
        self._remove(".*.partial", "figures/.*.partial")
        if self.config_path.exists() and self.config().epochs != config.epochs:
            self._remove(*RESULTS)
        anywhere = replace(config, out=None, overwrite=False)
        write_atomically(self.config_path, lambda path: config_file.write(anywhere, path))

    def _check_free(self, *, overwrite: bool) -> None:
        """Raise InputError unless a new run may begin here."""
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"out must be a directory; got the file {self.directory}")
        if self.exists() and not overwrite:
            raise InputError(
                f"out directory {self.directory} must be free; it holds a run "
                f"(go on with --resume {self.directory}, replace it with --overwrite, or give another --out)"
            )
        ours = {self.manifest_path, *self.directory.glob(".*.partial")}
        if self.exists():
            self.config()  # a config.yaml of something else is not ours to replace
        elif self.directory.exists() and set(self.directory.iterdir()) - ours:
            raise InputError(f"out directory {self.directory} must be empty or new; it holds other files")

    def _remove(self, *patterns: str) -> None:
        try:
            for pattern in patterns:
                for path in self.directory.glob(pattern):
                    if path.name != README or is_ours(path):
                        path.unlink()
        except OSError as error:
            raise InputError(f"out directory {self.directory} must be writable; got: {error.strerror}") from None

    def manifest(self) -> Manifest | None:
        """Which images the run uses; None of a run from before there were manifests.

        Raises:
            InputError: the file is no manifest.
        """
        return Manifest.read(self.manifest_path)

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            InputError: there is no run here.
        """
        if not self.config_path.exists():
            raise InputError(f"run directory {self.directory} must hold a config.yaml; there is none")
        return config_file.read(self.config_path)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by `state`, whole or not at all.

        Raises:
            InputError: the disk is full or the directory not writable; the old checkpoint is untouched.
        """
        content = io.BytesIO()  # first in memory: writing to a full disk then fails with the system's own words
        torch.save({"version": CHECKPOINT_VERSION, **state}, content)
        write_atomically(self.checkpoint_path, lambda path: path.write_bytes(content.getbuffer()))

    def load_checkpoint(self, *, most: int | None = None) -> Checkpoint:
        """The last checkpoint, on the CPU: of the right form, but not yet known to fit a network.

        Raises:
            InputError: there is none, or it is damaged, of another version or of another form, or holds more than
                `most` bytes.
        """
        path = self.checkpoint_path
        if not path.exists():
            raise InputError(f"run directory {self.directory} must hold a last.ckpt to go on from; there is none")
        what = f"checkpoint {path} must be one that capsnet wrote"
        try:
            if most is not None and path.stat().st_size > most:
                raise InputError(f"checkpoint {path} must hold at most {most:,} bytes for this network; got more")
            _check_archive(path)
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
            reason = "it is damaged" if "weights_only" not in str(error) else "it holds more than tensors and numbers"
            raise InputError(f"{what}; {reason}") from None
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise InputError(f"{what}; it lacks a version")
        if version != CHECKPOINT_VERSION:
            raise InputError(f"checkpoint {path} must be of version {CHECKPOINT_VERSION}; got {shown(version)}")
        return cast(Checkpoint, checked(content, Checkpoint, source=f"checkpoint {path}"))

    def result(self) -> RunResult:
        """The content of `result.json`.

        Raises:
            InputError: there is none, or it is not that of a finished run.
        """
        source = f"file {self.result_path}"
        return cast(RunResult, checked(read_json(self.result_path), RunResult, source=source))

    def metrics(self) -> list[Row]:
        """The rows of `metrics.csv`; none where there is no file.

        Raises:
            InputError: it is not the table that a run writes.
        """
        if not self.metrics_path.is_file():
            return []
        source = f"file {self.metrics_path}"
        try:
            reader = csv.DictReader(read_text(self.metrics_path).splitlines(), strict=True)
            columns, lines = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise InputError(f"{source} must be a table; got: {error}") from None
        if lacking := Row.__required_keys__ - set(columns):
            raise InputError(f"{source} must have the columns of a run; it lacks {', '.join(sorted(lacking))}")
        rows = []
        for number, line in enumerate(lines, 1):
            cells = {name: _number(cell) for name, cell in line.items()}
            for kind in (dict[str, int | float], Row):
                cells = checked(cells, kind, source=f"{source}, epoch {number}")
            rows.append(cast(Row, cells))
        return rows

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write `metrics.csv`, one row an epoch."""

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        if rows:
            write_atomically(self.metrics_path, write)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`."""
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(self.result_path, lambda path: path.write_text(text, encoding="utf-8"))

    def write_predictions(self, found: Predictions, split: Split) -> None:
        """Write `predictions.npz`: the fields of `Predictions`, of which images they are, and of which weights."""
        arrays = {name: tensor.numpy() for name, tensor in found._asdict().items() if tensor is not None}
        content = io.BytesIO()
        np.savez(content, images=np.array(manifest.hash_of(split)), weights=np.array(self._weights()), **arrays)
        write_atomically(self.predictions_path, lambda path: path.write_bytes(content.getbuffer()))

    def _weights(self) -> str:
        """BLAKE2b of the file of weights, 32 hexadecimal digits; empty where there is none."""
        path = self.directory / "model.safetensors"
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.is_file() else ""

    def predictions(self, split: Split) -> Predictions | None:
        """What the run itself predicted for the images of `split`; None of others, or where its weights are others now.

        Raises:
            InputError: the file is not one that capsnet wrote.
        """
        path = self.predictions_path
        if not path.is_file():
            return None
        try:
            _check_archive(path)
            with np.load(path, allow_pickle=False) as arrays:
                weights = str(arrays.get("weights", ""))  # earlier versions did not say whose they are
                if (str(arrays["images"]), weights) != (manifest.hash_of(split), self._weights()):
                    return None
                names = (name for name in arrays.files if name not in ("images", "weights"))
                tensors = {name: torch.from_numpy(arrays[name]) for name in names}
            drawn = tensors.pop("reconstruction_errors", None)
            found = Predictions(**tensors, reconstruction_errors=drawn)
        except Exception:  # a damaged file raises anything from BadZipFile to TypeError
            raise InputError(f"file {path} must be one that capsnet wrote; it is damaged") from None
        if any(len(tensor) != len(split) for tensor in tensors.values()):
            raise InputError(f"file {path} must hold a row for each of {len(split):,} images; it does not")
        return found


def _check_archive(path: Path) -> None:
    """Raise an exception unless it is whole: PyTorch ignores checksums, and unpacks what it itself never packs."""
    with ZipFile(path) as archive:
        if any(part.compress_type for part in archive.infolist()) or archive.testzip():
            raise ValueError("damaged")


def _number(cell: Any) -> Any:
    """The number in a cell of a table; what is none stays as it is."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(cell)
    return cell
