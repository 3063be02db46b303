import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import capsnet
from capsnet import runs, train
from capsnet.errors import InputError
from capsnet.models import Network, create
from tiny import REAL, SIZES, files, tiny

pytestmark = pytest.mark.usefixtures("workplace", "blank_figure")


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return create("capsnet", image_shape=(3, 12, 13), num_classes=3, classes=("a", "b", "c"), **SIZES)


def edit(path: str, **changes: Any) -> None:
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    Path(path).write_text(json.dumps({**values, **changes}), encoding="utf-8")


def test_saved_and_loaded_it_is_the_same_network(network: Network) -> None:
    capsnet.save_pretrained(network, "some/folder")
    assert files("some/folder") == {"model.safetensors", "config.json"}
    images = torch.rand(5, 3, 12, 13)
    for back in (capsnet.load("some/folder"), capsnet.from_pretrained("some/folder")):
        assert torch.equal(back(images).scores, network(images).scores)
        assert back.config == network.config
        assert back.classes == ("a", "b", "c")
        assert not back.training
        assert all(parameter.requires_grad for parameter in back.parameters())


def test_load_a_run(photos: Path) -> None:
    result = train.fit(tiny(photos, epochs=1, out="run"))
    images = torch.rand(5, 3, 12, 13)
    assert torch.equal(capsnet.load("run")(images).scores, result.network(images).scores)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model folder net must hold model.safetensors; there is none"),
        ("config.json", "model folder net must hold config.json; there is none"),
    ],
)
def test_a_missing_file_is_told(network: Network, name: str, message: str) -> None:
    runs.save_pretrained(network, "net")
    Path("net", name).unlink()
    with pytest.raises(InputError, match=message):
        runs.load("net")


def test_a_run_that_is_not_finished_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.Run("run").begin(tiny(photos), overwrite=False)
    with pytest.raises(
        InputError, match=r"must hold config.json; there is none \(the run is not finished; see --resume"
    ):
        runs.load("run")


def test_weights_that_do_not_fit_name_the_first_wrong_one(network: Network) -> None:
    runs.save_pretrained(network, "net")
    good = load_file("net/model.safetensors")
    key = "class_capsules.weight"
    shape = list(good[key].shape)
    for weights, message in (
        (
            {**good, key: good[key][:-1].contiguous()},
            f"weight {key} must be of shape {shape}; got {[shape[0] - 1, *shape[1:]]}",
        ),
        ({name: x for name, x in good.items() if name != key}, f"must hold {key} of shape {shape}; it is missing"),
        ({**good, "head.weight": torch.zeros(2)}, "which has no head.weight; got one of shape [2]"),
    ):
        save_file(weights, "net/model.safetensors")
        with pytest.raises(InputError) as error:
            runs.load("net")
        assert message in str(error.value)
        assert "net/model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet"}, "model must be one of baseline, baseline-multimnist, capsnet; got 'resnet'"),
        ({"bogus": 1}, "options of model capsnet must be among"),
        ({"conv_channels": 0}, "conv_channels must be at least 1; got 0"),
        ({"conv_channels": "x"}, "must be the JSON that capsnet writes"),
        ({"image_shape": 3}, "must be the JSON that capsnet writes"),
        ({"classes": ["a"]}, "num_classes"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_config_json_is_told(network: Network, change: dict[str, Any], message: str) -> None:
    runs.save_pretrained(network, "net")
    edit("net/config.json", **change)
    with pytest.raises(InputError, match=message) as error:
        runs.load("net")
    assert str(error.value).startswith("file net/config.json")


def test_damaged_files_are_told(network: Network) -> None:
    runs.save_pretrained(network, "net")
    whole = Path("net/model.safetensors").read_bytes()
    Path("net/model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(InputError, match=r"file net/model.safetensors must be safetensors; got: "):
        runs.load("net")
    Path("net/model.safetensors").write_bytes(whole)
    for text in ("[", "[]", "3"):
        Path("net/config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"file net/config.json must be the JSON that capsnet writes; got: \S"):
            runs.load("net")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_pickles_are_never_executed(photos: Path, network: Network) -> None:
    train.fit(tiny(photos, epochs=1, out="run"))
    plain = pickle.dumps(Payload())
    for make in (
        lambda path: path.write_bytes(plain),
        lambda path: torch.save({"version": 1, "network": Payload()}, path),
    ):
        make(Path("run/last.ckpt"))
        with pytest.raises(InputError, match=r"^checkpoint run/last.ckpt must be one that capsnet wrote; [^\n]*$"):
            train.resume("run", epochs=2)
    runs.save_pretrained(network, "net")
    Path("net/model.safetensors").write_bytes(plain)
    with pytest.raises(InputError, match=r"must be safetensors"):
        runs.load("net")
    assert not Path("executed").exists()
    pickle.loads(plain)
    assert Path("executed").exists()  # so the payload does work


def test_damaged_and_foreign_checkpoints_are_told(photos: Path) -> None:
    train.fit(tiny(photos, epochs=1, out="run"))
    run = runs.Run("run")
    whole, state = run.checkpoint_path.read_bytes(), run.load_checkpoint()

    def told() -> str:
        with pytest.raises(InputError) as error:
            train.resume("run", epochs=2)
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix("checkpoint run/last.ckpt must be ")

    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        run.checkpoint_path.write_bytes(damaged)
        assert told() == "one that capsnet wrote; it is damaged"
    torch.save(torch.zeros(3), run.checkpoint_path)
    assert told().startswith("one that capsnet wrote; it lacks version, config")
    torch.save({"state_dict": {}}, run.checkpoint_path)
    assert told().startswith("one that capsnet wrote; it lacks version, config")
    torch.save({**state, "version": 9}, run.checkpoint_path)
    assert told() == "of version 1; got 9"
    network = {**state["network"], "conv.bias": torch.zeros(3)}
    torch.save({**state, "network": network}, run.checkpoint_path)
    assert told() == "run/last.ckpt: weight conv.bias must be of shape [8]; got [3]"


def test_from_pretrained_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("capsnet-models/mnist", "no such folder", "a/b/c"):
        with pytest.raises(InputError, match=f"model must be a folder or a repository .*; got '{name}': ") as error:
            capsnet.from_pretrained(name)
        assert "\n" not in str(error.value)


def test_write_atomically_leaves_the_old_file_or_the_new_one(workplace: Path) -> None:
    path = Path("deep/file.txt")
    runs.write_atomically(path, lambda temporary: temporary.write_text("old", encoding="utf-8"))

    def fails(temporary: Path) -> None:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device; what it held before is kept$"):
        runs.write_atomically(path, fails)
    with pytest.raises(ZeroDivisionError):
        runs.write_atomically(path, lambda temporary: 1 // 0)
    assert path.read_text(encoding="utf-8") == "old"
    assert files(workplace) == {"deep/file.txt"}
    with pytest.raises(InputError, match=r"file deep/file.txt/x must be writable; got: [^;]*$"):
        runs.write_atomically(path / "x", lambda temporary: temporary.touch())


def test_what_a_kill_left_half_written_is_removed(photos: Path) -> None:
    run = runs.Run("run")
    run.begin(tiny(photos), overwrite=False)
    Path("run/.last.ckpt.123.partial").touch()
    run.go_on(tiny(photos))
    assert files("run") == {"config.yaml"}


def test_a_run_that_is_being_trained_is_left_alone(photos: Path) -> None:
    train.fit(tiny(photos, epochs=1, out="run"))
    before = {name: Path("run", name).read_bytes() for name in files("run")}
    told = "run directory run must be free; another process trains in it"
    with runs.Run("run").claimed():
        with pytest.raises(InputError, match=told):
            train.resume("run", epochs=2)
        with pytest.raises(InputError, match=told):
            train.fit(tiny(photos, epochs=1, out="run", overwrite=True))
    assert {name: Path("run", name).read_bytes() for name in files("run")} == before
    assert train.resume("run", epochs=2).epochs == 2


def test_a_claim_ends_with_its_process(workplace: Path) -> None:
    program = "from capsnet import runs\nwith runs.Run('run').claimed(): print('mine', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(InputError, match="another process trains in it"), runs.Run("run").claimed():
            pass
        other.kill()
    with runs.Run("run").claimed():
        assert files("run") == set()


def test_environment() -> None:
    told = runs.environment(torch.device("cpu"))
    assert told["capsnet"] == capsnet.__version__
    assert told["torch"] == torch.__version__
    assert told["commit"] is None or len(told["commit"].rstrip("+")) == 12
    json.dumps(told)


def test_public_names() -> None:
    assert all(hasattr(runs, name) for name in runs.__all__)


def test_shipped_weights_load_by_name_and_read_the_test_set(workplace: Path) -> None:
    network = runs.load("capsnet-mnist")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert network.parameter_count() == 8_215_568
    Path("capsnet-mnist").mkdir()
    with pytest.raises(InputError, match=r"model folder capsnet-mnist must hold config.json"):
        runs.load("capsnet-mnist")  # one's own folder comes first


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"no MNIST in {REAL}; set CAPSNET_DATA")
def test_shipped_weights_are_as_good_as_their_card_says() -> None:
    from capsnet import data
    from capsnet.evaluation import evaluate

    result = evaluate(runs.load("capsnet-mnist"), data.load("mnist", data_dir=REAL).test)
    card = (runs.WEIGHTS / "capsnet-mnist" / "README.md").read_text(encoding="utf-8")
    assert result.summary().removeprefix("error ") in card
