"""Peak memory of a training step in a fresh process: resident on a CPU, what PyTorch has allocated on a GPU."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from capsnet.bench.alone import RoutingAlone
from capsnet.bench.whole import WholeNetwork
from capsnet.config import from_dict

__all__ = ["STEPS", "in_this_process", "peak"]

STEPS = 3  # the first makes Adam's state, the second meets kept buffers
_KINDS: dict[str, type[WholeNetwork] | type[RoutingAlone]] = {
    "WholeNetwork": WholeNetwork,
    "RoutingAlone": RoutingAlone,
}
_STATUS = Path("/proc/self/status")


def peak(subject: WholeNetwork | RoutingAlone) -> dict[str, Any]:
    """Peak memory in MiB of a few steps of `subject` in a fresh process; empty where the system does not tell.

    Returns:
        `added_mib`: peak minus what was there before the first step, with weights and images in memory: so gradients,
        Adam's state, activations and kept buffers. `total_mib`: the peak; on a CPU of the whole process, Python and
        PyTorch's libraries included. Or `memory_error`: why that process failed.
    """
    if subject.device.type == "cpu" and not _STATUS.exists():
        return {}
    recipe = {
        "kind": type(subject).__name__,
        "config": asdict(subject.config),
        "sizes": subject.sizes,
        "threads": subject.threads,
    }
    command = [sys.executable, "-c", "from capsnet.bench import memory; memory.in_this_process()"]
    done = subprocess.run(command, input=json.dumps(recipe), capture_output=True, text=True, check=False)
    if done.returncode:  # such as a process killed for its memory
        return {"memory_error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    told: dict[str, float] = json.loads(done.stdout)
    return told


def in_this_process() -> None:
    """Read what `peak` asks from stdin, measure it here, and print it."""
    recipe = json.load(sys.stdin)
    torch.set_num_threads(recipe["threads"])
    subject = _KINDS[recipe["kind"]](from_dict(recipe["config"], source="capsnet bench"), **recipe["sizes"])
    before = _now(subject.device)
    for _ in range(STEPS):
        subject.step()
    total = _most(subject.device)
    print(json.dumps({"added_mib": total - before, "total_mib": total}))


def _now(device: torch.device) -> float:
    """Memory in use, in MiB; the peak begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _most(device: torch.device) -> float:
    """Peak memory since `_now`, in MiB; getrusage would tell the peak of the parent process where that was higher."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
