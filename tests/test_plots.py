from pathlib import Path

import pytest
import torch
from PIL import Image

from capsnet import plots
from capsnet.data import Split
from capsnet.errors import InputError
from capsnet.models import create
from tiny import SIZES


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (3, 20), (3, 13)])
def test_reconstructions_is_a_png(tmp_path: Path, channels: int, count: int) -> None:
    names = ("a $5 $6", "日本語", "a name that is far too long for the little room above an image")
    network = create("capsnet", image_shape=(channels, 12, 13), num_classes=3, classes=names, **SIZES).eval()
    images = torch.randint(0, 256, (count, channels, 12, 13), dtype=torch.uint8)
    split = Split(images, torch.arange(count) % 3)
    path = plots.reconstructions(network, split, tmp_path / "new" / "figure.partial")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 100
        extrema = picture.convert("L").getextrema()
    assert extrema == (0, 255)


def test_it_needs_a_decoder(tmp_path: Path) -> None:
    network = create("capsnet", image_shape=(1, 12, 13), num_classes=2, reconstruction=False, **SIZES)
    split = Split(torch.zeros(2, 1, 12, 13, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(InputError, match=r"network must have a decoder to draw reconstructions"):
        plots.reconstructions(network, split, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
