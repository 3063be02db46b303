"""`native.c`, compiled on first use by this machine's C compiler for this very processor, and called through ctypes.

It holds the loops that PyTorch's operators cannot fuse. Everything it does PyTorch does too, more slowly, wherever it
cannot run: without a compiler, on Windows, for other types than float32. The environment variable CAPSNET_NATIVE is
`auto` (default), `off`, or `require`, under which it is an error that it cannot.

The library is kept in the cache directory under a name made of source, compiler and processor, in a folder that only
the user can write to; from any other folder nothing is loaded. ctypes releases Python's lock during a call.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from capsnet.errors import InputError
from capsnet.files import cache_dir

__all__ = ["LARGEST", "Struct", "call", "lanes", "status", "usable"]

CHOICES = ("auto", "off", "require")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
COMPILE_SECONDS = 120.0
LARGEST = 16
"""Rows or columns of a tile, as in `native.c`."""
SOURCE = Path(__file__).with_name("native.c")
_lock = Lock()


class _Missing(Exception):
    """Why there is no library."""


def usable(*tensors: Tensor | None) -> bool:
    """Whether the library is there and takes these tensors: float32, on a CPU.

    Raises:
        InputError: CAPSNET_NATIVE is `require` and the library is missing, or it has an unknown value.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in given) and library() is not None


def status() -> str:
    """Which way computations on a CPU take, and why: `native (gcc ..., 16 lanes)` or `PyTorch (no C compiler)`."""
    found, why = _load(_choice())
    return f"native ({why}, {found.native_lanes()} lanes)" if found else f"PyTorch ({why})"


def lanes() -> int:
    """Floats in a vector of the library, which must be usable."""
    found = library()
    assert found is not None
    return int(found.native_lanes())


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return _load(_choice())[0]


def _choice() -> str:
    choice = os.environ.get("CAPSNET_NATIVE") or "auto"
    if choice not in CHOICES:
        raise InputError(f"CAPSNET_NATIVE must be one of {', '.join(CHOICES)}; got {choice!r}")
    return choice


@cache
def _load_once(choice: str) -> tuple[ctypes.CDLL | None, str]:
    if choice == "off":
        return None, "CAPSNET_NATIVE=off"
    try:
        compiler, version = _compiler()
        library = ctypes.CDLL(str(_built(compiler, version)))
        library.native_use(_start_of_threads())
        return library, version
    except (_Missing, OSError, subprocess.SubprocessError) as error:
        if choice == "require":
            raise InputError(f"CAPSNET_NATIVE=require must have a C compiler that works; {error}") from None
        return None, str(error)


def _load(choice: str) -> tuple[ctypes.CDLL | None, str]:
    with _lock:  # a second thread waits for the first one's compilation
        return _load_once(choice)


def _compiler() -> tuple[str, str]:
    """The C compiler's path and the first line of its version."""
    if sys.platform == "win32":
        raise _Missing("not on Windows")
    named = os.environ.get("CC", "")
    path = next((found for name in (named, "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if path is None:
        raise _Missing("no C compiler")
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS)
    return path, (shown.stdout.splitlines() or ["unknown compiler"])[0]


def _built(compiler: str, version: str) -> Path:
    """The library for this source, compiler and processor; compiled where it is not there yet."""
    folder = cache_dir() / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(folder)
    parts = (SOURCE.read_bytes(), version.encode(), repr(FLAGS).encode(), _processor().encode())
    path = folder / (hashlib.sha256(b"\0".join(parts)).hexdigest()[:32] + ".so")
    if not path.exists():
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [compiler, *FLAGS, "-o", temporary, str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode:
                fault = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
                raise _Missing(f"{version} cannot compile it: {fault[:200]}")
            Path(temporary).replace(path)  # whole or not at all, whoever else compiles it
        finally:
            Path(temporary).unlink(missing_ok=True)
    _check_private(path)
    return path


def _start_of_threads() -> Any:
    """GOMP_parallel of the OpenMP library that PyTorch runs its threads with; None where none is found."""
    beside_torch = (str(path) for path in (Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    elsewhere: list[str] = []
    if sys.platform == "linux":
        mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
        elsewhere = [path for path in dict.fromkeys(mapped) if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", path)]
    for path in (*beside_torch, *elsewhere):
        with suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel, ctypes.c_void_p)
    return None


def _check_private(path: Path) -> None:
    """Raise _Missing unless the user owns `path` and nobody else can write to it."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Missing(f"{path} can be written to by others")


def _processor() -> str:
    """What `-march=native` looks at."""
    if sys.platform == "linux":
        wanted = ("vendor_id", "cpu family", "model", "flags", "Features")
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line for line in lines[:64] if line.split("\t")[0].strip() in wanted)
    return f"{platform.machine()} {platform.processor()}"


class Struct(ctypes.Structure):
    """Arguments of a function of `native.c`, in the order of its struct; tensors are given as they are."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        kinds: dict[str, Any] = {field[0]: field[1] for field in self._fields_}
        if unknown := values.keys() - kinds.keys():
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        self.tensors = [value for value in values.values() if isinstance(value, Tensor)]  # alive as long as this
        for name, value in values.items():
            if kinds[name] is ctypes.c_void_p:
                value = None if value is None else value.data_ptr()
            elif isinstance(value, Tensor):  # a size, as torch.jit.trace has them
                raise TypeError(f"{name} of {type(self).__name__} must be a number; got a tensor")
            elif isinstance(value, Sequence):
                value = kinds[name](*value)
            setattr(self, name, value)


def call(function: str, arguments: Struct) -> None:
    """Run a function of the library on PyTorch's number of threads.

    Raises:
        MemoryError: there is not enough for its working arrays.
    """
    found = library()
    assert found is not None
    if getattr(found, function)(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError(f"{function} could not have its working memory")
