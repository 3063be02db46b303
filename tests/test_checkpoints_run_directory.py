import copy
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import capsnet
from capsnet import cli, environment
from capsnet.checkpoints import pretrained, run_directory
from capsnet.cli.plot import PLOT
from capsnet.data.manifest import Manifest
from capsnet.errors import InputError
from capsnet.evaluation import predict_split
from capsnet.experiments import records
from capsnet.files import write_atomically
from capsnet.models import Network, create
from capsnet.training import fit as training
from capsnet.training import prepare
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
    result = training.fit(tiny(photos, epochs=1, out="run"))
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
    pretrained.save_pretrained(network, "net")
    Path("net", name).unlink()
    with pytest.raises(InputError, match=message):
        pretrained.load("net")


def test_a_run_that_is_not_finished_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_directory.Run("run").create(tiny(photos), Manifest(()), overwrite=False)
    with pytest.raises(
        InputError, match=r"must hold config.json; there is none \(the run is not finished; see --resume"
    ):
        pretrained.load("run")


def test_weights_that_do_not_fit_name_the_first_wrong_one(network: Network) -> None:
    pretrained.save_pretrained(network, "net")
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
            pretrained.load("net")
        assert message in str(error.value)
        assert "net/model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "restnet"},
            "name must be one of baseline, baseline-multimnist, capsnet, capsule-head, .*; got 'restnet'",
        ),
        ({"bogus": 1}, "must hold options of model capsnet; got 'bogus'$"),
        ({"init": "x" * 3000}, "init must be one of pytorch, authors; got 'xxx"),
        ({"conv_channels": 0}, "conv_channels must be at least 1; got 0"),
        ({"conv_channels": "x"}, "conv_channels must be a whole number; got 'x'$"),
        ({"conv_channels": True}, "conv_channels must be a whole number; got True$"),
        ({"conv_channels": 10**9, "capsule_types": 10**9, "primary_dim": 10**9}, "must be ones that PyTorch can count"),
        ({"conv_channels": 10**26}, "conv_channels must be at most 2,147,483,647; got 1000"),
        ({"image_shape": [3, 2**60, 2**60]}, "must be ones that PyTorch can count"),
        ({"routing_iterations": 10**30}, "routing_iterations must be at most 100; got 1000"),
        ({"primary_scale": float("nan")}, "primary_scale must be a finite number; got nan$"),
        ({"image_shape": 3}, "image_shape must be a list of 3 whole numbers; got 3$"),
        ({"image_shape": [3, 12]}, r"image_shape must be a list of 3 whole numbers; got \[3, 12\]$"),
        ({"classes": ["a"]}, "num_classes"),
        ({"classes": ["a", "b", 3]}, r"classes\[2\] must be text; got 3$"),
        ({"classes": "x" * 10**6}, "classes must be a list of text or nothing; got 'xxx"),
        ({"name": ["capsnet"]}, r"name must be one of .*; got \['capsnet'\]$"),
        ({"return": 1}, "return must be "),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_config_json_is_told(network: Network, change: dict[str, Any], message: str) -> None:
    pretrained.save_pretrained(network, "net")
    edit("net/config.json", **change)
    with pytest.raises(InputError, match=message) as error:
        pretrained.load("net")
    assert str(error.value).startswith("file net/config.json")
    assert len(str(error.value)) < 700


def test_damaged_files_are_told(network: Network) -> None:
    pretrained.save_pretrained(network, "net")
    whole = Path("net/model.safetensors").read_bytes()
    Path("net/model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(InputError, match=r"file net/model.safetensors must be safetensors; got: "):
        pretrained.load("net")
    Path("net/model.safetensors").write_bytes(whole)
    for text, message in (
        ("[", r"must be JSON; got: \S"),
        ("[" * 100_000, "must be JSON; got: maximum recursion depth"),
        ("[]", r"must be a mapping of names to values; got \[\]$"),
        ("3", "must be a mapping of names to values; got 3$"),
        ("{}", "name must be one of .*; got None$"),
    ):
        Path("net/config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=f"^file net/config.json:? .*{message}"):
            pretrained.load("net")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_of_a_far_too_large_file_no_more_is_read_than_can_be_right(network: Network, name: str) -> None:
    pretrained.save_pretrained(network, "net")
    os.truncate(Path("net", name), 5 * 10**9)  # zeros that take no room on the disk
    with pytest.raises(InputError, match=rf"^file net/{name} must hold at most [\d,]+ bytes; got more$"):
        pretrained.load("net")


def test_what_cannot_be_loaded_again_is_not_saved(network: Network) -> None:
    pretrained.save_pretrained(network, "net")
    before = {path.name: path.read_bytes() for path in Path("net").iterdir()}

    def refused(network: Network, message: str) -> None:
        with pytest.raises(InputError, match=message):
            pretrained.save_pretrained(network, "net")
        assert {path.name: path.read_bytes() for path in Path("net").iterdir()} == before

    other = copy.deepcopy(network)
    other.config["num_classes"] += 1
    refused(other, r"^network must be one that can be loaded again; it cannot: .*num_classes must be")
    other = copy.deepcopy(network)
    other.register_buffer("more", torch.zeros(2))
    refused(other, r"it cannot: .*weights must fit model capsnet, which has no more; got one of shape \[2\]$")
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).fill_(math.nan)
    refused(
        other, r"it cannot: the saved one/model.safetensors: weight conv.weight must be finite in float32; it holds"
    )
    other = copy.deepcopy(network)
    del other.config
    refused(other, r"^network must be one that capsnet.create made; got CapsNet without a config$")
    other = copy.deepcopy(network)
    other.config["decoder_sizes"] = {16}
    refused(other, r"^network must be one that can be loaded again; it cannot: .*not JSON serializable$")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_stored_in_another_precision_are_computed_in_float32(network: Network, dtype: torch.dtype) -> None:
    pretrained.save_pretrained(network, "net")
    stored = {name: tensor.to(dtype) for name, tensor in load_file("net/model.safetensors").items()}
    save_file(stored, "net/model.safetensors")
    for name, tensor in pretrained.load("net").state_dict().items():
        assert torch.equal(tensor, stored[name].float())
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64],
    ids=str,
)
def test_weights_of_other_types_are_refused_by_name(network: Network, dtype: torch.dtype) -> None:
    pretrained.save_pretrained(network, "net")
    good = load_file("net/model.safetensors")
    save_file({**good, "conv.bias": good["conv.bias"].to(dtype)}, "net/model.safetensors")
    told = r"weight conv.bias must be a dense tensor of bfloat16, float16, float32, float64; got strided "
    with pytest.raises(InputError, match=rf"^net/model.safetensors: {told}{str(dtype).removeprefix('torch.')}$"):
        pretrained.load("net")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(network: Network, value: float) -> None:
    pretrained.save_pretrained(network, "net")
    good = load_file("net/model.safetensors")
    save_file({**good, "conv.bias": torch.full_like(good["conv.bias"].double(), value)}, "net/model.safetensors")
    with pytest.raises(InputError, match=r"weight conv.bias must be finite in float32; it holds NaN or infinity$"):
        pretrained.load("net")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_pickles_are_never_executed(photos: Path, network: Network) -> None:
    training.fit(tiny(photos, epochs=1, out="run"))
    plain = pickle.dumps(Payload())
    for make in (
        lambda path: path.write_bytes(plain),
        lambda path: torch.save({"version": 1, "network": Payload()}, path),
    ):
        make(Path("run/last.ckpt"))
        with pytest.raises(InputError, match=r"^checkpoint run/last.ckpt must be one that capsnet wrote; [^\n]*$"):
            training.resume("run", epochs=2)
    pretrained.save_pretrained(network, "net")
    Path("net/model.safetensors").write_bytes(plain)
    with pytest.raises(InputError, match=r"must be safetensors"):
        pretrained.load("net")
    assert not Path("executed").exists()
    pickle.loads(plain)
    assert Path("executed").exists()  # so the payload does work


def test_damaged_and_foreign_checkpoints_are_told(photos: Path) -> None:
    training.fit(tiny(photos, epochs=1, out="run"))
    run = run_directory.Run("run")
    whole, state = run.checkpoint_path.read_bytes(), run.load_checkpoint()

    def told() -> str:
        with pytest.raises(InputError) as error:
            training.resume("run", epochs=2)
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix("checkpoint run/last.ckpt must be ")

    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        run.checkpoint_path.write_bytes(damaged)
        assert told() == "one that capsnet wrote; it is damaged"
    other: object
    for other in (torch.zeros(3), {"state_dict": {}}, {**state, "version": "1"}):
        torch.save(other, run.checkpoint_path)
        assert told() == "one that capsnet wrote; it lacks a version"
    torch.save({**state, "version": 9}, run.checkpoint_path)
    assert told() == "of version 1; got 9"
    network = {**state["network"], "conv.bias": torch.zeros(3)}
    torch.save({**state, "network": network}, run.checkpoint_path)
    assert told() == "checkpoint run/last.ckpt: weight conv.bias must be of shape [8]; got [3]"


# what is measured


def test_what_a_run_predicted_is_read_for_the_same_images_only(photos: Path) -> None:
    result = training.fit(tiny(photos, out="run", epochs=1))
    run, split = run_directory.Run("run"), prepare.prepare_data(tiny(photos)).test
    found = run.predictions(split)
    assert found is not None
    assert int(found.wrong.sum()) == result.test.wrong
    again = predict_split(pretrained.load("run"), split)
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(found, again, strict=True))  # type: ignore[arg-type]
    assert run.predictions(replace(split, images=255 - split.images)) is None
    assert run.predictions(split.take(torch.arange(3))) is None
    whole = run.predictions_path.read_bytes()
    for content in (b"", whole[:-100], whole.replace(b"scores.npy", b"scared.npy")):
        run.predictions_path.write_bytes(content)
        with pytest.raises(InputError, match=r"^file run/predictions.npz must be one that capsnet wrote; it is da"):
            run.predictions(split)
    run.predictions_path.write_bytes(whole)
    assert run.predictions(split) is not None
    with np.load(run.predictions_path) as arrays:
        earlier = {name: arrays[name] for name in arrays.files if name != "weights"}
    np.savez(run.predictions_path, **earlier)  # as before 0.2.0
    assert run.predictions(split) is None
    run.predictions_path.write_bytes(whole)
    pretrained.save_pretrained(create(**pretrained.load("run").config), "run")  # other weights than those trained
    assert run.predictions(split) is None
    run.predictions_path.unlink()
    assert run.predictions(split) is None


@pytest.mark.slow
def test_figures_and_report_show_the_error_of_the_result(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where another device or precision would predict otherwise."""
    training.fit(tiny(photos, out="run", epochs=1))
    run, split = run_directory.Run("run"), prepare.prepare_data(tiny(photos)).test
    found = run.predictions(split)
    assert found is not None
    run.write_predictions(found._replace(predictions=(split.labels + 1) % 3), split)
    capsys.readouterr()
    assert cli.main(["plot", "confusion", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["wrong"] == len(split)
    assert cli.main(["report", "run"]) == 0
    assert f"{len(split)} of {len(split)}" in Path("run/report.html").read_text(encoding="utf-8")


def test_every_figure_that_plot_draws_is_made_from_the_weights() -> None:
    """And so is removed where training goes on, or starts anew."""
    figures = set(PLOT.verbs) - {"all"}
    assert len(figures) >= 10
    assert {f"figures/{name}.*" for name in figures} <= set(run_directory.RESULTS)


RESULTS = Path(__file__).parents[1] / "results"


def test_every_run_that_is_kept_is_read_again() -> None:
    """Also those of older versions, which wrote fewer options and columns."""
    kept = [run_directory.Run(path.parent) for path in RESULTS.glob("*/config.yaml")]
    assert len(kept) >= 12
    for run in kept:
        rows, result = run.metrics(), run.result()
        assert [row["epoch"] for row in rows] == list(range(1, result["epochs"] + 1))
        assert result["test"]["total"] > 0
        assert run.config().model in ("capsnet", "efficient-capsnet", "baseline")


def test_all_records_that_are_kept_are_read_again_and_written_the_same(tmp_path: Path) -> None:
    kept = list((RESULTS / "experiments").glob("*.jsonl"))
    assert len(kept) >= 6
    for path in kept:
        experiment, _, budget = path.stem.rpartition("-")
        records.write(tmp_path, records.read(path.parent, experiment, budget))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_metrics_are_read_as_they_were_written(photos: Path) -> None:
    run = run_directory.Run("run")
    assert run.metrics() == []
    training.fit(tiny(photos, out="run"))
    assert run.metrics() == run.load_checkpoint()["rows"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.1", "fast", "metrics.csv, epoch 1: learning_rate must be a whole number or a number; got 'fast'"),
        ("0.1", "nan", "metrics.csv, epoch 1: learning_rate must be a finite number; got nan"),
        ("0.1", "9" * 5000, "metrics.csv, epoch 1: learning_rate must be a .*number; got "),
        ("1,0.1", "1.5,0.1", "metrics.csv, epoch 1: epoch must be a whole number; got 1.5"),
        (",0.1", "", "metrics.csv, epoch 1: seconds must be a whole number or a number; got None"),
        (",0.1", ",0.1,0.1", "metrics.csv, epoch 1: each key must be text; got None"),
        ("epoch", "x", "metrics.csv must have the columns of a run; it lacks epoch"),
        ("epoch", '"', "metrics.csv must be a table; got: unexpected end of data"),
        ("epoch", "x" * 200_000, "metrics.csv must be a table; got: field larger than field limit"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_a_damaged_table_says_where(old: str, new: str, message: str) -> None:
    names = list(run_directory.Row.__required_keys__ - {"epoch", "seconds", "learning_rate"})
    lines = [["epoch", "learning_rate", *names, "seconds"], ["1", "0.1", *["0"] * len(names), "2"]]
    text = "".join(f"{','.join(line)}\n" for line in lines).replace(old, new, 1)
    Path("metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"^file {message}"):
        run_directory.Run(".").metrics()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "must be JSON; got: "),
        ("[]", r"must be a mapping of names to values; got \[\]$"),
        ("{}", "must hold epochs; it is missing$"),
        ('{"epochs": 1, "seconds": "x"}', "must hold test; it is missing$"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_a_damaged_result_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"^file result.json must be readable; got: No such file or directory$"):
        run_directory.Run(".").result()
    Path("result.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"^file result.json:? {message}"):
        run_directory.Run(".").result()


def test_from_pretrained_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("capsnet-models/mnist", "no such folder", "a/b/c"):
        with pytest.raises(InputError, match=f"model must be a folder or a repository .*; got '{name}': ") as error:
            capsnet.from_pretrained(name)
        assert "\n" not in str(error.value)


def test_write_atomically_leaves_the_old_file_or_the_new_one(workplace: Path) -> None:
    path = Path("deep/file.txt")
    write_atomically(path, lambda temporary: temporary.write_text("old", encoding="utf-8"))

    def fails(temporary: Path) -> None:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device; what it held before is kept$"):
        write_atomically(path, fails)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda temporary: 1 // 0)
    assert path.read_text(encoding="utf-8") == "old"
    assert files(workplace) == {"deep/file.txt"}
    with pytest.raises(InputError, match=r"file deep/file.txt/x must be writable; got: [^;]*$"):
        write_atomically(path / "x", lambda temporary: temporary.touch())


def test_what_a_kill_left_half_written_is_removed(photos: Path) -> None:
    run = run_directory.Run("run")
    run.create(tiny(photos), Manifest(()), overwrite=False)
    Path("run/.last.ckpt.123.partial").touch()
    run.reopen(tiny(photos))
    assert files("run") == {"config.yaml", "manifest.csv"}


def test_a_run_that_is_being_trained_is_left_alone(photos: Path) -> None:
    training.fit(tiny(photos, epochs=1, out="run"))
    before = {name: Path("run", name).read_bytes() for name in files("run")}
    told = "run directory run must be free; another process trains in it"
    with run_directory.Run("run").locked():
        with pytest.raises(InputError, match=told):
            training.resume("run", epochs=2)
        with pytest.raises(InputError, match=told):
            training.fit(tiny(photos, epochs=1, out="run", overwrite=True))
    assert {name: Path("run", name).read_bytes() for name in files("run")} == before
    assert training.resume("run", epochs=2).epochs == 2


def test_a_claim_ends_with_its_process(workplace: Path) -> None:
    program = (
        "from capsnet.checkpoints.run_directory import Run\n"
        "with Run('run').locked(): print('mine', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(InputError, match="another process trains in it"), run_directory.Run("run").locked():
            pass
        other.kill()
    with run_directory.Run("run").locked():
        assert files("run") == set()


def test_environment() -> None:
    told = environment.describe(torch.device("cpu"))
    assert told["capsnet"] == capsnet.__version__
    assert told["torch"] == torch.__version__
    assert told["commit"] is None or len(told["commit"].rstrip("+")) == 12
    json.dumps(told)


def test_shipped_weights_load_by_name_and_read_the_test_set(workplace: Path) -> None:
    network = pretrained.load("capsnet-mnist")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert network.parameter_count() == 8_215_568
    Path("capsnet-mnist").mkdir()
    with pytest.raises(InputError, match=r"model folder capsnet-mnist must hold config.json"):
        pretrained.load("capsnet-mnist")  # one's own folder comes first


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"no MNIST in {REAL}; set CAPSNET_DATA")
def test_shipped_weights_are_as_good_as_their_card_says() -> None:
    from capsnet import data
    from capsnet.evaluation import evaluate

    result = evaluate(pretrained.load("capsnet-mnist"), data.load("mnist", data_dir=REAL).test)
    card = (pretrained.WEIGHTS / "capsnet-mnist" / "README.md").read_text(encoding="utf-8")
    assert result.summary().removeprefix("error ") in card
