"""Memory that is free to this process: of a GPU, or of the machine, its container and the process's own limits."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

if sys.platform != "win32":
    import resource

__all__ = ["Free", "free", "resident"]

ROOT = Path("/")
"""Where the system's `proc` and `sys` are."""


class Free(NamedTuple):
    """Memory that can still be had.

    Attributes:
        size: in bytes; infinite where the system does not say.
        where: what bounds it, to follow "are".
    """

    size: float
    where: str


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
