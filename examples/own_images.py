"""From a folder of photographs to a network in use: every step is one command of capsnet, see docs/own-images.md.

    python examples/own_images.py --out own                  # CIFAR-10 as photographs of ten kinds
    python examples/own_images.py --out own --tiny           # coloured shapes in their place: no data set, a minute
    python examples/own_images.py --out own --study          # and --resize pad, crop and squash compared, twice each

The photographs are CIFAR-10's images cut to 4:3, upright or lying as cameras make them, at 128 x 96 pixels.
Five classes of unequal size are `photos`, the five others are what the network is trained on before it is fine-tuned.
`--record FILE` keeps what was measured, as JSON.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import capsnet
from capsnet import environment

PHOTOS = {"bird": 2500, "cat": 2000, "deer": 1500, "frog": 1000, "horse": 800}
"""Classes of the photographs, and how many there are to train on."""
OTHERS = dict.fromkeys(("airplane", "automobile", "dog", "ship", "truck"), 1000)
"""Classes that the network is trained on before."""
TESTED = 300
"""Photographs of each class that are tested."""
SHAPES = {"disc": 24, "square": 18, "bar": 12}
MORE_SHAPES = dict.fromkeys(("ring", "cross", "corner"), 12)
NETWORK = "--model capsule-head --preset fast --batch-size 32 --balance"
TINY = "--conv-channels 8 --capsule-types 2 --primary-kernel-size 5 --conv-kernel-size 5 --decoder-sizes 16 --balance"


def main() -> None:
    """Write the photographs, run the commands, print what each says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new directory for photographs and runs")
    parser.add_argument("--tiny", action="store_true", help="coloured shapes and a tiny network")
    parser.add_argument("--study", action="store_true", help="compare --resize pad, crop and squash too")
    parser.add_argument("--record", type=Path, help="JSON file for what was measured")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    write = shapes if given.tiny else photographs
    for folder, counts in (
        ("photos", SHAPES if given.tiny else PHOTOS),
        ("others", MORE_SHAPES if given.tiny else OTHERS),
    ):
        write(given.out / folder, counts)
    measured = [run(command, given.out) for command in commands(tiny=given.tiny, study=given.study)]
    if given.record:
        record = {"commands": measured, **environment.describe(torch.device("cpu"))}
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def commands(*, tiny: bool, study: bool) -> Iterator[str]:
    """The steps from the photographs to a network in use."""
    network, epochs = (TINY, (2, 2, 2, 2)) if tiny else (NETWORK, (10, 8, 8, 6))
    yield f"capsnet train --data photos {network} --epochs {epochs[0]} --out scratch"
    yield "capsnet evaluate scratch --out judged"
    yield f"capsnet train --data others {network} --epochs {epochs[1]} --out before"
    yield f"capsnet train --data photos {network} --init-from before --epochs {epochs[2]} --out tuned"
    yield "capsnet evaluate tuned --against scratch"
    yield "capsnet predict tuned photos/test --top 3 --csv"
    yield "capsnet export tuned --to onnx --serve served"
    yield f"python served/serve.py photos/test/{'bar' if tiny else 'cat'}/0.jpg"
    for seed in (0, 1) if study else ():
        for resize in ("pad", "crop", "squash"):
            options = f"--resize {resize} --seed {seed} --epochs {epochs[3]}"
            yield f"capsnet train --data photos {network} {options} --no-report --out {resize}-{seed}"


def run(command: str, place: Path) -> dict[str, Any]:
    """Run a command in a directory, say so, and tell how long it took and what its run measured."""
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    program = [sys.executable, "-m", "capsnet"] if words[0] == "capsnet" else [sys.executable]
    begun = time.monotonic()
    done = subprocess.run([*program, *words[1:]], cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - begun
    lines = done.stdout.splitlines()
    print("\n".join([*lines[:12], *["..."] * (len(lines) > 12)]), flush=True)
    result: dict[str, Any] = {"command": command, "seconds": round(seconds, 1)}
    if words[1] == "train":
        told = json.loads((place / words[-1] / "result.json").read_text(encoding="utf-8"))
        kept = ("train_images", "epochs", "kept_epoch", "selection", "fine_tuned_from")
        figures = ("error_percent", "total", "wrong", "f1_macro")
        test = {name: value for name, value in told["test"].items() if name in figures}
        result |= {"test": test, **{name: told[name] for name in kept}}
    return result


def photographs(folder: Path, counts: dict[str, int]) -> None:
    """CIFAR-10's images of some classes as JPEG files below train/ and test/: for each class so many to train on."""
    dataset = capsnet.data.load("cifar10")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        images, labels = getattr(dataset, split).images, getattr(dataset, split).labels
        for name, count in counts.items():
            place = folder / split / name
            place.mkdir(parents=True)
            chosen = (labels == dataset.classes.index(name)).nonzero().flatten()
            for number, k in enumerate(chosen[: count if split == "train" else TESTED].tolist()):
                whole = Image.fromarray(images[k].permute(1, 2, 0).numpy())
                start = int(draw.integers(0, 9))  # 24 of 32 rows or columns
                upright = bool(draw.integers(0, 2))
                box = (start, 0, start + 24, 32) if upright else (0, start, 32, start + 24)
                size = (96, 128) if upright else (128, 96)
                photograph = whole.resize(size, Image.Resampling.BICUBIC, box)
                photograph.save(place / f"{number}.jpg", quality=92)


def shapes(folder: Path, counts: dict[str, int]) -> None:
    """Coloured shapes in place of photographs, half as many to test."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, count in counts.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count if split == "train" else count // 2):
                width, height = (16, 12) if draw.integers(0, 2) else (12, 16)
                image = Image.new("RGB", (width, height), tuple(draw.integers(0, 90, 3).tolist()))
                pen, colour = ImageDraw.Draw(image), tuple(draw.integers(130, 256, 3).tolist())
                x, y = (int(draw.integers(1, side - 8)) for side in (width, height))
                box = [x, y, x + 7, y + 7]
                if name in ("disc", "ring"):
                    pen.ellipse(box, fill=colour if name == "disc" else None, outline=colour)
                elif name == "square":
                    pen.rectangle(box, fill=colour)
                elif name == "bar":
                    pen.rectangle([x, y + 3, x + 7, y + 4], fill=colour)
                else:
                    middle = 3 if name == "cross" else 0
                    pen.rectangle([x, y + middle, x + 7, y + middle + 1], fill=colour)
                    pen.rectangle([x + middle, y, x + middle + 1, y + 7], fill=colour)
                image.save(place / f"{number}.jpg", quality=92)


if __name__ == "__main__":
    main()
