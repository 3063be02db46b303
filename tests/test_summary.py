from pathlib import Path

import pytest
import torch

from capsnet import summary
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.models import create
from capsnet.objective import Objective
from tiny import SIZES, files, tiny

pytestmark = pytest.mark.usefixtures("workplace")


def test_dry_run_tells_and_writes_nothing(photos: Path, workplace: Path) -> None:
    told = summary.dry_run(tiny(photos, lr=0.25))
    lines = told.splitlines()
    assert "lr: 0.25" in lines
    assert "data: 68 training, 7 validation, 15 test images of 3 x 12 x 13; 3 classes" in lines
    assert "steps: 10 (2 epochs of 5)" in lines
    assert any(line.startswith("device: 1 x c") and "precision 32" in line for line in lines)
    assert any(line.startswith("memory: about ") for line in lines)
    assert files(workplace) == set()


@pytest.mark.parametrize("changes", [{"image_size": 4}, {"model": "bogus"}, {"validation": 1000}, {"devices": 999}])
def test_dry_run_refuses_what_training_would(photos: Path, changes: dict[str, int]) -> None:
    with pytest.raises(InputError):
        summary.dry_run(tiny(photos, **changes))


def test_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        network = create("capsnet")
    rows = {line.split()[0]: line.split() for line in summary.layer_table(network).splitlines()}
    assert rows["conv"][2:] == ["256", "x", "20", "x", "20", "20,992"]
    assert rows["primary"][-1] == "5,308,672"
    assert rows["primary"][2:-1] == ["1152", "x", "8"]
    assert rows["class_capsules"][-1] == "1,474,560"
    assert rows["all"][-1] == "8,215,568"


def test_the_baseline_has_a_table_too() -> None:
    with torch.device("meta"):
        network = create("baseline")
    assert summary.layer_table(network).splitlines()[-1].split()[-1] == "35,445,522"


@pytest.mark.parametrize("kernel", ["plain", "fused"])
@pytest.mark.parametrize("stem", ["direct", "minimal"])
def test_activation_bytes_are_those_that_autograd_keeps(kernel: str, stem: str) -> None:
    network = create("capsnet", image_shape=(3, 12, 13), num_classes=3, **SIZES, kernel=kernel, stem=stem)
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    for batch_size in (6, 13):
        kept: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, alive: list[torch.Tensor] = alive) -> torch.Tensor:
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Objective(network, Config())(torch.rand(batch_size, 3, 12, 13), torch.zeros(batch_size, dtype=torch.int64))
        real = sum(size for pointer, size in kept.items() if pointer not in weights)
        told = summary.activation_bytes(network, Config(), batch_size, torch.device("cpu"))
        assert told == pytest.approx(real, rel=0.02)
