"""What the experiments train, the records they leave, and the tables made of these."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from capsnet import plots
from capsnet.checkpoints import pretrained, run_directory
from capsnet.cli import main
from capsnet.config import PRESETS, Config
from capsnet.data import Dataset, Split, describe
from capsnet.data.sets.affnist_generated import in_place
from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.evaluation import predict_split
from capsnet.evaluation.adversarial import pgd
from capsnet.evaluation.ensemble import Ensemble, ensemble_scores
from capsnet.experiments import (
    BUDGETS,
    Experiment,
    Record,
    Row,
    available,
    experiment,
    fingerprint,
    measures,
    read,
    records,
)
from capsnet.experiments import plan as plans
from capsnet.experiments import reproduce as reproduction
from capsnet.experiments.measures import MEASURES
from capsnet.experiments.reproduce import ENSEMBLE, place_of, reproduce, split_of
from capsnet.experiments.tables import benchmark_of, overview, render
from capsnet.training import fit as training
from capsnet.training import prepare
from tiny import REAL, SIZES
from tools import figures

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "results" / "experiments"
RECORDS_HERE = Path("results/experiments")
MAIN_KEY = "capsnet-3-reconstruction"
ALL = [
    pytest.param(experiment(name), row, id=f"{name}-{row.key}") for name in available() for row in experiment(name).rows
]


# plan


def test_the_numbers_are_those_of_the_paper() -> None:
    numbers = {name: {row.key: row.paper for row in experiment(name).rows} for name in available()}
    table1 = {key: value for key, value in numbers["table1"].items() if value is not None}
    assert table1 == {  # Table 1
        "baseline": 0.39,
        "capsnet-1": 0.34,
        "capsnet-1-reconstruction": 0.29,
        "capsnet-3": 0.35,
        "capsnet-3-reconstruction": 0.25,
    }
    assert numbers["multimnist"] == {"capsnet-3": 5.2, "capsnet-1": 7.5, "baseline": 8.1}  # Table 1
    assert numbers["affnist"] == {"capsnet": 100 - 79, "baseline": 100 - 66}  # Section 5.2
    assert experiment("cifar10").ensemble == ("capsnet", 10.6)  # Section 7
    assert (numbers["svhn"], numbers["smallnorb"]) == ({"capsnet": 4.3}, {"capsnet": 2.7})
    spreads = {row.key: row.spread for row in experiment("table1").rows if row.spread is not None}
    assert spreads == {"capsnet-1": 0.032, "capsnet-1-reconstruction": 0.011, "capsnet-3": 0.036, MAIN_KEY: 0.005}
    assert not any(numbers["recipes"].values()) and not any(numbers["fashion-mnist"].values())  # noqa: PT018


@pytest.mark.parametrize(("one", "row"), ALL)
def test_every_row_is_a_network_that_can_be_built_at_every_budget(one: Experiment, row: Row) -> None:
    for budget in BUDGETS:
        config = one.config(row, budget, 4)
        assert config.seed == 4
        sides = {"multimnist": 36, "expanded-mnist": 40, "cifar10": 32, "svhn": 32, "smallnorb": 48}
        channels = {"cifar10": 3, "svhn": 3, "smallnorb": 2}.get(config.data, 1)
        images = torch.zeros(1, channels, *2 * [config.crop or sides.get(config.data, 28)], dtype=torch.uint8)
        split = Split(images, torch.zeros(1, dtype=torch.int64))
        with torch.device("meta"):
            network = prepare.build(config, Dataset("any", tuple("0123456789"), split, split))
        quick = network.parameter_count() < 2e6, config.epochs, config.train_images
        assert budget != "quick" or quick == (True, 1, 1000)


def test_networks_are_of_the_sizes_that_the_paper_states() -> None:
    def parameters(name: str, key: str, side: int, budget: str = "full") -> int:
        config = experiment(name).config(experiment(name).row(key), budget, 0)
        split = Split(torch.zeros(1, 1, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
        with torch.device("meta"):
            return prepare.build(config, Dataset("any", tuple("0123456789"), split, split)).parameter_count()

    assert parameters("multimnist", "capsnet-3", 36) == 11_361_808  # "11.36M"
    assert parameters("multimnist", "baseline", 36) == 24_563_978  # "24.56M"
    for budget in ("full", "cpu"):
        ours, theirs = (parameters("affnist", key, 40, budget) for key in ("capsnet", "baseline"))
        assert theirs == pytest.approx(ours, rel=0.02)  # "a similar number of parameters"


def test_every_difference_of_the_recipes_is_switched_alone() -> None:
    recipes = experiment("recipes")
    base = recipes.config(recipes.row("paper"), "full", 0).flat()
    every = [recipes.config(row, "full", 0).flat() for row in recipes.rows[2:]]
    alone = [{name: value for name, value in one.items() if value != base[name]} for one in every]
    schedule = {"lr_decay", "lr_decay_steps"}  # one choice, in two fields
    assert all(len(changes) == 1 or set(changes) == schedule for changes in alone)
    authors = {name: value for name, value in PRESETS["authors"].items() if value != base[name]}
    switched = {name: value for changes in alone for name, value in changes.items()}
    assert authors.items() <= switched.items()
    assert {"detach_routing", "squash_epsilon", "shift"} <= switched.keys()


def test_keys_and_runs_of_an_experiment_are_all_different() -> None:
    for name in available():
        one = experiment(name)
        for budget in BUDGETS:
            places = [place_of(one.config(row, budget, seed)) for row in one.rows for seed in range(2)]
            alike = budget == "quick" and name in ("cost", "what-matters-capsnet")  # rows of epochs and widths
            assert alike or len(set(places)) == 2 * len({row.key for row in one.rows}) == 2 * len(one.rows)


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: experiment("tabel1"), r"experiment must be one of table1, .*; got 'tabel1' \(did you mean table1\?\)"),
        (lambda: experiment("table1").row("capsnet-9"), "rows of table1 must be among .*; got 'capsnet-9'"),
        (lambda: experiment("svhn").config(experiment("svhn").rows[0], "fast", 0), "budget must be one of quick, cpu"),
    ],
)
def test_unknown_names_are_refused(ask: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ask()


ROW = {"key": "one", "title": "One"}
GOOD = {"title": "T", "metric": "mnist", "rows": [ROW], "base": {"data": "mnist"}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"title": 3}, "title must be text; got 3"),
        ({"colour": "red"}, "must hold name, title, .* only; got 'colour'"),
        ({"rows": []}, "must have rows of different keys; got none"),
        ({"rows": [ROW, ROW]}, "must have rows of different keys; got one, one"),
        ({"rows": [{"key": "one"}]}, r"rows\[0\] must hold title; it is missing"),
        ({"rows": [{**ROW, "against": "oen"}]}, r"rows of mine must be among one; got 'oen' \(did you mean one"),
        ({"ensemble": ["two", 3.0]}, "rows of mine must be among one; got 'two'"),
        ({"base": {"eposh": 3}}, r"experiment mine, row one: eposh is no option \(did you mean epochs\?\)"),
        ({"cpu": {"epochs": -1}}, "experiment mine, row one: epochs must be at least 0; got -1"),
        ({"cpu": {"report": "no"}}, "experiment mine, row one: report must be true or false; got 'no'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert plans.read(path).config(plans.read(path).rows[0], "cpu", 2) == Config.of(data="mnist", report=False, seed=2)
    path.write_text(json.dumps({**GOOD, **changes}), encoding="utf-8")
    with pytest.raises(InputError, match=f"^(experiment .*mine.yaml:? )?{told}"):
        plans.read(path)


def test_rows_of_another_file_are_all_or_those_that_are_named(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "key": "two", "options": {"epochs": 5}}]
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text(json.dumps({**GOOD, "rows": rows}), encoding="utf-8")
    here = {name: value for name, value in GOOD.items() if name != "rows"} | {"rows_of": "mine"}
    other.write_text(json.dumps(here), encoding="utf-8")
    assert plans.read(other).rows == plans.read(mine).rows
    other.write_text(json.dumps({**here, "rows": ["two"]}), encoding="utf-8")
    assert plans.read(other).rows == plans.read(mine).rows[1:]
    refused = {"three": "rows of mine must be among one, two; got 'three'", 3: r"rows\[0\] must be text; got 3"}
    for key, told in refused.items():
        other.write_text(json.dumps({**here, "rows": [key]}), encoding="utf-8")
        with pytest.raises(InputError, match=told):
            plans.read(other)


def test_rows_that_name_no_preset_take_none_of_their_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    options: list[dict[str, Any]] = [{"model": "em-capsnet"}, {"model": "em-capsnet", "preset": "paper"}]
    rows = [{**ROW, "key": str(k), "options": given} for k, given in enumerate(options)]
    path.write_text(json.dumps({**GOOD, "rows": rows}), encoding="utf-8")
    one = plans.read(path)
    plain, paper = (one.config(each, "full", 0) for each in one.rows)
    assert (plain.batch_size, plain.lr) == (Config().batch_size, Config().lr)
    assert (paper.batch_size, paper.lr) == (64, 0.003)
    assert records.effective(plain) == {"model": "em-capsnet", "data": "mnist"}


# records


def test_a_fingerprint_is_of_what_has_an_effect() -> None:
    config = Config.of(data="mnist", epochs=20)
    for same in ({"seed": 3}, {"threads": 1, "device": "cpu"}, {"out": "there", "overwrite": True}, {"keep": "last"}):
        assert fingerprint(config.changed(**same)) == fingerprint(config)
    for other in ({"epochs": 21}, {"lr": 0.002}, {"shift": 0}, {"routing_iterations": 1}, {"keep": "best"}):
        assert fingerprint(config.changed(**other)) != fingerprint(config)


def test_the_fingerprint_of_the_main_row_stays() -> None:
    """Records would not be found again, and their trainings run a second time."""
    table1 = experiment("table1")
    assert fingerprint(table1.config(table1.rows[0], "cpu", 0)) == "285094acfd8a"


def record(row: str = "capsnet-3-reconstruction", seed: int | None = 0, wrong: int = 41, **changes: Any) -> Record:
    """A record of table1 at the CPU budget."""
    table1 = experiment("table1")
    made = Record(
        experiment="table1",
        row=row,
        budget="cpu",
        fingerprint=fingerprint(table1.config(table1.row(row), "cpu", 0)),
        seed=seed,
        epochs=20,
        parameters=8_215_568,
        results={"mnist": {"error_percent": wrong / 100, "wrong": wrong, "total": 10_000}},
        wrong_images={"mnist": list(range(wrong))},
        seconds=1800.0,
        config={"data": "mnist"},
        environment={"device": "a CPU", "torch": "2.13.0", "precision": "32"},
    )
    return replace(made, **changes)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read(tmp_path, "table1", "cpu") == []
    kept = [record(), record(seed=1, wrong=38)]
    records.write(tmp_path / "new", kept)
    assert read(tmp_path / "new", "table1", "cpu") == kept
    lines = (tmp_path / "new" / "table1-cpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


@pytest.mark.parametrize("line", ["no json", "{}", "[1]", '{"experiment": "table1"}'])
def test_a_damaged_line_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    records.write(tmp_path, [record()])
    path = tmp_path / "table1-cpu.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"table1-cpu.jsonl, line 2, must (be JSON; got: |hold |be a mapping )"):
        read(tmp_path, "table1", "cpu")


# reproduce


@pytest.fixture
def small(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment of two rows and an ensemble, on 60 random images that any name of a data set stands for."""
    draw = torch.Generator().manual_seed(0)

    def made(name: str, **options: Any) -> Dataset:
        if name == "absent":
            raise InputError("data set absent must be on this machine")
        images = torch.randint(256, (90, 1, 12, 13), dtype=torch.uint8, generator=draw.manual_seed(len(name)))
        labels = torch.arange(90) % 3
        whole = Split(images, labels)
        return Dataset(name, ("a", "b", "c"), whole.take(torch.arange(60)), whole.take(torch.arange(60, 90)))

    monkeypatch.setattr(prepare, "load", made)
    monkeypatch.setattr(reproduction, "is_here", lambda name, _: name != "absent")
    base = {"data": "some", "epochs": 2, "batch_size": 16, "precision": "32", "validation": 0, **SIZES}
    rows = (Row("one", "One", paper=50.0), Row("two", "Two", {"routing_iterations": 1}, against="one"))
    return Experiment(
        "small", "Small", "some", rows, base, cpu={"epochs": 1}, also=("other", "absent"), ensemble=("one", 40.0)
    )


def test_what_is_missing_is_trained_and_what_is_there_is_not(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    found = reproduce(small, budget="cpu", seeds=1, say=told.append)
    assert [(one.row, one.seed, one.epochs) for one in found] == [("one", 0, 1), ("two", 0, 1)]
    assert read(RECORDS_HERE, "small", "cpu") == found
    assert len(told) == 2
    assert "small one, seed 0 (cpu): runs/experiments/some-capsnet-" in told[0]
    again = reproduce(small, budget="cpu", seeds=2, say=told.append)
    assert again[:2] == found
    assert [(one.row, one.seed) for one in again[2:]] == [("one", 1), ("two", 1), (ENSEMBLE, None)]
    monkeypatch.setattr(training, "fit", None)
    assert reproduce(small, budget="cpu", seeds=2, say=told.append) == again
    assert len(told) == 4


def test_one_seed_of_every_row_comes_before_the_second_of_any(small: Experiment) -> None:
    found = reproduce(small, budget="cpu", seeds=2)
    assert [(one.row, one.seed) for one in found[:4]] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]


def test_a_record_says_what_the_weights_do(small: Experiment) -> None:
    one = reproduce(small, budget="cpu", seeds=1, rows=["one"])[0]
    config = small.config(small.row("one"), "cpu", 0)
    network, result = pretrained.load(place_of(config)), run_directory.Run(place_of(config)).result()
    assert set(one.results) == set(one.wrong_images) == {"some", "other"}  # absent is left out
    for name in ("some", "other"):
        split = split_of(config, name)
        wrong = (network(split.images / 255).scores.argmax(-1) != split.labels).nonzero().flatten().tolist()
        assert one.wrong_images[name] == wrong
        assert one.results[name] == {"error_percent": 100 * len(wrong) / 30, "wrong": len(wrong), "total": 30}
    assert one.results["some"]["wrong"] == result["test"]["wrong"]
    assert one.results["some"] != one.results["other"]
    assert (one.parameters, one.seconds) == (network.parameter_count(), result["seconds"])
    assert one.config["data"] == "some"
    assert one.environment["torch"] == torch.__version__


def test_a_data_set_that_came_later_is_measured_without_training(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reproduce(small, budget="cpu", seeds=1, rows=["one"])
    monkeypatch.setattr(training, "fit", None)
    later = reproduce(replace(small, also=("other", "third")), budget="cpu", seeds=1, rows=["one"])
    assert len(later) == 1
    assert set(later[0].results) == {"some", "other", "third"}
    assert later[0].results["other"] == first[0].results["other"]


def test_further_measures_are_those_of_the_network_and_made_without_training(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that take the place of the others are told from themselves by guessing."""
    (first,) = reproduce(small, budget="cpu", seeds=1, rows=["one"])
    monkeypatch.setattr(training, "fit", None)
    monkeypatch.setattr(measures, "ATTACKED", 20)
    monkeypatch.setitem(MEASURES, "ood", replace(MEASURES["ood"], other="some"))
    whole = replace(small, measures=("affine", "pgd", "ood"))
    (later,) = reproduce(whole, budget="cpu", seeds=1, rows=["one"])
    assert replace(later, measures={}) == first
    config = small.config(small.row("one"), "cpu", 0)
    split, network = split_of(config, "some"), pretrained.load(place_of(config))
    wrong = predict_split(network, in_place(split, seed=0)).wrong
    pixels, labels = split.images[:20] / 255, split.labels[:20]
    attacked = pgd(network, pixels, labels, epsilon=0.1, steps=10, config=config)
    assert float((attacked - pixels).abs().max()) == pytest.approx(0.1)
    fooled = network(attacked).scores.argmax(-1) != labels
    expected = {"affine": 100 * float(wrong.double().mean()), "pgd": 5.0 * int(fooled.sum()), "ood": 0.5}
    assert later.measures == pytest.approx(expected)
    assert later.measures["pgd"] > first.error("some")
    monkeypatch.setattr(reproduction, "predict_split", None)  # nothing is measured twice
    assert reproduce(whole, budget="cpu", seeds=1, rows=["one"]) == [later]


def test_a_measure_that_came_later_leaves_the_others_and_trains_nothing(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(small, measures=("affine",))
    (first,) = reproduce(one, budget="cpu", seeds=1, rows=["one"])
    monkeypatch.setattr(training, "fit", None)
    monkeypatch.setattr(reproduction, "is_here", lambda name, _: False)  # data of `also` are gone
    monkeypatch.setitem(
        MEASURES, "affine", replace(MEASURES["affine"], of=mock.Mock(side_effect=AssertionError))
    )  # and it is not measured again
    (later,) = reproduce(replace(one, measures=("affine", "views")), budget="cpu", seeds=1, rows=["one"])
    assert later.results == first.results
    assert later.measures == {**first.measures, "views": later.measures["views"]}
    (place_of(small.config(small.rows[0], "cpu", 0)) / "model.safetensors").unlink()
    told: list[str] = []
    found = reproduce(replace(one, measures=("affine", "pgd")), budget="cpu", seeds=1, rows=["one"], say=told.append)
    assert found == [later]
    assert told == ["one, seed 0: no pgd, for its weights are not here"]


def test_measures_of_other_weights_are_not_kept(small: Experiment) -> None:
    (first,) = reproduce(replace(small, measures=("affine",)), budget="cpu", seeds=1, rows=["one"])
    other = replace(first, measures={"affine": 1.0}, wrong_images={**first.wrong_images, "some": [0]})
    records.add(RECORDS_HERE, other)
    (again,) = reproduce(replace(small, measures=("affine", "views")), budget="cpu", seeds=1, rows=["one"])
    assert again.measures["affine"] == first.measures["affine"]


def test_shifted_views_are_measured_of_each_network_and_of_the_ensemble(small: Experiment) -> None:
    found = reproduce(replace(small, measures=("views",)), budget="cpu", seeds=2, rows=["one"])
    assert [one.row for one in found] == ["one", "one", ENSEMBLE]
    configs = [small.config(small.row("one"), "cpu", seed) for seed in range(2)]
    split = split_of(configs[0], "some")
    frame = torch.nn.functional.pad(split.images / 255, (1, 1, 1, 1))
    views = [frame[..., top : top + 12, left : left + 13] for top in range(3) for left in range(3)]
    scores = [
        torch.stack([network(view).scores for view in views]).mean(0)
        for network in (pretrained.load(place_of(config)) for config in configs)
    ]
    for one, seen in zip(found, (*scores, torch.stack(scores).sum(0)), strict=True):
        wrong = (seen.argmax(-1) != split.labels).double().mean()
        assert one.measures == {"views": pytest.approx(100 * float(wrong))}


def test_a_measure_whose_images_are_not_here_is_left_out(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURES, "ood", replace(MEASURES["ood"], other="absent"))
    found = reproduce(replace(small, measures=("ood", "affine")), budget="cpu", seeds=1, rows=["one"])
    assert set(found[0].measures) == {"affine"}


def test_the_presence_of_the_class_tells_known_images_from_blank_ones(small: Experiment) -> None:
    """Images that a network finds no class in count as told apart, not the other way round."""
    reproduce(small, budget="cpu", seeds=1, rows=["one"])
    config = small.config(small.row("one"), "cpu", 0)
    network, split = pretrained.load(place_of(config)), split_of(config, "some")
    winning = predict_split(network, split).winning
    most, least = (winning.argsort(descending=down)[:10] for down in (True, False))
    assert MEASURES["ood"].of(network, config, split.take(most), split.take(least)) == 1.0


def test_every_further_measure_has_a_name_in_the_files_of_experiments() -> None:
    assert set(MEASURES) == set(get_args(plans.MeasureName))
    for one in map(experiment, available()):
        assert not one.measures or one.split == "test"
        about = describe(one.metric)
        for name in one.measures:
            other = MEASURES[name].other
            assert about.objects_per_image == 1
            assert other is None or describe(other).image_shape[0] == about.image_shape[0]


def test_what_others_recorded_in_the_meantime_stays(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = training.fit

    def beside(config: Config) -> training.Result:
        records.add(RECORDS_HERE, record(experiment="small", seed=9))
        return fit(config)

    monkeypatch.setattr(training, "fit", beside)
    found = reproduce(small, budget="cpu", seeds=1)
    assert [one.seed for one in found] == [0, 9, 0]
    assert read(RECORDS_HERE, "small", "cpu") == found


def test_a_row_that_diverges_does_not_hold_up_the_others(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = training.fit

    def diverging(config: Config) -> training.Result:
        if config.options.routing_iterations == 3:
            raise Diverged("loss became NaN")
        return fit(config)

    monkeypatch.setattr(training, "fit", diverging)
    with pytest.raises(Diverged, match="of small these diverged: one, seed 0; one, seed 1"):
        reproduce(small, budget="cpu", seeds=2)
    assert [(one.row, one.seed) for one in read(RECORDS_HERE, "small", "cpu")] == [("two", 0), ("two", 1)]


def test_an_ensemble_whose_weights_are_gone_is_left_out(small: Experiment) -> None:
    told: list[str] = []
    reproduce(small, budget="cpu", seeds=1, rows=["one"])
    gone = place_of(small.config(small.rows[0], "cpu", 0))
    (gone / "model.safetensors").unlink()
    found = reproduce(small, budget="cpu", seeds=2, rows=["one"], say=told.append)
    assert [(one.row, one.seed) for one in found] == [("one", 0), ("one", 1)]
    assert told[-1] == f"no ensemble of 2, for these weights are not here: {gone}"


def test_an_ensemble_is_of_the_networks_of_all_seeds(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    together = reproduce(small, budget="cpu", seeds=3, rows=["one"])[-1]
    configs = [small.config(small.row("one"), "cpu", seed) for seed in range(3)]
    split = split_of(configs[0], "some")
    judged = Ensemble.of(
        ensemble_scores([pretrained.load(place_of(config)) for config in configs], split), split.labels
    )
    assert (together.row, together.seed, together.members) == (ENSEMBLE, None, [0, 1, 2])
    assert together.results["some"] == {"error_percent": judged.error_percent, "wrong": judged.count, "total": 30}
    assert together.parameters == 3 * pretrained.load(place_of(configs[0])).parameter_count()
    assert (fewer := reproduce(small, budget="cpu", seeds=2, rows=["one"])[-1]).members == [0, 1]
    assert fewer.parameters == 2 * pretrained.load(place_of(configs[0])).parameter_count()
    monkeypatch.setattr("capsnet.experiments.reproduce.ensemble_scores", None)  # once is enough
    assert reproduce(small, budget="cpu", seeds=3, rows=["one"])[-2:] == [together, fewer]


def test_a_stopped_training_is_gone_on_with(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reproduce(small, budget="full", seeds=1, rows=["one"], folder=Path("whole"), runs_folder=Path("a"))
    save, saved = run_directory.Run.save_checkpoint, [0]

    def killed(run: run_directory.Run, state: Any) -> None:
        save(run, state)
        saved[0] += 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.Run, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            reproduce(small, budget="full", seeds=1, rows=["one"])
    assert read(RECORDS_HERE, "small", "full") == []
    monkeypatch.setattr(training, "fit", None)  # a new training would not be the same one
    found = reproduce(small, budget="full", seeds=1, rows=["one"])
    assert found[0].wrong_images == whole[0].wrong_images
    assert saved == [1]
    ours, theirs = (
        pretrained.load(place_of(small.config(small.rows[0], "full", 0), Path(p))) for p in ("runs/experiments", "a")
    )
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_run_of_another_configuration_is_not_taken_for_it(small: Experiment) -> None:
    reproduce(small, budget="cpu", seeds=1, rows=["one"])
    one, two = (place_of(small.config(row, "cpu", 0)) for row in small.rows)
    one.rename(two)
    with pytest.raises(InputError, match=r"must hold the run that its name tells; its config\.yaml is of another"):
        reproduce(small, budget="cpu", seeds=1, rows=["two"])


def test_wrong_requests_are_refused_before_any_training(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", None)
    with pytest.raises(InputError, match="seeds must be at least 1; got 0"):
        reproduce(small, budget="cpu", seeds=0)
    with pytest.raises(InputError, match=r"rows of small must be among one, two; got 'on' \(did you mean one\?\)"):
        reproduce(small, budget="cpu", seeds=1, rows=["two", "on"])
    assert not Path("results").exists()


def test_data_that_the_table_is_about_must_be_there(small: Experiment) -> None:
    with pytest.raises(InputError, match="data set absent must be on this machine"):
        reproduce(replace(small, metric="absent"), budget="cpu", seeds=1)


# tables


def lines_of(table: str) -> dict[str, list[str]]:
    """Cells of each line by the first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in rows}


MAIN = "CapsNet, 3 routing iterations, with reconstruction"


def test_a_table_has_means_deviations_and_what_was_not_run(tmp_path: Path) -> None:
    records.write(tmp_path, [record(), record(seed=1, wrong=38), record("capsnet-3", wrong=50)])
    lines = lines_of(render(experiment("table1"), tmp_path))
    theirs, ours = "0.25 ± 0.005 %", "0.395 ± 0.021 %"
    main = [theirs, ours, "2", "41, 38 of 10,000", "20", "float32", "8,215,568", "+0.145 ± 0.015"]
    assert lines[MAIN] == main
    one = lines["CapsNet, 3 routing iterations, without reconstruction"]
    assert one[:4] == ["0.35 ± 0.036 %", "0.50 %", "1", "50 of 10,000"]
    assert one[-1] == "+0.15, one seed"
    assert lines["Convolutional baseline"] == ["0.39 %", "not run", "", "", "", "", "", ""]
    assert len(lines) == 2 + len(experiment("table1").rows)


def test_the_test_behind_a_difference_takes_the_spread_that_the_paper_states(tmp_path: Path) -> None:
    records.write(tmp_path, [record(), record(seed=1, wrong=38)])
    table = render(experiment("table1"), tmp_path)
    se = math.sqrt(0.015**2 + 0.005**2 / 3)
    assert f"- {MAIN} against the paper: Welch's t test over 2 and 3 runs: +0.145 +- {se:.3f} points, 95 %" in table
    assert f"`capsnet reproduce table1 --budget cpu --seeds 2 --rows {MAIN_KEY}`, on a CPU, torch 2.13.0." in table


def test_numbers_on_other_images_are_not_subtracted(tmp_path: Path) -> None:
    one = experiment("affnist")
    counts = {"error_percent": 30.0, "wrong": 3000, "total": 10_000}
    made = replace(record(), experiment="affnist", row="capsnet", results={"affnist-generated": counts})
    records.write(tmp_path, [replace(made, fingerprint=fingerprint(one.config(one.rows[0], "cpu", 0)))])
    lines = lines_of(render(one, tmp_path))
    assert lines["CapsNet"][:2] == ["21 % (on affnist)", "30.00 %"]
    assert "difference to the paper" not in lines["network"]


def test_budgets_side_by_side_are_told_apart(tmp_path: Path) -> None:
    table1 = experiment("table1")
    print_ = fingerprint(table1.config(table1.row("capsnet-3"), "full", 0))
    records.write(tmp_path, [record()])
    assert "budget" not in lines_of(render(table1, tmp_path))["network"]
    records.write(tmp_path, [record("capsnet-3", budget="full", fingerprint=print_)])
    lines = lines_of(render(table1, tmp_path))
    assert [lines[name][4] for name in ("network", MAIN, MAIN.replace("with", "without"))] == ["budget", "cpu", "full"]


def test_the_full_budget_is_shown_before_the_smaller_one(tmp_path: Path) -> None:
    table1 = experiment("table1")
    print_ = fingerprint(table1.config(table1.rows[0], "full", 0))
    records.write(tmp_path, [record()])
    records.write(tmp_path, [record(budget="full", fingerprint=print_, wrong=25, epochs=70)])
    records.write(tmp_path, [record(budget="quick", wrong=9000)])
    assert lines_of(render(table1, tmp_path))[MAIN][1] == "0.25 %"
    assert lines_of(render(table1, tmp_path, budgets=["cpu"]))[MAIN][1] == "0.41 %"
    line = f"| MNIST | {MAIN} | 0.25 % | 1 | 70 | 30 (a CPU) | 0.25 ± 0.005 %, epochs and selection not said |"
    assert line in overview(tmp_path)


def test_records_of_another_configuration_are_not_shown(tmp_path: Path) -> None:
    records.write(tmp_path, [record(fingerprint="0" * 12)])
    assert lines_of(render(experiment("table1"), tmp_path))[MAIN][1] == "not run"


def test_rows_are_compared_over_seeds_or_else_over_images(tmp_path: Path) -> None:
    ours, theirs = "capsnet-3-reconstruction", "capsnet-1-reconstruction"
    pair = [record(ours, wrong=40), record(theirs, wrong_images={"mnist": [*range(35), 100, 101]}, wrong=37)]
    records.write(tmp_path, pair)
    table = render(experiment("table1"), tmp_path)
    name = (
        "CapsNet, 1 routing iteration, with reconstruction against CapsNet, 3 routing iterations, with reconstruction"
    )
    assert f"- {name}, seed 0: exact McNemar test: 2 images mistaken only by the first, 5 only by the second" in table
    pair += [record(ours, 1, wrong=42), record(theirs, 1, wrong=40)]
    records.write(tmp_path, pair)
    told = f"- {name}: paired t test over 10,000 images, errors averaged over 2 seeds: -0.025 +- 0.015 points"
    assert told in render(experiment("table1"), tmp_path)
    records.write(tmp_path, [*pair, record(ours, 2, 41), record(theirs, 2, 37)])
    assert f"- {name}: paired t test over 3 seeds: -0.030 +- 0.006 points" in render(experiment("table1"), tmp_path)


def test_p_values_are_corrected_where_there_are_several(tmp_path: Path) -> None:
    first = record("capsnet-3-reconstruction", wrong=40)
    other = record("capsnet-1-reconstruction", wrong_images={"mnist": [*range(35), 100, 101]}, wrong=37)
    records.write(tmp_path, [first, other])
    (line,) = [line for line in render(experiment("table1"), tmp_path).splitlines() if " against CapsNet" in line]
    assert line.endswith("p = 0.45")
    far = record("capsnet-3", wrong_images={"mnist": list(range(52))}, wrong=52)
    records.write(tmp_path, [first, other, far])
    lines = [line for line in render(experiment("table1"), tmp_path).splitlines() if " against CapsNet" in line]
    assert [line.partition("p = ")[2] for line in lines] == [
        "0.00049, corrected p = 0.00098",
        "0.45, corrected p = 0.45",
    ]


def test_rows_are_compared_at_the_budget_that_both_have(tmp_path: Path) -> None:
    table1, other = experiment("table1"), "capsnet-1-reconstruction"
    longer = fingerprint(table1.config(table1.rows[0], "full", 0))
    records.write(tmp_path, [record(), record(other, wrong=37)])
    records.write(tmp_path, [record(budget="full", fingerprint=longer, wrong=25)])
    (line,) = [line for line in render(table1, tmp_path).splitlines() if " against CapsNet" in line]
    assert ", budget cpu, seed 0: exact McNemar test: 0 images mistaken only by the first, 4 only by" in line


def test_rows_at_different_budgets_are_not_compared(tmp_path: Path) -> None:
    table1, other = experiment("table1"), "capsnet-1-reconstruction"
    longer = fingerprint(table1.config(table1.row(other), "full", 0))
    records.write(tmp_path, [record()])
    records.write(tmp_path, [record(other, budget="full", fingerprint=longer)])
    table = render(table1, tmp_path)
    assert "| 41 of 10,000 | cpu |" in table
    assert "| 41 of 10,000 | full |" in table
    assert " against " not in table


def test_costs_stand_beside_the_rows_that_a_benchmark_measured(tmp_path: Path) -> None:
    one, folder = experiment("successors"), tmp_path / "experiments"
    name = one.row("vb").title
    assert [*lines_of(render(one, folder))["network"]] == ["here", "published"]
    (tmp_path / "bench").mkdir()
    step = {"section": "step", "variant": "vb", "images_per_second": 150.0, "added_mib": 99.6}
    variants = [{"variant": "vb", "forward_gflop_per_image": 0.0098}]
    told = {"command": "the command", "device": "a chip", "torch": "2", "variants": variants, "rows": [step]}
    (tmp_path / "bench" / "successors.json").write_text(json.dumps(told), encoding="utf-8")
    table = render(one, folder)
    assert lines_of(table)["network"] == ["here", "published", "million multiply-adds", "seconds an epoch", "MiB"]
    assert lines_of(table)[name] == ["not run", "", "4.9", "400", "100"]
    assert lines_of(table)[one.rows[0].title][2:] == ["", "", ""]
    assert "weights and images: `the command`, on a chip, torch 2." in table
    config = one.config(one.row("vb"), "full", 0)
    full = replace(record(), experiment="successors", row="vb", budget="full", fingerprint=fingerprint(config))
    records.write(folder, [full])
    assert lines_of(render(one, folder))[name][-3:] != ["4.9", "400", "100"], "which are of the other budget"


def test_further_measures_stand_in_columns_with_what_they_are_below(tmp_path: Path) -> None:
    one = replace(experiment("table1"), measures=("affine", "pgd", "ood"))
    now = fingerprint(one.config(one.row(MAIN_KEY), "cpu", 0))
    for seed, error in enumerate((20.0, 30.0)):
        measured = {"affine": error, "ood": 0.5 + error / 100}
        records.add(tmp_path, record(seed=seed, fingerprint=now, measures=measured))
    table = render(one, tmp_path)
    assert "| transformed | AUROC |" in table
    assert "| 25.0 ± 7.1 % | 0.750 ± 0.071 |" in table
    assert "attacked" not in table
    assert MEASURES["ood"].said in table
    assert MEASURES["pgd"].said not in table


def test_measures_of_pairs_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    one = experiment("multimnist")
    results = {
        "multimnist": {"error_percent": 9.5, "wrong": 950, "total": 10_000, "missed": 1000, "missed_percent": 5.0}
    }
    print_ = fingerprint(one.config(one.rows[0], "cpu", 0))
    wrong = {"multimnist": list(range(950))}
    made = replace(record("capsnet-3"), experiment="multimnist", fingerprint=print_)
    records.write(tmp_path, [replace(made, results=results, wrong_images=wrong)])
    lines = lines_of(render(one, tmp_path))
    assert lines["network"][4] == "missed digits"
    assert lines["CapsNet, 3 routing iterations"][1:5] == ["9.50 %", "1", "950 of 10,000", "5.00 %"]
    assert "half the width" in render(one, tmp_path)
    assert "MultiMNIST" not in overview(tmp_path), "of narrower layers"
    print_ = fingerprint(one.config(one.rows[0], "full", 0))
    records.write(tmp_path, [replace(made, budget="full", fingerprint=print_, results=results, wrong_images=wrong)])
    first = overview(tmp_path).split("MultiMNIST, exact set | ")[1]
    assert first.startswith("CapsNet, 3 routing iterations | 9.50 % | 1 | 20 | 30 (a CPU) | 5.2 % |")


def test_the_minutes_of_an_overview_are_those_of_the_quickest_training(tmp_path: Path) -> None:
    places = {"device": "AMD EPYC", "threads": 2}, {"device": "AMD EPYC", "threads": 1}
    made = [
        record(seed=k, seconds=seconds, environment={**record().environment, **place})
        for k, (seconds, place) in enumerate(zip((4_000.0, 3_000.0), places, strict=True))
    ]
    records.write(tmp_path, made)
    assert "| 2 | 20 | 50 (AMD EPYC, 1 thread) |" in overview(tmp_path)


def test_an_ensemble_has_a_line_of_its_own(tmp_path: Path) -> None:
    one = experiment("cifar10")
    print_ = fingerprint(one.config(one.rows[0], "full", 0))
    results = {"cifar10": {"error_percent": 30.0, "wrong": 3000, "total": 10_000}}
    single = replace(record(budget="full"), experiment="cifar10", row="capsnet", fingerprint=print_, results=results)
    assert lines_of(render(one, tmp_path))["The same, ensemble of 7"][1] == "not run"
    two = replace(single, row=ENSEMBLE, seed=None, members=[0, 1])
    records.write(tmp_path, [single, two, replace(two, members=[0])])
    assert lines_of(render(one, tmp_path))["The same, ensemble of 2"][:2] == ["10.6 %", "30.00 %"]
    assert "| CIFAR-10 | The same, ensemble of 2 | 30.00 % |  | 20 | 2 times that | 10.6 % |" in overview(tmp_path)


# the pages and records of this repository


def test_what_is_said_of_multimnist_is_what_was_found() -> None:
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    ours, theirs = (
        [one.error("multimnist") for one in read(RECORDS, "multimnist", "cpu") if one.row == key]
        for key in ("capsnet-3", "baseline")
    )
    ahead = sum(ours) / len(ours) < sum(theirs) / len(theirs)
    assert ("the capsule network is not ahead of the baseline" in text) == (not ahead)


def test_every_record_is_of_a_row_as_it_is_now_and_counts_what_it_lists() -> None:
    paths = sorted(RECORDS.glob("*.jsonl"))
    kept = [path for path in paths if not path.stem.endswith("-quick")]
    assert kept
    for path in kept:
        name, _, budget = path.stem.rpartition("-")
        for one in read(RECORDS, name, budget):
            assert (one.experiment, one.budget) == (name, budget)
            key = experiment(name).ensemble[0] if one.row == ENSEMBLE else one.row  # type: ignore[index]
            assert one.fingerprint == fingerprint(experiment(name).config(experiment(name).row(key), budget, 0))
            for data, result in one.results.items():
                assert len(one.wrong_images[data]) == result["wrong"]
                assert result["error_percent"] == pytest.approx(100 * result["wrong"] / result["total"])


# all of it


@pytest.fixture
def every_data_set(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real MNIST, Fashion-MNIST and CIFAR-10, and random images in the official formats of the others."""
    import test_data_smallnorb as norb
    import test_data_svhn as numbers
    from capsnet.data.sets import smallnorb, svhn

    place = tmp_path / "data"
    place.mkdir()
    for name in ("mnist", "fashion-mnist", "cifar10"):
        if not (REAL / name).is_dir():
            pytest.skip(f"no {name} in {REAL}; set CAPSNET_DATA")
        (place / name).symlink_to(REAL / name)
    for name in ("svhn", "smallnorb"):
        (place / name).mkdir()
    for split, name in svhn.FILES.items():
        (place / "svhn" / name).write_bytes(numbers.official(1000, seed=len(split)))
        monkeypatch.setitem(cast(dict[str, str | None], svhn.SOURCE.files), name, None)
    monkeypatch.setattr(smallnorb, "PAIRS", 1000)
    monkeypatch.setattr(norb, "COUNT", 1000)
    for files in smallnorb.FILES.values():
        for name, content in zip(files, norb.official(0), strict=True):
            (place / "smallnorb" / name).write_bytes(content)
    return place


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", available())
def test_every_experiment_runs_from_its_name_to_its_table(
    name: str, every_data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, seeds = experiment(name), 2 if experiment(name).ensemble else 1
    arguments = ["reproduce", name, "--budget", "quick", "--seeds", str(seeds), "--data-dir", str(every_data_set)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "not run" not in out
    assert all(f"| {row.title} |" in out for row in one.rows)
    found = read(RECORDS_HERE, name, "quick")
    assert len(found) == seeds * len(one.rows) + (one.ensemble is not None)
    if name == "cost":  # drawn at the speeds of its benchmark
        speed = benchmark_of(RECORDS_HERE, name)
        speed.parent.mkdir()
        speed.write_bytes(benchmark_of(RECORDS, name).read_bytes())
    drawn = [*figures.draw(one, "quick", RECORDS_HERE, Path("runs/experiments"), data_dir=str(every_data_set))]
    assert drawn == ([RECORDS_HERE / f"{name}-quick.png"] if name in ("multimnist", "affnist", "cost") else [])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert main(arguments) == 0  # again, and nothing is trained
    assert read(RECORDS_HERE, name, "quick") == found


def test_a_curve_of_time_is_of_all_records_that_differ_in_epochs_and_seed(tmp_path: Path) -> None:
    table1, cost = experiment("table1"), experiment("cost")

    def add(one: Experiment, key: str, budget: str, seed: int, percent: float) -> None:
        config = one.config(one.row(key), budget, seed)
        options, fine = records.effective(config), {"error_percent": percent, "wrong": 1, "total": 100}
        made = record(MAIN_KEY, seed, config=options, fingerprint=fingerprint(config), epochs=config.epochs)
        records.add(tmp_path, replace(made, experiment=one.name, row=key, budget=budget, results={"mnist": fine}))

    add(cost, "capsnet-1", "cpu", 0, 2.0)
    add(table1, MAIN_KEY, "cpu", 0, 0.5)
    add(table1, MAIN_KEY, "cpu", 1, 0.3)
    add(table1, "capsnet-3", "cpu", 0, 9.0)  # of another network
    add(cost, "capsnet-fast-3", "cpu", 0, 1.0)
    speed = tmp_path / "speed.json"
    rates = {row.key: 500.0 if row.key.startswith("capsnet-fast") else 1000.0 for row in cost.rows}
    rates |= {"capsnet-1": 2000.0, "capsnet-3": 2000.0 / 3}  # 0.5 and 1.5 minutes an epoch: 1 in the mean
    rows = [{"variant": key, "images_per_second": rate} for key, rate in rates.items()]
    speed.write_text(json.dumps({"rows": rows}))
    axes: Any = figures.error_by_time(cost, "cpu", tmp_path, speed=speed).axes[0]
    lines = {box.get_label(): box.lines[0].get_xydata().tolist() for box in axes.containers}
    assert lines == {"CapsNet": [[1.0, 2.0], [20.0, 0.4]], "CapsNet by the recipe fast": [[6.0, 1.0]]}
    speed.write_text(json.dumps({"rows": rows[:1]}))
    with pytest.raises(InputError, match=r"speed.json must have a variant of each row; got none of"):
        figures.error_by_time(cost, "cpu", tmp_path, speed=speed)


def test_a_point_of_cost_is_a_row_at_the_speed_of_its_benchmark(tmp_path: Path) -> None:
    one, folder = experiment("successors"), tmp_path / "experiments"
    for key, seed, percent in (("vb", 0, 2.0), ("vb", 1, 4.0), ("em", 0, 8.0), ("resnet", 0, 1.0)):
        config, fine = one.config(one.row(key), "cpu", 0), {"error_percent": percent, "wrong": 1, "total": 100}
        made = replace(record(), experiment=one.name, row=key, seed=seed, fingerprint=fingerprint(config))
        records.add(folder, replace(made, results={"mnist": fine}))
    speed = tmp_path / "bench" / "successors.json"
    assert not [*figures.draw(one, "cpu", folder, tmp_path)], "without a benchmark"
    speed.parent.mkdir()
    rows = [{"variant": key, "images_per_second": rate} for key, rate in (("vb", 500.0), ("em", 100.0))]
    speed.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    assert [*figures.draw(one, "cpu", folder, tmp_path)] == [folder / "successors-cpu.png"]
    axes: Any = figures.error_by_cost(one, "cpu", folder, speed=speed).axes[0]
    assert {text.get_text(): text.xy for text in axes.texts} == {"em": (10.0, 8.0), "vb": (2.0, 3.0)}
    rows += [{"variant": "resnet", "images_per_second": 1000.0}]
    config = one.config(one.row("em"), "cpu", 1)
    worse = replace(record(), experiment=one.name, row="em", seed=1, fingerprint=fingerprint(config))
    records.add(folder, replace(worse, results={"mnist": {"error_percent": 92.0, "wrong": 1, "total": 100}}))
    speed.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    axes = figures.error_by_cost(one, "cpu", folder, speed=speed).axes[0]
    texts = {text.get_text(): text.xy for text in axes.texts}
    assert texts == {"em: 50 %": (10.0, 15.0), "vb": (2.0, 3.0), "resnet": (1.0, 1.0)}  # at five times the median
    assert axes.get_ylim()[1] == 15.0


@pytest.mark.parametrize("name", ["cost", "successors"])
def test_a_figure_in_the_docs_is_of_the_records_as_they_are(name: str) -> None:
    draw = figures.error_by_time if name == "cost" else figures.error_by_cost
    figure = draw(experiment(name), "cpu", RECORDS, speed=benchmark_of(RECORDS, name))
    with Image.open(io.BytesIO(plots.rendered(figure))) as now, Image.open(RECORDS / f"{name}-cpu.png") as kept:
        assert now.size == kept.size
        differ = (np.asarray(now.convert("L")) != np.asarray(kept.convert("L"))).mean()
    assert differ < 1e-4, f"python -m tools.figures {name}"


# the command line


def test_reproduce_prints_its_table(
    small: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plans, "experiment", lambda name: small)
    assert main(["reproduce", "small", "--budget", "cpu", "--seeds", "2", "--list"]) == 0
    assert "| One | 50 % | not run |" in capsys.readouterr().out
    assert main(["reproduce", "small", "--budget", "cpu", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "Small\n\n| network | paper | here | n |" in out
    assert "The same, ensemble of 2" in out
    assert len(read(RECORDS_HERE, "small", "cpu")) == 5


def test_a_signal_says_that_the_same_command_continues(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: Config) -> training.Result:
        raise Interrupted("stopped in epoch 1 after step 2 of 5; go on with: capsnet train --resume run", 15)

    monkeypatch.setattr(training, "fit", stopped)
    assert main(["reproduce", "table1", "--budget", "quick"]) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "capsnet reproduce: stopped in epoch 1 after step 2 of 5; the same command continues it"


def test_quick_is_one_seed_unless_told_otherwise(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(reproduction, "reproduce", lambda one, *, seeds, **_: asked.append(seeds))
    for arguments in (["--budget", "quick"], ["--budget", "cpu"], ["--budget", "quick", "--seeds", "2"]):
        assert main(["reproduce", "cifar10", *arguments]) == 0
    assert asked == [1, 7, 2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "experiment must be one of table1, efficient-capsnet, cost"),
        (["table1", "--rows", "capsnet"], "rows of table1 must be among"),
        (["table1", "--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["svhn", "--budget", "quick"], "data set svhn must be on this machine or downloadable"),
    ],
)
def test_wrong_input_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("capsnet reproduce: error: ")
    assert told in error
    assert not [path for path in workplace.rglob("*") if path.is_file()]
