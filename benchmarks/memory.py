"""Peak memory of a training step in a fresh process: resident on a CPU, what PyTorch has allocated on a GPU."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.routing_workload import RoutingWorkload
from benchmarks.training_workload import TrainingWorkload
from capsnet.config import from_dict

__all__ = ["peak"]

STEPS = 3  # the first makes Adam's state, the second meets kept buffers
STATUS = Path("/proc/self/status")


def peak(workload: TrainingWorkload | RoutingWorkload) -> dict[str, Any]:
    """Peak memory in MiB of a few steps in a fresh process; empty where the system does not say.

    Returns:
        `added_mib`: peak minus the memory before the first step, with weights and images: so gradients, Adam's state,
        activations and kept buffers. `total_mib`: the peak; on a CPU of the whole process, Python and PyTorch's
        libraries included. Or `memory_error`: why that process failed.
    """
    if workload.device.type == "cpu" and not STATUS.exists():
        return {}
    recipe = {
        "routing": isinstance(workload, RoutingWorkload),
        "config": asdict(workload.config),
        "sizes": workload.sizes,
        "threads": workload.threads,
    }
    command, root = [sys.executable, "-m", "benchmarks.memory"], Path(__file__).parents[1]
    done = subprocess.run(command, input=json.dumps(recipe), capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:  # such as a process killed for its memory
        return {"memory_error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure() -> None:
    """Read what `peak` asks from stdin, measure it in this process, and print it."""
    recipe = json.load(sys.stdin)
    torch.set_num_threads(recipe["threads"])
    kind = RoutingWorkload if recipe["routing"] else TrainingWorkload
    workload = kind(from_dict(recipe["config"], source="benchmarks.memory"), **recipe["sizes"])
    before = _now(workload.device)
    for _ in range(STEPS):
        workload.step()
    total = _most(workload.device)
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
    """Peak memory since `_now`, in MiB; getrusage would give the peak of the parent process where that was higher."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    _measure()
