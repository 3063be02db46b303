"""The weights that are kept: of the last epoch, or of the best on the validation images."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from capsnet import cli
from capsnet.checkpoints import pretrained, run_directory
from capsnet.config import Config, read
from capsnet.errors import InputError, Interrupted
from capsnet.evaluation import evaluate
from capsnet.training import prepare
from capsnet.training.fit import fit, resume
from capsnet.training.state import TrainingState, best_epoch
from tiny import at_step, files, metrics, options, same_weights, tiny

pytestmark = pytest.mark.usefixtures("workplace", "blank_figure")
ERRORS = (80.0, 30.0, 30.0, 50.0, 40.0)
LOSSES = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the validation images by epoch: the third is the best, by its loss."""
SENTENCE = "weights after epoch 3 of 5, which had the lowest validation error; no choice was made on the test images"


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the validation images these errors and losses after each epoch, whatever the weights."""

    def judge(errors: Sequence[float] = ERRORS, losses: Sequence[float] = LOSSES) -> None:
        row = TrainingState.row

        def told(self: TrainingState, *arguments: Any) -> dict[str, Any]:
            made = row(self, *arguments)
            error, loss = errors[made["epoch"] - 1], losses[made["epoch"] - 1]
            return {**made, "validation_error_percent": error, "validation_loss": loss}

        monkeypatch.setattr(TrainingState, "row", told)

    return judge


def result_of(run: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path(run, "result.json").read_text(encoding="utf-8"))
    return told


def validation_of(config: Config, run: str) -> float:
    """The validation loss of the weights that a run kept."""
    split = prepare.prepare_data(config).validation
    assert split is not None
    return evaluate(pretrained.load(run), split, config=config).loss


@pytest.mark.parametrize(
    ("errors", "losses", "best"),
    [
        ([], [], 0),
        ([50.0], [9.0], 1),
        ([50.0, 40.0, 60.0], [1.0, 3.0, 0.5], 2),  # by the error first
        ([40.0, 40.0, 40.0], [1.0, 0.5, 0.7], 2),  # then by the loss
        ([40.0, 40.0, 40.0], [1.0, 0.5, 0.5], 2),  # then the first
    ],
)
def test_the_best_epoch(errors: list[float], losses: list[float], best: int) -> None:
    rows = [
        {"epoch": epoch, "validation_error_percent": error, "validation_loss": loss}
        for epoch, (error, loss) in enumerate(zip(errors, losses, strict=True), 1)
    ]
    assert best_epoch(rows) == best


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_the_best_weights_are_those_of_a_run_that_ended_there(
    photos: Path, judged: Callable[..., None], ema: float, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(photos, epochs=5, ema=ema)
    fit(config.changed(epochs=3, keep="last", out="three"))
    fit(config.changed(keep="last", out="last"))
    capfd.readouterr()
    judged()
    result = fit(config.changed(out="run"))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert ["best so far" in line for line in said] == [True, True, True, False, False]
    assert (result.epochs, result.kept_epoch) == (5, 3)
    assert same_weights("run", "three")
    assert not same_weights("run", "last")
    told, three = result_of("run"), result_of("three")
    weights = "weights averaged over the steps (decay 0.6)" if ema else "weights"
    assert told["selection"] == result.selection == SENTENCE.replace("weights", weights, 1)
    assert (told["epochs"], told["kept_epoch"]) == (5, 3)
    assert (told["test"], told["validation"]) == (three["test"], three["validation"])  # of the weights that are kept
    assert result.validation is not None
    assert result.validation.loss == pytest.approx(validation_of(config, "run"), rel=1e-6)
    card = pretrained.load_card("run")
    assert (card.epochs, card.config["keep"]) == (5, "best")
    assert card.to_dict()["test"]["selection"] == result.selection
    assert [row["epoch"] for row in metrics("run")] == ["1", "2", "3", "4", "5"]
    assert metrics("run")[0].keys() == metrics("last")[0].keys()
    assert files("run") == files("last")


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_patience_stops(
    photos: Path, judged: Callable[..., None], keep: str, capfd: pytest.CaptureFixture[str]
) -> None:
    judged((50.0, 40.0, 45.0, 40.0, 41.0, 42.0, 0.0), (0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5))
    config = tiny(photos, epochs=7)
    result = fit(config.changed(patience=3, keep=keep, out="run"))
    assert (result.epochs, result.kept_epoch) == (5, 2 if keep == "best" else 5)
    said = "stopped after epoch 5 of 7: none of the last 3 was a new best one on the validation images"
    assert said in capfd.readouterr().err
    fit(config.changed(epochs=result.kept_epoch, keep="last", out="whole"))
    assert same_weights("run", "whole")
    if keep == "last":
        assert result.selection.startswith("weights after 3 epochs in a row without a new best one, or after 7 epochs;")
    assert resume("run", epochs=9).epochs == 5  # what was reached stays so
    assert same_weights("run", "whole")


def test_a_run_that_always_improves_takes_all_its_epochs(photos: Path, judged: Callable[..., None]) -> None:
    judged((50.0, 40.0, 30.0, 30.0), (0.5, 0.5, 0.5, 0.4))
    result = fit(tiny(photos, epochs=4, patience=1))
    assert (result.epochs, result.kept_epoch) == (4, 4)


def test_stop_at_ends_with_the_best_so_far(photos: Path, judged: Callable[..., None]) -> None:
    judged()
    result = fit(tiny(photos, epochs=5, stop_at=30.0))
    assert (result.epochs, result.kept_epoch) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ema"), [(3, 0.0), (13, 0.6), (15, 0.0), (18, 0.6)])  # 68 images: 5 steps an epoch
def test_a_stopped_and_resumed_run_keeps_the_same(
    photos: Path, judged: Callable[..., None], monkeypatch: pytest.MonkeyPatch, step: int, ema: float
) -> None:
    judged()
    config = tiny(photos, epochs=5, ema=ema)
    whole = fit(config.changed(out="whole"))
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(config.changed(out="run"))
    again = resume("run")
    assert (again.kept_epoch, again.validation, again.test) == (3, whole.validation, whole.test)
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")
    assert resume("run").validation == whole.validation  # nothing left to train


def test_more_epochs_choose_among_all(photos: Path, judged: Callable[..., None]) -> None:
    judged()
    config = tiny(photos, epochs=5)
    fit(config.changed(out="whole"))
    fit(config.changed(epochs=2, out="run"))
    assert resume("run", epochs=4).kept_epoch == 3
    assert same_weights("whole", "run")
    assert resume("run", epochs=5).kept_epoch == 3
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(2, False), (2, True), (4, False)])
def test_killed_before_or_after_a_checkpoint_it_keeps_the_same(
    photos: Path, judged: Callable[..., None], monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    """The best epoch is the second: it is lost, written, or long written."""
    judged((80.0, 30.0, 50.0, 40.0))
    config = tiny(photos, epochs=4)
    fit(config.changed(out="whole"))
    with monkeypatch.context() as patch:
        count, save = [0], run_directory.Run.save_checkpoint

        def die(self: run_directory.Run, state: Any) -> None:
            count[0] += 1
            if after or count[0] < number:
                save(self, state)
            if count[0] == number:
                raise Killed

        patch.setattr(run_directory.Run, "save_checkpoint", die)
        with pytest.raises(Killed):
            fit(config.changed(out="run"))
    assert resume("run").kept_epoch == 2
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")


def test_a_stop_while_the_best_weights_are_tested_does_not_put_them_in_place_of_the_last(
    photos: Path, judged: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that a signal then writes goes on from the last epoch."""
    judged()
    config = tiny(photos, epochs=4)
    fit(config.changed(epochs=5, keep="last", out="whole"))
    fit(config.changed(out="run"))
    with monkeypatch.context() as patch:
        check = TrainingState.check

        def stopped(self: TrainingState) -> None:
            self.received.append(signal.SIGTERM)
            check(self)

        patch.setattr(TrainingState, "check", stopped)
        with pytest.raises(Interrupted, match="stopped after the last epoch"):
            resume("run")
    resume("run", epochs=5)
    last = run_directory.Run("run").load_checkpoint()["network"]
    whole = run_directory.Run("whole").load_checkpoint()["network"]
    assert all(torch.equal(last[name], whole[name]) for name in whole)


def test_no_epoch_keeps_what_there_is(photos: Path) -> None:
    result = fit(tiny(photos, epochs=0, out="run"))
    assert (result.epochs, result.kept_epoch) == (0, 0)
    assert result.selection == "none: weights after the last epoch, and no choice was made on the test images"
    assert result.validation is not None
    assert math.isfinite(result.validation.loss)


# what is chosen where it is left open


def test_a_run_says_what_it_keeps(photos: Path) -> None:
    fit(tiny(photos, epochs=1, out="own"))
    assert read(Path("own/config.yaml")).keep == "best"
    fit(tiny(photos, epochs=1, validation=0, out="none"))
    assert read(Path("none/config.yaml")).keep == "last"
    assert result_of("none")["selection"].startswith("none: weights after the last epoch")


def test_a_run_from_before_there_was_a_choice_keeps_the_last_weights(photos: Path, judged: Callable[..., None]) -> None:
    judged()
    config = tiny(photos, epochs=5, keep="last")
    fit(config.changed(out="whole"))
    fit(config.changed(epochs=4, out="run"))
    sections = yaml.safe_load(Path("run/config.yaml").read_text(encoding="utf-8"))
    content = torch.load("run/last.ckpt", weights_only=True)
    for inside in (sections["optimisation"], content["config"]):
        del inside["keep"], inside["patience"]
    Path("run/config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    torch.save(content, "run/last.ckpt")
    with pytest.raises(InputError, match=r"^keep of a resumed run must stay 'last'; got 'best' "):
        resume("run", keep="best")
    result = resume("run", epochs=5)
    assert (result.epochs, result.kept_epoch) == (5, 5)
    assert same_weights("whole", "run")
    assert read(Path("run/config.yaml")).keep == "last"


# train/ and val/ without test/


def without_test(photos: Path) -> Path:
    place = Path("layout")
    for split, numbers in (("train", range(20)), ("val", range(20, 30))):
        for name in "abc":
            (place / split / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(photos / name / f"{number}.png", place / split / name)
    return place


def test_where_the_images_that_would_choose_are_tested_the_last_weights_are_kept(photos: Path) -> None:
    result = fit(tiny(without_test(photos), epochs=1, out="run"))
    assert read(Path("run/config.yaml")).keep == "last"
    assert result.selection == "none: weights after the last epoch, and there are no test images"


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--keep", "best"), ("--patience", "1")])
def test_a_number_of_the_images_that_chose_is_said_to_be_too_good(
    photos: Path, judged: Callable[..., None], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    judged((50.0, 60.0, 70.0))
    config = tiny(without_test(photos), epochs=3)
    assert cli.main(["train", *options(config), *words, "--out", "run"]) == 0
    error, selection, *_ = capsys.readouterr().out.splitlines()
    assert error.startswith("validation error ")
    said = "validation chose the epoch, so this number is too good: there are no test images"
    assert selection.endswith(said)
    assert result_of("run")["selection"] == selection
    assert pretrained.load_card("run").to_dict()["test"]["selection"] == selection
    assert cli.main(["train", "--resume", "run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["selection"], told["kept_epoch"]) == (selection, 1 if "best" in words else 2)


# what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "best"), "keep must be last without validation images to judge by; got best"),
        (("--patience", "3"), "patience must be given with validation images to judge by; got 3 without any"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_without_validation_images_nothing_is_chosen(
    photos: Path,
    workplace: Path,
    words: tuple[str, ...],
    message: str,
    more: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", *options(tiny(photos)), "--validation", "0", *words, *more]) == 2
    assert capsys.readouterr().err == f"capsnet train: error: --{message}\n"
    assert files(workplace) == set()


def test_a_resumed_run_keeps_what_it_began_to_keep(photos: Path) -> None:
    fit(tiny(photos, epochs=1, out="run"))
    with pytest.raises(InputError, match=r"^keep of a resumed run must stay 'best'; got 'last' "):
        resume("run", keep="last", epochs=2)
    with pytest.raises(InputError, match=r"^patience of a resumed run must stay None; got 3 "):
        resume("run", patience=3, epochs=2)
    with pytest.raises(InputError, match=r"^patience must be at least 1; got 0$"):
        fit(tiny(photos, patience=0))
    with pytest.raises(InputError, match=r"^keep must be "):
        fit(tiny(photos, keep="first"))


def test_curves_show_the_epoch(photos: Path, judged: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int | None]()
    judged()
    fit(tiny(photos, epochs=4, out="run"))
    monkeypatch.setattr("capsnet.plots.curves", lambda rows, kept_epoch: seen.append(kept_epoch))
    monkeypatch.setattr("capsnet.plots.save", lambda figure, path, **options: path)
    assert cli.main(["plot", "curves", "run"]) == 0
    assert seen == [3]
