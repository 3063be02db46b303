"""A data set without its images is what reading it makes, but for the pixels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capsnet.config import Config
from capsnet.data import Dataset, available, describe, image_cache, load, outline
from capsnet.errors import InputError
from capsnet.training import prepare
from tiny import tiny

CHANGES: list[dict[str, int | str]] = [{}, {"image_size": 20, "channels": 3}, {"image_size": "14x20"}, {"crop": 12}]


def same(outlined: Dataset, read: Dataset, *, labels: bool) -> None:
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(outlined, name), getattr(read, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.images.is_meta
            assert ours.images.shape == theirs.images.shape
            assert ours.labels.shape == theirs.labels.shape
            assert (ours.single_images is None) == (theirs.single_images is None)
            if ours.single_images is not None:
                assert ours.single_images.shape == theirs.single_images.shape
            if labels:
                assert torch.equal(ours.labels, theirs.labels)
    for field in ("name", "classes", "image_shape", "shift", "objects_per_image", "crop", "placed", "tested", "files"):
        assert getattr(outlined, field) == getattr(read, field), field


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in available()]
    + [("strokes", each) for each in CHANGES[1:] if each.get("image_size") != "14x20"],
    ids=str,
)
def test_of_a_registered_set(name: str, changes: dict[str, int | str]) -> None:
    if describe(name).missing:
        pytest.skip(f"{name} is not on this machine")
    config = Config.of(data=name, **changes)  # type: ignore[arg-type]
    known = prepare.prepare_data(config, read=False)
    same(known, prepare.prepare_data(config), labels=False)
    assert outline.nbytes(known) > 0


@pytest.mark.parametrize("changes", [*CHANGES, {"validation": 3}, {"train_images": 30}], ids=str)
def test_of_a_folder(photos: Path, changes: dict[str, int | str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny(photos), **changes)  # type: ignore[arg-type]
    read = prepare.prepare_data(config)
    monkeypatch.setattr("capsnet.data.image_folder.decoded", None)  # nothing is
    same(prepare.prepare_data(config, read=False), read, labels=True)


def test_images_that_will_be_mapped_take_no_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = prepare.prepare_data(tiny(photos), read=False)
    assert outline.nbytes(known) == 90 * 3 * 12 * 13
    monkeypatch.setattr(image_cache, "IN_MEMORY", 1000)
    assert outline.nbytes(known) == 0


def test_a_set_that_is_not_here_is_loaded(workplace: Path) -> None:
    with pytest.raises(InputError) as refused:
        load("mnist")
    with pytest.raises(InputError) as known:
        outline.of_registered("mnist")
    assert str(known.value) == str(refused.value)
