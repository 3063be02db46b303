"""Apple's GPU: accepted where PyTorch has it, never chosen, in float32. Nothing here ran on one."""

import pytest
import torch

from capsnet import devices
from capsnet.cli import main
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.layers import resolve_convolution, resolve_routing_kernel
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

    assert resolve_convolution("auto", network.conv, network.primary, Images()) == "direct"  # type: ignore[arg-type]
