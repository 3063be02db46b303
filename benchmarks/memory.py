"""Peak memory of a training step in a fresh process: resident on a CPU, what PyTorch has allocated on a GPU."""

import json
import subprocess
import sys
from contextlib import suppress
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

    `total_mib` is the peak, on a CPU of the whole process; `added_mib` is without what was there before the first step,
    weights and images among it. Or `memory_error` is why that process failed.
    """
    if workload.device.type == "cpu" and not STATUS.exists():
        return {}
    routing = isinstance(workload, RoutingWorkload)
    recipe = [workload.config.flat(), workload.classes, workload.threads, routing]
    command, root = [sys.executable, "-m", "benchmarks.memory"], Path(__file__).parents[1]
    done = subprocess.run(command, input=json.dumps(recipe), capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:  # such as a process killed for its memory
        return {"memory_error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure() -> None:
    """Read what `peak` asks from stdin, measure it in this process, and print it."""
    config, classes, threads, routing = json.load(sys.stdin)
    torch.set_num_threads(threads)
    kind = RoutingWorkload if routing else TrainingWorkload
    workload = kind(from_dict(config, source="benchmarks.memory"), classes)
    on_gpu = workload.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(workload.device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = torch.cuda.memory_allocated(workload.device) / 2**20 if on_gpu else _resident("VmRSS")
    for _ in range(STEPS):
        workload.step()
    total = torch.cuda.max_memory_allocated(workload.device) / 2**20 if on_gpu else _resident("VmHWM")
    print(json.dumps({"added_mib": total - before, "total_mib": total}))


def _resident(name: str) -> float:
    """MiB from the system; getrusage would give the peak of the parent process where that was higher."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    _measure()
