"""What the tests of training share: a few coloured images, a network of a few thousand weights, a run in a moment."""

import csv
import os
import shlex
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from capsnet.cli import main
from capsnet.config import Config
from capsnet.data import Dataset, Split
from capsnet.data.augment import augment
from capsnet.data.photo import Frame
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import Interrupted
from capsnet.training import batches
from capsnet.training.fit import Result, fit, resume

SIZES: dict[str, Any] = {
    "conv_channels": 8,
    "conv_kernel_size": 5,
    "capsule_types": 2,
    "primary_dim": 4,
    "primary_kernel_size": 5,
    "class_dim": 4,
    "decoder_sizes": (16,),
}
REAL = Path(os.environ.get("CAPSNET_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()
"""Where the real data sets are, if they are; told by the reason of a skipped test."""
KEPT = "images kept at 12 x 13 pixels (--image-size changes it)"
"""What a training on `photos` says first."""
TIMES = ("images_per_second", "seconds")  # columns of metrics.csv that measure the machine


def reading(shape: tuple[int, int, int], frame: Frame | None = None, **options: Any) -> Preprocessing:
    """How files become images of a shape, framed if a frame is given."""
    channels, height, width = shape
    return Preprocessing(height, width, channels, framing="digits" if frame else "off", frame=frame, **options)


def photos(root: Path, *, count: int = 30, size: tuple[int, int] = (12, 13), classes: str = "abc") -> Path:
    """A folder of PNG files for each class, told apart by colour; `size` is height and width."""
    draw = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 60, (*size, 3), dtype=np.uint8)
            pixels[..., k % 3] += 150
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def pairs(train: int = 60, test: int = 15, *, shift: int = 1) -> Dataset:
    """Images of 12 x 13 pixels, to be paired, of 4 classes: a bright bar at one of four edges of dark noise."""
    generator = torch.Generator().manual_seed(5)
    whole, first, last = slice(2, -2), slice(2, 4), slice(-4, -2)
    bars = (first, whole), (last, whole), (whole, first), (whole, last)

    def singles(count: int) -> Split:
        images, labels = torch.zeros(count, 1, 12, 13, dtype=torch.uint8), torch.arange(count) % 4
        images[..., 2:-2, 2:-2] = torch.randint(1, 60, (count, 1, 8, 9), dtype=torch.uint8, generator=generator)
        for k, (rows, columns) in enumerate(bars):
            images[:, :, rows, columns] += (180 * (labels == k)).to(torch.uint8).view(-1, 1, 1, 1)
        return Split(images, labels)

    return Dataset(
        "pairs",
        tuple("tblr"),
        singles(train),
        singles(test).paired(shift=shift, seed=0),
        shift=shift,
        objects_per_image=2,
    )


def tiny(data: Path, **changes: Any) -> Config:
    """A run of 2 epochs of 5 steps on `photos`; the last batch is smaller."""
    fixed = {"data": str(data), "augment": "paper", "epochs": 2, "batch_size": 16, "precision": "32", **SIZES}
    return Config.of(**{**fixed, **changes})


def options(config: Config) -> list[str]:
    """The same as options of `capsnet train`."""
    sizes = [(name, " ".join(map(str, value)) if isinstance(value, tuple) else value) for name, value in SIZES.items()]
    others = [(name, getattr(config, name)) for name in ("data", "augment", "epochs", "batch_size", "precision")]
    return [word for name, value in sizes + others for word in (f"--{name.replace('_', '-')}", *str(value).split())]


def weights(run: Path | str) -> dict[str, Tensor]:
    return load_file(Path(run) / "model.safetensors")


def same_weights(one: Path | str, other: Path | str) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics(run: Path | str) -> list[dict[str, str]]:
    """Rows of metrics.csv without the columns that measure the machine."""
    with (Path(run) / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[], object]) -> None:
    """Call `what` in the middle of the training step `number`, counted from 1."""
    count = [0]

    def augmented(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            what()
        return augment(*arguments)

    monkeypatch.setattr(batches, "augment", augmented)


def resumed(config: Config, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A training that is stopped in its third step, goes on, and must end as the one that is returned, which is not."""
    whole = fit(config.changed(out="whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(config.changed(out="parts"))
    resume("parts")
    assert same_weights("whole", "parts")
    assert metrics("whole") == metrics("parts")
    return whole


def files(directory: Path | str) -> set[str]:
    return {str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()}


def in_threads(tasks: list[Callable[[], object]]) -> None:
    """Run each task in a thread of its own, all at once; raise what one of them raises."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        for done in [threads.submit(task) for task in tasks]:
            done.result()


def typed(capture: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command `capsnet LINE`."""
    return main(shlex.split(line)), *capture.readouterr()
