import re
import time
from pathlib import Path

import pytest
import torch

from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.models import create
from capsnet.training import dry_run
from tiny import files, tiny

pytestmark = pytest.mark.usefixtures("workplace")


def test_dry_run_tells_and_writes_nothing(photos: Path, workplace: Path) -> None:
    told = dry_run.dry_run(tiny(photos, lr=0.25))
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
        dry_run.dry_run(tiny(photos, **changes))


def test_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        network = create("capsnet")
    rows = {line.split()[0]: line.split() for line in dry_run.layer_table(network).splitlines()}
    assert rows["conv"][2:] == ["256", "x", "20", "x", "20", "20,992"]
    assert rows["primary"][-1] == "5,308,672"
    assert rows["primary"][2:-1] == ["1152", "x", "8"]
    assert rows["class_capsules"][-1] == "1,474,560"
    assert rows["all"][-1] == "8,215,568"


def test_the_baseline_has_a_table_too() -> None:
    with torch.device("meta"):
        network = create("baseline")
    assert dry_run.layer_table(network).splitlines()[-1].split()[-1] == "35,445,522"


def test_it_answers_at_once_where_training_would_need_100_gigabytes(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capsnet.data.image_folder.decoded", None)  # no image is
    dry_run.dry_run(tiny(photos))
    start = time.monotonic()
    told = dry_run.dry_run(Config.of(data=str(photos), image_size="1000x1500", batch_size=128))
    assert time.monotonic() - start < 5
    needed = re.search(r"memory: about ([\d,]+)\.\d GiB in each process; .* are ", told)
    assert needed
    assert int(needed[1].replace(",", "")) > 1000
