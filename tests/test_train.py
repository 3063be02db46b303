import importlib
import json
import math
import os
import signal
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import capsnet
from capsnet import devices, report
from capsnet.checkpoints import pretrained, run_directory
from capsnet.config import Config, preset, roles
from capsnet.data import Dataset, load
from capsnet.data.augment import augment
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.evaluation import Evaluation, evaluate, predict_split
from capsnet.kernels import native
from capsnet.options import RESUMABLE
from capsnet.training import batches, defaults, loop, prepare, schedule
from capsnet.training import fit as training
from capsnet.training.fit import fit, resume
from capsnet.training.state import TrainingState
from tiny import REAL, SIZES, at_step, files, metrics, pairs, same_weights, tiny, weights

pytestmark = pytest.mark.usefixtures("workplace", "blank_figure")

WRITTEN = {
    "config.yaml",
    "manifest.csv",
    "metrics.csv",
    "result.json",
    "predictions.npz",
    "last.ckpt",
    "model.safetensors",
    "config.json",
    "card.json",
    "README.md",
    "report.html",
    "figures/reconstructions.png",
}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def checkpoint(run: str) -> Any:
    return run_directory.Run(run).load_checkpoint()


def test_a_run_writes_these_files_and_no_others(photos: Path, workplace: Path) -> None:
    result = fit(tiny(photos, out="run"))
    assert files(workplace) == {f"run/{name}" for name in WRITTEN}
    rows = metrics("run")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "train_error_percent", "validation_loss", "learning_rate"} <= rows[0].keys()
    told = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert told["test"] == result.test.to_dict()
    assert told["test"]["total"] == 15
    assert told["train_images"] == 68  # 75 less a tenth
    assert told["validation"]["total"] == 7
    assert (told["epochs"], told["processes"], told["precision"], told["seed"]) == (2, 1, "32", 0)
    assert told["torch"] == torch.__version__
    assert (result.directory, result.epochs) == (Path("run"), 2)
    assert not result.network.training
    assert all(parameter.isfinite().all() for parameter in result.network.parameters())


def test_it_learns(photos: Path) -> None:
    assert fit(tiny(photos, epochs=15, lr=0.01)).test.error_percent < 20  # chance is 67


def test_same_seed_same_run_and_other_seed_other_run(photos: Path) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        fit(tiny(photos, out=name, seed=seed))
    assert same_weights("one", "again")
    assert metrics("one") == metrics("again")
    assert not same_weights("one", "other")
    assert metrics("one") != metrics("other")


def test_without_an_own_place_a_run_gets_the_next_free_one(photos: Path) -> None:
    first, second = fit(tiny(photos, epochs=1)), fit(tiny(photos, epochs=1))
    assert first.directory == Path("runs/photos-capsnet-seed0")
    assert second.directory == Path("runs/photos-capsnet-seed0-2")


def test_a_caller_in_a_thread_can_train(photos: Path) -> None:
    results: list[training.Result] = []
    thread = threading.Thread(target=lambda: results.append(fit(tiny(photos, epochs=1))))
    thread.start()
    thread.join()
    assert results[0].epochs == 1


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("blank_figure")
def test_killed_before_or_after_any_write_and_resumed_ends_the_same(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(photos, epochs=1, checkpoint_steps=2)
    writes: list[str] = []
    real = Path.replace
    moment = [0, 0]  # the write to die at, counted from 1, and whether after it

    def die_at(self: Path, target: Any) -> Path:
        if Path(target).suffix == ".so":
            return real(self, target)  # the kernels, compiled once
        writes.append(Path(target).name)
        if (len(writes), 0) == tuple(moment):
            raise Killed
        done = real(self, target)
        if (len(writes), 1) == tuple(moment):
            raise Killed
        return done

    monkeypatch.setattr(Path, "replace", die_at)
    fit(replace(config, out="whole"))
    number = len(writes)
    assert writes.count("last.ckpt") == 3  # after steps 2 and 4 of 5, and at the end
    for k in range(number):
        for after in (0, 1):
            run = f"killed-{k}-{after}"
            writes.clear()
            moment[:] = [k + 1, after]
            with pytest.raises(Killed):
                fit(replace(config, out=run))
            moment[:] = [0, 0]
            if k + after < 2:  # before the configuration is written nothing has begun
                fit(replace(config, out=run))
            else:
                resume(run)
            assert same_weights("whole", run), writes[k]
            assert metrics("whole") == metrics(run), writes[k]
            assert files(run) == WRITTEN


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5, 6, 10])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_ends_the_same(
    photos: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    fit(tiny(photos, out="whole"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: send(number))
        with pytest.raises(Interrupted, match=r"go on with: capsnet train --resume run") as stop:
            fit(tiny(photos, out="run"))
    assert stop.value.signal_number == number
    assert f"in epoch {1 if step < 6 else 2} after step {(step - 1) % 5 + 1} of 5" in str(stop.value)
    assert signal.getsignal(number) is before
    assert checkpoint("run")["state"]["step"] == (step - 1) % 5 + 1
    resume("run")
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")


@pytest.mark.slow
def test_a_signal_during_the_evaluations_stops_there(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capsnet.training.loop.inference_batch", lambda network, at_most: 4)
    fit(tiny(photos, out="whole"))
    for call, where in ((1, "in epoch 1 after step 5 of 5"), (5, "after the last epoch")):
        run, count = f"run-{call}", [0]

        def told(*arguments: Any, call: int = call, count: list[int] = count, **options: Any) -> Any:
            def each_batch() -> None:
                options["each_batch"]()
                count[0] += 1
                if count[0] == call:
                    send(signal.SIGTERM)

            return predict_split(*arguments, **{**options, "each_batch": each_batch})

        with monkeypatch.context() as patch:
            for place in (loop, training):
                patch.setattr(place, "predict_split", told)
            with pytest.raises(Interrupted, match=where):
                fit(tiny(photos, out=run))
        resume(run)
        assert same_weights("whole", run)
        assert metrics("whole") == metrics(run)


def test_the_second_signal_acts_at_once(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice(number: int) -> None:
        send(number)
        send(number)

    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: twice(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(photos, out="run"))
    assert files("run") == {"config.yaml", "manifest.csv"}
    assert "once more to stop at once" in capfd.readouterr().err
    at_step(monkeypatch, 2, lambda: twice(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        fit(tiny(photos, out="other"))
    assert stop.value.code == 143


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [0]

    def augmented(*arguments: Any) -> Any:
        count[0] += 1
        return augment(*arguments) * (math.nan if count[0] == 8 else 1)

    monkeypatch.setattr(batches, "augment", augmented)
    with pytest.raises(
        Diverged, match=r"2 at step 3 of 5; not finite first: the images of the step; the last good .*--lr"
    ):
        fit(tiny(photos, out="run"))
    kept = checkpoint("run")
    assert (kept["state"]["epoch"], kept["state"]["step"]) == (1, 0)
    assert all(tensor.isfinite().all() for tensor in kept["network"].values())
    assert "result.json" not in files("run")
    assert "model.safetensors" not in files("run")


def test_weights_that_are_not_finite_are_never_saved(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.optim.Adam.step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        done = real(self, *arguments, **options)
        count[0] += 1
        if count[0] == 4:  # after a finite loss, and before the checkpoint of step 4
            self.param_groups[0]["params"][0].data.fill_(math.inf)
        return done

    count = [0]
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(
        Diverged, match=r"in epoch 1 at step 4 of 5; not finite first: the weights conv.weight; the last"
    ):
        fit(tiny(photos, out="run", checkpoint_steps=2))
    kept = checkpoint("run")
    assert kept["state"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in kept["network"].values())


@pytest.mark.parametrize("changes", [{}, {"checkpoint_steps": 1}, {"batch_size": 100, "epochs": 1, "validation": 0}])
def test_a_learning_rate_far_too_high_diverges(photos: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(Diverged, match=r"became NaN or infinite .*; not finite first: the (output of|weights) \w+"):
        fit(tiny(photos, out="run", lr=1e30, **changes))
    assert "result.json" not in files("run")
    if "last.ckpt" in files("run"):
        assert all(tensor.isfinite().all() for tensor in checkpoint("run")["network"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["last.ckpt", "metrics.csv", "model.safetensors", "reconstructions.png", "result.json"]
)
def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(
    photos: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fit(tiny(photos, out="whole"))
    real, count = Path.replace, [0]

    def full(self: Path, target: Any) -> Path:
        count[0] += Path(target).name == name
        if Path(target).name == name and count[0] > (1 if name in ("last.ckpt", "metrics.csv") else 0):
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(InputError, match=rf"file run/.*{name} must be writable; got: No space left on device"):
            fit(tiny(photos, out="run", checkpoint_steps=3))
    assert checkpoint("run")["version"] == 1
    assert not [path for path in files("run") if "partial" in path]
    resume("run")
    assert same_weights("whole", "run")


@pytest.mark.slow
def test_more_epochs_go_on_as_one_longer_run(photos: Path) -> None:
    fit(tiny(photos, out="long", epochs=3))
    fit(tiny(photos, out="run", epochs=1))
    assert resume("run", epochs=3).epochs == 3
    assert same_weights("long", "run")
    assert metrics("long") == metrics("run")
    assert run_directory.Run("run").config().epochs == 3
    with pytest.raises(InputError, match=r"epochs must be at least the 3 that the run has begun; got 2"):
        resume("run", epochs=2)


def test_resuming_a_finished_run_only_evaluates_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(tiny(photos, out="run"))
    before = (weights("run"), metrics("run"))
    at_step(monkeypatch, 1, lambda: pytest.fail("trained"))
    again = resume("run")
    assert again.test == first.test
    assert again.validation == first.validation
    assert metrics("run") == before[1]
    assert all(torch.equal(before[0][name], tensor) for name, tensor in weights("run").items())


def test_resume_refuses_what_would_make_another_run(photos: Path) -> None:
    fit(tiny(photos, out="run", epochs=1))
    before = {name: Path("run", name).read_bytes() for name in WRITTEN}
    wrong = r"lr of a resumed run must stay 0.001; got 0.1; and seed of .* stay 0; got 1 \(only checkpoint_steps, "
    with pytest.raises(InputError, match=wrong):
        resume("run", lr=0.1, seed=1, epochs=4)
    with pytest.raises(InputError, match=r"bogus of a resumed run must stay None; got 3"):
        resume("run", bogus=3)
    with pytest.raises(InputError, match=r"run directory nowhere must hold a config.yaml"):
        resume("nowhere")
    assert before == {name: Path("run", name).read_bytes() for name in WRITTEN}
    assert roles(RESUMABLE) <= set(Config().flat())


def test_resume_refuses_a_checkpoint_of_another_run(photos: Path) -> None:
    fit(tiny(photos, out="run", epochs=1))
    fit(tiny(photos, out="other", epochs=1, lr=0.5))
    Path("other/last.ckpt").replace("run/last.ckpt")
    with pytest.raises(InputError, match=r"run/last.ckpt must be of the run .* its lr is 0.5, not 0.001"):
        resume("run")
    Path("run/last.ckpt").unlink()
    with pytest.raises(InputError, match=r"must hold a last.ckpt to go on from"):
        resume("run", epochs=2)


def test_resume_refuses_other_data(photos: Path, workplace: Path) -> None:
    import shutil

    shutil.copytree(photos, "own")
    fit(tiny(Path("own"), out="run", epochs=1))
    Path("run/manifest.csv").unlink()  # as of a run from before there were any
    for extra in range(10):
        shutil.copy("own/a/1.png", f"own/a/more{extra}.png")
    with pytest.raises(InputError, match=r"data own must be the 68 training images that the run began with; got \d+"):
        resume("run", epochs=2)


def test_a_directory_in_use_is_refused(photos: Path) -> None:
    fit(tiny(photos, out="run", epochs=1))
    before = {name: Path("run", name).read_bytes() for name in WRITTEN}
    with pytest.raises(InputError, match=r"out directory run must be free; it holds a run .*--overwrite"):
        fit(tiny(photos, out="run"))
    assert before == {name: Path("run", name).read_bytes() for name in WRITTEN}
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"out directory mine must be empty or new; it holds other files"):
            fit(tiny(photos, out="mine", overwrite=overwrite))
    with pytest.raises(InputError, match=r"out must be a directory; got the file mine/thesis.tex"):
        fit(tiny(photos, out="mine/thesis.tex"))
    Path("mine/config.yaml").write_text("jekyll: true\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"jekyll is no option"):
        fit(tiny(photos, out="mine", overwrite=True))
    assert files("mine") == {"thesis.tex", "config.yaml"}


def test_overwrite_leaves_nothing_of_the_old_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny(photos, out="run", epochs=1))
    Path("run/notes.txt").write_text("mine", encoding="utf-8")
    at_step(monkeypatch, 1, lambda: send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        fit(tiny(photos, out="run", overwrite=True, seed=1))
    assert files("run") == {"config.yaml", "last.ckpt", "manifest.csv", "notes.txt"}
    assert not run_directory.Run("run").config().overwrite  # `--config run/config.yaml` must not replace anything
    assert run_directory.Run("run").config().out is None
    resume("run")
    assert files("run") == {*WRITTEN, "notes.txt"}


def test_validation_0_trains_on_everything(photos: Path) -> None:
    result = fit(tiny(photos, validation=0, epochs=1, out="run"))
    assert result.validation is None
    assert json.loads(Path("run/result.json").read_text(encoding="utf-8"))["train_images"] == 75
    assert "validation_loss" not in metrics("run")[0]


def test_the_other_options_train_too(photos: Path) -> None:
    config = tiny(photos, epochs=1, flip=True, rotation=10.0, scale=0.1, shear=0.1, mask="prediction", leaky=True)
    fit(config.changed(channels=1, image_size=16, preset="authors", routing_bias=True, reconstruction=False, out="run"))
    assert files("run") == WRITTEN - {"figures/reconstructions.png"}
    fit(config.changed(precision="bf16", detach_routing=True))


@pytest.mark.slow
def test_the_baseline_with_dropout_resumes_too(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.of(data=str(photos), model="baseline", epochs=2, batch_size=16)
    fit(replace(config, out="whole"))
    assert files("whole") == WRITTEN - {"figures/reconstructions.png"}
    at_step(monkeypatch, 7, lambda: send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        fit(replace(config, out="run"))
    resume("run")
    assert same_weights("whole", "run")


def test_learning_rate() -> None:
    config = Config.of(lr=0.5, lr_decay=0.9, lr_floor=0.01)
    assert schedule.learning_rate(config, 0, 100) == 0.5
    assert schedule.learning_rate(config, 100, 100) == pytest.approx(0.45)
    assert schedule.learning_rate(config, 150, 100) == pytest.approx(0.5 * 0.9**1.5)
    assert schedule.learning_rate(config, 10**6, 100) == 0.01
    assert schedule.learning_rate(replace(config, lr_decay_steps=50), 100, 999) == pytest.approx(0.5 * 0.81)


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.5), ("cosine", 0.5), ("exponential", 0.9**4.5)])
def test_a_learning_rate_that_rises_and_falls_over_the_run(kind: str, middle: float) -> None:
    config = Config.of(lr=0.5, lr_floor=0.0, epochs=10, schedule=kind, warmup=0.1)
    rates = [schedule.learning_rate(config, step, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.5 / 100)
    assert rates[49] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0.5)
    assert rates[550] == pytest.approx(0.5 * middle, rel=1e-9)
    assert all(later < earlier for earlier, later in pairwise(rates[100:]))
    if kind != "exponential":
        assert 0 < rates[-1] < 0.001
        floored = config.changed(lr_floor=0.1)
        assert schedule.learning_rate(floored, 550, 100) == pytest.approx(0.1 + 0.4 * middle)
        assert schedule.learning_rate(floored, 1000, 100) == pytest.approx(0.1)
        assert schedule.learning_rate(config.changed(warmup=0.0), 0, 100) == 0.5


NEW = {"schedule": "linear", "warmup": 0.2, "ema": 0.9, "weight_decay": 0.01, "augment": "affine", "erase": 2}


def test_a_run_with_averaged_weights_resumes_to_the_same(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(photos, **NEW)
    whole = fit(config.changed(out="whole"))
    at_step(monkeypatch, 7, lambda: send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        fit(config.changed(out="run"))
    assert resume("run").test == whole.test
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert result["selection"].startswith("weights averaged over the steps (decay 0.9) after epoch ")


def test_what_is_kept_and_measured_is_the_average(photos: Path) -> None:
    """Checked against an average of the weights after each step, written down again here."""
    config, seen, step = tiny(photos, ema=0.6, epochs=1), list[list[torch.Tensor]](), torch.optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:

        def noted(self: torch.optim.Adam, *arguments: Any, **more: Any) -> Any:
            result = step(self, *arguments, **more)
            seen.append([x.detach().clone() for x in self.param_groups[0]["params"]])
            return result

        patch.setattr(torch.optim.Adam, "step", noted)
        fitted = fit(config.changed(out="run"))
    assert len(seen) == 5
    expected = seen[0]
    for n, here in enumerate(seen[1:], 1):
        share = min(0.6, (1 + n) / (10 + n))
        expected = [share * a + (1 - share) * w for a, w in zip(expected, here, strict=True)]
    for kept, wanted, last in zip(fitted.network.parameters(), expected, seen[-1], strict=True):
        torch.testing.assert_close(kept.detach(), wanted)
        assert not torch.equal(kept, last)
    split = prepare.prepare_data(config).test
    assert int(predict_split(pretrained.load("run"), split).wrong.sum()) == fitted.test.wrong


def test_more_epochs_of_a_schedule_that_ends_are_told(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny(photos, schedule="linear", out="run"))
    capsys.readouterr()
    resume("run", epochs=4)
    told = "the linear schedule now ends after 4 epochs, not 2: the learning rate goes on at 0.000501, not 1e-06"
    assert told in capsys.readouterr().err


def test_the_learning_rate_reaches_the_optimiser(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = torch.optim.Adam.step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    config = tiny(photos, lr_decay_steps=1, lr_decay=0.5, lr_floor=1e-5)
    fit(config)
    assert seen == [schedule.learning_rate(config, k, 5) for k in range(10)]
    assert seen[:2] == [0.001, 0.0005]


def test_devices_that_are_not_there_are_refused(photos: Path) -> None:
    most = max(2, os.cpu_count() or 1)
    with pytest.raises(InputError, match=rf"devices must be at most the {most} CPU cores of this machine; got 999"):
        devices.resolve_device(Config.of(device="cpu", devices=999))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"device cuda must have a CUDA GPU"):
            fit(tiny(photos, device="cuda"))


def test_an_option_of_another_model_is_refused(photos: Path) -> None:
    with pytest.raises(InputError, match=r"^conv_channels is an option of model capsnet, not of baseline"):
        fit(tiny(photos, model="baseline"))
    assert not Path("runs").exists()


def test_validation_is_the_sets_own_or_a_tenth(photos: Path) -> None:
    config = tiny(photos)
    assert len(prepare.prepare_data(config).train) == 68
    split = prepare.prepare_data(replace(config, validation=20))
    assert split.validation is not None
    assert (len(split.train), len(split.validation), len(split.test)) == (55, 20, 15)


def test_presets_build_their_networks(photos: Path) -> None:
    dataset = prepare.prepare_data(tiny(photos))
    config = preset("authors").changed(conv_kernel_size=5, primary_kernel_size=5)
    network = prepare.build(config, dataset)
    assert network.config["routing_bias"] is True
    assert network.classes == ("a", "b", "c")


def test_tensorboard_holds_curves_and_reconstructions(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    event_accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    save = run_directory.Run.save_checkpoint

    def die_at_the_second(self: run_directory.Run, state: dict[str, Any]) -> None:
        if self.checkpoint_path.exists():
            raise Killed  # the second epoch is in the curves and will be there again
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.Run, "save_checkpoint", die_at_the_second)
        with pytest.raises(Killed):
            fit(tiny(photos, out="run", tensorboard=True))
    resume("run")
    events = event_accumulator.EventAccumulator("run/tensorboard")
    events.Reload()
    rows = metrics("run")
    for name in ("train_loss", "validation_error_percent", "learning_rate"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([float(row[name]) for row in rows])
    assert len(events.Images("inputs above, reconstructions below")) == 2


def test_tensorboard_that_is_not_installed_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tensorboard must be installed .*pip install 'capsnet\[tensorboard\]'"):
        fit(tiny(photos, tensorboard=True))
    assert not Path("runs").exists()


def test_the_figure_and_the_report_are_made(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    told: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(report, "draw_reconstructions", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(report, "write", lambda *arguments, **about: told.append((arguments, about)))
    result = fit(tiny(photos, out="run"))
    assert result.figure == Path("run/figures/reconstructions.png")
    assert result.report == Path("run/report.html")
    assert drawn[0][0] is result.network
    ((path, network, dataset, found), about) = told[0]
    assert (path, network, len(dataset.classes)) == (result.report, result.network, 3)
    assert int(found.wrong.sum()) == result.test.wrong
    assert [row["epoch"] for row in about["rows"]] == [1, 2]
    assert about["result"]["test"]["wrong"] == result.test.wrong
    assert about["card"].test["wrong"] == result.test.wrong
    assert fit(tiny(photos, epochs=1, out="other", report=False)).report is None
    assert len(told) == 1


def test_the_card_tells_the_run_and_the_threshold(photos: Path) -> None:
    result = fit(tiny(photos, out="run", validation=20))
    card = pretrained.load_card("run")
    given = tiny(photos).changed(validation=20, primary_scale=1.0, keep="best")
    assert card.trained() == replace(given, image_size="12x13", resize="pad", channels=3, framing="off")
    assert (card.data, card.epochs, card.train_images) == (str(photos), 2, 55)
    told = {name: result.test.to_dict()[name] for name in ("error_percent", "wrong", "total")}
    assert card.test == {**told, "interval": result.test.interval, "selection": result.selection}
    assert result.network.preprocessing == Preprocessing(12, 13, 3, resize="pad")
    assert pretrained.load("run").preprocessing == result.network.preprocessing
    assert card.threshold is not None
    assert (card.threshold.images, card.threshold.split) == (20, "validation")
    dataset = prepare.prepare_data(card.trained())
    assert dataset.validation is not None
    errors = predict_split(result.network, dataset.validation).reconstruction_errors
    assert errors is not None
    assert int((errors > card.threshold.value).sum()) == 1  # 5 % of 20


def test_without_validation_the_threshold_is_of_training_images(photos: Path) -> None:
    fit(tiny(photos, epochs=1, out="run", validation=0))
    threshold = pretrained.load_card("run").threshold
    assert threshold is not None
    assert (threshold.split, threshold.images) == ("train", 75)


def test_without_decoder_there_is_no_threshold(photos: Path) -> None:
    result = fit(tiny(photos, epochs=1, out="run", reconstruction=False))
    assert pretrained.load_card("run").threshold is None
    assert result.figure is None


def test_public_names() -> None:
    assert capsnet.fit is fit
    assert capsnet.resume is resume


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason=f"no MNIST in {REAL}; set CAPSNET_DATA")
def test_20_steps_on_real_digits_lower_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(*arguments: Any, **options: Any) -> Any:
        whole = load(*arguments, **options)
        index = torch.arange(320)
        return replace(whole, train=whole.train.take(index), test=whole.test.take(index))

    monkeypatch.setattr(prepare, "load", few)
    sizes: dict[str, Any] = {"conv_channels": 32, "capsule_types": 4, "decoder_sizes": (32,)}
    config = Config.of(data="mnist", data_dir=str(REAL), epochs=2, batch_size=32, validation=0, out="run", **sizes)
    fit(config)
    first, second = (float(row["train_loss"]) for row in metrics("run"))
    assert second < 0.9 * first


def test_images_in_memory_train_too_and_resume(photos: Path) -> None:
    dataset = load(photos)
    mine = Dataset("mine", dataset.classes, dataset.train, dataset.test)
    first = fit(tiny(photos, out="run", epochs=1), mine)
    assert json.loads((first.directory / "result.json").read_text())["data"] == "mine"
    resume("run", mine, epochs=2)
    fit(tiny(photos, out="whole"), mine)
    assert same_weights("run", "whole")
    with pytest.raises(InputError, match=r"data must be one of .* got mine"):
        resume("run")


def test_results_of_fewer_epochs_do_not_pass_for_those_of_more(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny(photos, out="run", epochs=1))
    monkeypatch.setattr(batches, "augment", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        resume("run", epochs=3)
    assert files("run") == {"config.yaml", "last.ckpt", "manifest.csv", "metrics.csv"}
    with pytest.raises(InputError, match="the run is not finished; see --resume"):
        capsnet.load("run")


def test_the_callers_random_numbers_are_left_alone(photos: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(tiny(photos, epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_what_differs_from_the_preset_is_in_the_result(photos: Path) -> None:
    fit(tiny(photos, out="run", epochs=1, leaky=True))
    told = json.loads(Path("run/result.json").read_text())["differs_from_preset"]
    given = {
        "data": str(photos),
        "augment": "paper",
        "epochs": 1,
        "keep": "best",
        "primary_scale": 1.0,
        "batch_size": 16,
        "precision": "32",
        "leaky": True,
    }
    given |= {"image_size": "12x13", "resize": "pad", "channels": 3, "framing": "off"}  # as they were read
    assert told == given | {name: list(value) if isinstance(value, tuple) else value for name, value in SIZES.items()}


def test_the_seed_leaves_the_data_alone(photos: Path) -> None:
    one, other = (prepare.prepare_data(tiny(photos, seed=seed)) for seed in (0, 1))
    assert torch.equal(one.test.images, other.test.images)
    changed = prepare.prepare_data(tiny(photos, data_seed=1))
    assert not torch.equal(one.test.images, changed.test.images)


def raising(error: type[BaseException]) -> Any:
    def act(*arguments: object) -> None:
        raise error

    return act


def test_devices_beside_torchrun_are_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="devices must be left out under torchrun, which started 3 here; got 2"):
        fit(tiny(photos, out="run", devices=2))
    assert not Path("run").exists()


def test_a_cuda_graph_needs_one_gpu_and_no_dropout(photos: Path) -> None:
    with pytest.raises(InputError, match=r"^cuda_graph must have one GPU and a network without dropout; got 1 x cpu$"):
        fit(tiny(photos, cuda_graph=True))
    with pytest.raises(InputError, match=r"got 1 x cpu and a network with dropout$"):
        fit(Config.of(data=str(photos), model="baseline", cuda_graph=True, device="cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("kernel", "optimizer"), [("plain", "adam"), ("fused", "adam"), ("plain", "sgd")])
def test_a_cuda_graph_trains_the_same_network(photos: Path, kernel: str, optimizer: str) -> None:
    """6 epochs of 5 steps, of which the last is smaller: eager, recorded and replayed steps, and both resumed."""
    settings = {"epochs": 6, "routing_kernel": kernel, "optimizer": optimizer, "out": "eager"}
    one = fit(tiny(photos, **settings))
    two = fit(tiny(photos, **{**settings, "out": "graph", "cuda_graph": True}))
    fit(tiny(photos, **{**settings, "epochs": 3, "out": "resumed", "cuda_graph": True}))
    three = resume("resumed", epochs=6)
    assert one.test.loss == pytest.approx(two.test.loss, rel=1e-3)
    assert two.test.loss == pytest.approx(three.test.loss, rel=1e-3)


@pytest.mark.parametrize(
    "sizes",
    [
        {"conv_channels": 10**9},
        {"capsule_types": 10**9, "primary_dim": 10**9, "class_dim": 10**9},
        {"decoder_sizes": (10**9, 10**9)},
        {"model": "baseline", "width": 1e9},
        {"model": "baseline", "width": 1e300},
    ],
    ids=str,
)
def test_a_network_that_no_memory_holds_is_refused_before_anything_is_written(
    photos: Path, workplace: Path, sizes: dict[str, Any]
) -> None:
    refusal = (
        r"training one image at a time needs about [\d,.]+ GiB of memory, and [\d,.]+ [MG]iB are .*; "
        r"choose a smaller --image-size, .*"
        r"|sizes.* must be ones that PyTorch can count; .*"
    )
    with pytest.raises(InputError, match=rf"^({refusal})$"):
        fit(tiny(photos, **sizes) if "model" not in sizes else Config.of(data=str(photos), **sizes))
    assert files(workplace) == set()


def test_images_that_no_memory_holds_are_refused(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"^images must fit into 8 GiB .*; got 13,000 of 1 x 10000 x 10000$"):
        fit(Config.of(data="strokes", image_size=10_000))
    assert files(workplace) == set()


# which kernels compute


def test_the_kernels_are_told_and_others_that_go_on_are_too(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPSNET_NATIVE", "off")
    fit(tiny(photos, out="run", epochs=1, report=False))
    off = "PyTorch (CAPSNET_NATIVE=off)"
    assert json.loads(Path("run/result.json").read_text(encoding="utf-8"))["kernels"] == off
    assert torch.load("run/last.ckpt", weights_only=True)["kernels"] == off
    resume("run", epochs=2)
    assert "results differ in rounding" not in capfd.readouterr().err
    monkeypatch.setattr(native, "status", lambda: "native (another)")
    resume("run", epochs=3)
    told = f"computed by native (another) from here on, before by {off}: results differ in rounding"
    assert told in capfd.readouterr().err


# stop_at


EVALUATION_OF = Evaluation.of


def script(monkeypatch: pytest.MonkeyPatch, *wrong: int) -> list[int]:
    """The next evaluations find so many wrong images, of 10 for validation; what is left of the list."""
    left = list(wrong)

    def told(*arguments: Any) -> Evaluation:
        return replace(EVALUATION_OF(*arguments), wrong=left.pop(0))

    monkeypatch.setattr(Evaluation, "of", told)
    return left


def selection(run: str) -> str:
    told: str = json.loads(Path(run, "result.json").read_text(encoding="utf-8"))["selection"]
    return told


def test_a_run_stops_at_the_first_epoch_that_is_good_enough(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny(photos, out="three", epochs=3, validation=10, keep="last"))
    left = script(monkeypatch, 8, 4, 3, 9)  # three epochs, then the test images
    result = fit(tiny(photos, out="run", epochs=6, validation=10, stop_at=30.0, keep="last"))
    assert left == []
    assert result.epochs == 3
    assert (result.validation and result.validation.wrong, result.test.wrong) == (3, 9)
    assert same_weights("three", "run")
    assert [row["validation_error_percent"] for row in metrics("run")] == ["80.0", "40.0", "30.0"]
    assert json.loads(Path("run/result.json").read_text(encoding="utf-8"))["epochs"] == 3
    assert selection("run") == (
        "weights after the first epoch with a validation error of at most 30 %, or after 6 epochs; "
        "no choice was made on the test images"
    )
    assert selection("three") == "none: weights after the last epoch, and no choice was made on the test images"
    monkeypatch.setattr(Evaluation, "of", EVALUATION_OF)
    at_step(monkeypatch, 1, lambda: pytest.fail("trained"))
    assert resume("run", epochs=9).epochs == 3  # what was reached stays so


def test_a_run_that_is_never_good_enough_takes_all_its_epochs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = script(monkeypatch, 4, 4, 0)  # the test images, which are all right, stop nothing
    assert fit(tiny(photos, validation=10, stop_at=39.9)).epochs == 2
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8, 15])
def test_a_resumed_run_stops_there_too(photos: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    config = tiny(photos, epochs=6, validation=10, stop_at=30.0)  # 65 images: 5 steps an epoch
    with monkeypatch.context() as patch:
        script(patch, 8, 4, 3, 9)
        fit(replace(config, out="whole"))
    with monkeypatch.context() as patch:
        script(patch, 8, 4, 3, 9)
        at_step(patch, step, lambda: send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(replace(config, out="run"))
    script(monkeypatch, *[8, 4, 3, 9][(step - 1) // 5 :])
    assert resume("run").epochs == 3
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")
    assert selection("run") == selection("whole")


def test_a_run_stopped_while_its_test_is_read_does_not_train_on(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [0]

    def at_the_test(*arguments: Any, **options: Any) -> Any:
        measured[0] += 1
        if measured[0] == 3:  # two epochs' validation, then the test
            raise Killed
        return predict_split(*arguments, **options)

    with monkeypatch.context() as patch:
        script(patch, 8, 3, 9)
        for place in (loop, training):
            patch.setattr(place, "predict_split", at_the_test)
        with pytest.raises(Killed):
            fit(tiny(photos, out="run", epochs=6, validation=10, stop_at=30.0))
    at_step(monkeypatch, 1, lambda: pytest.fail("trained"))
    result = resume("run")
    assert result.epochs == 2
    assert result.validation is not None


def test_stop_at_is_refused_without_validation_and_on_resuming(photos: Path, workplace: Path) -> None:
    message = r"^stop_at must be given with validation images to judge by; got 5.0 without any$"
    with pytest.raises(InputError, match=message):
        fit(tiny(photos, stop_at=5.0, validation=0))
    assert files(workplace) == set()
    fit(tiny(photos, out="run", epochs=1))
    with pytest.raises(InputError, match=r"^stop_at of a resumed run must stay None; got 5.0 "):
        resume("run", stop_at=5.0, epochs=2)


# train_images and crop


def test_some_training_images_leave_the_others_where_they_are(photos: Path) -> None:
    result = fit(tiny(photos, out="run", epochs=1, train_images=20))
    told = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert (told["train_images"], told["validation"]["total"], told["test"]["total"]) == (20, 7, 15)
    assert pretrained.load_card("run").train_images == 20
    whole, few = (prepare.prepare_data(tiny(photos, train_images=count)) for count in (None, 20))
    assert whole.validation is not None
    assert few.validation is not None
    assert torch.equal(few.validation.images, whole.validation.images)
    every = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in few.train.images} < every
    assert result.epochs == 1
    with pytest.raises(InputError, match=r"^train_images must be 3, one of each class, to the 68 there are; got 69$"):
        fit(tiny(photos, train_images=69))


def test_a_crop_is_what_the_network_sees(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(photos, crop=11, shift=0)
    seen: list[tuple[int, ...]] = []

    def augmented(*arguments: Any) -> Any:
        made = augment(*arguments)
        seen.append(tuple(made.shape[1:]))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(batches, "augment", augmented)
        result = fit(replace(config, out="whole"))
    assert set(seen) == {(3, 11, 11)}
    assert result.network.image_shape == (3, 11, 11)
    assert files("whole") == WRITTEN
    dataset = prepare.prepare_data(config)
    assert evaluate(pretrained.load("whole"), dataset.test, config=config).confusion == result.test.confusion
    threshold = pretrained.load_card("whole").threshold
    assert threshold is not None
    assert threshold.images == 7
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(replace(config, out="run"))
    resume("run")
    assert same_weights("whole", "run")
    with pytest.raises(InputError, match=r"^crop must be 1 to 12 pixels for images of 12 x 13; got 13$"):
        fit(tiny(photos, crop=13))


def test_without_validation_the_threshold_is_of_cropped_training_images(photos: Path) -> None:
    fit(tiny(photos, epochs=1, out="run", validation=0, crop=11))
    threshold = pretrained.load_card("run").threshold
    assert threshold is not None
    assert (threshold.split, threshold.images) == ("train", 75)


# images of several objects


def test_a_run_of_pairs_writes_finds_and_evaluates_the_same_again() -> None:
    made = pairs()
    result = fit(tiny(Path("pairs"), out="run"), made)
    assert files("run") == WRITTEN
    told = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert told["test"] == result.test.to_dict()
    assert (told["data"], told["train_images"], told["test"]["objects"]) == ("pairs", 54, 2)
    assert (told["test"]["total"], told["validation"]["total"]) == (15, 6)
    assert {"missed", "missed_percent"} <= told["test"].keys()
    assert pretrained.load_card("run").threshold is None  # an image has no one reconstruction error
    network = pretrained.load("run")
    assert network.objects_per_image == 2
    again = evaluate(network, made.test, config=run_directory.Run("run").config())
    assert again.confusion == result.test.confusion
    assert again.wrong == result.test.wrong
    for name in ("loss", "classification_loss", "reconstruction_loss"):
        assert getattr(again, name) == pytest.approx(getattr(result.test, name), rel=1e-5)


def test_pairs_are_learnt() -> None:
    result = fit(tiny(Path("pairs"), epochs=20, lr=0.01), pairs(train=120, test=40))
    assert result.test.error_percent < 55  # chance is 83
    assert result.test.missed_percent < 30  # chance is 50


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"crop": 11, "shift": 2, "flip": True, "standardize": True}], ids=str)
@pytest.mark.parametrize("step", [2, 7])
def test_a_run_of_pairs_resumes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], step: int
) -> None:
    made, config = pairs(), tiny(Path("pairs"), **changes)  # 54 images: 4 steps an epoch of 2 augmentations each
    fit(replace(config, out="whole"), made)
    with monkeypatch.context() as patch:
        at_step(patch, 2 * step, lambda: send(signal.SIGTERM))
        with pytest.raises(Interrupted, match=rf"in epoch {1 + step // 5} after step {(step - 1) % 4 + 1} of 4"):
            fit(replace(config, out="run"), made)
    resume("run", made)
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")


def test_pairs_are_others_in_every_step_and_the_same_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    real = batches.BatchLoader.__call__

    def fed(self: batches.BatchLoader, *arguments: Any, **options: Any) -> Any:
        batch = real(self, *arguments, **options)
        seen[-1].append(batch.labels)
        return batch

    monkeypatch.setattr(batches.BatchLoader, "__call__", fed)
    for seed in (0, 0, 1):
        seen.append([])
        fit(tiny(Path("pairs"), seed=seed, batch_size=54), pairs())
    first, again, other = seen
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    partners = [sorted(map(tuple, labels.sort(-1).values.tolist())) for labels in first]
    assert partners[0] != partners[1], "the same images with other partners"


def test_the_training_error_of_pairs_is_that_of_exact_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [0]
    real = TrainingState.record

    def record(self: TrainingState, losses: Any, targets: torch.Tensor, **options: Any) -> None:
        for scores, truth in zip(losses.output.scores, targets.tolist(), strict=True):
            wrong[0] += set(scores.argsort(descending=True)[:2].tolist()) != set(truth)
        real(self, losses, targets, **options)

    monkeypatch.setattr(TrainingState, "record", record)
    fit(tiny(Path("pairs"), epochs=1, out="run"), pairs())
    assert float(metrics("run")[0]["train_error_percent"]) == pytest.approx(100 * wrong[0] / 54)


def test_a_baseline_of_pairs_trains_too() -> None:
    config = Config.of(model="baseline-multimnist", width=0.03, dropout=0.0, batch_size=16, epochs=1, out="run")
    result = fit(config, pairs())
    assert files("run") == WRITTEN - {"figures/reconstructions.png"}
    assert result.test.objects_per_image == 2
    assert (result.test.reconstruction_loss, result.test.loss) == (0, result.test.classification_loss)


def test_other_options_of_networks_train_too(photos: Path) -> None:
    fit(tiny(photos, epochs=1, out="run", standardize=True, squash_epsilon=1e-7, brightness=0.2, contrast=0.5))
    network = pretrained.load("run")
    assert (network.config["standardize"], network.config["squash_epsilon"]) == (True, 1e-7)


def test_pairs_of_one_class_are_refused_before_anything_is_written(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"to be paired must be of at least 2 classes; got 1 of one class$"):
        fit(tiny(Path("pairs"), train_images=1), pairs())
    assert files(workplace) == set()


def test_what_is_erased_is_smaller_than_the_image(photos: Path) -> None:
    for erase in (12, 40):
        with pytest.raises(InputError, match=rf"^erase must be less than the 12 pixels of the images; got {erase}$"):
            fit(tiny(photos, erase=erase))
    assert not Path("runs").exists()


def test_few_images_change_the_decay_of_the_exponential_schedule_only(photos: Path) -> None:
    config = tiny(photos, epochs=None)
    dataset = prepare.prepare_data(config)
    assert defaults.resolved(config, dataset).lr_decay_steps > 0
    assert defaults.resolved(config.changed(schedule="linear"), dataset).lr_decay_steps == 0


def test_balance_changes_nothing_where_classes_are_of_one_size_and_something_elsewhere(photos: Path) -> None:
    whole = prepare.prepare_data(tiny(photos, validation=0))
    order = torch.cat([(whole.train.labels == label).nonzero().flatten()[:20] for label in range(3)])
    alike = replace(whole, train=whole.train.take(order), files=(), preprocessing=None)
    fewer = replace(alike, train=alike.train.take(torch.arange(45)))
    for name, dataset, same in (("alike", alike, True), ("fewer", fewer, False)):
        for balance in (False, True):
            fit(tiny(photos, out=f"{name}-{balance}", balance=balance, epochs=1, report=False, validation=0), dataset)
        assert same_weights(f"{name}-False", f"{name}-True") is same


def test_balance_is_refused_where_images_show_two_objects() -> None:
    with pytest.raises(InputError, match=r"^balance must be left out where images show several objects; got it$"):
        fit(tiny(Path("pairs"), balance=True), pairs())
