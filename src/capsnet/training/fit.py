"""A run from its configuration to its report: prepare, launch, train, measure, save, report."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from capsnet import environment, memory, report
from capsnet.checkpoints import pretrained
from capsnet.checkpoints.model_card import Card, Tested
from capsnet.checkpoints.run_directory import Checkpoint, Run
from capsnet.config import Config, from_dict, preset_differences, roles
from capsnet.data import Dataset, dataset_of
from capsnet.data.manifest import Manifest
from capsnet.devices import first_process, launch, make_fabric, resolve_device, resolve_precision, shutdown, signals
from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.evaluation import Evaluation, predict_split
from capsnet.evaluation.ood import threshold_for
from capsnet.kernels.buffers import pool
from capsnet.models import Network, check_modules, class_name, inference_batch
from capsnet.options import LOCAL, RESUMABLE
from capsnet.options.schema import checked, joined, shown
from capsnet.training import defaults
from capsnet.training.console import Progress
from capsnet.training.cuda_graph import check_graph
from capsnet.training.finetune import IN_MEMORY, name_of, start_from
from capsnet.training.loop import predict_checked, train_epochs
from capsnet.training.prepare import (
    as_read,
    augmentation_of,
    build,
    how_read,
    layout,
    prepare_data,
    reading_of,
    same_images,
)
from capsnet.training.schedule import generator, steps_of
from capsnet.training.state import TrainingState, fitting_checkpoint
from capsnet.training.tensorboard import check_tensorboard

__all__ = ["Result", "describe", "fit", "resume"]

THRESHOLD_IMAGES = 5000  # training images that the threshold is set on where none are held out


@dataclass(frozen=True)
class Result:
    """What a finished run measured.

    Attributes:
        directory: the run directory.
        test: on the test split, read once, after the last epoch, of the weights that are kept.
        tested: what that split is: "validation" of a folder with train/ and val/ but no test/.
        validation: of the same weights on the validation split, or None; too good where it chose them.
        epochs: passes over the training images.
        kept_epoch: that whose weights are kept.
        selection: how it was chosen; begins with "none" where validation had no part in it.
        seconds: of training, over all sessions of the run, validation included.
        figure: inputs beside their reconstructions, or None without a decoder.
        report: the page with everything, or None where it was not asked for.
        network: the trained network, on the CPU and in evaluation mode.

    Examples:
        >>> from capsnet.config import Config
        >>> result = fit(Config.of(epochs=1, train_images=64, conv_channels=8, capsule_types=2, report=False))
        >>> result.epochs, result.test.total, result.tested
        (1, 2000, 'test')
    """

    directory: Path
    test: Evaluation
    tested: Literal["test", "validation"]
    validation: Evaluation | None
    epochs: int
    kept_epoch: int
    selection: str
    seconds: float
    figure: Path | None
    report: Path | None
    network: Network


def fit(
    config: Config | None = None,
    dataset: Any = None,
    *,
    init_from: Network | str | Path | None = None,
    **options: Any,
) -> Result:
    """Train as `config` says, in a new run directory, and evaluate on the test split once, at the end.

    Args:
        config: every choice of the run; default: the preset `paper`.
        dataset: images of one's own in memory, in place of those that `config.data` names: a `Dataset`, or all that
            `data.dataset_of` takes: a torch `Dataset` of (image, label), a pair of arrays or tensors (images, labels),
            or a mapping of "train", "test" and "validation" to such. Without a test split a sixth of each class tests.
        init_from: a trained network, or the path or name of its weights, to start from. Without `config` the model and
            its options are those of these weights, where `options` do not say otherwise.
        options: other values of options, see `Config.of`: `fit(data="strokes", epochs=1, conv_channels=32)`. A module
            may be one of them where `create` takes one: `fit(data="cifar10", model="capsule-head", backbone=Net())`. A
            copy of it is trained, from its own weights. The run keeps the weights and the name of its class: `load` and
            `resume` need such a module again.

    Raises:
        InputError: the configuration, data or directory do not fit; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        Diverged: the loss is not finite; the last good checkpoint is kept.

    Examples:
        >>> images, labels = torch.rand(24, 1, 20, 20), torch.arange(24) % 2
        >>> result = fit(dataset=(images, labels), epochs=1, conv_channels=4, capsule_types=1, report=False)
        >>> result.test.total  # a sixth of each class was held out
        4
        >>> result.network(images[:3]).scores.shape
        torch.Size([3, 2])
    """
    source = init_from if isinstance(init_from, Network) else None
    modules = {name: value for name, value in options.items() if isinstance(value, nn.Module)}
    options |= {name: class_name(module) for name, module in modules.items()}
    if init_from is not None:
        theirs = pretrained.options_of(init_from, **({} if source else modules))
        if config is None and options.get("model", theirs["model"]) == theirs["model"]:
            options = {**theirs, **options}
        options["init_from"] = IN_MEMORY if isinstance(init_from, Network) else str(init_from)
    config = config.changed(**options) if config and options else config or Config.of(**options)
    if source is not None:
        modules = {name: module for name, module in source.given.items() if name in config.modules} | modules
    check_modules(modules, config.modules, call="capsnet.fit(config")
    return _launch(config, _in_memory(config, dataset), modules, resumed=None, source=source)


def resume(directory: str | Path, dataset: Any = None, **changes: Any) -> Result:
    """Go on with the run in `directory` from its last checkpoint.

    Args:
        directory: of the run.
        dataset: the one that `fit` was given, if it was.
        changes: options to change, of those with the role `RESUMABLE` (see `capsnet.options`), which leave it the same
            run: more `epochs`, for instance, or `data` where the same images have moved. And such modules as `fit` was
            given: `resume(directory, backbone=Net())`.

    Raises:
        InputError: no run or checkpoint there, another process trains in it, or another option is to change; otherwise
            as `fit`.

    Examples:
        >>> mine = torch.rand(24, 1, 20, 20), torch.arange(24) % 2
        >>> begun = fit(dataset=mine, model="efficient-cnn", epochs=1, out="run", report=False)
        >>> resume("run", dataset=mine, epochs=2).epochs
        2
    """
    run = Run(directory)
    saved, resumable = defaults.as_begun(run.config()), roles(RESUMABLE)
    if changes.get("model", saved.model) != saved.model:
        raise InputError(f"model of a resumed run must stay {saved.model}; got {changes['model']}")
    modules = {name: value for name, value in changes.items() if isinstance(value, nn.Module)}
    check_modules(modules, saved.modules, call="capsnet.resume(directory", source=f"run {directory}")
    changes = {name: value for name, value in changes.items() if name not in modules}
    before = saved.flat()
    faults = [
        f"{name} of a resumed run must stay {before.get(name)!r}; got {value!r}"
        for name, value in changes.items()
        if name not in resumable and value != before.get(name)
    ]
    if faults:
        raise InputError(f"{joined(faults)} (only {', '.join(sorted(resumable))} may change)")
    if changes.get("data", saved.data) != saved.data and run.manifest() is None:
        raise InputError(f"data of a resumed run must stay {saved.data}, for it has no manifest; got {changes['data']}")
    config = saved.changed(**{name: value for name, value in changes.items() if name in resumable})
    return _launch(config, _in_memory(config, dataset), modules, resumed=run)


def _in_memory(config: Config, data: Any) -> Dataset | None:
    """The data set of what `fit` was given, read as `config` says; None for None."""
    if data is None or isinstance(data, Dataset):
        return data
    return dataset_of(
        data,
        seed=config.data_seed,
        image_size=config.image_size,
        resize=config.resize,
        channels=config.channels,
        bits=config.bit_depth,
        framing=config.framing,
    )


def _launch(
    config: Config,
    dataset: Dataset | None,
    modules: Mapping[str, nn.Module],
    *,
    resumed: Run | None,
    source: Network | None = None,
) -> Result:
    """Check everything that can be checked, start the processes, train, and leave no process group behind."""
    if dataset is not None:
        config = replace(config, data=dataset.name)
    run = resumed or Run(config.out or _free_directory(config))
    device = resolve_device(config)
    if config.tensorboard:
        check_tensorboard(run.directory)
    recorded = run.manifest() if resumed else None
    first = first_process()
    tell = Progress(epochs=0, steps=0, quiet=not first).note
    fits = list[tuple[int | None, str | None]]()  # of the first process
    dataset = prepare_data(
        config,
        dataset,
        recorded=recorded,
        shares=not (resumed and run.exists() and not recorded),
        tell=tell,
        check=(lambda known: fits.append(_check_memory(config, known, device, modules))) if first else None,
    )
    micro_batch, in_parts = fits[0] if first else (None, None)
    config = replace(config, micro_batch=micro_batch)
    if recorded is not None:
        same_images(dataset, recorded, config)
    given, config = config, defaults.resolved(as_read(config, dataset), dataset)
    with torch.random.fork_rng(devices=[]):
        network = build(config, dataset, modules)
    precision = resolve_precision(config, device, network)
    if config.cuda_graph:
        check_graph(config, device, network)
    fabric = make_fabric(config, device, precision)
    if config.init_from is not None and not (resumed and run.checkpoint_path.exists()):
        source = source or pretrained.load(config.init_from, **deepcopy(dict(modules)))
        tell(start_from(network, source, name=name_of(config.init_from)))
    with ExitStack() as held:
        if first:
            run = _locked_run(config, run, held, given=bool(resumed or config.out or config.overwrite))
        checkpoint = _checkpoint(run, config, network, dataset) if resumed else None
        if first:
            if resumed:
                run.reopen(config)
            else:
                run.create(config, Manifest.of(dataset), overwrite=config.overwrite)
            if in_parts:
                tell(in_parts)

        fabric.launch()
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            run = Run(fabric.broadcast(str(run.directory)))
            config = replace(config, micro_batch=fabric.broadcast(config.micro_batch))
            with signals() as received, torch.random.fork_rng(devices=[]):
                note = "; ".join(
                    filter(None, (*dataset.notes, how_read(given, dataset), defaults.told(given, config, dataset)))
                )
                about = environment.describe(fabric.device)  # of the code that runs, not of what is on disk at the end
                state, validation = train_epochs(
                    fabric, config, dataset, network, run, received=received, checkpoint=checkpoint, note=note
                )
                return _finished(state, dataset, validation, precision=precision, about=about)
        except (Interrupted, Diverged, InputError):
            if fabric.is_global_zero:
                raise
            raise SystemExit(0) from None  # all processes stop for the same reason, and the first one tells it
        finally:
            shutdown(fabric)


def _check_memory(
    config: Config, dataset: Dataset, device: torch.device, modules: Mapping[str, nn.Module]
) -> tuple[int | None, str | None]:
    """The `micro_batch` with which a training fits into memory, and what is to be said; InputError where none does."""
    config = defaults.resolved(as_read(config, dataset), dataset)
    network = layout(config, dataset, modules)
    return memory.check_training(
        network,
        config,
        device,
        dataset,
        precision=resolve_precision(config, device, network),
        processes=launch(config.devices),
    )


def _locked_run(config: Config, run: Run, held: ExitStack, *, given: bool) -> Run:
    """The run with its directory kept to this process while `held` is open.

    Where another process took it meanwhile, it is the next free one, or InputError if the user named (`given`) it.
    """
    while True:
        with ExitStack() as lock:
            try:
                lock.enter_context(run.locked())
            except InputError:
                if given:
                    raise
            else:
                if given or not run.exists():
                    held.push(lock.pop_all())
                    return run
        run = Run(_free_directory(config))


def _checkpoint(run: Run, config: Config, network: Network, dataset: Dataset) -> Checkpoint | None:
    """The checkpoint to go on from, of this run and data; None where a run was stopped before its first one."""
    if not run.checkpoint_path.exists() and not run.result_path.exists():
        return None
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    most = 5 * weights + 2**26  # with at most two moments, the average, the best ones and rows
    checkpoint, path = run.load_checkpoint(most=most), run.checkpoint_path
    theirs = defaults.as_begun(from_dict(checkpoint["config"], source=f"checkpoint {path}")).flat()
    for name, ours in config.flat().items():
        if ours != theirs[name] and name not in {*roles(RESUMABLE), "out", "overwrite"}:
            raise InputError(
                f"checkpoint {path} must be of the run that config.yaml beside it tells; "
                f"its {name} is {shown(theirs[name])}, not {shown(ours)}"
            )
    if checkpoint["train_images"] != len(dataset.train):
        raise InputError(
            f"data {config.data} must be the {shown(checkpoint['train_images'])} training images that the run began "
            f"with; got {len(dataset.train)}"
        )
    steps = steps_of(config, len(dataset.train))
    checkpoint = fitting_checkpoint(
        checkpoint,
        network,
        config=config,
        steps=steps,
        validated=dataset.validation is not None,
        source=f"checkpoint {path}",
    )
    begun = checkpoint["state"]["epoch"] + (checkpoint["state"]["step"] > 0)
    if config.epochs is not None and config.epochs < begun:
        raise InputError(f"epochs must be at least the {begun} that the run has begun; got {config.epochs}")
    return checkpoint


def _finished(
    state: TrainingState, dataset: Dataset, validation: Evaluation | None, *, precision: str, about: dict[str, Any]
) -> Result:
    """Measure, save, report."""
    fabric, config, run = state.fabric, state.config, state.run
    found = predict_checked(state, state.kept, dataset, "test")
    test = Evaluation.of(found, dataset.classes)
    if dataset.validation is not None and validation is None:  # resumed after the epoch that is kept
        validation = Evaluation.of(predict_checked(state, state.kept, dataset, "validation"), dataset.classes)
    selection = _selection(state, dataset.tested)
    network = state.kept
    network.freeze()
    network.preprocessing = reading_of(network, dataset, config)
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    figure = run.figures / "reconstructions.png" if network.decoder is not None else None
    page = run.directory / "report.html" if config.report else None
    config = replace(config, init_from=config.init_from and name_of(config.init_from))
    result = {
        "test": test.to_dict(),
        "validation": validation.to_dict() if validation else None,
        "selection": selection,
        "tested": dataset.tested,
        "data": dataset.name,
        "train_images": len(dataset.train),
        "model": config.model,
        "preset": config.preset,
        "fine_tuned_from": config.init_from,
        "augmentation": str(augmentation_of(config, dataset)),
        "differs_from_preset": {key: x for key, x in preset_differences(config).items() if key not in roles(LOCAL)},
        "parameters": network.parameter_count(),
        "seed": config.seed,
        "epochs": state.at.epoch,
        "kept_epoch": state.kept_epoch,
        "seconds": round(state.at.seconds, 1),
        "processes": fabric.world_size,
        "precision": precision,
        **about,
    }

    def finish() -> None:
        tested = {**test.to_dict(), "selection": selection}
        card = describe(network, dataset, config, tested, epochs=state.at.epoch)
        pretrained.save_pretrained(network, run.directory, card)
        run.write_predictions(found, dataset.test)
        run.write_result(result)
        if figure:
            report.draw_reconstructions(network, dataset.test, figure)
        if page:
            report.write(page, network, dataset, found, config=config, card=card, rows=state.rows, result=result)

    state.by_first(finish)
    pool.clear()
    return Result(
        run.directory,
        test,
        dataset.tested,
        validation,
        state.at.epoch,
        state.kept_epoch,
        selection,
        state.at.seconds,
        figure,
        page,
        network,
    )


def describe(network: Network, dataset: Dataset, config: Config, test: dict[str, Any], *, epochs: int) -> Card:
    """The card of trained weights, with the threshold above which an image is no object of the known classes.

    That is set on the validation images, or, where none were held out, on training images, which the card says. Places
    are left out of the configuration; `test` is that of `Evaluation.to_dict`, and the `selection` of the weights.
    """
    threshold = None
    if network.decoder is not None and network.objects_per_image == 1:
        split, name = dataset.validation, "validation"
        if split is None:
            train = dataset.shown("train")
            assert train is not None
            order = torch.randperm(len(train), generator=generator(config.data_seed))
            split, name = train.take(order[:THRESHOLD_IMAGES]), "train"
        batch_size = inference_batch(network, at_most=config.micro_batch)
        errors = predict_split(network, split, batch_size=batch_size).reconstruction_errors
        assert errors is not None
        threshold = threshold_for(errors, split=name)
    counts = dataset.train.labels.bincount(minlength=len(dataset.classes))
    return Card(
        config=replace(config, data_dir=None, out=None, overwrite=False).flat(),
        epochs=epochs,
        train_images=len(dataset.train),
        test=checked({name: test[name] for name in Tested.__annotations__}, Tested),
        classes=dict(zip(dataset.classes, counts.tolist(), strict=True)),
        threshold=threshold,
    )


def _selection(state: TrainingState, tested: str) -> str:
    """How the epoch was chosen whose weights were tested."""
    config, rows = state.config, state.rows
    weights = f"weights averaged over the steps (decay {config.ema:g})" if config.ema else "weights"
    ends = [f"after {config.epochs} epochs"]
    if config.patience is not None:
        ends.insert(0, f"after {config.patience} epochs in a row without a new best one")
    if config.stop_at is not None:
        ends.insert(0, f"after the first epoch with a validation error of at most {config.stop_at:g} %")
    best = state.best is not None and bool(rows)
    chosen = best or len(ends) > 1
    if tested == "test":
        images = "no choice was made on the test images"
    elif chosen:
        images = "validation chose the epoch, so this number is too good: there are no test images"
    else:
        images = "there are no test images"
    if not chosen:
        return f"none: {weights} after the last epoch, and {images}"
    if best:
        which = f"after epoch {state.kept_epoch} of {len(rows)}, which had the lowest validation error"
    else:
        which = ", or ".join(ends)
    return f"{weights} {which}; {images}"


def _free_directory(config: Config) -> Path:
    name = config.data if not Path(config.data).is_dir() else Path(config.data).resolve().name
    stem = Path("runs") / f"{name}-{config.model}-seed{config.seed}"
    candidates: Iterator[Path] = (stem.with_name(f"{stem.name}-{k}") for k in range(2, 10_000))
    return stem if not stem.exists() or config.overwrite else next(p for p in candidates if not p.exists())
