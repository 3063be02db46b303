"""Training steps and inference beside public PyTorch implementations, in turn in one process.

    python -m benchmarks.peers FOLDER [FOLDER ...] --out results/bench/peers.json

Each FOLDER is a clone of one of `PEERS`; nothing of theirs is here. Their networks are built with their own defaults
for MNIST and trained by their own losses and Adam, on random images in memory: what is timed is a step, and a forward
without gradients. capsnet is compared with float64 first (`benchmarks.correctness`), and is timed with its C library,
without it, and as one would write it down plainly.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.record import check_free, write
from benchmarks.timing import Spread, Task, interleaved, timed
from benchmarks.training_workload import TrainingWorkload
from capsnet import environment
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.kernels import native
from capsnet.models import evaluation_mode

__all__ = ["PEERS", "Peer", "main"]

CPU = torch.device("cpu")
STUBS = ("torchvision", "torchvision.transforms", "torchvision.datasets", "torchvision.utils")
"""What some import for their data and figures, which are not timed."""


@dataclass(frozen=True)
class Peer:
    """A network of somebody else, with its loss.

    Attributes:
        network: trained.
        loss: of images and labels, to be differentiated.
        scores: of images.
    """

    network: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor], Tensor]


def _danielhavir() -> Peer:
    from loss import CapsuleLoss  # type: ignore[import-not-found]
    from model import CapsuleNetwork  # type: ignore[import-not-found]

    network = CapsuleNetwork((1, 28, 28), 256, 8, 10, 16, 3, CPU)
    criterion = CapsuleLoss(loss_lambda=0.5, recon_loss_scale=5e-4)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        lengths, drawn = network(images)
        return torch.as_tensor(criterion(lengths, torch.eye(10)[labels], images, drawn))

    return Peer(network, loss, lambda images: network(images)[0])


def _cedrickchee() -> Peer:
    from model import Net

    network = Net(1, 256, 8, 1152, 10, 16, 3, True, 0.0005, 28, 28, False)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return torch.as_tensor(network.loss(images, network(images), torch.eye(10)[labels])[0])

    return Peer(network, loss, lambda images: network(images).norm(dim=2))


def _xifengguo() -> Peer:
    from capsulenet import CapsuleNet, caps_loss  # type: ignore[import-not-found]

    network = CapsuleNet((1, 28, 28), 10, 3)

    no_cuda = patch.object(Tensor, "cuda", lambda self, *_, **__: self)  # which this one always calls

    @no_cuda
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        present = torch.eye(10)[labels]
        lengths, drawn = network(images, present)
        return torch.as_tensor(caps_loss(present, lengths, images, drawn, 0.0005 * 784))

    return Peer(network, loss, no_cuda(lambda images: network(images)[0]))


PEERS: dict[str, tuple[str, Callable[[], Peer]]] = {
    "danielhavir/capsule-network": ("trainer.py", _danielhavir),
    "cedrickchee/capsule-net-pytorch": ("conv_layer.py", _cedrickchee),
    "XifengGuo/CapsNet-Pytorch": ("capsulelayers.py", _xifengguo),
}
"""By name on GitHub: a file that only this one has, and how its network is made."""


def main(arguments: list[str]) -> int:
    """Measure and write the record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=str(__doc__).splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a clone of one of the known ones")
    parser.add_argument("--out", type=Path, required=True, help="the record")
    parser.add_argument("--overwrite", action="store_true", help="replace the record")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step and of an inference")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each number")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's")
    given = parser.parse_args(arguments)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command capsnet does, and for all of them alike
    try:
        for name in ("batch_size", "repeats", "threads"):
            if getattr(given, name) is not None and getattr(given, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(given, name)}")
        check_free(given.out, overwrite=given.overwrite)
        named = {name_of(folder): folder for folder in given.folders}
        command = shlex.join(["python", "-m", "benchmarks.peers", *arguments])
        record = measure(named, batch_size=given.batch_size, repeats=given.repeats, threads=given.threads)
        write({"command": command, **record}, given.out, overwrite=given.overwrite)
    except InputError as error:
        print(f"benchmarks.peers: error: {error}", file=sys.stderr)
        return 2
    for row in record["rows"]:
        print(f"{row['section']:10} {row['variant']:34} {row['median']:9,.1f} ms  {row['ratio']:5.2f} of capsnet")
    return 0


def name_of(folder: Path) -> str:
    """Which of `PEERS` lies in a folder.

    Raises:
        InputError: none of them.
    """
    for name, (file, _) in PEERS.items():
        if (folder / file).is_file():
            return name
    raise InputError(f"folder {folder} must be a clone of {', '.join(PEERS)}; it is of none")


def measure(
    folders: Mapping[str, Path], *, batch_size: int, repeats: int, threads: int | None = None
) -> dict[str, Any]:
    """The record of capsnet, three ways, and of each peer: a row for each of them and section, the first capsnet's."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = torch.rand(batch_size, 1, 28, 28), torch.randint(10, (batch_size,))
    config = Config(device="cpu", precision="32", batch_size=batch_size)
    plain = config.changed(routing_kernel="plain", convolution="direct")
    ways = {"capsnet": (config, "auto"), "capsnet without C": (config, "off"), "capsnet, plainly": (plain, "off")}
    tasks: dict[str, dict[str, Task]] = {"step": {}, "inference": {}}
    checked, resolved = [], {}
    for label, (options, choice) in ways.items():
        native_choice = patch.dict(os.environ, CAPSNET_NATIVE=choice)
        with native_choice:
            whole = TrainingWorkload(options, 10, label=label)
            checked.append({"name": label, **asdict(whole.check())})
            resolved[label] = {**whole.resolved, "CPU": native.status()}
        tasks["step"][label] = native_choice(whole.task())
        tasks["inference"][label] = native_choice(whole.inference(batch_size))
    commits = {}
    for name, folder in folders.items():
        peer = _imported(name, folder)
        commits[name] = _commit(folder)
        step, forward = _step(peer, images, labels), _forward(peer, images)
        tasks["step"][name], tasks["inference"][name] = timed(step, CPU), timed(forward, CPU)
    rows = []
    for section, by_name in tasks.items():
        samples = interleaved(list(by_name.values()), repeats)
        spreads = [Spread.of([1e3 * seconds for seconds in sample[""]]) for sample in samples]
        for name, spread in zip(by_name, spreads, strict=True):
            ratio = spread.median / spreads[0].median
            rows.append({"section": section, "variant": name, "unit": "ms", **asdict(spread), "ratio": ratio})
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment.describe(CPU),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "batch_size": batch_size,
        "peers": commits,
        "resolved": resolved,
        "checked": checked,
        "rows": rows,
    }


def _step(peer: Peer, images: Tensor, labels: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.Adam(peer.network.parameters(), lr=0.001)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(peer.loss(images, labels))
        optimizer.step()

    return step


def _forward(peer: Peer, images: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with evaluation_mode(peer.network), torch.no_grad():
            return peer.scores(images)

    return forward


def _imported(name: str, folder: Path) -> Peer:
    """The network of a clone; its modules are forgotten, as others have such names too."""
    before = set(sys.modules)
    for stub in STUBS:
        if stub not in sys.modules:
            sys.modules[stub] = module = ModuleType(stub)
            module.__dict__.update(transforms=None, datasets=None, utils=None)
    sys.path.insert(0, str(folder.resolve()))
    try:
        made = PEERS[name][1]()
        made.scores(torch.rand(1, 1, 28, 28))
    finally:
        sys.path.remove(str(folder.resolve()))
        for module_name in set(sys.modules) - before:
            if module_name in STUBS or Path(getattr(sys.modules[module_name], "__file__", None) or "/").is_relative_to(
                folder.resolve()
            ):
                del sys.modules[module_name]
    return made


def _commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
