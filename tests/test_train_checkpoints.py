"""Resuming from a checkpoint that is not as it was written: one line, and the run's files untouched."""

import math
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capsnet.checkpoints import run_directory
from capsnet.errors import InputError
from capsnet.training.fit import fit, resume
from tiny import files, same_weights, tiny

pytestmark = pytest.mark.usefixtures("workplace", "blank_figure")
RUN, PATH = Path("run"), Path("run/last.ckpt")
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch of 5 steps."""
    return fit(tiny(photos, epochs=1, out=str(tmp_path_factory.mktemp("finished") / "run"), report=False)).directory


@pytest.fixture
def checkpoint(finished: Path, workplace: Path) -> dict[str, Any]:
    """The checkpoint of the run in `run`."""
    shutil.copytree(finished, RUN)
    content: dict[str, Any] = torch.load(PATH, weights_only=True)
    return content


def put(*keys: Any, to: Any) -> Change:
    """A change of the value that the keys lead to; `to` may be a function of it."""

    def change(content: dict[str, Any]) -> None:
        inside: Any = content
        for key in keys[:-1]:
            inside = inside[key]
        inside[keys[-1]] = to(inside[keys[-1]]) if callable(to) else to

    return change


def drop(*keys: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        inside: Any = content
        for key in keys[:-1]:
            inside = inside[key]
        del inside[keys[-1]]

    return change


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


MOMENT = ("optimizer", "state", 0, "exp_avg")
SQUARES = ("optimizer", "state", 0, "exp_avg_sq")
STEP = ("optimizer", "state", 0, "step")
CHANGES: dict[str, tuple[Change, str]] = {
    "weights of another shape": (put("network", "conv.bias", to=torch.zeros(3)), "weight conv.bias must be of shape"),
    "weights of another type": (put("network", "conv.bias", to=Tensor.double), "weight conv.bias must be a dense ten"),
    "weights of whole numbers": (put("network", "conv.bias", to=Tensor.long), "weight conv.bias must be a dense tens"),
    "weights of NaN": (put("network", "conv.bias", to=filled(math.nan)), "weight conv.bias must be finite in float32"),
    "sparse weights": (put("network", "conv.bias", to=Tensor.to_sparse), "weight conv.bias must be a dense tensor of"),
    "weights that are none": (put("network", "conv.bias", to=[0.0] * 8), "network.conv.bias must be a tensor; got"),
    "weights of no name": (put("network", to=lambda one: {**one, 3: one["conv.bias"]}), "network must be text; got 3"),
    "no weights": (put("network", to={}), "weights must hold conv.weight of shape"),
    "further weights": (put("network", to=lambda one: {**one, "x": one["conv.bias"]}), "capsnet, which has no x; got"),
    "moments of another shape": (put(*MOMENT, to=torch.zeros(3)), "exp_avg of conv.weight must be of shape"),
    "squares of another shape": (put(*SQUARES, to=torch.zeros(())), "exp_avg_sq of conv.weight must be of shape"),
    "moments of another type": (put(*MOMENT, to=Tensor.half), "exp_avg of conv.weight must be a dense tensor of floa"),
    "moments of NaN": (put(*MOMENT, to=filled(math.nan)), "exp_avg of conv.weight must be finite"),
    "squares below 0": (put(*SQUARES, to=filled(-1)), "exp_avg_sq of conv.weight must be at least 0; got -1"),
    "a step that is no tensor": (put(*STEP, to=5), "optimizer.state.0.step must be a tensor; got 5"),
    "a step of NaN": (put(*STEP, to=torch.tensor(math.nan)), "step of conv.weight must be finite"),
    "a step below 0": (put(*STEP, to=torch.tensor(-1.0)), "step of conv.weight must be the 5 steps done; got -1"),
    "a step of several": (put(*STEP, to=torch.zeros(2)), r"step of conv.weight must be of shape \[\]; got \[2\]"),
    "a step of another type": (put(*STEP, to=torch.tensor(5)), "step of conv.weight must be a dense tensor of float"),
    "no moments": (drop(*MOMENT), "optimizer must hold step, exp_avg, exp_avg_sq of conv.weight; got"),
    "moments of too few": (drop("optimizer", "state", 8), "optimizer must hold the state of 9 parameters; got 8"),
    "no state": (put("optimizer", "state", to={}), "optimizer must hold the state of 9 parameters; got 0"),
    "a list of moments": (put("optimizer", "state", to=[]), "optimizer.state must be a mapping of names to values"),
    "no optimiser": (put("optimizer", to=None), "optimizer must be a mapping of names to values; got None"),
    "an epoch below 0": (put("state", "epoch", to=-5), "epoch must be at least 0; got -5"),
    "an epoch of text": (put("state", "epoch", to="1"), "state.epoch must be a whole number; got '1'"),
    "half an epoch": (put("state", "epoch", to=0.5), "state.epoch must be a whole number; got 0.5"),
    "too many steps": (put("state", "step", to=6), "step must be 0 to the 5 of an epoch; got 6"),
    "steps below 0": (put("state", "step", to=-1), "step must be 0 to the 5 of an epoch; got -1"),
    "seconds of NaN": (put("state", "seconds", to=math.nan), "state.seconds must be a finite number; got nan"),
    "seconds below 0": (put("state", "seconds", to=-1.0), "seconds must be at least 0; got -1.0"),
    "steps of no time": (put("state", "step", to=5), "epoch_seconds must be above 0 after a step only; got 0.0"),
    "time of no step": (
        put("state", "epoch_seconds", to=2.0),
        "epoch_seconds must be above 0 after a step only; got 2.0",
    ),
    "epoch seconds below 0": (put("state", "epoch_seconds", to=-1.0), "seconds must be at least 0; got -1.0"),
    "a position without a step": (drop("state", "step"), "state must be of epoch, step, seconds, epoch_seconds; got"),
    "an unknown position": (
        put("state", to=lambda state: {**state, "x": 1}),
        "state must be of epoch, step, seconds, epoch_seconds; got",
    ),
    "no position": (put("state", to=[]), r"state must be a mapping of names to values; got \[\]"),
    "rows of text": (put("rows", to="rows"), "rows must be a list of mappings of names to values; got"),
    "too many rows": (put("rows", to=lambda rows: rows * 2), "rows must be one for each of 1 finished epochs; got 2"),
    "a row of text": (put("rows", to=["x"]), r"rows\[0\] must be a mapping of names to values; got 'x'"),
    "a row without a loss": (drop("rows", 0, "train_loss"), r"rows\[0\] must hold train_loss; it is missing"),
    "a row with a tensor": (put("rows", 0, "seconds", to=torch.zeros(2)), r"seconds must be a number; got torch.float"),
    "a row of NaN": (put("rows", 0, "train_loss", to=math.nan), "train_loss must be a finite number; got nan"),
    "a row without validation": (drop("rows", 0, "validation_loss"), "row 1 must be of the columns"),
    "a further column": (put("rows", 0, to=lambda row: {**row, "x": 1}), "row 1 must be of the columns"),
    "a row of another epoch": (put("rows", 0, "epoch", to=7), "epoch of row 1 must be 1; got 7"),
    "sums of another shape": (put("sums", to=torch.zeros(3, dtype=torch.float64)), r"sums must be of shape \[4\]"),
    "sums of another type": (put("sums", to=Tensor.float), "sums must be a dense tensor of float64"),
    "sums of NaN": (put("sums", to=filled(math.nan)), "sums must be finite in float64"),
    "sums before a step": (put("sums", to=lambda sums: sums - 1e9), "sums must be at least 0, and 0 before the first"),
    "one moment ahead": (put("optimizer", "state", 2, "step", to=torch.tensor(7.0)), "must be the 5 steps done; got 7"),
    "a configuration of nothing": (put("config", to={}), "must be of the run that config.yaml beside it tells; its "),
    "sums of text": (put("sums", to="x"), "sums must be a tensor; got 'x'"),
    "no configuration": (put("config", to=None), "config must be a mapping of names to values; got None"),
    "a configuration of tensors": (
        put("config", "lr", to=torch.zeros(9)),
        r"lr must be a number; got torch.float32 \[9\]",
    ),
    "another configuration": (put("config", "lr", to=0.5), "its lr is 0.5, not 0.001"),
    "images of text": (put("train_images", to="68"), "train_images must be a whole number; got '68'"),
    "other images": (put("train_images", to=69), "must be the 69 training images that the run began with; got 68"),
    "no best weights": (drop("best"), "best: weights must hold conv.weight of shape .*; it is missing"),
    "best weights of another shape": (put("best", "conv.bias", to=torch.zeros(3)), "best: weight conv.bias must be of"),
    "best weights of NaN": (put("best", "conv.bias", to=filled(math.nan)), "best: weight conv.bias must be finite in"),
    "best weights of text": (put("best", to="x"), "best must be a mapping of names to values; got 'x'"),
    "no rows": (drop("rows"), "must hold rows; it is missing"),
    "no sums": (drop("sums"), "must hold sums; it is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_the_run_is_refused_in_one_line(checkpoint: dict[str, Any], name: str) -> None:
    change, message = CHANGES[name]
    change(checkpoint)
    torch.save(checkpoint, PATH)
    before = {name: Path(RUN, name).read_bytes() for name in files(RUN)}
    with pytest.raises(InputError, match=rf"(run/last.ckpt.*|^data .*){message}") as caught:
        resume(RUN, epochs=2)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert {name: Path(RUN, name).read_bytes() for name in files(RUN)} == before


def test_options_of_the_optimiser_are_those_of_the_configuration(photos: Path, checkpoint: dict[str, Any]) -> None:
    fit(tiny(photos, epochs=2, out="whole"))
    for name, value in {
        "betas": (0.5, 0.5),
        "weight_decay": 9.0,
        "eps": 1.0,
        "amsgrad": True,
        "maximize": True,
    }.items():
        checkpoint["optimizer"]["param_groups"][0][name] = value
    torch.save(checkpoint, PATH)
    resume(RUN, epochs=2)
    assert same_weights("whole", RUN)


def test_moments_in_another_order_in_memory_are_the_same_moments(photos: Path, checkpoint: dict[str, Any]) -> None:
    """Fused Adam walks through parameters and moments side by side, and asks nobody how they lie."""
    fit(tiny(photos, epochs=2, out="whole"))
    moments = checkpoint["optimizer"]["state"]
    assert moments[3]["exp_avg"].ndim == 4
    for key in ("exp_avg", "exp_avg_sq"):
        there = moments[3][key]
        moments[3][key] = there.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert moments[3][key].stride() != there.stride()
    torch.save(checkpoint, PATH)
    resume(RUN, epochs=2)
    assert same_weights("whole", RUN)


def test_a_changed_byte_of_a_tensor_is_found(checkpoint: dict[str, Any]) -> None:
    whole = PATH.read_bytes()
    with zipfile.ZipFile(PATH) as archive:
        tensors = [part for part in archive.infolist() if "/data/" in part.filename and part.file_size >= 16]
    for part in (tensors[0], tensors[-1]):
        name, extra = struct.unpack_from("<2H", whole, part.header_offset + 26)  # of the header before the content
        place = part.header_offset + 30 + name + extra + part.file_size // 2
        PATH.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            InputError, match=r"^checkpoint run/last.ckpt must be one that capsnet wrote; it is damaged$"
        ):
            resume(RUN, epochs=2)


def test_a_packed_checkpoint_is_not_unpacked(checkpoint: dict[str, Any]) -> None:
    with zipfile.ZipFile(PATH) as plain, zipfile.ZipFile("packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    Path("packed").replace(PATH)
    with pytest.raises(InputError, match=r"must be one that capsnet wrote; it is damaged$"):
        resume(RUN, epochs=2)


def test_a_far_too_large_checkpoint_is_not_read(checkpoint: dict[str, Any]) -> None:
    with PATH.open("r+b") as file:
        file.truncate(5 * 10**9)
    with pytest.raises(
        InputError, match=r"^checkpoint run/last.ckpt must hold at most [\d,]+ bytes for this network; "
    ):
        resume(RUN, epochs=2)


@pytest.mark.parametrize(
    "name",
    [
        "moments of another shape",
        pytest.param("squares of another shape", marks=pytest.mark.slow),
        pytest.param("a step of several", marks=pytest.mark.slow),
    ],
)
def test_the_command_answers_with_one_line_and_2(checkpoint: dict[str, Any], name: str) -> None:
    """In a process of its own: fused Adam ended it with SIGSEGV."""
    CHANGES[name][0](checkpoint)
    torch.save(checkpoint, PATH)
    command = [sys.executable, "-m", "capsnet", "train", "--resume", str(RUN), "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("capsnet train: error: checkpoint run/last.ckpt: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 8), (0.3, 2)])
def test_checkpoints_of_short_epochs_take_a_small_share_of_the_time(
    photos: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: int
) -> None:
    """A checkpoint of 0.3 seconds is written after the first and the last of eight epochs; the weights are the same."""
    saved, save = list[int](), run_directory.Run.save_checkpoint

    def slow(self: run_directory.Run, content: dict[str, Any]) -> None:
        time.sleep(seconds)
        saved.append(content["state"]["epoch"])
        save(self, content)

    monkeypatch.setattr(run_directory.Run, "save_checkpoint", slow)
    fit(tiny(photos, out="run", epochs=8))
    assert len(saved) == expected
    assert saved[-1] == 8
    monkeypatch.setattr(run_directory.Run, "save_checkpoint", save)
    fit(tiny(photos, out="plain", epochs=8))
    assert same_weights("run", "plain")
