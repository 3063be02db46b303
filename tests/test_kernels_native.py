"""The C library: compiled when it can be, left alone when it cannot, and the same as PyTorch's operators."""

import ctypes
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels import native, sweeps_cpu, sweeps_native
from capsnet.kernels.fused import votes_and_routing
from capsnet.kernels.squash import biased_squash
from capsnet.kernels.tiles_native import NativeTiles
from capsnet.kernels.winograd import plan_for
from capsnet.models import create

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no C library: {native.status()}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a library that is looked for again."""
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAPSNET_NATIVE", raising=False)
    native._load_once.cache_clear()
    yield tmp_path / "cache" / "native"
    native._load_once.cache_clear()


# where it runs, and where not


@needs_library
def test_it_is_compiled_once_and_kept_for_the_user_alone(fresh: Path) -> None:
    assert native.status().startswith("native (")
    (library,) = fresh.iterdir()
    assert library.stat().st_mode & 0o022 == 0
    assert fresh.stat().st_mode & 0o077 == 0
    before = library.stat().st_mtime_ns
    native._load_once.cache_clear()
    assert native.usable(torch.zeros(1))
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]


@needs_library
def test_processes_that_compile_at_the_same_time_do_not_disturb_each_other(fresh: Path) -> None:
    command = [sys.executable, "-c", "from capsnet.kernels import native; print(native.status())"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert all(line.startswith("native (") for line in said)
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@needs_library
def test_a_library_that_others_can_write_to_is_not_loaded(fresh: Path) -> None:
    assert native.library() is not None
    (path,) = fresh.iterdir()
    for place in (path, fresh):
        place.chmod(0o777)
        native._load_once.cache_clear()
        assert native.status() == f"PyTorch ({place} can be written to by others)"
        place.chmod(0o700)


def test_without_a_compiler_pytorch_computes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native.status() == "PyTorch (no C compiler)"
    assert not native.usable(torch.zeros(1))
    assert create("capsnet", image_shape=(1, 20, 20))(torch.rand(9, 1, 20, 20)).scores.isfinite().all()
    monkeypatch.setenv("CAPSNET_NATIVE", "require")
    with pytest.raises(InputError, match=r"^CAPSNET_NATIVE=require must have a C compiler that works; no C compiler$"):
        native.usable(torch.zeros(1))


@pytest.mark.skipif(sys.platform == "win32", reason="no shell")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo broken 1.0; [ $# = 1 ] || { echo 'native.c:1: error: no such luck' >&2; exit 1; }", "no such luck"),
        ('echo broken 1.0; [ $# = 1 ] || while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "file too short"),
        ("exit 1", "no reason given"),
    ],
    ids=["an error", "no library", "nothing works"],
)
def test_a_compiler_that_fails_breaks_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    said = native.status()
    assert said.startswith("PyTorch (")
    assert reason in said or sys.platform != "linux"
    assert not native.usable(torch.zeros(1))
    assert all(path.suffix == ".so" for path in fresh.iterdir())  # no half-made file


@needs_library
def test_another_compiler_makes_another_library(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, _ = native._compiler()
    assert native.library() is not None
    other = tmp_path / "cc"
    other.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo newer || exec {compiler} "$@"\n', encoding="utf-8")
    other.chmod(0o700)
    monkeypatch.setenv("CC", str(other))
    native._load_once.cache_clear()
    assert native.status().startswith("native (newer, ")
    assert len(list(fresh.iterdir())) == 2


def test_a_cache_that_cannot_be_written_breaks_nothing(fresh: Path) -> None:
    fresh.parent.parent.joinpath("cache").write_text("a file", encoding="utf-8")
    assert native.status().startswith("PyTorch (")


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_NATIVE", "off")
    assert native.status() == "PyTorch (CAPSNET_NATIVE=off)"
    assert not native.usable(torch.zeros(1))
    monkeypatch.setenv("CAPSNET_NATIVE", "on")
    with pytest.raises(InputError, match=r"^CAPSNET_NATIVE must be one of auto, off, require; got 'on'$"):
        native.usable(torch.zeros(1))


@needs_library
def test_it_is_for_float32_on_a_cpu() -> None:
    assert native.usable(torch.zeros(1), None)
    assert not native.usable(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not native.usable(torch.zeros(1, device="meta"))


def test_the_source_comes_with_the_package(tmp_path: Path) -> None:
    project = Path(__file__).parent.parent
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {"capsnet/kernels/native.c", "capsnet/checkpoints/serving/page.html"} <= packed
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"src/capsnet/kernels/native.c", "benchmarks/peers.py"} <= names


# what it computes


def everything(threads: int) -> list[Tensor]:
    """What each of its functions computes, at sizes that no vector divides; PyTorch's matrix products are left out."""
    draw = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan = plan_for((31, 27), 5, 1, (0,) * 4, 6, 2, (2, 1, 1, 2), torch.float32, torch.device("cpu"), NativeTiles)
        batch, channels, out = 5, 7, 11
        rows, width, outputs = batch * plan.rows, 4 * channels, (batch, plan.y.outputs, plan.x.outputs, out)
        patches = torch.empty(rows * plan.points * 4, 2 * 25 + 1)
        v, d_x = torch.empty(plan.points, rows, width), torch.empty(rows * plan.points, width)
        positive = torch.empty(rows * plan.points, width, dtype=torch.uint8)
        u, d_kernel = torch.empty(plan.points, 2, 2, channels * out), torch.empty(6, 6, channels * out)
        grid, d_m = torch.empty(outputs), torch.empty(plan.points, rows, out)
        NativeTiles.patches(plan, leaf(batch, 2, 31, 27), patches)
        NativeTiles.forward(plan, leaf(rows * plan.points, width), v, positive)
        NativeTiles.backward(plan, leaf(*v.shape), positive, d_x)
        NativeTiles.weight(plan, leaf(*d_kernel.shape), u)
        NativeTiles.weight_backward(plan, leaf(*u.shape), d_kernel)
        NativeTiles.output(plan, leaf(*d_m.shape), grid)
        NativeTiles.output_backward(plan, leaf(*outputs), d_m)

        poses, bias = leaf(21, 5, 9, 6).requires_grad_(), leaf(6).requires_grad_()
        capsules = biased_squash(poses, bias, 3, scale=0.7)
        squashed = [capsules.detach(), *torch.autograd.grad(capsules, (poses, bias), leaf(21, 5, 9, 6))]

        sweeps = sweeps_native.Sweeps(leaf(21, 13, 3), leaf(13, 3, 5, 7), leaky=True)
        s, couplings = sweeps.weighted_sum(leaf(21, 5, 7))
        d_g = sweeps.weighted_sum_backward(leaf(21, 5, 7), leaf(21, 5, 7), leaf(21, 13, 5), detached=False)
        assert d_g is not None
        routed = [s, couplings, d_g, *sweeps.gradients(leaf(21, 5, 7))]
        return [patches, v, positive, d_x, u, d_kernel, grid, d_m, *squashed, *routed]
    finally:
        torch.set_num_threads(before)


@needs_library
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    alone = everything(1)
    for threads in (2, 3, 8):
        for one, other in zip(alone, everything(threads), strict=True):
            assert torch.equal(one, other)


@needs_library
def test_without_openmp_it_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    assert library is not None
    expected = everything(2)
    library.native_use(None)
    try:
        for one, other in zip(expected, everything(2), strict=True):
            assert torch.equal(one, other)
    finally:
        library.native_use(native._start_of_threads())


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's OpenMP library is looked for by its name")
def test_the_threads_are_those_of_pytorch() -> None:
    assert native._start_of_threads() is not None


@needs_library
def test_working_memory_that_cannot_be_had_is_an_error() -> None:
    sweeps = sweeps_native.Sweeps(torch.rand(3, 2, 2), torch.rand(2, 2, 2, 2), leaky=False)
    sizes = {**sweeps._sizes(), "dim": 2**55}
    with pytest.raises(MemoryError, match="native_sweep could not have its working memory"):
        native.call("native_sweep", sweeps_native._Sweeping(**sizes, groups=1, gains=sweeps.u, sums=sweeps.u))


@needs_library
@pytest.mark.parametrize("options", [{}, {"leaky": True}, {"detach_routing": True}, {"iterations": 1}], ids=str)
@pytest.mark.parametrize(
    "sizes", [(128, 40, 8, 10, 16), (1, 1, 1, 1, 1), (17, 63, 8, 3, 5), (5, 7, 3, 100, 2)], ids=str
)
def test_routing_is_that_of_float64(sizes: tuple[int, ...], options: dict[str, object]) -> None:
    n, ins, in_dim, outs, dim = sizes
    draw = torch.Generator().manual_seed(sum(sizes))
    given = [0.5 * torch.randn(shape, generator=draw) for shape in ((n, ins, in_dim), (ins, in_dim, outs, dim))]

    def run(sweeps: type, dtype: torch.dtype) -> list[Tensor]:
        u, weight = (x.to(dtype).requires_grad_() for x in given)
        result = votes_and_routing(sweeps, u, weight, **options)  # type: ignore[arg-type]
        slopes = torch.linspace(-1, 1, result.pose.numel(), dtype=dtype).view(result.pose.shape)
        total = (result.pose * slopes).sum() + (result.couplings.square().sum() if outs > 1 else 0)
        return [result.pose, result.couplings, *torch.autograd.grad(total, (u, weight))]

    for got, wanted in zip(
        run(sweeps_native.Sweeps, torch.float32), run(sweeps_cpu.Sweeps, torch.float64), strict=True
    ):
        assert got.dtype == torch.float32
        error = (got.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-12)
        assert error < 2e-6


@needs_library
@pytest.mark.parametrize("leaky", [False, True], ids=["softmax", "leaky"])
def test_large_logits_overflow_nothing(leaky: bool) -> None:
    """Of both signs: all logits of the first capsule, which is against the others, are far below the leaky slot's 0."""
    torch.manual_seed(0)
    u, weight = 30 * torch.randn(4, 1, 3).repeat(1, 6, 1), 30 * torch.randn(1, 3, 5, 4).repeat(6, 1, 1, 1)
    u[:, 0] *= -1
    found = votes_and_routing(sweeps_native.Sweeps, u, weight, leaky=leaky)
    wanted = votes_and_routing(sweeps_cpu.Sweeps, u.double(), weight.double(), leaky=leaky)
    torch.testing.assert_close(found.couplings, wanted.couplings.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.pose, wanted.pose.float(), rtol=1e-3, atol=1e-5)


@needs_library
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_the_biased_squash_is_squash(dim: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(dim)
    grid, bias = torch.randn(5, 3, 4 * dim, generator=draw), torch.randn(4 * dim, generator=draw)
    grid[0, 0] = -bias / scale  # where capsules are zero, and so are their gradients
    d_v = torch.randn(grid.shape, generator=draw)
    results = []
    for dtype in (torch.float32, torch.float64):
        x, b = (t.to(dtype).requires_grad_() for t in (grid, bias))
        if dtype == torch.float32:
            v = biased_squash(x, b, dim, scale=scale)
        else:
            v = F.squash((scale * x + b).view(5, 3, 4, dim)).view(x.shape)
        results.append([v, *torch.autograd.grad(v, (x, b), d_v.to(dtype))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-6)
    x, b = (t.repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in (grid, bias))
    assert not x.is_contiguous()
    assert not b.is_contiguous()
    v = biased_squash(x, b, dim, scale=scale)
    upstream = d_v.repeat_interleave(2, -1)[..., ::2]
    for one, other in zip([v, *torch.autograd.grad(v, (x, b), upstream)], results[0], strict=True):
        torch.testing.assert_close(one, other)
    huge = biased_squash(torch.tensor([[3e38, -3e38]]), torch.zeros(2), 2)
    torch.testing.assert_close(huge, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))


def test_a_size_that_is_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="ins of _Sweeping must be a number; got a tensor"):
        sweeps_native._Sweeping(ins=torch.tensor(3))


def test_arguments_of_another_name_are_refused() -> None:
    with pytest.raises(TypeError, match="_Sweeping has no sise"):
        sweeps_native._Sweeping(sise=1)


@needs_library
def test_the_structs_are_those_of_the_source() -> None:
    """A field that is added, dropped or moved on one side only would shift all that follow."""
    source = native.SOURCE.read_text(encoding="utf-8")
    library = native.library()
    assert library is not None
    for struct in native.Struct.__subclasses__():
        name = {"_Transform": "tiles", "_Patching": "patching", "_Squashing": "squashing"}.get(
            struct.__name__, struct.__name__.strip("_").lower()
        )
        assert f"}} {name};" in source
        size = getattr(library, f"native_size_of_{name}")
        size.restype = ctypes.c_long
        assert size() == ctypes.sizeof(struct), name


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_computes_too() -> None:
    """Before any thread was started, as PyTorch itself asks for."""
    code = (
        "import os, torch; from capsnet.models import create; torch.set_num_threads(1);"
        "net = create('capsnet', image_shape=(1, 20, 20)).eval(); x = torch.rand(9, 1, 20, 20); wanted = net(x).scores;"
        "pid = os.fork();"
        "ok = torch.equal(net(x).scores, wanted);"
        'os.write(1, f\'{"parent" if pid else "child"} {ok}\\n\'.encode()); pid and os.waitpid(pid, 0); os._exit(0)'
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.split("\n")) == ["", "child True", "parent True"], done.stderr
