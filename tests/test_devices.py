"""Apple's GPU: accepted where PyTorch has it, never chosen, in float32 (nothing here ran on one); and processes."""

from pathlib import Path

import pytest
import torch

from capsnet import devices
from capsnet.cli import main
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.kernels.select import resolve_convolution, resolve_routing_kernel
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from tiny import SIZES

MPS = torch.device("mps")


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def small() -> CapsNet:
    found = create("capsnet", **SIZES)
    assert isinstance(found, CapsNet)
    return found


def test_mps_where_there_is_none_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["train", "--device", "mps"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "device mps must have an Apple GPU and a PyTorch that was built for it; found none" in err


@pytest.mark.usefixtures("apple")
def test_mps_is_accepted_and_never_chosen() -> None:
    assert devices.resolve_device(Config.of(device="mps")) == MPS
    assert devices.resolve_device(Config()).type == "cpu"
    with pytest.raises(InputError, match=r"^devices must be at most the 1 GPU of this machine; got 2$"):
        devices.resolve_device(Config.of(device="mps", devices=2))


@pytest.mark.usefixtures("unchecked")
def test_mps_is_float32_plain_and_direct() -> None:
    network = small()
    for precision in ("auto", "32"):
        assert devices.resolve_precision(Config.of(precision=precision), MPS, network) == "32"
    with pytest.raises(InputError, match=r"^precision must be 32 or auto on device mps; got bf16$"):
        devices.resolve_precision(Config.of(precision="bf16"), MPS, network)
    assert resolve_routing_kernel("auto", MPS) == "plain"
    with pytest.raises(
        InputError, match=r"^routing_kernel fused must run on a CPU or a CUDA GPU; got a tensor on mps$"
    ):
        resolve_routing_kernel("fused", MPS)

    class Images:
        device, dtype, requires_grad = MPS, torch.float32, False

    assert resolve_convolution("auto", Images(), saved=lambda: 2.0, bare=True) == "direct"  # type: ignore[arg-type]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "6", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, devices.Launch("", 0, 1, 1)),
        ({"LOCAL_RANK": "1"}, devices.Launch("", 1, 1, 1)),  # of those that Fabric starts
        (TORCHRUN, devices.Launch("torchrun", 5, 8, 4)),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "3"}, devices.Launch("srun", 4, 6, 3)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, devices.Launch("srun", 0, 1, 1)),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, devices.Launch("", 0, 1, 1)),  # a shell inside an allocation
    ],
)
def test_processes_are_those_that_were_started(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: devices.Launch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices.launch() == expected
    assert devices.first_process() == (expected.rank == 0)
    if expected.by:
        fabric = devices.make_fabric(Config(), torch.device("cpu"), "32")
        assert fabric.world_size == expected.world_size
        with pytest.raises(InputError, match=rf"under {expected.by}, which started {expected.here} here; got 2$"):
            devices.launch(2)


def test_srun_must_say_how_many_processes_a_machine_has(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^srun must be given --ntasks-per-node, .* has; got --ntasks 6$"):
        devices.launch()
