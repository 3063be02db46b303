"""The picture of the architecture is of the network as it is built."""

from pathlib import Path
from xml.etree import ElementTree

from capsnet import CapsNet, create
from tools.pictures import architecture

DOCS = Path(__file__).parents[1] / "docs"


def words(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter() if element.tag.endswith("}text")]


def test_the_picture_of_the_docs_is_of_this_network() -> None:
    network = create("capsnet")
    assert isinstance(network, CapsNet)
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == architecture(network)
    assert "32 x 6 x 6 = 1,152 of 8-D" in words(architecture(network))


def test_another_network_has_other_sizes() -> None:
    network = create("capsnet", image_shape=(3, 40, 33), num_classes=5, conv_channels=7, capsule_types=2, class_dim=11)
    assert isinstance(network, CapsNet)
    assert {"3 x 40 x 33", "7 x 32 x 25", "2 x 12 x 9 = 216 of 8-D", "5 of 11-D; length: presence"} <= set(
        words(architecture(network))
    )


def test_the_pictures_of_the_docs_are_small() -> None:
    assert all(path.stat().st_size < 200_000 for path in DOCS.iterdir() if path.suffix in (".png", ".gif", ".svg"))
