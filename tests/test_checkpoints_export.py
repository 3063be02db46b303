import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
from capsnet import cli, environment
from capsnet.checkpoints import export as module
from capsnet.checkpoints import exported as exported_files
from capsnet.checkpoints import pretrained
from capsnet.checkpoints.export import FORMATS, Export, compare, export
from capsnet.checkpoints.model_card import Card
from capsnet.data.dataset import to_float
from capsnet.data.photo import Frame
from capsnet.data.preprocessing import Preprocessing
from capsnet.data.sets import strokes
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.kernels.buffers import pool
from capsnet.models import Network, create
from tiny import reading

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
SHAPE = (1, 12, 13)
SMALL = (2, 3, 5)  # of the baseline, whose weights grow with the image
CLASSES = ("zero", "one", "two")


def network(name: str, **options: Any) -> Network:
    """A network of a few thousand weights, the same at each call."""
    few = {"conv_channels": (4, 4), "conv_kernel_sizes": (3, 3), "primary_dim": 2, "decoder_sizes": (8,)}
    matrix = {"conv_channels": 4, "conv_kernel_size": 3, "capsule_types": (2, 3), "capsule_kernel_sizes": (2,)}
    matrix |= {"capsule_strides": (1,), "decoder_sizes": (8,)}
    few_of = {"capsnet": tiny.SIZES, "efficient-capsnet": few, "em-capsnet": matrix, "vb-capsnet": matrix}
    sizes = {**few_of.get(name, {}), **options}
    torch.manual_seed(0)
    shape = SMALL if name == "baseline" else SHAPE
    one = create(name, image_shape=shape, num_classes=3, classes=CLASSES, **sizes).eval()
    if name in ("em-capsnet", "vb-capsnet"):
        one.get_parameter("class_capsules.weight").data.mul_(5)  # else all classes score alike
    return one


def images(count: int, shape: tuple[int, int, int] = SMALL) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


KINDS: dict[str, Network] = {
    "capsnet": network("capsnet"),
    "capsnet, winograd": network("capsnet", convolution="winograd"),
    "capsnet, fused kernel": network("capsnet", routing_kernel="fused"),
    "capsnet, all options": network("capsnet", routing_bias=True, leaky=True, padding="same", reconstruction=False),
    "efficient-capsnet": network("efficient-capsnet"),
    "efficient-capsnet, all options": network(
        "efficient-capsnet", primary_kernel_size=2, padding="same", normalization="instance", negative_slope=0.1
    ),
    "everything shared": network(
        "capsnet", **tiny.SIZES, share_transform=True, share_decoder=True, routing_normalization="max-min"
    ),
    "dynamic on another stem": network("efficient-capsnet", routing="dynamic", share_decoder=True),
    "em-capsnet": network("em-capsnet", transform_std=1.0),
    "vb-capsnet": network("vb-capsnet", primary_kernel_size=2, primary_stride=1, reconstruction=True),
    "baseline": network("baseline"),
    "resnet": network("resnet", width=0.2),
    "inverted-capsnet": network(
        "inverted-capsnet",
        capsule_types=2,
        capsule_kernel_sizes=(3,),
        capsule_strides=(1,),
        backbone_channels=(4, 6),
        backbone_blocks=(1, 1),
    ),
    "self-routing-capsnet": network(
        "self-routing-capsnet", blocks=1, grid=3, capsule_types=2, primary_dim=3, routing_layers=2
    ),
    "capsule-head": network("capsule-head", grid=3, capsule_types=2, primary_dim=3, reconstruction=True),
    "capsule-head, all options": network(
        "capsule-head", backbone="efficient-capsnet", capsule_types=2, routing="attention", share_transform=True
    ),
}


Exported = Callable[[str, str], tuple[Path, Export]]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A kind of network in a format: an export takes seconds, so that each is made once for all tests."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def make(kind: str, format: str) -> tuple[Path, Export]:
        one, path = KINDS[kind], folder / f"{kind}{FORMATS[format]}"
        return path, export(one, path, format=format, images=images(30, one.image_shape), batch_size=16)

    return make


def read(path: Path, format: str, batch: Tensor) -> dict[str, Tensor]:
    """What a stranger to this package gets out of the file."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": batch.numpy()})), strict=True))
    with torch.no_grad():
        if format == "pt2":
            return dict(torch.export.load(path).module()(batch))
        output = pretrained.from_pretrained(path)(batch)
    found = {"scores": output.scores, "reconstruction": output.reconstruction, "pose": output.pose}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_does_what_the_network_does(kind: str, format: str, exported: Exported) -> None:
    path, told = exported(kind, format)
    assert (told.path, told.format, told.images, told.changed) == (str(path), format, 30, 0)
    assert max(told.differences.values()) < 1e-5
    for count in (1, 2, 3, 20):
        batch = images(40, KINDS[kind].image_shape)[-count:]
        with torch.no_grad():
            wanted = KINDS[kind](batch)
        got = read(path, format, batch)
        assert torch.allclose(got["scores"], wanted.scores, atol=1e-5)
        for name, tensor in (("reconstruction", wanted.reconstruction), ("pose", wanted.pose)):
            assert (name in got) == (tensor is not None) == (name in told.differences)
            assert tensor is None or torch.allclose(got[name], tensor, atol=1e-5)


def test_onnx_says_what_goes_in_and_out(exported: Exported) -> None:
    model = onnx.load(exported("capsnet", "onnx")[0])

    def sizes(value: Any) -> list[int | str]:
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    assert {value.name: sizes(value) for value in model.graph.input} == {"images": ["batch", *SHAPE]}
    outputs = {value.name: sizes(value) for value in model.graph.output}
    assert outputs == {
        "scores": ["batch", 3],
        "reconstruction": ["batch", *SHAPE],
        "pose": ["batch", 3, tiny.SIZES["class_dim"]],
    }
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert json.loads(facts["image_shape"]) == list(SHAPE)
    assert facts["model"] == "capsnet"
    assert facts["capsnet"] == environment.describe(torch.device("cpu"))["capsnet"]


def test_pt2_says_the_same(exported: Exported) -> None:
    extra = {"capsnet.json": ""}
    torch.export.load(exported("baseline", "pt2")[0], extra_files=extra)
    facts = json.loads(extra["capsnet.json"])
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert facts["model"] == "baseline"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Photographs of a stroke on paper, and a file that is no image."""
    paths = []
    for number in range(5):
        paper = Image.new("RGB", (120, 90 + 10 * number), "white")
        paper.paste((20, 20, 60), (30 + 10 * number, 20, 40 + 12 * number, 70))
        paths.append(tmp_path / f"{number}.png")
        paper.save(paths[-1])
    paths.insert(2, tmp_path / "no.png")
    paths[2].write_bytes(b"no image")
    return list(map(str, paths))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "format"), [("capsnet", "onnx"), ("baseline", "pt2"), ("efficient-capsnet", "pt2")])
@pytest.mark.parametrize("framing", ["digits", "off"])
def test_a_file_predicts_for_photographs_what_its_network_does(
    kind: str, format: str, framing: Any, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = (1, 12, 13)
    options = {"conv_channels": (4, 4), "conv_kernel_sizes": (3, 3), "primary_dim": 2, "decoder_sizes": (8,)}
    sizes = {"capsnet": tiny.SIZES, "efficient-capsnet": options, "baseline": {"width": 0.1}}[kind]
    torch.manual_seed(0)
    one = create(kind, image_shape=shape, num_classes=3, classes=CLASSES, **sizes).eval()
    one.preprocessing = Preprocessing(12, 13, 1, resize="pad").with_framing(framing)
    with torch.no_grad():
        error = None if one.decoder is None else 40.0
    card = Card(config={"data": "strokes"}, threshold=None if error is None else Threshold(error, 0.05, 100, "train"))
    pretrained.save_pretrained(one, tmp_path / "net")
    pretrained.save_card(card, tmp_path / "net")
    export(one, tmp_path / f"x.{format}", format=format, images=images(4, shape), card=card)

    def told(model: str) -> Any:
        assert cli.main(["predict", str(tmp_path / model), *pictures, "--json"]) == 2
        captured = capsys.readouterr()
        assert "no.png must be a readable image" in captured.err
        return json.loads(captured.out)

    numbers = {"presence", "runner_up_presence", "reconstruction_error"}
    for ours, theirs in zip(told("net"), told(f"x.{format}"), strict=True):
        assert {k: v for k, v in ours.items() if k not in numbers} == {
            k: v for k, v in theirs.items() if k not in numbers
        }
        assert all(ours[name] == pytest.approx(theirs[name], rel=0.01, abs=1e-3) for name in numbers if ours[name])
        assert ours["framed"] == (framing == "digits")
    words = ["predict", str(tmp_path / f"x.{format}"), pictures[0], "--save-reconstructions", str(tmp_path / "seen")]
    assert cli.main(words) == (2 if one.decoder is None else 0)
    assert (tmp_path / "seen/0.png").is_file() == (one.decoder is not None)


def test_files_that_are_none_of_ours_are_refused(
    exported: Exported, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, *words: str) -> str:
        assert cli.main([*words, str(path), *pictures[: words[0] == "predict"]]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    path, _ = exported("baseline", "onnx")
    assert "x.onnx must be one that `capsnet export` wrote; it does not tell its" in refused(
        stripped(path, tmp_path / "x.onnx"), "predict"
    )
    assert "preprocessing" in refused(Path(path), "predict"), "of a network that was not trained"
    assert "got the file" in refused(Path(path), "evaluate")
    for changes, words in (
        ({"image_shape": "[1, 5, 5]"}, "must take images of (1, 5, 5), as it tells; got: "),
        ({"classes": '["a"]'}, "what it tells and gives differ"),
        ({"classes": "[1]"}, "classes[0] must be text; got 1"),
        ({"preprocessing": "{"}, "preprocessing must be JSON"),
    ):
        reading = json.dumps({"height": 12, "width": 13, "channels": 1})
        path, _ = exported("capsnet", "onnx")
        assert words in refused(stripped(path, tmp_path / "y.onnx", **{"preprocessing": reading, **changes}), "predict")
    for name in ("junk.onnx", "junk.pt2"):
        (tmp_path / name).write_bytes(b"junk")
        assert f"{name} must be a readable {name[5:]} file" in refused(tmp_path / name, "predict")
        (tmp_path / name).write_bytes(b"")
        assert f"{name} must be a readable {name[5:]} file" in refused(tmp_path / name, "predict")


def stripped(path: str | Path, to: Path, **changes: str) -> Path:
    """An ONNX file without what it tells, or with changes of it."""
    model = onnx.load(path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {**told, **changes} if changes else {})
    onnx.save(model, to)
    return to


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    one = network("baseline").train()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    export(one, tmp_path / "x", format="safetensors", images=images(2))
    assert one.training, "dropout goes on, and was not part of the comparison"
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


def test_nothing_of_the_tracing_stays_in_the_kernels(exported: Exported) -> None:
    assert all(type(array) is Tensor for array in pool._free.values())
    one = network("capsnet").train()
    exported("capsnet", "pt2")
    scores = one(images(20, SHAPE)).scores
    scores.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in one.parameters())
    assert type(scores) is Tensor


def test_a_card_and_the_preprocessing_go_along(tmp_path: Path) -> None:
    card, one = Card(config={"data": "mnist"}), network("baseline")
    one.preprocessing = reading(SMALL, Frame(0.0, 0.5))
    export(one, tmp_path / "z", format="safetensors", images=images(2))
    assert pretrained.load(tmp_path / "z").preprocessing == one.preprocessing
    told = json.loads((tmp_path / "z/config.json").read_text())
    told["preprocessing"]["height"] = 7
    (tmp_path / "z/config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"preprocessing must make images of \(2, 3, 5\); it makes \(2, 7, 5\)$"):
        pretrained.load(tmp_path / "z")
    for name, value in (("filter", "bicubic"), ("orientation", "none"), ("ground", "grey")):
        other = told | {"preprocessing": told["preprocessing"] | {"height": 3, name: value}}
        (tmp_path / "z/config.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=rf"preprocessing.{name} must be one of .*; got '{value}'$"):
            pretrained.load(tmp_path / "z")
    export(KINDS["baseline"], tmp_path / "x", format="safetensors", images=images(2), card=card)
    assert pretrained.load_card(tmp_path / "x") == card
    export(KINDS["baseline"], tmp_path / "y", format="safetensors", images=images(2))
    assert tiny.files(tmp_path / "y") == {"config.json", "model.safetensors"}


# what is refused


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    held = path if format != "safetensors" else path / "config.json"
    held.parent.mkdir(exist_ok=True)
    held.write_text("mine")
    with pytest.raises(InputError, match=r"^out must be a .* --overwrite; got .*x$"):
        export(KINDS["baseline"], path, format=format, images=images(2))
    assert held.read_text() == "mine"
    if format == "onnx":
        return
    monkeypatch.setattr(module, "_pt2", lambda one, _: b"new")
    one = KINDS["baseline"]
    monkeypatch.setattr(exported_files, "opened", lambda *_: (lambda batch: module._outputs(one, batch), {}))
    export(KINDS["baseline"], path, format=format, images=images(2), overwrite=True)
    assert held.read_bytes() != b"mine"


def test_a_path_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^out must be a file for pt2; got the folder "):
        export(KINDS["baseline"], tmp_path, format="pt2", images=images(2), overwrite=True)
    with pytest.raises(InputError, match=r"^out must be a folder for safetensors; got the file "):
        export(KINDS["baseline"], tmp_path / "file", format="safetensors", images=images(2), overwrite=True)


@pytest.mark.parametrize("fault", ["predictions", "values", "nan", "shape", "missing"])
def test_a_file_that_does_not_agree_is_not_written(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the exporter may do wrong: the file never stands in its place, and an older one is kept."""

    held: list[Network] = []

    def made(one: Network, _: object) -> bytes:
        held.append(one)
        return b"new"

    def run(batch: Tensor) -> dict[str, Tensor]:
        found = module._outputs(held[0], batch)
        scores, pose = found["scores"], found["pose"]
        wrong = {
            "predictions": {"scores": scores + 1e-4 * torch.randn(scores.shape) + 1e-3 * scores.flip(-1)},
            "values": {"pose": pose + 0.01 * (len(batch) > 7)},
            "nan": {"pose": pose * torch.nan},
            "shape": {"scores": scores[:, :2]},
            "missing": {},
        }[fault]
        kept = {name: tensor for name, tensor in found.items() if fault != "missing" or name != "pose"}
        return {**kept, **wrong}

    monkeypatch.setattr(module, "_pt2", made)
    monkeypatch.setattr(exported_files, "opened", lambda *_: (run, {}))
    path = tmp_path / "x.pt2"
    path.write_text("mine")
    flat = network("capsnet")
    with torch.no_grad():
        flat.get_parameter("class_capsules.weight")[:, :, 1:] = flat.get_parameter("class_capsules.weight")[:, :, :1]
    text = r"^outputs must be" if fault in ("shape", "missing") else r"must predict as the network does.*nothing is"
    with pytest.raises(InputError, match=text):
        export(flat, path, format="pt2", images=images(30, SHAPE), overwrite=True)
    assert path.read_text() == "mine"
    assert tiny.files(tmp_path) == {"x.pt2"}


def test_batches_of_1_2_7_and_the_rest_are_compared() -> None:
    seen: list[int] = []

    def run(batch: Tensor) -> dict[str, Tensor]:
        seen.append(len(batch))
        return module._outputs(KINDS["baseline"], batch)

    changed, differences = compare(KINDS["baseline"], run, images(50), batch_size=16)
    assert seen == [1, 2, 7, 16, 16, 8]
    assert changed == 0
    assert differences == {"scores": 0.0}


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(exported_files, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(InputError, match=r"onnxscript is not installed \(pip install 'capsnet\[onnx\]'\)$"):
        export(KINDS["baseline"], tmp_path / "x.onnx", format="onnx", images=images(2))


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    one = KINDS["baseline"]
    with pytest.raises(InputError, match=r"^format must be one of onnx, pt2, safetensors; got 'tf'$"):
        export(one, tmp_path / "x", format="tf", images=images(2))
    with pytest.raises(InputError, match=r"^images and batch_size must be at least 1; got 0 and 256$"):
        export(one, tmp_path / "x", format="pt2", images=images(0))
    with pytest.raises(InputError, match=r"^images must be \[batch"):
        export(one, tmp_path / "x", format="pt2", images=torch.rand(2, 2, 5, 3))


# the verb


@pytest.fixture
def model(workplace: Path) -> Path:
    """Weights in the working directory that say what they were trained on: strokes of 12 pixels."""
    torch.manual_seed(0)
    pretrained.save_pretrained(create("capsnet", image_shape=(1, 12, 12), **tiny.SIZES), "tiny")
    return Path("tiny")


def test_the_verb_compares_on_the_networks_own_test_images(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Tensor] = []

    def same(one: Network, run: Any, batch: Tensor, *, batch_size: int) -> tuple[int, dict[str, float]]:
        seen.append(batch)
        return 0, {"scores": 1e-7}

    monkeypatch.setattr(module, "compare", same)
    pretrained.save_card(Card(config={"data": "strokes", "image_size": 12}), model)
    strokes_ = strokes.strokes(image_size=12)
    monkeypatch.setattr("capsnet.training.prepare.load", lambda *_, **__: strokes_)
    assert cli.main(["export", "tiny", "--to", "safetensors", "--images", "40"]) == 0
    text = capsys.readouterr().out
    assert "tiny-safetensors: 0 of 40 predictions differ" in text
    assert "(strokes test)" in text
    assert torch.equal(seen[0], to_float(strokes_.test.images[:40]))
    assert cli.main(["export", "tiny", "--to", "safetensors", "--check-all", "--out", "all", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == len(strokes_.test) == len(seen[1])
    assert (told["model"], told["data"], told["path"]) == ("tiny", "strokes test", "all")
    assert pretrained.load_card("all").data == "strokes"


def test_without_data_it_compares_on_noise_and_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(model), "--to", "safetensors"]) == 0
    captured = capsys.readouterr()
    assert "(noise)" in captured.out
    assert "compared on noise" in captured.err
    assert tiny.same_weights(model, "tiny-safetensors")
    assert cli.main(["export", str(model), "--to", "safetensors", "--check-all", "--out", "x"]) == 2
    assert "--data must be given" in capsys.readouterr().err
    assert cli.main(["export", str(model), "--to", "safetensors"]) == 2, "it is there already"
    assert cli.main(["export", str(model), "--to", "safetensors", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tf"], "for argument '--to'. Expected one of"),
        (["--images", "0"], "--images must be at least 1; got 0"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    options: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or "Invalid choice" in error


STRANGER = """
import sys, torch
scores = torch.export.load(sys.argv[1]).module()(torch.zeros(5, 1, 12, 13))["scores"]
print(list(scores.shape), "capsnet" in sys.modules)
"""


@pytest.mark.slow
def test_pt2_is_read_by_a_process_without_this_package(exported: Exported) -> None:
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, str(exported("capsnet", "pt2")[0])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[5, 3] False\n"


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_weights_that_come_with_the_package(
    format: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (tiny.REAL / "mnist").is_dir():
        monkeypatch.setenv("CAPSNET_DATA", str(tiny.REAL))
    assert cli.main(["export", "capsnet-mnist", "--to", format, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 256
    assert told["changed"] == 0
    differences = told["differences"]  # minimal filtering against plain convolutions: 5e-5 and 2.5e-4 on 10,000 images
    assert max(differences["scores"], differences["pose"]) < 1e-4
    assert differences["reconstruction"] < 5e-4
