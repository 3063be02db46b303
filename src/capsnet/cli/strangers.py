"""The verb `strangers`."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capsnet.cli.parsing import parse
from capsnet.cli.printing import say, show, show_json
from capsnet.cli.subject import Model, Subject
from capsnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.data.preprocessing import Preprocessing

__all__ = ["run"]

NOISE_IMAGES = 10_000
NOISE_SEED = 0


@dataclass(frozen=True)
class _Strangers:
    """How well images that are none of the known classes are told by their bad reconstruction (DARCCC, 2018).

    For each set of strangers: AUROC against the test images (0.5 is guessing, 1 perfect), and the share above the
    threshold that is stored with the weights, beside the share of test images above it (false alarms).

    Examples:
      capsnet strangers capsnet-mnist
      capsnet strangers runs/mine --against path/to/images noise --json
    """

    model: Model
    """Run directory, folder with weights, or the name of weights that come with the package."""
    against: tuple[str, ...] = ("kmnist", "fashion-mnist", "noise")
    """Test images of data sets, folders of images, or noise: every pixel uniform."""
    data: str | None = None
    """The known images; default: those of the network."""
    data_dir: str | None = None
    """Where downloaded files are."""
    out: str | None = None
    """Write the record as JSON to this file."""
    overwrite: bool = False
    """Replace the file --out."""
    json: bool = False
    """Print as JSON."""


def run(arguments: list[str]) -> int:
    """Measure AUROC and shares, print a table or JSON."""
    command = parse(_Strangers, arguments, prog="capsnet strangers")
    if not command.against:
        raise InputError("--against must be at least one data set, folder or noise; got none")
    import torch

    from capsnet import runs
    from capsnet.analysis.drawing import decoder_of
    from capsnet.analysis.strangers import auroc, reconstruction_errors
    from capsnet.evaluation import predict_split

    subject = Subject(command.model)
    network, _ = decoder_of(subject.network)
    if network.image_shape[0] not in (1, 3):
        raise InputError(
            f"{command.model} must be of images in grey or colour; its own have {network.image_shape[0]} channels"
        )
    place = subject.place("strangers", command.out, suffix="json", overwrite=command.overwrite) if command.out else None
    dataset = subject.dataset(command.data, command.data_dir)
    reading = subject.card.reading(network.image_shape)
    strange = {name: _strangers(name, reading, command.data_dir) for name in command.against}
    known, threshold = predict_split(network, dataset.test).reconstruction_errors, subject.card.threshold
    assert known is not None
    rows: list[dict[str, Any]] = []
    for name, images in strange.items():
        errors = torch.cat([reconstruction_errors(network, part.float() / 255) for part in torch.split(images, 256)])
        rows.append(
            {
                "strangers": name,
                "images": len(images),
                "auroc": auroc(known, errors),
                "mean_error": float(errors.mean()),
                "flagged": _share(errors, threshold.value) if threshold else None,
            }
        )
    record = {
        "command": shlex.join(["capsnet", "strangers", *arguments]),
        "score": "sum of squared differences between image and reconstruction from the winning capsule",
        "known": {
            "data": dataset.name,
            "split": "test",
            "images": len(known),
            "mean_error": float(known.mean()),
            "false_alarms": _share(known, threshold.value) if threshold else None,
        },
        "threshold": threshold.to_dict() if threshold else None,
        "strangers": rows,
        **runs.environment(torch.device("cpu")),
    }
    if place:
        text = json.dumps(record, indent=2) + "\n"
        runs.write_atomically(place, lambda path: path.write_text(text, encoding="utf-8"))
    if command.json:
        show_json(record)
        return 0
    _print(record)
    if not threshold:
        say(f"capsnet strangers: {command.model} has no stored threshold, so nothing is flagged")
    if place:
        show(f"record: {place}")
    return 0


def _strangers(name: str, reading: "Preprocessing", data_dir: str | None) -> "Tensor":
    """Images of no known class, `uint8`, as the network sees them."""
    import torch

    from capsnet.data import available, is_folder, load, load_split

    channels, height, width = reading.image_shape
    if name == "noise":
        generator = torch.Generator().manual_seed(NOISE_SEED)
        return torch.randint(0, 256, (NOISE_IMAGES, channels, height, width), dtype=torch.uint8, generator=generator)
    if name not in available() and not is_folder(name):
        raise InputError(f"--against must be noise, a folder, or among {', '.join(available())}; got {name!r}")
    if is_folder(name):
        return _of_files(Path(name).expanduser(), reading)
    size = f"{height}x{width}"
    if name == "strokes":
        return load(name, image_size=size, channels=channels).test.images
    return load_split(name, "test", data_dir=data_dir, image_size=size, channels=channels).images


def _of_files(folder: Path, reading: "Preprocessing") -> "Tensor":
    """All images in a folder and below, read as the network's own are."""
    import torch

    from capsnet.data.image_folder import image_files

    files, notes = image_files(folder)
    if not files:
        raise InputError(f"--against must be a folder of images; got {folder}, which holds none")
    for note in notes:
        say(f"capsnet strangers: {folder}: {note}")
    return torch.stack([reading(file).image for file in files])


def _share(errors: "Tensor", limit: float) -> float:
    return float((errors > limit).double().mean())


def _print(record: dict[str, Any]) -> None:
    known, threshold = record["known"], record["threshold"]
    show(f"known: {known['images']:,} test images of {known['data']}, mean error {known['mean_error']:.2f}")
    if threshold:
        show(
            f"threshold: {threshold['value']:.2f}, exceeded by {100 * threshold['false_alarm_rate']:g} % of "
            f"{threshold['images']:,} {threshold['split']} images, and by {100 * known['false_alarms']:.2f} % of the "
            "test images"
        )
    show(f"{'strangers':20}  images   AUROC  mean error  flagged")
    for row in record["strangers"]:
        flagged = "-" if row["flagged"] is None else f"{100 * row['flagged']:.2f} %"
        show(f"{row['strangers']:20}  {row['images']:6,}  {row['auroc']:.4f}  {row['mean_error']:10.2f}  {flagged:>8}")
