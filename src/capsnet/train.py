"""Training: `fit(config)` is one visible loop on Lightning Fabric.

Every random number of step t is a function of the seed and t alone (order of the epoch, augmentation, dropout), and a
step's images are those of the global batch whatever the number of processes: a run that was killed and resumed ends
with the same weights, bit for bit on a CPU, and two processes train what one would (but for dropout, which each
process draws for itself).
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric

from capsnet import environment, memory, models, report
from capsnet.checkpoints import pretrained
from capsnet.checkpoints.model_card import Card, Tested
from capsnet.checkpoints.run_directory import Checkpoint, Run
from capsnet.config import PRESETS, Config, from_dict, preset, preset_differences, size_of, with_defaults
from capsnet.console import Progress
from capsnet.data import Dataset, available, is_folder, load, outline
from capsnet.data import describe as describe_data
from capsnet.data.image_folder import ImageFolder, Unreadable, scan
from capsnet.data.manifest import Manifest
from capsnet.data.photo import frame_of
from capsnet.data.preprocessing import MNIST_FRAME, Preprocessing
from capsnet.devices import first_process, make_fabric, resolve_device, resolve_precision, shutdown, signals
from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.evaluation import Evaluation, predict_split
from capsnet.evaluation.ood import threshold_for
from capsnet.kernels.buffers import pool
from capsnet.models import Network
from capsnet.objective import Batch, Losses, Objective
from capsnet.schema import checked, shown
from capsnet.training import defaults
from capsnet.training.batches import BatchLoader
from capsnet.training.cuda_graph import GraphedStep, check_graph
from capsnet.training.diagnosis import Chance
from capsnet.training.state import TrainingState, fitting_checkpoint
from capsnet.training.tensorboard import board, check_board

__all__ = [
    "Result",
    "as_read",
    "build",
    "describe",
    "fit",
    "layout",
    "learning_rate",
    "prepare_data",
    "resume",
]

THRESHOLD_IMAGES = 5000  # training images that the threshold is set on where none are held out
VALIDATION_COLUMNS = ("loss", "classification_loss", "reconstruction_loss", "error_percent")
RESUMABLE = (
    "epochs",
    "devices",
    "cuda_graph",
    "log_every",
    "checkpoint_steps",
    "tensorboard",
    "report",
    "threads",
    "data",
    "data_dir",
)
"""Options that may change when a run goes on, `data` where its images are the same; all others make it another run."""
UNTOLD = ("data_dir", "out", "overwrite", "log_every", "checkpoint_steps", "tensorboard", "report")
"""Options without influence on what is measured, left out of `differs_from_preset`."""


@dataclass(frozen=True)
class Result:
    """What a finished run measured.

    Attributes:
        directory: the run directory.
        test: on the test split, read once, after the last epoch.
        tested: what that split is: "validation" of a folder with train/ and val/ but no test/.
        validation: on the validation split after the last epoch, or None.
        epochs: passes over the training images.
        seconds: of training, over all sessions of the run, validation included.
        figure: inputs beside their reconstructions, or None without a decoder.
        report: the page with everything, or None where it was not asked for.
        network: the trained network, on the CPU and in evaluation mode.
    """

    directory: Path
    test: Evaluation
    tested: Literal["test", "validation"]
    validation: Evaluation | None
    epochs: int
    seconds: float
    figure: Path | None
    report: Path | None
    network: Network


def fit(config: Config, dataset: Dataset | None = None) -> Result:
    """Train as `config` says, in a new run directory, and evaluate on the test split once, at the end.

    Args:
        config: every choice of the run.
        dataset: images of one's own in memory, in place of those that `config.data` names.

    Raises:
        InputError: the configuration, data or directory do not fit; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        Diverged: the loss is not finite; the last good checkpoint is kept.
    """
    return _launch(config, dataset, resumed=None)


def resume(directory: str | Path, dataset: Dataset | None = None, **changes: Any) -> Result:
    """Go on with the run in `directory` from its last checkpoint.

    Args:
        directory: of the run.
        dataset: the one that `fit` was given, if it was.
        changes: options to change, of those that leave it the same run: more `epochs`, `devices`, `log_every`,
            `checkpoint_steps`, `tensorboard`, `threads`, `data_dir`, and `data` where the same images have moved.

    Raises:
        InputError: no run or checkpoint there, another process trains in it, or another option is to change; otherwise
            as `fit`.
    """
    run = Run(directory)
    saved = run.config()
    faults = [
        f"{name} of a resumed run must stay {getattr(saved, name, None)!r}; got {value!r}"
        for name, value in changes.items()
        if name not in RESUMABLE and value != getattr(saved, name, None)
    ]
    if faults:
        raise InputError(f"{'; and '.join(faults)} (only {', '.join(RESUMABLE)} may change)")
    if changes.get("data", saved.data) != saved.data and run.manifest() is None:
        raise InputError(f"data of a resumed run must stay {saved.data}, for it has no manifest; got {changes['data']}")
    config = replace(saved, **{name: value for name, value in changes.items() if name in RESUMABLE})
    return _launch(config, dataset, resumed=run)


def prepare_data(
    config: Config,
    dataset: Dataset | None = None,
    *,
    recorded: Manifest | None = None,
    shares: bool = True,
    tell: Callable[[str], object] | None = None,
    check: Callable[[Dataset], object] | None = None,
    read: bool = True,
) -> Dataset:
    """The data set of `config`, or `dataset` if given, with its validation split.

    Args:
        config: of a run.
        dataset: images of one's own in memory.
        recorded: which files of a folder were in which split; those that are not recorded are left out.
        shares: False chooses validation and training images as runs without a manifest did, see `Dataset`.
        tell: is given the place of decoded images that do not fit into memory.
        check: is given the data set without its images (see `data.outline`) before they are read; it may raise.
        read: False returns the data set without its images, where they need not be read to know it.

    Raises:
        InputError: see `data.load`, `image_folder.scan` and `Dataset.with_validation`.
    """
    divided = dataset is None and is_folder(config.data) and shares
    if dataset is not None:
        outlined = dataset
    elif is_folder(config.data):
        folder, reading = _scanned(config, recorded)
        outlined = outline.of_folder(_divided(folder, config, recorded, divide=shares), reading)
    else:
        about = {name: getattr(config, name) for name in ("data_dir", "image_size", "channels")}
        outlined = (outline.of_registered if config.data in available() else load)(
            config.data, **about, seed=config.data_seed
        )
    known = _with_splits(config, outlined, shares=shares, divided=divided)
    if check is not None:
        check(known)
    if not read or not outline.is_outline(outlined):
        return known
    if is_folder(config.data):
        dataset = _read_folder(config, folder, reading, recorded, divide=shares, tell=tell)
    else:
        dataset = load(config.data, **about, seed=config.data_seed)
    return _with_splits(config, dataset, shares=shares, divided=divided)


def _with_splits(config: Config, dataset: Dataset, *, shares: bool, divided: bool) -> Dataset:
    """The same cropped and, unless it is divided already, with the validation and training images of `config`."""
    if config.crop is not None:
        dataset = dataset.cropped(config.crop)
    if divided:
        return dataset
    if config.validation is not None or dataset.validation is None:
        count = min(5000, len(dataset.train) // 10) if config.validation is None else config.validation
        dataset = dataset.with_validation(count, seed=config.data_seed, shares=shares)
    if config.train_images is not None:
        dataset = dataset.with_train(config.train_images, seed=config.data_seed, shares=shares)
    return dataset


def _scanned(config: Config, recorded: Manifest | None) -> tuple[ImageFolder, Preprocessing]:
    """The images of a folder, not yet divided, and how they are to be read; a recorded one may have got other files."""
    skip = config.skip_unreadable or recorded is not None
    folder = scan(config.data, skip_unreadable=skip, classes=recorded.classes if recorded else None)
    reading = folder.preprocessing(size=size_of(config.image_size), channels=config.channels, bits=config.bit_depth)
    return folder, reading.with_framing(config.framing)


def _read_folder(
    config: Config,
    folder: ImageFolder,
    reading: Preprocessing,
    recorded: Manifest | None,
    *,
    divide: bool,
    tell: Callable[[str], object] | None,
) -> Dataset:
    """The images of a folder in the splits that are recorded, or in those of `config`."""
    try:
        return _divided(folder, config, recorded, divide=divide).read(reading, channels=config.channels, tell=tell)
    except Unreadable as error:
        if not config.skip_unreadable and recorded is None:
            raise
        folder = folder.without(error.faults)
    return _divided(folder, config, recorded, divide=divide).read(reading, channels=config.channels, tell=tell)


def _divided(folder: ImageFolder, config: Config, recorded: Manifest | None, *, divide: bool) -> ImageFolder:
    if recorded is not None:
        return folder.recorded(recorded.splits)
    folder = folder.divided(seed=config.data_seed)
    if not divide:
        return folder
    count = config.validation
    if count is None and not folder.of("validation"):
        count = min(5000, len(folder.of("train")) // 10)
    if count is not None:
        folder = folder.with_validation(count, seed=config.data_seed)
    return folder if config.train_images is None else folder.with_train(config.train_images, seed=config.data_seed)


def as_read(config: Config, dataset: Dataset) -> Config:
    """`config` with what was chosen of how a folder is read, so that it is read so again.

    Args:
        config: of a run.
        dataset: read as it says.
    """
    reading = dataset.preprocessing
    if reading is None:
        return config
    size = reading.height if reading.height == reading.width else f"{reading.height}x{reading.width}"
    return replace(config, image_size=size, channels=reading.channels, bit_depth=reading.bits, framing=reading.framing)


def _read_so(given: Config, dataset: Dataset) -> str | None:
    """One line on how a folder's images are read where that was not chosen."""
    reading = dataset.preprocessing
    if reading is None or not dataset.files:
        return None
    if reading.framing == "digits":
        return "digits cut out, scaled in proportion and centred (--framing off resizes whole images)"
    if given.image_size is not None:
        return None
    sizes = {(file.header.height, file.header.width) for file in dataset.files}
    if sizes == {(reading.height, reading.width)}:
        return f"images kept at {reading.height} x {reading.width} pixels (--image-size changes it)"
    return (
        f"images resized to {reading.height} x {reading.width} pixels, whatever their proportions "
        "(--image-size changes it)"
    )


def _same_images(dataset: Dataset, recorded: Manifest, config: Config) -> None:
    """Raise InputError unless the images of a run that goes on are those that it began with."""
    there = Manifest.of(dataset)
    used = Manifest(tuple(line for line in recorded.lines if line.split != "unused"))
    differences = used.differences(Manifest(tuple(line for line in there.lines if line.split != "unused")))
    if differences:
        raise InputError(
            f"data {config.data} must be the images that the run began with; since then: {'; '.join(differences)}"
        )


def layout(config: Config, dataset: Dataset) -> Network:
    """The network of `config` for the images and classes of `dataset`, without memory for its weights.

    Raises:
        InputError: see `pretrained.outline`, or an option was given that this network does not have.
    """
    options, config = models.builder_options(config.model), with_defaults(config)
    recipes = [with_defaults(preset(name)) for name in PRESETS]
    for other in models.available():
        for name in models.builder_options(other):
            value = getattr(config, name)
            if name not in options and value not in [getattr(recipe, name) for recipe in recipes]:
                raise InputError(f"option {name} is of model {other} and must not be given for {config.model}")
    about = {
        "image_shape": dataset.image_shape,
        "num_classes": len(dataset.classes),
        "classes": dataset.classes,
        "objects_per_image": dataset.objects_per_image,
        **{name: getattr(config, name) for name in options},
    }
    return pretrained.outline(config.model, **about)


def build(config: Config, dataset: Dataset) -> Network:
    """The untrained network of `config` for the images and classes of `dataset`; weights follow the seed.

    Raises:
        InputError: see `layout`.
    """
    about = layout(config, dataset).config
    torch.manual_seed(config.seed)
    return models.create(**about)


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (from 0): `max(floor, lr * decay ** (step / decay_steps))`."""
    decay_steps = config.lr_decay_steps or steps_per_epoch
    return max(config.lr_floor, config.lr * math.pow(config.lr_decay, step / decay_steps))


def _launch(config: Config, dataset: Dataset | None, resumed: Run | None) -> Result:
    """Check everything that can be checked, start the processes, train, and leave no process group behind."""
    if dataset is not None:
        config = replace(config, data=dataset.name)
    run = resumed or Run(config.out or _free_directory(config))
    device = resolve_device(config)
    if config.tensorboard:
        check_board(run.directory)
    recorded = run.manifest() if resumed else None
    first = int(os.environ.get("RANK", "0")) == 0 and first_process()
    dataset = prepare_data(
        config,
        dataset,
        recorded=recorded,
        shares=not (resumed and run.exists() and not recorded),
        tell=Progress(epochs=0, steps=0, quiet=not first).note,
        check=(lambda known: _check_memory(config, known, device)) if first else None,
    )
    if recorded is not None:
        _same_images(dataset, recorded, config)
    if config.stop_at is not None and dataset.validation is None:
        raise InputError(f"stop_at must be given with validation images to judge by; got {config.stop_at} without any")
    given, config = config, defaults.resolved(as_read(config, dataset), dataset)
    with torch.random.fork_rng(devices=[]):
        network = build(config, dataset)
    precision = resolve_precision(config, device, network)
    if config.cuda_graph:
        check_graph(config, device, network)
    fabric = make_fabric(config, device, precision)
    with ExitStack() as held:
        if first:
            run = _claimed(config, run, held, given=bool(resumed or config.out or config.overwrite))
        checkpoint = _checkpoint(run, config, network, dataset) if resumed else None
        if first:
            if resumed:
                run.reopen(config)
            else:
                run.create(config, Manifest.of(dataset), overwrite=config.overwrite)

        fabric.launch()
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            run = Run(fabric.broadcast(str(run.directory)))
            with signals() as received, torch.random.fork_rng(devices=[]):
                note = "; ".join(filter(None, (*dataset.notes, _read_so(given, dataset), defaults.told(given, config))))
                return _train(fabric, config, dataset, network, run, received, checkpoint, precision, note)
        except (Interrupted, Diverged, InputError):
            if fabric.is_global_zero:
                raise
            raise SystemExit(0) from None  # all processes stop for the same reason, and the first one tells it
        finally:
            shutdown(fabric)


def _check_memory(config: Config, dataset: Dataset, device: torch.device) -> None:
    """Raise InputError where a training is not going to fit into memory."""
    config = defaults.resolved(as_read(config, dataset), dataset)
    network = layout(config, dataset)
    memory.check_training(
        network,
        config,
        device,
        dataset,
        precision=resolve_precision(config, device, network),
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", config.devices)),
    )


def _claimed(config: Config, run: Run, held: ExitStack, *, given: bool) -> Run:
    """The run with its directory kept to this process while `held` is open.

    Args:
        config: of the run.
        run: its directory; where it was not `given` and another process took it meanwhile, the next free one.
        held: what keeps it.
        given: whether the directory is what the user named.

    Raises:
        InputError: a given directory is in use.
    """
    while True:
        with ExitStack() as claim:
            try:
                claim.enter_context(run.locked())
            except InputError:
                if given:
                    raise
            else:
                if given or not run.exists():
                    held.push(claim.pop_all())
                    return run
        run = Run(_free_directory(config))


def _checkpoint(run: Run, config: Config, network: Network, dataset: Dataset) -> Checkpoint | None:
    """The checkpoint to go on from; None where a run was stopped before its first one.

    Raises:
        InputError: it is damaged, or of another run, or of other data.
    """
    if not run.checkpoint_path.exists() and not run.result_path.exists():
        return None
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    checkpoint, path = run.load_checkpoint(most=4 * weights + 2**26), run.checkpoint_path  # with two moments and rows
    theirs = asdict(from_dict(checkpoint["config"], source=f"checkpoint {path}"))
    for name, ours in asdict(config).items():
        if ours != theirs[name] and name in checkpoint["config"] and name not in {*RESUMABLE, "out", "overwrite"}:
            raise InputError(
                f"checkpoint {path} must be of the run that config.yaml beside it tells; "
                f"its {name} is {shown(theirs[name])}, not {shown(ours)}"
            )
    if checkpoint["train_images"] != len(dataset.train):
        raise InputError(
            f"data {config.data} must be the {shown(checkpoint['train_images'])} training images that the run began "
            f"with; got {len(dataset.train)}"
        )
    steps = math.ceil(len(dataset.train) / config.batch_size)
    validated = dataset.validation is not None
    checkpoint = fitting_checkpoint(checkpoint, network, steps=steps, validated=validated, source=f"checkpoint {path}")
    begun = checkpoint["state"]["epoch"] + (checkpoint["state"]["step"] > 0)
    if config.epochs is not None and config.epochs < begun:
        raise InputError(f"epochs must be at least the {begun} that the run has begun; got {config.epochs}")
    return checkpoint


def _train(
    fabric: Fabric,
    config: Config,
    dataset: Dataset,
    network: Network,
    run: Run,
    received: list[int],
    checkpoint: Checkpoint | None,
    precision: str,
    note: str | None,
) -> Result:
    assert config.epochs is not None  # resolved
    about = environment.describe(fabric.device)  # of the code that runs, not of what is on disk at the end
    network.to(fabric.device)
    objective, optimizer = fabric.setup(
        Objective(network, config), torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    )

    def step(batch: Batch, share: float = 1.0) -> Losses:
        optimizer.zero_grad(set_to_none=not config.cuda_graph)
        losses: Losses = objective(*batch)
        session.refuse(losses, batch)
        fabric.backward(losses.total.mean() * share)
        optimizer.step()
        return losses

    count = len(dataset.train)
    graphed = GraphedStep(step, batch_size=min(config.batch_size, count)) if config.cuda_graph else None
    rate_here = torch.tensor(config.lr, device=fabric.device)
    feed = BatchLoader(dataset, config, fabric.device)
    session = TrainingState(fabric, config, run, network, optimizer, train_images=count, received=received)
    notes = [note, session.restore(checkpoint) if checkpoint else None]
    steps, validation, losses = session.steps, None, None
    chance = Chance(
        dataset.train.labels,
        classes=len(dataset.classes),
        objects_per_image=dataset.objects_per_image,
        config=config,
        steps=steps,
    )

    with ExitStack() as stack:
        progress = stack.enter_context(Progress(epochs=config.epochs, steps=steps, quiet=not fabric.is_global_zero))
        for note in filter(None, notes):
            progress.note(note)
        write_board = None
        if config.tensorboard and fabric.is_global_zero:
            write_board = stack.enter_context(board(run.directory / "tensorboard", first_epoch=session.at.epoch + 1))
        session.by_first(lambda: run.write_metrics(session.rows))
        while session.at.epoch < config.epochs and not session.reached():
            at = session.at
            order = torch.randperm(count, generator=_generator(config.seed, at.epoch, -1))
            clock = time.perf_counter() - at.epoch_seconds
            objective.train()
            while at.step < steps:
                batch = order[at.step * config.batch_size : (at.step + 1) * config.batch_size]
                mine = torch.arange(fabric.global_rank, len(batch), fabric.world_size)
                share = len(mine) * fabric.world_size / len(batch)  # DDP takes the mean over the processes
                if len(mine) == 0:  # this process has no image of a small last batch: any image, with no weight
                    mine = torch.zeros(1, dtype=torch.int64)
                fed = feed(batch, mine, generator=_generator(config.seed, at.epoch, at.step))
                rate = learning_rate(config, at.epoch * steps + at.step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate_here.fill_(rate) if graphed else rate
                    group["capturable"] = bool(graphed)
                torch.manual_seed(_mixed(config.seed, at.epoch, at.step, fabric.global_rank))  # of dropout

                losses = graphed(fed) if graphed else step(fed, share)
                session.record(losses, fed.labels, counted=share > 0)
                at.epoch_seconds = time.perf_counter() - clock
                told = at.step % config.log_every == 0 or at.step == steps
                saved = bool(config.checkpoint_steps) and at.step % config.checkpoint_steps == 0
                if told or saved or (received and fabric.world_size == 1):
                    session.check()
                if told:
                    done = min(at.step * config.batch_size, count)
                    progress.update(at.epoch, at.step, session.mean_here(), done / at.epoch_seconds)
                if saved and at.step < steps:
                    session.save()

            held_out: dict[str, float] = {}
            if dataset.validation is not None:
                validation = _evaluate(session, dataset, "validation")
                held_out = {f"validation_{name}": getattr(validation, name) for name in VALIDATION_COLUMNS}
            rate = learning_rate(config, (at.epoch + 1) * steps - 1, steps)
            row = session.row(rate, time.perf_counter() - clock, held_out)
            if write_board:
                write_board(row, network, dataset)
            session.finish_epoch(row)
            progress.epoch(row)
            if line := chance.line(row, losses):
                progress.note(line)

        test = _evaluate(session, dataset, "test")
        if dataset.validation is not None and validation is None:  # resumed after the last epoch
            validation = _evaluate(session, dataset, "validation")
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    figure = run.figures / "reconstructions.png" if network.decoder is not None else None
    page = run.directory / "report.html" if config.report else None
    result = {
        "test": test.to_dict(),
        "validation": validation.to_dict() if validation else None,
        "selection": _selection(config, dataset.tested),
        "tested": dataset.tested,
        "data": dataset.name,
        "train_images": len(dataset.train),
        "model": config.model,
        "preset": config.preset,
        "differs_from_preset": {key: x for key, x in preset_differences(config).items() if key not in UNTOLD},
        "parameters": network.parameter_count(),
        "seed": config.seed,
        "epochs": session.at.epoch,
        "seconds": round(session.at.seconds, 1),
        "processes": fabric.world_size,
        "precision": precision,
        **about,
    }

    def finish() -> None:
        pretrained.save_pretrained(network, run.directory)
        card = describe(network, dataset, config, test.to_dict(), epochs=session.at.epoch)
        pretrained.save_card(card, run.directory)
        run.write_result(result)
        if figure:
            report.draw_reconstructions(network, dataset.test, figure)
        if page:
            report.write(page, network, dataset, config=config, card=card, rows=session.rows, result=result)

    session.by_first(finish)
    pool.clear()
    return Result(
        run.directory, test, dataset.tested, validation, session.at.epoch, session.at.seconds, figure, page, network
    )


def describe(network: Network, dataset: Dataset, config: Config, test: dict[str, Any], *, epochs: int) -> Card:
    """The card of trained weights, with the threshold above which an image is no object of the known classes.

    Args:
        network: trained, on the CPU.
        dataset: with the validation split of the run. Where none was held out, the threshold is set on training images,
            which the card says.
        config: of the run; places are left out.
        test: results on the test split, see `Evaluation.to_dict`.
        epochs: passes over the training images.
    """
    threshold = None
    if network.decoder is not None and network.objects_per_image == 1:
        split, name = dataset.validation, "validation"
        if split is None:
            train = dataset.shown("train")
            assert train is not None
            order = torch.randperm(len(train), generator=_generator(config.data_seed))
            split, name = train.take(order[:THRESHOLD_IMAGES]), "train"
        errors = predict_split(network, split).reconstruction_errors
        assert errors is not None
        threshold = threshold_for(errors, split=name)
    return Card(
        config=asdict(replace(config, data_dir=None, out=None, overwrite=False)),
        epochs=epochs,
        train_images=len(dataset.train),
        test=checked({name: test[name] for name in Tested.__annotations__}, Tested),
        preprocessing=reading_of(network, dataset, config),
        threshold=threshold,
    )


def reading_of(network: Network, dataset: Dataset, config: Config) -> Preprocessing:
    """How image files become what the network sees."""
    if dataset.preprocessing is not None:
        return replace(dataset.preprocessing, crop=dataset.crop)
    known = describe_data(dataset.name) if dataset.name in available() else None
    digits = (config.framing or (known.framing if known else "off")) == "digits"
    frame = (frame_of(dataset.train.images) or MNIST_FRAME) if digits else None
    height, width = dataset.train.images.shape[2:]
    return Preprocessing(
        height, width, network.image_shape[0], dataset.crop, framing="digits" if digits else "off", frame=frame
    )


def _evaluate(session: TrainingState, dataset: Dataset, name: str) -> Evaluation:
    """Results on the split `name`, every example counted once over all processes; stops where the training would."""
    fabric = session.fabric
    with fabric.autocast():
        found = predict_split(
            session.network,
            getattr(dataset, name),
            config=session.config,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            reduced=session.reduced,
            each_batch=session.check,
        )
    result = Evaluation.of(found, dataset.classes)
    if not math.isfinite(result.loss):
        epoch = session.at.epoch + (session.at.step > 0)
        raise session.diverged(f"{name} loss became NaN or infinite after epoch {epoch}")
    return result


def _selection(config: Config, tested: str) -> str:
    """How the epoch was chosen whose weights were tested."""
    images = "no choice was made on the test images" if tested == "test" else "there are no test images"
    if config.stop_at is None:
        return f"none: weights after the last epoch, and {images}"
    return (
        f"weights after the first epoch with a validation error of at most {config.stop_at:g} %, or after "
        f"{config.epochs} epochs; {images}"
    )


def _mixed(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers, different for every different list of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*numbers))


def _free_directory(config: Config) -> Path:
    name = config.data if not Path(config.data).is_dir() else Path(config.data).resolve().name
    stem = Path("runs") / f"{name}-{config.model}-seed{config.seed}"
    candidates: Iterator[Path] = (stem.with_name(f"{stem.name}-{k}") for k in range(2, 10_000))
    return stem if not stem.exists() or config.overwrite else next(p for p in candidates if not p.exists())
