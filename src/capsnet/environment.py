"""The software and hardware that a result was made with."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from capsnet.kernels import native

__all__ = ["describe"]


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, source commit, hardware and, on a CPU, which kernels compute (see `native.status`)."""
    from importlib.metadata import version

    return {
        "capsnet": version("capsnet"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        **({"kernels": native.status()} if device.type == "cpu" else {}),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _commit() -> str | None:
    """Commit of the checkout this package runs from, `+` when files differ from it; None when installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
