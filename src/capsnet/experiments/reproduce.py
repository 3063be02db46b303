"""Train what an experiment still lacks, and keep what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capsnet import devices
from capsnet.checkpoints import pretrained, run_directory
from capsnet.config import Config
from capsnet.data import Split, describe
from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.evaluation import Evaluation, predict_split
from capsnet.evaluation.ensemble import Ensemble, ensemble_scores
from capsnet.experiments import records
from capsnet.experiments.measures import MEASURES, SHIFTS
from capsnet.experiments.plan import Experiment, MeasureName, Row
from capsnet.experiments.records import Record, fingerprint
from capsnet.models import Network
from capsnet.training import fit as training
from capsnet.training import prepare

__all__ = ["ENSEMBLE", "RECORDS", "RUNS", "place_of", "reproduce", "split_of"]

RECORDS = Path("results/experiments")
RUNS = Path("runs/experiments")
ENSEMBLE = "ensemble"
ENVIRONMENT = ("capsnet", "commit", "python", "torch", "device", "threads", "platform", "precision", "processes")
"""What a record keeps of the `result.json` of its training."""


def reproduce(
    experiment: Experiment,
    *,
    budget: str,
    seeds: int,
    rows: Sequence[str] = (),
    folder: Path = RECORDS,
    runs_folder: Path = RUNS,
    say: Callable[[str], object] = print,
    **machine_options: Any,
) -> list[Record]:
    """Train and measure what is not in the records yet; every network is kept as soon as it is done.

    The same call resumes a stopped training. All rows, or those with the keys `rows`, are trained with the seeds 0, 1,
    ... below `seeds`, every row with one seed before any with the next. A record that lacks a measure gets it where the
    weights of its run are here, and stays as it is where not. `budget` is one of `plan.BUDGETS`; `say` is told what
    begins; `machine_options` are fields of Config without effect on the numbers: device, threads, data_dir. Returns all
    records of the experiment at this budget.

    Raises:
        InputError: an unknown row, data that is not here, or a folder that cannot be written to.
        Interrupted: a signal; the same call continues.
        Diverged: some row did; the others were trained.
    """
    if seeds < 1:
        raise InputError(f"seeds must be at least 1; got {seeds}")
    chosen = [experiment.row(key) for key in rows] or list(experiment.rows)
    found, diverged = records.read(folder, experiment.name, budget), list[str]()
    data_dir = machine_options.get("data_dir")
    also = [name for name in experiment.also if is_here(name, data_dir)]
    others = {name: MEASURES[name].other for name in experiment.measures}
    measures = [name for name, other in others.items() if other is None or is_here(other, data_dir)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"results must be a folder to write to; got {folder}: {error.strerror}") from None
    for seed in range(seeds):
        for row in chosen:
            config = replace(experiment.config(row, budget, seed), **machine_options)
            before = _found(found, row.key, config)
            lacking = {*also, *measures} - ({*before.results, *before.measures} if before else set())
            if before and not lacking:
                continue
            if before and not (place_of(config, runs_folder) / "model.safetensors").exists():
                say(f"{row.key}, seed {seed}: no {', '.join(sorted(lacking))}, for its weights are not here")
                continue
            say(f"{experiment.name} {row.key}, seed {seed} ({budget}): {place_of(config, runs_folder)}")
            try:
                directory = _trained(config, runs_folder)
            except Diverged as error:
                say(f"{row.key}, seed {seed}: {error}")
                diverged.append(f"{row.key}, seed {seed}")
                continue
            except Interrupted as stop:
                where = str(stop).partition(";")[0]
                raise Interrupted(f"{where}; the same command continues it", stop.signal_number) from None
            found = records.add(folder, _measured(experiment, row, budget, config, directory, also, measures, before))
    if experiment.ensemble and seeds > 1 and experiment.ensemble[0] in [row.key for row in chosen]:
        together = _together(experiment, budget, seeds, found, runs_folder, say, **machine_options)
        found = found if together is None else records.add(folder, together)
    if diverged:
        raise Diverged(f"of {experiment.name} these diverged: {'; '.join(diverged)}")
    return found


def is_here(data: str, data_dir: str | None = None) -> bool:
    """Whether the files of a data set are on this machine."""
    return not describe(data, data_dir=data_dir).missing


def place_of(config: Config, runs_folder: Path = RUNS) -> Path:
    """The run directory of a configuration: the same for all experiments that train it."""
    return runs_folder / f"{config.data}-{config.model}-{fingerprint(config)}-seed{config.seed}"


def _found(found: Sequence[Record], row: str, config: Config) -> Record | None:
    """The record of this network, if there is one."""
    wanted = row, fingerprint(config), config.seed
    return next((one for one in found if (one.row, one.fingerprint, one.seed) == wanted), None)


def _trained(config: Config, runs_folder: Path) -> Path:
    """The run directory of a finished training, which is started, resumed, or there already."""
    directory = place_of(config, runs_folder)
    run = run_directory.Run(directory)
    if not run.exists():
        training.fit(replace(config, out=str(directory)))
        return directory
    there = run.config()
    if (fingerprint(there), there.seed) != (fingerprint(config), config.seed):
        raise InputError(
            f"run directory {directory} must hold the run that its name tells; its config.yaml is of another"
        )
    if not (run.result_path.exists() and (directory / "model.safetensors").exists()):
        training.resume(directory, threads=config.threads, data_dir=config.data_dir)
    return directory


def _measured(
    experiment: Experiment,
    row: Row,
    budget: str,
    config: Config,
    directory: Path,
    also: Sequence[str],
    measures: Sequence[MeasureName],
    before: Record | None,
) -> Record:
    """The record of a finished training, measured on all test images of its own data set, the metric's and `also`.

    What the record `before` has beside that is kept, if it is of the same weights: if the same images were wrong.
    """
    run = run_directory.Run(directory)
    network, result = pretrained.load(directory), run.result()
    as_trained = _as_trained(config, network)
    results, wrong_images = dict[str, dict[str, float]](), dict[str, list[int]]()
    counted = ["error_percent", "wrong", "total", *["missed", "missed_percent"] * (network.objects_per_image > 1)]
    for name in dict.fromkeys((config.data, experiment.metric, *also)):
        split = split_of(config, name) if experiment.split == "test" else _held_out(config)
        found = run.predictions(split)
        if found is None:
            with as_trained:
                found = predict_split(network, split)
        judged = Evaluation.of(found, network.classes)
        wrong_images[name] = found.wrong.nonzero().flatten().tolist()
        results[name] = {count: getattr(judged, count) for count in counted}
    measured = dict[MeasureName, float]()
    if before is not None and before.wrong_images[config.data] == wrong_images[config.data]:
        results, wrong_images = {**before.results, **results}, {**before.wrong_images, **wrong_images}
        measured |= before.measures
    for name in measures:
        if name in measured:
            continue
        measure = MEASURES[name]
        splits = [split_of(config, data) for data in (experiment.metric, measure.other) if data]
        with as_trained:
            measured[name] = measure.of(network, config, *splits)
    return Record(
        experiment=experiment.name,
        row=row.key,
        budget=budget,
        fingerprint=fingerprint(config),
        seed=config.seed,
        epochs=result["epochs"],
        parameters=network.parameter_count(),
        results=results,
        wrong_images=wrong_images,
        seconds=result["seconds"],
        config=records.effective(config),
        environment={name: result.get(name) for name in ENVIRONMENT},
        measures=measured,
    )


def _as_trained(config: Config, *networks: Network) -> torch.autocast:
    """Move networks to the device of a configuration; inside, they compute in its precision."""
    device = devices.resolve_device(config)
    precision = devices.resolve_precision(config, device, networks[0])
    for network in networks:
        network.to(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _together(
    experiment: Experiment,
    budget: str,
    seeds: int,
    found: Sequence[Record],
    runs_folder: Path,
    say: Callable[[str], object],
    **machine_options: Any,
) -> Record | None:
    """The record of all seeds of a row as one ensemble; None where it is there already, or weights are not here."""
    assert experiment.ensemble is not None
    row = experiment.row(experiment.ensemble[0])
    configs = [replace(experiment.config(row, budget, seed), **machine_options) for seed in range(seeds)]
    members, wanted = list(range(seeds)), fingerprint(configs[0])
    there = [one for one in found if (one.row, one.fingerprint, one.members) == (ENSEMBLE, wanted, members)]
    if there and ("views" in there[0].measures) == ("views" in experiment.measures):
        return None
    places = [place_of(config, runs_folder) for config in configs]
    gone = [str(place) for place in places if not (place / "model.safetensors").exists()]
    if gone:
        say(f"no ensemble of {seeds}, for these weights are not here: {', '.join(gone)}")
        return None
    networks, split = [pretrained.load(place) for place in places], split_of(configs[0], experiment.metric)
    with _as_trained(configs[0], *networks):
        judged = Ensemble.of(ensemble_scores(networks, split), split.labels)
        measures = dict[MeasureName, float]()
        if "views" in experiment.measures:
            shifted = ensemble_scores(networks, split, shifts=SHIFTS)
            measures["views"] = Ensemble.of(shifted, split.labels).error_percent
    singles = [one for one in found if one.fingerprint == wanted and one.row == row.key and one.seed in members]
    return replace(
        singles[0],
        row=ENSEMBLE,
        seed=None,
        members=members,
        parameters=sum(one.parameters for one in singles),
        results={experiment.metric: {name: judged.to_dict()[name] for name in ("error_percent", "wrong", "total")}},
        wrong_images={experiment.metric: judged.wrong.nonzero().flatten().tolist()},
        seconds=sum(one.seconds for one in singles),
        measures=measures,
    )


def _held_out(config: Config) -> Split:
    """The validation images of a training with `config`."""
    split = prepare.prepare_data(config).validation
    if split is None:
        raise InputError(f"validation must be above 0 for numbers of held-out images; got {config.validation}")
    return split


def split_of(config: Config, data: str, data_dir: str | None = None) -> Split:
    """All test images of a data set, read as a training with `config` reads its own.

    Raises:
        InputError: they are not here.
    """
    options = replace(config, data=data, data_dir=data_dir or config.data_dir, validation=0, train_images=None)
    return prepare.prepare_data(options).test
