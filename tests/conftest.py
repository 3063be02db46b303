from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

import tiny
from capsnet.files import write_atomically
from capsnet.kernels import native


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes, which may hold the time they were made at, are no name: the workers of xdist must agree on those."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shape annotations are not checked, so that our own error answers, as it does for users."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(params=["native", "PyTorch"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What C computes in float32 is computed so, and by PyTorch; with the same random numbers every time."""
    torch.manual_seed(0)
    monkeypatch.setenv("CAPSNET_NATIVE", "auto" if request.param == "native" else "off")
    if request.param == "native" and native.library() is None:
        pytest.skip(native.status())


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 colour images of 12 x 13 pixels in 3 classes."""
    return tiny.photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and nothing of this machine's data, cache or processes."""
    for name in ("CAPSNET_DATA", "LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAPSNET_OFFLINE", "1")
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def blank_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on drawing."""
    monkeypatch.setattr("capsnet.report.draw_reconstructions", lambda network, split, path: _blank(path))
    monkeypatch.setattr("capsnet.report.write", lambda path, *arguments, **about: _blank(path))


def _blank(path: Path) -> None:
    write_atomically(path, lambda place: place.write_bytes(b""))
