"""What a run runs on: device, precision, processes, the memory that is free there; and the signals that stop it."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.models import Network

if sys.platform != "win32":
    import resource

__all__ = [
    "Free",
    "Launch",
    "first_process",
    "free",
    "launch",
    "make_fabric",
    "resident",
    "resolve_device",
    "resolve_precision",
    "shutdown",
    "signals",
]

ROOT = Path("/")
"""Where the system's `proc` and `sys` are."""

for _talker in ("lightning_fabric.utilities.rank_zero", "lightning_fabric.utilities.distributed"):
    logging.getLogger(_talker).setLevel(logging.WARNING)  # they announce the precision and every process


def resolve_device(config: Config) -> torch.device:
    """The kind of device that `config` means on this machine.

    Raises:
        InputError: `cuda` or `mps` where there is none, or more devices than there are (processes than cores, on a
            CPU).
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps must have an Apple GPU and a PyTorch that was built for it; found none")
    if config.device == "cuda" and not gpus:
        raise InputError("device cuda must have a CUDA GPU and a CUDA build of PyTorch; found none")
    kind = config.device
    if kind == "auto":  # mps is never chosen: nothing here was run on one
        kind = "cuda" if gpus else "cpu"
    cores = max(2, os.cpu_count() or 1)  # two processes can be tried anywhere
    most, what = {"mps": (1, "GPU"), "cuda": (gpus, "GPUs"), "cpu": (cores, "CPU cores")}[kind]
    if config.devices > most:
        raise InputError(f"devices must be at most the {most} {what} of this machine; got {config.devices}")
    return torch.device(kind)


class Launch(NamedTuple):
    """How the processes of a run are started."""

    by: str  # the program that started them, `torchrun` or `srun`; empty where Fabric is to
    rank: int  # of this process among all
    world_size: int  # number of processes
    here: int  # of them on this machine


def launch(devices: int = 1) -> Launch:
    """The processes of a run, as Fabric's own cluster environments see them; else `devices` on this machine, to start.

    Raises:
        InputError: another number than was started; or SLURM, which starts several, does not say how many on each
            machine.
    """
    if TorchElasticEnvironment.detect():
        by, here = "torchrun", int(os.environ["LOCAL_WORLD_SIZE"])
        started: ClusterEnvironment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        by, here = "srun", int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        try:
            started = SLURMEnvironment(auto_requeue=False)
        except RuntimeError:
            raise InputError(
                "srun must be given --ntasks-per-node, which says how many processes each machine has; got --ntasks "
                f"{os.environ['SLURM_NTASKS']}"
            ) from None
    else:
        return Launch("", int(os.environ.get("LOCAL_RANK", "0")), devices, devices)
    if devices not in (1, here):
        raise InputError(f"devices must be left out under {by}, which started {here} here; got {devices}")
    return Launch(by, started.global_rank(), started.world_size(), here)


def first_process() -> bool:
    """Whether this process is the one that writes and speaks: the first of all."""
    return launch().rank == 0


def resolve_precision(config: Config, device: torch.device, network: Network) -> str:
    """What `precision` means on `device`: `32` or `bf16`.

    `auto` is `bf16` where the hardware multiplies it natively, but `32` where the network's convolutions take the
    Winograd convolutions on a CPU, which is faster still, and on `mps`.

    Raises:
        InputError: `bf16` on `mps`.
    """
    if device.type == "mps":
        if config.precision == "bf16":
            raise InputError("precision must be 32 or auto on device mps; got bf16")
        return "32"
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if network.kernels(device, "32").get("convolution") == "winograd":
        return "32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "32"


def make_fabric(config: Config, device: torch.device, precision: str) -> Fabric:
    """The engine for the processes of `launch(config.devices)`; not yet launched."""
    processes = launch(config.devices)
    return Fabric(
        accelerator=device.type,
        devices=processes.here,
        num_nodes=max(1, processes.world_size // processes.here),
        strategy="ddp" if processes.world_size > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )


@contextmanager
def signals() -> Iterator[list[int]]:
    """Record SIGINT, SIGTERM and SIGHUP, so that training stops after its step; a second Ctrl-C acts at once.

    SIGHUP, of a closed terminal, stays ignored where it is, as under nohup; a second one, which the shell and the
    system both send, changes nothing.
    """
    received: list[int] = []
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none

    def handle(number: int, frame: Any) -> None:
        if number in received:
            if number == hang_up:
                return
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)
        if len(received) == 1 and first_process():
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping after this step (once more to stop at once) ...\n")  # print is not reentrant

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        numbers.append(hang_up)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not in the main thread: a caller's thread keeps its own ways
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shutdown(fabric: Fabric) -> None:
    """End the process group: gloo aborts at exit while a wrapped module or a group is alive."""
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if sys.exc_info()[0] is None:
            fabric.barrier()
        torch.distributed.destroy_process_group()


class Free(NamedTuple):
    """Memory that can still be had."""

    size: float  # in bytes; infinite where the system does not say
    where: str  # what bounds it, to follow "are"


def free(device: torch.device) -> Free:
    """Memory that this process can still have: of a GPU, or of the machine, its container and the process's limits."""
    if device.type == "cuda":
        return Free(torch.cuda.mem_get_info(device)[0], "free on the GPU")
    return min(_bounds(), key=lambda bound: bound.size, default=Free(float("inf"), "free"))


def resident() -> int:
    """Bytes that this process holds in memory; 0 where the system does not say."""
    return _numbers(ROOT / "proc/self/status").get("VmRSS", 0)


def _bounds() -> Iterator[Free]:
    """Each bound that there is on the memory of this process."""
    machine = _numbers(ROOT / "proc/meminfo")
    if "MemAvailable" in machine:
        yield Free(machine["MemAvailable"] + machine.get("SwapFree", 0), "free on this machine")
    else:
        with suppress(AttributeError, ValueError, OSError):  # no such function on Windows
            yield Free(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), "in this machine")
    yield from _cgroups()
    if sys.platform == "win32":
        return
    process = _numbers(ROOT / "proc/self/status")
    for name, held, option in (("RLIMIT_AS", "VmSize", "-v"), ("RLIMIT_DATA", "VmData", "-d")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield Free(max(0, limit - process.get(held, 0)), f"left of the process's limit (ulimit {option})")


def _cgroups() -> Iterator[Free]:
    """What is left to each control group that this process is in, of both versions."""
    with suppress(OSError):
        for line in (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                top, names = ROOT / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top = ROOT / "sys/fs/cgroup/memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            inside = top / path.lstrip("/")  # which a container may not see: there its own group is at the top
            for group in (inside, *inside.parents):
                if group.is_relative_to(top):
                    yield from _of_group(group, *names)


def _of_group(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[Free]:
    with suppress(OSError, ValueError):  # no limit is "max", or in version 1 more than any machine has
        most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
        can_go = _numbers(group / "memory.stat", unit=1).get(reclaimable, 0)
        yield Free(max(0, most - used + can_go), "free in this container (its memory limit)")


def _numbers(path: Path, *, unit: int = 1024) -> dict[str, int]:
    """The numbers in a file of lines `name value`, in bytes; none where there is no file."""
    found = dict[str, int]()
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdecimal():
                found[words[0]] = int(words[1]) * unit
    return found
