from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capsnet.checkpoints.model_card import Card
from capsnet.data.photo import Frame
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.models import Network, create
from capsnet.prediction import Prediction, predict
from tiny import SIZES, reading


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return create("capsnet", image_shape=(1, 12, 13), num_classes=3, classes=("a", "b", "c"), **SIZES).eval()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    pixels = torch.randint(0, 256, (5, 12, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.numpy()).save(path)
    return paths


def good(found: Prediction | InputError) -> Prediction:
    assert isinstance(found, Prediction)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_predictions_are_the_networks(network: Network, files: list[Path], batch_size: int) -> None:
    found = [good(one) for one in predict(network, [(path.name, path) for path in files], batch_size=batch_size)]
    images = torch.stack([torch.tensor(list(Image.open(path).tobytes())).view(1, 12, 13) for path in files]) / 255
    with torch.no_grad():
        output = network(images)
    assert [one.name for one in found] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    for one, image, scores, drawn in zip(found, images, output.scores, output.reconstruction, strict=True):
        values, order = scores.sort(descending=True)
        assert (one.label, one.runner_up) == ("abc"[order[0]], "abc"[order[1]])
        assert one.presence == pytest.approx(float(values[0]), abs=1e-6)
        assert one.runner_up_presence == pytest.approx(float(values[1]), abs=1e-6)
        assert one.scores == pytest.approx(dict(zip("abc", scores.tolist(), strict=True)), abs=1e-6)
        assert one.top(2) == [(one.label, one.presence), (one.runner_up, one.runner_up_presence)]
        assert len(one.top(9)) == 3
        assert one.error == pytest.approx(float((image - drawn).square().sum()), rel=1e-4)
        assert one.reconstruction is not None
        torch.testing.assert_close(one.reconstruction, drawn, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.image, image)
        assert one.ood is None
        assert not one.inverted


def test_predictions_are_without_dropout(files: list[Path]) -> None:
    torch.manual_seed(0)
    baseline = create("baseline", image_shape=(1, 12, 13), num_classes=3).train()
    sources = [(path.name, path) for path in files]
    once, again = ([good(one).presence for one in predict(baseline, sources)] for _ in range(2))
    assert once == again
    assert baseline.training


def test_a_bad_file_costs_no_other_its_prediction(network: Network, files: list[Path]) -> None:
    files[1].write_bytes(b"no image")
    sources: list[tuple[str, Path | bytes]] = [(path.name, path) for path in files]
    sources += [("missing", Path("missing.png")), ("bytes", files[0].read_bytes())]
    found = list(predict(network, sources, batch_size=3))
    assert [isinstance(one, InputError) for one in found] == [False, True, False, False, False, True, False]
    assert "1.png must be a readable image" in str(found[1])
    assert good(found[6]).to_dict() == {**good(found[0]).to_dict(), "file": "bytes"}
    assert list(predict(network, [])) == []


def test_the_card_flags_out_of_distribution_and_frames_photographs(
    network: Network, files: list[Path], tmp_path: Path
) -> None:
    errors = sorted(float(good(one).error or 0) for one in predict(network, [("", path) for path in files]))
    card = Card(
        threshold=Threshold(errors[2], 0.05, 100, "validation"), preprocessing=reading((1, 12, 13), Frame(0.0, 0.7))
    )
    found = [good(one) for one in predict(network, [("", path) for path in files], card=card)]
    assert sorted(float(one.error or 0) > errors[2] for one in found) == [False, False, False, True, True]
    assert all(one.ood == (float(one.error or 0) > errors[2]) for one in found)

    paper = Image.new("RGB", (120, 90), "white")
    paper.paste((20, 20, 60), (50, 20, 60, 70))
    paper.save(tmp_path / "photo.jpg")
    (photo,) = predict(network, [("photo", tmp_path / "photo.jpg")], card=card)
    assert good(photo).inverted
    assert good(photo).framed
    assert float(good(photo).image[0, 0].max()) < 0.1
    assert float(good(photo).image.max()) > 0.9
    (plain,) = predict(network, [("photo", tmp_path / "photo.jpg")], card=card, invert="no")
    assert not good(plain).inverted


def test_a_network_without_capsules_gives_its_softmax(files: list[Path]) -> None:
    baseline = create("baseline", image_shape=(1, 12, 13), num_classes=3).eval()
    found = good(next(predict(baseline, [("", files[0])])))
    assert found.error is None
    assert found.reconstruction is None
    with torch.no_grad():
        expected = baseline(found.image[None]).scores.softmax(-1).max()
    assert found.presence == pytest.approx(float(expected), abs=1e-6)


def test_one_class_is_its_own_runner_up(files: list[Path]) -> None:
    alone = create("capsnet", image_shape=(1, 12, 13), num_classes=1, **SIZES).eval()
    found = good(next(predict(alone, [("", files[0])])))
    assert (found.label, found.runner_up) == ("0", "0")


def test_paths_pictures_arrays_and_tensors_are_predicted_as_files_are(network: Network, files: list[Path]) -> None:
    wanted = [good(one).to_dict() for one in predict(network, [(path.name, path) for path in files])]
    pictures = [Image.open(path) for path in files]
    arrays = [np.array(picture) for picture in pictures]
    stack = torch.from_numpy(np.stack(arrays))
    for given, named in (
        (files[0].parent, [str(path) for path in files]),
        (files, [str(path) for path in files]),
        ([str(path) for path in files], [str(path) for path in files]),
        (tuple(pictures), [f"image {k}" for k in range(1, 6)]),
        (iter(arrays), [f"image {k}" for k in range(1, 6)]),
        (stack[:, None], [f"image {k}" for k in range(1, 6)]),
        (stack[..., None].numpy(), [f"image {k}" for k in range(1, 6)]),
        (stack[:, None] / 255, [f"image {k}" for k in range(1, 6)]),
        (
            [files[0], pictures[1], ("two", arrays[2]), *stack[3:]],
            [str(files[0]), "image 2", "two", "image 4", "image 5"],
        ),
    ):
        found = [good(one).to_dict() for one in predict(network, given)]
        assert [one["file"] for one in found] == named
        assert [{**one, "file": ""} for one in found] == [{**one, "file": ""} for one in wanted]


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "picture", "array", "tensor", "pair", "list"])
def test_one_image_alone_is_one_prediction(network: Network, files: list[Path], kind: str) -> None:
    with Image.open(path := files[2]) as picture:
        pixels = np.array(picture)
    given = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "picture": picture,
        "array": pixels,
        "tensor": torch.from_numpy(pixels)[None],
        "pair": ("x", path),
        "list": [pixels],
    }[kind]
    (one,) = predict(network, given)
    (wanted,) = predict(network, [(good(one).name, path)])
    assert good(one).to_dict() == good(wanted).to_dict()


def test_floats_of_the_size_of_the_network_stay_exact(network: Network) -> None:
    image = torch.rand(1, 12, 13, generator=torch.Generator().manual_seed(1))
    (one,) = predict(network, image)
    assert torch.equal(good(one).image, image)
    (other,) = predict(network, image, invert="yes")
    assert torch.equal(good(other).image, 1 - image)
    (rounded,) = predict(network, image.expand(3, -1, -1).numpy())
    torch.testing.assert_close(good(rounded).image, image, rtol=0, atol=0.5 / 255 + 1e-6)
    (larger,) = predict(network, torch.rand(30, 40))
    assert good(larger).image.shape == (1, 12, 13)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_image_is_refused_in_one_sentence(network: Network, files: list[Path], tmp_path: Path) -> None:
    wanted = "a path, the bytes of a file, a PIL image, an array or a tensor"
    for bad in (3, None, {"a": files[0]}):
        with pytest.raises(
            InputError, match=rf"^sources must be {wanted}, or a list of such; got {type(bad).__name__}$"
        ):
            predict(network, bad)
    (tmp_path / "none").mkdir()
    stack = np.zeros((3, 12, 13), np.float32)
    found = list(predict(network, [files[0], 3, stack - 1, np.zeros((2, 4, 12, 13)), tmp_path / "none", files[1]]))
    assert [isinstance(one, InputError) for one in found] == [False, True, True, True, True, False]
    assert str(found[1]) == f"image 2 must be {wanted}; got int"
    assert str(found[2]).startswith("image 3 must have floats in [0, 1], so give images before Normalize")
    assert str(found[3]).endswith("of 1 or 3 channels; got [2, 4, 12, 13]")
    assert str(found[4]) == f"folder {tmp_path / 'none'} must hold images; got none"
