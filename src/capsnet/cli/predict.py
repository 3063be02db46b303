"""The verb `predict`."""

import csv
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from capsnet.cli.parsing import BatchSize, Device, Model, Range
from capsnet.cli.printing import say, show, show_json
from capsnet.cli.trained_model import TrainedModel
from capsnet.errors import InputError
from capsnet.files import visible

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.prediction import Prediction

__all__ = ["Predict"]


@dataclass(frozen=True)
class Predict:
    """Classify image files: class, presence (length of its capsule), runner-up, reconstruction error.

    Images of any size, grey or colour, are preprocessed as the network's training images were; every further change is
    reported. A network of digits framed as in MNIST finds the digit on a photograph, dark on light or light on dark.
    Images with a reconstruction error above the network's threshold are marked as out of distribution. MODEL may also
    be an ONNX or PT2 file of `capsnet export`, which tells its own preprocessing.

    Examples:
      capsnet predict capsnet-mnist photo-of-a-digit.jpg
      capsnet predict runs/mine images/ --csv > predictions.csv
      capsnet predict mine.onnx images/
      cat digit.png | capsnet predict capsnet-mnist - --json
    """

    model: Model
    files: Positional[Annotated[tuple[str, ...], arg(metavar="FILES")]]
    """Image files, folders of them (with sub-folders), or - for one image from standard input."""
    framing: Literal["off", "digits"] | None = None
    """digits: find the ink, scale and centre it as in MNIST, unless the image has the network's size; default: that of
    the network."""
    invert: Literal["auto", "yes", "no"] = "auto"
    """Swap dark and light. auto: with framing digits, if the background is the opposite of the training images'."""
    top: Annotated[int | None, Range(1, 10**6)] = None
    """Print this many classes of the largest presence, and theirs."""
    scores: bool = False
    """Print the presence of every class."""
    save_reconstructions: str | None = None
    """Write each image as the network saw it beside its reconstruction to this directory."""
    overwrite: bool = False
    """Replace files in that directory."""
    batch_size: BatchSize = 64
    """Images per batch; affects only memory and speed."""
    device: Device = "auto"
    json: bool = False
    """Print a JSON list."""
    csv: bool = False
    """Print comma-separated values."""

    def run(self, line: str) -> int:
        """Predict, print a table; returns 2 if a file is no readable image (the others are predicted all the same)."""
        if self.json and self.csv:
            raise InputError("--json and --csv must not be given both; got both")
        if not self.files:
            raise InputError("FILES must be image files, folders or -; got none")
        names, passed = _names(self.files)
        for note in passed:
            say(f"capsnet predict: {note}")
        from capsnet import devices, memory
        from capsnet.analysis.reconstruction import decoder_of
        from capsnet.checkpoints.exported import ExportedNetwork
        from capsnet.config import Config
        from capsnet.prediction import Prediction, predict

        trained = TrainedModel(self.model, exported=True)
        exported = isinstance(trained.network, ExportedNetwork)
        if self.save_reconstructions:
            if not (isinstance(trained.network, ExportedNetwork) and trained.network.reconstructs):
                decoder_of(trained.network)
            places = _places(names, Path(self.save_reconstructions), overwrite=self.overwrite)
        if exported and self.device not in ("auto", "cpu"):
            raise InputError(f"--device must be cpu for an exported file; got {self.device}")
        device = devices.resolve_device(Config(device="cpu" if exported else self.device))
        sources = ((name, sys.stdin.buffer.read() if name == "-" else Path(name)) for name in names)
        precision = "32" if exported else trained.precision(device)
        batch_size = min(self.batch_size, len(names))
        if not exported:
            memory.check_inference(trained.network, batch_size, device, task="prediction", precision=precision)
        network = trained.network.to(device)
        predictions = predict(
            network,
            sources,
            card=trained.card,
            framing=self.framing,
            invert=self.invert,
            batch_size=batch_size,
            precision=precision,
        )
        write = _Writer(self, width=_width(names), label=_width(network.classes), classes=len(network.classes))
        faults = 0
        for number, found in enumerate(predictions):
            if not isinstance(found, Prediction):
                faults += 1
                say(f"capsnet predict: error: {found}")
                continue
            write(found)
            if self.save_reconstructions:
                assert found.reconstruction is not None
                _save(found.image, found.reconstruction, places[number])
        write.close()
        return 2 if faults else 0


class _Writer:
    """Prints predictions as they come; all JSON comes at the end."""

    def __init__(self, command: Predict, *, width: int, label: int, classes: int) -> None:
        self.command, self.rows, self.begun, self.ood = command, list[dict[str, Any]](), False, False
        self.width, self.label, self.longest = min(width, 60), max(5, min(label, 30)), min(label, 30)
        self.others = min(classes, classes if command.scores else command.top or 2) - 1  # beside the first

    def __call__(self, found: "Prediction") -> None:
        """Print one prediction."""
        row = found.to_dict()
        if self.command.json:
            if self.command.top:
                row["top"] = [{"class": name, "presence": score} for name, score in found.top(self.command.top)]
            if self.command.scores:
                row["scores"] = dict(found.scores)
            self.rows.append(row)
        elif self.command.csv:
            for place, (name, score) in enumerate(found.top(self.command.top or 0), 1):
                row |= {f"top_{place}": name, f"top_{place}_presence": score}
            row |= {f"presence of {name}": score for name, score in found.scores.items() if self.command.scores}
            if sys.stdout.isatty():
                row = {name: visible(value) if isinstance(value, str) else value for name, value in row.items()}
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            if not self.begun:
                writer.writeheader()
            writer.writerow(row)
        else:
            if not self.begun:
                others = "runner-up" if self.others == 1 else "runners-up"
                show(self._row("file", "class", "presence", others, "reconstruction error", "notes"))
            self._line(found)
        self.begun = True

    def _line(self, found: "Prediction") -> None:
        self.ood |= bool(found.ood)
        marks = {"OOD?": found.ood, "inverted": found.inverted, "centred and scaled": found.framed}
        notes = [*(mark for mark, is_so in marks.items() if is_so), *found.notes]
        error = "-" if found.error is None else f"{found.error:.1f}"
        others = found.top(self.others + 1)[1:] or [(found.runner_up, found.runner_up_presence)] * bool(self.others)
        listed = ", ".join(f"{visible(name)} {score:.2f}" for name, score in others)
        name, label = visible(found.name), visible(found.label)
        show(self._row(name, label, f"{found.presence:.2f}", listed, error, ", ".join(notes)))

    def _row(self, name: str, label: str, presence: str, others: str, error: str, notes: str) -> str:
        width = max(10, self.others * (self.longest + 7) - 2)
        start = f"{name:{self.width}}  {label:{self.label}}  {presence:>8}  {others:{width}}"
        return f"{start}  {error:>20}  {notes}".rstrip()

    def close(self) -> None:
        """Print what comes at the end."""
        if self.command.json:
            show_json(self.rows)
        elif self.ood:
            show("OOD?: out of distribution: the reconstruction error is above the threshold of the network")


def _width(names: Iterable[str]) -> int:
    return max(len(visible(name)) for name in names)


def _names(files: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The files, and the images in folders and below, in natural order; and what was passed over in folders."""
    from capsnet.data.image_folder import image_files

    if files.count("-") > 1:
        raise InputError("- must be given once at most, for the one image on standard input; got it twice")
    names, passed = list[str](), list[str]()
    for file in files:
        path = Path(file)
        if path.is_dir():
            found, notes = image_files(path)
            passed += [f"{file}: {note}" for note in notes]
            if not found:
                raise InputError(f"folder {file} must hold images; got none")
            names += map(str, found)
        elif file == "-" or path.is_file():
            names.append(file)
        else:
            raise InputError(f"FILES must be image files, folders or -; got {file}, which does not exist")
    return names, passed


def _places(names: list[str], directory: Path, *, overwrite: bool) -> list[Path]:
    """A file for each reconstruction: the image's name, with a number where two are called alike."""
    places: list[Path] = []
    taken: set[str] = set()
    for name in names:
        stem = "stdin" if name == "-" else Path(name).stem
        number, free = 2, stem
        while free in taken:
            free, number = f"{stem}-{number}", number + 1
        taken.add(free)
        places.append(directory / f"{free}.png")
    for path in places:
        if path.exists() and not overwrite:
            raise InputError(f"--save-reconstructions must not replace files without --overwrite; got {path}")
    return places


def _save(image: "Tensor", reconstruction: "Tensor", path: Path) -> None:
    """Both side by side, as a PNG file."""
    import torch

    from capsnet import plots
    from capsnet.files import write_atomically

    both = plots.picture(torch.stack([image, reconstruction])[None])
    write_atomically(path, lambda place: both.save(place, format="PNG"))
